"""A pattern by numbers: W[e] = ± w[index[e]]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tiedparam.laws import Coded, Reason
from tiedparam.laws.layout import Layout
from tiedparam.laws.packing import pack_flags, pack_numbers, unpack_flags, unpack_numbers
from tiedparam.laws.pattern import Pattern
from tiedparam.laws.registry import register_rule
from tiedparam.laws.rule import Example
from tiedparam.util.torch_modes import plain_numbers
from tiedparam.util.torch_private import has_values


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

    def __init__(self, index: Tensor | str, signs: Tensor | None = None) -> None:
        super().__init__()
        if isinstance(index, str):
            self.expect(index)
            return
        self.fault = _why_no_index(index) or _why_no_signs(signs, index)
        if self.fault is None:
            with plain_numbers():
                index = index.detach().cpu().to(torch.int32)
                codes = {"index_bits": pack_numbers(index.flatten().clamp(min=0), int(index.max()))}
                if bool((index < 0).any()):
                    codes["zero_bits"] = pack_flags((index < 0).flatten())
                if signs is not None and bool((signs < 0).any()):
                    codes["sign_bits"] = pack_flags((signs < 0).cpu().flatten())
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
        with plain_numbers():
            labels = self._labels()
            at, first = labels.abs(), _first_entries(labels)
            sign = (labels.sign() * labels[first].sign()[at]).to(torch.int8)
            first = first[at].to(weight.device)
        sign = sign.to(weight.device)
        entry = weight.flatten()[first]
        image = torch.where(
            sign == 0, torch.zeros_like(entry), torch.where(sign < 0, -entry, entry)
        )
        yield image.view(weight.shape)

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


def _first_entries(labels: Tensor) -> Tensor:
    """The first entry of each number, those that are zero as number 0."""
    with plain_numbers():
        first = torch.zeros(int(labels.abs().max()) + 1, dtype=torch.int64)
        entry = torch.arange(len(labels))
        return first.scatter_reduce_(0, labels.abs().long(), entry, "amin", include_self=False)


def _why_no_index(index: Any) -> Reason | None:
    if not isinstance(index, Tensor):
        return Reason(f"index is a {type(index).__name__}.", "Give a tensor of whole numbers.")
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        return Reason(
            f"index is {index.dtype} {tuple(index.shape)}, and not of whole numbers.",
            "Convert it: index.long().",
        )
    if not has_values(index) or index.numel() == 0:
        return Reason(f"index {tuple(index.shape)} has no values.", "Make it on a real device.")
    with plain_numbers():
        numbers = index.detach().cpu().long().unique()
        if int(numbers[0]) < -1:
            return Reason(f"index has {int(numbers[0])}.", "Use numbers from 0, and -1 for zero.")
        numbers = numbers[numbers >= 0]
        if not len(numbers):
            return Reason(
                f"index is -1 at all of its {index.numel()} places, so no value is left to train.",
                "Number some entries.",
            )
        if int(numbers[-1]) != len(numbers) - 1:
            expected = torch.arange(len(numbers))
            missing = int((numbers != expected).nonzero()[0, 0])
            count = int(numbers[-1]) + 1 - len(numbers)
            return Reason(
                f"index goes up to {int(numbers[-1])}, and {count} of the numbers do not occur, "
                f"the first of them {missing}.",
                "Number the values from 0 on: index.unique(return_inverse=True)[1].",
            )
    return None


def _why_no_signs(signs: Any, index: Tensor) -> Reason | None:
    if signs is None:
        return None
    if not isinstance(signs, Tensor) or not has_values(signs):
        return Reason(f"signs is a {type(signs).__name__}.", "Give a tensor of 1 and -1.")
    if signs.shape != index.shape:
        return Reason(f"signs is {tuple(signs.shape)}, and index {tuple(index.shape)}.")
    wrong = int((signs.abs() != 1).sum()) if signs.dtype != torch.bool else signs.numel()
    if wrong:
        return Reason(f"{wrong} of {signs.numel()} signs are neither 1 nor -1.")
    return None
