"""What a law lets a layer save that computes with its weight."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reduction:
    """What a law lets the layer save that computes with its weight.

    Attributes:
        summed: all inputs of a group share, so they can be summed first.
        run: so many consecutive outputs of a group are equal; one is computed and spread.
        shared_banks: the groups share their filters.
        entries: how many the weight of the smaller layer has.

    Example:
        >>> layer = tp.register_tie(nn.Conv1d(4, 6, 3), "channel_shared", over="in")
        >>> tp.get_tie(layer).reduction()
        Reduction(summed=True, run=1, shared_banks=False, entries=18)
    """

    summed: bool
    run: int
    shared_banks: bool
    entries: int
