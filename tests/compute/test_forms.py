"""Which form is taken, and when."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support import computing_of
from tiedparam.compute import forms
from tiedparam.laws import form
from tiedparam.rules import Circulant

COSTS: dict[str, float] = {}
CALLS: list[tuple] = []


def cost_of(name):
    return lambda rule, use: COSTS.get(name, 2.0) if use.kind == "linear" else None


class Offers(Circulant):
    """A law with three forms, all of them right, that note their calls."""

    def forward(self, *free):
        CALLS.append(("dense",))
        return super().forward(*free)

    def computed(self, name, call):
        CALLS.append((name, call.use.rows, call.use.training, call.asked))
        return call.stock(call.input, Circulant.forward(self, *call.free), call.bias)

    @form("eager", cost=cost_of("eager"))
    def eagerly(self, call):
        return self.computed("eager", call)

    @form("compiled", cost=cost_of("compiled"), where="compiled")
    def as_one_node(self, call):
        return self.computed("compiled", call)

    @form("anywhere", cost=cost_of("anywhere"), where="anywhere")
    def anywhere(self, call):
        return self.computed("anywhere", call)

    @form("refuses", cost=cost_of("refuses"), where="anywhere")
    def refuses(self, call):
        CALLS.append(("refuses",))


def tied(compute="auto", **costs):
    COSTS.clear()
    COSTS.update(costs)
    rule = Offers()
    rule.compute = compute
    return tp.register_tie(nn.Linear(4, 4), rule, init="rescale")


def computed_by(layer, x, *, grad=False) -> list[str]:
    CALLS.clear()
    with torch.set_grad_enabled(grad):
        y = layer(x)
    names = [call[0] for call in CALLS]
    CALLS.clear()
    with torch.no_grad():
        expected = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(y.detach(), expected, rtol=1e-2, atol=1e-2)
    return names


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_the_cheapest_form_is_taken_and_dense_if_none_is_worth_it():
    assert computed_by(tied(), X) == ["dense"]
    assert computed_by(tied(eager=0.5, anywhere=0.4), X) == ["anywhere"]
    assert computed_by(tied(eager=0.4, anywhere=0.5), X) == ["eager"]
    assert computed_by(tied(eager=forms.WORTHWHILE), X) == ["dense"]
    assert computed_by(tied(eager=forms.WORTHWHILE - 0.01), X) == ["eager"]


def test_a_form_that_does_not_serve_gives_way_to_the_next():
    assert computed_by(tied(refuses=0.1, eager=0.2), X) == ["refuses", "eager"]
    assert computed_by(tied(refuses=0.1), X) == ["refuses", "dense"]


def test_costs_may_depend_on_the_use():
    seen = []

    class Asks(Circulant):
        @form("asks", cost=lambda rule, use: seen.append(use) or 2.0)
        def asks(self, call):
            raise AssertionError

    layer = tp.register_tie(nn.Linear(4, 4), Asks, init="rescale")
    seen.clear()
    for rows in (1, 3, 2, 5, 4):
        with torch.no_grad():
            layer(torch.randn(rows, 4))
    layer(torch.randn(2, 4, 4))
    layer.eval()
    with tp.frozen(layer), torch.no_grad():
        layer(torch.randn(1, 4))
    assert {use.kind for use in seen} == {"linear"}
    calls = [(use.rows, use.training, use.kept) for use in seen if use.rows is not None]
    assert calls == [  # the next smaller power of 2, each asked for once
        (1, False, False), (2, False, False), (4, False, False), (8, True, False), (1, False, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("grad", "frozen", "training"),
    [(True, False, True), (True, True, False), (False, False, False)],
)
def test_training_means_that_gradients_are_recorded(grad, frozen, training):
    layer = tied(eager=0.1).requires_grad_(not frozen)
    CALLS.clear()
    with torch.set_grad_enabled(grad):
        layer(X)
    assert [("eager", None, training, False)] == CALLS


def test_a_form_that_is_named_is_taken_whatever_it_costs():
    layer = tied(compute="eager", eager=3.0, anywhere=0.1)
    assert computed_by(layer, X) == ["eager"]
    CALLS.clear()
    layer(X)
    assert CALLS == [("eager", None, True, True)]
    assert computed_by(tied(compute="dense", eager=0.1), X) == ["dense"]
    assert computed_by(tied(compute="refuses", anywhere=0.1), X) == ["refuses", "anywhere"]
    with pytest.raises(tp.TieError, match="compute='fast' is not a form of .*on this layer"):
        tied(compute="fast")


def test_where_a_form_can_run():
    layer = tied(eager=0.1, compiled=0.2, anywhere=0.3)
    assert computed_by(layer, X) == ["eager"]
    assert computed_by(layer, X[:0]) == ["eager"]
    with torch.autocast("cpu", torch.bfloat16):
        assert computed_by(layer, X) == ["anywhere"]
    assert computed_by(copy.deepcopy(layer).bfloat16(), X.bfloat16()) == ["anywhere"]
    assert computed_by(copy.deepcopy(layer).double(), X.double()) == ["eager"]
    CALLS.clear()
    with torch.no_grad():
        torch.func.vmap(layer)(X)
        torch.func.jvp(layer, (X,), (X,))
    layer.to("meta")(X.to("meta"))
    assert [call[0] for call in CALLS] == ["anywhere"] * 3
    layer = tied(eager=0.1, compiled=0.2, anywhere=0.3)
    CALLS.clear()
    torch.jit.trace(layer, X, check_trace=False)  # which reads the weight besides
    assert {call[0] for call in CALLS} == {"anywhere", "dense"}


def test_compiled_graphs_take_forms_that_can_be_nodes_and_exports_do_not():
    taken = []

    class Nodes(Circulant):
        @form("eager", cost=lambda rule, use: 0.1)
        def eagerly(self, call):
            raise AssertionError("not in a graph")

        @form("compiled", cost=lambda rule, use: 0.2 if use.rows is None else 2.0, where="compiled")
        def as_one_node(self, call):
            taken.append("compiled")
            return call.stock(call.input, Circulant.forward(self, *call.free), call.bias)

    layer = tp.register_tie(nn.Linear(4, 4), Nodes, init="rescale")
    torch.compile(layer, fullgraph=True, backend="eager")(X)
    assert taken == ["compiled"]
    for strict in (False, True):
        torch.export.export(layer, (X,), strict=strict)
    assert taken == ["compiled"]


def offered(law) -> set[str]:
    computing = computing_of(tp.register_tie(nn.Linear(4, 4), law, init="rescale"))
    return set() if computing is None else set(computing.forms)


def test_no_form_of_a_base_whose_forward_was_replaced():
    class Other(Offers):
        def forward(self, *free):
            return 2 * super().forward(*free)

    class Further(Other):
        @form("own", cost=lambda rule, use: 0.5)
        def own(self, call):
            return None

    assert offered(Offers) == {"eager", "compiled", "anywhere", "refuses"}
    assert offered(Other) == set()
    assert offered(Further) == {"own"}


def test_a_method_that_overrides_a_form_without_the_mark_is_none():
    class Plain(Offers):
        def eagerly(self, call):
            return None

    assert "eager" not in offered(Plain)


def test_copies_and_pickles_compute_as_the_layer_does():
    layer = tied(eager=0.1)
    assert computed_by(copy.deepcopy(layer), X) == ["eager"]
    assert computed_by(pickle.loads(pickle.dumps(layer)), X) == ["eager"]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert computed_by(torch.load(file, weights_only=False), X) == ["eager"]


def test_layers_without_forms_keep_nothing():
    layer = tp.register_tie(nn.Embedding(4, 4), Offers)
    assert computing_of(layer) is None
    bias = tp.register_tie(nn.Linear(4, 4), "row_repeat", "bias")
    assert computing_of(bias, "bias") is None
    conv = tp.register_tie(nn.Conv2d(4, 4, 1), "flip_sym")
    assert conv.weight.shape == (4, 4, 1, 1)


def right(self, call):
    return None


@pytest.mark.parametrize(
    ("given", "method", "fact"),
    [
        ({"name": "two words", "cost": cost_of("")}, right, "'two words' is not a name"),
        ({"name": 3, "cost": cost_of("")}, right, "3 is not a name"),
        ({"name": "dense", "cost": cost_of("")}, right, "compute='dense' has a meaning of its own"),
        ({"name": "one", "cost": 0.5}, right, "cost is 0.5, and not a function"),
        ({"name": "one", "cost": lambda use: 0.5}, right, r"cost is .*\(use\), and not a function"),
        ({"name": "one", "cost": cost_of(""), "multiply_adds": 3}, right, "multiply_adds is 3"),
        ({"name": "one", "cost": cost_of(""), "where": "cuda"}, right, "where='cuda' is unknown"),
        ({"name": "one", "cost": cost_of("")}, lambda self: None, r"it marks .*\(self\), and not"),
        ({"name": "one", "cost": cost_of("")}, property(right), "it marks .*property"),
    ],
)
def test_a_form_that_could_not_be_called_is_refused_where_it_is_defined(given, method, fact):
    with pytest.raises(tp.TieError, match=fact) as caught:
        form(given.pop("name"), **given)(method)
    assert caught.value.remedy


def test_two_forms_of_one_name_are_refused_in_one_class_and_replace_each_other_in_two():
    with pytest.raises(tp.TieError, match="Twice has two of it: first and second"):

        class Twice(Circulant):
            @form("one", cost=cost_of("eager"))
            def first(self, call):
                return None

            @form("one", cost=cost_of("eager"))
            def second(self, call):
                return None

    class Once(Offers):
        @form("eager", cost=cost_of("eager"))
        def another(self, call):
            return None

    assert "eager" in offered(Once)
