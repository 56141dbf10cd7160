"""Tying one tensor of one layer.

`tie_one` reads top to bottom: check everything, compute the free values, plan the optimizers'
moves; only then touch the layer, and put everything back if torch refuses midway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from tiedparam.compute.forms import computing_of
from tiedparam.compute.frozen import refuse_if_frozen
from tiedparam.compute.kept import memory_for
from tiedparam.laws.fitted import is_fitted
from tiedparam.laws.layout import declare_shape
from tiedparam.laws.rule import Rule
from tiedparam.laws.sharing import why_not_alone
from tiedparam.layer import host
from tiedparam.layer.checks import Init, why_refused, why_untieable
from tiedparam.layer.concerns import Concern, concern_of
from tiedparam.layer.initial_values import (
    InitialValues,
    blank_values,
    given_values,
    initial_values,
)
from tiedparam.layer.moves import planned_moves
from tiedparam.layer.parameter_order import plain_parameter, remember_order
from tiedparam.layer.rollback import rolled_back_on_error
from tiedparam.state import optimizer_guard, optimizer_moves
from tiedparam.state.optimizer_exchange import tying
from tiedparam.tie.binding import bind, value_of
from tiedparam.tie.lookup import origins, tie_of
from tiedparam.tie.marks import carry_attributes
from tiedparam.tie.reading import Reading
from tiedparam.tie.record import Tie
from tiedparam.tie.sources import overlooking_sources
from tiedparam.tie.target import Target
from tiedparam.util.errors import Reason, TieError, raise_if
from tiedparam.util.sharded import is_sharded
from tiedparam.util.torch_private import effective


class Settings(NamedTuple):
    """How a tensor is to be tied, apart from the law.

    Attributes:
        init: how the free values come from the present weight.
        max_residual: how far that may be from the law.
        cache: whether to keep the computed weight between calls.
        optimizers: those that hold the dense parameter.
        concerned: called with a tie that was probably not intended, while it can still be undone.
        values: the free values, where they come of more than this tensor.
        is_filled_later: whether they come afterwards, out of a file.
        lost: takes what an optimizer loses by the tie; None warns of it.
    """

    init: Init = "project"
    max_residual: float | None = None
    cache: bool = False
    optimizers: Sequence[Optimizer] = ()
    concerned: Callable[[Concern], None] | None = None
    values: Sequence[torch.Tensor] | None = None
    is_filled_later: bool = False
    lost: Callable[[str], None] | None = None


@torch.inference_mode(False)  # Parameters made in inference mode could never be trained
def tie_one(target: Target, made: Rule, settings: Settings) -> None:
    """`register_tie`, once all that was given is made.

    Raises:
        TieError: if anything does not fit. Nothing was changed then.
    """
    if made.reads_layers and _has_lost_its_source(target):
        _tie_again(target, made, settings)
        return
    where = target.describe()
    place = f"cannot tie {where} by '{made}'"
    refuse_if_frozen(target.layer, "register_tie")
    raise_if(place, why_untieable(target) or why_refused(target, made))
    weight: nn.Parameter = target.parameter  # type: ignore[assignment]
    noted = rolled_back_on_error(target.layer.modules(), settings.optimizers)
    with _long_chains_told(place), _unbound_on_error(made), noted:
        values = _fit(made, target, weight, settings, place)
        tie = _replace_parameter(target, made, values.free)
        tie.record.computing = computing_of(target.layer, target.tensor_name, made)
        tie.record.kept = memory_for(made, settings.cache)
        tie.record.residual_at_tying = values.residual
        if made.reads_layers:
            tie.record.reading = Reading.start(
                tie.record, tie.record.law, target.layer, target.tensor_name, target.places
            )
        for parameter in tie.free:
            carry_attributes(weight, parameter)
        change = tying(tie, weight)
        moves = planned_moves(settings.optimizers, change, place)
        if settings.lost is None:
            optimizer_moves.warn_of_losses(moves, f"tying {where} by '{made}'")
        else:
            optimizer_moves.tell_losses(moves, settings.lost)
        optimizer_moves.move_gradient(change)
        for move in moves:
            move.apply()
        if is_fitted(made) or (made.reads_layers and not tie.free):
            origin = list(origins(target.layer, target.tensor_name))
            optimizer_moves.share_gradient(weight, tie.tied, origin)
        _tell_concern(tie, where, weight, settings)
    optimizer_guard.retire([weight], f"the dense parameter of {where}", _TO_REBUILD)
    optimizer_guard.watch_free_values(tie.free, where)


_TO_REBUILD = (
    "Rebuild the optimizer now that the tensor is tied; to keep its state, pass optimizer= to "
    "register_tie when you tie. If another layer shares that parameter, register_tie finds it "
    "with root=model."
)


def _fit(
    made: Rule, target: Target, weight: nn.Parameter, settings: Settings, place: str
) -> InitialValues:
    """Bind the rule and compute the free values, with all reasons against them."""
    raise_if(place, bind(made, target))
    given = settings.is_filled_later or settings.values is not None
    raise_if(place, None if given else why_not_alone(made))
    if any(is_sharded(effective(*source)) for source in made.sources()):
        remedy = "Tie before fully_shard or parallelize_module."
        raise TieError(place, "its source is sharded already.", remedy)
    if settings.is_filled_later:
        found: InitialValues | Reason = blank_values(made, weight)
    elif settings.values is not None:
        found = given_values(made, weight, settings.values)
    else:
        found = initial_values(made, weight, settings.init, settings.max_residual)
    if isinstance(found, Reason):
        raise TieError(place, *found)
    raise_if(place, made.why_not_kept())  # now that it has done all that it does
    return found


def _replace_parameter(target: Target, made: Rule, free: list[torch.Tensor]) -> Tie:
    """Put the rule and its free values into the place of the Parameter."""
    layer, name = target.layer, target.tensor_name
    remember_order(layer)
    # torch asks for the free values, which are known: not all follow from the weight alone
    made.__dict__["right_inverse"] = lambda _: [value.detach().clone() for value in free]
    try:
        # its check calls the law without its sources; ours was made with them
        parametrize.register_parametrization(layer, name, made, unsafe=made.reads_layers)
    finally:
        del made.__dict__["right_inverse"]
    host.install_host(layer)
    tie = tie_of(layer, name)
    tie.values.unsafe = False
    return tie


def _tell_concern(tie: Tie, where: str, weight: nn.Parameter, settings: Settings) -> None:
    asked = settings.init != "project" or settings.max_residual is not None
    concern = concern_of(tie, where, weight.detach(), asked=asked)
    if concern is not None and settings.concerned is not None:
        settings.concerned(concern)


# A copy whose source has changed -----------------------------------------------------------------


def _has_lost_its_source(target: Target) -> bool:
    """Whether the tensor is tied to a source that was resized, exchanged or lost since."""
    tie = target.tie()
    if tie is None or tie.is_stacked or not tie.rule.reads_layers:
        return False
    try:
        with torch.no_grad():
            tie.weight()
    except TieError:
        return True
    return False


def _tie_again(target: Target, made: Rule, settings: Settings) -> None:
    """Replace a broken copy: one call, from whatever has become of its source (S30, S44)."""
    layer, name = target.layer, target.tensor_name
    refuse_if_frozen(layer, "register_tie")
    present = tie_of(layer, name)
    with _unbound_on_error(made), rolled_back_on_error(layer.modules(), []):
        value, lost = value_of(made, target), None
        if value is None:  # what it was until now, to which values of its own are fitted
            value, lost = _last_value(present)
        shape = present.rule.bound_layout.shape
        if value is None or value.dim() != len(shape):
            value = torch.zeros(shape, device="cpu")  # `bind` says what does not fit
        host.remove_host(layer, name, plain_parameter(value, requires_grad=True))
        declare_shape(layer, name, tuple(value.shape))
        tie_one(target, made, Settings(settings.init, cache=settings.cache))
        if lost is not None and made.free_shapes():
            raise TieError(
                f"cannot tie {target.describe()} by '{made}'",
                f"{lost.fact} So there is no tensor to fit the law's own values to.",
                "Give the source its tensor back first.",
            )
    optimizer_guard.retire(present.free, f"a free value of {target.describe()}", _TO_REBUILD)


def _last_value(tie: Tie) -> tuple[torch.Tensor | None, TieError | None]:
    """What a broken tie gives by what it still holds, or why it gives nothing."""
    try:
        with torch.no_grad(), overlooking_sources(tie.values):
            return tie.weight(), None
    except TieError as error:
        return None, error


# When something fails ----------------------------------------------------------------------------


@contextmanager
def _long_chains_told(place: str) -> Iterator[None]:
    """Say what it means if Python's stack does not reach to the end of a chain of copies."""
    try:
        yield
    except RecursionError as error:
        raise TieError(
            place, "its copies read each other in too long a chain.", "Tie each to the first."
        ) from error


@contextmanager
def _unbound_on_error(rule: Rule) -> Iterator[None]:
    """A rule that did not fit here may fit elsewhere: give it back as it was."""
    found = dict(rule.__dict__)
    try:
        yield
    except BaseException:
        rule.__dict__.clear()
        rule.__dict__.update(found)
        raise
