"""Gradients: the sums over the orbits, right to every order, and the same bits each time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiedparam.testing.cases import (
    Caller,
    Case,
    Host,
    drawn_free,
    expansion_of,
    flat,
    output_of,
    sums_over_orbits,
)
from tiedparam.testing.judge import close, equal, hold, identical
from tiedparam.testing.statement import states

COPY_ONLY = "Let forward() only copy and negate free values, by operations that have derivatives."


@states("laws with values", COPY_ONLY)
def gradient_is_the_sum_over_each_orbit(case: Case) -> None:
    """A free value's gradient is the signed sum of its entries' gradients in the dense layer."""
    host = case.tied(torch.float64)
    dense = _gradient_of_the_twin(case, host)
    sums = sums_over_orbits(host.rule, dense)
    bound = {"rtol": 1e-12, "atol": 1e-12 * float(dense.norm())}
    for parameter in host.free:
        hold(parameter.grad is not None, "a free value gets no gradient")
    gradient = flat(parameter.grad for parameter in host.free if parameter.grad is not None)
    close(gradient, sums, "the gradient of the free values", **bound)
    close(gradient, expansion_of(host.rule).matrix.T @ dense.flatten(), "the gradient", **bound)
    close(flat(host.rule.adjoint(dense)), sums, "adjoint()", **bound)


def _gradient_of_the_twin(case: Case, host: Host) -> Tensor:
    """Run both layers backward, and return that of the dense weight."""
    twin = case.twin_of(host)
    inputs = case.sample_input(host.layer)
    for layer in (host.layer, twin):
        output_of(layer, inputs).pow(3).sum().backward()
    gradient: Tensor = getattr(twin, host.tensor_name).grad
    hold(gradient.norm() > 0, "the dense layer has no gradient")
    return gradient


@states("copies", "Compute forward() from the sources that it is given, without detach().")
def gradients_of_a_copy_arrive_in_the_source(case: Case) -> None:
    """What the copy's use adds to the gradient of a source is what a small step shows."""
    host = case.tied(torch.float64)
    rule = host.rule
    before = [getattr(source, name) for source, name in rule.sources()]
    if not all(value.is_leaf for value in before):  # tied itself, say
        return
    dense = _gradient_of_the_twin(case, host)
    steps = [torch.randn_like(value) for value in before]
    length = 1e-5

    def moved(sign: int) -> Tensor:
        values = [v.detach() + sign * length * step for v, step in zip(before, steps, strict=True)]
        weight: Tensor = rule(*values)
        return (weight * dense).sum()

    expected = (moved(1) - moved(-1)) / (2 * length)
    found = sum((value.grad * step).sum() for value, step in zip(before, steps, strict=True))
    scale = float(dense.norm() * flat(steps).norm())
    close(found, expected, "the gradient of the source", rtol=1e-6, atol=1e-9 * scale)


@states("every law", COPY_ONLY, slow=True)
def gradcheck_and_gradgradcheck_pass(case: Case) -> None:
    """First and second derivatives of the layer are what numbers show."""
    host = case.tied(torch.float64)
    caller = Caller(host)
    names = [name for name, _ in caller.named_parameters()]
    inputs = case.sample_input(host.layer, batch=1)
    values = [p.detach().clone().requires_grad_() for p in caller.parameters()]

    def output(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        found: Tensor = torch.func.functional_call(caller, given, inputs)
        return found

    torch.autograd.gradcheck(output, values, fast_mode=True)
    torch.autograd.gradgradcheck(output, values, fast_mode=True)
    if case.kind == "laws with values":
        free = [p.detach().clone().requires_grad_() for p in host.free]
        # every number of the Jacobian once for each law, else along random directions
        torch.autograd.gradcheck(host.rule, free, fast_mode=not case.is_first)
        torch.autograd.gradgradcheck(host.rule, free, fast_mode=not case.is_first)


@states("every law", "Avoid operations whose order of adding is left to chance, as index_add_ has.")
def backward_gives_the_same_bits_each_time(case: Case) -> None:
    """Two backward passes from the same numbers give the same gradients to the bit."""
    host = case.tied()
    inputs = case.sample_input(host.layer)
    results = []
    for _ in range(2):
        host.model.zero_grad()
        host.output(*inputs).square().sum().backward()
        results.append([p.grad.clone() for p in host.model.parameters() if p.grad is not None])
    hold(results[0], "nothing gets a gradient")
    for first, second in zip(*results, strict=True):
        identical(second, first, "the gradient of a second backward")


@states("laws with values", COPY_ONLY)
def forward_mode_moves_along_the_expansion(case: Case) -> None:
    """``torch.func.jvp`` of `forward` is the expansion of the tangents, to the bit."""
    rule = case.tied(torch.float64).rule
    free, tangents = drawn_free(rule), drawn_free(rule)
    both: Any = torch.func.jvp(lambda *values: rule(*values), tuple(free), tuple(tangents))
    weight, along = both
    equal(weight, rule(*free), "the weight under jvp")
    shape = rule.bound_layout.shape
    expected = expansion_of(rule).matrix @ flat(tangents)
    equal(along, expected.reshape(shape), "the tangent of the weight")


@states("laws with values", "Ask for no values in forward() (.item(), if), and keep to its shapes.")
def vmap_expands_each_sample(case: Case) -> None:
    """``torch.func.vmap`` over several sets of free values gives the weight of each."""
    rule = case.tied().rule
    sets = [drawn_free(rule, torch.float32) for _ in range(3)]
    stacked = [torch.stack(values) for values in zip(*sets, strict=True)]
    found = torch.func.vmap(lambda *values: rule(*values))(*stacked)
    equal(found, torch.stack([rule(*free) for free in sets]), "the weights under vmap")
    cotangents = torch.randn(3, *rule.bound_layout.shape)

    def pulled(cotangent: Tensor) -> tuple[Tensor, ...]:
        both: Any = torch.func.vjp(lambda *values: rule(*values), *sets[0])
        back: tuple[Tensor, ...] = both[1](cotangent)
        return back

    each = [pulled(cotangent) for cotangent in cotangents]
    for found, expected in zip(
        torch.func.vmap(pulled)(cotangents),
        (torch.stack(values) for values in zip(*each, strict=True)),
        strict=True,
    ):
        close(found, expected, "the gradients under vmap", rtol=1e-6, atol=1e-5)
