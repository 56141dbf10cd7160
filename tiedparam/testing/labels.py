"""The orbits: which free value each entry is, with which sign, and what follows from that."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiedparam.laws.rule import Rule
from tiedparam.testing.cases import (
    DTYPES,
    Case,
    counts_of_orbits,
    drawn_free,
    expansion_of,
    flat,
    generic_holds,
    sums_over_orbits,
)
from tiedparam.testing.judge import close, equal, hold, identical
from tiedparam.testing.statement import states

INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
"""Integers of the same size."""


@states(
    "laws with values",
    "Let forward() only copy and negate free values, and leave out orbit_labels(): it is derived. "
    "Where entries are fixed derive from laws.Orbits; other laws have no labels.",
)
def labels_number_the_orbits(case: Case) -> None:
    """Each entry is one free value, minus one, or fixed; `orbit_labels` says which."""
    rule = case.tied().rule
    expansion, free = expansion_of(rule), drawn_free(rule)
    weight = expansion.matrix @ flat(free) + expansion.constant
    equal(rule(*free).flatten(), weight, "forward is not linear: its weight")
    labels, shape = rule.orbit_labels(), rule.bound_layout.shape
    hold(tuple(labels.shape) == shape, f"orbit_labels is {tuple(labels.shape)}, not {shape}")
    hold(labels.abs().max() <= rule.free_count, "a label is larger than the number of values")
    reached = labels.flatten().nonzero()[:, 0]
    chosen = labels.flatten()[reached]
    expected = torch.zeros_like(expansion.matrix)
    expected[reached, chosen.abs() - 1] = chosen.sign().double()
    # disjoint signed orbits
    equal(expansion.matrix, expected, "forward is not what orbit_labels says: its matrix")
    zeros = torch.zeros(len(reached), dtype=torch.float64)
    equal(expansion.constant[reached], zeros, "what free values of 0 give, where they reach,")


@states("laws with values", "Let spread() be forward() with 0 in the place of what is fixed.")
def spread_is_the_linear_part(case: Case) -> None:
    """`spread` expands free values as `forward` does, with zeros where that has fixed numbers."""
    rule = case.tied().rule
    free, expansion = drawn_free(rule), expansion_of(rule)
    expected = (expansion.matrix @ flat(free)).reshape(rule.bound_layout.shape)
    equal(rule.spread(*free), expected, "spread()")


@states("laws with values", "Let forward() write what is fixed instead of multiplying by 0.")
def what_is_fixed_stays_fixed(case: Case) -> None:
    """An entry that no free value reaches has the same bits whatever the free values are."""
    rule = case.tied().rule
    fixed = rule.orbit_labels() == 0
    for dtype in DTYPES:
        ones = [torch.ones(shape, dtype=dtype) for shape in rule.free_shapes()]
        expected = rule(*ones)[fixed]
        for number in (0.0, -0.0, -1.0, math.inf, math.nan):
            found = rule(*(torch.full_like(value, number) for value in ones))[fixed]
            identical(found, expected, f"with free values of {number} what is fixed")
        zeros = expected[expected == 0]
        identical(zeros, torch.zeros_like(zeros), "a zero of the law")


@states("laws with values", "Leave out multiplicities(): it is derived from forward.")
def multiplicities_count_the_copies(case: Case) -> None:
    """`multiplicities` says how many entries each free value has."""
    rule = case.tied().rule
    counts = counts_of_orbits(rule).double()
    hold(counts.min() > 0, "a free value reaches no entry of the weight")
    equal(flat(rule.multiplicities()), counts, "multiplicities()")
    equal(flat(Rule.multiplicities(rule)), counts, "Rule.multiplicities()")


def distinct_values(count: int, dtype: torch.dtype) -> Tensor:
    """Neighbours of 1 in random order: all different, also in half precision."""
    one = torch.ones(1, dtype=dtype).view(INTEGERS[dtype])
    return (one + torch.randperm(count).to(one.dtype)).view(dtype)


@states("laws with values", "Let representatives() take one member of each orbit, with its sign.")
def representatives_are_members_of_their_orbits(case: Case) -> None:
    """`representatives` takes one entry of each orbit, no mean: so initialisations keep scale."""
    rule = case.tied().rule
    labels = rule.orbit_labels().flatten()
    for dtype in DTYPES:
        weight = distinct_values(labels.numel(), dtype).reshape(rule.bound_layout.shape)
        ways = [rule.representatives(weight)]
        if generic_holds(rule):
            ways.append(Rule.representatives(rule, weight))
        for chosen in ways:
            values = flat(chosen)
            hold(values.numel() == rule.free_count, f"{values.numel()} are chosen")
            column, entries = values[labels.abs().clamp(min=1) - 1], weight.flatten()
            among = (column == entries * labels.sign()) & (labels != 0)
            found = labels[among].abs().unique().numel()
            hold(
                found == rule.free_count,
                f"in {dtype} {rule.free_count - found} of {rule.free_count} values are no member "
                "of their orbit",
            )


@states("laws with values", "Leave out multiplicities(): it is derived from forward.")
def rescale_multiplies_by_the_root_of_the_multiplicity(case: Case) -> None:
    """``init="rescale"`` keeps the scale of a fresh layer: signed sums over √multiplicity."""
    dense = case.dense(torch.float64)
    weight = dense.weight
    host = case.tie(dense, init="rescale")
    expected = sums_over_orbits(host.rule, weight) / counts_of_orbits(host.rule).double().sqrt()
    close(flat(host.free), expected, "the rescaled free values", rtol=1e-13, atol=1e-14)
