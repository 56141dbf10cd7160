"""The laws of the parts of a weight that is cut into equal slices along an axis.

Tensor parallelism cuts a weight so: each rank holds a part and multiplies with it alone. That
serves a tied weight if each part obeys a law by itself, whose free values are a slice of the whole
law's, or all of them. Whether it does is computed, not stated: random free values are expanded
whole and in parts, and the parts must be the slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tiedparam.laws.rule import Rule
from tiedparam.util.errors import Reason
from tiedparam.util.torch_modes import plain_numbers


@dataclass(frozen=True)
class Cut:
    """How one tensor is cut.

    Attributes:
        shape: its shape.
        axis: the axis that is cut; None if all parts have the whole.
    """

    shape: tuple[int, ...]
    axis: int | None

    def part(self, tensor: Tensor, parts: int, number: int) -> Tensor:
        """One slice."""
        return tensor if self.axis is None else tensor.chunk(parts, self.axis)[number]


@dataclass(frozen=True)
class Parts:
    """The laws of the slices of a weight, not yet judged.

    Attributes:
        whole: the law of the weight.
        axis: along which axis that is cut.
        rules: the laws of the slices.
        free: how each tensor of free values is cut.
    """

    whole: Rule
    axis: int
    rules: tuple[Rule, ...]
    free: tuple[Cut, ...]

    def why_no_slices(self, sources: Sequence[Cut] = ()) -> Reason | None:
        """Why the laws do not give the slices of the weight, or None.

        All slices are judged, so that all ranks get the same answer.

        Args:
            sources: how the tensors that the law reads are cut.
        """
        count, cuts = len(self.rules), (*sources, *self.free)
        with plain_numbers():
            random = torch.Generator("cpu").manual_seed(0)
            values = [
                torch.rand(cut.shape, dtype=torch.float64, device="cpu", generator=random)
                for cut in cuts
            ]
            slices = self.whole.forward(*values).chunk(count, self.axis)
            for number, rule in enumerate(self.rules):
                given = [cut.part(v, count, number) for cut, v in zip(cuts, values, strict=True)]
                try:
                    part: Any = rule.forward(*given)
                except (RuntimeError, IndexError, ValueError):  # a user's function of a source
                    return _MIXED
                wanted = slices[number]
                # what is computed from sources may be rounded otherwise
                if part.shape != wanted.shape or not torch.allclose(part, wanted, 1e-12, 1e-12):
                    return _MIXED
        return None


def parts_of(rule: Rule, axis: int, count: int) -> Parts | Reason:
    """The laws of the equal slices of a weight, or why there are none.

    Args:
        rule: the law of the weight, bound to its layout.
        axis: the axis of the weight that is cut.
        count: into how many slices.
    """
    layout = rule.bound_layout
    size = layout.shape[axis]
    if size % count:
        return Reason(f"{size} is no multiple of {count}.")
    shape = (*layout.shape[:axis], size // count, *layout.shape[axis + 1 :])
    small, rules = replace(layout, shape=shape), []
    for number in range(count):
        part = rule.part(axis, count, number)
        part = part.for_layout(small) if part is not None else None
        # the sources of a law that reads layers are cut as well, and judged later
        if part is None or (not part.reads_layers and part.bind(small, torch.float64) is not None):
            return _MIXED
        rules.append(part)
    cuts = _cuts(rule.free_shapes(), rules[0].free_shapes(), count)
    if cuts is None or any(part.free_shapes() != rules[0].free_shapes() for part in rules):
        return _MIXED
    return Parts(rule, axis, tuple(rules), cuts)


_MIXED = Reason(
    "a part has no law of its own: entries of different parts are tied, or the values that the law "
    "holds do not lie part by part."
)


def _cuts(
    whole: tuple[tuple[int, ...], ...], part: tuple[tuple[int, ...], ...], count: int
) -> tuple[Cut, ...] | None:
    """How free values of such shapes become those of a part; None if not by cuts."""
    if len(whole) != len(part):
        return None
    cuts = []
    for given, smaller in zip(whole, part, strict=True):
        if len(given) != len(smaller):
            return None
        other = [axis for axis, size in enumerate(given) if size != smaller[axis]]
        if len(other) > 1 or any(given[axis] != count * smaller[axis] for axis in other):
            return None
        cuts.append(Cut(given, other[0] if other else None))
    return tuple(cuts)
