"""A law whose free values are two tensors, for tests of what holds for several."""

from __future__ import annotations

import torch

import tiedparam as tp


class TwoHalves(tp.Rule):
    """The rows of either half are equal: ``W[o] = a[0]`` in the first, ``b[0]`` in the second."""

    law = "W[o] = a for o < O/2, b for the others"

    def check(self, layout):
        return None if layout.shape[0] % 2 == 0 else "the rows cannot be halved. Add one."

    def free_shapes(self):
        shape = (1, *self.bound_layout.shape[1:])
        return (shape, shape)

    def forward(self, *free):
        rows = self.bound_layout.shape[0] // 2
        return torch.cat([half.expand(rows, *half.shape[1:]) for half in free])

    def symmetries(self, weight):
        yield torch.cat([half.roll(1, 0) for half in weight.chunk(2)])
