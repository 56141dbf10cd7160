"""centrosymmetric and persymmetric: products with the exchange matrix, loops, counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tiedparam as tp
from tests.support.cases import assert_refused
from tests.support.tensors import stored, with_weight

SIZES = [(4, 4), (5, 5), (3, 4), (4, 3), (3, 5), (1, 6), (5, 1), (64, 64), (33, 20)]


def exchange(n: int) -> Tensor:
    """Ones on the diagonal that rises to the right."""
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for row in range(n):
        matrix[row, n - 1 - row] = 1
    return matrix


def linear(rows: int, columns: int) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False, dtype=torch.float64)


@pytest.mark.parametrize(("m", "n"), SIZES)
def test_the_weight_is_the_mean_with_its_image_under_j(m, n):
    both = linear(m, n)
    dense = both.weight.detach().clone()
    tp.register_tie(both, "centrosymmetric")
    expected = (dense + exchange(m) @ dense @ exchange(n)) / 2
    torch.testing.assert_close(both.weight.detach(), expected, rtol=1e-14, atol=1e-15)
    assert torch.equal(exchange(m) @ both.weight @ exchange(n), both.weight)
    assert stored(both) == -(-m * n // 2)
    if m == n:
        other = linear(m, n)
        dense = other.weight.detach().clone()
        tp.register_tie(other, "persymmetric")
        expected = (dense + exchange(n) @ dense.T @ exchange(n)) / 2
        torch.testing.assert_close(other.weight.detach(), expected, rtol=1e-14, atol=1e-15)
        assert torch.equal(exchange(n) @ other.weight.T @ exchange(n), other.weight)
        assert stored(other) == n * (n + 1) // 2


@pytest.mark.parametrize(("m", "n"), SIZES)
def test_reversed_inputs_have_reversed_outputs(m, n):
    layer = tp.register_tie(linear(m, n), "centrosymmetric")
    x = torch.randn(7, n, dtype=torch.float64)
    torch.testing.assert_close(
        layer(x @ exchange(n)), layer(x) @ exchange(m), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("n", [4, 5, 32])
def test_what_is_known_of_the_two_kinds(n):
    """Eigenvectors, products, and a family of matrices that is known to be lawful."""
    centro = tp.register_tie(linear(n, n), "centrosymmetric").weight.detach()
    # they form an algebra: products are centrosymmetric (Weaver 1985)
    other = tp.register_tie(linear(n, n), "centrosymmetric").weight.detach()
    product = with_weight(linear(n, n), centro @ other)
    assert tp.residual(product, "centrosymmetric") < 1e-14
    # those of a symmetric one are palindromes, with equal or opposite halves (Cantoni, Butler 1976)
    _, vectors = torch.linalg.eigh(centro + centro.T)
    mirrored = exchange(n) @ vectors
    signs = (mirrored * vectors).sum(0).sign()
    torch.testing.assert_close(mirrored, vectors * signs, rtol=0, atol=1e-9)
    assert (signs > 0).sum() == (n + 1) // 2
    # persymmetric: J turns it into a symmetric one, with real eigenvalues; Toeplitz is one
    per = tp.register_tie(linear(n, n), "persymmetric").weight.detach()
    symmetric = per @ exchange(n)
    assert torch.equal(symmetric, symmetric.T)
    values = torch.randn(2 * n - 1, dtype=torch.float64)
    toeplitz = values[torch.arange(n)[:, None] - torch.arange(n) + n - 1]
    assert tp.residual(with_weight(linear(n, n), toeplitz), "persymmetric") == 0


def test_literal_matrices():
    numbers = torch.arange(1.0, 10.0).reshape(3, 3)
    layer = tp.register_tie(with_weight(nn.Linear(3, 3), numbers), "centrosymmetric")
    assert layer.weight.tolist() == [[5, 5, 5], [5, 5, 5], [5, 5, 5]]
    layer = tp.register_tie(with_weight(nn.Linear(3, 3), numbers), "persymmetric")
    assert layer.weight.tolist() == [[5, 4, 3], [6, 5, 4], [7, 6, 5]]
    tp.assign_(layer, torch.tensor([[1.0, 2, 3], [4, 5, 2], [6, 4, 1]]))  # lawful, so it is kept
    assert layer.weight.tolist() == [[1, 2, 3], [4, 5, 2], [6, 4, 1]]
    layer = tp.register_tie(nn.Linear(2, 3), "centrosymmetric")
    tp.assign_(layer, free=torch.tensor([[1.0, 2.0, 3.0]]))
    assert layer.weight.tolist() == [[1, 2], [3, 3], [2, 1]]


@pytest.mark.parametrize("rule", ["centrosymmetric", "persymmetric"])
def test_saved_and_loaded_by_a_file(rule, tmp_path):
    layer = tp.register_tie(nn.Linear(6, 6), rule)
    tp.save(layer, tmp_path / "layer.safetensors")
    other = tp.load(tmp_path / "layer.safetensors", nn.Linear(6, 6))
    assert torch.equal(other.weight, layer.weight)
    assert tp.get_tie(other).name == rule


def test_refuses_what_is_not_a_square_matrix():
    assert_refused(
        nn.Linear(5, 4), "persymmetric", "the matrix has 4 rows and 5 columns, and must be square",
        "Tie a square layer, or use 'centrosymmetric'",
    )  # fmt: skip
    for rule in ("centrosymmetric", "persymmetric"):
        assert_refused(nn.Conv2d(4, 4, 3), rule, "the tensor (4, 4, 3, 3) has 4 axes")
        assert_refused(nn.Linear(4, 4), rule, "the tensor (4,) has 1 axis", tensor_name="bias")
