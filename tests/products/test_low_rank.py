"""The truncated singular value decomposition, and the nearest matrix of a rank."""

from __future__ import annotations

import numpy as np
import torch

from tiedparam.products.low_rank import nearest_product, truncated


def random_of_rank_two() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    return left @ torch.randn(2, 7, generator=generator, dtype=torch.float64)


def test_singular_values_that_rounding_made_are_0():
    matrix = random_of_rank_two()
    left, sizes, right = truncated(matrix, 4)
    assert np.linalg.svd(matrix.numpy(), compute_uv=False)[2:].any()
    assert sizes.tolist()[2:] == [0.0, 0.0]
    torch.testing.assert_close(left * sizes @ right, matrix)


def test_the_nearest_product_leaves_no_factor_without_a_gradient():
    left, right = nearest_product(random_of_rank_two(), 3)
    assert left[:, 2].count_nonzero() == 0
    torch.testing.assert_close(right @ right.mT, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(left @ right, random_of_rank_two())
