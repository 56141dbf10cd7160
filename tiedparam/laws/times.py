"""How long layers take, roughly: what the costs of forms are worked out from.

Microseconds on one core of the machine of the result files. Only ratios count: they were fitted to
``python -m benchmarks --case goals --only blocks`` and ``--only fourier`` and right there within a
fifth or so, on the side of the dense form. `tiedparam.tune` measures where that is not enough.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from tiedparam.laws.forms import Use

_USUAL_ROWS = 64  # of a Linear layer
_USUAL_POSITIONS = 4096  # of a convolution's samples together
_LARGE = 1 << 21  # entries that no cache near the core holds


class Time(NamedTuple):
    """What one call takes, beside each other.

    Attributes:
        call: microseconds, whatever the sizes.
        product: as a share of the product with the whole weight.
        values: nanoseconds for each input and output of a row, for moving them.
        entries: nanoseconds for each entry of the weight, for making what is multiplied by.
        row: microseconds for each row, for what its length alone does not tell.

    As in:
        >>> from tiedparam.laws.times import Time
        >>> Time(call=60, product=0.5)  # half of the multiplications, and some calls
        Time(call=60, product=0.5, values=0.0, entries=0.0, row=0.0)
    """

    call: float
    product: float = 1.0
    values: float = 0.0
    entries: float = 0.0
    row: float = 0.0


_KEPT = Time(15)


def relative_time(use: Use, form: Time, dense: Time) -> float:
    """The time of a form as a multiple of the dense form's, which has the weight if it is kept."""
    return _total(use, form) / _total(use, _KEPT if use.kept else dense)


def rows_multiplied(use: Use) -> int:
    """How many vectors of input; as many as usual where a graph serves any number."""
    return use.rows or (_USUAL_ROWS if use.kind == "linear" else _USUAL_POSITIONS)


def is_trained(use: Use) -> bool:
    """Whether gradients of the free values are taken: not where the weight is kept."""
    return use.training and not use.kept


def _total(use: Use, time: Time) -> float:
    outputs, inputs = use.layout.canonical_shape[:2]
    entries, values = prod(use.layout.canonical_shape), outputs + use.layout.groups * inputs
    rows = rows_multiplied(use)
    reading = 0.2 if entries > _LARGE else 0.05
    # a product of few rows is slower for each of them
    each = reading + 0.0225 * rows + 0.015 * min(rows, 8)
    nanoseconds = entries * (time.product * each + time.entries) + rows * values * time.values
    return time.call + 5 * time.product + rows * time.row + nanoseconds / 1000
