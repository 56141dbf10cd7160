"""`owner`: from a free value back to its layer, wherever the Parameter has come from."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import tiedparam as tp
import tiedparam.tie.owner
from tests.support.rule_of_two_tensors import TwoHalves


def free(layer, name="weight"):
    return list(layer.parametrizations[name].parameters())


def owns(layer, name="weight"):
    """Whether every free value leads back to this layer and tensor."""
    found = [tp.owner(value) for value in free(layer, name)]
    assert found
    return all(
        f is not None
        and f.layer is layer
        and f.tensor_name == name
        and f.rule is tp.get_tie(layer, name)
        and f.shape == getattr(layer, name).shape
        and f.index == at
        for at, f in enumerate(found)
    )


@pytest.mark.feature(
    "Optimizers", "`owner`: from a free value to its layer, tensor, dense shape and rule"
)
def test_every_free_value_leads_to_its_layer_tensor_shape_and_rule():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4), nn.Conv2d(3, 4, 3))
    tp.register_tie(model[0], "flip_sym")
    tp.register_tie(model[0], "row_repeat", "bias", groups=2)
    tp.register_tie(model[1], "row_repeat", groups=2)
    tp.register_tie(model[2], TwoHalves)
    assert owns(model[0])
    assert owns(model[0], "bias")
    assert owns(model[1])
    assert owns(model[2])
    found = tp.owner(free(model[0])[0])
    assert isinstance(found, tp.Owner)
    assert found.shape == (4, 4, 3, 3)
    assert str(found.rule) == "flip_sym"
    with pytest.raises(AttributeError):
        found.shape = (1,)


def test_other_parameters_have_no_owner():
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    weight = layer.weight
    tp.register_tie(layer, "flip_sym")
    tp.register_tie(other, "copy", source=layer)
    assert tp.owner(weight) is None  # replaced
    assert tp.owner(layer.bias) is None
    assert tp.owner(other.bias) is None
    assert owns(layer)  # the source of a copy owns its values
    (value,) = free(layer)
    tp.remove_tie(other)
    tp.remove_tie(layer)
    assert tp.owner(value) is None
    assert tp.owner(layer.weight) is None
    with pytest.raises(TypeError, match="owner takes a Parameter, not Tensor"):
        tp.owner(torch.ones(1))


def test_another_parametrization_beside_a_tie_owns_nothing():
    layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
    torch.nn.utils.parametrize.register_parametrization(layer, "bias", nn.Tanh(), unsafe=True)
    assert tp.owner(layer.parametrizations.bias.original) is None
    assert owns(layer)


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_a_duplicate_owns_its_own_values(duplicate):
    layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
    twin = duplicate(layer)
    assert owns(layer)
    assert owns(twin)
    assert owns(duplicate(nn.Sequential(layer))[0])
    tp.remove_tie(layer)
    assert owns(twin)


def test_a_shallow_copy_shares_the_values_and_the_first_layer_is_named():
    layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
    twin = copy.copy(layer)
    assert tp.owner(free(twin)[0]).layer is layer
    tp.remove_tie(layer)
    assert tp.owner(free(twin)[0]).layer is twin


def test_a_layer_that_copies_itself_in_its_own_way_is_found():
    class Own(nn.Linear):
        def __deepcopy__(self, memo):
            twin = type(self).__new__(type(self))
            memo[id(self)] = twin
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
            return twin

    twin = copy.deepcopy(tp.register_tie(Own(4, 4), "flip_sym"))
    assert owns(twin)


@pytest.mark.parametrize("overwrite", [True, False])
def test_loading_and_moving_keep_the_owner(overwrite):
    layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
    (before,) = free(layer)
    layer.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()}, assign=True)
    assert free(layer)[0] is not before
    assert owns(layer)
    assert tp.owner(before) is None
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    try:
        layer.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert owns(layer)
    layer.to_empty(device="cpu")
    assert owns(layer)


def test_a_moved_optimizer_leads_to_the_layers(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.Adam(model.parameters())
    tp.tie_model(model, {nn.Linear: "flip_sym"}, optimizer=optimizer)
    found = [tp.owner(p) for p in optimizer.param_groups[0]["params"]]
    assert [f.layer for f in found if f] == list(model)
    tp.save(model, tmp_path / "file")
    loaded = tp.load(tmp_path / "file", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    model = loaded if isinstance(loaded, nn.Module) else model
    assert all(owns(layer) for layer in model)


def test_what_is_rolled_back_owns_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    with pytest.raises(tp.TieError):
        tp.tie_model(model, {nn.Linear: "flip_sym"})
    assert [tp.owner(p) for p in model.parameters()] == [None] * 4


def test_remembering_keeps_no_layer_alive():
    gc.disable()
    try:
        layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
        assert owns(layer)
        (value,) = free(layer)
        twin = copy.deepcopy(layer)
        references = [weakref.ref(each) for each in (layer, twin)]
        del layer, twin
        assert [reference() for reference in references] == [None, None]
        assert tp.owner(value) is None
    finally:
        gc.enable()


def test_parameters_can_still_be_swapped():
    """A weak reference to a Parameter would keep torch from it."""
    layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
    (value,) = free(layer)
    tp.owner(value)
    torch.utils.swap_tensors(value, nn.Parameter(torch.ones_like(value)))
    assert owns(layer)


def test_asking_for_every_value_of_a_model_searches_all_layers_once(monkeypatch):
    """Parameter groups of a model with thousands of ties would take minutes."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(20)], nn.LayerNorm(4))
    tp.tie_model(model, {nn.Linear: "flip_sym"})
    searches = []
    search = tiedparam.tie.owner._look_at_all
    monkeypatch.setattr(tiedparam.tie.owner, "_look_at_all", lambda: (searches.append(1), search()))
    owners = [tp.owner(value) for value in model.parameters()]
    assert [found is not None for found in owners] == [False, True] * 20 + [False] * 2
    assert len(searches) == 1
    model.double()
    tp.untie_model(model[:10])
    assert [tp.owner(p) for layer in model[:10] for p in layer.parameters()] == [None] * 20
    assert all(owns(layer) for layer in model[10:20])


def test_a_free_value_that_stands_elsewhere_as_a_plain_parameter_is_found():
    layer, other = nn.Linear(4, 4), tp.register_tie(nn.Linear(4, 4), "flip_sym")
    tp.register_tie(layer, "flip_sym")
    other.bias = free(layer)[0]
    assert tp.owner(free(other)[0]).layer is other
    assert owns(layer)
