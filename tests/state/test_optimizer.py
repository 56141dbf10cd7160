"""Moving optimizers between dense parameters and free values, and the guard of their steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.optimizer_cases import (
    TIES,
    Odd,
    feed,
    lawful_gradients,
    lawful_layer,
    snapshot,
    tie,
)
from tests.support.rule_of_two_tensors import TwoHalves

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam_foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adam_fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


@pytest.mark.feature(
    "Optimizers", "tying and untying in mid-training with `optimizer=`: the trajectory goes on"
)
@pytest.mark.parametrize("case", TIES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_trajectory_goes_on_through_tying_and_untying(case, kind):
    """With equal gradients within each orbit every adaptive optimizer is scale-free."""
    torch.manual_seed(0)
    dense = lawful_layer(case)
    twin = copy.deepcopy(dense)
    gradients = lawful_gradients(dense, case, 30)
    dense_optimizer = OPTIMIZERS[kind](dense.parameters())
    optimizer = OPTIMIZERS[kind](twin.parameters())
    for step, gradient in enumerate(gradients):
        if step == 10:
            tie(twin, case, optimizer=optimizer)
        if step == 20:
            tp.remove_tie(twin, optimizer=optimizer)
        for layer, opt in ((dense, dense_optimizer), (twin, optimizer)):
            feed(layer, gradient)
            opt.step()
        tolerance = 1e-6  # eps = 1e-8 stands beside a denominator that is m times larger
        torch.testing.assert_close(twin.weight, dense.weight, rtol=0, atol=tolerance)
    torch.testing.assert_close(twin.bias, dense.bias, rtol=0, atol=0)
    assert (dense.weight - lawful_layer(case).weight).abs().max() > 0.05  # it did move


@pytest.mark.parametrize("case", TIES)
def test_the_trajectory_test_would_see_a_mean_projected_state(case, monkeypatch):
    from tiedparam.state import optimizer_exchange

    maps_to_free = optimizer_exchange.maps_to_free
    monkeypatch.setattr(
        optimizer_exchange,
        "maps_to_free",
        lambda rule: dict.fromkeys(maps_to_free(rule), maps_to_free(rule)["weight"]),
    )
    with pytest.raises(AssertionError):
        test_trajectory_goes_on_through_tying_and_untying(case, "adam")


@pytest.mark.parametrize("case", TIES)
def test_sgd_momentum_and_pending_gradient_are_orbit_sums(case):
    layer = TIES[case][0]().double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
    gradient = torch.randn_like(layer.weight)
    feed(layer, gradient)
    optimizer.step()
    tie(layer, case, optimizer=optimizer)
    labels = tp.get_tie(layer).orbit_labels().flatten()
    signs, labels = labels.sign(), labels.abs() - 1
    expected = torch.zeros(int(labels.max()) + 1, dtype=torch.float64)
    expected.index_add_(0, labels, signs * gradient.flatten())
    free = list(layer.parametrizations.weight.parameters())
    for moved in (
        torch.cat([optimizer.state[p]["momentum_buffer"].flatten() for p in free]),
        torch.cat([p.grad.flatten() for p in free]),
    ):
        torch.testing.assert_close(moved, expected, rtol=1e-14, atol=1e-14)
    tp.remove_tie(layer, optimizer=optimizer)
    counts = torch.bincount(labels).double()
    mean = (signs * (expected / counts)[labels]).view_as(layer.weight)
    torch.testing.assert_close(layer.weight.grad, mean, rtol=1e-14, atol=1e-14)
    buffer = optimizer.state[layer.weight]["momentum_buffer"]
    torch.testing.assert_close(buffer, mean, rtol=1e-14, atol=1e-14)


def test_second_moments_of_a_signed_orbit_stay_positive():
    layer = nn.Linear(4, 2).double()
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(3, 4).double()).square().sum().backward()
    optimizer.step()
    second = optimizer.state[layer.weight]["exp_avg_sq"].clone()
    tp.register_tie(layer, Odd(), optimizer=optimizer)
    (free,) = layer.parametrizations.weight.parameters()
    expected = 2 * (second[:, :2] + second[:, 2:].flip(1))
    torch.testing.assert_close(optimizer.state[free]["exp_avg_sq"], expected)
    tp.remove_tie(layer, optimizer=optimizer)
    dense = optimizer.state[layer.weight]["exp_avg_sq"]
    torch.testing.assert_close(dense[:, :2], expected / 4)
    torch.testing.assert_close(dense, dense.flip(1))


def test_groups_order_names_and_step_are_kept():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.Adam(
        [
            {"params": list(model[0].named_parameters(prefix="0")), "lr": 0.1},
            {"params": list(model[1].named_parameters(prefix="1")), "lr": 0.2},
        ]
    )
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    step = optimizer.state[model[1].weight]["step"]
    tp.register_tie(model[1], "flip_sym", optimizer=[optimizer])
    (free,) = model[1].parametrizations.weight.parameters()
    group = optimizer.param_groups[1]
    assert group["lr"] == 0.2
    assert group["params"][0] is free
    assert group["params"][1] is model[1].bias
    assert group["param_names"] == ["1.parametrizations.weight.original0", "1.bias"]
    moved = optimizer.state[free]["step"]
    assert torch.equal(moved, step)
    assert moved is not step
    tp.remove_tie(model[1], optimizer=optimizer)
    assert group["params"][0] is model[1].weight
    assert group["param_names"] == ["1.weight", "1.bias"]
    assert len(optimizer.state) == 4
    optimizer.step()


def test_several_optimizers_move_at_once():
    layer = nn.Linear(4, 4)
    optimizers = [torch.optim.SGD([layer.weight], lr=0.1), torch.optim.Adam(layer.parameters())]
    tp.register_tie(layer, "flip_sym", optimizer=optimizers)
    (free,) = layer.parametrizations.weight.parameters()
    assert optimizers[0].param_groups[0]["params"][0] is free
    assert optimizers[1].param_groups[0]["params"][0] is free


def test_a_rule_with_two_free_tensors_keeps_its_place():
    layer = nn.Conv2d(3, 4, 3)
    optimizer = torch.optim.Adam(layer.parameters())
    tp.register_tie(layer, TwoHalves, optimizer=optimizer)
    first, second = layer.parametrizations.weight.parameters()
    params = optimizer.param_groups[0]["params"]
    assert [id(p) for p in params] == [id(first), id(second), id(layer.bias)]
    tp.remove_tie(layer, optimizer=optimizer)
    assert [id(p) for p in params] == [id(layer.weight), id(layer.bias)]


@pytest.mark.feature(
    "Optimizers",
    "`torch.optim.Adafactor` with `optimizer=`, after a step",
    refused="its state is of rows and columns; build it after tying",
)
@pytest.mark.parametrize(
    "make",
    [torch.optim.Adafactor, torch.optim.LBFGS],
)
def test_state_that_cannot_follow_is_refused_and_nothing_changes(make):
    layer = nn.Linear(4, 4, bias=False)
    weight, optimizer = layer.weight, make(layer.parameters())

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    state = dict(optimizer.state[weight])
    with pytest.raises(tp.TieError, match="Build the optimizer after tying"):
        tp.register_tie(layer, "flip_sym", optimizer=optimizer)
    assert type(layer) is nn.Linear
    assert layer.weight is weight
    assert optimizer.param_groups[0]["params"][0] is weight
    assert optimizer.state[weight].keys() == state.keys()
    assert all(optimizer.state[weight][key] is value for key, value in state.items())
    optimizer.step(closure)


@pytest.mark.feature(
    "Optimizers",
    "`torch.optim.LBFGS` with `optimizer=`",
    refused="its history has no map; build it after tying",
)
def test_lbfgs_is_refused_whichever_parameter_holds_its_history():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    tp.register_tie(model[0], "flip_sym", optimizer=optimizer)  # no history yet
    optimizer.step(closure)
    with pytest.raises(tp.TieError, match="LBFGS holds one history"):
        tp.register_tie(model[1], "flip_sym", optimizer=optimizer)
    optimizer.step(closure)


def test_optimizer_that_does_not_hold_the_weight_is_refused():
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(tp.TieError, match="none of the optimizers holds it"):
        tp.register_tie(layer, "flip_sym", optimizer=optimizer)
    assert type(layer) is nn.Linear
    with pytest.raises(TypeError, match="takes torch optimizers, not str"):
        tp.register_tie(layer, "flip_sym", optimizer="adam")
    assert type(layer) is nn.Linear


@pytest.mark.feature(
    "Optimizers",
    "a step of an optimizer that was built before tying",
    refused="it holds the replaced Parameter; pass `optimizer=` or build it after tying",
)
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adam(p, fused=True),
        lambda p: torch.optim.AdamW(p, foreach=True),
    ],
    ids=["sgd", "adam_fused", "adamw_foreach"],
)
def test_s18_stepping_with_a_replaced_parameter_raises_before_it_writes(make):
    layer = nn.Conv2d(3, 3, 3)
    optimizer = make(layer.parameters())
    for _ in range(2):  # state of the old shape exists (S17)
        layer(torch.randn(1, 3, 5, 5)).sum().backward()
        optimizer.step()
    tp.register_tie(layer, "flip_sym")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(torch.randn(1, 3, 5, 5)).sum().backward()
    with pytest.raises(tp.TieError, match=r"still holds the dense parameter .* pass optimizer="):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())

    fresh = make(layer.parameters())
    fresh.step()
    tp.remove_tie(layer)
    layer(torch.randn(1, 3, 5, 5)).sum().backward()
    with pytest.raises(tp.TieError, match=r"still holds a free value .* to remove_tie"):
        fresh.step()


def test_the_ways_on_for_an_optimizer_that_was_left_out():
    """What its messages say, one after the other: none leads back to where it came from."""
    layer = nn.Linear(4, 4)

    def step(optimizer):
        layer(torch.ones(1, 4)).sum().backward()
        optimizer.step()

    left_out = torch.optim.Adam(layer.parameters())
    tp.register_tie(layer, "flip_sym")
    with pytest.raises(tp.TieError, match="Rebuild the optimizer now that the tensor is tied"):
        step(left_out)
    step(torch.optim.Adam(layer.parameters()))
    # whoever unties to pass it after all
    for undo in (tp.remove_tie, tp.untie_model):
        with pytest.raises(tp.TieError, match="Leave optimizer= out, and rebuild the optimizer"):
            undo(layer, optimizer=left_out)
    tp.remove_tie(layer)
    with pytest.raises(tp.TieError, match="Leave optimizer= out, and rebuild the optimizer"):
        tp.register_tie(layer, "flip_sym", optimizer=left_out)
    tp.register_tie(layer, "flip_sym")
    left_out = torch.optim.Adam(layer.parameters())
    step(left_out)
    tp.remove_tie(layer)
    with pytest.raises(tp.TieError, match="Rebuild the optimizer; to keep its state"):
        step(left_out)
    step(torch.optim.Adam(layer.parameters()))


def test_s17_tying_makes_fresh_parameters():
    layer = nn.Linear(4, 6)
    weight = layer.weight
    tp.register_tie(layer, "row_repeat")
    (free,) = layer.parametrizations.weight.parameters()
    assert free is not weight
    assert weight.shape == (6, 4)


def test_s19_state_loaded_by_index_raises_before_the_step():
    def train(model):
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        return optimizer

    dense = nn.Linear(4, 6)
    saved = train(dense).state_dict()
    tied = tp.register_tie(nn.Linear(4, 6), "row_repeat")
    optimizer = train(tied)
    optimizer.load_state_dict(saved)
    tied(torch.randn(2, 4)).sum().backward()
    with pytest.raises(tp.TieError, match="its state was loaded by index"):
        optimizer.step()
    # a state of its own loads and steps
    optimizer = train(tied)
    optimizer.load_state_dict(train(tied).state_dict())
    optimizer.step()


def test_s19_untying_gives_the_parameters_their_old_order():
    layer = nn.Linear(4, 4)
    tp.register_tie(layer, "flip_sym")
    assert next(name for name, _ in layer.named_parameters()) == "bias"
    tp.remove_tie(layer)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_copy_drops_the_state_and_comes_back_beside_its_source():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.Adam(
        [
            {"params": model[1].parameters(), "lr": 0.1},
            {"params": model[0].parameters(), "lr": 0.2},
        ]
    )
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    weight = model[1].weight
    tp.register_tie(model[1], "copy", source=model[0], optimizer=optimizer)
    assert weight not in optimizer.state
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(model[1].bias)]
    optimizer.step()
    tp.remove_tie(model[1], optimizer=optimizer)
    assert optimizer.param_groups[1]["params"][-1] is model[1].weight
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()


def test_frozen_layers_need_no_optimizer_that_holds_them():
    layer = nn.Linear(4, 4).requires_grad_(False)
    head = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    tp.register_tie(layer, "flip_sym", optimizer=optimizer)
    assert not any(p.requires_grad for p in layer.parameters())
    tp.remove_tie(layer, optimizer=optimizer)
    assert not layer.weight.requires_grad


@pytest.mark.feature("Optimizers", "learning-rate schedulers of an optimizer that was moved")
def test_a_scheduler_keeps_working_on_a_moved_optimizer():
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    tp.register_tie(layer, "flip_sym", optimizer=optimizer)
    layer(torch.randn(2, 4)).sum().backward()
    (free,) = layer.parametrizations.weight.parameters()
    before = free.detach().clone()
    optimizer.step()
    scheduler.step()
    assert not torch.equal(before, free)
    assert scheduler.get_last_lr() == [0.5]


@pytest.mark.feature("Optimizers", "`torch.compile(optimizer.step)`")
def test_the_guard_lets_a_compiled_step_through():
    layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(2, 4)).sum().backward()
    (free,) = layer.parametrizations.weight.parameters()
    expected = free.detach() - 0.1 * free.grad
    torch.compile(optimizer.step, backend="eager")()
    torch.testing.assert_close(free.detach(), expected)


def test_an_untied_copy_joins_the_group_that_holds_its_source_tensor_and_no_other():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tp.register_tie(model[1], "copy", source=model[0])
    tp.register_tie(model[2], "copy", source=model[1])
    groups = [{"params": [model[0].bias, model[1].bias]}, {"params": [model[0].weight]}]
    holds = torch.optim.AdamW(groups)
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    tp.remove_tie(model[2], optimizer=[other, holds])
    assert holds.param_groups[1]["params"][-1] is model[2].weight
    assert len(other.param_groups[0]["params"]) == 1
    with pytest.raises(tp.TieError, match="none holds its source"):
        tp.remove_tie(model[1], optimizer=[other, torch.optim.SGD(model[1].parameters(), lr=1)])
    assert tp.is_tied(model[1])


def test_a_failed_untying_changes_nothing():
    basis = torch.linalg.qr(torch.randn(4, 4))[0]  # float32: the float64 counts do not fit it

    class Basis(tp.Rule):
        def free_shapes(self):
            return (self.bound_layout.shape,)

        def forward(self, a):
            return a @ basis

        def right_inverse(self, weight):
            return ((weight @ basis.t()).contiguous(),)

    layer = tp.register_tie(nn.Linear(4, 4), Basis)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 4)).sum().backward()
    with pytest.raises(RuntimeError):
        tp.remove_tie(layer, optimizer=optimizer)
    assert tp.is_tied(layer)
    (free,) = layer.parametrizations.weight.parameters()
    assert free.grad is not None
    assert any(free is p for p in optimizer.param_groups[0]["params"])
    optimizer.step()


class Exponential(tp.Rule):
    """Positive rows: not linear in what it stores."""

    law = "W[o] = exp(w)"

    def free_shapes(self):
        return ((1, self.bound_layout.shape[1]),)

    def forward(self, w):
        return w.exp().expand(self.bound_layout.shape)

    def right_inverse(self, weight):
        self.bind_shape(weight)
        return (weight.abs().mean(0, keepdim=True).log(),)

    def symmetries(self, weight):
        yield weight.roll(1, 0)


@pytest.mark.parametrize("pending", ["gradient", "state"])
def test_what_a_nonlinear_rule_cannot_move_is_refused(pending):
    def stepped(layer, values):
        optimizer = torch.optim.Adam(layer.parameters())
        layer(torch.ones(1, 3)).sum().backward()
        if pending == "state":
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    what = "optimizer state" if pending == "state" else "a pending gradient"
    layer = nn.Linear(3, 4)
    optimizer = stepped(layer, [layer.weight])
    with pytest.raises(tp.TieError, match=f"not linear, and how {what} follows"):
        tp.register_tie(layer, Exponential(), optimizer=optimizer)
    assert not tp.is_tied(layer)
    layer = tp.register_tie(nn.Linear(3, 4), Exponential())
    optimizer = stepped(layer, list(layer.parametrizations.parameters()))
    with pytest.raises(tp.TieError, match=f"not linear, and how {what} follows"):
        tp.remove_tie(layer, optimizer=optimizer)
    assert tp.is_tied(layer)
    layer = tp.register_tie(nn.Linear(3, 4), Exponential())
    tp.remove_tie(layer, optimizer=torch.optim.Adam(layer.parameters()))


def test_untied_copies_have_names_of_their_own_in_an_optimizer():
    model = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
    tp.register_tie(model[1], "copy", source=model[0])
    tp.register_tie(model[2], "copy", source=model[0])
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    tp.remove_tie(model[1], optimizer=optimizer)
    tp.remove_tie(model[2], optimizer=optimizer)
    names = optimizer.param_groups[0]["param_names"]
    assert len(set(names)) == len(names) == len(optimizer.param_groups[0]["params"])


def test_s19_copies_and_assigned_values_are_watched_as_the_original():
    dense = nn.Linear(64, 64)
    saved = torch.optim.Adam(dense.parameters())
    dense(torch.ones(1, 64)).sum().backward()
    saved.step()
    layer = tp.register_tie(nn.Linear(64, 64), "row_repeat")
    assigned = copy.deepcopy(layer)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    assigned.load_state_dict(state, assign=True)
    for watched in (layer, copy.deepcopy(layer), assigned):
        optimizer = torch.optim.Adam(watched.parameters(), fused=True)
        optimizer.load_state_dict(saved.state_dict())
        watched(torch.ones(1, 64)).sum().backward()
        with pytest.raises(tp.TieError, match="loaded by index"):
            optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("frozen_value", [0, 1])
def test_state_of_some_free_values_only_is_not_lost(kind, frozen_value):
    layer = tp.register_tie(nn.Conv2d(4, 4, 3), TwoHalves)
    values = list(layer.parametrizations.weight.parameters())
    values[frozen_value].requires_grad_(False)
    optimizer = kind(
        layer.parameters(), lr=0.1, **({"momentum": 0.9} if kind.__name__ == "SGD" else {})
    )
    layer(torch.ones(1, 4, 3, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(tp.TieError, match="holds state for some of its free values only"):
        tp.remove_tie(layer, optimizer=optimizer)
    assert tp.is_tied(layer)


@pytest.mark.parametrize("source_has_one", [True, False])
def test_a_pending_gradient_of_a_new_copy_goes_to_its_source(source_has_one):
    """Backward, then tie: the gradients of both uses arrive, as if it had been tied before."""
    torch.manual_seed(0)
    pair = [nn.Linear(3, 3), nn.Linear(3, 3)]
    with torch.no_grad():
        pair[1].weight.copy_(pair[0].weight.square())
    tied = copy.deepcopy(pair)
    tp.register_tie(tied[1], "squared_copy", source=tied[0])
    x = torch.randn(2, 3)
    for first, second in (pair, tied):
        loss = second(x).square().sum()
        if source_has_one:
            loss = loss + first(x).square().sum()
        loss.backward()
    tp.register_tie(pair[1], "squared_copy", source=pair[0])
    torch.testing.assert_close(pair[0].weight.grad, tied[0].weight.grad)


def test_free_values_that_made_different_numbers_of_steps_are_refused():
    layer = tp.register_tie(nn.Conv2d(4, 4, 3), TwoHalves)
    first, second = layer.parametrizations.weight.parameters()
    optimizer = torch.optim.Adam(layer.parameters())
    for frozen in (False, True):
        layer(torch.ones(1, 4, 3, 3)).sum().backward()
        if frozen:
            second.grad = None
        optimizer.step()
    optimizer.zero_grad()
    before = snapshot(layer, optimizer)
    with pytest.raises(tp.TieError, match=r"different numbers of steps \('step' of the Adam\)"):
        tp.remove_tie(layer, optimizer=optimizer)
    assert snapshot(layer, optimizer) == before
    assert first.grad is None


def test_an_optimizer_that_is_named_twice_is_moved_once():
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    tp.register_tie(layer, "flip_sym", optimizer=[optimizer, optimizer])
    (value,) = layer.parametrizations.weight.parameters()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(value), id(layer.bias)]
