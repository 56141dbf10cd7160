"""Time against size, and against the number of rows, for the laws that may gain time.

`FAMILIES` says which, and what the operations of the law are as a share of the dense layer's: the
limit that no way of computing goes below, as long as operations are what takes the time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.cases.enrolled import case, placed
from benchmarks.goal_cases import against_dense
from benchmarks.measuring import Run

ROWS, SIZE = 64, 1024
"""The number of rows while sizes vary, and the size while rows do."""


@dataclass(frozen=True)
class Family:
    """One law on the layer in which people use it.

    Attributes:
        title: as charts have it.
        rule: its name.
        limit: its operations as a share of the dense layer's, by size.
        options: of the rule.
        convolution: the layer of so many channels and the size of its input, if it is no Linear.
        sizes: features or channels.
        batches: rows, or for convolutions samples.
        usual: the size and the batch that stand for all.
    """

    title: str
    rule: str
    limit: Callable[[int], float]
    options: dict[str, Any] = field(default_factory=dict)
    convolution: tuple[Callable[[int], Any], tuple[int, ...]] | None = None
    sizes: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    batches: tuple[int, ...] = (1, 4, 16, 64, 256)
    usual: tuple[int, int] = (SIZE, ROWS)

    def points(self, quick: bool) -> Iterator[tuple[int, int]]:
        """Every size with the usual batch, then every batch with the usual size."""
        size, batch = self.usual
        if quick:
            yield from ((n, 4) for n in self.sizes[:2])
            return
        yield from ((n, batch) for n in self.sizes)
        yield from ((size, n) for n in self.batches if n != batch)

    def layer(self, size: int) -> Any:
        """The stock layer."""
        return nn.Linear(size, size) if self.convolution is None else self.convolution[0](size)

    def label(self, size: int) -> str:
        """``Linear(1024, 1024)``."""
        layer = self.layer(size)
        if self.convolution is None:
            return f"Linear({size}, {size})"
        kernel, of = layer.kernel_size[0], "²" if len(self.convolution[1]) == 2 else ""
        groups = f", groups={layer.groups}" if layer.groups > 1 else ""
        kind = f"{type(layer).__name__}({size}, {size}, {kernel}{groups})"
        return f"{kind} on {self.convolution[1][0]:,}{of}"


def _fft(size: int) -> float:
    """Operations of a real transform, 2.5 n log₂ n."""
    return 2.5 * size * math.log2(size)


def _circulant(size: int) -> float:
    """Two transforms and a product of n/2 complex numbers, of 2n² operations."""
    return (2 * _fft(size) + 3 * size) / (2 * size**2)


def _toeplitz(size: int) -> float:
    """A circulant matrix of twice the size."""
    return (2 * _fft(2 * size) + 6 * size) / (2 * size**2)


def _block_circulant(size: int, block: int = 64) -> float:
    """Transforms of the blocks, and for each of b/2 frequencies a complex product (n/b)²."""
    transforms = 2 * size / block * _fft(block)
    return (transforms + 8 * (size / block) ** 2 * block / 2) / (2 * size**2)


_IMAGES: tuple[Callable[[int], Any], tuple[int, ...]] = (
    lambda c: nn.Conv2d(c, c, 3, padding=1),
    (14, 14),
)
_SIGNALS: tuple[Callable[[int], Any], tuple[int, ...]] = (
    lambda c: nn.Conv1d(c, c, 25, padding=12, groups=c),
    (1024,),
)
_OF_CHANNELS: dict[str, Any] = {"sizes": (16, 32, 64, 128, 256, 512), "batches": (1, 4, 8, 32)}

FAMILIES = (
    Family("one kernel for all inputs", "channel_shared", lambda n: 1 / n, {"over": "in"},
           _IMAGES, usual=(256, 8), **_OF_CHANNELS),
    Family("one long filter for all channels", "channel_shared", lambda n: 1.0,
           {"over": "groups"}, _SIGNALS, usual=(64, 8), **_OF_CHANNELS),
    Family("one row for all outputs", "row_repeat", lambda n: 1 / n),
    Family("shared heads, 4 of 16", "head_share", lambda n: 1 / 4, {"heads": 16, "groups": 4}),
    Family("circulant", "circulant", _circulant),
    Family("Toeplitz and Hankel", "toeplitz", _toeplitz),
    Family("block-circulant, blocks of 64", "block_circulant", _block_circulant, {"block": 64}),
    Family("block-diagonal, 8 blocks", "masked", lambda n: 1 / 8,
           {"pattern": "block_diagonal", "blocks": 8}),
    Family("sets of 64 items", "set_equivariant", lambda n: 1 / 64 + 1 / 64**2, {"items": 64}),
    Family("symmetric", "symmetric", lambda n: 1.0),
)  # fmt: skip


@case(
    "scaling",
    "Time against size, and against the number of rows, a law of each kind that may gain time",
    default_allocator=False,
)
def scaling(run: Run) -> None:
    setting = dataclasses.replace(run.setting, seconds=min(0.35, run.setting.seconds))
    for family in FAMILIES:
        for size, batch in family.points(run.quick):
            layer = placed(run, family.layer(size))
            found = against_dense(layer, family.rule, **family.options)
            sizes = (size,) if family.convolution is None else (size, *family.convolution[1])
            # the gradient of one filter sums millions of products, in another order
            run.compare(family.label(size), found, torch.randn(batch, *sizes), tolerance=5e-4,
                        setting=setting, family=family.title, size=size,
                        limit=family.limit(size))  # fmt: skip
