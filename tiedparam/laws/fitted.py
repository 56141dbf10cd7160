"""Laws whose free values are solved for, by least squares or a decomposition, and not read off.

Their weight comes back up to rounding, where that of laws of entries comes back to the bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiedparam.laws.distance import relative_distance
from tiedparam.util.errors import Reason
from tiedparam.util.torch_private import has_values

if TYPE_CHECKING:
    from tiedparam.laws.rule import Rule


def is_fitted(rule: Rule) -> bool:
    """Whether the free values of a bound rule come from a weight by solving for them."""
    return (rule.reads_layers or rule.bilinear) and rule.free_count > 0


def fitted_to(rule: Rule, weight: Tensor, sources: tuple[Tensor, ...]) -> Any:
    """The free values that come nearest to a weight; without numbers where that has none.

    Few solvers know the meta device.
    """
    if is_fitted(rule) and weight.is_meta:
        return tuple(weight.new_empty(shape) for shape in rule.free_shapes())
    return rule.fit_to(weight, sources)


def why_not_finite(rule: Rule, weight: Tensor, sources: tuple[Tensor, ...]) -> Reason | None:
    """Why a law cannot be solved for its free values, or None: one NaN would be in all of them.

    Laws of entries keep it where it stands, and need not look.
    """
    return why_no_numbers(weight, sources) if is_fitted(rule) else None


def why_no_numbers(weight: Tensor, sources: tuple[Tensor, ...]) -> Reason | None:
    """Why a tensor, or one that its law reads, cannot be computed with, or None."""
    for what, tensor in (("its", weight), *(("the source's", source) for source in sources)):
        if has_values(tensor) and not bool(tensor.isfinite().all()):
            fact = f"not all of {what} entries are finite numbers."
            return Reason(fact, "Initialise or load them first.")
    return None


def is_lawful(rule: Rule, weight: Tensor, nearest: Tensor) -> bool:
    """Whether a weight obeys a rule, given the lawful weight that is nearest to it.

    To the bit; up to the rounding of what was solved for where the rule is fitted.
    """
    if torch.equal(weight, nearest):
        return True
    return is_fitted(rule) and relative_distance(weight, nearest) <= rounding(weight.dtype)


def rounding(dtype: torch.dtype) -> float:
    """How far from its law, relatively, rounding may take a weight whose values are solved for."""
    return max(4 * torch.finfo(dtype).eps, _SOLVED)


_SOLVED = 1e-13
"""What solvers lose of float64, in which they compute."""
