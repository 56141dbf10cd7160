"""One-dimensional k-means: numbers in few groups, each of which its mean stands for.

Groups of sorted numbers are intervals, so the best ones are found by dynamic programming (Wang and
Song 2011, "Ckmeans.1d.dp"). Of many numbers, the best intervals of a histogram are moved by Lloyd's
iterations; sums of an interval are differences of cumulative sums, so that an iteration costs next
to nothing however many numbers there are.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from tiedparam.util.errors import Reason
from tiedparam.util.torch_modes import plain_numbers
from tiedparam.util.torch_private import has_values

MADE = "the clusters are made of the weight"

_POINTS = 2048
"""Up to so many different numbers of a row are told apart by the dynamic programming."""
_WORK = 2**28
"""And as many as keep it below so many additions, half a second or so."""
_BINS = 512
"""Of more numbers so many bins start Lloyd's iterations, or sixteen for each group."""
_CELLS = 2**20
"""Rows of more numbers are not sorted: so many cells of equal width tell them apart."""
_MATRIX = 2**22
"""So many gains are in memory at once: 32 MB."""
_ITERATIONS = 100


def clusters(numbers: Tensor, count: int, importance: Tensor | None = None) -> Tensor:
    """For each number the group of its row, from 0 in the order of size; no group is empty.

    The sums of squared distances from the groups' means are least where a row has at most 2,048
    different numbers (fewer where there are many rows or groups); else they are nearly so. Where
    it has fewer than ``count``, equal numbers are dealt to several groups.

    Args:
        numbers: ``(rows, size)``, finite.
        count: how many groups; at most ``size`` and 256.
        importance: how much each number weighs, in the same shape; None is 1 for each.

    Returns:
        uint8, in the shape of ``numbers``, on the CPU. The same for the same numbers.
    """
    with plain_numbers():
        numbers = numbers.detach().cpu()
        if importance is not None:
            importance = importance.detach().cpu()
        if numbers.shape[1] > _CELLS:
            found = [
                _of_many(row, count, None if importance is None else importance[at])
                for at, row in enumerate(numbers)
            ]
            return torch.stack(found)
        return _of_sorted(numbers, count, importance)


def _of_sorted(numbers: Tensor, count: int, importance: Tensor | None) -> Tensor:
    """As `clusters`, of numbers that are sorted first."""
    values, order = numbers.sort(dim=1, stable=True)
    weighs = None if importance is None else importance.gather(1, order)
    values = values.double()
    runs = torch.ones(values.shape, dtype=torch.bool, device="cpu")
    torch.ne(values[:, 1:], values[:, :-1], out=runs[:, 1:])
    values -= values.mean(1, keepdim=True)  # for the digits of sums, and then of their squares
    values /= values.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float64).tiny)
    ends = _Sums(values, weighs).best(runs, count)
    marks = torch.zeros(values.shape, dtype=torch.uint8, device="cpu")
    marks.scatter_(1, ends[:, 1:-1], 1)
    return torch.empty_like(marks).scatter_(1, order, marks.cumsum(1, dtype=torch.uint8))


def _of_many(numbers: Tensor, count: int, importance: Tensor | None) -> Tensor:
    """As `clusters`, of one row: cells of equal width stand for the numbers in them."""
    least, largest = (end.double() for end in numbers.aminmax())
    width = (largest - least) / (_CELLS - 1)
    cell = ((numbers.double() - least) / width).nan_to_num_(0).to(torch.int64)
    counts = torch.bincount(cell)
    filled = counts.nonzero()[:, 0]
    sums = torch.bincount(cell, weights=numbers.double())
    means = (sums / counts)[filled]
    if len(filled) <= _POINTS:  # few numbers, or most of them in a few cells
        return _of_sorted(numbers[None], count, None if importance is None else importance[None])[0]
    weighs = counts if importance is None else torch.bincount(cell, weights=importance.double())
    codes = torch.zeros(len(counts), dtype=torch.uint8, device="cpu")
    codes[filled] = _of_sorted(means[None], count, weighs[filled][None])[0]
    return codes[cell]


class _Sums:
    """Rows of sorted numbers, of which the sum over any interval is known.

    An interval's numbers ``x`` of importance ``w`` gain ``(Σwx)²/Σw`` if their mean stands for
    them: the loss is ``Σwx²``, which no choice of intervals changes, minus the gains of all.
    """

    def __init__(self, values: Tensor, importance: Tensor | None) -> None:
        rows, size = values.shape
        self.values = values
        self.sums = torch.zeros(rows, size + 1, dtype=torch.float64, device="cpu")
        weighed = values if importance is None else values * importance
        torch.cumsum(weighed, 1, out=self.sums[:, 1:])
        self.weights: Tensor | None = None
        if importance is not None:
            self.weights = torch.zeros_like(self.sums)
            torch.cumsum(importance.double(), 1, out=self.weights[:, 1:])

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The cumulative sums of numbers and of weights before each place."""
        weights = places.double() if self.weights is None else self.weights.gather(1, places)
        return self.sums.gather(1, places), weights

    def best(self, runs: Tensor, count: int) -> Tensor:
        """``(rows, count + 1)`` places between which the groups lie, from 0 to the size.

        Args:
            runs: where a number differs from the one before it.
            count: how many groups.
        """
        rows, size = self.values.shape
        different = runs.sum(1)
        most = max(count, min(_POINTS, isqrt(_WORK // (rows * count)), size))
        few = different <= most
        points, starts = max(count, int(different.max())), runs
        if not bool(few.all()):
            points = min(most, max(_BINS, 16 * count, int((different * few).max())))
            starts = torch.where(few[:, None], runs, self._bins(points))
        found = self._by_points(_chosen(starts, points), count)
        if not bool(few.all()):
            found = torch.where(few[:, None], found, self._moved(found))
        # exact without any arithmetic, which could not tell numbers that are nearly equal
        single = different <= count
        if bool(single.any()):
            found[single] = self._closed(_chosen(runs[single], count))
        return found

    def _closed(self, starts: Tensor) -> Tensor:
        return torch.cat([starts, starts.new_full((len(starts), 1), self.values.shape[1])], 1)

    def _bins(self, most: int) -> Tensor:
        """Where bins of a histogram start: half of them of equal counts, half of equal widths."""
        rows, size = self.values.shape
        starts = torch.zeros(rows, size, dtype=torch.bool, device="cpu")
        half = most // 2
        starts[:, torch.arange(half, device="cpu") * size // half] = True
        least, largest = self.values[:, :1], self.values[:, -1:]
        edges = least + (largest - least) * (
            torch.arange(half, dtype=torch.float64, device="cpu") / half
        )
        return starts.scatter_(1, torch.searchsorted(self.values, edges).clamp_(max=size - 1), True)

    def _by_points(self, starts: Tensor, count: int) -> Tensor:
        """The best groups whose ends are among some places."""
        places = self._closed(starts)
        if starts.shape[1] == count:
            return places
        step = max(1, _MATRIX // places.shape[1] ** 2)
        sums, weights = self.at(places)
        chunks = zip(sums.split(step), weights.split(step), strict=True)
        return places.gather(1, torch.cat([_best_ends(*chunk, count) for chunk in chunks]))

    def _moved(self, ends: Tensor) -> Tensor:
        """Lloyd's iterations: every number goes to the mean that is nearest."""
        gain = self._gains(ends)
        for _ in range(_ITERATIONS):
            means = self._means(ends)
            between = (means[:, 1:] + means[:, :-1]) / 2
            moved = ends.clone()
            moved[:, 1:-1] = torch.searchsorted(self.values, between)
            gains = self._gains(moved)
            better = (moved.diff(dim=1) > 0).all(1) & (gains > gain)  # no group becomes empty
            if not bool(better.any()):
                break
            ends = torch.where(better[:, None], moved, ends)
            gain = torch.where(better, gains, gain)
        return ends

    def _gains(self, ends: Tensor) -> Tensor:
        sums, weights = (cumulative.diff(dim=1) for cumulative in self.at(ends))
        return (sums.square() / weights).nan_to_num_(0).sum(1)

    def _means(self, ends: Tensor) -> Tensor:
        sums, weights = (cumulative.diff(dim=1) for cumulative in self.at(ends))
        # of numbers without importance the first
        return torch.where(weights > 0, sums / weights, self.values.gather(1, ends[:, :-1]))


def _chosen(starts: Tensor, points: int) -> Tensor:
    """``(rows, points)`` places where groups may start: those marked, and others if too few."""
    missing = points - starts.sum(1, keepdim=True)
    others = ~starts
    if bool((missing > 0).any()):
        starts = starts | (others & (others.cumsum(1) <= missing))
    return starts.nonzero()[:, 1].view(len(starts), points)


def _best_ends(sums: Tensor, weights: Tensor, count: int) -> Tensor:
    """Which of the places the best groups end at, by dynamic programming.

    Args:
        sums: ``(rows, points + 1)``, of all numbers before each place.
        weights: of their weights, likewise.
        count: how many groups.
    """
    rows, places = sums.shape
    difference = sums[:, :, None] - sums[:, None, :]
    gain = difference.square_() / (weights[:, :, None] - weights[:, None, :])
    gain.nan_to_num_(0, posinf=0)
    gain.masked_fill_(torch.ones(places, places, dtype=torch.bool, device="cpu").triu(), -torch.inf)
    # reached[q][:, j]: the most that q + 1 groups gain of all numbers before place j
    reached = [gain[:, :, 0]]
    total = torch.empty_like(gain)
    for _ in range(count - 1):
        reached.append(torch.add(gain, reached[-1][:, None, :], out=total).amax(-1))
    ends = torch.full((rows, count + 1), places - 1, device="cpu")
    ends[:, 0] = 0
    row = torch.arange(rows, device="cpu")
    for group in range(count - 1, 0, -1):
        ends[:, group] = (gain[row, ends[:, group + 1]] + reached[group - 1]).argmax(-1)
    return ends


def why_no_numbers(weight: Tensor) -> Reason | None:
    """Why the numbers of a weight have no clusters, or None."""
    if not has_values(weight):
        return Reason(f"{MADE}, and it has no values.", "Load the layer first, or give codes=.")
    wrong = int((~weight.detach().isfinite()).sum())
    if not wrong:
        return None
    fact = f"{MADE}, and {wrong} of its {weight.numel()} numbers are not finite."
    return Reason(fact, "Correct them.")


def why_no_importance(weights: Any, shape: tuple[int, ...]) -> Reason | None:
    """Why these do not say how much each entry of a tensor of this shape matters, or None."""
    if not isinstance(weights, Tensor) or tuple(weights.shape) != shape:
        shown = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        return Reason(f"weights is {shown}, and the tensor {shape}.", "Give one for each entry.")
    if not has_values(weights) or weights.is_complex() or not bool((weights >= 0).all()):
        return Reason("weights are not all numbers from 0 on.", "Give squares, say.")
    if not bool(weights.isfinite().all()) or not bool(weights.any()):
        return Reason("weights are infinite, or all zero.", "Give some that are neither.")
    return None
