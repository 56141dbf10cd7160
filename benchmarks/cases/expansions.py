"""The case `expansion`: what it costs to make a weight of its free values, for every law.

A law is measured on the first of its layers that fits: as many channels, options such as users
take. The reference is a clone of the weight. ``expand`` makes the weight, ``adjoint`` takes a
gradient of it back to the free values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import tiedparam as tp
from benchmarks.cases.enrolled import case
from benchmarks.goals import Goal
from benchmarks.measuring import Run

CLONE = "clone of the dense weight"
CHANNELS = (64, 256, 512)

OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "block_circulant": lambda c: {"block": 16},
    "fixed": lambda c: {"mask": _scattered(c), "value": 0.5},
    "head_share": lambda c: {"heads": 8, "groups": 2},
    "index": lambda c: {"index": _clusters(c)},
    "joint": lambda c: {"laws": ["flip_sym", ("kernel_symmetry", {"group": "d4"})]},
    "kernel_symmetry": lambda c: {"group": "d4"},
    "masked": lambda c: {"mask": ~_scattered(c)},
    "orbit": lambda c: {"generators": [(_turned(c), _turned(c))]},
    "repeat": lambda c: {"outputs": 4},
    "row_repeat": lambda c: {"groups": c // 4},
    "set_equivariant": lambda c: {"items": 16},
    "skew": lambda c: {},
    "symmetric": lambda c: {},
    "within": lambda c: {"inner": "flip_sym", "rows": [0, c // 2], "columns": [0, c // 2]},
}
"""Options by the number of channels, for laws whose first variant would show little."""


def _scattered(channels: int) -> Tensor:
    return torch.rand(channels, channels, generator=torch.Generator().manual_seed(0)) < 0.5


def _clusters(channels: int) -> Tensor:
    """Sixteen values, as of a clustering to four bits."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(16, (channels, channels), generator=random)


def _turned(channels: int) -> list[int]:
    return [(number + 1) % channels for number in range(channels)]


def _convolution(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, padding=1, bias=False)


def _signal(channels: int) -> nn.Module:
    return nn.Conv1d(channels, channels, 5, padding=2, bias=False)


def _linear(channels: int) -> nn.Module:
    return nn.Linear(channels, channels, bias=False)


def _goals() -> Iterator[Goal]:
    for mode, along_cells, others in (("expand", 1.5, 3.0), ("adjoint", 3.0, 5.0)):
        for what, bound in (("cells", along_cells), ("whole", others)):
            yield Goal(f"{mode}, {what}: ≤ {bound:g} × a clone", "ratio", bound, mode, f"({what})",
                       against=(CLONE,))  # fmt: skip


GOALS = tuple(_goals())


@case(
    "expansion",
    "Every law: the expansion alone, and its adjoint, against a clone of the weight",
    GOALS,
)
def measure(run: Run) -> None:
    """Every law with free values, at every size."""
    for name, kind in tp.available_rules().items():
        if kind.reads_layers:
            continue
        for channels in (32,) if run.quick else CHANNELS:
            layer = _tied(name, kind, channels)
            if layer is not None:
                _measure(run, layer.to(run.device))


def _tied(name: str, kind: type[tp.Rule], channels: int) -> nn.Module | None:
    """The first layer of this size that can carry the law."""
    for build in (_convolution, _signal, _linear):
        layer = build(channels)
        layout = tp.Layout.of(layer, "weight", tuple(layer.weight.shape))  # type: ignore[arg-type]
        chosen = [OPTIONS[name](channels)] if name in OPTIONS else kind.variants(layout)
        for options in chosen:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error", tp.TieWarning)
                    return tp.register_tie(layer, name, init="rescale", **options)
            except (tp.TieError, tp.TieWarning, TypeError):
                continue
    return None


def _measure(run: Run, layer: nn.Module) -> None:
    rule, weight = tp.get_tie(layer), layer.weight.detach().clone()  # type: ignore[operator]
    free = [p.detach().requires_grad_() for p in layer.parametrizations["weight"].parameters()]
    torch.testing.assert_close(rule(*free).detach(), weight, rtol=0, atol=0)
    gradient = torch.randn_like(weight)
    labels = rule.orbit_labels().flatten().to(weight.device)
    sums = weight.new_zeros(rule.free_count + 1).index_add_(
        0, labels.abs(), gradient.flatten() * labels.sign()
    )
    made = rule(*free)
    taken = torch.autograd.grad(made, free, gradient, retain_graph=True)
    found = torch.cat([value.flatten() for value in taken])
    torch.testing.assert_close(found, sums[1:], rtol=1e-4, atol=1e-4)
    shapes = f"{rule}, weight {tuple(weight.shape)} ({'cells' if _has_cells(rule) else 'whole'})"

    def expand() -> Tensor:
        with torch.no_grad():
            value: Tensor = rule(*free).contiguous()  # views are paid for by whoever reads them
            return value

    def adjoint() -> Any:
        return torch.autograd.grad(made, free, gradient, retain_graph=True)

    for mode, call in (("expand", expand), ("adjoint", adjoint)):
        brief = replace(run.setting, seconds=min(0.5, run.setting.seconds))
        figures = run.time({CLONE: weight.clone, "tiedparam": call}, brief)
        run.note(shapes, mode, figures, rule=rule.name, values=rule.free_count)


def _has_cells(rule: Any) -> bool:
    """Whether the law leaves a leading axis alone."""
    cell = rule.cell()
    return cell is not None and cell[0] < rule.bound_layout.canonical_shape[0]
