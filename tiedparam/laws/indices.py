"""Numbers of free values, one for each entry: what they say, and what is wrong with a user's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiedparam.util.errors import Reason
from tiedparam.util.torch_modes import plain_numbers
from tiedparam.util.torch_private import has_values


def why_no_index(index: Any) -> Reason | None:
    """Why these are not numbers of free values, one for each entry, or None."""
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
        numbers = index.detach().cpu().to_dense().long().unique()
        if int(numbers[0]) < -1:
            return Reason(f"index has {int(numbers[0])}.", "Use numbers from 0, and -1 for zero.")
        numbers = numbers[numbers >= 0]
        if not len(numbers):
            return Reason(
                f"index is -1 at all of its {index.numel()} places, so no value is left to train.",
                "Number some entries.",
            )
        if int(numbers[-1]) != len(numbers) - 1:
            expected = torch.arange(len(numbers), device="cpu")
            missing = int((numbers != expected).nonzero()[0, 0])
            count = int(numbers[-1]) + 1 - len(numbers)
            return Reason(
                f"index goes up to {int(numbers[-1])}, and {count} of the numbers do not occur, "
                f"the first of them {missing}.",
                "Number the values from 0 on: index.unique(return_inverse=True)[1].",
            )
    return None


def why_no_signs(signs: Any, index: Tensor) -> Reason | None:
    """Why these are not signs beside an index, or None."""
    if signs is None:
        return None
    if not isinstance(signs, Tensor) or not has_values(signs):
        return Reason(f"signs is a {type(signs).__name__}.", "Give a tensor of 1 and -1.")
    if signs.shape != index.shape:
        return Reason(f"signs is {tuple(signs.shape)}, and index {tuple(index.shape)}.")
    whole = signs.dtype != torch.bool and not signs.is_complex()
    wrong = int((signs.to_dense().abs() != 1).sum()) if whole else signs.numel()
    if wrong:
        return Reason(f"{wrong} of {signs.numel()} signs are neither 1 nor -1.")
    return None


def image_by_labels(weight: Tensor, labels: Tensor) -> Tensor:
    """Every entry as the first one that has its number, with the sign between the two.

    Args:
        weight: any.
        labels: for each of its entries the number of its value, from 1; negative where the entry is
            minus that value, 0 where it is zero.
    """
    with plain_numbers():
        at, entry = labels.abs().long(), torch.arange(len(labels), device="cpu")
        first = torch.zeros(int(at.max()) + 1, dtype=torch.int64, device="cpu")
        first = first.scatter_reduce_(0, at, entry, "amin", include_self=False)
        sign = (labels.sign() * labels[first].sign()[at]).to(weight.device, torch.int8)
        first = first[at].to(weight.device)
    entries = weight.flatten()[first]
    signed = torch.where(sign < 0, -entries, entries)
    return torch.where(sign == 0, torch.zeros_like(entries), signed).view(weight.shape)
