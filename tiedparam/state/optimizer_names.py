"""The names that optimizers have for free values, where these go from one tie to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tiedparam.state.optimizer_groups import positions
from tiedparam.tie.record import Tie


def number_again(optimizers: Sequence[Optimizer], tie: Tie) -> None:
    """Name the free values by their present places in the tie, after one came or went.

    What the names begin with is the user's, so it is taken from the last of the values: only the
    first is handed over.
    """
    if not tie.free:
        return
    kept = f"parametrizations.{tie.tensor_name}.original"
    for names, at in _entries(optimizers, tie.free[-1]):
        stem, found, _ = names[at].rpartition(kept)
        if not found:
            return
        for number, value in enumerate(tie.free):
            for others, place in _entries(optimizers, value):
                others[place] = f"{stem}{kept}{number}"
        return


def _entries(
    optimizers: Sequence[Optimizer], value: nn.Parameter
) -> Iterator[tuple[list[str], int]]:
    """The lists of names that have one for this value, and where."""
    for optimizer in optimizers:
        groups: list[dict[str, Any]] = optimizer.param_groups
        for group in groups:
            if "param_names" in group:
                for at in positions([value], group["params"]):
                    yield group["param_names"], at
