"""One-dimensional k-means: all splits by brute force, clusters of kmeans1d, and hard numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tiedparam.laws import clustering
from tiedparam.laws.clustering import clusters


def loss_of(numbers: Tensor, codes: Tensor, weights: Tensor) -> float:
    total = 0.0
    for code in codes.unique():
        x, w = numbers[codes == code].double(), weights[codes == code].double()
        mean = (w * x).sum() / w.sum().clamp(min=1e-300)
        total += float((w * (x - mean).square()).sum())
    return total


def least_loss(numbers: Tensor, count: int, weights: Tensor) -> float:
    order = numbers.argsort()
    splits = []
    for cuts in itertools.combinations(range(1, len(numbers)), count - 1):
        marks = torch.zeros(len(numbers), dtype=torch.int64)
        marks[list(cuts)] = 1
        splits.append(loss_of(numbers[order], marks.cumsum(0), weights[order]))
    return min(splits)


@pytest.mark.parametrize("kind", ["random", "with ties", "weighted", "some weigh nothing"])
def test_no_split_is_better(kind):
    generator = torch.Generator().manual_seed(len(kind))
    for size, count in [(4, 2), (7, 3), (8, 4), (8, 7), (6, 6)]:
        numbers = torch.randn(2, size, dtype=torch.float64, generator=generator)
        numbers = numbers.mul(2).round() if kind == "with ties" else numbers
        weights = torch.ones(2, size, dtype=torch.float64)
        if "weigh" in kind:
            weights = torch.rand(2, size, dtype=torch.float64, generator=generator)
        if "nothing" in kind:
            weights[:, ::3] = 0
        codes = clusters(numbers, count, weights if "weigh" in kind else None)
        for x, w, found in zip(numbers, weights, codes, strict=True):
            assert found.unique().tolist() == list(range(count))
            assert (x[found.long().argsort(stable=True)].sort()[0]).equal(x.sort()[0])
            assert loss_of(x, found, w) == pytest.approx(least_loss(x, count, w), abs=1e-12)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (
            [0.09, 1.25, -0.93, 0.99, -0.26, -0.26, 1.9, 0.16, -0.04, 0.73, 1.13, -0.03],
            [1, 2, 0, 2, 1, 1, 2, 1, 1, 2, 2, 1],
        ),
        (
            [0.59, -0.97, -0.37, -0.44, -1.33, -1.51, -1.63, -0.24, -0.17, -0.32, 0.07, -1.34],
            [4, 1, 2, 2, 0, 0, 0, 2, 2, 2, 3, 0],
        ),
        (
            [-0.08, 0.24, 0.75, -0.85, -0.4, -2.02, -0.5, -2.2, -1.42, 1.1, -2.2, 0.8, 0.33,
             -0.31, 0.46, 0.53, 1.05, -0.23, -0.59, -0.6, -0.99, -0.04, -0.79, 1.07, -1.87, -1.09,
             -0.95, -2.09, 1.9, -2.41],
            [4, 5, 6, 2, 3, 0, 3, 0, 1, 6, 0, 6, 5, 4, 5, 5, 6, 4, 3, 3, 2, 4, 2, 6, 0, 2, 2, 0, 7,
             0],
        ),
    ],
)  # fmt: skip
def test_clusters_are_those_of_kmeans1d_0_5(numbers, expected):
    codes = clusters(torch.tensor([numbers]), max(expected) + 1)
    assert codes.tolist() == [expected]


@pytest.mark.parametrize("way", ["bins", "cells"])
def test_many_numbers_are_clustered_nearly_as_well(monkeypatch, way):
    numbers = torch.distributions.StudentT(3.0)
    torch.manual_seed(0)
    rows = numbers.sample((2, 1500))
    weights = torch.rand(2, 1500)
    best = clusters(rows, 8, weights)  # exact: fewer than 2,048 different numbers
    monkeypatch.setattr(clustering, "_POINTS", 64)
    if way == "cells":
        monkeypatch.setattr(clustering, "_CELLS", 1024)
    found = clusters(rows, 8, weights)
    assert not torch.equal(found, best)
    for x, w, one, other in zip(rows, weights, found, best, strict=True):
        assert one.unique().tolist() == list(range(8))
        assert loss_of(x, one, w) <= 1.01 * loss_of(x, other, w)


@pytest.mark.parametrize("cells", [2**20, 16])
def test_few_different_numbers_are_told_apart_however_near(monkeypatch, cells):
    monkeypatch.setattr(clustering, "_CELLS", cells)
    near = torch.tensor([1.0, 1 + 2**-23, 1 + 2**-22, 3e5, -7e5])
    places = torch.arange(40) % 5
    codes = clusters(near[places][None], 5)[0]
    assert torch.equal(codes.long(), torch.tensor([1, 2, 3, 4, 0])[places])
    # beside a row of many
    both = clusters(torch.stack([near[places], torch.linspace(0, 1, 40)]), 5)
    assert torch.equal(both[0], codes)


@pytest.mark.parametrize("cells", [2**20, 16])
def test_equal_numbers_are_dealt_to_clusters_that_would_be_empty(monkeypatch, cells):
    monkeypatch.setattr(clustering, "_CELLS", cells)
    for numbers in (torch.zeros(1, 40), torch.arange(40).remainder(2).float()[None]):
        codes = clusters(numbers, 7)[0]
        assert codes.unique().tolist() == list(range(7))
        assert loss_of(numbers[0], codes, torch.ones(40)) == 0


def test_an_outlier_in_many_numbers(monkeypatch):
    monkeypatch.setattr(clustering, "_CELLS", 256)
    torch.manual_seed(0)
    numbers = torch.cat([torch.randn(1000), torch.tensor([1e30])])[None]
    codes = clusters(numbers, 2)[0]
    assert int((codes == 1).sum()) == 1
    assert codes[-1] == 1


def test_dtypes_and_scales_make_no_difference():
    torch.manual_seed(0)
    numbers = torch.randn(3, 50).bfloat16()
    codes = clusters(numbers.double(), 6)
    assert torch.equal(clusters(numbers, 6), codes)
    for scale in (2.0**-600, 2.0**600):
        assert torch.equal(clusters(numbers.double() * scale, 6), codes)
    assert torch.equal(clusters(numbers.double() + 2.0**32, 6), codes)
