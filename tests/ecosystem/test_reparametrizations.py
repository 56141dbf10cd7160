"""torch's own reparametrizations, old and new, on tied layers and under new ties."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import tiedparam as tp
from tests.support.cases import assert_satisfies

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # old weight_norm is deprecated


def tied_linear(rule: str = "flip_sym") -> nn.Linear:
    return tp.register_tie(nn.Linear(4, 4), rule)


def everything(layer: nn.Module):
    """All that a tool might have touched, to the object."""
    tables = ("_parameters", "_buffers", "_modules", "_forward_pre_hooks", "_forward_hooks")
    listed = layer.parametrizations.weight if parametrize.is_parametrized(layer) else ()
    return (
        type(layer),
        # (a tensor there is what an old tool's hook computed anew)
        {k: id(v) for k, v in layer.__dict__.items() if not isinstance(v, torch.Tensor)},
        {name: [(k, id(v)) for k, v in getattr(layer, name).items()] for name in tables},
        [id(parametrization) for parametrization in listed],
        {k: v.tolist() for k, v in layer.state_dict().items()},
        layer(torch.ones(1, 4)).tolist(),
    )


OLD = {
    "weight_norm": nn.utils.weight_norm,
    "prune.l1_unstructured": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "prune.ln_structured": lambda m: prune.ln_structured(m, "weight", 0.5, 2, 0),
    "prune.custom_from_mask": lambda m: prune.custom_from_mask(m, "weight", torch.eye(4)),
    "prune.global_unstructured": lambda m: prune.global_unstructured(
        [(m, "weight")], prune.L1Unstructured, amount=0.5
    ),
}


@pytest.mark.feature(
    "Other parametrizations",
    "`torch.nn.utils.weight_norm` and `prune` on a tied tensor",
    refused="they replace the Parameter; untie first",
)
@pytest.mark.parametrize("rule", ["flip_sym", "row_repeat"])
@pytest.mark.parametrize("tool", OLD)
def test_old_tools_on_a_tied_tensor_raise_and_change_nothing(tool, rule):
    layer = tied_linear(rule)
    before = everything(layer)
    name = "weight_norm" if tool == "weight_norm" else "prune"
    with pytest.raises(tp.TieError, match=rf"nn\.utils\.{name} on the tied 'weight'.*remove_tie"):
        OLD[tool](layer)
    assert everything(layer) == before
    tp.remove_tie(layer)
    OLD[tool](layer)  # the way that the message names
    layer(torch.ones(1, 4))


@pytest.mark.feature(
    "Other parametrizations",
    "`torch.nn.utils.spectral_norm` (the old one) on a tied tensor",
    refused="torch raises `KeyError`; use `torch.nn.utils.parametrizations.spectral_norm`",
)
def test_old_spectral_norm_raises_and_changes_nothing():
    layer = tied_linear()
    before = everything(layer)
    with pytest.raises(KeyError, match="weight"):
        nn.utils.spectral_norm(layer)
    assert everything(layer) == before


@pytest.mark.feature(
    "Other parametrizations",
    "tying a tensor that old `weight_norm`, `spectral_norm` or `prune` computes",
    refused="remove that one first, or tie the Parameter that it made, such as `weight_orig`",
)
@pytest.mark.parametrize(
    ("tool", "stored"),
    [
        (nn.utils.weight_norm, "weight_v"),
        (nn.utils.spectral_norm, "weight_orig"),
        (OLD["prune.l1_unstructured"], "weight_orig"),
    ],
)
def test_tying_what_an_old_tool_computes(tool, stored):
    layer = nn.Linear(4, 4)
    tool(layer)
    layer.eval()(torch.ones(1, 4))
    before = everything(layer)
    with pytest.raises(tp.TieError, match=r"computed by a hook.*Remove that first"):
        tp.register_tie(layer, "flip_sym")
    assert everything(layer) == before
    tp.register_tie(layer, "flip_sym", stored)
    out = layer(torch.ones(1, 4))
    out.sum().backward()
    assert layer.parametrizations[stored].original0.grad is not None
    assert_satisfies(tp.get_tie(layer, stored), getattr(layer, stored))


@pytest.mark.feature("Other parametrizations", "`prune` of the untied bias of a tied layer")
def test_pruning_the_bias_of_a_tied_layer():
    layer = tied_linear()
    prune.l1_unstructured(layer, "bias", 2)
    assert int((layer.bias == 0).sum()) == 2
    layer(torch.ones(1, 4)).sum().backward()
    prune.remove(layer, "bias")
    assert_satisfies(tp.get_tie(layer), layer.weight)


@pytest.mark.feature(
    "Other parametrizations",
    "`parametrizations.weight_norm` and `orthogonal` on a tie",
    refused="they choose what is stored, and a tie does; untie first, or tie what they store",
)
@pytest.mark.parametrize("name", ["weight_norm", "orthogonal"])
def test_new_tools_that_cannot_stand_on_a_tie_are_refused(name):
    layer = tied_linear()
    before = everything(layer)
    with pytest.raises(tp.TieError, match=r"cannot stack \w+ on the tie 'flip_sym'.*remove_tie"):
        getattr(parametrizations, name)(layer)
    assert everything(layer) == before
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(tp.TieError, match="cannot stack"):
            getattr(parametrizations, name)(copied)
    parametrizations.spectral_norm(layer)  # and the layer still takes what can


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (lambda w: w[:2], "another shape or dtype"),
        (lambda w: w.double(), "another shape or dtype"),
        (lambda w: None, "another shape or dtype"),
    ],
)
def test_an_unchecked_parametrization_that_breaks_the_layer_is_refused(result, text):
    class Broken(nn.Module):
        def forward(self, weight):
            return result(weight)

    layer = tied_linear()
    before = everything(layer)
    with pytest.raises(tp.TieError, match=text):
        parametrize.register_parametrization(layer, "weight", Broken(), unsafe=True)
    assert everything(layer) == before


def test_the_trial_of_what_is_stacked_is_no_training_step():
    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.modes = []

        def forward(self, weight):
            self.modes.append((self.training, torch.is_grad_enabled()))
            return weight

    layer, seen = tied_linear(), Seen()
    parametrize.register_parametrization(layer, "weight", seen, unsafe=True)
    assert seen.modes == [(False, False)]
    assert seen.training
    assert layer.parametrizations.weight[1] is seen


@pytest.mark.slow
@pytest.mark.feature(
    "Other parametrizations", "`parametrizations.spectral_norm` on a tie, and off again"
)
@pytest.mark.parametrize("rule", ["flip_sym", "row_repeat", "channel_shared"])
def test_spectral_norm_on_a_tie(rule):
    layer = tied_linear(rule)
    dense = nn.Linear(4, 4)
    dense.load_state_dict(tp.dense_state_dict(layer))
    for made in (layer, dense):
        torch.manual_seed(1)
        parametrizations.spectral_norm(made)
    x = torch.randn(3, 4)
    for training in (True, False):
        layer.train(training), dense.train(training)
        torch.testing.assert_close(layer(x), dense(x))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer.train()
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    assert_satisfies(tp.get_tie(layer), layer.parametrizations.weight[0](*tied_values(layer)))
    twin = copy.deepcopy(layer).eval()
    torch.testing.assert_close(twin(x), layer.eval()(x))
    with pytest.raises(tp.TieError, match="stacked"):
        tp.remove_tie(layer)
    weight = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear
    torch.testing.assert_close(layer.weight.detach(), weight)


def tied_values(layer):
    return [p for n, p in layer.parametrizations.weight.named_parameters() if "original" in n]


@pytest.mark.feature(
    "Other parametrizations",
    "tying a tensor that a parametrization of torch computes",
    refused="remove that one, tie, and register it again",
)
@pytest.mark.parametrize("name", ["spectral_norm", "weight_norm", "orthogonal"])
def test_tying_a_parametrized_tensor_is_refused(name):
    layer = getattr(parametrizations, name)(nn.Linear(4, 4)).eval()
    before = everything(layer)
    with pytest.raises(tp.TieError, match="another parametrization. Remove that one, tie"):
        tp.register_tie(layer, "flip_sym")
    assert everything(layer) == before


@pytest.mark.feature(
    "Other parametrizations", "a tie on one tensor and torch's on another of a layer"
)
@pytest.mark.parametrize("tie_first", [True, False])
def test_side_by_side(tie_first):
    layer = nn.Linear(4, 4)

    class Doubled(nn.Module):
        def forward(self, bias):
            return 2 * bias

    steps = [
        lambda: tp.register_tie(layer, "flip_sym"),
        lambda: parametrize.register_parametrization(layer, "bias", Doubled()),
    ]
    for step in steps if tie_first else reversed(steps):
        step()
    x = torch.randn(3, 4)
    torch.testing.assert_close(layer(x), x @ layer.weight.t() + layer.bias)
    assert torch.equal(layer.bias, 2 * layer.parametrizations.bias.original)
    tp.remove_tie(layer)
    assert torch.equal(layer.bias, 2 * layer.parametrizations.bias.original)


@pytest.mark.feature(
    "Other parametrizations", "`parametrize.cached()`", limit="it caches nothing of a tie"
)
def test_torchs_cache_does_not_reach_a_tie():
    layer = tied_linear()
    with parametrize.cached():
        before = layer.weight.clone()
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(2)
        assert torch.equal(layer.weight, 2 * before)
