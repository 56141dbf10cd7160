"""Optimizers go by what they do: trajectories against the dense run, and who is refused."""

from __future__ import annotations

import copy
import dataclasses
import functools
import subprocess
import sys

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support import older_than
from tests.support.optimizer_cases import (
    MULTIPLICITY,
    TIES,
    VARIANTS,
    Variant,
    check_trajectory,
    feed,
    lawful_gradients,
    lawful_layer,
    snapshot,
    tie,
)
from tiedparam.state import optimizer_laws

MUON = () if older_than("2.9") else (torch.optim.Muon,)
REFUSED = (torch.optim.Adafactor, torch.optim.LBFGS, torch.optim.SparseAdam, *MUON)
with_muon = pytest.mark.skipif(not MUON, reason="torch.optim has Muon since 2.9")
SCALE_FREE = [n for n, v in VARIANTS.items() if optimizer_laws._LAWS[v.kind].normalized]
DECAYING = [name for name, v in VARIANTS.items() if v.decay is not None]


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


def test_the_first_steps_of_radam_are_proportional_to_the_gradient():
    """Five with the default betas; then they are normalized."""
    torch.manual_seed(0)
    dense = lawful_layer("row_repeat")
    twin = tie(copy.deepcopy(dense), "row_repeat")
    optimizers = [torch.optim.RAdam(layer.parameters(), eps=0) for layer in (dense, twin)]
    for step, gradient in enumerate(lawful_gradients(dense, "row_repeat", 8)):
        before = [layer.weight.detach().clone() for layer in (dense, twin)]
        for layer, optimizer in zip((dense, twin), optimizers, strict=True):
            feed(layer, gradient)
            optimizer.step()
        one, other = dense.weight - before[0], twin.weight - before[1]
        factor = MULTIPLICITY["row_repeat"] if step < 5 else 1
        torch.testing.assert_close(other, factor * one, rtol=1e-9, atol=1e-12)


OTHER_KIND = {
    "gradient": "weight",
    "gradient magnitude": "weight magnitude",
    "squared gradient": "gradient magnitude",
    "weight": "gradient",
    "weight magnitude": "gradient magnitude",
}
ENTRIES = [
    (kind, entry, how)
    for kind, law in optimizer_laws._TORCHS_OWN.items()
    for entry, how in law.state.items()
    if how != "scalar"
]


@pytest.mark.parametrize(("kind", "entry", "how"), ENTRIES)
def test_the_trajectories_would_show_a_wrong_kind_of_any_entry(kind, entry, how, monkeypatch):
    law = optimizer_laws._LAWS[kind]
    # of the last gradient Rprop reads the sign alone
    other = "zeros" if entry == "prev" else OTHER_KIND[how]
    wrong = dataclasses.replace(law, state={**law.state, entry: other})
    monkeypatch.setitem(optimizer_laws._LAWS, kind, wrong)
    options = {
        "max_exp_avg_sq": "amsgrad",
        "grad_avg": "centered",
        "momentum_buffer": "momentum",
        "ax": "t0",
    }
    needed = options.get(entry)
    variants = [v for v in VARIANTS.values() if v.kind is kind]
    variant = next(v for v in variants if needed is None or needed in v.options)
    with pytest.raises(AssertionError):
        check_trajectory("row_repeat", variant)


@pytest.mark.parametrize("kind", sorted({v.kind for v in map(VARIANTS.get, DECAYING)}, key=str))
def test_the_trajectories_would_show_decay_that_is_left_as_it_is(kind, monkeypatch):
    law = dataclasses.replace(optimizer_laws._LAWS[kind], coupled_decay=())
    monkeypatch.setitem(optimizer_laws._LAWS, kind, law)
    for name in DECAYING:
        if VARIANTS[name].kind is kind:
            with pytest.raises(AssertionError):
                test_s42_coupled_decay_is_as_strong_as_in_the_dense_run("row_repeat", name)


def test_every_optimizer_of_torch_is_known_and_tried():
    torchs = {
        kind for kind in vars(torch.optim).values()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    } - {torch.optim.Optimizer}  # fmt: skip
    assert torchs == optimizer_laws._TORCHS_OWN.keys()
    moved = {kind for kind, law in optimizer_laws._TORCHS_OWN.items() if not law.refused}
    assert moved == {variant.kind for variant in VARIANTS.values()}
    assert moved | set(REFUSED) == torchs


# Who is refused -----------------------------------------------------------------------------


class LARS(torch.optim.Optimizer):
    """You et al. 2017: the rate of each tensor goes by its norm; SGD's name for its state."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
                trust = p.norm() / p.grad.norm()
                buffer.mul_(group["momentum"]).add_(p.grad * trust, alpha=group["lr"])
                p.sub_(buffer)


class AdaBound(torch.optim.Optimizer):
    """Luo et al. 2019: Adam's state, and bounds on the rate that do not scale with it."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                first = state.setdefault("exp_avg", torch.zeros_like(p))
                second = state.setdefault("exp_avg_sq", torch.zeros_like(p))
                first.lerp_(p.grad, 0.1)
                second.lerp_(p.grad.square(), 0.001)
                rate = (group["lr"] / second.sqrt().add(1e-8)).clamp(0.05, 0.2)
                p.sub_(rate * first)


class KroneckerFactors(torch.optim.SGD):
    """As K-FAC: inherits SGD's step, and keeps what it knows of the layers elsewhere."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.grad / (1 + p.grad.norm())
        return super().step(closure)


class OtherStart(torch.optim.Adam):
    def _init_group(self, group, *lists):
        return super()._init_group(group, *lists)


def square(kind, *, steps=1, size=4, **options):
    """A square layer and its optimizer after some steps."""
    torch.manual_seed(0)
    layer = nn.Linear(size, size, bias=False)
    optimizer = kind(layer.parameters(), **options)

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.ones(2, size)).square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        closure()
        optimizer.step(closure)
    return layer, optimizer, closure


def check_refused(layer, optimizer, closure, reason):
    closure()
    before = snapshot(layer, optimizer)
    with pytest.raises(tp.TieError, match=reason):
        tp.register_tie(layer, "flip_sym", optimizer=optimizer)
    with pytest.raises(tp.TieError, match=reason):
        tp.tie_model(layer, {"": "flip_sym"}, optimizer=optimizer)
    assert snapshot(layer, optimizer) == before
    optimizer.step(closure)


@pytest.mark.feature(
    "Optimizers",
    "LARS, AdaBound, K-FAC and any other class that is not torch.optim's, with `optimizer=`",
    refused="what they do is not known; build them after tying, or `register_optimizer`",
)
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (LARS, "how the LARS makes its steps is not known"),
        (AdaBound, "how the AdaBound makes its steps is not known"),
        (KroneckerFactors, "the KroneckerFactors overrides step of SGD"),
        (OtherStart, "the OtherStart overrides _init_group of Adam"),
    ],
)
def test_s41_an_optimizer_whose_update_is_not_known_is_refused(kind, reason, steps):
    layer, optimizer, closure = square(kind, steps=steps)
    way_out = ".*Build the optimizer after tying, or register its law with tiedparam.register_opt"
    check_refused(layer, optimizer, closure, reason + way_out)
    # untying is refused in the same way
    layer = tp.register_tie(nn.Linear(4, 4, bias=False), "flip_sym")
    optimizer = kind(layer.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    before = snapshot(layer, optimizer)
    with pytest.raises(tp.TieError, match=reason + ".*Build the optimizer after untying"):
        tp.remove_tie(layer, optimizer=optimizer)
    assert snapshot(layer, optimizer) == before
    optimizer.step()


@pytest.mark.feature(
    "Optimizers",
    "`torch.optim.Muon` with `optimizer=`",
    refused="it orthogonalizes the matrix, and the free values are not that matrix. A `TieWarning` "
    "if it is built from them",
)
@with_muon
@pytest.mark.parametrize("steps", [0, 1])
def test_s41_muon_is_refused_before_and_after_its_first_step(steps):
    layer, optimizer, closure = square(torch.optim.Muon, steps=steps)
    check_refused(layer, optimizer, closure, "Muon orthogonalizes the weight matrix")


@with_muon
def test_s41_muon_that_was_built_from_free_values_says_so_and_is_not_untied():
    layer = tp.register_tie(nn.Linear(4, 4, bias=False), "flip_sym")
    muon = torch.optim.Muon(layer.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    with pytest.warns(
        tp.TieWarning, match=r"the Muon steps the free values of 'weight' of Lin.*own"
    ):
        muon.step()
    muon.step()  # once
    before = snapshot(layer, muon)
    with pytest.raises(tp.TieError, match="Muon orthogonalizes the weight matrix"):
        tp.remove_tie(layer, optimizer=muon)
    assert snapshot(layer, muon) == before


@with_muon
def test_s41_muon_that_does_not_hold_the_weight_is_no_hindrance():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    muon = torch.optim.Muon(model[0].parameters())
    adamw = torch.optim.AdamW(model[1].parameters())
    tp.register_tie(model[1], "flip_sym", optimizer=[muon, adamw])
    assert tp.owner(adamw.param_groups[0]["params"][0]).layer is model[1]


@with_muon
def test_a_copy_leaves_muon_and_comes_back_to_it():
    """Nothing is moved: the state of a copy is dropped, and each matrix is updated by itself."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    muon = torch.optim.Muon(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    muon.step()
    tp.register_tie(model[1], "copy", source=model[0], optimizer=muon)
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(model[0].weight)]
    tp.remove_tie(model[1], optimizer=muon)
    assert muon.param_groups[0]["params"][1] is model[1].weight
    model(torch.ones(1, 4)).sum().backward()
    muon.step()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (torch.optim.Adafactor, "Adafactor keeps the second moments of rows and columns"),
        (torch.optim.LBFGS, "LBFGS holds one history"),
    ],
)
def test_what_cannot_follow_is_refused_after_a_step_and_taken_before_it(kind, reason):
    check_refused(*square(kind), reason + ".* Build the optimizer after tying")
    layer, optimizer, _ = square(kind, steps=0)
    tp.register_tie(layer, "flip_sym", optimizer=optimizer)
    # it is what an optimizer that is built now would be
    twin = copy.deepcopy(layer)
    other = kind(twin.parameters())
    for _ in range(3):
        for model, each in ((layer, optimizer), (twin, other)):

            def again(model=model, each=each):
                each.zero_grad()
                loss = model(torch.ones(2, 4)).square().sum()
                loss.backward()
                return loss

            each.step(again)
    assert torch.equal(layer.weight, twin.weight)


def test_sparse_adam_is_refused():
    layer = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SparseAdam(layer.parameters())
    with pytest.raises(tp.TieError, match="SparseAdam takes .* build another optimizer after"):
        tp.register_tie(layer, "flip_sym", optimizer=optimizer)
    assert not tp.is_tied(layer)


@pytest.mark.feature(
    "Optimizers",
    "torchao's optimizers with 8-bit, 4-bit and float8 states, with `optimizer=`",
    needs="torchao",
    refused="their update rounds the state; build them after tying",
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["AdamW8bit", "Adam4bit", "AdamWFp8"])
def test_s41_the_8_bit_states_of_torchao_are_refused(name):
    kind = getattr(pytest.importorskip("torchao.optim"), name)
    layer, optimizer, closure = square(kind, size=64)
    assert type(optimizer.state[layer.weight]["exp_avg"]) is not torch.Tensor
    check_refused(layer, optimizer, closure, f"how the {name} makes its steps is not known")
    tp.register_tie(layer, "flip_sym")
    built_after = kind(layer.parameters())
    before = layer.weight.detach().clone()
    layer(torch.ones(2, 64)).square().sum().backward()
    built_after.step()
    assert not torch.equal(layer.weight, before)


def test_a_state_of_another_kind_of_tensor_is_refused(monkeypatch):
    """Even of a class that is known: what its arithmetic does is not."""

    class Rounded(torch.Tensor):
        pass

    layer, optimizer, closure = square(torch.optim.Adam)
    state = optimizer.state[layer.weight]
    state["exp_avg"] = state["exp_avg"].as_subclass(Rounded)
    check_refused(layer, optimizer, closure, "holds the state 'exp_avg', and how it follows")


def test_an_entry_that_the_law_does_not_name_is_refused():
    layer, optimizer, closure = square(torch.optim.Adam)
    optimizer.state[layer.weight]["extra"] = torch.zeros(4, 4)
    check_refused(layer, optimizer, closure, "holds the state 'extra', and how it follows")


# Who is taken for whom ----------------------------------------------------------------------


class OtherDefaults(torch.optim.Adam):
    """Nothing of the update is changed."""

    def __init__(self, params):
        super().__init__(params, lr=0.02, eps=0)
        self.note = "mine"

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)

    def describe(self):
        return self.note


def test_a_subclass_that_leaves_the_update_alone_is_moved():
    layer, optimizer, closure = square(OtherDefaults)
    tp.register_tie(layer, "flip_sym", optimizer=optimizer)
    (value,) = layer.parameters()
    assert optimizer.state[value]["exp_avg"].shape == value.shape
    optimizer.step(closure)


def test_a_subclass_is_known_though_torch_hooks_its_inherited_step():
    """Torch wraps ``step`` in the class of the first instance, be it inherited or not."""
    script = """
import torch, tiedparam as tp
class Mine(torch.optim.Rprop): pass
layer = torch.nn.Linear(4, 4)
optimizer = Mine(layer.parameters())
assert "step" in vars(Mine)
tp.register_tie(layer, "flip_sym", optimizer=optimizer)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_step_that_pretends_to_be_the_inherited_one_is_seen():
    class Pretender(torch.optim.Adam):
        @functools.wraps(torch.optim.Adam.step)
        def step(self, closure=None):
            return None

    layer, optimizer, _ = square(Pretender)
    with pytest.raises(tp.TieError, match="the Pretender overrides step of Adam"):
        tp.register_tie(layer, "flip_sym", optimizer=optimizer)


def test_the_optimizer_within_accelerates_wrapper_is_moved():
    accelerate = pytest.importorskip("accelerate")
    layer, optimizer, _ = square(torch.optim.Adam)
    layer, wrapped = accelerate.Accelerator(cpu=True).prepare(layer, optimizer)
    tp.register_tie(layer, "flip_sym", optimizer=wrapped)
    (value,) = layer.parameters()
    assert wrapped.state[value]["exp_avg"].shape == value.shape
    before = layer.weight.detach().clone()
    layer(torch.ones(2, 4)).sum().backward()
    wrapped.step()
    assert not torch.equal(layer.weight, before)
    tp.remove_tie(layer, optimizer=wrapped)
    assert wrapped.param_groups[0]["params"][0] is layer.weight


@pytest.mark.filterwarnings("ignore")
def test_the_optimizer_within_lightnings_wrappers_is_moved():
    pytest.importorskip("lightning")
    from lightning.fabric import Fabric
    from lightning.pytorch.core.optimizer import LightningOptimizer

    layer, optimizer, _ = square(torch.optim.Adam)
    tp.register_tie(layer, "flip_sym", optimizer=LightningOptimizer(optimizer))
    (value,) = layer.parameters()
    assert optimizer.state[value]["exp_avg"].shape == value.shape
    layer, optimizer, _ = square(torch.optim.Adam)
    _, wrapped = Fabric(accelerator="cpu", devices=1).setup(nn.Linear(1, 1), optimizer)
    tp.register_tie(layer, "flip_sym", optimizer=wrapped)
    (value,) = layer.parameters()
    assert optimizer.state[value]["exp_avg"].shape == value.shape


def test_a_wrapped_optimizer_that_is_not_known_is_refused():
    accelerate = pytest.importorskip("accelerate")
    layer, optimizer, _ = square(LARS)
    layer, wrapped = accelerate.Accelerator(cpu=True).prepare(layer, optimizer)
    with pytest.raises(tp.TieError, match="how the LARS makes its steps is not known"):
        tp.register_tie(layer, "flip_sym", optimizer=wrapped)


# A law for an optimizer of one's own --------------------------------------------------------


@pytest.fixture
def laws(monkeypatch):
    monkeypatch.setattr(optimizer_laws, "_LAWS", dict(optimizer_laws._LAWS))


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023: the sign of an averaged gradient; decay that is decoupled."""

    def __init__(self, params, lr=0.01, weight_decay=0.1):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                mean = state.setdefault("mean", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (0.9 * mean + 0.1 * p.grad).sign())
                mean.lerp_(p.grad, 0.01)


@pytest.mark.feature(
    "Optimizers", "an optimizer of one's own, with its law given to `register_optimizer`"
)
@pytest.mark.parametrize("case", TIES)
def test_a_registered_optimizer_goes_on_as_the_dense_run(case, laws):
    variant = Variant(Lion, decay=None)
    with pytest.raises(tp.TieError, match="how the Lion makes its steps is not known"):
        check_trajectory(case, variant)
    tp.register_optimizer(Lion, {"mean": "gradient", "count": "scalar"}, coupled_decay=())
    check_trajectory(case, variant)


def test_a_registered_coupled_decay_moves_with_the_values(laws):
    class Coupled(KroneckerFactors):
        step = torch.optim.SGD.step  # of its own, with SGD's update

    tp.register_optimizer(Coupled, {"momentum_buffer": "gradient"}, coupled_decay="weight_decay")
    layer = nn.Linear(6, 8, bias=False)
    optimizer = Coupled(layer.parameters(), weight_decay=0.5)
    tie(layer, "row_repeat", optimizer=optimizer)
    assert optimizer.param_groups[0]["weight_decay"] == 2.0


def test_a_registered_entry_may_start_anew(laws):
    tp.register_optimizer(AdaBound, {"exp_avg": "zeros", "exp_avg_sq": "zeros"}, coupled_decay=())
    layer, optimizer, closure = square(AdaBound)
    tp.register_tie(layer, "flip_sym", optimizer=optimizer)
    (value,) = layer.parameters()
    assert torch.equal(optimizer.state[value]["exp_avg"], torch.zeros(5, 2))
    optimizer.step(closure)
    tp.remove_tie(layer, optimizer=optimizer)
    assert torch.equal(optimizer.state[layer.weight]["exp_avg_sq"], torch.zeros(4, 4))


def test_registering_checks_what_it_is_given(laws):
    with pytest.raises(TypeError, match="takes a class of optimizers, not 'Lion'"):
        tp.register_optimizer("Lion", {}, coupled_decay=())
    with pytest.raises(
        TypeError, match="'mean' cannot follow a tie as 'grad'. Choose .*'gradient'"
    ):
        tp.register_optimizer(Lion, {"mean": "grad"}, coupled_decay=())
    with pytest.raises(ValueError, match="the law of torch.optim.Adam is known"):
        tp.register_optimizer(torch.optim.Adam, {}, coupled_decay=())
    assert Lion not in optimizer_laws._LAWS
    state = {"mean": "gradient", "count": "scalar"}
    tp.register_optimizer(Lion, state, coupled_decay=())
    state["mean"] = "weight"
    assert optimizer_laws._LAWS[Lion].state["mean"] == "gradient"
