"""What torch does not promise, as it was seen in torch 2.13.0: one test for each fact."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from tiedparam.util.torch_private import (
    convolution_of,
    has_hooks_on_all_modules,
    hooks_on_all_modules,
    innermost_transform,
    lists_in_tables,
    may_carry_tangents,
    metadata_of,
    original_key,
    output_padding_of,
    padding_of,
    reshaped_in_place,
    set_metadata,
    set_state_version,
    state_version_of,
    steps_of_forward,
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


def test_the_lists_of_parametrizations_are_found_in_the_tables():
    layer = nn.Linear(2, 2, bias=False)
    assert not lists_in_tables(layer)
    parametrize.register_parametrization(layer, "weight", Halves())
    assert dict(lists_in_tables(layer)) == {"weight": layer.parametrizations.weight}


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_on_all_modules(register):
    assert not has_hooks_on_all_modules()
    assert hooks_on_all_modules() == ()

    def hook(*arguments):
        pass

    handle = register(hook)
    try:
        assert has_hooks_on_all_modules()
        assert hooks_on_all_modules() == (hook,)
    finally:
        handle.remove()


def test_a_transform_is_seen_while_it_is_at_work():
    seen = []

    def note(x):
        seen.append(innermost_transform() is not None)
        return x.sum()

    torch.func.vmap(note)(torch.ones(2, 2))
    torch.func.grad(note)(torch.ones(2))
    note(torch.ones(2))
    assert seen == [True, True, False]


def test_tensors_may_carry_tangents_in_a_dual_level_only():
    assert not may_carry_tangents()
    with forward_ad.dual_level():
        assert may_carry_tangents()
    assert not may_carry_tangents()


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.Conv3d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1)],
    ids=lambda layer: type(layer).__name__,
)
def test_the_steps_of_a_forward_are_called_by_it(layer, monkeypatch):
    called = []
    for name in steps_of_forward(type(layer)):
        step = getattr(layer, name)
        monkeypatch.setattr(
            layer, name, lambda *a, step=step, name=name: called.append(name) or step(*a)
        )
    layer(torch.ones((2,) * layer.weight.dim()))
    assert called == list(steps_of_forward(type(layer)))


def test_a_convolution_with_another_weight():
    layer = nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular")
    x, weight = torch.randn(1, 2, 5), torch.randn(4, 2, 3)
    expected = F.conv1d(F.pad(x, padding_of(layer), mode="circular"), weight)
    torch.testing.assert_close(convolution_of(layer)(x, weight, None), expected)


def test_what_is_padded_before_and_after_each_axis_the_last_first():
    assert list(padding_of(nn.Conv2d(1, 1, 3, padding=(1, 2)))) == [2, 2, 1, 1]
    assert list(padding_of(nn.Conv1d(1, 1, 4, padding="same"))) == [1, 2]


def test_the_padding_that_an_output_size_asks_for():
    layer = nn.ConvTranspose1d(1, 1, 3, stride=2, output_padding=1)
    x = torch.ones(1, 1, 4)
    assert list(output_padding_of(layer, x, None, 1)) == [1]
    assert list(output_padding_of(layer, x, [9], 1)) == [0]
    assert layer(x, output_size=[9]).shape == (1, 1, 9)


def test_a_reshaped_tensor_that_autograd_does_not_take_for_a_view():
    made = torch.ones(2, 3, requires_grad=True) * 2
    reshaped = reshaped_in_place(made, (6,))
    assert reshaped.data_ptr() == made.data_ptr()
    assert not reshaped._is_view()
    assert made.view(6)._is_view()
