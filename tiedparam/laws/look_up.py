"""Small weights: all entries are looked up at once.

Of a small weight the number of operations is all that counts. So there neither views nor a node of
one's own make it, but torch's own ``take``, by a table that is made when it is first needed. The
table belongs to no layer and no checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from tiedparam.util.torch_modes import plain_numbers

SMALL = 4_096
"""Up to so many entries a weight is small: there ``take`` is the fastest in inference and training,
and of larger ones ``index_select``, or one node."""
_LOOKED_UP = (torch.float32, torch.float64)  # gradients are summed in the dtype itself


@dataclass(frozen=True)
class LookUp:
    """Where each entry of a small weight stands among the free values.

    Attributes:
        places: for each entry, in the weight's shape.
        signs: 1 and −1, in every dtype that is looked up; None if no entry is minus a value.
        zeros: which entries are 0; None if none are.
    """

    places: Tensor
    signs: dict[torch.dtype, Tensor] | None
    zeros: Tensor | None

    @classmethod
    def of(cls, labels: Tensor) -> LookUp:
        """From the number of each entry's value, from 1; negative where it is minus it; or 0."""
        negative, zeros = labels < 0, labels == 0
        signs = torch.where(negative, -1, 1)
        return cls(
            (labels.abs() - 1).clamp(min=0).to(torch.int64),
            {dtype: signs.to(dtype) for dtype in _LOOKED_UP} if bool(negative.any()) else None,
            zeros if bool(zeros.any()) else None,
        )

    def __call__(self, free: Tensor) -> Tensor:
        """The weight, by recorded operations."""
        weight = torch.take(free, self.places)
        if self.signs is not None:
            weight = weight.mul_(self.signs[weight.dtype])
        # not by a product, which makes NaN of infinity
        return weight if self.zeros is None else weight.masked_fill_(self.zeros, 0)


class LookedUp(ABC):
    """A map by which every entry of a weight is a free value, or minus one, or 0.

    Nothing in it changes, so that copies of layers share it.

    Attributes:
        shape: the weight's shape.
    """

    shape: tuple[int, ...]
    _look_up: LookUp | None = None

    @abstractmethod
    def expand(self, free: Tensor) -> Tensor:
        """The weight."""

    def look_up(self, free: Tensor) -> LookUp | None:
        """The table of a small weight, made when it is first asked for; None of other weights."""
        if self._look_up is None:
            if prod(self.shape) > SMALL or not free.numel():
                return None
            with plain_numbers():
                numbers = torch.arange(1, free.numel() + 1, dtype=torch.float64, device="cpu")
                labels = self.expand(numbers.view(free.shape)).reshape(self.shape)
                # by the dictionary, for a map may be a frozen dataclass
                self.__dict__["_look_up"] = LookUp.of(labels)
        return self._look_up if free.dtype in _LOOKED_UP else None

    def __getstate__(self) -> dict[str, Any]:
        """Without the table, which is made again."""
        return {name: value for name, value in self.__dict__.items() if name != "_look_up"}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
