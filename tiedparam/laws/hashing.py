"""Whole numbers that look random, and are the same on every machine and in every version.

All of it is exact in int64: no product exceeds 2^49, so nothing wraps around.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiedparam.util.torch_modes import plain_numbers

_MASK = 0xFFFFFFFF
_ORDER, _SIGN = 0x9E3779B9, 0x85EBCA6B
"""What tells the two uses of a seed apart."""


def hashed_labels(entries: int, count: int, seed: int) -> Tensor:
    """For each entry the number of its value, from 1, negative where it is minus that value.

    Entries are put into the order of their hashes, and dealt to the values in turn. So every value
    has as many entries as any other, or one less, where drawing would leave some with none. Signs
    come from another hash. This is a file format: it never changes.

    Returns:
        ``(entries,)``, int32, on the CPU.
    """
    with plain_numbers():
        entry = torch.arange(entries, dtype=torch.int64, device="cpu")
        order = _mixed(_mixed(entry) ^ _mixed_number(seed ^ _ORDER)).argsort(stable=True)
        labels = torch.empty(entries, dtype=torch.int32, device="cpu")
        labels[order] = (entry % count + 1).to(torch.int32)
        negative = _mixed(_mixed(entry) ^ _mixed_number(seed ^ _SIGN)) >> 31 == 1
        return torch.where(negative, -labels, labels)


def _mixed_number(number: int) -> int:
    return int(_mixed(torch.tensor([number], dtype=torch.int64, device="cpu")))


def _mixed(numbers: Tensor) -> Tensor:
    """A permutation of the numbers below 2^32: Wellons's "lowbias32" (2018)."""
    numbers = numbers & _MASK
    numbers = _times(numbers ^ numbers >> 16, 0x7FEB352D)
    numbers = _times(numbers ^ numbers >> 15, 0x846CA68B)
    return numbers ^ numbers >> 16


def _times(numbers: Tensor, factor: int) -> Tensor:
    """The product modulo 2^32, by halves of the factor."""
    high = (numbers * (factor >> 16) & 0xFFFF) << 16
    return numbers * (factor & 0xFFFF) + high & _MASK
