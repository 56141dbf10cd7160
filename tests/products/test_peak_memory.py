"""No form that a layer takes by itself needs more memory for a step than the dense layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support import computing_of
from tests.support.counting import most_allocated
from tiedparam.products import linear_rows, one_filter, quarter_turns, windows

LITTLE = 16 * 1024
"""Bytes of buffers for which the size of the weight does not matter, in these tests."""


def linear(outputs, inputs):
    return lambda: nn.Linear(inputs, outputs)


def pointwise(outputs, inputs):
    return lambda: nn.Conv2d(inputs, outputs, 1)


def streams(axes, filters, kernel):
    kind = nn.Conv1d if axes == 1 else nn.Conv2d
    return lambda: kind(16, 16 * filters, kernel, padding=kernel // 2, groups=16)


# form, layer, law, options, shape of the input
CASES = [
    ("blocks", linear(192, 192), "masked", {"pattern": "block_diagonal", "blocks": 4}, (768,)),
    ("items", linear(192, 192), "set_equivariant", {"items": 4}, (768,)),
    ("items", linear(192, 192), "set_equivariant", {"items": 32}, (768,)),
    ("components", linear(192, 192), "hypercomplex", {"algebra": "quaternion"}, (768,)),
    ("components", linear(192, 192), "hypercomplex", {}, (768,)),
    ("three", linear(192, 128), "hypercomplex", {}, (768,)),
    ("halves", linear(192, 128), "centrosymmetric", {}, (768,)),
    ("turned", linear(128, 192), "centrosymmetric", {}, (768,)),
    ("fft", linear(256, 256), "circulant", {}, (768,)),
    ("fft", linear(128, 256), "toeplitz", {}, (768,)),
    ("fft", linear(256, 128), "hankel", {}, (768,)),
    ("fft", linear(256, 192), "block_circulant", {"block": 8}, (768,)),
    ("fft", linear(256, 192), "block_circulant", {"block": 64}, (768,)),
    ("panels", linear(640, 640), "flip_sym", {}, (256,)),
    ("panels", linear(640, 640), "symmetric", {}, (256,)),
    ("panels", linear(640, 640), "skew", {}, (256,)),
    ("panels", pointwise(640, 640), "flip_sym", {}, (16, 4, 4)),
    ("reduced", linear(192, 192), "head_share", {"heads": 2, "groups": 1}, (768,)),
    ("reduced", linear(192, 192), "repeat", {"inputs": 2}, (768,)),
    ("reduced", linear(192, 192), "repeat", {"inputs": 2, "outputs": 2}, (768,)),
    ("reduced", linear(192, 192), "row_repeat", {}, (768,)),
    ("reduced", linear(192, 192), "channel_shared", {}, (768,)),
    ("fourier", pointwise(64, 64), "group_conv", {}, (64, 4, 4)),
    ("windows", streams(1, 4, 7), "channel_shared", {"over": "groups"}, (8, 512)),
    ("windows", streams(2, 4, 3), "channel_shared", {"over": "groups"}, (8, 24, 24)),
    ("windows", streams(2, 4, 7), "channel_shared", {"over": "groups"}, (4, 8, 8)),
    ("windows", streams(1, 1, 25), "channel_shared", {"over": "groups"}, (8, 512)),
]
IDS = [f"{form}-{rule}-{n}" for n, (form, _, rule, *_) in enumerate(CASES)]


def over_dense(form, build, rule, options, sizes):
    """Bytes that a training step needs at its peak beyond what the dense layer needs."""
    torch.manual_seed(0)
    dense = build()
    tied = tp.register_tie(copy.deepcopy(dense), rule, compute=form, init="rescale", **options)
    features = dense.weight.shape[1] if isinstance(dense, nn.Linear) else dense.in_channels
    shape = (*sizes, features) if isinstance(dense, nn.Linear) else (sizes[0], features, *sizes[1:])
    x = torch.randn(shape, requires_grad=True)
    cotangent = torch.randn_like(dense(x))
    computing = computing_of(tied)
    computing.seen = []

    def step(layer):
        torch.autograd.grad(layer(x), (x, *layer.parameters()), cotangent)

    step(tied)  # makes tables
    assert computing.seen == [form]
    return most_allocated(lambda: step(tied)) - most_allocated(lambda: step(dense))


@pytest.mark.parametrize(("form", "build", "rule", "options", "sizes"), CASES, ids=IDS)
def test_a_training_step_needs_no_more_than_the_dense_one(
    form, build, rule, options, sizes, monkeypatch
):
    monkeypatch.setattr(linear_rows, "LITTLE", LITTLE // 4)
    for module, name in (
        (windows, "BLOCK_BYTES"),
        (quarter_turns, "BLOCK_BYTES"),
        (one_filter, "_PADDED_BYTES"),
        (one_filter, "_BAND_BYTES"),
    ):
        monkeypatch.setattr(module, name, LITTLE)
    assert over_dense(form, build, rule, options, sizes) <= 2 * LITTLE


def test_every_form_is_measured():
    measured = {(rule, form) for form, _, rule, *_ in CASES}
    offered = {
        (name, method.__form__.name)
        for name, kind in tp.available_rules().items()
        for base in kind.__mro__
        for method in vars(base).values()
        if hasattr(method, "__form__")
    }
    # what repeats a base and has channels computes as channel_shared and repeat do
    alike = {(name, "windows") for name in ("head_share", "repeat", "row_repeat")}
    # a few stock convolutions of the law's own size, whose outputs are spread as a whole
    spread = {("group_conv", "reduced")}
    # an expansion of its own, for which a base's form does not serve
    others = {("persymmetric", "panels")}
    # two products of small rank, or a scaled one, beside that with the source's weight, instead of
    # a weight
    beside = {("scaled_copy", "scaled"), ("shared_delta", "delta")}
    assert offered - measured == alike | spread | others | beside
