"""Numbers that users give, to which entries are to be fixed."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor

from tiedparam.laws.masks import spread_over, why_not_over
from tiedparam.util.bits import checksum_of
from tiedparam.util.errors import Reason, shortened
from tiedparam.util.torch_modes import plain_numbers
from tiedparam.util.torch_private import has_values


def why_no_number(value: Any) -> Reason | None:
    """Why this is not a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return Reason(f"value={value!r} is no number.", "Give a number or a tensor.")
    try:
        is_finite = isfinite(value)
    except OverflowError:  # an int that no float holds
        is_finite = False
    if not is_finite:
        return Reason(f"value={shortened(repr(value))} is not finite.", "Give a finite number.")
    return None


def values_on(mask: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | Reason:
    """The mask in the shape of the numbers, and those of them that lie on it."""
    if not has_values(value) or value.dtype == torch.bool:
        return Reason(f"value is {value.dtype} {tuple(value.shape)} without numbers.")
    with plain_numbers():
        value = value.detach().cpu()
        if value.shape != mask.shape:
            if why_not_over(tuple(mask.shape), tuple(value.shape)) is not None:
                return Reason(
                    f"value is {tuple(value.shape)}, and mask {tuple(mask.shape)}.",
                    "Give a value for each place of the mask.",
                )
            mask = spread_over(mask, tuple(value.shape)).contiguous()
        values = value[mask]
        if not bool(values.isfinite().all()):
            count = int((~values.isfinite()).sum())
            return Reason(f"{count} of {len(values)} fixed numbers are not finite.")
        return mask, values


def checksum_of_values(values: Tensor) -> str:
    """The same for equal numbers, whatever their dtype."""
    wide = torch.complex128 if values.is_complex() else torch.float64
    with plain_numbers():
        return f"sha256:{checksum_of({'values': values.detach().cpu().to(wide)})}"


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether they are equal in the coarser of their dtypes."""
    with plain_numbers():
        one, other = one.detach().cpu(), other.detach().cpu()
        coarse = max(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        return torch.equal(one.to(coarse), other.to(coarse))
