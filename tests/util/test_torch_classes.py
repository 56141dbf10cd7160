"""What torch's classes of layers are; seen in 2.13.0."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from tiedparam.util.torch_private import (
    AnyConvolution,
    is_quantized,
    is_read_by_attention,
    set_state_version,
)


def test_all_convolutions_have_one_base_that_says_whether_it_is_transposed():
    for axes in (1, 2, 3):
        for name, transposed in ((f"Conv{axes}d", False), (f"ConvTranspose{axes}d", True)):
            layer = getattr(nn, name)(2, 2, 1)
            assert isinstance(layer, AnyConvolution)
            assert layer.transposed is transposed
    assert not isinstance(nn.Linear(2, 2), AnyConvolution)


def test_attention_does_not_call_its_last_layer():
    attention = nn.MultiheadAttention(4, 2)
    assert is_read_by_attention(type(attention.out_proj))
    assert not is_read_by_attention(nn.Linear)
    attention.out_proj.register_forward_hook(lambda *_: calls.append(1))
    calls = []
    x = torch.ones(3, 4)
    attention(x, x, x)
    assert not calls


def test_a_quantized_layer_has_a_weight_that_is_no_parameter():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        layer = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)))[0]
    assert is_quantized(layer)
    assert not list(layer.parameters())
    assert not is_quantized(nn.Linear(2, 2))


def test_a_state_dict_notes_the_version_that_was_set():
    layer = nn.BatchNorm1d(2)
    set_state_version(layer, 1)
    assert layer.state_dict()._metadata[""]["version"] == 1
    assert nn.BatchNorm1d(2).state_dict()._metadata[""]["version"] == 2
