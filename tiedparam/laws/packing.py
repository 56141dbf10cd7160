"""Flags and small numbers in as few bits as they need, in bytes that every machine reads alike."""

from __future__ import annotations

import torch
from torch import Tensor

from tiedparam.util.torch_modes import plain_numbers


def pack_flags(flags: Tensor) -> Tensor:
    """``(*, n)`` truth values → ``(*, ⌈n/8⌉)`` bytes; the first flag is the lowest bit."""
    with plain_numbers():
        *batch, count = flags.shape
        padded = torch.zeros(*batch, -(-count // 8) * 8, dtype=torch.uint8, device="cpu")
        padded[..., :count] = flags
        shifted = padded.view(*batch, -1, 8) << torch.arange(8, dtype=torch.uint8, device="cpu")
        return shifted.sum(-1, dtype=torch.uint8)


def unpack_flags(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack_flags`, on the CPU."""
    with plain_numbers():
        bits = (packed.cpu()[..., None] >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1
        return bits.flatten(-2)[..., :count].bool()


def pack_numbers(numbers: Tensor, most: int) -> Tensor:
    """``(*, n)`` numbers from 0 to ``most`` → ``(*, bits, ⌈n/8⌉)`` bytes, the lowest bit first."""
    with plain_numbers():
        bits = max(1, most.bit_length())
        planes = [(numbers >> bit) & 1 for bit in range(bits)]
        return pack_flags(torch.stack(planes, -2))


def unpack_numbers(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack_numbers`, in int32 on the CPU."""
    with plain_numbers():
        planes = unpack_flags(packed, count)
        numbers = torch.zeros(*planes.shape[:-2], count, dtype=torch.int32, device="cpu")
        for bit, plane in enumerate(planes.unbind(-2)):
            numbers |= plane.to(torch.int32) << bit
        return numbers
