"""How long the dense form of a tied Linear layer takes, for laws that say what another form costs.

In microseconds of one core with AVX-512, of which only ratios matter; a product with the expanded
weight is faster on some machines, so laws keep a margin.
"""

from __future__ import annotations

from tiedparam.laws.forms import Use

_SPEED = 46_000.0  # multiplications with additions
_READ = 20_000.0  # entries of a weight


def usual_rows(use: Use) -> int:
    """How many rows of input a layer takes; 64 where nobody can say."""
    return 64 if use.rows is None else use.rows


def time_of_dense(use: Use, *, expanded: float, folded: float) -> float:
    """What a Linear layer takes with the whole weight, to measure other forms by.

    Args:
        use: of the layer.
        expanded: how many entries of the weight are expanded in a microsecond.
        folded: how many are expanded, and their gradients folded, in training.
    """
    outputs, inputs = use.layout.canonical_shape
    entries, rows = outputs * inputs, usual_rows(use)
    if use.training:
        return 195.0 + entries * (1 / folded + 3 * rows / _SPEED)
    if use.kept:
        return 12.0 + entries * (1 / _READ + rows / _SPEED)
    return 40.0 + entries * (1 / expanded + rows / _SPEED)
