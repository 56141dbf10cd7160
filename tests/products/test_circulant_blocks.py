"""Products with matrices of circulant blocks, frequency by frequency: by scipy.linalg."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests.support.counting import Counted, kept_for_gradients
from tiedparam.products import circulant_blocks, linear_rows
from tiedparam.products.circulant_blocks import block_circulant_product

# block, blocks of outputs and of inputs: without frequencies in between, odd, prime, not square
SIZES = [(1, 2, 3), (2, 2, 3), (3, 2, 1), (4, 1, 2), (5, 2, 2), (7, 1, 1), (8, 3, 2), (16, 2, 2)]


def drawn(block: int, outputs: int, inputs: int, *shape: int) -> tuple[Tensor, ...]:
    """Inputs of ``(*shape, inputs·block)``, values and bias."""
    torch.manual_seed(block * 50 + outputs * 10 + inputs)
    sizes = ((*shape, inputs * block), (outputs, inputs * block), (outputs * block,))
    return tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes)


def by_scipy(values: Tensor, block: int) -> Tensor:
    """The matrix, block by block, each from its first row."""
    rows = values.detach().double().numpy()
    blocks = [
        [scipy.linalg.circulant(row[at : at + block]).T for at in range(0, len(row), block)]
        for row in rows
    ]
    return torch.cat([torch.cat([torch.from_numpy(b.copy()) for b in line], 1) for line in blocks])


@pytest.fixture(params=["by products", "by torch.fft"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """How blocks are transformed, of whatever length; few rows at a time."""
    long = 1 if request.param == "by torch.fft" else 10**6
    monkeypatch.setattr(circulant_blocks, "LONG", long)
    monkeypatch.setattr(linear_rows, "LITTLE", 1000)
    circulant_blocks._transform.cache_clear()
    yield
    circulant_blocks._transform.cache_clear()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("block", "outputs", "inputs"), SIZES)
def test_the_product_is_that_with_scipys_matrix(block, outputs, inputs):
    x, values, bias = drawn(block, outputs, inputs, 5, 29)  # more rows than are taken at once
    weight = by_scipy(values, block)
    for shift in (None, bias):
        found = block_circulant_product(x, values, shift, block)
        expected = F.linear(x, weight, shift)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            assert torch.equal(block_circulant_product(x, values, shift, block), found)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("block", "outputs", "inputs"), SIZES)
def test_first_and_second_derivatives(block, outputs, inputs):
    tensors = drawn(block, outputs, inputs, 2, 2)

    def product(*tensors: Tensor) -> Tensor:
        return block_circulant_product(*tensors, block)

    assert gradcheck(product, tensors)
    assert gradgradcheck(product, tensors)


@pytest.mark.usefixtures("way")
def test_gradients_of_many_rows_are_summed():
    x, values, bias = drawn(5, 2, 3, 150)
    block_circulant_product(x, values, bias, 5).square().sum().backward()
    twin = [tensor.detach().clone().requires_grad_() for tensor in (x, by_scipy(values, 5), bias)]
    F.linear(*twin).square().sum().backward()
    torch.testing.assert_close(x.grad, twin[0].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bias.grad, twin[2].grad, rtol=1e-12, atol=1e-12)
    blocks = twin[1].grad.view(2, 5, 3, 5)
    folded = sum(blocks[:, r].roll(-r, 2) for r in range(5)).reshape(2, 15)
    torch.testing.assert_close(values.grad, folded, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("way")
def test_any_leading_axes_and_strides():
    x, values, bias = (tensor.detach() for tensor in drawn(4, 3, 2, 4, 6))
    weight, x = by_scipy(values, 4), x.requires_grad_()
    inputs = {
        "one row": x[0, 0],
        "no rows": x[:0],
        "transposed": x.transpose(0, 1),
        "strided": torch.cat([x, x], -1)[..., ::2],
        "repeated": x[:1, :1].expand(3, 2, 8),
    }
    for name, given in inputs.items():
        found = block_circulant_product(given, values, bias, 4)
        expected = F.linear(given, weight, bias)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=name)
        assert found.is_contiguous(), name
        assert found._base is None, name  # so that it can be changed in place
        (gradient,) = torch.autograd.grad(found.sum(), given)
        assert gradient.shape == given.shape, name


@pytest.mark.usefixtures("way")
def test_no_rows_give_gradients_of_zero():
    x, values, bias = drawn(4, 3, 2, 0)
    block_circulant_product(x, values, bias, 4).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 8)
    assert torch.equal(values.grad, torch.zeros_like(values))
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("block", [4, 16, 47, 48, 64, 251])
def test_the_error_is_within_the_documented_bound(block):
    torch.manual_seed(block)
    blocks = 4
    size = blocks * block
    spike, ramp = torch.zeros(size), torch.linspace(-1, 1, size)
    spike[size // 3] = 1e6
    x = torch.stack([torch.randn(size), torch.ones(size), spike, ramp, 1e-6 * torch.randn(size)])
    w = torch.randn(blocks, size)
    for values in (w, torch.ones_like(w), w.exp()):
        found = block_circulant_product(x, values, None, block).double()
        exact = F.linear(x.double(), by_scipy(values, block))
        largest = [
            tensor.double().view(-1, blocks, block).norm(dim=2).amax(1) for tensor in (values, x)
        ]
        norms = largest[0].repeat_interleave(block) * largest[1][:, None]
        bound = 2 * math.log2(4 * block) * math.sqrt(blocks) * torch.finfo(x.dtype).eps * norms
        assert bool(((found - exact).abs() <= bound).all())


# What it costs ------------------------------------------------------------------------------


def test_nothing_is_computed_that_nobody_needs():
    # a product transforms rows, values, and back; each gradient its own, and the output's once
    expected = {(0,): 3, (1,): 3, (2,): 0, (0, 1): 5}
    for needed, transforms in expected.items():
        tensors = [tensor.detach() for tensor in drawn(64, 1, 2, 4)]
        for number in needed:
            tensors[number].requires_grad_()
        output = block_circulant_product(*tensors, 64)
        with Counted() as counted:
            output.backward(torch.ones_like(output))
        assert counted.count("_fft_") == transforms, needed
        assert [tensor.grad is not None for tensor in tensors] == [n in needed for n in range(3)]


@pytest.mark.parametrize("block", [4, 64])
def test_nothing_but_the_input_and_the_values_is_kept(block):
    x, values, bias = drawn(block, 2, 3, 4)
    with kept_for_gradients() as kept:
        block_circulant_product(x, values, bias, block)
    assert {tensor.data_ptr() for tensor in kept} <= {
        tensor.data_ptr() for tensor in (x, values, bias)
    }


@pytest.mark.parametrize("block", [8, 64])
def test_many_rows_take_no_more_room_than_few(block):
    x, values, bias = (tensor.detach() for tensor in drawn(block, 256 // block, 256 // block, 8192))
    values.requires_grad_()
    with Counted() as counted:
        block_circulant_product(x.requires_grad_(), values, bias, block).sum().backward()
    assert counted.largest == x.numel() * 8  # the output, and the input's gradient


def test_tables_that_were_made_in_inference_mode_serve_training():
    circulant_blocks._tables.cache_clear()
    x, values, bias = drawn(4, 2, 2, 3)
    with torch.inference_mode():
        block_circulant_product(x, values, bias, 4)
    gradcheck(lambda *tensors: block_circulant_product(*tensors, 4), (x, values, bias))
    assert gradgradcheck(lambda *tensors: block_circulant_product(*tensors, 4), (x, values, bias))
