"""Which tensors of a model are nearest to a function of another one, by some sampled entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SAMPLED = 1024
"""How many entries of each tensor are compared over all pairs."""


@dataclass(frozen=True)
class Near:
    """Which sources are nearest to a tensor, and how many fitted."""

    sources: list[int]
    fitting: int


class Sources:
    """Samples of ``fn(source)`` for one function and every source, by shape, dtype and device."""

    def __init__(self) -> None:
        self._samples: dict[tuple[Any, ...], tuple[list[int], list[Tensor]]] = {}
        self._mutual: bool | None = None

    def add(self, index: int, source: Tensor, fn: Callable[[Tensor], Tensor]) -> None:
        """Note what the function makes of one source; nothing if it cannot take it."""
        try:
            value = fn(source)
            if self._mutual is None:
                # copying there and back is one finding, not two
                self._mutual = torch.equal(fn(value), source)
        except Exception:  # any function, on any shape
            return
        indices, samples = self._samples.setdefault(_kind(value), ([], []))
        indices.append(index)
        samples.append(sample(value))

    def nearest(
        self, tensors: list[Tensor], own: list[Tensor], count: int
    ) -> Iterator[tuple[int, Near]]:
        """For each tensor the sources whose function is nearest, by the tensors' own samples.

        All pairs of one shape are compared by products of matrices of samples, some rows at a
        time.
        """
        members: dict[tuple[Any, ...], list[int]] = {}
        for index, tensor in enumerate(tensors):
            members.setdefault(_kind(tensor), []).append(index)
        for kind, indices in members.items():
            if kind not in self._samples:
                continue
            numbers, samples = self._samples[kind]
            sources, values = torch.tensor(numbers, device="cpu"), torch.stack(samples)
            squares = values.abs().square().sum(1)
            for chunk in torch.tensor(indices, device="cpu").split(_ROWS):
                mine = torch.stack([own[index] for index in chunk.tolist()])
                products = (mine @ values.mH).real
                distances = mine.abs().square().sum(1, keepdim=True) + squares - 2 * products
                allowed = chunk[:, None]
                allowed = sources < allowed if self._mutual else sources != allowed
                distances = distances.nan_to_num(math.inf).masked_fill(~allowed, math.inf)
                order = torch.argsort(distances, dim=1, stable=True)[:, :count]
                for index, row, fitting in zip(
                    chunk.tolist(), sources[order].tolist(), allowed.sum(1).tolist(), strict=True
                ):
                    yield index, Near(row[:fitting], fitting)


_ROWS = 256


def _kind(value: Tensor) -> tuple[Any, ...]:
    return tuple(value.shape), value.dtype, value.device


def sample(value: Tensor) -> Tensor:
    """Some entries of a tensor, the same ones for every tensor of its shape."""
    count = value.numel()
    if count <= SAMPLED:
        flat = value.reshape(-1)
    else:
        generator = torch.Generator().manual_seed(count)
        chosen = torch.randint(count, (SAMPLED,), generator=generator, device="cpu")
        flat = value[torch.unravel_index(chosen.to(value.device), value.shape)]
    wide = torch.complex128 if value.is_complex() else torch.float64
    return flat.to("cpu", wide)
