"""Nothing written into a computed weight is lost in silence."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import tiedparam as tp
from tiedparam.tie.write_guard import GuardedWeight


@torch.library.custom_op("tiedparam_tests::scale", mutates_args={"values"})
def scale(values: torch.Tensor, factor: float) -> None:
    """A user's operator, whose name does not end in an underscore."""
    values.mul_(factor)


def tied_conv() -> nn.Conv2d:
    return tp.register_tie(nn.Conv2d(3, 3, 3), "flip_sym")


def tied_linear() -> nn.Linear:
    return tp.register_tie(nn.Linear(4, 4), "row_repeat")


def linked_linear() -> nn.Linear:
    return tp.register_tie(nn.Linear(4, 4), "copy", source=nn.Linear(4, 4))


def iadd(weight):
    weight += 1


def set_item(weight):
    weight[0] = 0


def set_data(weight):
    weight.data = torch.zeros_like(weight)


def set_grad(weight):
    weight.grad = torch.zeros_like(weight)


def set_requires_grad(weight):
    weight.requires_grad = False


WRITES = {
    "zero_": lambda w: w.zero_(),
    "add_": lambda w: w.add_(1),
    "a user's operator": lambda w: scale(w, 2.0),
    "a user's operator, by keyword": lambda w: torch.ops.tiedparam_tests.scale(
        values=w.detach(), factor=2.0
    ),
    "embedding, max_norm": lambda w: nn.functional.embedding(
        torch.tensor([0]), w.flatten(1), max_norm=1e-3
    ),
    "embedding_bag, max_norm": lambda w: nn.functional.embedding_bag(
        torch.tensor([[0]]), w.detach().flatten(1), max_norm=1e-3
    ),
    "copy_": lambda w: w.copy_(torch.zeros_like(w)),
    "iadd": iadd,
    "item": set_item,
    "data": lambda w: w.data.mul_(2),
    "data_item": lambda w: set_item(w.data),
    "detach": lambda w: w.detach().fill_(0),
    "view": lambda w: w.view(w.shape).zero_(),
    "slice": lambda w: w[0].zero_(),
    "slice_of_data": lambda w: w.data[0][0].zero_(),
    "unbind": lambda w: w.detach().unbind(0)[1].zero_(),
    "transpose": lambda w: w.transpose(0, 1).detach().clamp_(0),
    "set_data": set_data,
    "set_grad": set_grad,
    "set_requires_grad": set_requires_grad,
    "requires_grad_": lambda w: w.requires_grad_(False),
    "out": lambda w: torch.add(torch.ones(()), 1, out=w.detach()),
    "foreach": lambda w: torch._foreach_mul_([w.detach()], 2.0),
    "relu inplace": lambda w: nn.functional.relu(w.detach(), inplace=True),
    "index_fill_": lambda w: w.detach().index_fill_(0, torch.tensor([0]), 1.0),
}
INITS = [
    nn.init.zeros_, nn.init.ones_, nn.init.normal_, nn.init.uniform_, nn.init.xavier_uniform_,
    nn.init.kaiming_normal_, nn.init.kaiming_uniform_, nn.init.orthogonal_, nn.init.trunc_normal_,
]  # fmt: skip


@pytest.mark.parametrize("make", [tied_conv, tied_linear, linked_linear])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("no_grad", [True, False])
def test_s23_in_place_writes_raise_and_change_nothing(make, write, no_grad):
    layer = make()
    before = layer.weight.clone()
    with pytest.raises(tp.TieError, match="would be lost"), torch.set_grad_enabled(not no_grad):
        write(layer.weight)
    assert torch.equal(before, layer.weight)


@pytest.mark.feature(
    "Layers",
    "`nn.init` functions on a tied tensor",
    refused="they would write into a temporary; use `tiedparam.init_`",
)
@pytest.mark.parametrize("make", [tied_conv, tied_linear, linked_linear])
@pytest.mark.parametrize("init_fn", INITS, ids=lambda f: f.__name__)
def test_s23_initialisers_raise(make, init_fn):
    layer = make()
    before = layer.weight.clone()
    with pytest.raises(tp.TieError, match=r"Use tiedparam\.assign_"):
        init_fn(layer.weight)
    with pytest.raises(tp.TieError):
        init_fn(layer.weight.data)
    assert torch.equal(before, layer.weight)


@pytest.mark.parametrize("init_fn", [nn.init.eye_, lambda w: nn.init.sparse_(w, 0.5)])
def test_s23_matrix_initialisers_raise(init_fn):
    layer = tied_linear()
    with pytest.raises(tp.TieError, match="would be lost"):
        init_fn(layer.weight)


def test_s23_a_linked_layer_does_not_initialise_its_source():
    source = nn.Linear(4, 4)
    linked = tp.register_tie(nn.Linear(4, 4), "copy", source=source)
    weight, bias = source.weight.clone(), linked.bias.clone()
    linked.reset_parameters()
    assert torch.equal(source.weight, weight)
    assert not torch.equal(linked.bias, bias)


def test_freezing_names_the_way():
    with pytest.raises(
        tp.TieError, match=r"layer\.parametrizations\.weight\.requires_grad_\(False\)"
    ):
        tied_conv().weight.requires_grad_(False)


def test_reads_see_an_ordinary_tensor():
    layer = tied_conv()
    weight = layer.weight
    plain = layer.parametrizations.weight()
    assert type(plain) is torch.Tensor
    assert torch.equal(weight, plain)
    assert repr(weight.detach()) == repr(plain.detach())
    assert f"{weight.sum():.3f}" == f"{plain.sum():.3f}"
    for derived in (weight.norm(), weight + 1, weight.clone(), weight.square(), weight.half()):
        assert type(derived) is torch.Tensor
    assert weight.clone().zero_().sum() == 0
    assert isinstance(weight, torch.Tensor)
    torch.testing.assert_close(weight, nn.Parameter(plain.detach()))
    torch.testing.assert_close(nn.Parameter(plain.detach()), weight)
    assert weight.numpy(force=True).shape == (3, 3, 3, 3)
    assert weight.tolist() == plain.tolist()
    assert weight.shape == plain.shape


def test_gradients_flow_through_a_guarded_weight():
    layer = tied_conv()
    layer.weight.square().sum().backward()
    guarded = [p.grad.clone() for p in layer.parametrizations.weight.parameters()]
    layer.zero_grad()
    layer.parametrizations.weight().square().sum().backward()
    plain = [p.grad for p in layer.parametrizations.weight.parameters()]
    assert len(guarded) == 1
    assert all(torch.equal(a, b) for a, b in zip(guarded, plain, strict=True))


def test_saved_and_copied_as_an_ordinary_tensor():
    weight = tied_conv().weight.detach()
    assert type(pickle.loads(pickle.dumps(weight))) is torch.Tensor
    assert type(copy.deepcopy(weight)) is torch.Tensor
    assert torch.equal(copy.deepcopy(weight), weight)


def test_a_parameter_made_of_a_weight_is_a_parameter_of_its_own():
    layer, other = tied_linear(), nn.Linear(4, 4)
    other.weight = nn.Parameter(layer.weight)
    assert isinstance(other.weight, nn.Parameter)
    assert other.weight.is_leaf
    assert other.weight.requires_grad
    before = layer.weight.clone()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, before)
    assert not torch.equal(other.weight, before)
    nn.init.zeros_(other.weight)
    for twin in (copy.deepcopy(other), pickle.loads(pickle.dumps(other)), other.double()):
        assert isinstance(twin.weight, nn.Parameter)
        assert twin.weight.sum() == 0
    leaf = layer.weight.detach().requires_grad_()
    leaf.sum().backward()
    assert torch.equal(leaf.grad, torch.ones(4, 4))


def test_unfreezing_a_frozen_weight_is_not_lost():
    layer = tied_linear().requires_grad_(False)
    with pytest.raises(tp.TieError, match="requires_grad_"):
        layer.weight.requires_grad_(True)


def test_the_layer_computes_with_a_plain_tensor(monkeypatch):
    """The guard is not in the way of the stock forward, and not left over after it."""
    seen = []
    linear = nn.functional.linear

    def watched(x, weight, bias=None):
        seen.append(type(weight))
        if x.sum() == 0:
            raise ValueError("from inside")
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", watched)
    layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
    layer(torch.ones(1, 4))
    with pytest.raises(ValueError, match="from inside"):
        layer(torch.zeros(1, 4))
    assert seen == [torch.Tensor, torch.Tensor]
    assert type(layer.weight) is GuardedWeight


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("write", [
    lambda weight: weight.data.clamp_(-0.01, 0.01), lambda weight: weight.mul_(0.5),
    lambda weight: torch.einsum("ij->ji", weight).zero_(),
    lambda weight: torch.transpose(input=weight, dim0=0, dim1=1).zero_(),
    lambda weight: torch.ops.aten.zero_.default(weight),
])  # fmt: skip
def test_s23_a_forward_that_writes_into_its_weight_raises(write, cache):
    class Clamped(nn.Linear):
        def forward(self, x):
            write(self.weight)
            return super().forward(x)

    layer = tp.register_tie(Clamped(4, 4), "flip_sym", cache=cache).eval()
    before = layer.weight.clone()
    with torch.no_grad(), pytest.raises(tp.TieError, match="would be lost"):
        layer(torch.ones(1, 4))
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_a_tied_weight_raise(kind):
    layer = tied_linear()
    with pytest.raises(tp.TieError, match=r"Hook the free values in layer\.parametrizations"):
        getattr(layer.weight, kind)(lambda value: None)


def test_another_layer_inside_forward_stays_guarded():
    inner = tied_linear()

    class Outer(nn.Linear):
        def forward(self, x):
            self.seen = type(inner.weight)
            inner(x)
            self.after = type(self.weight)
            return x

    outer = tp.register_tie(Outer(4, 4), "flip_sym")
    outer(torch.ones(1, 4))
    assert outer.seen is GuardedWeight
    assert outer.after is GuardedWeight  # no stock forward, so it might write


def test_multihead_attention_reads_guarded_weights():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2)
    dense = copy.deepcopy(layer)
    tp.register_tie(layer.out_proj, "flip_sym")
    tp.register_tie(layer, "row_repeat", "in_proj_weight", groups=4)
    dense.load_state_dict(tp.dense_state_dict(layer))
    x = torch.randn(5, 2, 8)
    for mode in (True, False):
        layer.train(mode), dense.train(mode)
        torch.testing.assert_close(layer(x, x, x)[0], dense(x, x, x)[0])
    layer(x, x, x)[0].sum().backward()
    assert layer.out_proj.parametrizations.weight.original0.grad is not None
    assert layer.parametrizations.in_proj_weight.original0.grad is not None


def test_a_weight_that_was_read_keeps_no_layer_alive():
    layer = tp.register_tie(nn.Linear(3, 3), "flip_sym")
    kept = [layer.weight.detach(), layer.weight.data, layer.weight.detach()[0]]
    alive = weakref.ref(layer)
    gc.disable()
    try:
        del layer
        assert alive() is None
    finally:
        gc.enable()
    for weight in kept:
        with pytest.raises(tp.TieError, match="'zero_' on the tied 'weight' would be lost"):
            weight.zero_()


@pytest.mark.parametrize("build", [nn.Embedding, nn.EmbeddingBag])
def test_max_norm_is_not_set_on_a_tied_embedding(build):
    layer = tp.register_tie(build(4, 4), "flip_sym")
    with pytest.raises(tp.TieError, match="cannot set max_norm of the tied 'weight' .* remove_tie"):
        layer.max_norm = 1.0
    assert layer.max_norm is None
    layer.max_norm = None
    tp.remove_tie(layer).max_norm = 1.0


def test_clearing_the_gradient_of_a_weight_that_was_read_is_no_write():
    weight = tied_linear().weight
    weight.grad = None
    with pytest.raises(tp.TieError, match="setting .grad on the tied 'weight'"):
        weight.grad = torch.ones(4, 4)


def test_the_base_of_a_weight_that_was_read_ends():
    """A guarded base would be a view again: whoever follows them, as dynamo does, never ends."""
    view, depth = tied_conv().weight, 0
    while view._is_view():
        view, depth = view._base, depth + 1
        assert depth < 5
    assert depth > 0


@pytest.mark.feature(
    "Compile and export", "functions of your own that are given `layer.weight`, compiled"
)
@pytest.mark.parametrize("of", [lambda w: w, lambda w: w.detach(), lambda w: w.t()])
def test_a_compiled_function_takes_a_weight_that_was_read(of):
    layer = tied_linear()
    x = torch.randn(3, 4)

    def product(x, weight):
        return x @ weight

    def spoil(weight):
        weight.mul_(2)

    compiled = torch.compile(product, backend="aot_eager")
    torch.testing.assert_close(compiled(x, of(layer.weight)), x @ of(layer.weight))
    with torch.no_grad(), pytest.raises(tp.TieError, match="'mul_' on the tied"):
        torch.compile(spoil, backend="eager")(of(layer.weight))
