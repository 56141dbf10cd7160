"""What ``source=`` and ``fn=`` of a copy may be, and how ``print(model)`` shows the source."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import nn

import tiedparam as tp


def two() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def source_of(layer: nn.Module, tensor_name: str = "weight") -> tuple[nn.Module, str]:
    ((layer, name),) = tp.get_tie(layer, tensor_name).sources()
    return layer, name


@pytest.mark.parametrize("tied", [False, True], ids=["a Parameter", "a tied weight"])
def test_the_source_may_be_the_tensor_itself(tied):
    net = two()
    if tied:
        tp.register_tie(net[0], "flip_sym")
    tp.register_tie(net[1], "copy", source=net[0].weight, root=net)
    assert source_of(net[1]) == (net[0], "weight")
    tp.register_tie(net[1], "copy", "bias", source=net[0].bias, root=net)
    assert source_of(net[1], "bias") == (net[0], "bias")
    net[0].bias.data.add_(1)
    assert torch.equal(net[1].weight, net[0].weight)
    assert torch.equal(net[1].bias, net[0].bias)


def test_a_tied_weight_knows_its_layer_without_the_model():
    net = two()
    tp.register_tie(net[0], "flip_sym")
    tp.register_tie(net[1], "copy", source=net[0].weight)
    assert source_of(net[1]) == (net[0], "weight")


REFUSED = {
    "a Parameter of another model": (
        lambda net: {"source": nn.Linear(4, 4).weight, "root": net},
        "a Parameter that no layer of the model holds",
    ),
    "a free value": (
        lambda net: {
            "source": tp.register_tie(net[0], "flip_sym").parametrizations.weight.original0,
            "root": net,
        },
        "a Parameter that no layer of the model holds",
    ),
    "a path, the model unknown": (
        lambda net: {"source": "0.weight"},
        "the source '0.weight' is a path, and the model is unknown. Pass root=model",
    ),
    "a path of nothing": (
        lambda net: {"source": "0.wieght", "root": net},
        "the model has no layer '0.wieght'. Correct source=",
    ),
    "a path of a layer's size": (
        lambda net: {"source": "0.in_features", "root": net},
        "the model has no layer '0.in_features'. Correct source=",
    ),
    "two names": (
        lambda net: {"source": "0.weight", "source_name": "bias", "root": net},
        r"source= means the tensor 'weight', and source_name= says 'bias'\. Leave one",
    ),
    "two names, by tensor": (
        lambda net: {"source": net[0].weight, "source_name": "bias", "root": net},
        r"source= means the tensor 'weight', and source_name= says 'bias'\. Leave one",
    ),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_source_that_is_not_found_shows_the_right_call(given, message):
    net = two()
    arguments = given(net)
    with pytest.raises(tp.TieError, match=message):
        tp.register_tie(net[1], "copy", **arguments)
    assert not tp.is_tied(net[1])


def test_a_tensor_without_its_layer_shows_the_right_call():
    net = two()
    with pytest.raises(TypeError, match="a Parameter, which does not know its layer") as caught:
        tp.register_tie(net[1], "copy", source=net[0].weight)
    call = re.search(r"\((source=.*)\), or root=model", str(caught.value))[1]
    eval(f"register_tie(net[1], 'copy', {call})", {**vars(tp), "net": net, "layer": net[0]})
    assert source_of(net[1]) == (net[0], "weight")
    tp.register_tie(net[0], "flip_sym")
    for made in (net[0].weight.t(), net[0].weight.detach() + 0, net[0].bias * 2):
        with pytest.raises(TypeError, match=r"a tensor that no layer holds.*fn=torch\.t"):
            tp.register_tie(nn.Linear(4, 4), "copy", source=made, root=net)


def test_a_source_of_another_type_is_told_in_one_line():
    with pytest.raises(TypeError, match=r"source= takes the layer .* not dict$"):
        tp.register_tie(nn.Linear(4, 4), "copy", source={"a": nn.Linear(4, 4)})


def test_the_path_of_a_tensor():
    net = two()
    tp.register_tie(net[1], "copy", source="0.weight", root=net)
    assert source_of(net[1]) == (net[0], "weight")
    tp.register_tie(net[1], "copy", "bias", source="0.weight", fn=lambda w: w.sum(1), root=net)
    assert source_of(net[1], "bias") == (net[0], "weight")  # and not the source's bias
    assert torch.equal(net[1].bias, net[0].weight.sum(1))


def test_the_path_of_a_tensor_of_the_model_itself():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.layer = nn.Linear(4, 4)

    net = Own()
    tp.register_tie(net.layer, "copy", source="weight", root=net)
    assert source_of(net.layer) == (net, "weight")


@pytest.mark.parametrize("given", ["a.weight", "parameter"])
def test_a_plan_takes_them_and_ties_the_source_first(given):
    net = nn.ModuleDict({"b": nn.Linear(4, 4), "a": nn.Linear(4, 4)})
    with torch.no_grad():  # lawful for what the source will hold, and not for what it holds
        net["b"].weight.copy_((net["a"].weight + net["a"].weight.t()) / 2)
    source = net["a"].weight if given == "parameter" else given
    plan = {"b": ("copy", {"source": source, "init": "exact"}), "a": "flip_sym"}
    tp.tie_model(net, plan)
    assert source_of(net["b"]) == (net["a"], "weight")


def test_a_path_of_a_tensor_is_saved_and_loaded(tmp_path):
    net = two()
    tp.register_tie(net[1], "copy", source="0.weight", root=net)
    tp.save(net, tmp_path / "a.safetensors")
    loaded = tp.load(tmp_path / "a.safetensors", two())
    assert source_of(loaded[1]) == (loaded[0], "weight")
    tp.write_plan({"1": ("copy", {"source": "0.weight", "fn": "t"})}, tmp_path / "plan.toml")
    other = two()
    tp.tie_model(other, tp.read_plan(tmp_path / "plan.toml"))
    assert torch.equal(other[1].weight, other[0].weight.t())


# fn= -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t", "torch.t"])
def test_a_function_by_its_name(name):
    net = two()
    tp.register_tie(net[1], "copy", source=net[0], fn=name)
    assert torch.equal(net[1].weight, net[0].weight.t())
    assert tp.get_tie(net[1]).fn is torch.t
    assert str(tp.get_tie(net[1])) == "copy(fn='t')"  # which can be typed


def test_a_function_of_an_unknown_name_shows_those_that_have_one():
    layer = nn.Linear(4, 4)
    with pytest.raises(tp.TieError, match=r"fn='transpose' .*torch\.t.* In Python pass your own"):
        tp.register_tie(layer, "copy", source=nn.Linear(4, 4), fn="transpose")
    assert not tp.is_tied(layer)


# print(model) ----------------------------------------------------------------------------------


def shown(layer: nn.Module) -> str:
    return re.search(r"\n *(reads .*)\n", repr(layer))[1]


def test_print_shows_which_source_a_copy_reads():
    net = nn.ModuleDict({"encoder": two(), "head": nn.Linear(4, 4)})
    tp.register_tie(net["head"], "copy", source="encoder.1", root=net)
    assert shown(net["head"]) == "reads encoder.1.weight in this ModuleDict"
    assert "Copy(copy: W = fn(source.W); 0 of 16 values)" in repr(net["head"])
    assert shown(net["head"]) in repr(net)
    other = tp.register_tie(nn.Linear(4, 4), "squared_copy", "bias", source=net["encoder"][0])
    assert shown(other) == "reads bias of Linear(in_features=4, out_features=4, bias=True)"


@pytest.mark.parametrize("replica", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_print_of_a_copy_of_the_model(replica):
    net = two()
    tp.register_tie(net[1], "copy", source="0", root=net)
    before = repr(net)
    assert repr(replica(net)) == before


def test_print_says_that_a_source_was_exchanged():
    net = two()
    tp.register_tie(net[1], "copy", source="0", root=net)
    net[0] = nn.Linear(4, 4)
    assert shown(net[1]) == "reads a source that was exchanged"
    del net[0]
    assert "a source that was exchanged" in repr(net)


def test_print_of_rules_that_are_not_used_yet():
    kind = tp.available_rules()["copy"]
    assert "reads source 'encoder'" in repr(kind("encoder"))
    assert "reads a source that is not found yet" in repr(kind(nn.Linear(2, 2).weight))


def test_print_is_of_bounded_length():
    class Wordy(nn.Linear):
        def extra_repr(self) -> str:
            return 10_000 * "x"

    layer = tp.register_tie(nn.Linear(4, 4), "copy", source=Wordy(4, 4))
    assert len(shown(layer)) < 200
    net = nn.ModuleDict({500 * "a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    tp.register_tie(net["b"], "copy", source=500 * "a", root=net)
    assert len(shown(net["b"])) < 200
