"""Entries dealt to few values by a hash: W[e] = ξ(e)·w[h(e)]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

from torch import Tensor, nn

from tiedparam.laws import Orbits, Reason
from tiedparam.laws.choices import is_whole
from tiedparam.laws.example import Example
from tiedparam.laws.hashing import hashed_labels
from tiedparam.laws.indices import image_by_labels
from tiedparam.laws.layout import Layout
from tiedparam.laws.pattern import Pattern
from tiedparam.laws.registry import register_rule
from tiedparam.util.torch_modes import plain_numbers

_SEEDS = 2**32


@register_rule("hashed")
class Hashed(Orbits):
    """Every entry is one of ``n`` values or minus it, as a hash of its place says.

    No index is stored: the hash is part of the law, and the same on every machine, device and
    version. Entries are dealt in the order of their hashes, so each value has ``N/n`` of the ``N``
    entries, or one more.

    Args:
        n: how many values; from 1 to the number of entries.
        seed: which hash; from 0 to 2³² − 1. Layers of one shape need seeds of their own if they are
            not to share a pattern.

    Shapes: ``free``: ``(1, n)``, or ``(n,)`` for a vector; ``weight``: any. Entries are numbered in
    the order of outputs, inputs, kernel positions, whatever the layer's own order.

    Source: Chen et al. 2015, "Compressing neural networks with the hashing trick", who draw a value
    for each entry, so that some may get none; the projection is the (signed) orbit mean.

    Example:
        >>> layer = tp.register_tie(nn.Linear(8, 8), "hashed", n=16, seed=1)
        >>> tp.get_tie(layer).free_count, layer.weight.abs().unique().numel()
        (16, 16)
        >>> [name for name in layer.state_dict() if "weight" in name]
        ['parametrizations.weight.original0']
    """

    family = "shared by chance"
    law = "W[e] = ξ(e)·w[h(e)]"

    def __init__(self, n: int, seed: int = 0) -> None:
        super().__init__()
        self.n = n
        self.seed = seed

    def options(self) -> dict[str, Any]:
        """Both: they are the law."""
        return {"n": self.n, "seed": self.seed}

    def check(self, layout: Layout) -> Reason | None:
        """Every value must have an entry."""
        entries = prod(layout.shape)
        if not is_whole(self.n, 1) or self.n > entries:
            return Reason(
                f"n={self.n!r} is no number of values for a tensor {layout.shape}.",
                f"Choose one from 1 to {entries}.",
            )
        if not is_whole(self.seed, 0) or self.seed >= _SEEDS:
            return Reason(f"seed={self.seed!r} is no seed.", "Choose one from 0 to 2**32 - 1.")
        return None

    def _labels(self) -> Tensor:
        layout = self.bound_layout
        labels = hashed_labels(prod(layout.shape), self.n, self.seed)
        with plain_numbers():
            return layout.native(labels.view(layout.canonical_shape)).flatten()

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """Every entry as the first one that has its value, with the sign between the two."""
        yield image_by_labels(weight, self._labels())

    def find_pattern(self) -> Pattern:
        """As the hash says; values are numbered as they are dealt."""
        return Pattern(self._labels(), self.n, None)

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """None: a weight that was not made so is not like it."""
        return ()

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Sizes that divide and that do not, layers with another order of axes, and a bias."""
        return (
            Example(lambda: nn.Linear(4, 4), {"n": 5}),
            Example(lambda: nn.Conv2d(3, 4, 3), {"n": 12, "seed": 7}),
            Example(lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), {"n": 10, "seed": 3}),
            Example(lambda: nn.Linear(2, 6), {"n": 2}, "", "bias"),
        )
