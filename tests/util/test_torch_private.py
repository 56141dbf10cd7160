"""What torch does not promise, as it was seen in torch 2.13.0: one test for each fact."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.nn.utils import parametrize

from tiedparam.util.torch_private import (
    metadata_of,
    original_key,
    set_metadata,
    set_state_version,
    state_version_of,
    unsaved_buffers_of,
)


class Halves(nn.Module):
    """Stores a weight as two halves."""

    def forward(self, first, second):
        return torch.cat([first, second])

    def right_inverse(self, weight):
        return weight.chunk(2)


def test_buffers_that_are_in_no_state_dict():
    layer = nn.Module()
    layer.register_buffer("kept", torch.zeros(1))
    layer.register_buffer("scratch", torch.zeros(1), persistent=False)
    assert unsaved_buffers_of(layer) == {"scratch"} == {"kept", "scratch"} - {*layer.state_dict()}


def test_the_keys_of_what_a_parametrized_tensor_is_computed_from():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    parametrize.register_parametrization(model[0], "weight", Halves())
    assert list(model.state_dict()) == [original_key("0", "weight", n) for n in (0, 1)]
    assert list(model[0].state_dict()) == [original_key("", "weight", n) for n in (0, 1)]


class Versioned(nn.Linear):
    """Reads state dicts in which its weight has another name, as version 1 wrote them."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        if local_metadata.get("version", 1) < 2:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}matrix")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


def test_the_version_of_a_class_is_noted_and_given_back_when_a_state_dict_is_loaded():
    model = nn.Sequential(Versioned(2, 2), nn.ReLU())
    assert [state_version_of(module) for module in model] == [2, 1]
    assert metadata_of(model.state_dict())["0"] == {"version": 2}
    old = OrderedDict({"0.matrix": torch.ones(2, 2), "0.bias": torch.zeros(2)})
    set_metadata(old, {"0": {"version": 1}})
    model.load_state_dict(old)
    assert torch.equal(model[0].weight, torch.ones(2, 2))


def test_an_ordinary_dictionary_has_no_metadata_and_odd_versions_count_as_the_first():
    assert metadata_of({}) is None
    layer = nn.Module()
    layer._version = "two"
    assert state_version_of(layer) == 1


def test_a_module_may_note_another_version_than_its_class():
    layer = nn.ReLU()
    set_state_version(layer, 3)
    assert metadata_of(nn.Sequential(layer).state_dict())["0"] == {"version": 3}
    assert state_version_of(nn.ReLU()) == 1
