"""Optimizers go by what they do: trajectories against the dense run, and who is refused."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from optimizer_cases import (
    MULTIPLICITY,
    TIES,
    VARIANTS,
    feed,
    lawful_gradients,
    lawful_layer,
    tie,
)
from torch import nn

import tiedparam as tp
from tiedparam import _optimizer_laws

SCALE_FREE = [name for name, v in VARIANTS.items() if v.kind not in (torch.optim.SGD, torch.optim.ASGD)]
DECAYING = [name for name, v in VARIANTS.items() if v.decay is not None]


def scale_rate(optimizer, parameters, factor):
    """Multiply the rate at which an optimizer steps these, which have groups of their own."""
    for group in optimizer.param_groups:
        if any(p is q for p in group["params"] for q in parameters):
            group["lr"] = group["lr"] * factor
    for parameter in parameters:
        if "eta" in optimizer.state[parameter]:  # ASGD keeps the rate of its next step there
            optimizer.state[parameter]["eta"].mul_(factor)


def check_trajectory(case, variant, **more):
    """Tie after 10 steps and untie after 20: weights and bias are those of the dense run.

    float64, lawful weights and gradients, no eps: what is left is rounding, 1e-10 of weights and
    steps near 1. Steps of SGD and ASGD are proportional to the gradient, and a free value has the
    sum of its entries' gradients: their rate is divided by the multiplicity while it is tied.
    """
    torch.manual_seed(0)
    dense = lawful_layer(case)
    twin = copy.deepcopy(dense)
    gradients = lawful_gradients(dense, case, 30)
    dense_optimizer, optimizer = (
        variant.build([{"params": [layer.weight]}, {"params": [layer.bias]}], **more)
        for layer in (dense, twin)
    )
    start = dense.weight.detach().clone()
    scales = variant.kind in (torch.optim.SGD, torch.optim.ASGD)
    for step, gradient in enumerate(gradients):
        if step == 10:
            tie(twin, case, optimizer=optimizer)
            if scales:
                scale_rate(optimizer, list(twin.parametrizations.parameters()), 1 / MULTIPLICITY[case])
        if step == 20:
            if scales:
                scale_rate(optimizer, list(twin.parametrizations.parameters()), MULTIPLICITY[case])
            tp.remove_tie(twin, optimizer=optimizer)
        for layer, each in ((dense, dense_optimizer), (twin, optimizer)):
            feed(layer, gradient * variant.gradients)
            each.step()
        torch.testing.assert_close(twin.weight, dense.weight, rtol=0, atol=1e-10)
    torch.testing.assert_close(twin.bias, dense.bias, rtol=0, atol=0)
    for name, value in dense_optimizer.state[dense.weight].items():
        moved = optimizer.state[twin.weight][name]
        torch.testing.assert_close(moved, value, rtol=1e-9, atol=1e-10)
    assert (dense.weight - start).abs().max() > 1e-3  # it did move


@pytest.mark.feature(
    "Optimizers",
    "torch.optim's SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Adadelta, ASGD and "
    "Rprop with `optimizer=`: the dense run's trajectory, tied and untied midway",
)
@pytest.mark.parametrize("case", TIES)
@pytest.mark.parametrize("name", SCALE_FREE)
def test_s41_an_optimizer_that_is_moved_goes_on_as_the_dense_run(case, name):
    check_trajectory(case, VARIANTS[name])


@pytest.mark.parametrize("case", MULTIPLICITY)
@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in SCALE_FREE])
def test_s41_steps_proportional_to_the_gradient_go_on_at_a_rate_divided_by_the_multiplicity(
    case, name
):
    check_trajectory(case, VARIANTS[name])


@pytest.mark.feature(
    "Optimizers",
    "decay that is added to the gradient (`weight_decay` of Adam, SGD, …) where the multiplicity "
    "is one number: the dense run's trajectory",
)
@pytest.mark.parametrize("case", MULTIPLICITY)
@pytest.mark.parametrize("name", DECAYING)
def test_s42_coupled_decay_is_as_strong_as_in_the_dense_run(case, name):
    variant = VARIANTS[name]
    # as strong as the gradients, or it would not be seen
    check_trajectory(case, variant, **{variant.decay: 0.5 * variant.gradients})


OTHER_KIND = {
    "gradient": "weight",
    "gradient magnitude": "weight magnitude",
    "squared gradient": "gradient magnitude",
    "weight": "gradient",
    "weight magnitude": "gradient magnitude",
}
ENTRIES = [
    (kind, entry, how)
    for kind, law in _optimizer_laws._TORCHS_OWN.items()
    for entry, how in law.state.items()
    if how != "scalar"
]


@pytest.mark.parametrize(("kind", "entry", "how"), ENTRIES)
def test_the_trajectories_would_show_a_wrong_kind_of_any_entry(kind, entry, how, monkeypatch):
    law = _optimizer_laws._LAWS[kind]
    # of the last gradient Rprop reads the sign alone
    other = "zeros" if entry == "prev" else OTHER_KIND[how]
    wrong = dataclasses.replace(law, state={**law.state, entry: other})
    monkeypatch.setitem(_optimizer_laws._LAWS, kind, wrong)
    variants = [v for v in VARIANTS.values() if v.kind is kind]
    with pytest.raises(AssertionError):
        for variant in variants:  # one of them has the entry
            check_trajectory("row_repeat", variant)


@pytest.mark.parametrize("kind", sorted({v.kind for v in map(VARIANTS.get, DECAYING)}, key=str))
def test_the_trajectories_would_show_decay_that_is_left_as_it_is(kind, monkeypatch):
    law = dataclasses.replace(_optimizer_laws._LAWS[kind], coupled_decay=())
    monkeypatch.setitem(_optimizer_laws._LAWS, kind, law)
    for name in DECAYING:
        if VARIANTS[name].kind is kind:
            with pytest.raises(AssertionError):
                test_s42_coupled_decay_is_as_strong_as_in_the_dense_run("row_repeat", name)


def test_every_optimizer_of_torch_is_known_and_tried():
    torchs = {
        kind for kind in vars(torch.optim).values()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    } - {torch.optim.Optimizer}  # fmt: skip
    assert torchs == _optimizer_laws._TORCHS_OWN.keys()
    moved = {kind for kind, law in _optimizer_laws._TORCHS_OWN.items() if not law.refused}
    assert moved == {variant.kind for variant in VARIANTS.values()}
    assert moved | set(REFUSED) == torchs


REFUSED = (torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.Muon, torch.optim.SparseAdam)
