"""Laws as users write them, by which the contract and what is said of such laws are tested."""

from __future__ import annotations

from math import prod

import torch
from torch import nn

import tiedparam as tp
from tiedparam.laws import Linked, Orbits


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


class Mirrored(tp.Rule):
    """What a user would write."""

    law = "W[o, c] = W[o, n-1-c]"

    def check(self, layout):
        even = layout.shape[-1] % 2 == 0
        return None if even else "its last axis is odd. Choose a layer with 2n inputs."

    def free_shapes(self):
        *rest, last = self.bound_layout.shape
        return ((*rest, last // 2),)

    def forward(self, half):
        return torch.cat([half, half.flip(-1)], -1)

    def symmetries(self, weight):
        yield weight.flip(-1)

    @classmethod
    def examples(cls):
        return [tp.Example(lambda: nn.Linear(4, 3)), tp.Example(lambda: nn.Conv1d(2, 3, 2))]


class Skew(Orbits):
    """Signs, and zeros on the diagonal."""

    law = "W[i, j] = -W[j, i]"
    states_whole_group = True

    def symmetries(self, weight):
        yield -weight.t()

    @classmethod
    def examples(cls):
        return [tp.Example(lambda: nn.Linear(4, 4)), tp.Example(lambda: nn.Linear(3, 3))]


class Lower(Orbits):
    """Zeros alone."""

    law = "W[i, j] = 0 for j > i"

    def symmetries(self, weight):
        yield weight.tril()

    @classmethod
    def examples(cls):
        return [tp.Example(lambda: nn.Linear(4, 3))]


class Centred(Orbits):
    """Numbers that are given: the law is affine, and 0 does not obey it."""

    law = "W[o, c, k // 2] = 0.1"

    def cell(self):
        return (1, 1, *self.bound_layout.kernel)

    def symmetries(self, weight):
        given = weight.clone()
        given[..., weight.shape[-1] // 2] = 0.1
        yield given

    @classmethod
    def examples(cls):
        return [tp.Example(lambda: nn.ConvTranspose1d(4, 2, 3, groups=2))]


class SquaredTotal(Linked):
    """Reads two layers, and has no values of its own."""

    law = "W = A.W² + B.W²"

    def forward(self, a, b):
        return a.square() + b.square()

    @classmethod
    def examples(cls):
        def build():
            return nn.ModuleDict({name: nn.Linear(3, 3) for name in "abc"})

        return [tp.Example(build, {"source": ["a", "b"]}, path="c")]


class Mixed(Linked):
    """Reads two layers, and has two values of its own, found by least squares."""

    law = "W = s·A.W + t·B.W"

    def free_shapes(self):
        return ((2,),)

    def forward(self, a, b, mix):
        return mix[0] * a + mix[1] * b

    def fit(self, weight, a, b):
        columns = torch.stack([a.flatten(), b.flatten()], 1)
        wide = torch.complex128 if weight.is_complex() else torch.float64
        goal = weight.flatten()[:, None]
        solved = torch.linalg.lstsq(columns.to(wide), goal.to(wide)).solution
        return (solved[:, 0].to(weight.dtype),)

    @classmethod
    def examples(cls):
        return SquaredTotal.examples()


class OneProduct(tp.Rule):
    """Reads nothing, and multiplies its values by one another: the nearest matrix of rank 1."""

    law = "W[o, c] = u[o]·v[c]"
    bilinear = True

    def free_shapes(self):
        return tuple((size,) for size in self.bound_layout.shape)

    def forward(self, u, v):
        return u[:, None] * v

    def right_inverse(self, weight):
        self.bind_shape(weight)
        left, sizes, right = torch.linalg.svd(weight.double())
        factors = left[:, 0] * sizes[0], right[0]
        return tuple(factor.to(weight.dtype).clone() for factor in factors)

    def representatives(self, weight):
        return self.right_inverse(weight)

    def symmetries(self, weight):
        yield self.project(weight)

    @classmethod
    def examples(cls):
        return [tp.Example(lambda: nn.Linear(4, 3))]


class Shifted(Linked):
    """``W = A + w``: one row of its own for all."""

    law = "W[o, c] = A.W[o, c] + w[c]"

    def free_shapes(self):
        return ((self.bound_layout.shape[1],),)

    def forward(self, source, row):
        return source + row

    def fit(self, weight, source):
        return ((weight - source).mean(0),)
