"""Another layer's weight, and a difference of small rank: W = source.W + U·V."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tiedparam.laws import Call, Use, form
from tiedparam.laws.choices import is_whole
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout
from tiedparam.laws.linked import Linked, Source
from tiedparam.laws.registry import register_rule
from tiedparam.laws.times import Making, Time, relative_time
from tiedparam.products.low_rank import nearest_product, plus_product, product_beside
from tiedparam.util.errors import Reason

Compute = Literal["auto", "dense", "delta"]


def _cost(rule: SharedDelta, use: Use) -> float | None:
    if rule.layout is not None and rule.rank == 0:
        return None
    outputs, inputs, *kernel = use.layout.canonical_shape
    more = rule.rank * (1 / outputs + 1 / (inputs * prod(kernel)))
    # two products more for each row; the sum is a product of its own, and backward two
    form, trained = Time(40, 1 + more, 0.5), Time(185, 3 * (1 + more), 0.5)
    return relative_time(use, form, rule.making, trained)


@register_rule("shared_delta")
class SharedDelta(Linked):
    """Another layer's weight and a difference of small rank: ``W = source.W + U·V``.

    Layers of a deep model share one weight, and each has a small difference of its own. The start
    is the nearest: ``U·V`` is the truncated singular value decomposition of ``W − source.W``, with
    the singular values in ``U``; where that has a smaller rank, columns of ``U`` are 0 and rows of
    ``V`` unit vectors, so that all of them are trained. With rank 0 it is `copy`. A convolution is
    taken as the matrix of its outputs × its inputs and kernel positions.

    The law is bilinear in its own values: many ``U`` and ``V`` give one weight. A weight that is
    tied, saved densely and tied again comes back, but not as the same factors.

    Args:
        source: the layer to read; with ``register_tie(..., root=model)`` also its path, as for
            `copy`. Its weight has the tied weight's shape.
        rank: of the difference, 0 or more.
        source_name: which of its tensors; by default the one with the tied tensor's name.
        compute: ``"auto"``, the fastest way; ``"delta"``, as ``A·x + U(V·x)`` without the sum, or
            ``"dense"`` force one, for measuring.

    ``free``: ``U`` of shape ``(outputs, rank)`` and ``V`` of ``(rank, inputs of a group,
    *kernel)``; ``weight``: the source's shape. `register_tie` raises as for `copy`, and if the rank
    is above the smaller side of the matrix. The decomposition, in float64, takes time that grows
    with the cube of that side: expect seconds for a large matrix.

    Source: Bae et al. 2024, "Relaxed recursive transformers" (arXiv 2410.20672); Eckart and Young
    1936, "The approximation of one matrix by another of lower rank".

    Example:
        >>> first, second = nn.Linear(8, 8), nn.Linear(8, 8)
        >>> _ = second.weight.data.copy_(first.weight + torch.outer(torch.ones(8), torch.arange(8)))
        >>> _ = tp.register_tie(second, "shared_delta", source=first, rank=1, max_residual=1e-5)
        >>> tp.get_tie(second).free_count  # of 64
        16
    """

    law = "W = source.W + U·V"
    bilinear = True

    def __init__(
        self,
        source: Source | Sequence[Source],
        rank: int,
        source_name: str | Sequence[str | None] | None = None,
        compute: Compute = "auto",
    ) -> None:
        super().__init__(source, source_name)
        self.rank = rank
        self.compute = compute

    def options(self) -> dict[str, Any]:
        """``rank``."""
        return {"rank": self.rank}

    @property
    def is_plain_copy(self) -> bool:
        """Whether there is no difference."""
        return self.rank == 0

    def sizes(self) -> Sequence[dict[str, Any]]:
        """Rank 0, and then 1, 2, 4 and so on up to ``rank``."""
        if not is_whole(self.rank, 0):
            return ()  # `check` says what it should be
        powers = (1 << power for power in range(self.rank.bit_length()))
        return [{"rank": rank} for rank in sorted({0, *powers, self.rank})]

    def check(self, layout: Layout) -> Reason | None:
        """The rank must be one that the matrix can have, and the source have the tied shape."""
        if not is_whole(self.rank, 0):
            return Reason(f"rank must be an integer of at least 0, not {self.rank!r}.")
        if len(layout.shape) < 2:
            return Reason(
                f"the tensor {layout.shape} is no matrix.", "Tie a weight, or use 'copy'."
            )
        outputs, inputs, *kernel = layout.canonical_shape
        largest = min(outputs, inputs * prod(kernel))
        if self.rank > largest:
            matrix = f"a matrix {outputs}×{inputs * prod(kernel)}"
            return Reason(f"{matrix} has no rank {self.rank}.", f"Choose at most {largest}.")
        return self.reason_against_shape(layout)

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        """``U`` and ``V``; nothing for rank 0."""
        outputs, *inputs = self.bound_layout.canonical_shape
        return ((outputs, self.rank), (self.rank, *inputs)) if self.rank else ()

    @property
    def making(self) -> Making:
        """A product with ``rank`` columns, and backward two."""
        if not self.rank:
            return Making(0, 0, call=10, trained_call=25, small=(10, 25))
        each = 0.3 + 0.035 * self.rank, 1.0 + 0.06 * self.rank
        return Making(*each, call=29, trained_call=137, small=(29, 137))

    def forward(self, *tensors: Tensor) -> Tensor:
        """The source plus the product."""
        source, *factors = tensors
        if not factors:
            return source
        layout, (left, right) = self.bound_layout, factors
        matrix = layout.canonical(source).reshape(len(left), -1)
        return layout.native(
            plus_product(matrix, left, right.flatten(1)).reshape(layout.canonical_shape)
        )

    def fit(self, weight: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        """The truncated decomposition of the difference."""
        if not self.rank:
            return ()
        (source,) = sources
        layout = self.bound_layout
        wide = torch.promote_types(weight.dtype, torch.float64)
        difference = layout.canonical(weight.to(wide) - source.to(wide)).flatten(1)
        left, right = nearest_product(difference, self.rank)
        right = right.reshape(self.rank, *layout.canonical_shape[1:])
        return left.to(weight.dtype), right.to(weight.dtype)

    @form(
        "delta",
        cost=_cost,
        where="compiled",
        multiply_adds=lambda rule, use: prod(use.layout.shape) + rule.free_count,
    )
    def without_the_sum(self, call: Call) -> Tensor:
        """``A·x + U(V·x)``: two products of small rank beside that with the source's weight."""
        (source,), (left, right) = call.sources, call.free
        layout = call.use.layout
        if layout.groups > 1:
            right = right.repeat(layout.groups, *(1,) * (right.dim() - 1))
        if layout.transposed:
            shape = (layout.shape[0], self.rank, *layout.kernel)
            right = Layout(shape, layout.groups, transposed=True).native(right)
        weight = source, left, right
        return product_beside(call.stock, call.input, weight, call.bias, layout.groups)

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """None: what rank a difference is allowed cannot be guessed."""
        return ()

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Two Linear layers, and convolutions in groups of either kind."""
        return (
            Example(
                lambda: nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 5), nn.Linear(5, 6)),
                {"source": "0", "rank": 2},
                path="2",
            ),
            Example(
                lambda: nn.Sequential(
                    nn.Conv2d(4, 6, 3, padding=1, groups=2),
                    nn.Conv2d(6, 4, 1),
                    nn.Conv2d(4, 6, 3, padding=1, groups=2),
                ),
                {"source": "0", "rank": 1},
                path="2",
            ),
            Example(
                lambda: nn.Sequential(
                    nn.ConvTranspose1d(4, 6, 3, groups=2),
                    nn.Conv1d(6, 4, 1),
                    nn.ConvTranspose1d(4, 6, 3, groups=2),
                ),
                {"source": "0", "rank": 1},
                path="2",
            ),
        )
