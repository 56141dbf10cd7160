"""Goals for what a tie costs where there is nothing to gain: small layers, imports, ONNX files."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import importlib.util
import io
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import tiedparam as tp
from benchmarks import contenders as made
from benchmarks.goal_cases import against_dense
from benchmarks.goals import Goal
from benchmarks.measuring import Run, summarize

_SMALL: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Linear 16²", "flip_sym", {}),
    ("Linear 16²", "skew", {}),
    ("Linear 16²", "circulant", {}),
    ("Linear 16²", "row_repeat", {}),
    ("Linear 16²", "masked", {"pattern": "lower"}),
    ("Conv 3→16 on 32²", "kernel_symmetry", {"group": "d4"}),
    ("Conv 3→16 on 32²", "channel_shared", {"over": "in"}),
    ("Conv 3→16 on 32²", "row_repeat", {}),
)
_EXPORTED = ("flip_sym", "kernel_symmetry", "group_conv", "row_repeat")
_OPTIONS: dict[str, dict[str, Any]] = {
    "kernel_symmetry": {"group": "d4"},
    "group_conv": {"group": "p4"},
    "row_repeat": {"groups": 8},
}
_TRIED = (
    "small weights by take, without the property, torch's list and the rule's call. What is left "
    "is one more node in the graph, which a stock parametrization pays too"
)

_NODES = (
    "a table of kernels needs six nodes, and files would hold it; the formula without one has more"
)
_FOLDING = (
    "onnxruntime computes the weight as it loads; an untied copy holds the weight instead, and "
    "loads as fast as a layer that was never tied"
)
_MODULES = (
    "names and laws are fetched when they are first asked for; the first name needs some 90 "
    "modules, and a dataclass takes half a millisecond to make"
)
_STATEMENTS = {
    "import": "import tiedparam",
    "first name": "from tiedparam import register_tie",
}

GOALS = (
    *(
        Goal(f"{shapes}, {rule}, {mode}: ≥ 0.9 × or ≤ 12 µs over dense", "speedup", 0.9, mode,
             f"{shapes}, {rule}", row="small", floor="identity parametrization",
             or_microseconds=12, tried=_TRIED)
        for shapes, rule, _ in _SMALL for mode in ("inference", "training")
    ),
    *(
        Goal(f"`{statement}`: ≤ 30 ms", "milliseconds", 30, mode, contender="and tiedparam",
             against=("import torch",), row="import", tried=_MODULES)
        for mode, statement in _STATEMENTS.items()
    ),
    *(
        Goal(f"{rule}, {channels} channels: nodes ≤ 6 besides the layer's", "count", 7, "nodes",
             f"{rule}, {channels} channels", row="onnx", tried=_NODES)
        for rule in _EXPORTED for channels in (64, 256)
    ),
    *(
        Goal(f"{rule}, {channels} channels, {how}: loads in ≤ 2 × untied", "ratio", 2, "loading",
             f"{rule}, {channels} channels", contender=how, against=("untied",), row="onnx",
             tried=_FOLDING)
        for how in ("tiedparam", "untied copy") for rule in _EXPORTED for channels in (64, 256)
    ),
)  # fmt: skip


def measure(run: Run) -> None:
    """A module each."""
    _small_layers(run)
    _import(run)
    if all(map(_is_installed, ("onnx", "onnxscript", "onnxruntime"))):
        _onnx(run)


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _small_layers(run: Run) -> None:
    for shapes, rule, options in _SMALL:
        linear = shapes.startswith("Linear")
        layer = nn.Linear(16, 16) if linear else nn.Conv2d(3, 16, 3, padding=1)
        x = torch.randn(8, 16) if linear else torch.randn(8, 3, 32, 32)
        found = against_dense(layer.to(run.device), rule, **options)
        found.append(made.identity(found[0].forward))
        run.compare(f"{shapes}, {rule}", found, x)


_CHILD = """
import gc
from time import perf_counter_ns as now
start = now()
import torch
between = now()
gc.freeze()  # a collection of all that torch has made is no cost of ours, whenever it comes
{}
print(between - start, now() - start)
"""


def _import(run: Run) -> None:
    """In fresh processes, which say themselves how long it took: torch alone differs by more."""
    # installed packages have their bytecode; where Python may write none, it compiles at each start
    compiled = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    for mode, statement in _STATEMENTS.items():
        samples: dict[str, list[float]] = {"import torch": [], "and tiedparam": []}
        for turn in range(4 if run.quick else 16):
            said = subprocess.run(
                [sys.executable, "-c", _CHILD.format(statement)],
                env=compiled,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            if turn == 0:
                continue  # which may have written the bytecode
            for times, nanoseconds in zip(samples.values(), said.split(), strict=True):
                times.append(float(nanoseconds))
        run.note(statement, mode, summarize(samples))


def _onnx(run: Run) -> None:
    """Two tied layers in one file: nodes for each, bytes, and the time that a session takes."""
    brief = dataclasses.replace(run.setting, seconds=min(2.0, run.setting.seconds))
    for channels in (16,) if run.quick else (64, 256):
        for rule in _EXPORTED:
            plain = nn.Sequential(*(nn.Conv2d(channels, channels, 3) for _ in range(2))).eval()
            tied = copy.deepcopy(plain)
            for layer in tied:
                tp.register_tie(layer, rule, init="rescale", **_OPTIONS.get(rule, {}))
            models = {
                "untied": plain,
                "tiedparam": tied,
                "untied copy": tp.untie_model(copy.deepcopy(tied)),
            }
            files = {name: _exported(model, channels) for name, model in models.items()}
            shapes = f"{rule}, {channels} channels"
            counts = {name: {"count": math.ceil(_nodes(file) / 2)} for name, file in files.items()}
            run.note(shapes, "nodes", counts)
            run.note_bytes(shapes, "file", {name: len(file) for name, file in files.items()})
            calls = {name: _loading(file) for name, file in files.items()}
            run.note(shapes, "loading", run.time(calls, brief))


def _exported(model: nn.Module, channels: int) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (torch.randn(1, channels, 8, 8),), dynamo=True,
                                    verbose=False)  # fmt: skip
    assert program is not None
    file.write(program.model_proto.SerializeToString())
    return file.getvalue()


def _nodes(file: bytes) -> int:
    onnx: Any = importlib.import_module("onnx")
    return len(onnx.load_from_string(file).graph.node)


def _loading(file: bytes) -> Callable[[], Any]:
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    return lambda: runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
