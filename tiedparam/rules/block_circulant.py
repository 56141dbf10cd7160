"""Blocks that are circulant each: W[b·i + r, b·j + s] = w[i, j, (s − r) mod b]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import gcd, log2
from typing import Any

from torch import Tensor, nn

from tiedparam.laws import Call, Orbits, Reason, Use, form
from tiedparam.laws.choices import why_no_count
from tiedparam.laws.diagonals import Compute
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout, why_no_matrix
from tiedparam.laws.registry import register_rule
from tiedparam.laws.times import Making, Time, relative_time
from tiedparam.products.circulant_blocks import LONG, block_circulant_product


def _cost_of_fourier(rule: BlockCirculant, use: Use) -> float | None:
    """From layers of 64 to 4,096 features, 1 to 512 rows, and blocks from 2 on.

    ``python -m benchmarks --case goals --only fourier`` compares some of them again.
    """
    block = rule.block
    if block == 1:
        return None  # nothing to transform
    # nanoseconds for each value's transform; the shortest are narrow products
    each = 2.3 if block >= LONG else block / 35 + 0.3 + 1.5 / block
    fourier = Time(80, 2.5 / block, values=each, entries=each / block)
    trained = Time(336, 8.3 / block, values=2.5 * each, entries=3.5 * each / block)
    return relative_time(use, fourier, rule.making, trained)


def _multiply_adds(rule: BlockCirculant, use: Use) -> int:
    """Of the transforms there and back, and of four real products for each frequency in between."""
    (outputs, inputs), block = use.layout.canonical_shape, rule.block
    each = block if block < LONG else 1.25 * log2(block)
    return round((outputs + inputs) * each + 2 * outputs * inputs / block)


@register_rule("block_circulant")
class BlockCirculant(Orbits):
    """A matrix of ``b × b`` blocks that are circulant each: a sum of short cyclic convolutions.

    Between one value for each entry (``block=1``) and `circulant` (one block) lies every saving:
    ``block`` divides the number of values.

    Args:
        block: ``b``, which must divide the numbers of outputs and inputs.
        compute: the form that computes a Linear layer. ``"auto"`` picks the fastest; ``"dense"``
            and ``"fft"`` force one, for measuring.

    Shapes, for ``m`` outputs and ``n`` inputs:

    * ``free``: ``(m/b, n)``, the first row of each block, as it stands in the weight: rows ``0``,
      ``b``, ``2b``, … of it; ``(m·n, 1)`` for blocks of one entry.
    * ``weight``: ``(m, n)``, of two axes. Block ``(i, j)`` is ``scipy.linalg.circulant`` of its
      first column.

    Multiplicity ``b``. PEFT's C3A keeps its kernel as ``(m/b, n/b, b)`` with the same numbers in
    the same order: ``free.view(m // b, n // b, b)``.

    Source: "CirCNN: accelerating and compressing deep neural networks using block-circulant weight
    matrices" (Ding et al. 2017); "Parameter-efficient fine-tuning via circular convolution" (Chen
    et al. 2024); the projection is the orbit mean (Ravanbakhsh et al. 2017).

    Example:
        >>> layer = tp.register_tie(nn.Linear(4, 2), "block_circulant", block=2)
        >>> layer.parametrizations.weight.original0 = nn.Parameter(torch.tensor([[1., 2, 3, 4]]))
        >>> layer.weight.tolist()
        [[1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]]
    """

    family = "matrices"
    law = "W[b·i + r, b·j + s] = w[i, j, (s − r) mod b]"
    making: Making = Making(0.34, 1.82, call=34, trained_call=137)

    def __init__(self, block: int, compute: Compute = "auto") -> None:
        super().__init__()
        self.block = block
        self.compute = compute

    def options(self) -> dict[str, Any]:
        """``block``."""
        return {"block": self.block}

    @form("fft", cost=_cost_of_fourier, where="compiled", multiply_adds=_multiply_adds)
    def by_fourier(self, call: Call) -> Tensor:
        """Multiply frequency by frequency, since blocks convolve."""
        return block_circulant_product(call.input, call.free[0], call.bias, self.block)

    def check(self, layout: Layout) -> Reason | None:
        """``block`` must be a positive divisor of both sides of a matrix."""
        reason = why_no_count("block", self.block)
        if reason is not None:
            return reason
        reason = why_no_matrix(layout)
        if reason is not None:
            return reason
        outputs, inputs = layout.canonical_shape
        if outputs % self.block or inputs % self.block:
            return Reason(
                f"a matrix of {outputs} outputs and {inputs} inputs is not made of blocks of "
                f"block={self.block}.",
                f"Choose a divisor of {gcd(outputs, inputs)}.",
            )
        return None

    def cell(self) -> tuple[int, ...]:
        """One block."""
        return (self.block, self.block)

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """Outputs and inputs of every block turned by one place."""
        layout, block = self.bound_layout, self.block
        outputs, inputs = layout.canonical_shape
        blocks = layout.canonical(weight).reshape(outputs // block, block, inputs // block, block)
        yield layout.native(blocks.roll((1, 1), (1, 3)).reshape(outputs, inputs))

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """None: how large the blocks are is the user's choice."""
        return ()

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Several blocks on a side, one, and an embedding."""
        return (
            Example(lambda: nn.Linear(6, 9), {"block": 3}),
            Example(lambda: nn.Linear(8, 4), {"block": 4}),
            Example(lambda: nn.Linear(8, 8), {"block": 2}),
            Example(lambda: nn.Embedding(6, 3), {"block": 3}),
        )
