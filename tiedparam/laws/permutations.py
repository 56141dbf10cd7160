"""Permutations that users give of outputs, inputs and kernel positions; what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tiedparam.util.errors import Reason
from tiedparam.util.torch_modes import plain_numbers
from tiedparam.util.torch_private import has_values

AXES = ("outputs", "inputs", "positions")
"""What a generator permutes, in this order."""


def given_generators(generators: Any) -> list[Tensor] | Reason:
    """For each axis the permutations of all generators, ``(generators, size)``; size 0: none."""
    if not isinstance(generators, Sequence) or not generators:
        return Reason(f"generators={generators!r} are none.", "Give a list of tuples.")
    table: list[list[Tensor | None]] = []
    for number, generator in enumerate(generators, start=1):
        if not isinstance(generator, tuple) or not 1 <= len(generator) <= 3:
            return Reason(
                f"generator {number} is a {type(generator).__name__}, and not a tuple of one to "
                "three permutations.",
                "Give (outputs, inputs) or (outputs, inputs, positions).",
            )
        row: list[Tensor | None] = []
        for name, given in zip(AXES, generator, strict=False):
            permutation = _permutation(given, f"generator {number}: its permutation of {name}")
            if isinstance(permutation, Reason):
                return permutation
            row.append(permutation)
        table.append(row)
    if len({len(row) for row in table}) > 1:
        return Reason(f"the generators have {[len(row) for row in table]} permutations.")
    axes = []
    for name, column in zip(AXES, zip(*table, strict=True), strict=False):
        sizes = {len(permutation) for permutation in column if permutation is not None}
        if len(sizes) > 1:
            return Reason(f"the generators permute {sorted(sizes)} {name}.", "Use one size.")
        size = sizes.pop() if sizes else 0
        with plain_numbers():
            still = torch.arange(size, device="cpu")
            axes.append(torch.stack([still if each is None else each for each in column]))
    if not any(axis.numel() for axis in axes):
        return Reason("the generators permute nothing.", "Give a permutation of some axis.")
    return axes


def _permutation(given: Any, what: str) -> Tensor | Reason | None:
    if given is None:
        return None
    with plain_numbers():
        try:
            numbers = given if isinstance(given, Tensor) else torch.tensor(given, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            return Reason(f"{what} is a {type(given).__name__}.", "Give a list of numbers.")
        if numbers.dim() != 1 or not has_values(numbers) or not numbers.numel():
            return Reason(f"{what} has the shape {tuple(numbers.shape)}.", "Give a vector.")
        if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool:
            return Reason(f"{what} is {numbers.dtype}.", "Give whole numbers.")
        numbers = numbers.detach().cpu().long()
        size = len(numbers)
        if not torch.equal(numbers.sort().values, torch.arange(size, device="cpu")):
            missing = set(range(size)).difference(numbers.tolist())
            return Reason(
                f"{what} has {size} numbers and misses {min(missing)}.",
                f"Each of 0 to {size - 1} must occur once.",
            )
        return numbers


def is_identity(permutation: Tensor) -> bool:
    """Whether it leaves everything where it is."""
    with plain_numbers():
        return torch.equal(
            permutation, torch.arange(len(permutation), dtype=permutation.dtype, device="cpu")
        )
