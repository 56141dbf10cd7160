"""Laws that leave smaller matrices for stock products: blocks, heads, sets, groups, numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.contenders import HAND_WRITTEN
from benchmarks.goal_cases import against_dense, both_modes
from benchmarks.measuring import Contender, Run

_BLOCKS = "block-diagonal, 8 blocks"
_TURNS = "p4, 1×1"
_TRIED = (
    "the transform in two steps and as one product; half of it, with one grouped convolution; "
    "blocks of 0.25 to 64 MB: the products alone take 0.38 of dense, moving 512 channels as much "
    "again"
)

_CALLS = (
    "the product alone is faster; the call, its views and its node in the graph take some 40 µs of "
    "a layer that takes a few hundred"
)
_COMPLEX = (
    "three products instead of four save a quarter, and the sums before and after them take most "
    "of that; the dense form, which expands the weight, takes longer still"
)

GOALS = (
    *both_modes("block_diagonal", "block-diagonal, 1,024", (5, 5), shapes=_BLOCKS,
                floor=HAND_WRITTEN, tried=_CALLS),
    *both_modes("head_share", "1,024", (3.3, 3.3), shapes="Linear(1024, 1024), heads",
                floor=HAND_WRITTEN, tried=_CALLS),
    *both_modes("head_share", "4,096", (4, 4), shapes="Linear(4096, 4096), heads",
                floor=HAND_WRITTEN,
                tried="a quarter of the multiplications is left, so 4 is the limit by arithmetic; "
                "beyond it only caches help, in inference"),
    *both_modes("structured", "16 channels × 64 items", (8, 8), shapes="64 items",
                floor=HAND_WRITTEN, tried=_CALLS),
    *both_modes("structured", "p4, 512 channels", (2, 2), shapes=f"Conv2d(512, 512, 1), {_TURNS}",
                tried=_TRIED),
    *both_modes("structured", "p4, 1,024 channels", (2, 2),
                shapes=f"Conv2d(1024, 1024, 1), {_TURNS}", tried=_TRIED),
    *both_modes("structured", "complex, 1,024", (1.05, 1.05), shapes="complex",
                tried=_COMPLEX),
)  # fmt: skip


def measure(run: Run) -> None:
    """Linear layers at batch 64 and 256, 1×1 convolutions on 14²."""
    n = 64 if run.quick else 1024
    for batch in (4,) if run.quick else (64, 256):
        x = torch.randn(batch, n)
        shapes = f"Linear({n}, {n})"
        run.compare(f"{shapes}, {_BLOCKS}", _block_diagonal(_linear(run, n), 8), x)
        found = _sets(_linear(run, n), n // 16)
        run.compare(f"{shapes}, {n // 16} items", found, x)
        found = against_dense(_linear(run, n), "hypercomplex")
        run.compare(f"{shapes}, complex", found, x)
        run.compare(f"{shapes}, centrosymmetric", against_dense(_linear(run, n), "centrosymmetric"),
                    x)  # fmt: skip
    for features in (64,) if run.quick else (1024, 4096):
        found = _head_share(_linear(run, features), 16, 4)
        shapes = f"Linear({features}, {features}), heads 4 of 16"
        run.compare(shapes, found, torch.randn(64, features))
    for channels, batch in ((16, 2),) if run.quick else ((512, 32), (1024, 8)):
        layer = nn.Conv2d(channels, channels, 1).to(run.device)
        run.compare(f"Conv2d({channels}, {channels}, 1), {_TURNS}",
                    against_dense(layer, "group_conv"),
                    torch.randn(batch, channels, 14, 14))  # fmt: skip


def _linear(run: Run, features: int) -> Any:
    return nn.Linear(features, features).to(run.device)


def _block_diagonal(layer: Any, blocks: int) -> list[Contender]:
    """The law, and a grouped convolution of one position."""
    found = against_dense(layer, "masked", pattern="block_diagonal", blocks=blocks)
    dense: Any = found[0].forward
    rows, columns = (size // blocks for size in dense.weight.shape)
    parts = [
        dense.weight[k * rows : (k + 1) * rows, k * columns : (k + 1) * columns]
        for k in range(blocks)
    ]
    w, b = (t.detach().clone().requires_grad_() for t in (torch.cat(parts)[..., None], dense.bias))

    def grouped(x: torch.Tensor) -> torch.Tensor:
        return F.conv1d(x[..., None], w, b, groups=blocks)[..., 0]

    w3, b3 = (t.detach().clone().requires_grad_() for t in (torch.stack(parts), dense.bias))

    def batched(x: torch.Tensor) -> torch.Tensor:
        y = torch.bmm(x.view(len(x), blocks, -1).transpose(0, 1), w3.mT).transpose(0, 1)
        return y.flatten(1) + b3

    return [
        *found,
        Contender(HAND_WRITTEN, batched, (w3,), (b3,)),
        Contender("grouped Conv1d", grouped, (w,), (b,)),
    ]


def _sets(layer: Any, items: int) -> list[Contender]:
    """The law, and what users write: every item by one matrix, the sum by another."""
    found = against_dense(layer, "set_equivariant", items=items)
    dense: Any = found[0].forward
    squares = dense.weight.detach().unflatten(1, (-1, items)).unflatten(0, (-1, items))
    itself, other = squares[:, 0, :, 0], squares[:, 0, :, 1]
    each, other, b = (
        t.detach().clone().requires_grad_() for t in (itself - other, other, dense.bias)
    )

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        sets = x.view(len(x), -1, items)
        y = each @ sets + (sets.sum(2) @ other.t()).unsqueeze(2)
        return y.flatten(1) + b

    return [*found, Contender(HAND_WRITTEN, by_hand, (each, other), (b,))]


def _head_share(layer: Any, heads: int, groups: int) -> list[Contender]:
    """The law, the same by hand, and the users' expanded weight."""
    found = against_dense(layer, "head_share", heads=heads, groups=groups)
    dense: Any = found[0].forward
    share, d = heads // groups, dense.out_features // heads
    w = dense.weight.detach().unflatten(0, (groups, share, d))[:, 0].flatten(0, 1)
    w, b = (t.detach().clone().requires_grad_() for t in (w, dense.bias))

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, w).view(-1, groups, 1, d)
        return (y + b.view(groups, share, d)).flatten(1)

    def expanded(x: torch.Tensor) -> torch.Tensor:
        whole = w.view(groups, d, -1).repeat_interleave(share, 0).flatten(0, 1)
        return F.linear(x, whole, b)

    return [
        *found,
        Contender(HAND_WRITTEN, by_hand, (w,), (b,)),
        Contender("users' repeat_interleave", expanded, (w,), (b,)),
    ]
