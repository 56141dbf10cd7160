"""Laws on square matrices, by whether each of several ranks can compute its part of the weight."""

import torch

SIZE = 12
CUTS = {
    "rows": ("row_repeat", {"groups": 4}),
    "one row": ("row_repeat", {}),
    "blocks of rows": ("repeat", {"outputs": 2}),
    "pairs of inputs": ("repeat", {"inputs": 2}),
    "equal inputs": ("channel_shared", {"over": "in"}),
    "heads": ("head_share", {"heads": 6, "groups": 2}),
    "one head": ("head_share", {"heads": 6, "groups": 1}),
    "diagonal blocks": ("masked", {"pattern": "block_diagonal", "blocks": 2}),
    "circulant blocks": ("block_circulant", {"block": 3}),
    "two laws": (["row_repeat", ("repeat", {"inputs": 2})], {}),
}
"""Laws of which each rank can compute its rows, and its columns, alone."""
MIXED = {
    "flip_sym": {},
    "symmetric": {},
    "skew": {},
    "circulant": {},
    "toeplitz": {},
    "hankel": {},
    "centrosymmetric": {},
    "persymmetric": {},
    "hypercomplex": {},
    "hashed": {"n": 20, "seed": 0},
    "fixed": {"mask": torch.eye(SIZE, dtype=torch.bool), "value": torch.ones(SIZE, SIZE)},
    "index": {"index": torch.arange(SIZE * SIZE).view(SIZE, SIZE) % 7},
}
"""Laws that mix the rows, and the columns, of different ranks."""
