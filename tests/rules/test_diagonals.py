"""circulant, toeplitz, hankel: by scipy.linalg, by convolutions, and by loops."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import tiedparam as tp
from tests.support.cases import DTYPES, assert_refused, same_bits
from tests.support.tensors import free_value, stored

LAWS = ("circulant", "toeplitz", "hankel")


def as_scipy_has_it(law: str, free: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix of a law by functions that are not ours, for values in the documented order."""
    values = free.flatten().numpy()
    if law == "circulant":
        matrix = scipy.linalg.circulant(values)
    elif law == "toeplitz":
        centre = columns - 1
        matrix = scipy.linalg.toeplitz(values[centre:], values[centre::-1])
    else:
        matrix = scipy.linalg.hankel(values[:rows], values[rows - 1 :])
    assert matrix.shape == (rows, columns)
    return torch.from_numpy(matrix)


def orbit_of(law: str, row: int, column: int, size: int) -> int:
    """Which entries are one, by the equation."""
    if law == "circulant":
        return (row - column) % size
    return row - column if law == "toeplitz" else row + column


@st.composite
def laws_and_layers(draw: st.DrawFn) -> tuple[str, nn.Module]:
    law, dtype = draw(st.sampled_from(LAWS)), draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 100)))
    rows, columns = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    if law == "circulant":
        columns = rows
    kind = draw(st.sampled_from([nn.Linear, nn.Embedding]))
    sizes = (columns, rows) if kind is nn.Linear else (rows, columns)
    return law, kind(*sizes, dtype=dtype)


@given(laws_and_layers())
def test_the_weight_is_scipys_and_the_values_are_means(drawn):
    law, layer = drawn
    dense = layer.weight.detach().double()
    rows, columns = dense.shape
    tp.register_tie(layer, law)
    free, weight = free_value(layer).detach(), layer.weight.detach()
    assert torch.equal(weight.double(), as_scipy_has_it(law, free.double(), rows, columns))
    assert weight.is_contiguous()
    members: dict[int, list[Tensor]] = {}
    for row in range(rows):
        for column in range(columns):
            key = orbit_of(law, row, column, rows)
            members.setdefault(key, []).append(dense[row, column])
    eps = torch.finfo(weight.dtype).eps
    for row in range(rows):
        for column in range(columns):
            tied = torch.stack(members[orbit_of(law, row, column, rows)])
            mean = float(tied.mean())
            assert float(weight[row, column]) == pytest.approx(mean, rel=2 * eps, abs=2 * eps)


@given(laws_and_layers())
def test_lawful_weights_are_accepted_to_the_bit(drawn):
    law, layer = drawn
    tp.register_tie(layer, law)
    lawful = layer.weight.detach().clone()
    tp.register_tie(tp.remove_tie(layer), law, init="exact")
    assert same_bits(layer.weight.detach(), lawful)


# below and above the size from which strips are summed first, with and without a rest of rows
SIZES = [(7, 7), (1, 5), (5, 1), (256, 256), (257, 300), (300, 257), (512, 160), (33, 4000)]


@pytest.mark.filterwarnings("ignore:the tie of .* frees nothing")
@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("law", LAWS)
def test_large_weights_gradients_and_counts(law, rows, columns):
    if law == "circulant":
        columns = rows
    layer = nn.Linear(columns, rows, bias=False, dtype=torch.float64)
    tp.register_tie(layer, law)
    assert stored(layer) == (rows if law == "circulant" else rows + columns - 1)
    assert free_value(layer).shape == (1, stored(layer))
    free, weight = free_value(layer).detach(), layer.weight
    assert torch.equal(weight, as_scipy_has_it(law, free, rows, columns))
    numbers = as_scipy_has_it(law, torch.arange(1, stored(layer) + 1), rows, columns)
    assert torch.equal(tp.get_tie(layer).orbit_labels(), numbers)
    cotangent = torch.randn(rows, columns, dtype=torch.float64)
    (found,) = torch.autograd.grad(weight, free_value(layer), cotangent)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    place = {
        "circulant": (row - column) % rows, "toeplitz": row - column + columns - 1,
        "hankel": row + column,
    }[law]  # fmt: skip
    summed = torch.zeros(stored(layer), dtype=torch.float64)
    summed.index_add_(0, place.flatten(), cotangent.flatten())
    torch.testing.assert_close(found[0], summed, rtol=1e-12, atol=1e-12)
    (counts,) = tp.get_tie(layer).multiplicities()
    assert torch.equal(counts[0], torch.bincount(place.flatten()).double())


@pytest.mark.parametrize("law", LAWS)
def test_the_symmetries_leave_what_the_expansion_leaves(law):
    layer = tp.register_tie(nn.Linear(6, 6), law)
    derived, own = tp.get_tie(layer).derived_labels(), tp.get_tie(layer).orbit_labels()
    pairs = {(int(a), int(b)) for a, b in zip(derived.flatten(), own.flatten(), strict=True)}
    assert len(pairs) == len(derived.unique()) == len(own.unique()) == stored(layer)


# What such a layer computes -----------------------------------------------------------------


def test_circulant_is_a_cyclic_convolution():
    layer = tp.register_tie(nn.Linear(8, 8, bias=False, dtype=torch.float64), "circulant")
    w = free_value(layer)[0]
    x = torch.randn(3, 8, dtype=torch.float64)
    by_fft = torch.fft.ifft(torch.fft.fft(x) * torch.fft.fft(w)).real
    torch.testing.assert_close(layer(x), by_fft, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x.roll(3, 1)), layer(x).roll(3, 1), rtol=1e-12, atol=1e-12)


def test_toeplitz_and_hankel_slide_a_filter():
    x = torch.randn(3, 5, dtype=torch.float64)
    layer = tp.register_tie(nn.Linear(5, 7, bias=False, dtype=torch.float64), "toeplitz")
    # full convolution with all 11 diagonals, of which the middle is read
    full = F.conv1d(x[:, None], free_value(layer).flip(1)[None], padding=10)[:, 0]
    torch.testing.assert_close(layer(x), full[:, 4:11], rtol=1e-12, atol=1e-12)
    layer = tp.register_tie(nn.Linear(5, 7, bias=False, dtype=torch.float64), "hankel")
    windows = F.conv1d(free_value(layer)[None].expand(3, 1, 11).reshape(1, 3, 11), x[:, None],
                       groups=3)  # fmt: skip
    torch.testing.assert_close(layer(x), windows[0], rtol=1e-12, atol=1e-12)


# Other ways to the same numbers -------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
def test_transforms_see_the_same_matrix(law):
    layer = tp.register_tie(nn.Linear(6, 6, bias=False, dtype=torch.float64), law)
    name = "parametrizations.weight.original0"
    free, x = free_value(layer).detach(), torch.randn(2, 6, dtype=torch.float64)

    def loss(values):
        return functional_call(layer, {name: values}, (x,)).pow(3).sum()

    value = free.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(value), value)
    torch.testing.assert_close(grad(loss)(free), expected)
    stacked = torch.stack([free, 2 * free])
    torch.testing.assert_close(vmap(loss)(stacked), torch.stack([loss(free), loss(2 * free)]))
    tangent = torch.randn_like(free)
    torch.testing.assert_close(jvp(loss, (free,), (tangent,))[1], (expected * tangent).sum())


@pytest.mark.parametrize("law", LAWS)
def test_compiled_and_exported_programs_hold_no_table(law):
    torch._dynamo.reset()
    layer = tp.register_tie(nn.Linear(8, 8, bias=False), law)
    x = torch.randn(2, 8)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
    held = [*program.state_dict.values(), *program.constants.values()]
    assert sum(value.numel() for value in held) == stored(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (layer, compiled):
        layer.zero_grad()
        run(x).square().sum().backward()
        gradients.append(free_value(layer).grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("law", LAWS)
def test_a_matrix_that_is_stored_the_other_way_round(law):
    rule = tp.available_rules()[law]()
    assert rule.bind(tp.Layout((4, 4), transposed=True), torch.float64) is None
    values = torch.randn(rule.free_shapes()[0], dtype=torch.float64)
    weight = rule(values)
    assert torch.equal(weight.t(), as_scipy_has_it(law, values, 4, 4))
    assert weight.is_contiguous()
    assert all(torch.equal(image, weight) for image in rule.symmetries(weight))
    assert same_bits(rule.right_inverse(weight)[0], values)
    wide = tp.available_rules()["toeplitz"]()
    assert wide.bind(tp.Layout((3, 5), transposed=True), torch.float64) is None  # 5 outputs
    values = torch.arange(7.0)[None]
    assert torch.equal(wide(values).t(), as_scipy_has_it("toeplitz", values, 5, 3))


@pytest.mark.parametrize("law", LAWS)
def test_a_file_holds_the_values_alone(law, tmp_path):
    layer = tp.register_tie(nn.Linear(6, 6), law)
    tp.save(layer, tmp_path / "layer.safetensors")
    other = nn.Linear(6, 6)
    tp.load(tmp_path / "layer.safetensors", other)
    assert same_bits(other.weight.detach(), layer.weight.detach())
    assert str(tp.get_tie(other)) == law


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex128])
@pytest.mark.parametrize("law", LAWS)
def test_complex_matrices(law, dtype):
    layer = nn.Linear(4, 4, dtype=torch.complex64).to(dtype)
    tp.register_tie(layer, law)
    free, weight = (
        value.detach().to(torch.complex128) for value in (free_value(layer), layer.weight)
    )
    for part in (torch.real, torch.imag):
        assert torch.equal(part(weight), as_scipy_has_it(law, part(free), 4, 4))


# What does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
def test_refuses_what_is_not_a_matrix(law):
    assert_refused(nn.Conv2d(3, 3, 3), law, "the tensor (3, 3, 3, 3) has 4 axes", "Linear layer")
    assert_refused(nn.Linear(3, 3), law, "the tensor (3,) has 1 axis", tensor_name="bias")


def test_refuses_what_is_not_square():
    assert_refused(
        nn.Linear(5, 4), "circulant", "4 outputs and 5 inputs", "'block_circulant' or 'toeplitz'"
    )
