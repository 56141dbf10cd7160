"""What a law lets a layer save that computes with its weight."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import gcd

from tiedparam.laws.layout import Layout
from tiedparam.products.reduced import Parts


@dataclass(frozen=True)
class Reduction:
    """What a law lets the layer save that computes with its weight.

    Attributes:
        inputs: the channels or features of input, and along which parts they are summed first.
        outputs: those of the output, and along which parts they are equal: computed once and
            spread.
        summed: all inputs of a group share.
        shared_banks: the groups share their filters.
        entries: how many the weight of the smaller layer has.

    Example:
        >>> layer = tp.register_tie(nn.Conv1d(4, 6, 3), "channel_shared", over="in")
        >>> found = tp.get_tie(layer).reduction()
        >>> found.inputs, found.summed, found.entries
        (Parts(sizes=(4,), shared=(0,)), True, 18)
    """

    inputs: Parts
    outputs: Parts
    summed: bool
    shared_banks: bool
    entries: int


def equal_outputs(sizes: tuple[int, ...], shared: Collection[int], layout: Layout) -> Parts:
    """Along which parts outputs are equal, so far as each group of the layer has them whole.

    Args:
        sizes: of the parts in which the output axis comes.
        shared: along which of them the law makes everything equal.
        layout: of the weight.
    """
    equal = tuple(part for part in range(len(sizes)) if part in shared)
    if layout.groups == 1 or (0 not in equal and sizes[0] % layout.groups == 0):
        return Parts(sizes, equal)
    last, outputs = len(sizes) - 1, layout.canonical_shape[0]
    # a run of equal rows must end where a block of rows or a group of the layer ends
    run = gcd(sizes[last], outputs // layout.groups) if last in equal else 1
    return Parts((outputs // run, run), (1,)) if run > 1 else Parts((outputs,))


def summed_inputs(sizes: tuple[int, ...], shared: Collection[int], layout: Layout) -> Parts:
    """Along which parts inputs can be summed first, those of each group by themselves.

    Args:
        sizes: of the parts in which the input axis of a group comes.
        shared: along which of them the law makes everything equal.
        layout: of the weight.
    """
    equal = tuple(part for part in range(len(sizes)) if part in shared)
    if layout.groups == 1:
        return Parts(sizes, equal)
    return Parts((layout.groups, *sizes), tuple(part + 1 for part in equal))
