"""A pattern by numbers: W[e] = ± w[index[e]]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tiedparam.laws import Coded, Reason
from tiedparam.laws.example import Example
from tiedparam.laws.indices import image_by_labels, why_no_index, why_no_signs
from tiedparam.laws.layout import Layout
from tiedparam.laws.packing import pack_flags, pack_numbers, unpack_flags, unpack_numbers
from tiedparam.laws.pattern import Pattern
from tiedparam.laws.registry import register_rule
from tiedparam.laws.times import Making
from tiedparam.util.torch_modes import plain_numbers


@register_rule("index")
class Index(Coded):
    """For every entry the number of the free value that it is, as a user writes it down.

    Args:
        index: whole numbers in the tensor's own shape. Equal numbers share a value; −1 is zero.
            Every number from 0 to the largest must occur.
        signs: in the same shape, 1 or −1 for each entry; None is 1 everywhere.

    The numbers are stored with the layer: ``⌈log₂ n⌉`` bits an entry for ``n`` values, one more if
    there are signs, one more if there are zeros.

    Shapes: ``free``: ``(1, n)``, or ``(n,)`` for a vector, in the order of the numbers; ``weight``:
    that of ``index``.

    Source: hashed and clustered weights are of this kind (Chen et al. 2015, "Compressing neural
    networks with the hashing trick"); the projection is the (signed) orbit mean.

    Example:
        >>> index = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 2, 0]])
        >>> layer = tp.register_tie(nn.Linear(3, 3), "index", index=index)
        >>> free = layer.parametrizations.weight.original0[0]
        >>> torch.equal(layer.weight, free[index])
        True
    """

    family = "patterns of your own"
    law: str = "W[e] = ± w[index[e]]"
    making: Making = Making(1.3, 4.2)

    def __init__(self, index: Tensor | str, signs: Tensor | None = None) -> None:
        super().__init__()
        if isinstance(index, str):
            self.expect(index)
            return
        self.fault: Reason | None = why_no_index(index) or why_no_signs(signs, index)
        if self.fault is None:
            with plain_numbers():
                index = index.detach().cpu().to_dense().to(torch.int32)
                codes = {"index_bits": pack_numbers(index.flatten().clamp(min=0), int(index.max()))}
                if bool((index < 0).any()):
                    codes["zero_bits"] = pack_flags((index < 0).flatten())
                negative = None if signs is None else signs.detach().cpu().to_dense() < 0
                if negative is not None and bool(negative.any()):
                    codes["sign_bits"] = pack_flags(negative.flatten())
                self.keep(tuple(index.shape), codes)

    def options(self) -> dict[str, Any]:
        """The tag of the index, which stands for the signs as well."""
        return {"index": self.tag} if self.checksum else {}

    def check(self, layout: Layout) -> Reason | None:
        """The index must have the tensor's shape."""
        reason = super().check(layout)
        if reason is None and self.coded_shape != layout.shape:
            return Reason(
                f"index is {self.coded_shape}, and the tensor {layout.shape}.",
                "Give a number for each entry.",
            )
        return reason

    def _labels(self) -> Tensor:
        """For each entry its number from 1, negative where it is minus that value; 0 is zero."""
        count, held = prod(self.coded_shape), self.data()
        with plain_numbers():
            labels = unpack_numbers(held["index_bits"], count) + 1
            if "zero_bits" in held:
                labels[unpack_flags(held["zero_bits"], count)] = 0
            if "sign_bits" in held:
                labels = torch.where(unpack_flags(held["sign_bits"], count), -labels, labels)
            return labels

    @property
    def index(self) -> Tensor:
        """The numbers as they were given, in int32 on the CPU."""
        return self._labels().abs().sub(1).view(self.coded_shape)

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """Every entry as the first one that has its number, with the sign between the two."""
        yield image_by_labels(weight, self._labels())

    def find_pattern(self) -> Pattern:
        """As the index says."""
        labels = self._labels()
        return Pattern(labels, int(labels.abs().max()), None)

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """None: the pattern is the user's."""
        return ()

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """With signs and zeros, on a matrix, convolutions and a bias."""
        latin = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 2, 0]], device="cpu")
        signed = torch.tensor([[2, 0, -1, 1], [1, 2, 0, 0]], device="cpu")
        signs = torch.tensor([[-1, 1, 1, 1], [-1, 1, -1, 1]], device="cpu")
        kernel = torch.tensor([[[1, 0, 1]], [[0, 2, 0]]], device="cpu")
        return (
            Example(lambda: nn.Linear(3, 3), {"index": latin}),
            Example(lambda: nn.Linear(4, 2), {"index": signed, "signs": signs}),
            Example(lambda: nn.Conv1d(1, 2, 3), {"index": kernel}),
            Example(lambda: nn.ConvTranspose1d(2, 1, 3), {"index": kernel}),
            Example(lambda: nn.Linear(2, 3), {"index": latin[0].clamp(max=1)}, "", "bias"),
        )
