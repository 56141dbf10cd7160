"""Before the first call: importing, tying whole models, and looking at them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import tiedparam as tp
from benchmarks import memory
from benchmarks.cases.enrolled import case
from benchmarks.measuring import Run, Setting, summarize


@case("import", "Starting Python, importing torch, and importing tiedparam as well")
def importing(run: Run) -> None:
    def start(code: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    calls = {
        "import torch": start("import torch"),
        "import torch and tiedparam": start("import torch, tiedparam"),
    }
    rounds = (3, 3) if run.quick else (7, 21)
    setting = Setting(seconds=run.setting.seconds * 5, rounds=rounds, slice_ms=0)
    run.note("a fresh process", "import", run.time(calls, setting))


@case(
    "large_models",
    "Tying whole models: time and peak memory for each layer, against the number of layers",
    default_allocator=False,
)
def large_models(run: Run) -> None:
    small = (50, 100) if run.quick else (1_000, 3_000, 10_000)
    wide = (1, 2) if run.quick else (12, 48)  # 48 of 2,048 features: 201 million values
    features = 64 if run.quick else 2048
    for shapes, width, counts in (
        ("Linear(8, 8), flip_sym", 8, small),
        (f"Linear({features}, {features}), flip_sym", features, wide),
    ):
        times: dict[str, list[float]] = {f"{count:,} layers": [] for count in counts}
        for _ in range(2 if width > 8 else 3):
            for count in counts:
                layers = memory.many_layers(width, count)
                started = time.perf_counter_ns()
                memory.tie_all(layers)
                times[f"{count:,} layers"].append((time.perf_counter_ns() - started) / count)
        run.note(shapes, "tying, each layer", summarize(times))
        sizes = {f"{count:,} layers": memory.peak_of_tying(width, count) for count in counts}
        run.note_bytes(shapes, "peak over the dense model, each layer", sizes)


@case(
    "scan",
    "Looking at a whole model through every rule, against reading its values once",
    default_allocator=False,
)
def scanning(run: Run) -> None:
    for width, count in [(32, 4)] if run.quick else [(512, 100), (1024, 100), (2048, 24)]:
        model = memory.many_layers(width, count)
        values = [p.detach() for p in model.parameters()]
        calls = {
            "one norm of every tensor": lambda v=values: [torch.linalg.vector_norm(t) for t in v],
            "tiedparam.scan": lambda m=model: tp.scan(m, progress=False),
            "tiedparam.scan without copies": lambda m=model: tp.scan(m, pairs=0, progress=False),
        }
        setting = dataclasses.replace(run.setting, rounds=(2, 3))
        shapes = f"{count} × Linear({width}, {width}), {count * width * width / 1e6:.0f} million"
        run.note(shapes, "scan", run.time(calls, setting))


@case(
    "clustering",
    "Starting `cluster` from trained values, against sorting them once",
    default_allocator=False,
)
def clustering(run: Run) -> None:
    """Ten million values, which are to be clustered in at most five seconds."""
    rows, columns = (32, 64) if run.quick else (3_200, 3_125)
    dense = torch.nn.Linear(columns, rows, bias=False)

    def start(**options: Any) -> Callable[[], Any]:
        def tie() -> Any:
            layer = torch.nn.Linear(columns, rows, bias=False)
            layer.weight = dense.weight
            return tp.register_tie(layer, "cluster", max_residual=1.0, **options)

        return tie

    calls = {
        "one sort": lambda: dense.weight.detach().flatten().sort(),
        "cluster, n=16": start(n=16),
        "cluster, n=256": start(n=256),
        "cluster, n=16, per='output'": start(n=16, per="output"),
    }
    if run.quick:
        del calls["cluster, n=256"]
    setting = dataclasses.replace(run.setting, rounds=(2, 3))
    run.note(f"{rows * columns / 1e6:g} million values", "start", run.time(calls, setting))
