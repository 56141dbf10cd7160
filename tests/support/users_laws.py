"""Two laws as users write them, by which the room for such laws and the contract are tested."""

from __future__ import annotations

from math import prod

import torch
from torch import nn

import tiedparam as tp


class Circulant(tp.Rule):
    """Circulant matrices: W[i, j] = w[(j − i) mod n]."""

    law = "W[i, j] = w[(j − i) mod n]"

    def check(self, layout):
        if len(layout.shape) != 2 or layout.shape[0] != layout.shape[1]:
            return f"a circulant matrix is square, not {layout.shape}. Tie a square Linear layer."
        return None

    def free_shapes(self):
        return ((self.bound_layout.shape[0],),)

    def forward(self, free):
        return torch.stack([free.roll(row) for row in range(len(free))])

    def symmetries(self, weight):
        yield weight.roll((1, 1), (0, 1))

    @classmethod
    def examples(cls):
        return (
            tp.Example(lambda: nn.Linear(7, 7)),
            tp.Example(lambda: nn.Linear(4, 4, bias=False)),
        )


class OddKernel(tp.Rule):
    """Odd kernels, a rule with signs: W[o, c, x] = −W[o, c, flip(x)]."""

    law = "W[o, c, x] = −W[o, c, flip(x)]"

    def check(self, layout):
        if prod(layout.kernel) % 2:
            return (
                f"the kernel {layout.kernel} has a centre, which would be zero. Use an even size."
            )
        return None

    def free_shapes(self):
        return ((*self.bound_layout.shape[:2], prod(self.bound_layout.kernel) // 2),)

    def forward(self, free):
        return torch.cat([-free.flip(-1), free], -1).reshape(self.bound_layout.shape)

    def symmetries(self, weight):
        yield -weight.flip(tuple(range(2, weight.dim())))

    @classmethod
    def examples(cls):
        return (
            tp.Example(lambda: nn.Conv1d(2, 3, 4)),
            tp.Example(lambda: nn.Conv2d(4, 2, (3, 2), groups=2)),
            tp.Example(lambda: nn.ConvTranspose2d(2, 2, 2)),
        )
