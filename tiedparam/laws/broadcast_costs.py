"""What the forms of a law that repeats a base cost, as multiples of the dense form's time."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from tiedparam.laws.forms import Use
from tiedparam.laws.layout import Layout
from tiedparam.laws.look_up import SMALL
from tiedparam.laws.reduction import Reduction
from tiedparam.laws.times import rows_multiplied
from tiedparam.products.one_filter import FEW_TAPS

if TYPE_CHECKING:
    from tiedparam.laws.broadcast import Broadcast

_SAVED = 4  # multiplications per one that is left
_SAVED_IN_GROUPS = 16  # stock kernels for many groups of one channel are slow
_POSITIONS = 64  # of a kernel; windows of more take much memory
_NEARLY = 0.9  # of what they stand for, where they serve
_LONG_KERNEL = 13  # along the last axis; with more, half of it is too much padding for torch
_PER_VALUE = {"linear": 5, "convolution": 70, "transposed": 120}  # of input and output
_SUMMED = 20  # per value, in a convolution of one channel
_PER_CALL = 600_000  # some 15 µs
# multiply-adds that take as long as spreading outputs; small weights are cheaper
_SPREADING = 1 << 18
_EXPANDING = 1.7  # of _PER_CALL, in the dense form
_BACKWARD = 2.5  # of _PER_CALL, with gradients


def cost_of_reduced(rule: Broadcast, use: Use) -> float:
    """Where ``python -m benchmarks --case forms`` saw it lose in no shape, of batch 1 and 32."""
    how, layout = rule.reduction(), use.layout
    if how.shared_banks:
        return 1.0  # each group's outputs are its own
    saved = how.inputs.copies * how.outputs.copies
    enough = _SAVED if layout.groups == 1 else _SAVED_IN_GROUPS
    if saved == 1 or (use.kind != "linear" and saved < enough):
        return 1.0
    spreads = use.kind == "linear" and 1 < how.outputs.copies < layout.canonical_shape[0]
    entries = prod(layout.canonical_shape)
    if spreads and entries <= SMALL and use.rows is not None and use.rows * entries <= _SPREADING:
        return 1.0
    return min(_NEARLY, _share_of_time(how, use))


def _share_of_time(how: Reduction, use: Use) -> float:
    """Of the dense form's time, in multiply-adds that the dense layer makes in as much time.

    On the machine of the result files it is right by a factor of 1.5, so that a report can say
    what a tie gains; whether the form is taken does not depend on it.
    """
    layout = use.layout
    dense = prod(layout.canonical_shape)
    moved = layout.canonical_shape[0] + layout.groups * layout.canonical_shape[1]
    rows = rows_multiplied(use)
    per_call = _PER_CALL * (_BACKWARD if use.training else 1)
    per_value = _SUMMED if use.kind == "convolution" and how.summed else _PER_VALUE[use.kind]
    reduced = per_call + rows * (how.entries + per_value * moved)
    return min(_NEARLY, reduced / (_EXPANDING * per_call + rows * dense))


def cost_of_windows(rule: Broadcast, use: Use) -> float | None:
    """They do what "reduced" does, or "dense" where groups share their filters.

    Which of them is faster depends on the sizes of the input, and is asked at the call.
    """
    how, layout = rule.reduction(), use.layout
    if use.kind != "convolution":
        return None
    if how.shared_banks:
        return _cost_of_streams(layout, use.training) if layout.canonical_shape[1] == 1 else None
    if not how.summed or layout.groups > 1 or how.outputs.copies > 1:
        return None
    cost = cost_of_reduced(rule, use)
    return _NEARLY * cost if prod(layout.kernel) <= _POSITIONS and cost < 1 else 1.0


def _cost_of_streams(layout: Layout, training: bool) -> float:
    """For ``over="groups"``; ``python -m benchmarks --case goals --only streams``."""
    if layout.canonical_shape[0] > layout.groups:
        return _NEARLY if prod(layout.kernel) <= _POSITIONS else 1.0
    if layout.kernel[-1] > _LONG_KERNEL:
        return 0.2
    if training and max(layout.kernel) > FEW_TAPS:
        return 0.6 if len(layout.kernel) == 1 else 0.5
    return _NEARLY  # where a dilation calls for much padding
