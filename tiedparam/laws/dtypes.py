"""Which numbers a dtype can hold."""

from __future__ import annotations

import torch
from torch import Tensor

from tiedparam.util.errors import Reason
from tiedparam.util.torch_modes import plain_numbers


def why_not_in(dtype: torch.dtype, values: Tensor) -> Reason | None:
    """Why a dtype cannot hold numbers, or None."""
    with plain_numbers():
        values = values.detach().cpu()
        if values.is_complex() and not dtype.is_complex:
            return Reason(f"the fixed numbers are complex, and the tensor is {dtype}.")
        lost = int((values.isfinite() & ~values.to(dtype).isfinite()).sum())
        if lost:
            return Reason(f"{lost} of {values.numel()} fixed numbers are too large for {dtype}.")
    return None
