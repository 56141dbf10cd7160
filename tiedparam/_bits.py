"""Whether two tensors hold the same numbers, to the bit."""

from __future__ import annotations

import torch
from torch import Tensor


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether dtype, shape and bits are equal: a NaN equals itself, and −0 is not 0."""
    if one is other:
        return True
    if (one.dtype, one.shape, one.device) != (other.dtype, other.shape, other.device):
        return False
    if one.is_meta or one.numel() == 0:
        return True
    raw = [
        tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        for tensor in (one, other)
    ]
    return torch.equal(*raw)
