"""LSTM, GRU, RNN and their cells with tied weights (S14)."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import tiedparam as tp
from tests.support import older_than

KINDS = [nn.LSTM, nn.GRU, nn.RNN]
SHAPES = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
]
NAME = "weight_hh_l0"


def twins(kind, **options):
    """A tied layer, and the stock one with the same effective weights."""
    tied = kind(4, 6, **options)
    dense = copy.deepcopy(tied)
    tp.register_tie(tied, "row_repeat", NAME, groups=2)
    dense.load_state_dict(tp.dense_state_dict(tied))
    return tied, dense


def assert_same(tied, dense, x):
    outputs, expected = tied(x), dense(x)
    torch.testing.assert_close(outputs, expected)


@pytest.mark.feature("Layers", "`nn.LSTM`, `nn.GRU`, `nn.RNN`: outputs and gradients")
@pytest.mark.parametrize("options", SHAPES, ids=["plain", "bidirectional"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_s14_outputs_and_gradients_equal_the_dense_layer(kind, options):
    tied, dense = twins(kind, **options)
    x = torch.randn(3, 5, 4)
    for layer in (tied, dense):
        layer(x)[0].square().sum().backward()
    assert_same(tied, dense, x)
    rule = tp.get_tie(tied, NAME)
    (expected,) = rule.adjoint(getattr(dense, NAME).grad)
    free = tied.parametrizations[NAME].original0
    torch.testing.assert_close(free.grad, expected)
    torch.testing.assert_close(tied.weight_ih_l0.grad, dense.weight_ih_l0.grad)
    with torch.no_grad():
        assert_same(tied, dense, x)
    packed = nn.utils.rnn.pack_padded_sequence(x, [3, 2, 2, 1, 1], enforce_sorted=True)
    if not tied.batch_first:
        torch.testing.assert_close(tied(packed)[0].data, dense(packed)[0].data)


@pytest.mark.feature(
    "Layers",
    "recurrent layers: deepcopy, pickle and `torch.save`, fresh, called, trained and cast",
)
@pytest.mark.parametrize("when", ["tied", "called", "trained", "cast"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_s14_copies_are_whole_and_independent(kind, when):
    tied, dense = twins(kind, num_layers=2)
    x = torch.randn(3, 5, 4)
    if when == "called":
        tied(x)
    if when == "trained":
        optimizer = torch.optim.SGD(tied.parameters(), lr=0.1)
        tied(x)[0].square().sum().backward()
        optimizer.step()
    if when == "cast":
        tied.double().float()
    dense.load_state_dict(tp.dense_state_dict(tied))
    file = io.BytesIO()
    torch.save(tied, file)
    file.seek(0)
    replicas = [
        copy.deepcopy(tied),
        pickle.loads(pickle.dumps(tied)),
        torch.load(file, weights_only=False),
        copy.deepcopy(nn.Sequential(tied))[0],
    ]
    for replica in replicas:
        assert type(replica) is type(tied)
        assert_same(replica, dense, x)
        with torch.no_grad():
            for parameter in replica.parameters():
                parameter.mul_(2)
    assert_same(tied, dense, x)  # nothing was shared
    assert not torch.allclose(replicas[0](x)[0], dense(x)[0])


@pytest.mark.feature(
    "Layers",
    "recurrent layers: training, `state_dict`, `.to()`, `flatten_parameters`, `reset_parameters`",
)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_s14_life_of_a_layer(kind):
    tied, dense = twins(kind)
    x = torch.randn(3, 5, 4)
    optimizer = torch.optim.Adam(tied.parameters(), lr=0.1)
    before = getattr(tied, NAME).clone()
    for _ in range(3):
        optimizer.zero_grad()
        tied(x)[0].square().mean().backward()
        optimizer.step()
        assert not torch.equal(getattr(tied, NAME), before)
        (symmetry, *_) = tp.get_tie(tied, NAME).symmetries(getattr(tied, NAME))
        assert torch.equal(symmetry, getattr(tied, NAME))
    dense.load_state_dict(tp.dense_state_dict(tied))
    assert_same(tied, dense, x)
    # the computed weights follow what is written, by whatever way
    other = kind(4, 6)
    with pytest.warns(tp.TieWarning, match=NAME):
        tied.load_state_dict(other.state_dict())
    dense.load_state_dict(tp.dense_state_dict(tied))
    assert_same(tied, dense, x)
    tied.load_state_dict({k: v + 1 for k, v in tied.state_dict().items()}, assign=True)
    dense.load_state_dict(tp.dense_state_dict(tied))
    assert_same(tied, dense, x)
    assert_same(tied.double(), dense.double(), x.double())
    tied.flatten_parameters()
    assert_same(tied, dense, x.double())
    tied.float().reset_parameters()
    assert not torch.equal(getattr(tied, NAME), getattr(dense, NAME))
    dense.float().load_state_dict(tp.dense_state_dict(tied))
    assert_same(tied, dense, x)
    bias = torch.zeros_like(tied.bias_ih_l0)
    tied.bias_ih_l0 = nn.Parameter(bias)
    dense.bias_ih_l0 = nn.Parameter(bias)
    assert_same(tied, dense, x)


@pytest.mark.parametrize("remove", [tp.remove_tie, parametrize.remove_parametrizations])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_s14_untying_gives_a_stock_layer_back(kind, remove):
    tied, dense = twins(kind)
    tp.register_tie(tied, "row_repeat", "weight_ih_l0")
    dense.load_state_dict(tp.dense_state_dict(tied))
    x = torch.randn(3, 5, 4)
    copied = copy.deepcopy(tied)
    for name in (NAME, "weight_ih_l0"):
        remove(copied, name)
    assert_same(copied, dense, x)
    tied(x)
    tied.double().float()
    remove(tied, NAME)
    assert_same(tied, dense, x)
    remove(tied, "weight_ih_l0")
    assert type(tied) is kind
    twin = copy.deepcopy(tied)
    assert_same(tied, dense, x)
    assert_same(twin, dense, x)
    assert all(a is b for a, b in zip(tied._flat_weights, tied.all_weights[0], strict=True))
    with torch.no_grad():
        tied.weight_hh_l0.zero_()
    assert not torch.allclose(tied(x)[0], dense(x)[0])
    assert_same(twin, dense, x)


def test_s14_nothing_keeps_the_replaced_parameter_or_a_computed_weight():
    gc.disable()
    try:
        layer = nn.LSTM(4, 6)
        dense = weakref.ref(getattr(layer, NAME))
        tp.register_tie(layer, "row_repeat", NAME)
        assert dense() is None
        layer(torch.randn(3, 5, 4))
        assert not any(isinstance(w, torch.Tensor) for w in vars(layer)["_flat_weights"])
        kept = weakref.ref(layer)
        del layer
        assert kept() is None
    finally:
        gc.enable()


def test_s14_a_failed_tie_leaves_the_list_of_weights():
    layer = nn.LSTM(4, 6)
    weights = layer._flat_weights
    before = list(weights)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(tp.TieError, match="optimizer"):
        tp.register_tie(layer, "row_repeat", NAME, optimizer=optimizer)
    assert layer._flat_weights is weights
    assert all(a is b for a, b in zip(weights, before, strict=True))


def test_s14_weights_are_computed_once_in_a_forward_and_nowhere_else():
    layer = nn.LSTM(4, 6)
    calls = []
    for name in ("weight_ih_l0", NAME):
        tp.register_tie(layer, "row_repeat", name)
        tp.get_tie(layer, name).register_forward_hook(lambda *_: calls.append(1))
    layer(torch.randn(3, 5, 4))
    assert len(calls) == 2
    layer.double().float()
    layer.flatten_parameters()
    assert len(calls) == 2


def test_s14_a_layer_inside_of_another_ones_forward_has_its_own_weights():
    inner = tp.register_tie(nn.GRU(4, 6), "row_repeat", NAME)

    class Outer(nn.GRU):
        def forward(self, x):
            self.seen = [weight.clone() for weight in inner._flat_weights]
            inner(x)
            self.own = [weight.clone() for weight in self._flat_weights]
            return super().forward(x)

    outer = tp.register_tie(Outer(4, 6), "row_repeat", NAME)
    outer(torch.randn(3, 5, 4))
    assert torch.equal(outer.seen[1], getattr(inner, NAME))
    assert torch.equal(outer.own[1], getattr(outer, NAME))
    assert not torch.equal(outer.own[1], outer.seen[1])


@pytest.mark.feature(
    "Layers", "a copy tie between recurrent layers, deep-copied and pickled with its model"
)
def test_s14_copy_between_recurrent_layers():
    model = nn.ModuleList([nn.GRU(4, 4), nn.GRU(4, 4)])
    tp.register_tie(model[0], "copy", NAME, source=model[1], root=model)
    x = torch.randn(3, 5, 4)
    for replica in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            replica[1].weight_hh_l0.mul_(2)
        assert torch.equal(replica[0].weight_hh_l0, replica[1].weight_hh_l0)
        assert not torch.allclose(replica[0](x)[0], model[0](x)[0])
    model[0](x)[0].sum().backward()
    assert model[1].weight_hh_l0.grad is not None


@pytest.mark.slow
@pytest.mark.feature(
    "Compile and export",
    "`torch.compile` of recurrent layers",
    limit="as on stock ones: outside of the graph, unless `torch._dynamo.config.allow_rnn` is set",
)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_s14_compile(kind):
    tied, dense = twins(kind)
    x = torch.randn(3, 5, 4)
    torch._dynamo.reset()
    compiled = torch.compile(tied, backend="aot_eager")
    assert_same(compiled, dense, x)
    compiled(x)[0].sum().backward()
    assert tied.parametrizations[NAME].original0.grad is not None
    with torch._dynamo.config.patch(allow_rnn=True), torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(tied, backend="aot_eager", fullgraph=True)
        assert_same(compiled, dense, x)
        tied.parametrizations[NAME].original0.mul_(2)
        dense.load_state_dict(tp.dense_state_dict(tied))
        assert_same(compiled, dense, x)  # the weight is part of the graph, not a constant
        tp.remove_tie(tied, NAME)
        if older_than("2.7"):  # which cannot trace how a stock layer collects its tensors
            tied(x)
        assert_same(torch.compile(tied, backend="aot_eager", fullgraph=True), dense, x)


@pytest.mark.feature("Compile and export", "`torch.export` of recurrent layers")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_s14_export(kind):
    tied, dense = twins(kind)
    program = torch.export.export(tied, (torch.randn(3, 5, 4),), strict=False)
    x = torch.randn(3, 5, 4)
    assert_same(program.module(), dense, x)
    assert f"parametrizations.{NAME}.original0" in program.state_dict
    assert NAME not in program.state_dict


def test_s14_functional_call():
    tied, dense = twins(nn.LSTM)
    x = torch.randn(3, 5, 4)
    values = {k: v.detach() * 2 for k, v in tied.named_parameters()}
    output = torch.func.functional_call(tied, values, (x,))
    dense.load_state_dict({k: v * 2 for k, v in tp.dense_state_dict(tied).items()})
    torch.testing.assert_close(output, dense(x))
    gradient = torch.func.grad(
        lambda p: torch.func.functional_call(tied, p, (x,))[0].square().sum()
    )(values)
    dense(x)[0].square().sum().backward()
    (expected,) = tp.get_tie(tied, NAME).adjoint(dense.weight_hh_l0.grad)
    torch.testing.assert_close(gradient[f"parametrizations.{NAME}.original0"], expected)


@pytest.mark.feature("Layers", "`nn.LSTMCell`, `nn.GRUCell`, `nn.RNNCell`")
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell], ids=lambda k: k.__name__)
def test_s14_cells(kind):
    tied = kind(4, 6)
    dense = copy.deepcopy(tied)
    tp.register_tie(tied, "row_repeat", "weight_hh", groups=2)
    tp.register_tie(tied, "row_repeat", "bias_ih", groups=2)
    dense.load_state_dict(tp.dense_state_dict(tied))
    x = torch.randn(3, 4)
    twin = copy.deepcopy(tied)
    for layer in (
        tied,
        twin,
        pickle.loads(pickle.dumps(tied)),
        torch.compile(tied, backend="aot_eager", fullgraph=True),
    ):
        torch.testing.assert_close(layer(x), dense(x))
    first = lambda output: output[0] if isinstance(output, tuple) else output  # noqa: E731
    first(tied(x, None)).square().sum().backward()
    first(dense(x, None)).square().sum().backward()
    (expected,) = tp.get_tie(tied, "weight_hh").adjoint(dense.weight_hh.grad)
    torch.testing.assert_close(tied.parametrizations.weight_hh.original0.grad, expected)
