"""The bits of tensors: whether two hold the same, and a checksum of them."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether dtype, shape and bits are equal: a NaN equals itself, and −0 is not 0.

    Tensors on the meta device, which have no bits, are the same if they look the same.
    """
    if one is other:
        return True
    if one.dtype is not other.dtype or one.shape != other.shape or one.device != other.device:
        return False
    if one.is_meta or one.numel() == 0:
        return True
    return torch.equal(*_as_integers(one, other))


def _as_integers(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    left, right = left.detach(), right.detach()
    if left.is_neg() or right.is_neg():
        left, right = left.resolve_neg(), right.resolve_neg()
    if left.is_complex():
        left = torch.view_as_real(left.resolve_conj())
        right = torch.view_as_real(right.resolve_conj())
    size = left.element_size()
    # of parts of a storage, which need not start where a wide integer may
    starts = left.storage_offset() | right.storage_offset() | left.numel()
    if left.is_contiguous() and right.is_contiguous() and starts * size % 8 == 0:
        size = 8  # the widest integers are compared fastest
        left, right = left.reshape(-1), right.reshape(-1)
    return left.view(_INTEGERS[size]), right.view(_INTEGERS[size])


def checksum_of(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits that stand for names, shapes, dtypes and bits; in order of the names.

    The tensors have values; they may lie on any device.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(_content(tensor))
    return digest.hexdigest()[:16]


def _content(tensor: Tensor) -> bytes:
    """The bytes, as contiguous memory has them."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return ctypes.string_at(plain.data_ptr(), plain.numel() * plain.element_size())
