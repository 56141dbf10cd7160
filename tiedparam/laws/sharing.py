"""Laws of several layers that have values in common: what they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tiedparam.laws.layout import Layout
from tiedparam.laws.linked import Linked, Source
from tiedparam.laws.rule import Rule
from tiedparam.util.errors import Reason, raise_if
from tiedparam.util.torch_private import has_values


class Sharing(Linked):
    """``W = forward(shared, *own)``: the tensors of several layers share values.

    One of the layers, the owner, stores the shared values, once, as the first of its free values;
    the others read them there, and store values of their own alone. So a rule of this kind has one
    of two parts: it has no source, and owns; or it reads the owner. `forward` is the same in both.

    Ties of this kind begin together, since the shared values come of all the tensors: see
    `tiedparam.tie_bank`. Later, what is fitted to one layer leaves the shared values alone, which
    the others need.

    Args:
        source: a layer that shares already; None owns.
        source_name: the name of its tensor; by default that of the tied one.
    """

    complex_valued = False
    bilinear = True

    def __init__(self, source: Source | None = None, source_name: str | None = None) -> None:
        if source is None:
            Rule.__init__(self)
            self.own_shared()
        else:
            super().__init__(source, source_name)

    # What it reads ----------------------------------------------------------------------

    def own_shared(self) -> None:
        """From now on the layer of this tie has the shared values."""
        self._given, self._several = (), False
        self.reads_layers: bool = False

    def read_from(self, found: Sequence[tuple[Any, str]]) -> None:
        """From now on read these tensors."""
        super().read_from(found)
        self.reads_layers = bool(found)

    @property
    def source(self) -> Any:
        """What is read; None for the owner."""
        return super().source if self.reads_layers else None

    @property
    def source_name(self) -> Any:
        """The name of the tensor that is read; None for the owner."""
        return super().source_name if self.reads_layers else None

    # The law ----------------------------------------------------------------------------

    @abstractmethod
    def shared_shape(self) -> tuple[int, ...]:
        """The shape of the values that all have in common."""

    @abstractmethod
    def own_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the values that each layer has besides."""

    @abstractmethod
    def fit_together(self, weights: Sequence[Tensor]) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """The shared values, and those of each weight, which together come nearest.

        Args:
            weights: in the canonical layout, in which they all have one shape.
        """

    def start(self, weights: Sequence[Tensor]) -> tuple[Tensor, list[tuple[Tensor, ...]]] | None:
        """As `fit_together`; zeros where one has no values, None if not all are finite numbers."""
        if not all(map(has_values, weights)):
            zeros = weights[0].new_zeros
            own = [tuple(zeros(shape) for shape in self.own_shapes()) for _ in weights]
            return zeros(self.shared_shape()), own
        if not all(bool(weight.isfinite().all()) for weight in weights):
            return None
        return self.fit_together(weights)

    def join(self, shared: Tensor) -> None:
        """Take from the shared values what was not given of the options."""

    def why_not_joined(self, shared: Tensor) -> Reason | None:
        """Why a bound rule cannot read these shared values, or None."""
        there, wanted = tuple(shared.shape), self.shared_shape()
        if there == wanted:
            return None
        return Reason(
            f"the layers that it is to share with have {there} in common, and this one needs "
            f"{wanted}.",
            "Choose layers of equal shape, and the options that those have.",
        )

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the owner the shared values and its own; of the others their own."""
        own = self.own_shapes()
        return own if self.reads_layers else (self.shared_shape(), *own)

    def bind(self, layout: Layout, dtype: torch.dtype) -> Reason | None:
        """Fit the rule to one tensor."""
        return Rule.bind(self, layout, dtype)

    def why_not_alone(self) -> Reason | None:
        """What is shared does not follow from one tensor."""
        if self.reads_layers:
            return None
        return Reason(
            "what layers share begins with all of them, not with one.",
            f"Tie them together, by tiedparam.tie_{self.name}; another one joins later by source=, "
            "a layer that shares already.",
        )

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The values of its own that come nearest.

        Raises:
            TieError: for the owner: what is shared does not follow from one tensor.
        """
        raise_if(f"cannot fit '{self}' to one tensor", self.why_not_alone())
        return super().right_inverse(weight)

    def refit(self, weight: Tensor, present: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The nearest values of its own; what the others read stays."""
        if self.reads_layers:
            return self.right_inverse(weight)
        shared = present[0].detach()
        return (shared.clone(), *(value.detach().clone() for value in self.fit(weight, shared)))

    @property
    def has_orbits(self) -> bool:
        """No: entries are sums of products."""
        return False


def why_not_alone(rule: Rule) -> Reason | None:
    """Why the free values of a rule cannot come from the one tensor that is tied, or None."""
    return rule.why_not_alone() if isinstance(rule, Sharing) else None


def refitted(rule: Rule, weight: Tensor, present: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Free values of a nearest lawful weight for a tensor that is tied already.

    Args:
        rule: its law.
        weight: the new weight.
        present: the free values that there are, of which those that are shared stay.
    """
    if isinstance(rule, Sharing):
        return rule.refit(weight, present)
    return rule.right_inverse(weight)


def redrawn(rule: Rule, weight: Tensor, present: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The representatives of a weight for a tensor that is tied already: see `refitted`."""
    if isinstance(rule, Sharing):
        return rule.refit(weight, present)
    return rule.representatives(weight)
