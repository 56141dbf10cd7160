"""Laws that compute with stock products of smaller matrices, against the dense layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support import computing_of
from tiedparam.products import linear_rows, quarter_turns, sets

BOUNDS = {torch.float64: 1e-11, torch.float32: 2e-4}


def linear(outputs, inputs):
    return lambda **options: nn.Linear(inputs, outputs, **options)


def pointwise(outputs, inputs):
    return lambda **options: nn.Conv2d(inputs, outputs, 1, **options)


DIAGONAL = {"pattern": "block_diagonal"}
# form, layer, law, options: even, odd and prime sizes, wide and tall
CASES = [
    ("blocks", linear(6, 4), "masked", {**DIAGONAL, "blocks": 2}),
    ("blocks", linear(21, 15), "masked", {**DIAGONAL, "blocks": 3}),
    ("blocks", linear(5, 7), "masked", {**DIAGONAL, "blocks": 1}),
    ("blocks", linear(6, 4), "masked", {"mask": torch.block_diag(*[torch.ones(3, 2)] * 2) > 0}),
    ("items", linear(9, 6), "set_equivariant", {"items": 3}),
    ("items", linear(7, 7), "set_equivariant", {"items": 7}),
    ("items", linear(34, 68), "set_equivariant", {"items": 34}),  # sets with a product each
    ("three", linear(6, 4), "hypercomplex", {}),
    ("three", linear(2, 14), "hypercomplex", {}),
    ("components", linear(6, 4), "hypercomplex", {}),
    ("components", linear(8, 12), "hypercomplex", {"algebra": "quaternion"}),
    ("halves", linear(6, 4), "centrosymmetric", {}),
    ("halves", linear(2, 10), "centrosymmetric", {}),
    ("turned", linear(6, 4), "centrosymmetric", {}),
    ("turned", linear(4, 7), "centrosymmetric", {}),
    ("fourier", pointwise(8, 12), "group_conv", {}),
    ("reduced", pointwise(8, 3), "group_conv", {"lift": True}),
    ("reduced", pointwise(16, 3), "group_conv", {"group": "p4m", "lift": True}),
    ("reduced", linear(12, 5), "head_share", {"heads": 6, "groups": 2}),
    ("reduced", linear(12, 5), "head_share", {"heads": 4, "groups": 1}),
    ("reduced", linear(12, 6), "repeat", {"outputs": 3, "inputs": 2, "order": "tile"}),
    ("reduced", linear(6, 12), "repeat", {"outputs": 2, "inputs": 3}),
    ("reduced", linear(6, 12), "repeat", {"inputs": 4, "order": "tile"}),
]
FOURIER = next(case for case in CASES if case[0] == "fourier")
IDS = [f"{form}-{rule}-{build().weight.shape}" for form, build, rule, _ in CASES]
cases = pytest.mark.parametrize(("form", "build", "rule", "options"), CASES, ids=IDS)


class Watched:
    """Counts the calls of a layer's form, so that no test is passed by the dense form instead."""

    def __init__(self, layer, form):
        self.calls = 0
        computing = computing_of(layer)
        known = computing.forms[form]

        def compute(rule, call):
            y = known.compute(rule, call)
            self.calls += y is not None
            return y

        computing.forms = {form: type(known)(known.name, known.cost, compute, known.where)}
        computing._orders.clear()


def twins(form, build, rule, options, dtype=torch.float64, **of_layer):
    """A layer that computes in the form, watched, and the dense one with its weight."""
    torch.manual_seed(0)
    dense = build(**of_layer).to(dtype)
    tied = copy.deepcopy(dense)
    tp.register_tie(tied, rule, compute=form, init="rescale", **options)
    dense.load_state_dict(tp.dense_state_dict(tied))
    return tied, dense, Watched(tied, form)


def inputs(layer, dtype=torch.float64):
    """Plain, without an axis of samples, empty, with leading axes, and no memory in order."""
    if isinstance(layer, nn.Linear):
        n = layer.in_features
        given = [(3, n), (1, n), (n,), (0, n), (2, 0, n), (2, 3, n)]
        transposed = torch.randn(n, 3, dtype=dtype).t()
    else:
        c = layer.in_channels
        given = [(2, c, 3, 5), (c, 2, 3), (0, c, 2, 2), (3, c, 1, 1)]
        transposed = torch.randn(3, c, 2, 4, dtype=dtype).transpose(2, 3)
    return [*(torch.randn(shape, dtype=dtype) for shape in given), transposed]


def gradients(layer, x, cotangent, *weights):
    own = x.detach().requires_grad_()
    return torch.autograd.grad(layer(own), (own, *weights), cotangent)


@cases
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_dense_layer(form, build, rule, options, bias, dtype):
    tied, dense, watched = twins(form, build, rule, options, dtype, bias=bias)
    bound = {"rtol": BOUNDS[dtype], "atol": BOUNDS[dtype]}
    for number, x in enumerate(inputs(tied, dtype)):
        expected = dense(x)
        y = tied(x)
        if not (form == "fourier" and not x.is_contiguous()):
            assert watched.calls == 3 * number + 1
        torch.testing.assert_close(y, expected, **bound)
        assert y.stride() == expected.stride() or y.numel() == 0
        assert y._is_view() <= expected._is_view()  # F.linear gives one for a vector
        with torch.no_grad():
            torch.testing.assert_close(tied(x), expected, **bound)
        cotangent = torch.randn_like(expected)
        biases = [layer.bias for layer in (tied, dense) if bias]
        (free,) = tied.parametrizations.weight.parameters()
        mine = gradients(tied, x, cotangent, free, *biases[:1])
        theirs = gradients(dense, x, cotangent, dense.weight, *biases[1:])
        torch.testing.assert_close(mine[0], theirs[0], **bound)
        (folded,) = tp.get_tie(tied).adjoint(theirs[1])
        torch.testing.assert_close(mine[1], folded, **bound)
        torch.testing.assert_close(mine[2:], theirs[2:], **bound)
        # gradients of a sum have no memory of their own
        torch.testing.assert_close(
            gradients(tied, x, torch.ones((), dtype=dtype).expand(y.shape))[0],
            gradients(dense, x, torch.ones((), dtype=dtype).expand(y.shape))[0],
            **bound,
        )
        watched.calls = 3 * (number + 1)


@cases
def test_first_and_second_derivatives(form, build, rule, options, monkeypatch):
    monkeypatch.setattr(linear_rows, "LITTLE", 1)  # a row at a time, where there is a choice
    tied, _, watched = twins(form, build, rule, options)
    x = torch.randn_like(inputs(tied)[0][:2], requires_grad=True)
    names = dict(tied.named_parameters())

    def function(x, *values):
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(tied, given, (x,))

    values = [p.detach().clone().requires_grad_() for p in names.values()]
    assert torch.autograd.gradcheck(function, (x, *values))
    assert torch.autograd.gradgradcheck(function, (x, *values))
    assert watched.calls > 10


@cases
def test_nothing_is_computed_for_what_is_frozen(form, build, rule, options):
    tied, dense, watched = twins(form, build, rule, options)
    x = inputs(tied)[0]
    tied.requires_grad_(False)
    own = x.clone().requires_grad_()
    tied(own).sum().backward()
    assert all(p.grad is None for p in tied.parameters())
    other = x.clone().requires_grad_()
    dense(other).sum().backward()
    torch.testing.assert_close(own.grad, other.grad)
    tied.requires_grad_(True)
    tied(x).sum().backward()
    assert all(p.grad is not None for p in tied.parameters())
    assert watched.calls == 2


def kept_for_backward(layer, x):
    """Bytes that the graph of a forward keeps, apart from the input and the parameters."""
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x.requires_grad_())
    del y
    return sum(kept.values())


@cases
def test_keeps_nothing_for_backward_but_its_inputs(form, build, rule, options):
    tied, _, watched = twins(form, build, rule, options)
    x = inputs(tied)[0]
    sums = x.nbytes // options.get("inputs", 1) if "inputs" in options else 0
    assert kept_for_backward(tied, x) <= sums
    assert watched.calls == 1


LARGE = [
    ("blocks", linear(1024, 1024), "masked", {**DIAGONAL, "blocks": 8}),
    ("items", linear(1024, 1024), "set_equivariant", {"items": 64}),
    ("three", linear(1024, 1024), "hypercomplex", {}),
    ("components", linear(1024, 1024), "hypercomplex", {"algebra": "quaternion"}),
    ("halves", linear(1024, 1024), "centrosymmetric", {}),
    ("fourier", pointwise(512, 512), "group_conv", {}),
    ("reduced", pointwise(64, 64), "group_conv", {"lift": True}),
    ("reduced", linear(1024, 1024), "head_share", {"heads": 16, "groups": 4}),
]


@pytest.mark.parametrize(("form", "build", "rule", "options"), LARGE, ids=[c[2] for c in LARGE])
def test_is_taken_where_it_was_measured_to_win(form, build, rule, options):
    tied = tp.register_tie(build(), rule, **options)
    computing, law = computing_of(tied), tp.get_tie(tied)
    rows = 32 * 196 if isinstance(tied, nn.Conv2d) else 64
    for training in (False, True):
        for count in (rows, None):
            assert computing.order(law, count, training, False)[0].name == form


@pytest.mark.parametrize(
    ("build", "rule", "options"),
    [
        (linear(16, 16), "masked", {**DIAGONAL, "blocks": 4}),
        (linear(16, 16), "set_equivariant", {"items": 4}),
        (linear(64, 64), "hypercomplex", {}),
        (linear(64, 64), "hypercomplex", {"algebra": "quaternion"}),
        (linear(64, 64), "centrosymmetric", {}),
        (pointwise(64, 64), "group_conv", {}),
    ],
)
def test_small_layers_stay_dense_where_the_form_loses(build, rule, options):
    tied = tp.register_tie(build(), rule, **options)
    computing, law = computing_of(tied), tp.get_tie(tied)
    assert not computing.order(law, 512, False, False)
    assert not computing.order(law, 512, True, True)


@pytest.mark.parametrize(
    ("build", "rule", "options", "offered"),
    [
        (linear(5, 4), "centrosymmetric", {}, []),  # a middle row
        (linear(4, 5), "centrosymmetric", {}, ["turned"]),
        (linear(4, 4), "masked", {"pattern": "lower"}, []),
        (linear(4, 4), "masked", {"mask": torch.eye(4, dtype=torch.bool).roll(1, 0)}, []),
        (linear(4, 4), "masked", {"mask": torch.ones(4, 4, dtype=torch.bool).tril()}, []),
        (linear(4, 4), "masked", {"mask": torch.eye(4, dtype=torch.bool)}, ["blocks"]),
        (linear(4, 3), "masked", {"mask": torch.ones(4, 1, dtype=torch.bool)}, ["blocks"]),
        (linear(8, 8), "block_circulant", {"block": 1}, []),  # nothing to transform
        (pointwise(8, 8), "group_conv", {"group": "p4m"}, []),
        (lambda: nn.Conv2d(8, 8, 1, groups=2), "group_conv", {}, []),
        (lambda: nn.Conv2d(4, 8, 3), "group_conv", {}, []),
        (lambda: nn.ConvTranspose2d(4, 8, 1), "group_conv", {}, []),
        (lambda: nn.Conv2d(4, 8, 1), "hypercomplex", {}, []),
        (linear(4, 4), "hypercomplex", {"algebra": "quaternion"}, ["components"]),
    ],
)
def test_what_has_no_such_form(build, rule, options, offered):
    tied = tp.register_tie(build(), rule, **options)
    computing = computing_of(tied)
    assert (list(computing.forms) if computing else []) == offered


@pytest.mark.parametrize("geometry", [{"stride": 2}, {"padding": 1}])
def test_other_geometries_of_a_group_convolution_stay_dense(geometry):
    tied, dense, watched = twins("fourier", *FOURIER[1:], **geometry)
    x = torch.randn(2, 12, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(tied(x), dense(x))
    assert watched.calls == 0


@cases
def test_rows_some_at_a_time_give_the_same(form, build, rule, options, monkeypatch):
    monkeypatch.setattr(linear_rows, "LITTLE", 1)
    tied, dense, watched = twins(form, build, rule, options)
    x = inputs(tied)[0]
    x = torch.randn(29, *x.shape[1:], dtype=x.dtype)  # far more than there are values
    torch.testing.assert_close(tied(x), dense(x))
    cotangent = torch.randn_like(dense(x))
    (folded,) = tp.get_tie(tied).adjoint(gradients(dense, x, cotangent, dense.weight)[1])
    free, bias = (tied.get_parameter(name) for name, _ in tied.named_parameters())
    if free is tied.bias:
        free, bias = bias, free
    mine = gradients(tied, x, cotangent, free, bias)
    own, of_bias = gradients(dense, x, cotangent, dense.bias)
    torch.testing.assert_close(mine, (own, folded, of_bias))
    assert watched.calls


def test_products_go_block_by_block_as_in_one(monkeypatch):
    tied, dense, _ = twins(*FOURIER)
    x = torch.randn(5, 12, 3, 3, dtype=torch.float64)
    monkeypatch.setattr(quarter_turns, "BLOCK_BYTES", 12 * 9 * 8 * 2)  # 2, 2 and 1
    torch.testing.assert_close(tied(x), dense(x))
    mine = gradients(tied, x, torch.ones(5, 8, 3, 3, dtype=torch.float64), *tied.parameters())
    monkeypatch.undo()
    whole = gradients(tied, x, torch.ones(5, 8, 3, 3, dtype=torch.float64), *tied.parameters())
    torch.testing.assert_close(mine, whole)


def test_sets_of_any_width_give_the_same(monkeypatch):
    x, free, bias = torch.randn(3, 8), torch.randn(6, 2), torch.randn(12)
    narrow = sets.set_product(x, free, bias, 4)
    monkeypatch.setattr(sets, "_WIDE", 4)
    torch.testing.assert_close(sets.set_product(x, free, bias, 4), narrow)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@cases
def test_compiled_to_one_graph(form, build, rule, options, backend):
    torch._dynamo.reset()
    tied, dense, _ = twins(form, build, rule, options)
    x = inputs(tied)[0]
    compiled = torch.compile(tied, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), dense(x))
    cotangent = torch.randn_like(dense(x))
    mine = gradients(compiled, x, cotangent, *tied.parameters())
    torch.testing.assert_close(mine, gradients(tied, x, cotangent, *tied.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@cases
def test_half_precision_and_autocast(form, build, rule, options, dtype):
    tied, dense, _ = twins(form, build, rule, options, torch.float32)
    x = inputs(tied, torch.float32)[0]
    with torch.autocast("cpu", dtype):
        y = tied(x)
        expected = dense(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    tied.to(dtype)
    y = tied(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), dense(x), rtol=0.05, atol=0.05)


@cases
def test_transforms(form, build, rule, options):
    tied, dense, _ = twins(form, build, rule, options)
    x = inputs(tied)[0]
    torch.testing.assert_close(torch.func.vmap(tied)(x), dense(x))
    tangent = torch.randn_like(x)
    _, moved = torch.func.jvp(tied, (x,), (tangent,))
    torch.testing.assert_close(moved, dense(tangent) - dense(torch.zeros_like(x)))
