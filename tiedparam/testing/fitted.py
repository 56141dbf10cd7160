"""Laws whose free values are solved for: by least squares, or as the factors of a product.

They read other layers, or multiply free values by one another, so no entry of the weight is a free
value. What is promised of them is the nearest start, and a weight that comes back up to rounding.
"""

from __future__ import annotations

import math
import pickle
import sys
from typing import Any

import torch
from torch import Tensor, nn

from tiedparam.laws.fitted import is_fitted, rounding
from tiedparam.laws.rule import Rule
from tiedparam.layer.values import assign_, init_
from tiedparam.testing.cases import (
    COMPUTE,
    DTYPES,
    Case,
    Host,
    assert_lawful,
    drawn_free,
    flat,
    owned_bytes,
    same,
)
from tiedparam.testing.changes import with_an_unlawful_checkpoint
from tiedparam.testing.judge import close, hold, refused
from tiedparam.testing.statement import states
from tiedparam.testing.values import adam_keeps_two_numbers_each
from tiedparam.util.errors import TieError

NEAREST = "Let fit(), or right_inverse(), solve for the free values that come nearest."


def _sources(rule: Rule) -> tuple[Tensor, ...]:
    return tuple(value.detach().clone() for value in rule.read())


@states("laws with fitted values", NEAREST)
def fit_undoes_forward(case: Case) -> None:
    """Of a weight that `forward` has made the fit gives that weight again, and its free values.

    Only the weight where the law says that it is `bilinear`.
    """
    for dtype in DTYPES:
        rule = case.tied(dtype).rule
        sources = _sources(rule)
        for _ in range(3):
            free = drawn_free(rule, dtype)
            weight = rule(*sources, *free)
            hold(weight.dtype == dtype, f"forward makes {weight.dtype} of {dtype}")
            found = rule.fit_to(weight, sources)
            hold(not isinstance(found, Tensor), "the fit returns a tensor, no tuple")
            same(rule, rule(*sources, *found), weight, f"in {dtype} the weight that comes back")
            if not rule.bilinear:
                what = f"in {dtype} what comes back of the free values"
                close(flat(found), flat(free), what, **COMPUTE[dtype])


@states("laws with fitted values", NEAREST)
def start_is_the_nearest(case: Case) -> None:
    """Tying takes free values of which no change brings the weight nearer to the dense one."""
    dense = case.dense(torch.float64)
    goal = dense.weight
    host = case.tie(dense)
    rule, sources = host.rule, _sources(host.rule)
    free = [parameter.detach().clone().requires_grad_() for parameter in host.free]
    distance = (rule(*sources, *free) - goal).norm()
    _no_small_step_comes_nearer(distance, free)
    for length in (1e-3, 1e-1, 1.0, 10.0):
        for _ in range(10):
            moved = [v.detach() + length * torch.randn_like(v) for v in free]
            found = (rule(*sources, *moved) - goal).norm()
            gained = float(distance - found)
            hold(gained < 1e-12, f"a step of {length} comes nearer, by {gained:.2e}")
    if not rule.bilinear:
        zeros = [torch.zeros_like(value) for value in free]
        constant = rule(*sources, *zeros)
        solved = torch.linalg.lstsq(
            _jacobian(rule, sources, zeros), (goal - constant).flatten()[:, None]
        ).solution[:, 0]
        close(flat(free), solved, "the free values", rtol=1e-10, atol=1e-12)


def _no_small_step_comes_nearer(distance: Tensor, free: list[Tensor]) -> None:
    for slope in torch.autograd.grad(distance, free):
        steepest = float(slope.abs().max())
        hold(steepest < 1e-7, f"a step would come nearer, by a slope of {steepest:.2e}")


def _jacobian(rule: Rule, sources: tuple[Tensor, ...], free: list[Tensor]) -> Tensor:
    """How the free values move the weight: entries × values."""
    parts: Any = torch.autograd.functional.jacobian(lambda *v: rule(*sources, *v), tuple(free))
    entries = math.prod(rule.bound_layout.shape)
    return torch.cat([part.reshape(entries, -1) for part in parts], dim=1)


@states("laws with fitted values", NEAREST)
def projection_of_a_projection_is_the_same_weight(case: Case) -> None:
    """The nearest lawful weight is its own projection, and as near in every dtype."""
    for dtype in DTYPES:
        rule = case.tied(dtype).rule
        sources = _sources(rule)
        wide = [source.double() for source in sources]
        for _ in range(3):
            weight = torch.randn(rule.bound_layout.shape).to(dtype)
            once = rule.project(weight)
            hold(once.dtype == dtype, f"project makes {once.dtype} of {dtype}")
            same(rule, rule.project(once), once, f"in {dtype} the projection of a projection")
            exact = rule(*wide, *rule.fit_to(weight.double(), tuple(wide)))
            found = (once.double() - weight.double()).norm()
            nearest = (exact - weight.double()).norm()
            allowed = rounding(dtype) * weight.double().norm()
            hold(found <= nearest + allowed, f"in {dtype} it is {found}, not {nearest}, away")


@states("laws with fitted values", "Store each number once in free_shapes(), and use each of them.")
def every_value_that_is_stored_moves_the_weight(case: Case) -> None:
    """As many values are stored as `free_shapes` says, and each changes the weight.

    Each in a way of its own, unless the law says that it is `bilinear`.
    """
    host = case.tied(torch.float64)
    rule = host.rule
    hold(is_fitted(rule), "nothing is stored")
    stored = sum(parameter.numel() for parameter in host.free)
    hold(stored == rule.free_count, f"{stored} values are stored, free_shapes says {rule}")
    jacobian = _jacobian(rule, _sources(rule), drawn_free(rule))
    idle = int((jacobian == 0).all(0).sum())
    hold(not idle, f"{idle} of {stored} values do not change the weight")
    rank = int(torch.linalg.matrix_rank(jacobian))
    hold(rule.bilinear or rank == stored, f"{stored} values move the weight in {rank} ways")


@states("laws with fitted values", "Compute forward() from what it is given, without detach().")
def gradients_arrive_in_values_and_sources(case: Case) -> None:
    """Derivatives along free values and sources are what numbers show, to the second order."""
    rule = case.tied(torch.float64).rule
    given = [*_sources(rule), *drawn_free(rule)]
    values = [value.requires_grad_() for value in given]
    torch.autograd.gradcheck(rule, values, fast_mode=not case.is_first)
    torch.autograd.gradgradcheck(rule, values, fast_mode=True)


@states(
    "laws with fitted values",
    "Let the fit leave no product of zeros: of factors that are both zero none is ever trained.",
)
def no_start_is_dead(case: Case) -> None:
    """Tied to the weight that zeros would give, the layer still sends gradients to its values."""
    host = case.dense(torch.float64)
    rule = case.tied(torch.float64).rule
    zeros = [torch.zeros(shape, dtype=torch.float64) for shape in rule.free_shapes()]
    with torch.no_grad():
        getattr(host.layer, host.tensor_name).copy_(rule(*_sources(rule), *zeros))
    case.tie(host)
    host.output(*case.sample_input(host.layer)).pow(3).sum().backward()
    gradients = [p.grad for p in host.free if p.grad is not None]
    hold(any(bool(gradient.any()) for gradient in gradients), "no free value gets a gradient")


@states(
    "laws with fitted values",
    "Clone what the fit returns: a slice keeps the whole weight in memory and in checkpoints.",
)
def fitted_values_own_their_bytes(case: Case) -> None:
    """What is stored is contiguous, of the weight's dtype, and keeps no other memory alive."""
    for dtype in DTYPES:
        host = case.dense(dtype)
        dense = host.weight
        case.tie(host)
        rule = host.rule
        found = {
            "the tie": host.free,
            "right_inverse": rule.right_inverse(dense),
            "representatives": rule.representatives(dense),
        }
        for name, values in found.items():
            shapes = [tuple(value.shape) for value in values]
            hold(shapes == list(map(tuple, rule.free_shapes())), f"{name} gives {shapes}")
            for value in values:
                hold(value.dtype == dtype, f"{name} makes {value.dtype} of {dtype}")
                shared = value.untyped_storage().data_ptr() == dense.untyped_storage().data_ptr()
                hold(owned_bytes(value) and not shared, f"{name} gives a part of the weight")
                hold(value.is_contiguous(), f"{name} gives values that are not contiguous")


@states("laws with fitted values", NEAREST)
def unlawful_checkpoint_is_projected(case: Case) -> None:
    """A dense weight that breaks the law is projected, with a warning."""
    for dense, host in with_an_unlawful_checkpoint(case):
        nearest = host.rule.project(dense.weight)
        same(host.rule, host.weight, nearest, "the loaded weight")
        assert_lawful(host, "loaded from an unlawful weight")


@states("laws with fitted values", "Change nothing but the free values; let fit() be the nearest.")
def init_and_reset_fit_what_was_drawn(case: Case) -> None:
    """`init_` and ``reset_parameters`` come nearest to what they draw, and leave sources alone."""
    host, stock = case.tied(), case.dense()
    sources = _sources(host.rule)
    drawn: list[Tensor] = []

    def draw(tensor: Tensor) -> None:
        drawn.append(nn.init.normal_(tensor).clone())

    init_(host.layer, draw, host.tensor_name)
    hold(len(drawn) == 1, f"init_ calls the function {len(drawn)} times")
    same(host.rule, host.weight, host.rule.project(drawn[0]), "the weight that was initialised")
    if callable(getattr(stock.layer, "reset_parameters", None)):
        for each in (stock, host):
            torch.default_generator.manual_seed(5)
            each.layer.reset_parameters()  # type: ignore[operator]
        same(host.rule, host.weight, host.rule.project(stock.weight), "the weight that was reset")
    for before, now in zip(sources, host.rule.read(), strict=True):
        hold(torch.equal(before, now), "a source was changed")


@states("laws with fitted values", "Let fit() give the free values of a lawful weight.")
def lawful_weight_can_be_assigned(case: Case) -> None:
    """A lawful weight can be assigned, an unlawful one only with ``project=True``."""
    host = case.tied()
    rule = host.rule
    unlawful = torch.randn_like(host.weight)

    def assign() -> None:
        assign_(host.layer, unlawful, host.tensor_name)

    refused(assign, TieError, "project=True", "assigning an unlawful weight")
    lawful = rule(*_sources(rule), *drawn_free(rule, torch.float32))
    setattr(host.layer, host.tensor_name, lawful)
    same(rule, host.weight, lawful, "the assigned weight")
    assign_(host.layer, unlawful, host.tensor_name, project=True)
    same(rule, host.weight, rule.project(unlawful), "the projected weight")


@states("laws with fitted values", "Keep only what can be pickled in the rule; compute on meta.")
def fitted_rule_is_pickled_and_computes_on_meta(case: Case) -> None:
    """A pickled model computes the same, and without numbers `forward` still gives a shape."""
    host = case.tied()
    rule = host.rule
    for dtype in (torch.float32, torch.bfloat16):
        given = [value.to("meta", dtype) for value in (*_sources(rule), *host.free)]
        weight = rule(*given)
        shape = rule.bound_layout.shape
        hold(weight.is_meta and tuple(weight.shape) == shape, f"on meta it is {weight.shape}")
        hold(weight.dtype == dtype, f"on meta {dtype} becomes {weight.dtype}")
    kind = type(rule)
    if getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is not kind:
        return  # a class that is defined in a function cannot be pickled
    model = pickle.loads(pickle.dumps(host.model))
    twin = Host(model, model.get_submodule(case.example.path), host.tensor_name)
    hold(torch.equal(twin.weight, host.weight), "a pickled model has another weight")


@states(
    "laws with fitted values",
    "Set complex_valued = True if the law has a meaning for complex weights, and only then.",
)
def complex_weights_are_fitted_or_refused(case: Case) -> None:
    """Complex weights are fitted to the nearest, where `complex_valued` is set; else refused."""
    dense = case.dense(torch.complex128)
    with torch.no_grad():
        for parameter in dense.model.parameters():
            parameter.copy_(torch.complex(parameter.real, torch.randn(parameter.shape).double()))
    goal = dense.weight
    if not case.rule.complex_valued:
        refused(lambda: case.tie(dense), TieError, "no meaning", "a complex weight")
        return
    rule = case.tie(dense).rule
    hold(dense.weight.is_complex(), f"the weight is {dense.weight.dtype}")
    free = [parameter.detach().clone().requires_grad_() for parameter in dense.free]
    _no_small_step_comes_nearer((rule(*_sources(rule), *free) - goal).norm(), free)


@states("laws with fitted values", "Store the free values as free_shapes() says.")
def optimizer_state_is_as_small_as_the_fitted_values(case: Case) -> None:
    """Adam keeps two numbers for each free value, none for each entry of the weight."""
    adam_keeps_two_numbers_each(case)
