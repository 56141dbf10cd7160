"""Gradients that come in batches, as ``torch.autograd.functional`` asks for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian

import tiedparam as tp

LAYERS = {  # laws that expand by one node of the graph, and opaque products
    "hankel": (lambda: nn.Linear(96, 96), {"compute": "dense"}),
    "circulant": (lambda: nn.Linear(16, 16), {"compute": "fft"}),
    "block_circulant": (lambda: nn.Linear(8, 8), {"block": 4, "compute": "fft"}),
    "symmetric": (lambda: nn.Linear(400, 400), {"compute": "panels"}),
    "channel_shared": (lambda: nn.Conv2d(2, 2, 3), {"compute": "windows"}),
    "group_conv": (lambda: nn.Conv2d(4, 4, 1), {"compute": "fourier"}),
}


@pytest.mark.parametrize("law", LAYERS)
def test_batched_gradients_are_those_of_one_after_the_other(law):
    build, options = LAYERS[law]
    torch.manual_seed(0)
    layer = build().double()
    tp.register_tie(layer, law, init="rescale", **options)
    shape = (2, 5, 5) if isinstance(layer, nn.Conv2d) else ()
    x = torch.randn(2, layer.weight.shape[1] if not shape else layer.in_channels, *shape[1:])
    leaves = [x.double().requires_grad_(), *layer.parameters()]
    y = layer(leaves[0])
    given = torch.randn(3, *y.shape, dtype=torch.float64)
    results = []
    for batched in (True, False):
        if batched:
            first = torch.autograd.grad(y, leaves, given, is_grads_batched=True, create_graph=True)
        else:
            each = [torch.autograd.grad(y, leaves, g, create_graph=True) for g in given]
            first = tuple(map(torch.stack, zip(*each, strict=True)))
        total = sum(gradient.square().sum() for gradient in first)
        second = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
        results.append([g for g in (*first, *second) if g is not None])
    assert len(results[0]) == len(results[1])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_vectorized_hessian():
    layer = nn.Linear(8, 8).double()
    tp.register_tie(layer, "circulant", init="rescale", compute="fft")
    x = torch.randn(8, dtype=torch.float64)

    def loss(x):
        return layer(x).sin().sum()

    torch.testing.assert_close(hessian(loss, x, vectorize=True), hessian(loss, x))
