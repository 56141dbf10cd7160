"""The sizes of a clustered network against its errors, in docs/laws/clusters.md.

``python docs/make_sizes.py --measure`` trains a network on scikit-learn's digits, clusters it in
several ways, and writes what it finds to docs/sizes/digits.json. Without ``--measure`` it only
writes the table from there.
"""

from __future__ import annotations

import copy
import json
import platform
import sys
import tempfile
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tiedparam as tp

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "laws" / "clusters.md"
RESULT = DOCS / "sizes" / "digits.json"
COMMAND = "python docs/make_sizes.py"
BEGIN, END = "<!-- table of sizes: begin -->", "<!-- table of sizes: end -->"
WIDTHS = (64, 256, 256, 10)
SEEDS = (0, 1, 2)
Data = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    """64 inputs, two layers of 256, and ten digits."""
    first, *others = (nn.Linear(a, b) for a, b in pairwise(WIDTHS))
    return nn.Sequential(first, *(part for layer in others for part in (nn.ReLU(), layer)))


def ways(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """How a network is tied: what the table calls it, the plan, and options of `tie_model`."""
    for n in (256, 64, 16, 8, 4, 2):
        bits = (n - 1).bit_length()
        shown = f"{bits} bit{'s' if bits > 1 else ''}, `n={n}`"
        yield shown, {"*": ("cluster", {"n": n})}, {}
    yield "`n=2` of each output", {"*": ("cluster", {"n": 2, "per": "output"})}, {}
    most = {"*": ("cluster", {"n": 256})}
    for share in ("12%", "6%"):
        yield f'`target_size="{share}"`', most, {"target_size": share}
    pruned: dict[str, Any] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            size = layer.weight.detach().abs()
            of = ("masked", {"mask": size > size.quantile(0.8)})
            pruned[path] = ("cluster", {"n": 16, "of": of})
    yield "a fifth of the weights, `n=16`", pruned, {}


def measured() -> list[dict[str, Any]]:
    """The rows of the table: means over networks of several seeds."""
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in SEEDS:
        train, test = digits(seed)
        torch.manual_seed(seed)
        dense = network()
        steps(dense, train, 600, 1e-3)
        rows.setdefault("dense", []).append(figures(dense, test))
        for name, plan, options in ways(dense):
            model = copy.deepcopy(dense)
            tp.tie_model(model, plan, **options)
            found = figures(model, test)
            steps(model, train, 200, 3e-4)
            found["trained"] = figures(model, test)["errors"]
            rows.setdefault(name, []).append(found)
    return [
        {"way": name, **{key: sum(row[key] for row in found) / len(SEEDS) for key in found[0]}}
        for name, found in rows.items()
    ]


def digits(seed: int) -> tuple[Data, Data]:
    """Scikit-learn's digits, two thirds to train on and a third to test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(data.data).float() / 16
    y = torch.from_numpy(data.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[: 2 * len(x) // 3], order[2 * len(x) // 3 :]
    return (x[train], y[train]), (x[test], y[test])


def steps(model: nn.Module, data: Data, count: int, rate: float) -> None:
    """Train with Adam, on all data at once."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()


def figures(model: nn.Module, test: Data) -> dict[str, float]:
    """Bytes of the checkpoint, of the file and of the file zipped; errors in the test, of 1."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        tp.save(model, path)
        content = path.read_bytes()
    with torch.no_grad():
        wrong = model(test[0]).argmax(1) != test[1]
    return {
        "checkpoint": sum(value.nbytes for value in model.state_dict().values()),
        "file": len(content),
        "zipped": len(zlib.compress(content, 9)),
        "errors": float(wrong.float().mean()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown; shares are of the dense file."""
    dense = rows[0]["file"]
    lines = [
        "| weights | file, bytes | of dense | zipped | of dense | errors | after 200 steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sizes = " | ".join(f"{row[k]:,.0f} | {row[k] / dense:.1%}" for k in ("file", "zipped"))
        trained = f"{row['trained']:.1%}" if "trained" in row else "–"
        lines.append(f"| {row['way']} | {sizes} | {row['errors']:.1%} | {trained} |")
    return "\n".join(lines)


def updated(text: str, result: dict[str, Any]) -> str:
    """The page with its table brought up to date."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(result['rows'])}\n{END}{after}"


def main() -> None:
    """Measure, if that is asked for, and write the table."""
    if "--measure" in sys.argv:
        rows = measured()
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        said = f'"versions": {json.dumps(versions)}, "seeds": {len(SEEDS)}'
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(f'{{{said}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    text = updated(PAGE.read_text(encoding="utf-8"), json.loads(RESULT.read_text(encoding="utf-8")))
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote the table of sizes in {PAGE.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
