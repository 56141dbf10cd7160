"""What the forms of a law that repeats a base cost, as multiples of the dense form's time."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from tiedparam.laws.forms import Use
from tiedparam.laws.look_up import SMALL
from tiedparam.laws.times import LONG_KERNEL, Time, is_trained, relative_time
from tiedparam.products.one_filter import FEW_TAPS

if TYPE_CHECKING:
    from tiedparam.laws.broadcast import Broadcast

_SAVED = 4  # multiplications per one that is left
_SAVED_IN_GROUPS = 16  # stock kernels for many groups of one channel are slow
_POSITIONS = 64  # of a kernel; windows of more take much memory
_NEARLY = 0.9  # of what they stand for, where they serve
_TRIED = 0.94  # just enough to be asked
# without gradients and with
_LINEAR = Time(15, values=0.12), Time(95, 3, values=0.36)
_SPREAD = Time(28, values=0.12), Time(140, 3, values=0.36)  # over several groups of outputs
# a convolution of one channel
_SUMMED = Time(35, 1.3, values=0.23, row=0.026), Time(100, 4, values=1.0, row=0.2)
_POINTWISE = Time(32, values=0.1), Time(150, 3, values=0.42)
_CONVOLUTION = Time(40, values=1.5), Time(220, 3, values=4.5)
_LONG_FILTER = Time(330, 0, values=1.05), Time(1050, 0, values=3.7)
_TRANSPOSED = Time(40, values=2.7), Time(220, 3, values=8.0)
# multiply-adds that take as long as spreading outputs; small weights are cheaper
_SPREADING = 1 << 18
# entries of a Linear layer that are looked up sooner than sums are called: of equal inputs or equal
# outputs, and of both
_FEW, _FEW_OF_BOTH = 1 << 9, 1 << 12
# multiply-adds of a convolution likewise, without gradients and with, and of a transposed one
_LITTLE, _LITTLE_TRAINED, _MORE = 1 << 18, 1 << 14, 1 << 20


def cost_of_reduced(rule: Broadcast, use: Use) -> float:
    """Where ``python -m benchmarks --case forms`` saw it lose in no shape, of batch 1 and 32."""
    return 1.0 if _is_tiny(rule, use) else _cost_of_fewer_channels(rule, use)


def _is_tiny(rule: Broadcast, use: Use) -> bool:
    """Whether torch's calls decide, of which the dense form has fewer."""
    entries, how = prod(use.layout.canonical_shape), rule.reduction()
    if use.rows is None:  # in a graph, where calls cost nothing
        return False
    if use.kind == "transposed":
        return use.rows * entries <= _MORE
    if use.kind == "convolution":
        little = _LITTLE_TRAINED if is_trained(use) else _LITTLE
        return use.rows * entries <= little and len(use.layout.kernel) < 3
    if _spreads(rule, use):
        return entries <= SMALL and use.rows * entries <= _SPREADING
    both = how.inputs.copies > 1 and how.outputs.copies > 1
    return entries <= (_FEW_OF_BOTH if both else _FEW)


def _spreads(rule: Broadcast, use: Use) -> bool:
    """Whether outputs are to be spread over several groups of equal ones."""
    return 1 < rule.reduction().outputs.copies < use.layout.canonical_shape[0]


def _cost_of_fewer_channels(rule: Broadcast, use: Use) -> float:
    how, layout = rule.reduction(), use.layout
    if how.shared_banks:
        return 1.0  # each group's outputs are its own
    saved = how.inputs.copies * how.outputs.copies
    enough = _SAVED if layout.groups == 1 else _SAVED_IN_GROUPS
    if saved == 1 or (use.kind != "linear" and saved < enough):
        return 1.0
    entries = prod(layout.canonical_shape)
    if use.kind == "linear":
        times = _SPREAD if _spreads(rule, use) else _LINEAR
    elif prod(layout.kernel) == 1:
        times = _POINTWISE
    elif use.kind == "convolution":
        times = _SUMMED if how.summed else _CONVOLUTION
    else:
        times = _TRANSPOSED
    # of it depends what a report says that a tie gains, and not whether the form is taken
    left = how.entries / entries
    form, trained = (time._replace(product=left * time.product) for time in times)
    return min(_NEARLY, relative_time(use, form, rule.making, trained))


def cost_of_windows(rule: Broadcast, use: Use) -> float | None:
    """They do what "reduced" does, or "dense" where groups share their filters.

    Which of them is faster depends on the sizes of the input, and is asked at the call.
    """
    how, layout = rule.reduction(), use.layout
    if use.kind != "convolution":
        return None
    if how.shared_banks:
        return _cost_of_streams(rule, use) if layout.canonical_shape[1] == 1 else None
    if not how.summed or layout.groups > 1 or how.outputs.copies > 1:
        return None
    cost = _cost_of_fewer_channels(rule, use)
    return _NEARLY * cost if prod(layout.kernel) <= _POSITIONS and cost < 1 else 1.0


def _cost_of_streams(rule: Broadcast, use: Use) -> float:
    """For ``over="groups"``; ``python -m benchmarks --case goals --only streams``."""
    layout, training = use.layout, is_trained(use)
    if layout.canonical_shape[0] > layout.groups:
        return _NEARLY if prod(layout.kernel) <= _POSITIONS else 1.0
    if layout.kernel[-1] > LONG_KERNEL:
        if len(layout.kernel) > 1:
            return 0.2 if training else 0.1
        form, trained = _LONG_FILTER
        return min(_NEARLY, relative_time(use, form, rule.making, trained))
    if training and max(layout.kernel) > FEW_TAPS:
        return 0.6 if len(layout.kernel) == 1 else 0.5
    return _TRIED  # it pays only where a dilation calls for much padding
