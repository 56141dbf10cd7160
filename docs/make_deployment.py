"""Exported tied layers against untied ones, in docs/recipes/deployment.md.

``python docs/make_deployment.py --measure`` exports layers for onnxruntime and by AOTInductor, each
with its law and untied, and writes what it finds to docs/examples/deployment.json. It takes some
minutes, and a C++ compiler. Without ``--measure`` it only writes the tables from there.

Times are processor time of one thread, so that other work on the machine counts little. The two
files of a layer take turns, and what is compared is each pair of turns.
"""

from __future__ import annotations

import copy
import gc
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from make_tables import filled
from torch import Tensor, nn

import tiedparam as tp

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "recipes" / "deployment.md"
RESULT = DOCS / "examples" / "deployment.json"
COMMAND = "python docs/make_deployment.py"
TURNS = 15
Case = tuple[str, nn.Module, Tensor]


def cases() -> Iterator[Case]:
    """What is exported: what the table calls it, the tied model in eval mode, and its input."""

    def conv(channels: int) -> tuple[nn.Module, Tensor, str]:
        layer = nn.Conv2d(channels, channels, 3, padding=1)
        return layer, torch.randn(1, channels, 14, 14), f"Conv2d({channels}, {channels}, 3)"

    def linear() -> tuple[nn.Module, Tensor, str]:
        return nn.Linear(1024, 1024), torch.randn(8, 1024), "Linear(1024, 1024)"

    for rule, options, (layer, x, shape) in (
        ("flip_sym", {}, conv(64)),
        ("flip_sym", {}, conv(256)),
        ("kernel_symmetry", {"group": "d4"}, conv(256)),
        ("channel_shared", {"over": "in"}, conv(256)),
        ("row_repeat", {"groups": 8}, linear()),
        ("circulant", {}, linear()),
        ("symmetric", {}, linear()),
        ("cluster", {"n": 16}, linear()),
    ):
        tp.register_tie(layer, rule, init="rescale", **options)
        said = "".join(f", `{name}={value!r}`" for name, value in options.items())
        yield f"`{rule}`{said}, {shape}", layer.eval(), x
    pair = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))
    tp.register_tie(pair[2], "copy", source="0", root=pair)
    yield "`copy`, two Linear(1024, 1024)", pair.eval(), torch.randn(8, 1024)


PACKAGED = ("`flip_sym`", "`channel_shared`", "`cluster`")
"""What is also compiled by AOTInductor, which takes long."""


def to_onnx(model: nn.Module, x: Tensor, path: Path) -> None:
    """One file, without the exporter's notes on where each node comes from."""
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()
    program.save(path)


def from_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """A session of one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def to_package(model: nn.Module, x: Tensor, path: Path) -> None:
    """A compiled package."""
    program = torch.export.export(model, (x,))
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def from_package(path: Path) -> Callable[[Tensor], Tensor]:
    """A compiled package, loaded."""
    loaded: Callable[[Tensor], Tensor] = torch._inductor.aoti_load_package(str(path))
    return loaded


WAYS = {"onnx": (".onnx", to_onnx, from_onnx), "package": (".pt2", to_package, from_package)}


def measured() -> list[dict[str, Any]]:
    """The rows of the tables."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return [
        {"way": way, "layer": name, **compared(way, model, x)}
        for way in WAYS
        for name, model, x in cases()
        if way == "onnx" or name.startswith(PACKAGED)
    ]


def compared(way: str, model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Bytes, and seconds to load and to run, of the tied model and an untied copy of it."""
    suffix, write, read = WAYS[way]
    models = {"tied": model, "untied": tp.untie_model(copy.deepcopy(model))}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        files = {kind: Path(folder) / f"{kind}{suffix}" for kind in models}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for kind, file in files.items():
                write(models[kind], x, file)
        loaded = {kind: read(file) for kind, file in files.items()}
        for run in loaded.values():
            torch.testing.assert_close(run(x), model(x), rtol=1e-3, atol=1e-4)
        return {
            "bytes": {kind: file.stat().st_size for kind, file in files.items()},
            "load": in_turns({k: lambda file=file: read(file) for k, file in files.items()}, 1),
            "run": in_turns({k: lambda run=run: run(x) for k, run in loaded.items()}, 20),
        }


def in_turns(calls: dict[str, Callable[[], Any]], repeat: int) -> dict[str, Any]:
    """Median seconds of each call, and the ratio of the first to the second: median, quartiles."""
    seconds: dict[str, list[float]] = {kind: [] for kind in calls}
    for _ in range(TURNS + 1):
        for kind, call in calls.items():
            gc.collect()
            start = time.process_time()
            for _ in range(repeat):
                call()
            seconds[kind].append((time.process_time() - start) / repeat)
    tied, untied = (times[1:] for times in seconds.values())  # the first turn warms up
    ratios = [a / b for a, b in zip(tied, untied, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = {kind: statistics.median(times[1:]) for kind, times in seconds.items()}
    return {**medians, "ratio": middle, "spread": [low, high]}


def table(rows: list[dict[str, Any]], way: str) -> str:
    """The rows of one way in Markdown; × are of tied to untied, with their quartiles."""
    heads = (
        "law and layer",
        "file, untied",
        "file, tied",
        "loads, untied",
        "loads, tied",
        "runs, untied",
        "runs, tied",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        if row["way"] == way:
            sizes = row["bytes"]
            share = sizes["tied"] / sizes["untied"]
            cells = [row["layer"], f"{sizes['untied'] / 1000:,.0f} KB"]
            cells.append(f"{share:.1%}" if share < 0.02 else f"{share:.0%}")
            for what in ("load", "run"):
                low, high = row[what]["spread"]
                cells.append(f"{1000 * row[what]['untied']:.2g} ms")
                cells.append(f"{row[what]['ratio']:.2g} × ({low:.2g}–{high:.2g})")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def updated(page: str, result: dict[str, Any]) -> str:
    """The text of the page with its tables brought up to date.

    Raises:
        ValueError: if the page has no place for one of them.
    """
    for way in WAYS:
        page = filled(page, f"deployment, {way}", table(result["rows"], way))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    said = f"{result['turns']} turns; {versions}."
    return filled(page, "deployment, versions", said)


def main() -> None:
    """Measure, if that is asked for, and write the tables."""
    if "--measure" in sys.argv:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions["onnxruntime"] = __import__("onnxruntime").__version__
        lines = ",\n".join(f"  {json.dumps(row)}" for row in measured())
        said = f'"versions": {json.dumps(versions)}, "turns": {TURNS}'
        RESULT.write_text(f'{{{said}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")
    print(f"wrote the tables of {PAGE.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
