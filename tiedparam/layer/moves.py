"""What tying and untying share: one place that raises, and the optimizers' moves."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from tiedparam.state import optimizer_moves
from tiedparam.state.optimizer_exchange import Exchange
from tiedparam.state.optimizer_moves import Move
from tiedparam.util.errors import Reason, TieError


def raise_if(place: str, reason: Reason | None) -> None:
    """Raise a `TieError` if there is a reason."""
    if reason is not None:
        raise TieError(place, *reason)


def planned_moves(optimizers: Sequence[Optimizer], change: Exchange, place: str) -> list[Move]:
    """The moves that an exchange of Parameters asks of the optimizers.

    Raises:
        TieError: if one cannot follow.
    """
    try:
        return optimizer_moves.plan_moves(optimizers, change)
    except TieError as error:
        raise TieError(place, *error.reason) from error
