"""Goals for layers under torch.compile with inductor: what eager mode gains is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks import goal_cases
from benchmarks.goals import Goal
from benchmarks.measuring import Contender, Run

_LAYERS: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "streams, 4 filters": (
        lambda: nn.Conv1d(256, 1024, 3, padding=1, groups=256), (8, 256, 1024), "groups",
    ),
    "streams, 1 filter, kernel 7": (
        lambda: nn.Conv1d(128, 128, 7, padding=3, groups=128), (8, 128, 1024), "groups",
    ),
    "streams, 1 filter, kernel 25": (
        lambda: nn.Conv1d(64, 64, 25, padding=12, groups=64), (8, 64, 1024), "groups",
    ),
    "sum, 64 channels": (lambda: nn.Conv2d(64, 64, 3, padding=1), (32, 64, 28, 28), "in"),
    "sum, 256 channels": (lambda: nn.Conv2d(256, 256, 3, padding=1), (8, 256, 14, 14), "in"),
}  # fmt: skip
_KEPT = 1.15  # of the eager time: compiled layers pay some 50 µs per call, dense ones too
_BOUND = {torch.float32: 2e-5, torch.bfloat16: 2e-2}

_TRIED = (
    "the product is one operator that does in a graph what it does outside; inductor's code around "
    "it takes some 200 to 500 µs more for each call and step, of outputs that are made anew"
)

GOALS = tuple(
    Goal(
        f"{name}, {str(dtype)[6:]}, {mode}: compiled ≤ {_KEPT:g} × eager", "ratio", _KEPT, mode,
        shapes=f"{name}, {str(dtype)[6:]}", contender="tiedparam, compiled",
        against=("tiedparam",), row="compiled", or_microseconds=100, tried=_TRIED,
    )
    for name in _LAYERS for dtype in _BOUND for mode in ("inference", "training")
)  # fmt: skip


def measure(run: Run) -> None:
    """The dense layer and the tied one, eager and compiled."""
    for name, (make, shape, over) in list(_LAYERS.items())[:1] if run.quick else _LAYERS.items():
        for dtype, tolerance in _BOUND.items():
            torch._dynamo.reset()
            layer = make().to(run.device, dtype)
            dense, tied = goal_cases.against_dense(layer, "channel_shared", over=over)
            found = [dense, _compiled(dense), tied, _compiled(tied)]
            x = torch.randn(1 if run.quick else shape[0], *shape[1:], dtype=dtype)
            run.compare(f"{name}, {str(dtype)[6:]}", found, x, tolerance=tolerance)


def _compiled(contender: Contender) -> Contender:
    forward: Any = torch.compile(contender.forward)
    return Contender(
        f"{contender.name}, compiled", forward,
        contender.weights, contender.others, contender.expand,
    )  # fmt: skip
