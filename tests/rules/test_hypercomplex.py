"""hypercomplex: torch's complex products, Hamilton's rules, what the layers commute with."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiedparam as tp
from tests.support.cases import assert_refused, layer_id
from tests.support.tensors import free_value, stored

COMPONENTS = {"complex": 2, "quaternion": 4}
EVERY_ALGEBRA = pytest.mark.parametrize("algebra", COMPONENTS)


# complex, against torch ------------------------------------------------------------------------


def as_complex(parts: Tensor, axis: int) -> Tensor:
    return torch.complex(*parts.chunk(2, axis))


def random_complex(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.complex128)


def test_a_linear_layer_is_torchs_complex_product():
    layer = nn.Linear(10, 6).double()
    tp.register_tie(layer, "hypercomplex")
    weight, bias = as_complex(free_value(layer), 0), as_complex(layer.bias, 0)
    z = random_complex(7, 5)
    answer = as_complex(layer(torch.cat([z.real, z.imag], 1)), 1)
    torch.testing.assert_close(answer, z @ weight.T + bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_convolution_is_torchs_complex_one(dims):
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](6, 4, 3, bias=False).double()
    tp.register_tie(layer, "hypercomplex")
    weight = as_complex(free_value(layer), 0)
    assert weight.shape == (2, 3, *layer.kernel_size)
    z = random_complex(2, 3, *[6] * dims)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    answer = as_complex(layer(torch.cat([z.real, z.imag], 1)), 1)
    torch.testing.assert_close(answer, convolve(z, weight), rtol=1e-12, atol=1e-12)


def test_a_transposed_convolution_is_torchs_complex_one():
    layer = nn.ConvTranspose2d(6, 4, 3, bias=False).double()
    tp.register_tie(layer, "hypercomplex")
    weight = as_complex(free_value(layer), 0).transpose(0, 1)  # stored as (in, out)
    z = random_complex(2, 3, 5, 5)
    answer = as_complex(layer(torch.cat([z.real, z.imag], 1)), 1)
    torch.testing.assert_close(answer, F.conv_transpose2d(z, weight), rtol=1e-12, atol=1e-12)


def test_groups_have_components_of_their_own():
    layer = nn.Conv1d(8, 12, 3, groups=2, bias=False).double()
    tp.register_tie(layer, "hypercomplex")
    x = torch.randn(2, 8, 9, dtype=torch.float64)
    answer = layer(x)
    for group, (inputs, outputs, free) in enumerate(
        zip(x.chunk(2, 1), answer.chunk(2, 1), free_value(layer).chunk(2), strict=True)
    ):
        expected = F.conv1d(as_complex(inputs, 1), as_complex(free, 0))
        torch.testing.assert_close(as_complex(outputs, 1), expected, msg=f"group {group}")


# quaternions, by Hamilton's rules --------------------------------------------------------------


def hamilton(p: Tensor, q: Tensor) -> Tensor:
    """``p·q`` of numbers in the last axis: i² = j² = k² = ijk = −1."""
    a, b, c, d = p.unbind(-1)
    e, f, g, h = q.unbind(-1)
    return torch.stack(
        [
            a * e - b * f - c * g - d * h,
            a * f + b * e + c * h - d * g,
            a * g - b * h + c * e + d * f,
            a * h + b * g - c * f + d * e,
        ],
        -1,
    )


def test_the_product_by_hand_is_hamiltons():
    one, i, j, k = torch.eye(4)
    assert torch.equal(hamilton(i, j), k)
    assert torch.equal(hamilton(j, k), i)
    assert torch.equal(hamilton(k, i), j)
    for unit in (i, j, k):
        assert torch.equal(hamilton(unit, unit), -one)
    assert torch.equal(hamilton(hamilton(i, j), k), -one)


def test_a_linear_layer_is_the_sum_of_hamilton_products():
    layer = nn.Linear(12, 8, bias=False).double()
    tp.register_tie(layer, "hypercomplex", algebra="quaternion")
    weight = free_value(layer).reshape(4, 2, 3).permute(1, 2, 0)
    x = torch.randn(12, dtype=torch.float64)
    numbers = x.reshape(4, 3).T
    expected = hamilton(weight, numbers.expand(2, 3, 4)).sum(1)
    torch.testing.assert_close(layer(x).reshape(4, 2).T, expected, rtol=1e-12, atol=1e-12)


# What the layers commute with ------------------------------------------------------------------

LAYERS = [
    lambda: nn.Linear(8, 12),
    lambda: nn.Conv1d(4, 8, 3),
    lambda: nn.Conv2d(8, 4, (2, 3)),
    lambda: nn.Conv2d(8, 16, 3, groups=2),
    lambda: nn.ConvTranspose1d(8, 4, 3),
    lambda: nn.ConvTranspose2d(16, 8, 2, groups=2),
]


def times_from_the_right(x: Tensor, unit: Tensor, groups: int) -> Tensor:
    """Every number of the channels times a number; components are blocks of each group."""
    n = len(unit)
    numbers = x.unflatten(1, (groups, n, -1)).movedim(2, -1)
    if n == 2:
        factor = torch.view_as_complex(unit)
        product = torch.view_as_real(torch.view_as_complex(numbers.contiguous()) * factor)
    else:
        product = hamilton(numbers, unit.expand_as(numbers))
    return product.movedim(-1, 2).flatten(1, 3)


@EVERY_ALGEBRA
@pytest.mark.parametrize("build", LAYERS, ids=layer_id)
def test_the_layer_commutes_with_numbers_from_the_right(build, algebra):
    layer = build().double()
    layer.bias = None
    tp.register_tie(layer, "hypercomplex", algebra=algebra)
    groups, kernel = getattr(layer, "groups", 1), getattr(layer, "kernel_size", ())
    channels = layer.in_channels if kernel else layer.in_features
    x = torch.randn(3, channels, *(5 for _ in kernel), dtype=torch.float64)
    unit = torch.randn(COMPONENTS[algebra], dtype=torch.float64)
    expected = times_from_the_right(layer(x), unit, groups)
    torch.testing.assert_close(
        layer(times_from_the_right(x, unit, groups)), expected, rtol=1e-11, atol=1e-11
    )


@EVERY_ALGEBRA
@pytest.mark.parametrize("build", LAYERS, ids=layer_id)
def test_the_projection_is_the_least_squares_one(build, algebra):
    """Spanned by the expansions of single values, found with torch's solver."""
    layer = build().double()
    dense = layer.weight.detach().flatten().clone()
    tp.register_tie(layer, "hypercomplex", algebra=algebra)
    rule, (shape,) = tp.get_tie(layer), tp.get_tie(layer).free_shapes()
    units = torch.eye(math.prod(shape), dtype=torch.float64)
    columns = [rule(unit.reshape(shape)).flatten() for unit in units]
    solved = torch.linalg.lstsq(torch.stack(columns, 1), dense[:, None]).solution[:, 0]
    torch.testing.assert_close(free_value(layer).detach().flatten(), solved, rtol=0, atol=1e-13)


@EVERY_ALGEBRA
def test_closed_counts(algebra):
    n = COMPONENTS[algebra]
    for layer in (nn.Linear(256, 512), nn.Conv2d(64, 128, 3), nn.ConvTranspose1d(64, 32, 5)):
        tp.register_tie(layer, "hypercomplex", algebra=algebra)
        assert stored(layer) == layer.weight.numel() // n
        assert tp.get_tie(layer).multiplicities()[0].unique().tolist() == [n]


def test_literal_matrices():
    layer = tp.register_tie(nn.Linear(2, 2), "hypercomplex")
    tp.assign_(layer, free=torch.tensor([[1.0], [2.0]]))
    assert layer.weight.tolist() == [[1, -2], [2, 1]]
    layer = tp.register_tie(nn.Linear(4, 4), "hypercomplex", algebra="quaternion")
    tp.assign_(layer, free=torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    assert layer.weight.tolist() == [
        [1, -2, -3, -4], [2, 1, -4, 3], [3, 4, 1, -2], [4, -3, 2, 1]
    ]  # fmt: skip


@EVERY_ALGEBRA
def test_saved_and_loaded_by_a_file(algebra, tmp_path):
    layer = tp.register_tie(nn.Conv1d(4, 8, 3), "hypercomplex", algebra=algebra)
    tp.save(layer, tmp_path / "layer.safetensors")
    other = tp.load(tmp_path / "layer.safetensors", nn.Conv1d(4, 8, 3))
    assert torch.equal(other.weight, layer.weight)
    assert str(tp.get_tie(other)) == f"hypercomplex(algebra='{algebra}')"


# What does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize("algebra", ["octonion", "", None, 2, ["complex"]], ids=repr)
def test_refuses_an_unknown_algebra(algebra):
    assert_refused(
        nn.Linear(4, 4), "hypercomplex",
        f"algebra={algebra!r} is unknown. Choose one of 'complex', 'quaternion'", algebra=algebra,
    )  # fmt: skip


def test_refuses_channels_without_equal_components():
    assert_refused(
        nn.Linear(4, 5), "hypercomplex", "the 5 outputs have no 2 components of equal size",
        "Choose a multiple of 2",
    )  # fmt: skip
    assert_refused(
        nn.Linear(6, 4), "hypercomplex",
        "the 6 inputs have no 4 components of equal size ('quaternion')", algebra="quaternion",
    )  # fmt: skip
    assert_refused(
        nn.Conv1d(4, 8, 3, groups=4), "hypercomplex", "the 1 inputs of a group have no 2 components"
    )
    assert_refused(
        nn.Linear(4, 4), "hypercomplex", "the tensor (4,) has no inputs", tensor_name="bias"
    )
