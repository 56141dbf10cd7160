"""A tied layer beside the dense one that holds its expanded weight."""

from __future__ import annotations

import copy

import torch
from torch import nn

import tiedparam as tp

BOUNDS = {torch.float64: 1e-11, torch.float32: 2e-4}
CONVOLUTIONS = {
    (1, False): nn.Conv1d, (2, False): nn.Conv2d, (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d,
}  # fmt: skip


def twins(layer: nn.Module, rule: str, **options):
    """The tied layer, and the dense stock layer that holds its expanded weight."""
    dense = copy.deepcopy(layer)
    tp.register_tie(layer, rule, **options)
    dense.load_state_dict(tp.dense_state_dict(layer))
    return layer, dense


def dense_gradients(layer, dense):
    """The dense layer's gradients, folded to the tied layer's parameters."""
    (free,) = tp.get_tie(layer).adjoint(dense.weight.grad)
    return {"parametrizations.weight.original0": free, "bias": getattr(dense.bias, "grad", None)}


def assert_equal_to_dense(layer, dense, x, *call):
    bound = BOUNDS[x.dtype]
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(a, *call), dense(b, *call)
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    assert y.stride() == expected.stride() or y.numel() == 0
    torch.testing.assert_close(y, expected, rtol=bound, atol=bound)
    probe = torch.randn_like(expected)
    (y * probe).sum().backward()
    (expected * probe).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=bound, atol=bound)
    wanted = dense_gradients(layer, dense)
    for name, parameter in layer.named_parameters():
        scale = bound * max(1.0, float(wanted[name].abs().max()) if wanted[name].numel() else 1)
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=bound, atol=scale)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, *call), expected, rtol=bound, atol=bound)
