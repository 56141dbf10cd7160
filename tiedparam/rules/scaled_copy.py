"""Another layer's weight, times learned factors: W = s·source.W."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tiedparam.laws import Call, Use, form
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout
from tiedparam.laws.linked import Linked, Source
from tiedparam.laws.registry import register_rule
from tiedparam.laws.times import Making, Time, relative_time
from tiedparam.util.errors import Reason

Per = Literal["tensor", "output", "input"]
Compute = Literal["auto", "dense", "scaled"]


def _cost(rule: ScaledCopy, use: Use) -> float:
    # backward a product of entries for the source and one for the factors; where inputs are scaled
    # the gradient of the input is needed, whether somebody else needs it or not
    trained = Time(150, 3, values=3.0 if rule.per == "input" else 1.0)
    return relative_time(use, Time(22, values=0.3), rule.making, trained)


@register_rule("scaled_copy")
class ScaledCopy(Linked):
    """Another layer's tensor, times factors that are learned: ``W = s·source.W``.

    Args:
        source: the layer to read; with ``register_tie(..., root=model)`` also its path, as for
            `copy`. Its tensor has the tied tensor's shape.
        source_name: which of its tensors; by default the one with the tied tensor's name.
        per: what has a factor: the whole ``"tensor"``, each ``"output"`` channel or each
            ``"input"`` channel.
        compute: ``"auto"``, the fastest way; ``"scaled"``, with the source's weight, scaling inputs
            or outputs, or ``"dense"`` force one, for measuring.

    ``free``: ``s`` of shape ``(1,)``, ``(outputs,)`` or ``(inputs,)``, all inputs of all groups;
    ``weight``: the source's shape. The start is the nearest, by least squares: ``⟨A, W⟩ / ⟨A, A⟩``
    over each slice, and 0 where a slice of the source is zero. `register_tie` raises as for `copy`.

    Source: scales per tensor and per channel, as quantization has them; Press and Wolf 2017, "Using
    the output embedding to improve language models", for tied layers of another scale.

    Example:
        >>> first, second = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> _ = nn.init.ones_(first.weight), second.weight.data.copy_(torch.tensor([[2.0], [5.0]]))
        >>> _ = tp.register_tie(second, "scaled_copy", source=first, per="output")
        >>> [value.tolist() for value in tp.free_values(second).values()]
        [[2.0, 5.0]]
    """

    law = "W = s·source.W"

    def __init__(
        self,
        source: Source | Sequence[Source],
        source_name: str | Sequence[str | None] | None = None,
        per: Per = "tensor",
        compute: Compute = "auto",
    ) -> None:
        super().__init__(source, source_name)
        self.per: Per = per
        self.compute = compute

    def options(self) -> dict[str, Any]:
        """``per``, where it is not ``"tensor"``."""
        return {} if self.per == "tensor" else {"per": self.per}

    def check(self, layout: Layout) -> Reason | None:
        """``per`` must be known, and the source have the tied tensor's shape."""
        if self.per not in get_args(Per):
            return Reason(f"per={self.per!r} is unknown.", "Choose 'tensor', 'output' or 'input'.")
        if self.per == "input" and len(layout.shape) < 2:
            return Reason(f"the tensor {layout.shape} has no inputs.", "Choose per='output'.")
        return self.reason_against_shape(layout)

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        """A factor for each slice."""
        layout = self.bound_layout
        if self.per == "tensor":
            return ((1,),)
        outputs, *inputs = layout.canonical_shape
        return ((outputs if self.per == "output" else layout.groups * inputs[0],),)

    @property
    def making(self) -> Making:
        """More for each entry where there are more of them than what is near the core."""
        large = self.layout is not None and prod(self.layout.shape) > 1 << 21
        each = (0.4, 1.6) if large else (0.15, 0.7)
        return Making(*each, call=19, trained_call=97, small=(19, 97))

    def forward(self, *tensors: Tensor) -> Tensor:
        """Each entry of the source times the factor of its slice."""
        source, factors = tensors
        layout, one = self.bound_layout, (1,) * len(self.bound_layout.kernel)
        if self.per == "tensor":
            return source * factors.reshape((1,) * source.dim())
        if self._lie_along_the_first_axis(layout):
            return source * factors.reshape(-1, *(1,) * (source.dim() - 1))
        rows = factors.reshape(layout.groups, 1, -1)
        if layout.groups > 1:
            rows = rows.expand(-1, layout.shape[0] // layout.groups, -1)
        return source * rows.reshape(-1, layout.shape[1], *one)

    def fit(self, weight: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        """Least squares over each slice."""
        (source,) = sources
        wide = torch.promote_types(weight.dtype, torch.float64)
        ours, theirs = weight.to(wide), source.to(wide)
        above, below = self._summed(theirs.conj() * ours), self._summed(theirs.conj() * theirs)
        return (torch.where(below == 0, 0, above / below).to(weight.dtype),)

    def _summed(self, values: Tensor) -> Tensor:
        """The sum over each slice."""
        layout = self.bound_layout
        if self.per == "tensor":
            return values.sum().reshape(1)
        if self._lie_along_the_first_axis(layout):
            return values.reshape(len(values), -1).sum(1)
        first, second = layout.shape[:2]
        blocks = values.reshape(layout.groups, first // layout.groups, second, prod(layout.kernel))
        return blocks.sum((1, 3)).flatten()

    def _lie_along_the_first_axis(self, layout: Layout) -> bool:
        """Whether the slices follow each other along the first axis, or within a group beside."""
        return (self.per == "output") != layout.transposed

    @form("scaled", cost=_cost, where="compiled")
    def by_scaling(self, call: Call) -> Tensor:
        """Scale what goes in, or what comes out, and multiply by the source as it is."""
        (source,), (factors,) = call.sources, call.free
        behind = (1,) * len(call.use.layout.kernel)
        if self.per == "input":
            return call.stock(call.input * factors.reshape(-1, *behind), source, call.bias)
        output = call.stock(call.input, source, None) * factors.reshape(-1, *behind)
        return output if call.bias is None else output + call.bias.reshape(-1, *behind)

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """None: `scan` finds equal tensors by `copy`."""
        return ()

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """One factor, one for each input of a convolution in groups, and one for each output."""
        return (
            Example(
                lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 3)),
                {"source": "0"},
                path="2",
            ),
            Example(
                lambda: nn.Sequential(
                    nn.Conv2d(4, 6, 3, padding=1, groups=2),
                    nn.Conv2d(6, 4, 1),
                    nn.Conv2d(4, 6, 3, padding=1, groups=2),
                ),
                {"source": "0", "per": "input"},
                path="2",
            ),
            Example(
                lambda: nn.Sequential(
                    nn.ConvTranspose1d(4, 6, 3, groups=2),
                    nn.Conv1d(6, 4, 1),
                    nn.ConvTranspose1d(4, 6, 3, groups=2),
                ),
                {"source": "0", "per": "output"},
                path="2",
            ),
        )
