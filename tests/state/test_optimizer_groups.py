"""Coupled decay: the groups that free values go to, and how everything comes back."""

from __future__ import annotations

import copy
import functools
import io
import random
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import tiedparam as tp
from tests.support import older_than
from tests.support.optimizer_cases import VARIANTS, Odd, lawful_layer, snapshot, tie
from tests.support.rule_of_two_tensors import TwoHalves


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8), nn.Linear(8, 8), Twice(8)
    )


class Twice(nn.Module):
    """A second kind of layer, so that groups hold other things, too."""

    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.full((size,), 2.0))

    def forward(self, x):
        return x * self.scale


def train(model, optimizer, steps=3, seed=1):
    torch.manual_seed(seed)
    for _ in range(steps):
        loss = model(torch.randn(4, 6)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def adam(model, **options):
    return torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.5, **options)


def named(model, optimizer):
    """The groups with names for parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        {k: [names[id(p)] for p in v] if k == "params" else v for k, v in group.items()}
        for group in optimizer.param_groups
    ]


def test_s42_the_values_get_a_group_of_their_own_and_leave_it_again():
    model = make_model()
    optimizer = adam(model)
    train(model, optimizer)
    before = named(model, optimizer)
    tp.register_tie(model[0], "row_repeat", groups=2, optimizer=optimizer, root=model)
    mine, its = optimizer.param_groups
    assert mine["weight_decay"] == 0.5
    assert its["weight_decay"] == 4 * 0.5
    assert its["params"] == [model[0].parametrizations.weight.original0]
    assert {
        k: v for k, v in its.items() if k in before[0] and k not in ("params", "weight_decay")
    } == {k: v for k, v in mine.items() if k not in ("params", "weight_decay")}
    train(model, optimizer)
    tp.remove_tie(model[0], optimizer=optimizer)
    assert named(model, optimizer) == before
    train(model, optimizer)


def test_s42_ties_of_one_multiplicity_share_a_group():
    model = make_model()
    optimizer = adam(model)
    plan = {"[013]": ("row_repeat", {"groups": 2}), "2": Odd}
    tp.tie_model(model, plan, optimizer=optimizer)
    rates = [group["weight_decay"] for group in optimizer.param_groups]
    assert rates == [0.5, 2.0, 1.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 3, 1]
    tp.untie_model(model, optimizer=optimizer)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("seed", range(20))
def test_s19_whatever_the_order_of_untying_parameters_stand_where_they_stood(seed):
    """Else the state, which a file holds by index, would be another parameter's."""
    chance = random.Random(seed)
    model = make_model()
    split = chance.choice([None, 3, 5])
    parameters = list(model.named_parameters() if chance.random() < 0.5 else model.parameters())
    groups = [parameters] if split is None else [parameters[:split], parameters[split:]]
    optimizer = torch.optim.Adam([{"params": g} for g in groups], lr=0.01, weight_decay=0.5)
    train(model, optimizer)
    before = named(model, optimizer)
    rules = {"row_repeat": {"groups": 2}, "channel_shared": {"over": "in"}, "flip_sym": {}}
    tied = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tp.TieWarning)  # flip_sym
        for _ in range(40):
            index = chance.randrange(4)
            if index in tied:
                tp.remove_tie(model[index], optimizer=optimizer)
                tied.remove(index)
            else:
                rule = chance.choice(list(rules) if index else ["row_repeat", "channel_shared"])
                tp.register_tie(model[index], rule, optimizer=optimizer, **rules[rule])
                tied.add(index)
            held = [id(p) for group in optimizer.param_groups for p in group["params"]]
            assert sorted(held) == sorted(map(id, model.parameters()))
            train(model, optimizer, steps=1)
        tp.untie_model(model, optimizer=optimizer)
    after = named(model, optimizer)
    assert [group["params"] for group in after] == [group["params"] for group in before]
    assert after == before
    fresh = torch.optim.Adam([{"params": g["params"]} for g in optimizer.param_groups], lr=0.01)
    fresh.load_state_dict(optimizer.state_dict())
    fresh.step()


def test_s19_places_are_counted_anew_when_others_come_and_go():
    """While a weight is away, one before it becomes two values, and another one a copy."""
    model = nn.Sequential(nn.Conv2d(4, 2, 3), *(nn.Linear(4, 4) for _ in range(4)))
    optimizer = adam(model)
    tp.register_tie(model[3], "row_repeat", groups=2, optimizer=optimizer)
    tp.register_tie(model[0], TwoHalves, optimizer=optimizer)  # multiplicity 1: it stays
    tp.register_tie(model[1], "copy", source=model[4], optimizer=optimizer)
    tp.remove_tie(model[3], optimizer=optimizer)
    assert named(model, optimizer)[0]["params"] == [
        "0.parametrizations.weight.original0", "0.parametrizations.weight.original1", "0.bias",
        "1.bias", "2.weight", "2.bias", "3.weight", "3.bias", "4.weight", "4.bias",
    ]  # fmt: skip
    tp.register_tie(model[3], "row_repeat", groups=2, optimizer=optimizer)
    tp.remove_tie(model[0], optimizer=optimizer)
    tp.remove_tie(model[3], optimizer=optimizer)
    assert named(model, optimizer)[0]["params"] == [
        "0.weight", "0.bias", "1.bias", "2.weight", "2.bias", "3.weight", "3.bias", "4.weight",
        "4.bias",
    ]  # fmt: skip


def test_s19_groups_are_counted_anew_when_one_of_them_goes():
    model = make_model()
    optimizer = torch.optim.Adam(model[:2].parameters(), weight_decay=0.5)
    tp.register_tie(model[0], "row_repeat", groups=2, optimizer=optimizer)
    optimizer.add_param_group({"params": list(model[2:].parameters()), "lr": 0.1})
    tp.register_tie(model[2], "row_repeat", groups=2, optimizer=optimizer)
    assert len(optimizer.param_groups) == 4
    tp.remove_tie(model[0], optimizer=optimizer)  # its group goes, before the user's second one
    tp.remove_tie(model[2], optimizer=optimizer)
    assert [group["params"] for group in named(model, optimizer)] == [
        ["0.weight", "0.bias", "1.weight"],
        ["2.weight", "2.bias", "3.weight", "3.bias", "4.scale"],
    ]


def test_s42_a_multiplicity_whose_inverse_is_rounded_leads_back():
    assert 49 * (1 / 49) != 1
    layer = nn.Linear(4, 49)
    optimizer = torch.optim.Adam(layer.parameters(), weight_decay=0.3)
    before = snapshot(layer, optimizer)
    tp.register_tie(layer, "row_repeat", optimizer=optimizer)
    tp.remove_tie(layer, optimizer=optimizer)
    assert snapshot(layer, optimizer)["groups"] == [
        {**group, "params": [id(layer.weight), id(layer.bias)]} for group in before["groups"]
    ]
    alone = torch.optim.Adam([layer.weight], weight_decay=0.3)
    tp.register_tie(layer, "row_repeat", optimizer=alone)
    tp.remove_tie(layer, optimizer=alone)
    assert alone.param_groups[0].keys() == optimizer.param_groups[0].keys()
    assert alone.param_groups[0]["weight_decay"] == pytest.approx(0.3, rel=1e-15)


def test_s42_a_group_of_one_changes_its_rate_in_place():
    layer = nn.Linear(6, 8)
    groups = [{"params": [layer.weight], "weight_decay": 0.5}, {"params": [layer.bias]}]
    optimizer = torch.optim.Adam(groups)
    its = optimizer.param_groups[0]
    before = snapshot(layer, optimizer)["groups"][0]
    tie(layer, "row_repeat", optimizer=optimizer)
    assert optimizer.param_groups[0] is its
    assert its["weight_decay"] == 2.0
    assert len(optimizer.param_groups) == 2
    tp.remove_tie(layer, optimizer=optimizer)
    after = snapshot(layer, optimizer)["groups"][0]
    assert {**after, "params": None} == {**before, "params": None}


def test_s19_a_group_whose_other_values_are_away_waits_for_them_as_it_is():
    """Else the first could not come back, since its group has another rate meanwhile."""
    layers = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 8, bias=False))
    optimizer = torch.optim.Adam(layers.parameters(), weight_decay=0.5)
    before = named(layers, optimizer)
    tp.register_tie(layers[0], "row_repeat", groups=2, optimizer=optimizer)
    tp.register_tie(layers[1], "row_repeat", groups=4, optimizer=optimizer)  # alone by now
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 2.0, 1.0]
    tp.remove_tie(layers[0], optimizer=optimizer)
    tp.remove_tie(layers[1], optimizer=optimizer)
    assert named(layers, optimizer) == before


@pytest.mark.parametrize(
    "decoupled",
    [
        lambda p: torch.optim.AdamW(p, weight_decay=0.5),
        pytest.param(
            lambda p: torch.optim.Adam(p, weight_decay=0.5, decoupled_weight_decay=True),
            marks=pytest.mark.skipif(older_than("2.7"), reason="Adam has that option since 2.7"),
        ),
        lambda p: torch.optim.NAdam(p, weight_decay=0.5, decoupled_weight_decay=True),
        lambda p: torch.optim.Adam(p),
        lambda p: torch.optim.Rprop(p),
    ],
)
@pytest.mark.parametrize("case", ["row_repeat", "flip_sym"])
def test_s42_where_no_decay_is_coupled_groups_stay_as_they_are(decoupled, case, recwarn):
    layer = lawful_layer(case)
    optimizer = decoupled(layer.parameters())
    options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    tie(layer, case, optimizer=optimizer)
    (group,) = optimizer.param_groups
    assert {k: v for k, v in group.items() if k != "params"} == options
    assert not recwarn.list


@pytest.mark.feature(
    "Optimizers",
    "decay that is added to the gradient, under a law whose multiplicity is not one number",
    limit="it stays as it was, and a `TieWarning` says by how much it is weaker",
)
def test_s42_decay_that_cannot_be_carried_over_is_said():
    model = make_model()
    optimizer = adam(model)
    said = (
        r"^tying '2.weight' by 'flip_sym': the Adam adds its decay \(weight_decay=0.5\) to the "
        r"gradient, and from now on it acts up to 2 times weaker than before: between 1 and 2 "
        r"entries share a value, and a group has one rate. Set the rate .* use AdamW"
    )
    with pytest.warns(tp.TieWarning, match=said) as seen:
        tp.register_tie(model[2], "flip_sym", optimizer=optimizer, root=model)
    assert [warning.filename for warning in seen] == [__file__]
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.5
    said = r"untying 'weight' of Linear.*: the Adam .* acts up to 2 times stronger than before"
    with pytest.warns(tp.TieWarning, match=said) as seen:
        tp.remove_tie(model[2], optimizer=optimizer)
    assert [warning.filename for warning in seen] == [__file__]
    with pytest.warns(tp.TieWarning, match="tying '2.weight'") as seen:
        tp.tie_model(model, {"2": "flip_sym"}, optimizer=optimizer)
    assert [warning.filename for warning in seen] == [__file__]


def test_s42_decay_under_a_law_that_mixes_its_values_is_said():
    class Halves(tp.Rule):
        """W = w / 2: linear, but no entry is a free value."""

        def free_shapes(self):
            return (self.bound_layout.shape,)

        def forward(self, w):
            return w / 2

        def right_inverse(self, weight):
            self.bind_shape(weight)
            return (weight * 2,)

    layer = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(layer.parameters(), weight_decay=0.5)
    with pytest.warns(tp.TieWarning, match="acts otherwise than before: the free values are not"):
        tp.register_tie(layer, Halves, optimizer=optimizer)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = snapshot(layer, optimizer)
    with pytest.raises(tp.TieError, match="scales or mixes its free values, and how optimizer sta"):
        tp.remove_tie(layer, optimizer=optimizer)
    assert snapshot(layer, optimizer) == before


@pytest.mark.parametrize("tied_before", [False, True])
def test_a_warning_that_is_raised_changes_nothing(tied_before):
    model = make_model()
    if tied_before:
        tp.register_tie(model[2], "flip_sym")
    optimizer = adam(model)
    train(model, optimizer)
    before = snapshot(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", tp.TieWarning)
        act = tp.remove_tie if tied_before else functools.partial(tp.register_tie, rule="flip_sym")
        with pytest.raises(tp.TieWarning):
            act(model[2], optimizer=optimizer)
    assert snapshot(model, optimizer) == before


def test_a_dry_run_and_a_failed_plan_leave_groups_as_they_were():
    model = make_model()
    optimizer = adam(model)
    train(model, optimizer)
    before = snapshot(model, optimizer)
    tp.tie_model(model, {"[0123]": "row_repeat"}, optimizer=optimizer, dry_run=True)
    assert snapshot(model, optimizer) == before
    with pytest.raises(tp.TieError, match="ties cannot be made"):
        tp.tie_model(
            model, {"[123]": ("row_repeat", {"groups": 2}), "0": "flip_sym"}, optimizer=optimizer
        )
    assert snapshot(model, optimizer) == before


# Schedulers ---------------------------------------------------------------------------------


def test_s42_a_scheduler_that_counts_the_groups_gets_no_further_one():
    model = make_model()
    optimizer = adam(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)
    said = r"acts 4 times weaker than before: it needs a group of its own, and a learning-rate sch"
    with pytest.warns(tp.TieWarning, match=said):
        tp.register_tie(model[0], "row_repeat", groups=2, optimizer=optimizer)
    assert len(optimizer.param_groups) == 1
    train(model, optimizer)
    scheduler.step()


def test_s42_with_a_group_of_its_own_the_scheduler_is_no_hindrance(recwarn):
    model = make_model()
    first = [model[0].weight]
    others = [p for p in model.parameters() if p is not first[0]]
    optimizer = torch.optim.Adam([{"params": first}, {"params": others}], weight_decay=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda e: 0.5**e, lambda e: 1.0])
    tp.register_tie(model[0], "row_repeat", groups=2, optimizer=optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [2.0, 0.5]
    train(model, optimizer)
    scheduler.step()
    tp.remove_tie(model[0], optimizer=optimizer)
    train(model, optimizer)
    scheduler.step()
    assert not recwarn.list


@pytest.mark.parametrize("foreach", [True, False])
def test_s42_a_scheduler_that_was_built_after_tying_keeps_its_groups(foreach):
    model = make_model()
    optimizer = adam(model, foreach=foreach)
    tp.register_tie(model[0], "row_repeat", groups=2, optimizer=optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)
    train(model, optimizer)
    scheduler.step()
    tp.remove_tie(model[0], optimizer=optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [8, 0]
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
    train(model, optimizer)
    scheduler.step()
    tp.register_tie(model[0], "row_repeat", groups=2, optimizer=optimizer)  # the group is there
    assert [len(group["params"]) for group in optimizer.param_groups] == [7, 1]


@pytest.mark.parametrize("name", [name for name, v in VARIANTS.items() if v.decay is not None])
def test_s42_every_optimizer_steps_beside_a_group_that_is_kept_empty_for_a_scheduler(name):
    variant = VARIANTS[name]
    layer = lawful_layer("row_repeat")
    decay = {variant.decay: 0.5}
    optimizer = variant.build(layer.parameters(), **decay)
    tie(layer, "row_repeat", optimizer=optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)
    for again in (False, True):
        tp.remove_tie(layer, optimizer=optimizer)
        assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0]
        before = layer.weight.detach().clone()
        layer(torch.ones(3, 6, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        scheduler.step()
        assert not torch.equal(layer.weight, before)
        if not again:
            tie(layer, "row_repeat", optimizer=optimizer)
    fresh = variant.build([{"params": g["params"]} for g in optimizer.param_groups], **decay)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    fresh.step()


def test_the_rate_of_a_new_group_is_a_tensor_of_its_own():
    """``group["lr"].mul_(0.5)`` for each group would halve a shared tensor twice."""
    model = make_model()
    optimizer = torch.optim.Adam(
        model.parameters(), lr=torch.tensor(0.01), weight_decay=0.5, foreach=False
    )
    tp.register_tie(model[0], "row_repeat", groups=2, optimizer=optimizer)
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert first is not second
    assert torch.equal(first, second)
    tp.remove_tie(model[0], optimizer=optimizer)
    assert len(optimizer.param_groups) == 1


# Copies, and optimizers that were built after tying -----------------------------------------


def test_s42_untying_carries_the_decay_of_an_optimizer_that_was_built_after_tying():
    model = make_model()
    tp.register_tie(model[0], "row_repeat", groups=2, root=model)
    optimizer = adam(model)
    tp.remove_tie(model[0], optimizer=optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.125]
    assert optimizer.param_groups[1]["params"] == [model[0].weight]
    tp.register_tie(model[0], "row_repeat", groups=2, optimizer=optimizer)
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.5


def test_s42_values_come_back_though_the_decay_was_switched_off_meanwhile():
    model = make_model()
    optimizer = adam(model)
    tp.register_tie(model[0], "row_repeat", groups=2, optimizer=optimizer)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    tp.remove_tie(model[0], optimizer=optimizer)
    (group,) = optimizer.param_groups
    assert group["params"][0] is model[0].weight


def test_s42_values_of_a_group_with_another_rate_keep_it():
    model = make_model()
    optimizer = adam(model)
    tp.register_tie(model[0], "row_repeat", groups=2, optimizer=optimizer)
    optimizer.param_groups[1]["lr"] = 0.2
    tp.remove_tie(model[0], optimizer=optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert optimizer.param_groups[1]["lr"] == 0.2
    assert optimizer.param_groups[1]["params"] == [model[0].weight]


@pytest.mark.parametrize("source", ["with others", "in a second group", "alone"])
def test_s42_an_untied_copy_decays_as_the_user_has_set_it(source):
    """Its source's free values decay more strongly, since they stand for several entries."""
    model = make_model()
    tp.register_tie(model[3], "copy", source=model[2], root=model)
    parameters = list(model.parameters())
    first = {"with others": [], "in a second group": parameters[:1], "alone": [model[2].weight]}
    others = [p for p in parameters if all(p is not q for q in first[source])]
    groups = [group for group in (first[source], others) if group]
    optimizer = torch.optim.Adam([{"params": g} for g in groups], weight_decay=0.5)
    tp.register_tie(model[2], "row_repeat", groups=2, optimizer=optimizer)
    tp.remove_tie(model[3], optimizer=optimizer)
    (its,) = [g for g in optimizer.param_groups if any(p is model[3].weight for p in g["params"])]
    assert its["weight_decay"] == 0.5
    assert source == "alone" or its is optimizer.param_groups[len(groups) - 1]
    value = model[2].parametrizations.weight.original0
    (other,) = [g for g in optimizer.param_groups if any(p is value for p in g["params"])]
    assert other["weight_decay"] == 2.0
    train(model, optimizer)


def test_s42_a_scheduler_keeps_an_untied_copy_in_the_group_of_its_source():
    pair = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    tp.register_tie(pair[1], "copy", source=pair[0], root=pair)
    optimizer = adam(pair)
    tp.register_tie(pair[0], "row_repeat", groups=2, optimizer=optimizer)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    said = "from now on it acts 3 times stronger than you have set it: it needs a group of its own"
    with pytest.warns(tp.TieWarning, match=said):
        tp.remove_tie(pair[1], optimizer=optimizer)
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 1.5
    assert group["params"][1] is pair[1].weight


def test_s42_a_tensor_as_rate_of_decay():
    layer = nn.Linear(6, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=torch.tensor(0.5))
    tie(layer, "row_repeat", optimizer=optimizer)
    assert [float(g["weight_decay"]) for g in optimizer.param_groups] == [0.5, 2.0]
    tp.remove_tie(layer, optimizer=optimizer)
    assert [float(g["weight_decay"]) for g in optimizer.param_groups] == [0.5]


def test_s42_names_follow_into_the_group_and_back():
    model = make_model()
    optimizer = torch.optim.Adam(model.named_parameters(), weight_decay=0.5)
    before = list(optimizer.param_groups[0]["param_names"])
    tp.register_tie(model[0], "row_repeat", groups=2, optimizer=optimizer)
    mine, its = optimizer.param_groups
    assert its["param_names"] == ["0.parametrizations.weight.original0"]
    assert mine["param_names"] == before[1:]
    tp.remove_tie(model[0], optimizer=optimizer)
    assert optimizer.param_groups[0]["param_names"] == before


# Files --------------------------------------------------------------------------------------


def test_s42_a_saved_optimizer_goes_on_in_one_that_was_moved_in_the_same_way():
    def build():
        model = make_model()
        optimizer = adam(model)
        tp.tie_model(model, {"0": ("row_repeat", {"groups": 2}), "2": Odd}, optimizer=optimizer)
        return model, optimizer

    model, optimizer = build()
    train(model, optimizer)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)  # weights_only: the notes of the groups are numbers
    resumed, its_optimizer = build()
    resumed.load_state_dict(saved["model"])
    its_optimizer.load_state_dict(saved["optimizer"])
    for each, its in ((model, optimizer), (resumed, its_optimizer)):
        train(each, its, seed=2)
        tp.untie_model(each, optimizer=its)
        train(each, its, seed=3)
    assert named(resumed, its_optimizer) == named(model, optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize("tied_when_saved", [False, True])
def test_s42_a_state_that_was_saved_with_other_rates_is_not_loaded(tied_when_saved):
    """It would replace the multiplied rate, and nothing else would show that."""
    layer = nn.Linear(6, 8, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.5)
    dense = copy.deepcopy(optimizer.state_dict())
    tie(layer, "row_repeat", optimizer=optimizer)
    tied = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(tied)
    loaded, here, there = dense, 4, 1
    if tied_when_saved:
        tp.remove_tie(layer, optimizer=optimizer)
        optimizer.load_state_dict(dense)
        loaded, here, there = tied, 1, 4
    before = snapshot(layer, optimizer)
    said = f"group 0 is multiplied by {here} for its ties here, and by {there} in what is loaded"
    with pytest.raises(tp.TieError, match=said):
        optimizer.load_state_dict(loaded)
    assert snapshot(layer, optimizer) == before


def test_s42_torchs_checkpoint_functions_take_the_groups():
    def build():
        model = make_model()
        optimizer = adam(model)
        tp.register_tie(model[0], "row_repeat", groups=2, optimizer=optimizer)
        train(model, optimizer)
        return model, optimizer

    model, optimizer = build()
    train(model, optimizer)
    resumed, its_optimizer = build()
    resumed.load_state_dict(model.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    set_optimizer_state_dict(resumed, its_optimizer, saved)
    for each, its in ((model, optimizer), (resumed, its_optimizer)):
        train(each, its, seed=2)
        tp.untie_model(each, optimizer=its)
        train(each, its, seed=3)
    assert named(resumed, its_optimizer) == named(model, optimizer)
    assert torch.equal(resumed[0].weight, model[0].weight)


def test_s42_trajectory_in_a_group_that_is_shared_with_others():
    """The bias has the same options, and stays behind; eps is 0, so what is left is rounding."""
    torch.manual_seed(0)
    dense = lawful_layer("row_repeat")
    twin = copy.deepcopy(dense)
    optimizers = [
        torch.optim.Adam(layer.parameters(), lr=0.05, weight_decay=1.0, eps=0)
        for layer in (dense, twin)
    ]
    start = dense.weight.detach().clone()
    x = torch.randn(3, 6, dtype=torch.float64)
    for step in range(30):
        if step == 10:
            tie(twin, "row_repeat", optimizer=optimizers[1])
        if step == 20:
            tp.remove_tie(twin, optimizer=optimizers[1])
        for layer, optimizer in zip((dense, twin), optimizers, strict=True):
            optimizer.zero_grad()
            # the sum over each run of equal rows, so that equal rows have equal gradients
            layer(x).unflatten(1, (2, 4)).sum(2).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(twin.weight, dense.weight, rtol=0, atol=1e-10)
        torch.testing.assert_close(twin.bias, dense.bias, rtol=0, atol=1e-10)
    assert (dense.weight - start).abs().max() > 0.1
