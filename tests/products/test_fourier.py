"""Products with circulant, Toeplitz and Hankel matrices by Fourier transforms: by scipy.linalg."""

from __future__ import annotations

import math
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests.support.counting import Counted, kept_for_gradients
from tiedparam.products import fourier, linear_rows
from tiedparam.products.fourier import Diagonal, diagonal_product, good_length

MATRICES: tuple[Diagonal, ...] = ("circulant", "toeplitz", "hankel")
# a good length, lengths that are embedded (odd, prime, twice a prime), and matrices not square
SIZES = [(16, 16), (15, 15), (13, 13), (34, 34), (1, 1), (6, 11), (11, 6), (1, 7), (7, 1), (3, 40)]
SMALL = [(16, 16), (13, 13), (6, 11), (7, 1)]
CASES = [(m, rows, n) for m in MATRICES for rows, n in SIZES if rows == n or m != "circulant"]


def count(matrix: Diagonal, outputs: int, inputs: int) -> int:
    return inputs if matrix == "circulant" else outputs + inputs - 1


def drawn(matrix: Diagonal, outputs: int, inputs: int, *shape: int) -> tuple[Tensor, ...]:
    """Inputs of ``(*shape, inputs)``, values and bias."""
    torch.manual_seed(outputs * 50 + inputs)
    sizes = ((*shape, inputs), (1, count(matrix, outputs, inputs)), (outputs,))
    return tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes)


def by_scipy(matrix: Diagonal, x: Tensor, values: Tensor, outputs: int) -> Tensor:
    """The product by scipy's own FFT, for rows of ``x``."""
    inputs = x.shape[-1]
    rows, w = x.detach().reshape(-1, inputs).double().numpy(), values.detach().double().numpy()[0]
    if matrix == "circulant":
        column, first = w, [w[-k] for k in range(inputs)]
    else:
        if matrix == "hankel":  # the inputs from the last to the first meet a Toeplitz matrix
            rows = rows[:, ::-1]
        column, first = w[inputs - 1 :], w[inputs - 1 :: -1]
    found = scipy.linalg.matmul_toeplitz((column, first), rows.T)
    return torch.from_numpy(found.T.copy()).reshape(*x.shape[:-1], outputs)


@pytest.fixture(params=["at once", "in blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are transformed all at once, or few at a time, with a rest."""
    if request.param == "in blocks":
        monkeypatch.setattr(fourier, "BLOCK_BYTES", 600)
        monkeypatch.setattr(linear_rows, "LITTLE", 1)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("matrix", "outputs", "inputs"), CASES)
def test_the_product_is_scipys(matrix, outputs, inputs):
    x, values, bias = drawn(matrix, outputs, inputs, 3, 5)
    expected = by_scipy(matrix, x, values, outputs)
    found = diagonal_product(x, values, None, matrix)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with_bias = diagonal_product(x, values, bias, matrix)
    torch.testing.assert_close(with_bias, expected + bias, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(diagonal_product(x, values, bias, matrix), with_bias)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    ("matrix", "outputs", "inputs"), [(m, o, i) for m, o, i in CASES if (o, i) in SMALL]
)
def test_first_and_second_derivatives(matrix, outputs, inputs):
    tensors = drawn(matrix, outputs, inputs, 2, 2)

    def product(*tensors: Tensor) -> Tensor:
        return diagonal_product(*tensors, matrix)

    assert gradcheck(product, tensors)
    assert gradgradcheck(product, tensors)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("matrix", MATRICES)
def test_outputs_are_no_views_so_that_they_can_be_written_to(matrix, rows):
    x, values, _ = drawn(matrix, 13, 13, rows)
    y = diagonal_product(x, values, None, matrix)
    assert y._base is None
    assert y.untyped_storage().nbytes() == y.numel() * y.element_size()
    y.relu_().sum().backward()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("matrix", MATRICES)
def test_any_leading_axes_and_strides(matrix):
    x, values, bias = (tensor.detach() for tensor in drawn(matrix, 16, 16, 4, 6))
    x = x.requires_grad_()
    inputs = {
        "one row": x[0, 0],
        "no rows": x[:0],
        "transposed": x.transpose(0, 1),
        "strided": torch.cat([x, x], -1)[..., ::2],
        "repeated": x[:1, :1].expand(3, 2, 16),
    }
    for name, given in inputs.items():
        found = diagonal_product(given, values, bias, matrix)
        expected = by_scipy(matrix, given, values, 16) + bias
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=name)
        assert found.is_contiguous(), name
        assert found._base is None, name  # so that it can be changed in place
        (gradient,) = torch.autograd.grad(found.sum(), given)
        assert gradient.shape == given.shape, name


@pytest.mark.parametrize("matrix", MATRICES)
def test_no_rows_give_gradients_of_zero(matrix):
    x, values, bias = drawn(matrix, 16, 16, 0)
    diagonal_product(x, values, bias, matrix).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 16)
    assert torch.equal(values.grad, torch.zeros_like(values))
    assert torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("size", [16, 251, 1000, 1024])
def test_the_error_is_within_the_documented_bound(matrix, size, dtype):
    torch.manual_seed(size)
    spike, ramp = torch.zeros(size), torch.linspace(-1, 1, size)
    spike[size // 3] = 1e6
    x = torch.stack([torch.randn(size), torch.ones(size), spike, ramp, 1e-6 * torch.randn(size)])
    w = torch.randn(1, count(matrix, size, size))
    for values in (w, torch.ones_like(w), w.exp()):
        found = diagonal_product(x.to(dtype), values.to(dtype), None, matrix)
        if dtype == torch.float32:
            exact = by_scipy_directly(matrix, x, values)
        else:
            exact = by_scipy_directly(matrix, x.numpy().astype("g"), values.numpy().astype("g"))
        norms = values.double().norm() * x.double().norm(dim=1, keepdim=True)
        length = good_length(2 * size)
        bound = 2 * math.log2(length) * torch.finfo(dtype).eps * norms
        assert bool(((found.double() - exact).abs() <= bound).all())


def by_scipy_directly(matrix: Diagonal, x: Any, values: Any) -> Tensor:
    """Multiplied entry by entry, in the precision of the arguments or in float64."""
    if isinstance(x, Tensor):
        x, values = x.double().numpy(), values.double().numpy()
    size, w = x.shape[1], values[0]
    dense = {
        "circulant": lambda: scipy.linalg.circulant(w),
        "toeplitz": lambda: scipy.linalg.toeplitz(w[size - 1 :], w[size - 1 :: -1]),
        "hankel": lambda: scipy.linalg.hankel(w[:size], w[size - 1 :]),
    }[matrix]()
    return torch.from_numpy((x @ dense.T).astype("d"))


# What it costs ------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", MATRICES)
def test_nothing_is_computed_that_nobody_needs(matrix):
    # a product transforms rows, values, and back; each gradient its own, and the output's once
    expected = {(0,): 3, (1,): 3, (2,): 0, (0, 1): 5}
    for needed, transforms in expected.items():
        tensors = [tensor.detach() for tensor in drawn(matrix, 16, 16, 4)]
        for number in needed:
            tensors[number].requires_grad_()
        output = diagonal_product(*tensors, matrix)
        with Counted() as counted:
            output.backward(torch.ones_like(output))
        assert counted.count("_fft_") == transforms, needed
        assert [tensor.grad is not None for tensor in tensors] == [n in needed for n in range(3)]


@pytest.mark.parametrize("matrix", MATRICES)
def test_nothing_but_the_input_and_the_values_is_kept(matrix):
    x, values, bias = drawn(matrix, 34, 34, 4)
    with kept_for_gradients() as kept:
        diagonal_product(x, values, bias, matrix)
    assert {tensor.data_ptr() for tensor in kept} <= {
        tensor.data_ptr() for tensor in (x, values, bias)
    }


@pytest.mark.parametrize("matrix", MATRICES)
def test_many_rows_take_no_more_room_than_few(matrix):
    x, values, bias = (tensor.detach() for tensor in drawn(matrix, 128, 128, 8192))
    values.requires_grad_()
    with Counted() as counted:
        diagonal_product(x.requires_grad_(), values, bias, matrix).sum().backward()
    assert counted.largest == x.numel() * 8  # the output, and the input's gradient
    assert x.numel() * 8 > 4 * fourier.BLOCK_BYTES


# Lengths ------------------------------------------------------------------------------------


def test_good_lengths():
    for least in [*range(1, 3000), 99_991]:
        length = good_length(least)
        assert length >= least
        assert length % 8 == 0
        rest = length
        for factor in (2, 3, 5, 7):
            while rest % factor == 0:
                rest //= factor
        assert rest == 1
        assert length <= 1.25 * max(8, scipy_length(least))
    assert good_length(2047) == 2048


def scipy_length(least: int) -> int:
    """The next multiple of 8 that scipy takes to be fast."""
    length = -(-least // 8) * 8
    while scipy.fft.next_fast_len(length, real=True) != length:
        length += 8
    return int(length)
