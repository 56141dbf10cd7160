"""The optimizers' moves that tying and untying ask for, with errors that name the tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from tiedparam.state import optimizer_moves
from tiedparam.state.optimizer_exchange import Exchange
from tiedparam.state.optimizer_moves import Move
from tiedparam.util.errors import TieError


def planned_moves(optimizers: Sequence[Optimizer], change: Exchange, place: str) -> list[Move]:
    """The moves that an exchange of Parameters asks of the optimizers.

    Raises:
        TieError: if one cannot follow.
    """
    try:
        return optimizer_moves.plan_moves(optimizers, change)
    except TieError as error:
        raise TieError(place, *error.reason) from error
