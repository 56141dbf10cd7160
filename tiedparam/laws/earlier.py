"""Laws whose free values once lay in another order, and how those of before are told.

Files, state dicts and optimizers hold free values in a law's order, and most of them say nothing
of versions. So a law that changes its order changes a shape, or the number of tensors, as well: by
that alone values of an earlier order are told, wherever they come from, and cannot be taken for
today's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tiedparam.laws.rule import Rule


class ReorderedLaw(Rule):
    """A law that knows an earlier order of its free values."""

    @abstractmethod
    def from_earlier(self, free: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """These free values in today's order; None if they are not those of an earlier one.

        Whatever has the shape of the free values follows in the same way: an optimizer's averages.
        """


def renewed(rule: Rule, free: Sequence[Any]) -> tuple[Tensor, ...] | None:
    """Free values of an earlier order in today's; None if these are not such, or have no values."""
    if not isinstance(rule, ReorderedLaw) or not all(type(value) in _ORDINARY for value in free):
        return None
    with torch.no_grad():
        return rule.from_earlier([value.detach() for value in free])


_ORDINARY = Tensor, torch.nn.Parameter  # not those of which a process has a part
