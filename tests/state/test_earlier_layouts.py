"""Free values of an earlier layout: told by their shapes, and never taken for today's."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import tiedparam as tp

FOLDER = Path(__file__).parents[1] / "files"
KEY = "0.parametrizations.weight.original0"


def in_file(layout: int, case: str = "flip_sym-odd") -> Tensor:
    """The free values that a file of that layout has; all of one case mean the same weight."""
    path = FOLDER / f"layout_{layout}" / f"{case}.safetensors"
    return safetensors.torch.load(path.read_bytes())[KEY]


EARLIER, NOW = in_file(2), in_file(3)  # as an earlier version wrote them, and today's


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    tp.register_tie(model[0], "flip_sym")
    return model


def free_of(model: nn.Module) -> nn.Parameter:
    return model[0].parametrizations.weight.original0


def with_state(model: nn.Module, build, value: Tensor) -> torch.optim.Optimizer:
    """An optimizer of the model that has loaded ``value`` for each average of the free values."""
    source = deepcopy(model)
    optimizer = build(source.parameters())
    for parameter in source.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    content = optimizer.state_dict()
    number = [p.shape for p in source.parameters()].index(NOW.shape)
    for key, own in content["state"][number].items():
        if isinstance(own, Tensor) and own.shape == NOW.shape:
            content["state"][number][key] = value.abs()
    optimizer = build(model.parameters())
    optimizer.load_state_dict(content)
    return optimizer


OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, amsgrad=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_averages_of_an_earlier_layout_step_as_todays(build):
    start = tied()
    stepped = []
    for value in (EARLIER, NOW):
        model = deepcopy(start)
        optimizer = with_state(model, build, value)
        for step in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.1 + step)
            optimizer.step()
        stepped.append((free_of(model), optimizer.state[free_of(model)]))
    (earlier, its_state), (now, state) = stepped
    assert torch.equal(earlier, now)
    assert not torch.equal(now, free_of(start))
    for key, value in state.items():
        assert torch.equal(torch.as_tensor(its_state[key]), torch.as_tensor(value)), key


KINDS = {  # in which way an entry of the state follows
    "exp_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "momentum_buffer": 1,
    "square_avg": 2,
    "acc_delta": 2,
}


@pytest.mark.parametrize(
    "build",
    [*OPTIMIZERS.values(), lambda p: torch.optim.Adadelta(p, lr=0.1)],
    ids=[*OPTIMIZERS, "adadelta"],
)
def test_squares_of_an_earlier_layout_stay_squares_under_a_law_with_a_sign(build):
    """A free value may now stand for minus what it did."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    tp.register_tie(model[0], "flip_sym", sign=-1)
    rule, free = tp.get_tie(model[0]), free_of(model)
    earlier = torch.arange(1.0, free.numel() + 1).view(35, 2)
    (now,) = rule.from_earlier([earlier])
    assert (now < 0).any()
    optimizer = build(model.parameters())
    free.grad = torch.zeros_like(free)
    optimizer.step()
    content = optimizer.state_dict()
    (number,) = (n for n, p in enumerate(model.parameters()) if p is free)
    for key in KINDS.keys() & content["state"][number].keys():
        content["state"][number][key] = earlier ** KINDS[key]
    optimizer.load_state_dict(content)
    optimizer.step()
    for key, value in optimizer.state[free].items():
        if torch.is_tensor(value) and value.dim() > 0:
            expected = now ** KINDS[key]
            torch.testing.assert_close(value / value[0, 0], expected / expected[0, 0], msg=key)
            assert (value >= 0).all() == (KINDS[key] == 2), key
    assert free.isfinite().all()


def test_averages_of_an_earlier_layout_follow_the_end_of_the_tie():
    dense = []
    for value in (EARLIER, NOW):
        model = tied()
        optimizer = with_state(model, OPTIMIZERS["adam"], value)
        tp.remove_tie(model[0], optimizer=optimizer)
        dense.append(optimizer.state[model[0].weight])
    assert torch.equal(dense[0]["exp_avg"], dense[1]["exp_avg"])
    assert torch.equal(dense[0]["exp_avg_sq"], dense[1]["exp_avg_sq"])


def test_other_shapes_are_refused_as_before():
    model = tied()
    optimizer = with_state(model, OPTIMIZERS["adam"], torch.ones(1, 74))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(tp.TieError, match="loaded by index"):
        optimizer.step()


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_an_earlier_layout_is_loaded(assign):
    model = tied()
    entries = {**model.state_dict(), KEY: EARLIER.clone()}
    model.load_state_dict(entries, assign=assign)
    assert torch.equal(free_of(model), NOW)
    assert entries[KEY].shape == EARLIER.shape  # the caller's dictionary is as it was


def test_values_that_reach_the_law_otherwise_are_refused():
    """Their number is right, so that they would be taken in the wrong order."""
    model, x = tied(), torch.randn(1, 4, 5, 5)
    entries = {**model.state_dict(), KEY: EARLIER}
    with pytest.raises(Exception, match="load_state_dict"):
        torch.func.functional_call(model, entries, x)


def test_a_law_on_a_part_passes_the_question_on():
    model = nn.Sequential(nn.Conv2d(4, 6, 3))
    tp.register_tie(model[0], "flip_sym", rows=slice(0, 4))
    entries = {**model.state_dict(), KEY: EARLIER.clone()}
    rest = model[0].parametrizations.weight.original1.detach().clone()
    model.load_state_dict(entries)
    assert torch.equal(free_of(model), NOW)
    assert torch.equal(model[0].parametrizations.weight.original1, rest)


def test_todays_values_are_not_taken_for_earlier_ones():
    rule = tp.get_tie(tied()[0])
    (again,) = rule.from_earlier([EARLIER])
    assert torch.equal(again, NOW)
    assert rule.from_earlier([NOW]) is None
