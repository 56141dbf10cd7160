"""Convolutions by windows, in layers whose groups or channels share their filters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tiedparam as tp
from tests.support.twins import CONVOLUTIONS, assert_equal_to_dense, twins
from tiedparam.products import reduced, windows


def small_convolution(draw, axes, inputs, outputs, groups=1):
    sizes = st.integers(1, 3)
    return CONVOLUTIONS[axes, False](
        inputs, outputs, draw(st.tuples(*[sizes] * axes)), groups=groups,
        stride=draw(st.tuples(*[st.integers(1, 2)] * axes)),
        dilation=draw(st.tuples(*[st.integers(1, 2)] * axes)),
        padding=draw(st.integers(0, 1)),
        padding_mode=draw(st.sampled_from(["zeros", "circular", "reflect"])),
        bias=draw(st.booleans()),
    )  # fmt: skip


@st.composite
def streams(draw):
    axes = draw(st.integers(1, 3))
    groups = draw(st.integers(2, 5))
    filters = draw(st.integers(1, 3))
    layer = small_convolution(draw, axes, groups, groups * filters, groups)
    shape = (groups, *(draw(st.integers(6, 8)) for _ in range(axes)))
    batch = draw(st.sampled_from([None, 0, 1, 5]))
    return layer, torch.randn(shape if batch is None else (batch, *shape))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=streams(), block=st.sampled_from([1, 700, 3000, 1 << 20]), few=st.integers(0, 8))
def test_streams_by_windows_equal_the_dense_layer(case, block, few):
    layer, x = case
    layer, dense = twins(layer, "channel_shared", over="groups", compute="windows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "BLOCK_BYTES", block)
        patch.setattr(windows, "FEW_FILTERS", few)
        if x.dim() > layer.weight.dim() - 1 and x.numel():
            assert_computed_by_windows(layer, x)
        assert_equal_to_dense(layer, dense, x)


def assert_computed_by_windows(layer, x):
    with pytest.MonkeyPatch.context() as patch:
        for product in ("convolve", "one_filter"):
            patch.setattr(reduced, product, lambda *a: torch.zeros(0))
        assert layer(x).shape == (0,)


@st.composite
def summed(draw):
    axes = draw(st.integers(1, 3))
    inputs, outputs = draw(st.integers(2, 5)), draw(st.integers(1, 5))
    layer = small_convolution(draw, axes, inputs, outputs)
    shape = (inputs, *(draw(st.integers(6, 8)) for _ in range(axes)))
    return layer, torch.randn(draw(st.sampled_from([1, 5])), *shape)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=summed(), block=st.sampled_from([1, 700, 1 << 20]), long=st.sampled_from([1, 512]))
def test_summed_convolutions_by_windows_equal_the_dense_layer(case, block, long):
    layer, x = case
    layer, dense = twins(layer, "channel_shared", over="in", compute="windows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "BLOCK_BYTES", block)
        patch.setattr(windows, "_LONG", long)
        assert_computed_by_windows(layer, x)
        assert_equal_to_dense(layer, dense, x)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_windows_with_named_padding(padding):
    layer, dense = twins(
        nn.Conv1d(4, 8, 4, groups=4, padding=padding), "channel_shared", over="groups",
        compute="windows",
    )  # fmt: skip
    x = torch.randn(2, 4, 9)
    assert_computed_by_windows(layer, x)
    assert_equal_to_dense(layer, dense, x)


@pytest.mark.parametrize("over", ["in", "groups"])
def test_windows_in_one_dtype_and_layout_only(over):
    layer = nn.Conv2d(8, 16, 3, groups=8 if over == "groups" else 1, padding=1)
    layer, dense = twins(layer, "channel_shared", over=over, compute="windows")
    x = torch.randn(2, 8, 6, 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduced, "convolve", lambda *a: 1 / 0)
        last = x.to(memory_format=torch.channels_last)
        assert layer(last).stride() == dense(last).stride()
        layer(x[0])  # unbatched
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        layer.bfloat16()(x.bfloat16())
        layer.float()
        with torch.autograd.forward_ad.dual_level():
            layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        torch.func.vmap(layer)(x[None])
        torch.export.export(layer, (x,))
        with pytest.raises(ZeroDivisionError):
            layer(x)


@pytest.mark.parametrize("frozen", ["bias", "free", "input"])
@pytest.mark.parametrize("over", ["in", "groups"])
def test_windows_give_the_gradients_that_are_wanted(over, frozen):
    layer = nn.Conv1d(4, 8, 3, groups=4 if over == "groups" else 1).double()
    layer, dense = twins(layer, "channel_shared", over=over, compute="windows")
    x = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=frozen != "input")
    leaves = {"free": layer.parametrizations.weight.original0, "bias": layer.bias, "input": x}
    leaves.pop(frozen).requires_grad_(False)
    probe = torch.randn(3, 8, 5, dtype=torch.float64)
    found = torch.autograd.grad((layer(x) * probe).sum(), list(leaves.values()))
    dense.requires_grad_(True)
    wanted = {"free": dense.weight, "bias": dense.bias, "input": x}
    wanted = torch.autograd.grad((dense(x) * probe).sum(), [wanted[name] for name in leaves])
    for name, mine, theirs in zip(leaves, found, wanted, strict=True):
        expected = tp.get_tie(layer).adjoint(theirs)[0] if name == "free" else theirs
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("over", ["in", "groups"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_second_derivatives_through_windows(over, bias, axes):
    groups = 3 if over == "groups" else 1
    kind = CONVOLUTIONS[axes, False]
    layer = kind(3, 6, 2, groups=groups, padding=1, bias=bias).double()
    tp.register_tie(layer, "channel_shared", over=over, compute="windows")
    names = [name for name, _ in layer.named_parameters()]

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    x = torch.randn(2, 3, *(3,) * axes, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert_computed_by_windows(layer, x)
    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *values), fast_mode=True)


def test_windows_are_used_where_they_pay():
    layer = tp.register_tie(nn.Conv2d(8, 16, 3), "channel_shared")
    x = torch.randn(2, 8, 34, 34)
    assert_computed_by_windows(layer, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reduced, "convolve", lambda *a: 1 / 0)
        layer(x[:1])
        with torch.no_grad():
            layer(x)
        layer.requires_grad_(False)
        layer(x)
        with pytest.raises(ZeroDivisionError):
            layer(x.requires_grad_())


def windows_pay(n, groups, m, outputs, kernel=3, grad=True):
    return windows.pays(n, groups, m, kernel ** len(outputs), outputs, grad=grad)


def test_where_windows_of_summed_channels_pay_at_its_edges():
    # in training where outputs are some, for one sample only with large kernels on images
    assert windows_pay(2, 1, 2, (64, 64))
    assert not windows_pay(2, 1, 2, (64, 63))
    assert windows_pay(1, 1, 64, (16, 16), kernel=7)
    assert not windows_pay(1, 1, 64, (16, 16), kernel=3)
    assert not windows_pay(1, 1, 64, (8, 16), kernel=7)
    assert not windows_pay(1, 1, 64, (8, 8, 8), kernel=5)
    assert windows_pay(2, 1, 64, (2048,))
    assert not windows_pay(2, 1, 64, (2047,))
    assert not windows_pay(2, 1, 1, (128, 128))
    # in inference for long signals, and for 1×1 kernels where oneDNN would compute
    assert windows_pay(2, 1, 64, (8192,), grad=False)
    assert not windows_pay(2, 1, 64, (8191,), grad=False)
    assert not windows_pay(2, 1, 64, (8192,), kernel=11, grad=False)
    assert not windows_pay(2, 1, 64, (128, 64), grad=False)
    assert not windows_pay(1, 1, 64, (16384,), grad=False)
    assert windows_pay(16, 1, 4, (16, 16), kernel=1, grad=False)
    assert not windows_pay(16, 1, 4, (16, 15), kernel=1, grad=False)
    assert not windows_pay(15, 1, 64, (16, 16), kernel=1)


def test_where_windows_of_streams_pay_at_its_edges():
    assert windows_pay(1, 16, 4, (1024,))
    assert not windows_pay(1, 16, 4, (1023,))
    assert not windows_pay(64, 256, 1, (1024,))
    assert windows_pay(1, 64, 8, (1024,), grad=False)
    assert not windows_pay(1, 64, 9, (1024,), grad=False)
    assert windows_pay(1, 64, 9, (1024,))
    assert not windows_pay(1, 16, 4, (2047,), grad=False)
    # to begin with a group takes as long as to compute some outputs
    assert windows_pay(1, 64, 2, (8, 16), grad=False)
    assert not windows_pay(1, 64, 2, (8, 15), grad=False)
    assert windows_pay(1, 8, 4, (64, 36), grad=False)
    assert not windows_pay(1, 8, 4, (64, 35), grad=False)
    # oneDNN is fast at few groups of eight filters
    assert not windows_pay(9, 7, 8, (64, 64), grad=False)
    assert windows_pay(9, 7, 8, (64, 64))
    assert windows_pay(9, 7, 9, (64, 64), grad=False)
    assert windows_pay(9, 8, 8, (64, 64), grad=False)
    # trained: large images, or many filters
    assert windows_pay(1, 64, 2, (16, 32))
    assert not windows_pay(1, 64, 2, (16, 31))
    assert windows_pay(32, 16, 8, (16, 8))
    assert not windows_pay(31, 16, 8, (16, 8))
    assert not windows_pay(64, 16, 7, (16, 8))
    # volumes: many filters, without gradients
    assert windows_pay(2, 16, 8, (8, 8, 8), grad=False)
    assert not windows_pay(1, 16, 8, (8, 8, 8), grad=False)
    assert not windows_pay(3, 16, 7, (8, 8, 8), grad=False)
    assert not windows_pay(3, 16, 8, (8, 8, 7), grad=False)
    assert not windows_pay(32, 64, 8, (8, 8, 8))


@pytest.mark.parametrize("over", ["in", "out", "all", "groups"])
def test_inputs_smaller_than_the_kernel_raise(over):
    for length in (1, 3, 4):
        layer = nn.Conv1d(8, 32, 5, groups=8 if over == "groups" else 1)
        layer, dense = twins(layer, "channel_shared", over=over)
        x = torch.randn(2, 8, length)
        with torch.no_grad():
            with pytest.raises(RuntimeError):
                dense(x)
            with pytest.raises(RuntimeError):
                layer(x)
    layer = tp.register_tie(nn.Conv2d(64, 64, 3), "channel_shared")
    with pytest.raises(RuntimeError):
        layer(torch.randn(1, 64, 2, 2))
