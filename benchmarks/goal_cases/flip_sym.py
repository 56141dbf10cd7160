"""Goals for the expansion of `flip_sym`, forward and backward, against the users' averaging."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

import tiedparam as tp
from benchmarks import contenders as made
from benchmarks.goals import Goal
from benchmarks.measuring import Run

_BOUNDS = {64: 1.2, 128: 1.1, 256: 1.25, 512: 1.3}
_AVERAGING = "users' averaging"
_FLOOR = "half of it twice, in any order"


def _shapes(channels: int) -> str:
    return f"{channels} channels, 3×3"


_TRIED = (
    "entries by two look-ups in one node, which alone is 1.3 × as fast at 64 channels; the rest is "
    "the call of the law through torch's list, some 9 µs"
)

GOALS = tuple(
    Goal(f"{channels} channels: ≥ {bound:g} ×", "speedup", bound, "expansion", _shapes(channels),
         against=(_AVERAGING,), row="flip_sym", floor=_FLOOR, tried=_TRIED)
    for channels, bound in _BOUNDS.items()
)  # fmt: skip


class _Twice(torch.autograd.Function):
    """What any expansion does at least: read the free half, write it twice, and add two halves."""

    @staticmethod
    def forward(ctx: Any, half: Tensor) -> Tensor:
        return torch.cat([half, half])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        first, second = gradient.chunk(2)
        return first + second


def measure(run: Run) -> None:
    """The weight alone, by autograd; contenders agree on it first."""
    for channels in (16,) if run.quick else _BOUNDS:
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(run.device)
        calls = _calls(made.lawful(conv, "flip_sym"))
        run.note(_shapes(channels), "expansion", run.time(calls))


def _calls(layer: nn.Conv2d) -> dict[str, Callable[[], Any]]:
    """Forward and backward of each way to make the layer's weight."""
    weight = layer.weight.detach()
    tied = tp.register_tie(deepcopy(layer), "flip_sym").parametrizations["weight"]
    own = weight.clone().requires_grad_()
    half = weight.flatten()[: weight.numel() // 2].clone().requires_grad_()
    cotangent = torch.randn_like(weight)

    def step(make: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(make(), leaves, cotangent)

    def twice() -> Tensor:
        both: Tensor = _Twice.apply(half)  # type: ignore[no-untyped-call]
        return both.view(weight.shape)

    for make in (tied, lambda: made.averaged(own)):
        torch.testing.assert_close(make(), weight, rtol=1e-6, atol=1e-7)
    return {
        _AVERAGING: step(lambda: made.averaged(own), (own,)),
        "tiedparam": step(tied, tuple(tied.parameters())),
        _FLOOR: step(twice, (half,)),
    }
