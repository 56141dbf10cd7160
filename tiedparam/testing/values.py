"""The free values: as many as are needed, exact both ways, and the nearest to a weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiedparam.laws.rule import Rule
from tiedparam.testing.cases import (
    DTYPES,
    Case,
    assert_satisfies,
    counts_of_orbits,
    drawn_free,
    expansion_of,
    flat,
    generic_holds,
    has_no_residual,
    owned_bytes,
    unflatten,
)
from tiedparam.testing.judge import close, hold, identical, refused
from tiedparam.testing.statement import states
from tiedparam.util.errors import TieError


@states(
    "laws with values",
    "Let right_inverse() average relative to one member, as Rule.right_inverse does, and let "
    "forward() copy: inf · 0 is NaN, −0.0 is not 0.0.",
)
def right_inverse_undoes_forward(case: Case) -> None:
    """Free values that were expanded come back to the bit, infinities and tiny numbers too."""
    rule = case.tied().rule
    for dtype in DTYPES:
        info = torch.finfo(dtype)
        tiny = info.smallest_normal
        numbers = [math.inf, -math.inf, info.max, info.min, tiny, tiny / 4, 0.0]
        special = torch.tensor(numbers, dtype=dtype)
        pool = torch.cat([special, torch.randn(3 * len(special)).to(dtype)])
        # each of them at least once, and several at a time where there is room
        turns = max(4, -(-len(pool) // rule.free_count))
        for turn in range(turns):
            chosen = torch.randint(len(pool), (rule.free_count,))
            own = torch.arange(turn * len(pool) // turns, (turn + 1) * len(pool) // turns)
            own = own[: rule.free_count]
            chosen[torch.randperm(rule.free_count)[: len(own)]] = own
            free = unflatten(rule, pool[chosen])
            weight = rule(*free)
            hold(weight.dtype == dtype, f"forward makes {weight.dtype} of {dtype}")
            assert_satisfies(rule, weight, f"in {dtype}")
            for inverse in (rule.right_inverse(weight), Rule.right_inverse(rule, weight)):
                hold(not isinstance(inverse, Tensor), "right_inverse returns a tensor, no tuple")
                for value, again in zip(free, inverse, strict=True):
                    identical(again, value, f"in {dtype} what comes back of the free values")


@states("laws with values", "Let right_inverse() find the nearest lawful weight, in its dtype.")
def projection_is_idempotent(case: Case) -> None:
    """The nearest lawful weight is lawful, of the same dtype, and its own projection."""
    rule = case.tied().rule
    for dtype in DTYPES:
        for _ in range(3):
            once = rule.project(torch.randn(rule.bound_layout.shape).to(dtype))
            hold(once.dtype == dtype, f"project makes {once.dtype} of {dtype}")
            assert_satisfies(rule, once, f"projected in {dtype}")
            identical(rule.project(once), once, f"in {dtype} the projection of a projection")


@states(
    "laws with values",
    "Let right_inverse() give the mean over each orbit, with the signs; or leave it out, and "
    "it is derived.",
)
def registration_is_the_least_squares_projection(case: Case) -> None:
    """Tying takes the free values that are nearest to the dense weight."""
    dense = case.dense(torch.float64)
    weight = dense.weight
    host = case.tie(dense)
    expansion = expansion_of(host.rule)
    goal = (weight.flatten() - expansion.constant)[:, None]
    solved = torch.linalg.lstsq(expansion.matrix, goal).solution[:, 0]
    close(flat(host.free), solved, "the free values", rtol=0, atol=1e-14)
    generic = flat(Rule.right_inverse(host.rule, weight))
    close(flat(host.free), generic, "right_inverse", rtol=0, atol=1e-15)
    nearest = expansion.matrix @ solved + expansion.constant
    close(host.weight.flatten(), nearest, "the tied weight", rtol=0, atol=1e-14)


@states("laws with values", "Accumulate in float32 or wider in right_inverse(), and round once.")
def projection_is_the_rounded_one_in_every_dtype(case: Case) -> None:
    """In half precision the projection is that in float64, rounded once."""
    rule = case.tied().rule
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(rule.bound_layout.shape).to(dtype)
        exact = rule.project(weight.double())
        # one rounding to the dtype, and in float32 those of the accumulation
        eps, wide = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
        found = rule.project(weight).double()
        close(found, exact, f"the projection in {dtype}", rtol=eps, atol=4 * wide)


@states("laws with values", "Let right_inverse() give the mean over each orbit, with the signs.")
def no_lawful_weight_is_nearer_than_the_projection(case: Case) -> None:
    """What the projection takes away is orthogonal to all lawful changes."""
    rule = case.tied().rule
    zeros = [torch.zeros(shape, dtype=torch.float64) for shape in rule.free_shapes()]
    weight = torch.randn(rule.bound_layout.shape, dtype=torch.float64)
    error = weight - rule.project(weight)
    hold(error.norm() > 1e-3, "the projection leaves a random weight as it is")
    for _ in range(10):
        step = rule(*drawn_free(rule)) - rule(*zeros)
        inner = abs(float((error * step).sum()))
        bound = 1e-12 * float(error.norm() * step.norm() + 1)
        hold(inner < bound, f"a lawful step would come nearer: its inner product is {inner:.2e}")
        for length in (1e-3, -1e-3, 1.0, -1.0):
            hold((error - length * step).norm() > error.norm(), "a lawful step comes nearer")


@states(
    "laws with values",
    "Store each number once in free_shapes(), and state the whole law in symmetries().",
)
def no_value_is_stored_that_is_not_needed(case: Case) -> None:
    """As many values are stored as the law leaves free: `symmetries` allows no more and no less."""
    host = case.tied(torch.float64)
    rule = host.rule
    stored = sum(parameter.numel() for parameter in host.free)
    shape = host.weight.shape
    hold(stored == rule.free_count, f"{stored} values are stored, free_shapes says {rule}")
    jacobians = torch.autograd.functional.jacobian(
        lambda *free: rule(*free), tuple(p.detach() for p in host.free)
    )
    jacobian = torch.cat([j.reshape(shape.numel(), -1) for j in jacobians], dim=1)
    rank = int(torch.linalg.matrix_rank(jacobian))
    hold(rank == stored, f"{stored} values are stored, and they move the weight in {rank} ways")
    # every lawful weight can be reached: the law, stated without forward, leaves no more
    left = lawful_dimension(rule, shape)
    hold(left == stored, f"{stored} values are stored, and symmetries leaves {left} free")


def lawful_dimension(rule: Rule, shape: torch.Size) -> int:
    """The dimension of ``{W : S(W) = W for every symmetry S}``, without ``forward``."""
    zeros = torch.zeros(shape, dtype=torch.float64)
    fixed = torch.cat([image.flatten() for image in rule.symmetries(zeros)])
    units = torch.eye(shape.numel(), dtype=torch.float64).reshape(-1, *shape)
    columns = []
    for unit in units:
        moved = torch.cat([(image - unit).flatten() for image in rule.symmetries(unit)])
        columns.append(moved - fixed)
    return shape.numel() - int(torch.linalg.matrix_rank(torch.stack(columns, dim=1)))


@states(
    "laws with values",
    "Clone what right_inverse() and representatives() return: a slice keeps the whole dense "
    "weight in memory and in every checkpoint.",
)
def free_values_own_their_bytes(case: Case) -> None:
    """What is stored is contiguous and keeps no other memory alive."""
    for dtype in DTYPES:
        host = case.dense(dtype)
        dense = host.weight
        case.tie(host)
        rule = host.rule
        hold(host.free, "nothing is stored")
        for parameter in host.free:
            hold(parameter.is_contiguous(), "a free value is not contiguous")
            hold(parameter.is_leaf, "a free value is not a leaf")
            hold(owned_bytes(parameter), "a free value keeps more memory than it has")
        found = {
            "right_inverse": rule.right_inverse(dense),
            "Rule.right_inverse": Rule.right_inverse(rule, dense),
            "representatives": rule.representatives(dense),
        }
        if generic_holds(rule):
            found["Rule.representatives"] = Rule.representatives(rule, dense)
        for name, values in found.items():
            shapes = [tuple(value.shape) for value in values]
            expected = [tuple(parameter.shape) for parameter in host.free]
            hold(shapes == expected, f"{name} returns {shapes} instead of {expected}")
            for value in values:
                hold(value.dtype == dtype, f"{name} makes {value.dtype} of {dtype}")
                shared = value.untyped_storage().data_ptr() == dense.untyped_storage().data_ptr()
                hold(owned_bytes(value) and not shared, f"{name} returns a part of the weight")


@states(
    "laws with values",
    "Set complex_valued = True if the law has a meaning for complex weights, and only then.",
)
def complex_weights_obey_the_law_or_are_refused(case: Case) -> None:
    """Complex free values are expanded, and come back to the bit, where `complex_valued` is set.

    Where it is not, a complex layer cannot be tied; nor where a law is made of others that have no
    meaning for one.
    """
    dense = case.dense(torch.complex64)
    if not case.rule.complex_valued:
        refused(lambda: case.tie(dense), TieError, "no meaning", "a complex weight")
        return
    try:
        rule = case.tie(dense).rule
    except TieError as error:
        hold("no meaning" in str(error), f"a complex weight is refused: {error}")
        return
    free = drawn_free(rule, torch.complex64)
    free = [torch.complex(value.real, torch.randn(value.shape)) for value in free]
    weight = rule(*free)
    hold(weight.dtype == torch.complex64, f"forward makes {weight.dtype} of complex64")
    assert_satisfies(rule, weight, "with complex numbers")
    for value, again in zip(free, rule.right_inverse(weight), strict=True):
        identical(again, value, "what comes back of complex free values")
    assert_satisfies(rule, rule.project(dense.weight), "projected with complex numbers")


@states("laws with values", "Store the free values as free_shapes() says.")
def optimizer_state_is_as_small_as_the_free_values(case: Case) -> None:
    """Adam keeps two numbers for each free value, none for each entry of the weight."""
    adam_keeps_two_numbers_each(case)


def adam_keeps_two_numbers_each(case: Case) -> None:
    """What Adam keeps after a step is as small as the free values."""
    host = case.tied()
    optimizer = torch.optim.Adam(host.free)
    host.output(*case.sample_input(host.layer)).square().mean().backward()
    optimizer.step()
    for parameter in host.free:
        moments = [v for v in optimizer.state[parameter].values() if v.dim()]
        hold(len(moments) == 2, f"Adam keeps {len(moments)} moments")
        for moment in moments:
            hold(moment.shape == parameter.shape, "a moment is not of the shape of its values")
            hold(owned_bytes(moment), "a moment keeps more memory than it has")


@states("every law", "Let right_inverse() find the nearest lawful weight.")
def residual_is_zero_for_lawful_and_zero_weights(case: Case) -> None:
    """A lawful weight has the residual 0, as zeros have where the law allows them."""
    host = case.tied()
    rule = host.rule
    has_no_residual(rule, host.weight, "a lawful weight")
    entries = host.weight.numel()
    if case.kind == "laws with values" and expansion_of(rule).is_linear:
        hold(rule.residual(torch.zeros_like(host.weight)) == 0, "zeros have a residual")
    found = rule.residual(torch.randn_like(host.weight))
    least = 0.1 * math.sqrt(1 - rule.free_count / entries)
    hold(found > least, f"a random weight has the residual {found:.2e}")


@states("laws with values", "Let right_inverse() give the mean over each orbit, with the signs.")
def residual_of_independent_entries_is_what_the_counts_say(case: Case) -> None:
    """Of independent entries √(1 − free/N) is lost: so says `scan` what chance would keep.

    Exact for the unit vectors, whose squared distances from a linear law add up to ``N − free``;
    where entries are fixed to numbers, the distance is that of the written-out expansion.
    """
    rule = case.tied().rule
    shape, entries = rule.bound_layout.shape, math.prod(rule.bound_layout.shape)
    expansion = expansion_of(rule)
    if expansion.is_linear:
        units = torch.eye(entries, dtype=torch.float64).reshape(-1, *shape)
        total = sum(rule.residual(unit) ** 2 for unit in units)
        free = entries - total
        hold(
            abs(free - rule.free_count) < 1e-9 * entries,
            f"{rule.free_count} values are stored, and residuals speak of {free:.6f}",
        )
    counts = counts_of_orbits(rule).double()
    for _ in range(10):
        weight = torch.randn(entries, dtype=torch.float64)
        moved = weight - expansion.constant
        lost = moved - expansion.matrix @ (expansion.matrix.T @ moved / counts)
        found, expected = rule.residual(weight.reshape(shape)), float(lost.norm() / weight.norm())
        hold(abs(found - expected) < 1e-9, f"the residual is {found}, not {expected}")
        hold(not expansion.is_linear or found <= 1 + 1e-12, f"the residual is {found}, above 1")


@states("copies", "Keep neither Parameters nor modules in the rule; name sources by Linked.")
def a_copy_stores_nothing(case: Case) -> None:
    """A copy has no Parameters, buffers or modules: its source is nobody's submodule."""
    host = case.dense()
    count = len(list(host.model.parameters()))
    case.tie(host)
    rule = host.rule
    left = len(list(host.model.parameters()))
    hold(left == count - 1, f"the model has {left} Parameters, and had {count}")
    hold(not host.free, "the tie stores Parameters")
    hold(not [*rule.parameters(), *rule.buffers()], "the rule holds Parameters or buffers")
    hold(list(rule.modules()) == [rule], "the rule holds modules")
    hold(rule.free_shapes() == () and rule.free_count == 0, "free_shapes() is not empty")
    found = (rule.right_inverse(host.weight), rule.representatives(host.weight))
    hold(not any(found) and rule.multiplicities() == (), "there are free values")
