"""Laws as users write them, with types. `test_type_checkers.py` reads it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import tiedparam as tp
from tiedparam.laws import Blocks, Broadcast, Compute, Layout, Linked, Reason
from tiedparam.testing import RuleReport, check_rule


@tp.register_rule("periodic_of_script")
class Periodic(tp.Rule):
    law = "W[o, c] = w[o, c mod period]"

    def __init__(self, period: int = 2) -> None:
        super().__init__()
        self.period = period

    def options(self) -> dict[str, Any]:
        return {"period": self.period}

    def check(self, layout: Layout) -> Reason | None:
        if len(layout.shape) == 2 and layout.shape[1] % self.period == 0:
            return None
        return Reason(f"{layout.shape} has no period {self.period}.", "Choose a divisor.")

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.bound_layout.shape[0], self.period),)

    def forward(self, w: Tensor) -> Tensor:
        return w.repeat(1, self.bound_layout.shape[1] // self.period)

    def symmetries(self, weight: Tensor) -> Iterator[Tensor]:
        yield weight.roll(self.period, 1)

    @classmethod
    def examples(cls) -> Sequence[tp.Example]:
        return [tp.Example(lambda: nn.Linear(8, 3), {"period": 4})]


class AllEqual(Broadcast):
    law = "W[o, c] = w"

    def __init__(self, compute: Compute = "auto") -> None:
        super().__init__(compute)

    def blocks(self) -> Blocks:
        outputs, *rest = self.bound_layout.canonical_shape
        return Blocks((outputs,), tuple(rest), shared=(0, 1))


class SumOfTwo(Linked):
    law = "W = A.W + B.W"

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


layers = nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(8, 3)
tp.register_tie(layers[0], Periodic, period=4, init="rescale")
tp.register_tie(layers[1], AllEqual(compute="dense"))
tp.register_tie(layers[2], SumOfTwo(source=[layers[0], layers[1]]))
print(torch.equal(layers[2].weight, layers[0].weight + layers[1].weight))

report: RuleReport = check_rule(Periodic, quick=True)
print(report.passed, check_rule(AllEqual, examples=[tp.Example(lambda: nn.Linear(8, 3))]).law)
