"""The sizes that a plan can give a model, and what each of them loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tiedparam.util.errors import Reason
from tiedparam.util.table import show

_SHOWN = 8
"""So many points of a curve are printed, and the one that was chosen."""


class SizeStep(NamedTuple):
    """One step on the curve from the smallest checkpoint of a plan to its largest.

    Attributes:
        checkpoint: the bytes of the whole model, without a header, after the step.
        residual: the root of the mean square of the residuals of all tensors that have sizes.
        tensor: the tensor that stores more with this step; empty for the start.
        rule: by which it is tied then.
        taken: whether `tie_model` went this step.
    """

    checkpoint: int
    residual: float
    tensor: str
    rule: str
    taken: bool


def curve_remark(curve: Sequence[SizeStep], dense: int) -> Reason:
    """Some points of a curve in words.

    Args:
        curve: all of them; those that were taken stand first.
        dense: the bytes of the dense model.
    """
    chosen = sum(step.taken for step in curve) - 1
    spread = {round(i * (len(curve) - 1) / (_SHOWN - 1)) for i in range(_SHOWN)}
    points = [
        f"{curve[at].checkpoint / dense:.1%} {show(curve[at].residual)}"
        for at in sorted({*spread, chosen})
    ]
    return Reason(
        "Sizes that the plan can have, with the residuals' root mean square: "
        f"{', '.join(points)}. Chosen: {curve[chosen].checkpoint / dense:.1%}."
    )
