"""Products with symmetric matrices by their panels, judged by the whole matrix."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tiedparam.products import panels
from tiedparam.products.packed_tiles import TILE, packed_count
from tiedparam.products.panels import symmetric_product

# one square; the first that is split; a tile; one row more; two tiles; several, one of them split
SIZES = [1, 2, 3, 34, 96, 97, 98, 255, 383, TILE, TILE + 1, 2 * TILE, 2 * TILE + 1, 1024, 1150]
BOTH = [1, -1]


@functools.cache
def places_below(n: int, sign: int) -> Tensor:
    """``(n, n)``: where the entries on and below the diagonal stand, from what `tiles` says."""
    places = torch.zeros(n, n, dtype=torch.long)
    place, shift = 0, int(sign == -1)
    for start in range(0, n, TILE):
        stop = min(n, start + TILE)
        rows = stop - start - shift
        if rows:
            count, odd, top = rows * (rows + 1) // 2, rows % 2, rows // 2
            rectangle = torch.arange(place, place + count).view(rows - top, rows + 1 - odd)
            # the bottom half stands upright, the top half is turned by 180°
            halves = rectangle.flip(0, 1)[odd:, :rows], rectangle[:, :rows]
            tile = places[start + shift : stop, start : stop - shift]
            tile.copy_(torch.cat(halves).tril())
            place += count
        size = stop - start
        below = torch.arange(place, place + (n - stop) * size).view(n - stop, size)
        places[stop:, start:stop] = below
        place += below.numel()
    assert place == packed_count(n, sign)
    return places


def whole(packed: Tensor, n: int, sign: int) -> Tensor:
    """The matrix; differentiable."""
    lower = packed[places_below(n, sign)]
    strict = lower.tril(-1)
    diagonal = torch.diag(lower.diagonal()) if sign == 1 else torch.zeros_like(lower)
    return strict + sign * strict.t() + diagonal


def leaves(n: int, sign: int, *shape: int, groups: int = 1) -> list[Tensor]:
    torch.manual_seed(n)
    shapes = [shape, (groups * packed_count(n, sign),), (groups * n,)]
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize(
    ("n", "sign"), [case for case in itertools.product(SIZES, BOTH) if case != (1, -1)]
)
def test_output_and_gradients_are_those_of_the_whole_matrix(n, sign):
    # more rows than are multiplied at a time
    input, packed, bias = given = leaves(n, sign, 150, n)
    wanted = F.linear(input, whole(packed, n, sign), bias)
    found = symmetric_product(input, packed, bias, sign)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(wanted)
    for gradient, expected in zip(
        torch.autograd.grad(found, given, cotangent),
        torch.autograd.grad(wanted, given, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sign", BOTH)
def test_single_precision(sign):
    n = 1024
    input, packed, bias = (t.detach().float() for t in leaves(n, sign, 64, n))
    wanted = F.linear(input.double(), whole(packed, n, sign).double(), bias.double())
    error = symmetric_product(input, packed, bias, sign) - wanted
    # as any sum of 1,024 products of numbers near 1
    assert error.abs().max() <= 2e-4


@pytest.mark.parametrize(("n", "sign"), [(5, 1), (5, -1), (100, 1), (99, -1), (400, 1), (400, -1)])
def test_second_derivatives(n, sign):
    given = leaves(n, sign, 2, n)

    def product(*tensors: Tensor) -> Tensor:
        return symmetric_product(*tensors, sign)

    assert torch.autograd.gradcheck(product, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(product, given, fast_mode=True)


@pytest.mark.parametrize("sign", BOTH)
@pytest.mark.parametrize("shape", [(2, 6, 5), (3, 6, 4, 7), (6, 3), (200, 6, 2), (1, 6, 1)])
def test_positions_and_groups(shape, sign):
    axes = 1 if len(shape) < 4 else 2
    axes = 1 if shape == (6, 3) else axes
    given = leaves(3, sign, *shape, groups=2)
    input, packed, bias = given
    matrices = [whole(values, 3, sign) for values in packed.view(2, -1)]
    weight = torch.cat(matrices).view(6, 3, *(1,) * axes)
    wanted = (F.conv1d, F.conv2d)[axes - 1](input, weight, bias, groups=2)
    found = symmetric_product(input, packed, bias, sign, groups=2, axes=axes)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous()
    cotangent = torch.randn_like(wanted)
    for gradient, expected in zip(
        torch.autograd.grad(found, given, cotangent),
        torch.autograd.grad(wanted, given, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(0, 400), (2, 0, 400), (400,), (2, 3, 400)])
def test_leading_dimensions(shape):
    input, packed, bias = given = leaves(400, 1, *shape)
    found = symmetric_product(input, packed, bias)
    wanted = F.linear(input, whole(packed, 400, 1), bias)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(found.sum(), given)
    assert [g.shape for g in gradients] == [t.shape for t in given]
    if not input.numel():
        assert not any(gradient.any() for gradient in gradients)


def test_input_that_is_not_contiguous_and_output_of_its_own():
    input, packed, _ = leaves(512, 1, 512, 40)
    found = symmetric_product(input.t(), packed)
    torch.testing.assert_close(found, input.t() @ whole(packed, 512, 1), rtol=1e-12, atol=1e-12)
    assert found.is_contiguous()
    assert found._base is None
    assert found.untyped_storage().nbytes() == 8 * found.numel()


@pytest.mark.parametrize("sign", BOTH)
def test_infinite_values_stay_where_they_are(sign):
    """No mask is multiplied, which would make NaN of inf at zeros and at other entries."""
    n = 300
    packed = torch.zeros(packed_count(n, sign), dtype=torch.float64)
    packed[1] = torch.inf
    lower = packed[places_below(n, sign)].tril(-(sign == -1))
    weight = torch.where(lower == 0, sign * lower.t(), lower)
    assert weight.isinf().sum() in (1, 2)
    (row, column), *_ = weight.isinf().nonzero().tolist()
    input = torch.zeros(1, n, dtype=torch.float64)
    input[0, column] = 1
    wanted = weight[:, column]
    found = symmetric_product(input, packed, None, sign)[0]
    others = torch.ones(n, dtype=torch.bool)
    others[[row, column]] = False
    assert found[row] == wanted[row]
    # every other output multiplies the infinite entry by 0 at most, as the dense product does
    dense = F.linear(input, weight)[0]
    assert torch.equal(found[others], dense[others])


def test_nothing_is_computed_that_nobody_asks_for(monkeypatch):
    products = []
    for name in ("_multiply", "_fold_product"):
        original = getattr(panels, name)

        def counted(*args, name=name, original=original, **kwargs):
            products.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(panels, name, counted)
    input, packed, bias = leaves(400, 1, 2, 400)
    symmetric_product(input.detach(), packed, bias).sum().backward()
    assert products == ["_multiply", "_fold_product"]
    products.clear()
    symmetric_product(input, packed.detach()).sum().backward()
    assert products == ["_multiply", "_multiply"]


def test_backward_keeps_input_and_values_alone():
    input, packed, _ = leaves(1024, 1, 8, 1024)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        symmetric_product(input, packed)
    assert {t.data_ptr() for t in kept} == {input.data_ptr(), packed.data_ptr()}


def test_one_operator_in_compiled_graphs():
    input, packed, bias = given = [
        t.detach().float().requires_grad_() for t in leaves(400, 1, 3, 400)
    ]
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    compiled = torch.compile(symmetric_product, backend=backend)
    found = compiled(input, packed, bias)
    assert [str(target) for target in graphs[0]] == ["tiedparam.symmetric_product"]
    wanted = symmetric_product(input, packed, bias)
    assert torch.equal(found, wanted)
    for ours, eager in zip(
        torch.autograd.grad(found.square().sum(), given),
        torch.autograd.grad(wanted.square().sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(ours, eager)
