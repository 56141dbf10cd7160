"""flip_sym(sign=-1), symmetric and skew: by loops, geotorch, eigenvalues and adjoints."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tiedparam as tp
from tests.support.cases import DTYPES, assert_refused, canonical_entries, layer_id, same_bits
from tests.support.tensors import free_value, stored, with_weight

KINDS = {
    (dims, transposed): getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    for dims, transposed in itertools.product((1, 2, 3), (False, True))
}


def mirrored(layer: nn.Module, index: tuple[int, ...]) -> tuple[int, ...]:
    """The place of an entry's mirror image in the canonical layout."""
    output, j, *x = index
    c = layer.weight.shape[1]  # square: the same in every layout
    group, i = divmod(output, c)
    kernel = layer.weight.shape[2:]
    turned = [size - 1 - position for size, position in zip(kernel, x, strict=True)]
    return (group * c + j, i, *turned)


def assert_skew(layer: nn.Module) -> None:
    """The law by loops, and zeros that are no negative ones where an entry is its own image."""
    entries, own = canonical_entries(layer), 0
    for index, value in entries.items():
        image = mirrored(layer, index)
        assert value == -entries[image]
        if image == index:
            own += 1
            assert math.copysign(1, value) == 1
    c, odd = layer.weight.shape[1], all(size % 2 for size in layer.weight.shape[2:])
    assert own == (c * getattr(layer, "groups", 1) if odd else 0)


@st.composite
def square_layers(draw: st.DrawFn) -> nn.Module:
    dims, c, groups = draw(st.integers(0, 3)), draw(st.integers(2, 4)), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 100)))
    if dims == 0:
        return nn.Linear(c, c, dtype=dtype)
    kernel = tuple(draw(st.lists(st.integers(1, 4), min_size=dims, max_size=dims)))
    kind = KINDS[dims, draw(st.booleans())]
    return kind(groups * c, groups * c, kernel, groups=groups, dtype=dtype)


@given(square_layers())
def test_law_by_loops_and_closed_form_count(layer):
    dense = canonical_entries(layer)
    c, kernel = layer.weight.shape[1], layer.weight.shape[2:]
    tp.register_tie(layer, "flip_sym", sign=-1)
    assert_skew(layer)
    f = c if all(size % 2 for size in kernel) else 0
    assert stored(layer) == getattr(layer, "groups", 1) * (c * c * math.prod(kernel) - f) // 2
    eps = torch.finfo(layer.weight.dtype).eps
    for index, value in canonical_entries(layer).items():
        half = (dense[index] - dense[mirrored(layer, index)]) / 2
        assert value == pytest.approx(half, rel=eps, abs=eps / 2)
    weight = layer.weight.detach().clone()
    tp.register_tie(tp.remove_tie(layer), "flip_sym", sign=-1, init="exact")
    assert same_bits(layer.weight.detach(), weight)


MANY_CHANNELS = [
    lambda: nn.Linear(385, 385),  # a last tile of one channel
    lambda: nn.Linear(420, 420),
    lambda: nn.Conv1d(392, 392, 3),
    lambda: nn.Conv2d(160, 160, (3, 2)),
    lambda: nn.ConvTranspose1d(300, 300, 5, groups=2),
]


@pytest.mark.parametrize("build", MANY_CHANNELS, ids=layer_id)
def test_large_weights_and_their_gradients(build):
    layer = build().double()
    dense = layer.weight.detach().clone()
    c, groups, positions = dense.shape[1], getattr(layer, "groups", 1), math.prod(dense.shape[2:])
    tp.register_tie(layer, "flip_sym", sign=-1)
    rule, weight = tp.get_tie(layer), layer.weight
    assert stored(layer) == groups * (c * c * positions - (c if positions % 2 else 0)) // 2
    blocks = dense.view(groups, c, c, positions)
    expected = (blocks - blocks.transpose(1, 2).flip(-1)) / 2
    torch.testing.assert_close(weight, expected.view(dense.shape), rtol=0, atol=1e-15)
    assert torch.equal(*rule.symmetries(weight), weight)
    assert not weight[weight == 0].signbit().any()
    cotangent = torch.randn_like(dense)
    (found,) = torch.autograd.grad(weight, free_value(layer), cotangent)
    labels = rule.orbit_labels().flatten()
    assert labels.unique().tolist() == sorted(
        {*range(-stored(layer), stored(layer) + 1)} - ({0} if positions % 2 == 0 else set())
    )
    sums = torch.zeros(stored(layer) + 1, dtype=torch.float64)
    sums.index_add_(0, labels.abs(), cotangent.flatten() * labels.sign())
    torch.testing.assert_close(found.flatten(), sums[1:], rtol=0, atol=1e-14)


@pytest.mark.parametrize("build", [lambda: nn.Linear(7, 7), lambda: nn.Conv1d(4, 4, 3)])
def test_formulas_and_look_ups_give_the_same_bits(build):
    rule = tp.get_tie(tp.register_tie(build(), "flip_sym", sign=-1))
    (shape,) = rule.free_shapes()
    free = torch.randn(shape)
    traced = torch.func.vmap(rule)(free[None])[0]  # which takes the plain operations
    assert same_bits(traced, rule(free))
    assert not traced[traced == 0].signbit().any()


def test_literal_matrices():
    layer = with_weight(nn.Linear(2, 2), [[1.0, 2.0], [4.0, 5.0]])
    tp.register_tie(layer, "skew")
    assert layer.weight.tolist() == [[0.0, -1.0], [1.0, 0.0]]
    layer = with_weight(nn.Conv1d(1, 1, 3), [[[1.0, 7.0, 4.0]]])
    tp.register_tie(layer, "flip_sym", sign=-1)  # a derivative
    assert layer.weight.tolist() == [[[-1.5, 0.0, 1.5]]]


def test_stored_order_is_fixed():
    """Checkpoints hold the free values in this order; changing it would misread old files."""
    layer = tp.register_tie(nn.Linear(3, 3), "skew")
    tp.assign_(layer, free=torch.tensor([[1.0, 2.0, 3.0]]))
    assert layer.weight.tolist() == [[0.0, -3.0, -1.0], [3.0, 0.0, -2.0], [1.0, 2.0, 0.0]]
    layer = tp.register_tie(nn.Conv1d(2, 2, 3), "flip_sym", sign=-1)
    tp.assign_(layer, free=torch.tensor([[1.0, 2.0, 3.0, 4.0, 10.0]]))
    assert layer.weight.tolist() == [
        [[4.0, 0.0, -4.0], [1.0, 2.0, 3.0]],
        [[-3.0, -2.0, -1.0], [10.0, 0.0, -10.0]],
    ]


# Judged from outside ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 5, 33])
@pytest.mark.parametrize("law", ["symmetric", "skew"])
def test_geotorch_has_the_same_matrices(law, size):
    geotorch = pytest.importorskip("geotorch")
    layer, other = (nn.Linear(size, size, dtype=torch.float64) for _ in range(2))
    tp.register_tie(layer, law)
    weight = layer.weight.detach().clone()
    getattr(geotorch, law)(other, "weight")
    with torch.no_grad():
        other.parametrizations.weight.original.copy_(weight)  # of which it reads a triangle
    assert torch.equal(other.weight, weight)
    assert stored(layer) == size * (size + (1 if law == "symmetric" else -1)) // 2


@pytest.mark.parametrize("size", [4, 7])
def test_eigenvalues_are_real_or_imaginary(size):
    for law, part in (("symmetric", torch.imag), ("skew", torch.real)):
        layer = nn.Linear(size, size, dtype=torch.float64)
        before = torch.linalg.eigvals(layer.weight.detach())
        assert part(before).abs().max() > 1e-3
        tp.register_tie(layer, law)
        values = torch.linalg.eigvals(layer.weight.detach())
        assert part(values).abs().max() < 1e-13
        assert values.abs().max() > 1e-3
    # and what a skew matrix generates is a rotation
    turn = torch.linalg.matrix_exp(layer.weight.detach())
    torch.testing.assert_close(turn @ turn.t(), torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize(
    ("kind", "kernel", "options"),
    [
        (nn.Conv1d, 5, {}),
        (nn.Conv2d, 3, {"padding_mode": "circular"}),
        (nn.Conv2d, (3, 5), {"dilation": 2}),
        (nn.Conv2d, 3, {"groups": 2, "padding_mode": "circular"}),
        (nn.Conv3d, (3, 1, 3), {}),
        (nn.ConvTranspose2d, 3, {"groups": 2}),
    ],
)
def test_odd_kernels_are_skew_adjoint(kind, kernel, options):
    dims = int(kind.__name__[-2])
    sizes = (kernel,) * dims if isinstance(kernel, int) else kernel
    padding = tuple(options.get("dilation", 1) * (size // 2) for size in sizes)
    layer = kind(4, 4, kernel, padding=padding, bias=False, dtype=torch.float64, **options)
    x, y = torch.randn(2, 1, 4, *(9, 8, 7)[:dims], dtype=torch.float64)

    def sum_of_both() -> Tensor:
        return (layer(x) * y).sum() + (x * layer(y)).sum()

    assert abs(sum_of_both()) > 1e-3
    tp.register_tie(layer, "flip_sym", sign=-1)
    assert abs(sum_of_both()) < 1e-12
    assert abs((layer(x) * x).sum()) < 1e-12
    assert layer(x).norm() > 1e-3


# Names and files ----------------------------------------------------------------------------


def test_the_aliases_are_flip_sym_on_matrices():
    torch.manual_seed(0)
    weight = torch.randn(6, 6)
    for law, options in (("symmetric", {}), ("skew", {"sign": -1})):
        one, other = (with_weight(nn.Linear(6, 6), weight) for _ in range(2))
        tp.register_tie(one, law)
        tp.register_tie(other, "flip_sym", **options)
        assert same_bits(free_value(one).detach(), free_value(other).detach())
        assert tp.get_tie(one)._expansion is tp.get_tie(other)._expansion
        assert str(tp.get_tie(one)) == law


def test_options_show_the_sign_only_where_it_is_not_1():
    shown = [
        str(tp.get_tie(tp.register_tie(nn.Linear(3, 3), "flip_sym", **options)))
        for options in ({}, {"sign": 1}, {"sign": -1})
    ]
    assert shown == ["flip_sym", "flip_sym", "flip_sym(sign=-1)"]


@pytest.mark.parametrize(
    ("rule", "options"), [("flip_sym", {"sign": -1}), ("skew", {}), ("symmetric", {})]
)
def test_a_file_holds_the_values_and_the_sign(rule, options, tmp_path):
    layer = tp.register_tie(nn.Linear(5, 5), rule, **options)
    tp.save(layer, tmp_path / "layer.safetensors")
    other = tp.load(tmp_path / "layer.safetensors", nn.Linear(5, 5))
    assert same_bits(other.weight.detach(), layer.weight.detach())
    assert str(tp.get_tie(other)) == str(tp.get_tie(layer))


def test_scan_tries_both_signs_and_no_name_twice():
    layer = tp.remove_tie(tp.register_tie(nn.Linear(8, 8, bias=False), "skew"))
    found = tp.scan(layer).candidates
    (skew,) = [candidate for candidate in found if candidate.residual == 0]
    assert skew.rule == "flip_sym(sign=-1)"
    assert not {"skew", "symmetric"} & {candidate.rule for candidate in found}


# What does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [0, 2, -2, True, 1.0, "-1", None, [1]], ids=repr)
def test_refuses_other_signs(sign):
    assert_refused(
        nn.Linear(3, 3), "flip_sym", f"sign={sign!r} is unknown", "Choose 1 or -1", sign=sign
    )


@pytest.mark.parametrize("build", [lambda: nn.Linear(1, 1), lambda: nn.Conv2d(3, 3, 1, groups=3)])
def test_refuses_what_would_be_zero_as_a_whole(build):
    assert_refused(build(), "flip_sym", "its own mirror image is 0", "more channels", sign=-1)


@pytest.mark.parametrize("law", ["symmetric", "skew"])
def test_the_aliases_refuse_what_is_not_a_square_matrix(law):
    assert_refused(nn.Linear(3, 4), law, "out_channels (4) must equal in_channels (3)")
    assert_refused(nn.Conv2d(3, 3, 3), law, "the tensor (3, 3, 3, 3) has 4 axes")
    assert_refused(nn.Linear(3, 3), law, "has 1 axis", tensor_name="bias")
