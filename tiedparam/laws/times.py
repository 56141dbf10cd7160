"""How long layers take, roughly: what the costs of forms and the gains of ties are worked out from.

Microseconds in float32 on one core of the machine of the result files. Only ratios count. They were
fitted to ``python -m benchmarks --case scaling`` and to ``--case prediction``, which says how far
predicted gains are from measured ones. `tiedparam.tune` measures where that is not enough.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from tiedparam.laws.forms import Use
from tiedparam.laws.look_up import SMALL

LONG_KERNEL = 13
"""Along the last axis. With more, half of it is too much padding for torch's fast kernel."""
_USUAL_ROWS = 64  # of a Linear layer
_USUAL_POSITIONS = 4096  # of a convolution's samples together
_LARGE = 1 << 21  # entries that no cache near the core holds
_MANY, _FEW_ROWS = 1 << 20, 0.6  # nanoseconds for each of so many entries, with gradients


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

    @property
    def trained(self) -> Time:
        """Forward and backward, where that was not measured apart: three products, many calls."""
        call, *others = self
        return Time(50 + 3.4 * call, *(3 * each for each in others))


class Making(NamedTuple):
    """What a call takes to make the weight, beside what the stock layer does with it.

    Attributes:
        entries: nanoseconds for each entry of the weight, without gradients.
        trained: the same with gradients, forward and backward.
        call: microseconds for each call, without gradients.
        trained_call: the same with gradients.
        small: microseconds for a weight of so few entries that they are looked up all at once
            (`tiedparam.laws.look_up`), without gradients and with.

    Example:
        >>> from tiedparam.laws import Making, Orbits
        >>> class Mirrored(Orbits):
        ...     making = Making(entries=0.3, trained=0.9)  # as measured
        ...     def symmetries(self, weight): yield weight.flip(-1)
        >>> (row,) = tp.report(tp.register_tie(nn.Linear(1024, 1024), Mirrored)).ties
        >>> row.gain_inference < 1  # the untied layer makes nothing
        True
    """

    entries: float
    trained: float
    call: float = 15.0
    trained_call: float = 55.0
    small: tuple[float, float] = (14.0, 50.0)

    def takes(self, use: Use) -> float:
        """Microseconds for such a use; to read a weight that is kept takes some as well."""
        if use.kept:
            return _AT_HAND
        entries = prod(use.layout.canonical_shape)
        if entries <= SMALL:
            return self.small[use.training]
        if use.training:
            return self.trained_call + self.trained * entries / 1000
        return self.call + self.entries * entries / 1000


_AT_HAND = 6.0
# stock layers, without gradients and with
_LINEAR = Time(1), Time(43, product=3)
_POINTWISE = Time(20, 0.8, values=0.1), Time(110, 3, values=0.3)
_CONVOLUTION = Time(20, 0.8, values=0.7), Time(180, 2.4, values=2.1)
_ONE_INPUT = Time(20, 0, values=0.5), Time(110, 0, values=3.0)  # in each group
_ONE_INPUT_LONG = Time(20, 30, values=0.1), Time(110, 66, values=0.3)
_LOOKED_UP = Time(5, product=0), Time(35, product=0, entries=0.1)


def relative_time(use: Use, form: Time, making: Making, trained: Time | None = None) -> float:
    """The time of a form as a multiple of the dense form's.

    Args:
        use: of the layer.
        form: what the form takes.
        making: of the law: the dense form makes the weight, or reads it where it is kept, and takes
            the time of an untied layer then.
        trained: what the form takes with gradients; ``form.trained`` if it was not measured.
    """
    if is_trained(use):
        form = form.trained if trained is None else trained
    return _total(use, form) / (untied_time(use) + making.takes(use))


def untied_time(use: Use, *, looks_up: bool = False) -> float:
    """Microseconds that a stock layer with a weight of its own takes.

    Args:
        use: of the layer.
        looks_up: whether it looks rows of the weight up, as an embedding does, and multiplies none.
    """
    layout = use.layout
    if looks_up:
        times = _LOOKED_UP
    elif use.kind == "linear":
        times = _LINEAR
    elif layout.groups > 1 and layout.canonical_shape[1] == 1:
        times = _ONE_INPUT if layout.kernel[-1] <= LONG_KERNEL else _ONE_INPUT_LONG
    elif prod(layout.kernel) == 1:
        times = _POINTWISE
    else:
        times = _CONVOLUTION
    return _total(use, times[is_trained(use)])


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
    if is_trained(use):  # the gradient is written
        slow = 1 < rows < 16 and entries >= _MANY
        each = max(each + 0.02, _FEW_ROWS if slow else 0.0)
    nanoseconds = entries * (time.product * each + time.entries) + rows * values * time.values
    return time.call + 5 * time.product + rows * time.row + nanoseconds / 1000
