"""The expansion of `flip_sym`, against the users' averaging."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import nn

import tiedparam as tp
from benchmarks import contenders as made
from benchmarks.cases.enrolled import case, placed
from benchmarks.goals import Goal
from benchmarks.measuring import Contender, Run


def _expansion_goals() -> Iterator[Goal]:
    for channels in (256, 512):
        shapes = f"weight ({channels}, {channels}, 3, 3)"
        yield Goal(f"{shapes}: ≤ 3.5 × cloning the weight", "ratio", 3.5, "expansion", shapes,
                   against=("clone of the dense weight",))  # fmt: skip
    yield Goal("weight (64, 64, 3, 3): ≤ 150 µs", "absolute", 150, "expansion",
               "weight (64, 64, 3, 3)", against=("clone of the dense weight",))  # fmt: skip
    yield Goal("always faster than the users' averaging", "speedup", 1.0, "expansion",
               against=("users' averaging",))  # fmt: skip


@case(
    "flip_sym_expansion",
    "flip_sym: forward and backward of the expansion alone",
    tuple(_expansion_goals()),
)
def flip_sym_expansion(run: Run) -> None:
    conv = (64, 128) if run.quick else (64, 256, 512)
    linear = (64,) if run.quick else (64, 512, 1024)
    layers: list[Any] = [nn.Conv2d(c, c, 3, padding=1, bias=False) for c in conv]
    layers += [nn.Linear(c, c, bias=False) for c in linear]
    for layer in layers:
        layer = made.lawful(placed(run, layer), "flip_sym")
        tied = tp.register_tie(deepcopy(layer), "flip_sym").parametrizations["weight"]
        full = layer.weight.detach().clone().requires_grad_()
        own = layer.weight.detach().clone().requires_grad_()
        found = [
            made.expansion("clone of the dense weight", full.clone, (full,)),
            made.expansion("tiedparam", tied, tuple(tied.parameters())),
            made.expansion("users' averaging", lambda w=own: made.averaged(w), (own,)),
        ]
        if isinstance(layer, nn.Linear):
            found += _geotorch_symmetric(layer)
        _compare_expansions(run, f"weight {tuple(layer.weight.shape)}", found)


def _geotorch_symmetric(layer: nn.Linear) -> list[Contender]:
    try:
        import geotorch
    except ImportError:
        return []
    layer = deepcopy(layer)
    values = layer.weight.detach().clone()
    geotorch.symmetric(layer, "weight")
    expansion: Any = layer.parametrizations["weight"]
    with torch.no_grad():
        expansion.original.copy_(values)
    return [made.expansion("geotorch.symmetric", expansion, tuple(expansion.parameters()))]


def _compare_expansions(run: Run, shapes: str, found: list[Contender]) -> None:
    # the contenders read no input: it stands for nothing, and its gradient is left out
    weight = found[0].forward(torch.empty(0))
    cotangent = torch.randn_like(weight)
    calls: dict[str, Callable[[], Any]] = {}
    for contender in found:
        made_now = contender.forward(weight)
        torch.testing.assert_close(made_now, weight, rtol=1e-6, atol=1e-7, msg=contender.name)
        calls[contender.name] = lambda c=contender: torch.autograd.grad(
            c.forward(weight), list(c.weights), cotangent
        )
    run.note(shapes, "expansion", run.time(calls))
