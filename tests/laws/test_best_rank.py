"""The start of a bank: the truncated singular value decomposition, with every direction alive."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tiedparam.laws.best_rank import best_templates


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_sums_are_the_truncated_decomposition_of_numpy(count):
    rows = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    left, sizes, right = np.linalg.svd(rows.double().numpy(), full_matrices=False)
    nearest = torch.from_numpy(left[:, :count] * sizes[:count] @ right[:count])
    templates, coefficients = best_templates(rows, count)
    torch.testing.assert_close(coefficients @ templates, nearest)
    torch.testing.assert_close(
        coefficients.square().mean(0), torch.ones(count, dtype=torch.float64)
    )
    largest = coefficients.gather(0, coefficients.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize(
    "rows",
    [torch.ones(4, 6), torch.zeros(4, 6), torch.eye(4, 6)[:1].repeat(4, 1), torch.ones(4, 4)],
    ids=["equal", "zero", "unit", "square"],
)
def test_templates_left_over_are_alive(rows):
    templates, coefficients = best_templates(rows, 3)
    torch.testing.assert_close(coefficients @ templates, rows.double())
    products = templates @ templates.T
    assert (products.diagonal() > 0).all()
    torch.testing.assert_close(products, products.diagonal().diag())


def test_the_same_rows_with_other_signs_give_the_same_templates_up_to_signs():
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    templates, coefficients = best_templates(rows, 2)
    other, mirrored = best_templates(-rows, 2)
    torch.testing.assert_close(other, -templates)
    torch.testing.assert_close(mirrored, coefficients)


def test_what_rounding_makes_of_a_smaller_rank_is_nothing():
    generator = torch.Generator().manual_seed(1)
    two = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    rows = two @ torch.randn(2, 7, generator=generator, dtype=torch.float64)
    _, coefficients = best_templates(rows, 4)
    assert coefficients[:, 2:].count_nonzero() == 0
