"""Laws of users that read two layers: what holds for the library's own holds for them."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.cases import assert_refused
from tests.support.users_laws import Shifted
from tiedparam.laws import Linked
from tiedparam.tie.lookup import tie_of


class SumOfTwo(Linked):
    """``W = A + B``: all numbers are the sources'."""

    law = "W = A.W + B.W"

    def forward(self, *sources):
        first, second = sources
        return first + second


class Mixed(Linked):
    """``W = s·A + t·B`` with two numbers of its own."""

    law = "W = s·A.W + t·B.W"

    def free_shapes(self):
        return ((2,),)

    def forward(self, *values):
        first, second, weights = values
        return weights[0] * first + weights[1] * second

    def fit(self, weight, *sources):
        columns = torch.stack([source.flatten() for source in sources], 1)
        return (torch.linalg.lstsq(columns, weight.flatten()).solution,)


@pytest.fixture(autouse=True)
def _registered(registry) -> None:
    tp.register_rule("sum_of_two")(SumOfTwo)
    tp.register_rule("mixed")(Mixed)


def three() -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})


def tied(rule: str, **options) -> nn.ModuleDict:
    model = three()
    tp.register_tie(model["c"], rule, source=["a", "b"], root=model, **options)
    return model


def expected(model: nn.ModuleDict) -> torch.Tensor:
    """By hand, from what the layers hold."""
    a, b = model["a"].weight, model["b"].weight
    if tp.get_tie(model["c"]).name == "sum_of_two":
        return a + b
    s, t = model["c"].parametrizations.weight.original0
    return s * a + t * b


LAWS = pytest.mark.parametrize("rule", ["sum_of_two", "mixed"])


@LAWS
def test_the_law_holds_and_gradients_arrive_in_all_that_it_reads(rule):
    model = tied(rule)
    weight = model["c"].weight
    assert torch.equal(weight, expected(model))
    assert not model["c"].parametrizations.weight.unsafe  # to a reader it is registered as ever
    x = torch.randn(3, 4)
    torch.testing.assert_close(
        model["c"](x), torch.nn.functional.linear(x, expected(model), model["c"].bias)
    )
    cotangent = torch.randn(4, 4)
    parameters = [model["a"].weight, model["b"].weight, *own_values(model)]
    by_hand = torch.autograd.grad(expected(model), parameters, cotangent)
    for got, wanted in zip(
        torch.autograd.grad(weight, parameters, cotangent), by_hand, strict=True
    ):
        torch.testing.assert_close(got, wanted)


def own_values(model: nn.ModuleDict) -> list[nn.Parameter]:
    return list(model["c"].parametrizations.weight.parameters())


def test_own_values_start_nearest_to_the_weight():
    model = three()
    target = 0.5 * model["a"].weight - 2 * model["b"].weight
    with torch.no_grad():
        model["c"].weight.copy_(target)
    tp.register_tie(model["c"], "mixed", source=[model["a"], model["b"]], max_residual=1e-5)
    torch.testing.assert_close(own_values(model)[0].detach(), torch.tensor([0.5, -2.0]))


@LAWS
@pytest.mark.parametrize(
    "replica", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies_read_their_own_layers(rule, replica):
    model = tied(rule)
    twin = replica(model)
    assert torch.equal(twin["c"].weight, model["c"].weight)
    with torch.no_grad():
        twin["a"].weight.zero_()
    assert torch.equal(twin["c"].weight, expected(twin))
    assert not torch.equal(twin["c"].weight, model["c"].weight)
    assert tp.get_tie(twin["c"]).source == (twin["a"], twin["b"])


@LAWS
def test_a_part_without_a_source_is_not_copied(rule):
    model = nn.ModuleDict({"inner": three(), "out": nn.Linear(4, 4)})
    tp.register_tie(model["out"], rule, source=["inner.a", "inner.b"], root=model)
    with pytest.raises(tp.TieError, match="without its source"):
        copy.deepcopy(model["out"])


@LAWS
def test_files_bring_the_law_back(rule, tmp_path):
    model = tied(rule)
    tp.save(model, tmp_path / "tied.safetensors")
    fresh = tp.load(tmp_path / "tied.safetensors", three())
    assert type(tp.get_tie(fresh["c"])) is type(tp.get_tie(model["c"]))
    assert tp.get_tie(fresh["c"]).source == (fresh["a"], fresh["b"])
    for key, value in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value)
    tp.export_dense(model, tmp_path / "dense.safetensors")
    dense = tp.load(tmp_path / "dense.safetensors", three())
    assert torch.equal(dense["c"].weight, model["c"].weight)
    again = tp.load(tmp_path / "dense.safetensors", tied(rule))
    torch.testing.assert_close(again["c"].weight, model["c"].weight)


@LAWS
@pytest.mark.parametrize("order", ["abc", "cba"])
def test_dense_state_dicts_are_taken_whichever_layer_comes_first(rule, order):
    def shuffled(model):
        return nn.ModuleDict({name: model[name] for name in order})

    lawful = tied(rule)
    dense = tp.dense_state_dict(lawful)
    target = shuffled(tied(rule))
    target.load_state_dict(dense)
    torch.testing.assert_close(target["c"].weight, lawful["c"].weight)
    pure = tp.tie_state_dict(lawful, dense)
    assert pure.keys() == lawful.state_dict().keys()
    assert torch.equal(
        tp.untie_state_dict(lawful, lawful.state_dict())["c.weight"], dense["c.weight"]
    )


@pytest.mark.parametrize("order", ["abc", "cba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_what_own_values_cannot_give_is_warned_of_once_all_is_loaded(order, dtype, recwarn):
    lawful = tied("mixed")
    dense = {k: v.to(dtype) for k, v in tp.dense_state_dict(lawful).items()}
    model = nn.ModuleDict({name: layer for name in order for layer in [three()[name]]})
    tp.register_tie(model["c"], "mixed", source=["a", "b"], root=model)
    model.load_state_dict(dense)
    torch.testing.assert_close(model["c"].weight, lawful["c"].weight, rtol=0, atol=2e-3)
    assert not [w for w in recwarn if issubclass(w.category, tp.TieWarning)]
    dense["c.weight"] = dense["c.weight"] + torch.eye(4, dtype=dtype)
    with pytest.warns(tp.TieWarning, match=r"'c\.weight' \(residual"):
        model.load_state_dict(dense)


def chained(order: str, last: str) -> nn.ModuleDict:
    """``c`` reads ``b``, which has values of its own and reads ``a``."""
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in order})
    tp.register_tie(model["b"], Shifted, source="a", root=model)
    law = Shifted if last == "shifted" else last
    tp.register_tie(model["c"], law, source="b", root=model)
    return model


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("last", ["copy", "shifted"])
@pytest.mark.parametrize("order", ["abc", "acb", "bac", "bca", "cab", "cba"])
def test_a_chain_over_own_values_is_loaded_whichever_layer_comes_first(
    order, last, assign, recwarn
):
    lawful, model = chained(order, last), chained(order, last)
    dense = tp.dense_state_dict(lawful)
    model.load_state_dict(dense, assign=assign)
    for name in "abc":
        torch.testing.assert_close(model[name].weight, lawful[name].weight)
    assert tp.tie_state_dict(model, dense).keys() == lawful.state_dict().keys()
    assert not [w for w in recwarn if issubclass(w.category, tp.TieWarning)]


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_own_values_are_assigned_in_the_dtype_of_the_checkpoint(order, dtype):
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in order})
    tp.register_tie(model["b"], Shifted, source="a", root=model)
    dense = {key: value.to(dtype) for key, value in tp.dense_state_dict(model).items()}
    model.load_state_dict(dense, assign=True)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model["b"].weight.dtype == dtype


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_model_on_meta_is_loaded_whichever_layer_comes_first(order):
    lawful = nn.ModuleDict({name: nn.Linear(4, 4) for name in order})
    tp.register_tie(lawful["b"], Shifted, source="a", root=lawful)
    model = copy.deepcopy(lawful).to("meta")
    model.load_state_dict(tp.dense_state_dict(lawful), assign=True)
    torch.testing.assert_close(model["b"].weight, lawful["b"].weight)


class HoldsItsSource(nn.Module):
    """Has a tensor of its own, and the layer that this is tied to inside."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.inner = nn.Linear(4, 4)


@pytest.mark.parametrize("rule", ["copy", Shifted])
def test_a_dense_dictionary_that_nobody_holds_is_loaded_into_a_source_inside(rule):
    lawful, model = HoldsItsSource(), HoldsItsSource()
    for each in (lawful, model):
        tp.register_tie(each, rule, source="inner", root=each)
    model.load_state_dict(tp.dense_state_dict(lawful))
    torch.testing.assert_close(model.weight, lawful.weight)
    assert not any(watch.waiting for watch in tie_of(model).reading.watches)


class AboutMean(Linked):
    """A bias about the means of its own layer's weight."""

    law = "b[o] = mean(W[o]) + s"

    def free_shapes(self):
        return ((1,),)

    def forward(self, weight, shift):
        return weight.mean(1) + shift

    def fit(self, bias, weight):
        return ((bias - weight.mean(1)).mean().reshape(1),)


@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_dictionary_is_loaded_where_a_layer_reads_itself(assign, recwarn):
    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    for layer in layers:
        tp.register_tie(layer, AboutMean, "bias", source=layer, source_name="weight")
    layers[0].load_state_dict(tp.dense_state_dict(layers[1]), assign=assign)
    torch.testing.assert_close(layers[0].bias, layers[1].bias)
    assert not recwarn.list


def test_an_entry_for_own_values_whose_source_was_exchanged_is_refused():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "ab"})
    tp.register_tie(model["b"], Shifted, source="a", root=model)
    model["a"] = nn.Linear(4, 4)
    with pytest.raises(tp.TieError, match="was exchanged for another module"):
        model.load_state_dict(three().state_dict(), strict=False)


def test_a_dense_entry_that_no_own_value_could_give_is_refused():
    model = tied("sum_of_two")
    dense = tp.dense_state_dict(model)
    dense["c.weight"] = dense["c.weight"] + 1
    with pytest.raises(RuntimeError, match="disagrees with its source"):
        model.load_state_dict(dense)
    with pytest.raises(tp.TieError, match="disagrees with its source"):
        tp.tie_state_dict(model, dense)


@LAWS
def test_compiled_whole(rule):
    torch._dynamo.reset()
    model = tied(rule)
    x = torch.randn(2, 4)
    compiled = torch.compile(model["c"], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model["c"](x))


@LAWS
def test_whole_models_plan_tie_untie(rule, tmp_path):
    model = three()
    plan = tp.Plan([tp.PlanEntry("c", rule, options={"source": ["a", "b"]})])
    report = tp.tie_model(model, plan)
    assert [row["layer"] for row in report.rows()] == ["c"]
    weight = model["c"].weight.detach().clone()
    tp.write_plan(plan, tmp_path / "plan.toml")
    assert list(tp.read_plan(tmp_path / "plan.toml").entries) == list(plan.entries)
    tp.untie_model(model)
    assert not tp.is_tied(model)
    assert torch.equal(model["c"].weight, weight)
    assert not any(layer._load_state_dict_post_hooks for layer in model.values())


def test_an_exchanged_source_is_noticed_whichever_it_is():
    model = tied("sum_of_two")
    model["b"] = nn.Linear(4, 4)
    with pytest.raises(tp.TieError, match="the source 'b' .* was exchanged"):
        model["c"].weight  # noqa: B018
    tp.register_tie(model["c"], "sum_of_two", source=["a", "b"], root=model)
    assert torch.equal(model["c"].weight, expected(model))


def exchange(model):
    model["a"] = nn.Linear(4, 4)


def resize(model):
    model["a"].weight = nn.Parameter(torch.randn(6, 4))


@pytest.mark.parametrize("spoil", [exchange, resize])
def test_one_call_fits_own_values_to_what_became_of_the_source(spoil):
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "ab"})
    tp.register_tie(model["b"], Shifted, source="a", root=model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    was, old = model["b"].weight.detach().clone(), model["a"]
    spoil(model)
    tp.register_tie(model["b"], Shifted, source="a", root=model)
    now = model["a"].weight.detach()
    if spoil is exchange:
        torch.testing.assert_close(model["b"].weight, now + (was - now).mean(0))
    row = model["b"].parametrizations.weight.original0
    assert torch.equal(model["b"].weight, model["a"].weight + row)
    hooks = [len(layer._load_state_dict_post_hooks) for layer in (old, model["a"])]
    assert hooks == ([0, 1] if spoil is exchange else [1, 1])
    model["b"].weight.sum().backward()
    with pytest.raises(tp.TieError, match="a free value of 'b.weight'"):
        optimizer.step()


def test_without_a_tensor_to_fit_own_values_to_nothing_is_renewed():
    model = three()
    tp.register_tie(model["b"], Shifted, source="a", root=model)
    row = model["b"].parametrizations.weight.original0
    weight = model["a"].weight
    del model["a"].weight
    with pytest.raises(tp.TieError, match="Give the source its tensor back first"):
        tp.register_tie(model["b"], Shifted, source="c", root=model)
    assert not model["c"]._load_state_dict_post_hooks
    model["a"].weight = weight
    assert model["b"].parametrizations.weight.original0 is row
    assert torch.equal(model["b"].weight, weight + row)


class Aliases(Linked):
    """Its fit gives back tensors that are not its own."""

    law = "W = (A.W + w)/2"

    def free_shapes(self):
        return (self.bound_layout.shape,)

    def forward(self, source, own):
        return (source + own) / 2

    def fit(self, weight, source):
        return (source,)


@pytest.mark.filterwarnings("ignore:the tie of")
def test_own_values_are_in_storage_of_their_own():
    model = three()
    tp.register_tie(model["b"], Aliases, source="a", root=model)
    (own,) = tie_of(model["b"]).free
    assert torch.equal(own, model["a"].weight)
    assert own.data_ptr() != model["a"].weight.data_ptr()


def written(weight, source):
    return (weight.sub_(source).mean(0),)


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (lambda self, w, a: w[0].clone(), "its fit returns a tensor. Return a tuple"),
        (lambda self, w, a: (), "its fit returns nothing, and its free_shapes say (4,)"),
        (lambda self, w, a: (w[0], w[0]), "its fit returns (4,), (4,), and its free_shapes"),
        (lambda self, w, a: (w,), "its fit returns (4, 4), and its free_shapes say (4,)"),
        (lambda self, w, a: written(w, a), "its fit changes the weight in place"),
    ],
    ids=["no sequence", "too few", "too many", "shape", "in place"],
)
def test_a_fit_that_gives_other_values_than_free_shapes_says_is_refused(fit, message):
    body = {"fit": fit, "forward": lambda self, source, *rows: source + sum(rows)}
    model = three()
    assert_refused(model["b"], type("Faulty", (Shifted,), body), message, source=model["a"])


def test_assigning_to_own_values_fits_them():
    model = tied("mixed")
    value = (3 * model["a"].weight + model["b"].weight).detach()
    tp.assign_(model["c"], value, project=True)
    torch.testing.assert_close(model["c"].weight.detach(), value)
    with pytest.raises(tp.TieError, match="breaks the law"):
        tp.assign_(model["c"], torch.eye(4))
    with pytest.raises(tp.TieError, match="computed from another layer's tensor"):
        tp.assign_(tied("sum_of_two")["c"], value)


def test_initialising_fits_own_values_and_leaves_the_source():
    model = three()
    tp.register_tie(model["b"], Shifted, source="a", root=model)
    (row,) = tie_of(model["b"]).free
    source = model["a"].weight.detach().clone()
    tp.init_(model["b"], nn.init.zeros_)
    torch.testing.assert_close(row.detach(), -source.mean(0))
    torch.manual_seed(0)
    model["b"].reset_parameters()
    torch.manual_seed(0)
    fresh = nn.Linear(4, 4)
    torch.testing.assert_close(row.detach(), (fresh.weight.detach() - source).mean(0))
    assert torch.equal(model["a"].weight, source)


def test_a_fresh_weight_is_not_warned_of_since_rescaling_is_refused(recwarn):
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in "ab"})
    with pytest.raises(tp.TieError, match="no stored value is an entry of the weight"):
        tp.register_tie(model["b"], Shifted, source="a", root=model, init="rescale")
    tp.register_tie(model["b"], Shifted, source="a", root=model)
    assert not recwarn.list


def test_the_remedy_is_what_helps():
    model = three()
    tp.register_tie(model["b"], Shifted, source="a", root=model)
    model["b"](torch.ones(1, 4)).sum().backward()
    with pytest.raises(tp.TieError, match="many gradients of a weight") as caught:
        tp.remove_tie(model["b"])
    assert caught.value.remedy == "Call zero_grad first."
    model.zero_grad()
    tp.remove_tie(model["b"])


@pytest.mark.feature(
    "Optimizers",
    "laws that read layers and have values of their own",
    limit="the state of an optimizer that has stepped starts anew, with a warning",
)
def test_optimizers_hold_the_own_values_and_start_their_state_anew():
    model = three()
    fresh = torch.optim.Adam(model.parameters())
    tp.register_tie(model["c"], "mixed", source=["a", "b"], root=model, optimizer=fresh)
    assert any(p is own_values(model)[0] for p in fresh.param_groups[0]["params"])
    model["c"](torch.ones(1, 4)).sum().backward()
    fresh.step()
    assert torch.equal(model["c"].weight, expected(model))
    other = three()
    stepped = torch.optim.Adam(other.parameters())
    other["c"](torch.ones(1, 4)).sum().backward()
    stepped.step()
    tie = partial(tp.register_tie, other["c"], "mixed", source=["a", "b"], root=other)
    with pytest.warns(tp.TieWarning, match=r"the Adam starts the state .* anew: no stored value"):
        tie(optimizer=stepped)
    (values,) = own_values(other)
    assert not stepped.state.get(values)
    assert stepped.state[other["c"].bias]  # that of others stays
    stepped.step()  # by the gradient that was pending
    assert stepped.state[values]["step"] == 1
    with pytest.raises(tp.TieError, match="many gradients of a weight .* Call zero_grad first"):
        tp.remove_tie(other["c"], optimizer=stepped)
    other.zero_grad()
    with pytest.warns(tp.TieWarning, match="the Adam starts the state"):
        tp.remove_tie(other["c"], optimizer=stepped)
    assert any(p is other["c"].weight for p in stepped.param_groups[0]["params"])


def test_a_pending_gradient_goes_to_values_and_sources_by_the_chain_rule():
    dense = three().double()
    with torch.no_grad():  # so that tying changes no number
        dense["c"].weight.copy_(0.5 * dense["a"].weight - 2 * dense["b"].weight)
    before = copy.deepcopy(dense)
    tp.register_tie(before["c"], "mixed", source=["a", "b"], root=before)
    x = torch.randn(3, 4, dtype=torch.float64)
    for model in (dense, before):
        (model["c"](x).pow(3).sum() + model["a"](x).sum()).backward()
    tp.register_tie(dense["c"], "mixed", source=["a", "b"], root=dense)
    for found, wanted in zip(dense.parameters(), before.parameters(), strict=True):
        assert (found.grad is None) == (wanted.grad is None)
        if wanted.grad is not None:
            torch.testing.assert_close(found.grad, wanted.grad)


def test_they_have_no_orbits():
    rule, weight = tp.get_tie(tied("mixed")["c"]), torch.ones(4, 4)
    for ask in (rule.multiplicities, rule.orbit_labels, lambda: rule.adjoint(weight)):
        with pytest.raises(NotImplementedError, match=r"'mixed' has no orbits: .* other layers"):
            ask()
    pure = tp.get_tie(tied("sum_of_two")["c"])
    assert pure.multiplicities() == pure.adjoint(weight) == ()
    with pytest.raises(NotImplementedError, match="has no orbits"):
        pure.orbit_labels()


def test_what_the_law_gives_or_cannot_do_is_told_for_this_law():
    with pytest.raises(tp.TieError, match="no stored value is an entry of the weight"):
        tied("mixed", init="rescale")
    wide = nn.ModuleDict({"a": nn.Linear(4, 5), "b": nn.Linear(4, 5), "c": nn.Linear(4, 4)})
    with pytest.raises(tp.TieError, match=r"gives \(5, 4\)") as refused:
        tp.register_tie(wide["c"], "sum_of_two", source=["a", "b"], root=wide)
    assert (
        refused.value.remedy
        == "Use 'copy' with an fn= whose result has this shape, or correct the rule."
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (["a"], "raised ValueError"),
        (["a", "c"], "would form a cycle"),
        (["a", "x"], "no layer 'x'"),
    ],
)
def test_sources_that_do_not_fit_are_told(source, message):
    model = three()
    with pytest.raises(tp.TieError, match=message) as refused:
        tp.register_tie(model["c"], "sum_of_two", source=source, root=model)
    assert refused.value.remedy
    assert not tp.is_tied(model)


def test_torch_alone_cannot_tie_by_such_a_law():
    model = three()
    with pytest.raises(tp.TieError, match=r"reads other layers.*register_tie"):
        torch.nn.utils.parametrize.register_parametrization(
            model["c"], "weight", SumOfTwo([model["a"], model["b"]])
        )
    assert type(model["c"]) is nn.Linear


@LAWS
def test_shown_and_reported(rule):
    model = tied(rule)
    assert "reads a.weight in this ModuleDict, b.weight in this ModuleDict" in repr(model)
    assert "c" in str(tp.report(model))


def test_inference_keeps_it_and_frozen_holds_it():
    model = tied("mixed").eval()
    x = torch.randn(2, 4)
    with torch.no_grad():
        before = model["c"](x)
        with tp.frozen(model):
            assert torch.equal(model["c"](x), before)


def test_a_shallow_clone_reads_its_own_layers():
    def clone(module):
        made = module.__new__(type(module))
        made.__dict__ = dict(module.__dict__)
        for table in ("_parameters", "_buffers"):
            made.__dict__[table] = {
                k: v.clone() if v is not None else None for k, v in module.__dict__[table].items()
            }
        made.__dict__["_modules"] = {
            k: clone(v) if v is not None else None for k, v in module._modules.items()
        }
        return made

    model = tied("sum_of_two")
    twin = clone(model)
    with torch.no_grad():
        twin["b"].weight.zero_()
    assert torch.equal(twin["c"].weight, twin["a"].weight)
    assert torch.equal(model["c"].weight, expected(model))
