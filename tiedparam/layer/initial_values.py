"""The free values that a tie starts with, once rule and weight have shown that they fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tiedparam.laws.distance import relative_distance
from tiedparam.laws.fitted import fitted_to, is_lawful, why_not_finite
from tiedparam.laws.rule import Rule
from tiedparam.layer.checks import Init
from tiedparam.layer.concerns import why_distant
from tiedparam.util.errors import Reason, TieError
from tiedparam.util.torch_private import has_values

TAKE_THE_NEAREST = "Use init='project' to take the nearest lawful weight."
"""What to do about a weight that breaks the law where ``init="exact"`` was asked for."""


class InitialValues(NamedTuple):
    """What a tie starts with.

    Attributes:
        free: the free values.
        residual: how far the weight was from the law; None where it had no values.
    """

    free: list[Tensor]
    residual: float | None


def blank_values(rule: Rule, weight: nn.Parameter) -> InitialValues:
    """Zeros, until a file brings the values."""
    return InitialValues([weight.detach().new_zeros(shape) for shape in rule.free_shapes()], None)


def given_values(rule: Rule, weight: nn.Parameter, values: Sequence[Tensor]) -> InitialValues:
    """These free values, which were computed from more than the one weight."""
    with torch.no_grad():
        lawful = rule(*rule.read(), *values)
        distance = relative_distance(weight.detach(), lawful) if has_values(weight) else None
    return InitialValues(list(values), distance)


def initial_values(
    rule: Rule, weight: nn.Parameter, init: Init, max_residual: float | None
) -> InitialValues | Reason:
    """Free values for ``weight`` by ``init``, or the reason why there are none.

    Raises:
        TieError: if a source of the rule is not what it was.
    """
    with torch.no_grad():
        if has_values(weight) and not has_values(torch.empty(0, device=weight.device)):
            return Reason("FakeTensorMode computes no values.", "Tie the layer outside of it.")
        dense = weight.detach()
        try:
            sources = rule.read()
            # the shape first: what follows from a wrong forward would be hard to read
            zeros = [dense.new_zeros(shape) for shape in rule.free_shapes()]
            reason = _why_misshapen(rule(*sources, *zeros), dense)
            reason = reason or why_not_finite(rule, dense, sources)
            if reason is not None:
                return reason
            free: Any = fitted_to(rule, dense, sources)
            free = free if isinstance(free, Tensor) else list(free)
            reason = _why_other_values(free, rule)
            if reason is not None:
                return reason
            lawful = rule(*sources, *free)
        except (TieError, RecursionError):
            raise
        except Exception as error:
            return Reason(f"the rule raised {type(error).__name__}: {error}")
        reason = _why_wrong(free, dense) or _why_misshapen(lawful, dense)
        if reason is not None:
            return reason
        residual = relative_distance(dense, lawful) if has_values(dense) else None
        reason = why_distant(residual, max_residual)
        if reason is None and init == "exact":
            reason = _why_inexact(rule, dense, lawful, residual)
        if reason is not None:
            return reason
        if init == "rescale":
            if rule.reads_layers:
                fact = "no stored value is an entry of the weight, so none can be rescaled."
                if not free:
                    fact = "a copy has no values of its own to rescale."
                return Reason(fact, "Use init='project'.")
            if not rule.has_orbits:
                fact = "its free values are not entries of the weight, so none can be rescaled."
                return Reason(fact, "Use init='project'.")
            counts = rule.multiplicities()
            free = [
                value * count.sqrt().to(value.device, value.dtype)
                for value, count in zip(free, counts, strict=True)
            ]
        return InitialValues(free, residual)


def _why_other_values(free: Any, rule: Rule) -> Reason | None:
    """Why a law's fit is not what its ``free_shapes`` say."""
    fit = "fit" if rule.reads_layers else "right_inverse"
    if isinstance(free, Tensor):
        # torch would write it into the dense Parameter (S17)
        return Reason(f"its {fit} returns a tensor.", "Return a tuple of tensors.")
    shapes = tuple(tuple(value.shape) for value in free)
    if shapes != tuple(map(tuple, rule.free_shapes())):
        wanted = ", ".join(map(str, rule.free_shapes()))
        return Reason(
            f"its {fit} returns {', '.join(map(str, shapes)) or 'nothing'}, and its free_shapes "
            f"say {wanted or 'nothing'}.",
            "Correct the rule.",
        )
    return None


def _why_wrong(free: list[Tensor], dense: Tensor) -> Reason | None:
    if any(value.dtype != dense.dtype for value in free):
        return Reason(f"its free values are not {dense.dtype}.", "Correct the rule.")
    if any(value.numel() == 0 for value in free):
        return Reason("one of its free values is empty.", "Leave it out of free_shapes.")
    return None


def _why_inexact(
    rule: Rule, dense: Tensor, lawful: Tensor, residual: float | None
) -> Reason | None:
    if residual is None:
        return Reason("its weight has no values yet to compare.", "Use init='project', or load it.")
    if is_lawful(rule, dense, lawful):
        return None
    return Reason(
        f"the weight breaks the law {rule.law} (residual {residual:.2e}).",
        TAKE_THE_NEAREST,
    )


def _why_misshapen(value: object, dense: Tensor) -> Reason | None:
    if not isinstance(value, Tensor) or value.shape != dense.shape:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        return Reason(
            f"its forward returns {shape}, and the tensor is {tuple(dense.shape)}.",
            "Correct the rule.",
        )
    if value.dtype != dense.dtype:
        return Reason(f"its forward returns {value.dtype}, not {dense.dtype}.", "Correct the rule.")
    return None
