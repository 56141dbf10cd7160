"""Convolutions of every channel with one filter, judged by torch's own with the filter repeated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tiedparam.products import one_filter as module
from tiedparam.products.one_filter import gains, one_filter

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def stock(x, filter, bias, padding, dilation):
    channels = x.shape[1]
    weight = filter.expand(channels, 1, *filter.shape)
    convolve = CONVOLUTIONS[filter.dim() - 1]
    return convolve(x, weight, bias, 1, padding, dilation, channels)


@st.composite
def cases(draw):
    axes = draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 7 if axes < 3 else 4)) for _ in range(axes)]
    dilation = [draw(st.integers(1, 3)) for _ in range(axes)]
    padding = [draw(st.integers(0, 9 if axes < 3 else 3)) for _ in range(axes)]
    sizes = [
        max(d * (k - 1) + 1 - 2 * p, 1) + draw(st.integers(0, 18))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    n, channels = draw(st.integers(0, 3)), draw(st.integers(1, 5))
    x = torch.randn(n, channels, *sizes, dtype=torch.float64)
    if draw(st.booleans()):  # not contiguous
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    bias = torch.randn(channels, dtype=torch.float64) if draw(st.booleans()) else None
    return x, torch.randn(kernel, dtype=torch.float64), bias, padding, dilation


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases(), block=st.sampled_from([1, 3000, 1 << 20]), most=st.sampled_from([0, 4, 6]))
def test_output_and_gradients_are_torchs(case, block, most):
    x, filter, bias, padding, dilation = case
    leaves = [t.requires_grad_() for t in (x, filter, bias) if t is not None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PADDED_BYTES", block)
        patch.setattr(module, "_BAND_BYTES", block)
        patch.setattr(module, "MOST_PADDING", most)
        patch.setattr(module, "FEW_TAPS", 1)
        y = one_filter(x, filter, bias, padding, dilation)
        expected = stock(x, filter, bias, padding, dilation)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        assert y.is_contiguous()
        assert not y._is_view()
        probe = torch.randn_like(y)
        found = torch.autograd.grad(y, leaves, probe)
    wanted = torch.autograd.grad(expected, leaves, probe)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kernel", [(25,), (5, 4), (2, 2, 2)])
def test_second_derivatives(kernel):
    x = torch.randn(2, 2, *(4,) * len(kernel), dtype=torch.float64, requires_grad=True)
    filter = torch.randn(kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    padding = [k // 2 for k in kernel]

    def product(x, filter, bias):
        return one_filter(x, filter, bias, padding, [1] * len(kernel))

    assert torch.autograd.gradcheck(product, (x, filter, bias))
    assert torch.autograd.gradgradcheck(product, (x, filter, bias))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_the_gradients_that_are_wanted(frozen, monkeypatch):
    leaves = [torch.randn(2, 3, 40), torch.randn(25), torch.randn(3)]
    for number, leaf in enumerate(leaves):
        leaf.requires_grad_(number != frozen)
    y = one_filter(*leaves, [12], [1])
    if frozen == 0:
        monkeypatch.setattr(module, "_filtered", None)
    if frozen == 1:
        monkeypatch.setattr(module, "_taps", None)
    y.sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [n == frozen for n in range(3)]


def test_float32_errs_no_more_than_torch():
    x, filter = torch.randn(8, 16, 500), torch.randn(25)
    x.requires_grad_()
    filter.requires_grad_()
    probe = torch.randn(8, 16, 500)

    def gradients(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, filter)]
        y = function(*leaves, None, [12], [1])
        return [y, *torch.autograd.grad(y, leaves, probe.to(dtype))]

    exact = gradients(stock, torch.float64)
    errors = [
        [float((a.double() - b).norm() / b.norm()) for a, b in zip(given, exact, strict=True)]
        for given in (gradients(one_filter, torch.float32), gradients(stock, torch.float32))
    ]
    for mine, torchs in zip(*errors, strict=True):
        assert mine < max(2 * torchs, 1e-6)


def test_where_it_gains_at_its_edges(monkeypatch):
    monkeypatch.setattr(module, "MOST_PADDING", 6)
    many = 1 << 20
    # in inference: for padding that torch's fast kernel does not take
    assert gains((15,), (7,), many, training=False)
    assert not gains((13,), (6,), many, training=False)
    assert not gains((15, 15), (7, 0), many, training=False)
    assert not gains((1,), (7,), many, training=False)
    assert not gains((15,), (7,), 1 << 10, training=False)
    # in training: for more than three taps along an axis, or three axes
    assert gains((4,), (2,), many, training=True)
    assert gains((3, 5), (1, 2), many, training=True)
    assert gains((3, 3, 3), (1, 1, 1), many, training=True)
    assert not gains((3, 3), (1, 1), many, training=True)
    assert not gains((4,), (2,), (1 << 17) - 1, training=True)
