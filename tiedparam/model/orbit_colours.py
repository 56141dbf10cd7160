"""Colours for the stored values of a weight: those that lie side by side differ for every reader.

Numbers are what a picture says; colours help to find them again. There are `COLOURS` of them, dark
enough for white lines between them and light enough for dark figures on them. Each stored value
gets one in the order of its number: one that is little used so far, and unlike those of the values
that it touches. They differ in lightness, too, so also for readers who see two of three primary
colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import hypot

from torch import Tensor

DISTINCT = 0.08
"""How far the colours of neighbours are apart in OKLab, the space in which 0.02 is just seen."""
_CLEARLY = 0.13
FIXED = "#e4e4e4"
"""The colour of entries that are no stored value's: the law fixes or computes them."""

# OKLCH, twelve hues on each of four lightnesses: 0.90, 0.73, 0.82 and 0.66
_LEVELS = (
    "fed2ce a2f1d9 f9ccfe dee5a3 cedffe ffd4ba 98eff7 ffcfe1 beedba dfd8ff fada9d b9e5fe",
    "f08573 0ac2ab d787cf 9cb44a 88a2fc e49246 0dbcd3 ec81a3 61bf7a b693ef c8a32e 4ab2f4",
    "fead94 61dbd1 f3a8dd b0d284 b6bffe f3b673 65d5f3 ffa8b7 83daa9 d8b1fb d7c56e 93cafe",
    "ce7950 04a7a8 c673a2 71a355 8c87d8 bc872f 1ca1c9 d1717a 35a980 ae7ac4 9d9632 5e94da",
)
_PALETTE = tuple(
    f"#{level.split()[(hue + 3 * number) % 12]}"  # one after the other of another lightness and hue
    for hue in range(12)
    for number, level in enumerate(_LEVELS)
)
COLOURS = len(_PALETTE)

# What a reader sees of linear red, green and blue: all; without the cones for long waves, or for
# middle ones (Machado, Oliveira and Fernandes 2009, severity 1)
_EYES = (
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
)
_TO_CONES = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_TO_LAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


def colours_of(*drawn: Tensor) -> dict[int, str]:
    """The colour of each number in the matrices that a picture shows.

    Args:
        *drawn: matrices of the numbers of stored values, cells side by side as they are drawn; 0
            for entries that are none's. A sign does not count.

    Returns:
        ``"#rrggbb"`` by number; `FIXED` for 0.
    """
    near = _neighbours(drawn)
    chosen, failed = _chosen(near, thrifty=False)
    if failed:  # in a crowd, so leave room for those to come
        other, still = _chosen(near, thrifty=True)
        chosen = other if still < failed else chosen
    return {0: FIXED} | {number: _PALETTE[colour] for number, colour in chosen.items()}


def _chosen(near: dict[int, set[int]], *, thrifty: bool) -> tuple[dict[int, int], int]:
    """A colour for each number, and how many found none that was `DISTINCT` from neighbours'."""
    fixed, failed, used = COLOURS, 0, [0] * COLOURS
    chosen: dict[int, int] = {}
    distinct, clearly, table = _far_by(DISTINCT), _far_by(_CLEARLY), _distances()
    for number in sorted(near):
        beside = {
            chosen.get(other, fixed) for other in near[number] if other == 0 or other in chosen
        }
        allowed = wanted = (1 << COLOURS) - 1
        for colour in beside:
            allowed &= distinct[colour]
            wanted &= clearly[colour]

        def cost(each: int, allowed: int = allowed, wanted: int = wanted) -> tuple[int, ...]:
            left = (allowed & distinct[each]).bit_count() if thrifty else 0
            return -left, used[each], not wanted >> each & 1, each

        if allowed:
            best = min((each for each in range(COLOURS) if allowed >> each & 1), key=cost)
        else:
            failed += 1
            best = max(range(COLOURS), key=lambda each: min(table[each][o] for o in beside))
        chosen[number] = best
        used[best] += 1
    return chosen, failed


def distance(one: str, other: str) -> float:
    """How far two colours are apart in OKLab for the reader who sees least of it."""
    return min(
        hypot(*(a - b for a, b in zip(_lab(one, eye), _lab(other, eye), strict=True)))
        for eye in range(len(_EYES))
    )


def parts_of(colour: str) -> tuple[float, float, float]:
    """Red, green and blue, from 0 to 1, of ``"#rrggbb"``."""
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return red, green, blue


def _neighbours(drawn: Sequence[Tensor]) -> dict[int, set[int]]:
    """For each number in the matrices those that it touches, but not diagonally."""
    near: dict[int, set[int]] = {}
    for matrix in drawn:
        numbers = matrix.abs()
        for number in numbers.unique().tolist():
            near.setdefault(number, set())
        for one, other in (
            (numbers[:, :-1], numbers[:, 1:]),
            (numbers[:-1], numbers[1:]),
        ):
            differ = one != other
            for a, b in zip(one[differ].tolist(), other[differ].tolist(), strict=True):
                near[a].add(b)
                near[b].add(a)
    near.pop(0, None)
    return near


@lru_cache(None)
def _distances() -> list[list[float]]:
    """How far each colour is from each; that of fixed entries is the last."""
    every = (*_PALETTE, FIXED)
    return [[distance(one, other) for other in every] for one in every]


@lru_cache(None)
def _far_by(limit: float) -> list[int]:
    """For each colour those that are at least so far from it, as bits."""
    return [
        sum(1 << number for number in range(COLOURS) if row[number] >= limit)
        for row in _distances()
    ]


@lru_cache(None)
def _lab(colour: str, eye: int) -> tuple[float, float, float]:
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in parts_of(colour)
    ]
    seen = [min(1.0, max(0.0, part)) for part in _times(_EYES[eye], linear)]
    lightness, red, blue = _times(_TO_LAB, [part ** (1 / 3) for part in _times(_TO_CONES, seen)])
    return lightness, red, blue


def _times(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]
