"""Tying one tensor of one layer.

`register_tie` reads top to bottom: find the rule, check everything, compute the free values, plan
the optimizers' moves; only then touch the layer, and put everything back if torch refuses midway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from tiedparam.compute.forms import computing_of
from tiedparam.compute.frozen import refuse_if_frozen
from tiedparam.compute.kept import memory_for
from tiedparam.laws.layout import declare_shape
from tiedparam.laws.registry import make_rule
from tiedparam.laws.rule import Rule
from tiedparam.layer import host
from tiedparam.layer.checks import check_arguments, described, why_refused, why_untieable
from tiedparam.layer.concerns import Concern, check_max_residual, concern_of
from tiedparam.layer.initial_values import InitialValues, initial_values
from tiedparam.layer.moves import planned_moves, raise_if
from tiedparam.layer.parameter_order import plain_parameter, remember_order
from tiedparam.state import optimizer_guard, optimizer_moves
from tiedparam.state.optimizer_exchange import tying
from tiedparam.tie.binding import bind, value_of
from tiedparam.tie.lookup import find_tie, origins, tie_of
from tiedparam.tie.marks import carry_attributes
from tiedparam.tie.parameter_paths import Places
from tiedparam.tie.reading import Reading
from tiedparam.tie.record import Tie
from tiedparam.tie.rollback import rolled_back_on_error
from tiedparam.util.errors import Reason, TieError, warn
from tiedparam.util.never_compiled import never_compiled
from tiedparam.util.sharded import is_sharded
from tiedparam.util.torch_private import (
    effective,
    parameters_of,
)

Layer = TypeVar("Layer", bound=nn.Module)


@never_compiled
def register_tie(
    layer: Layer,
    rule: str | type[Rule] | Rule,
    tensor_name: str = "weight",
    *,
    init: str = "project",
    max_residual: float | None = None,
    cache: bool = False,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    root: nn.Module | None = None,
    **options: Any,
) -> Layer:
    """Tie a tensor of a stock layer: only its free values are stored from now on.

    A copy whose source was resized, exchanged or lost since is tied anew by another copy, in the
    size that its source has now.

    Args:
        layer: the layer; it stays of its class, and ``repr`` shows the tie.
        rule: a registered name (`available_rules`), a `Rule` subclass, or a `Rule`.
        tensor_name: which Parameter of the layer.
        init: how the free values come from the present weight: ``"project"``, the nearest
            lawful weight (for trained weights); ``"rescale"``, the projection times the
            square root of each orbit's multiplicity (for fresh i.i.d. ones, whose standard
            deviation it keeps); ``"exact"``, raise unless the weight is lawful already.
        max_residual: how far the weight may be from the law (see `residual`); above it this is an
            error. A number that is given also says that what lies below is meant, without a
            warning.
        cache: keep the computed weight between calls in eval mode without gradients. The
            free values are compared, bit for bit, before it is used again (on a GPU that waits
            for the device). Where comparing takes as long as computing, this is ignored: by
            laws that only repeat or copy, and by ``flip_sym`` below 65,536 entries; see
            `Rule.gains_from_cache`, and `frozen` for whole models.
        optimizer: the optimizer or optimizers that hold the dense parameter; they are
            moved to the free values, state and coupled decay included. They must be of
            ``torch.optim``, or known by `register_optimizer`. A stepping optimizer that was
            left out raises.
        root: the model that holds the layer: names it in messages, finds a ``source=`` given
            as a path, refuses layers that share the Parameter with another one, and keeps a
            copy from being separated from its source.
        **options: the rule's own options.

    Returns:
        The layer itself.

    Raises:
        TieError: if anything does not fit. Nothing was changed then.
        TypeError: for arguments of a wrong type and options that the rule does not have.

    Warns:
        TieWarning: if the tie frees nothing, or if ``"project"`` keeps less than a fifth of the
            norm of a weight that was no nearer to the law than a random one. Tensors of fewer
            than 128 entries and copies, which replace the weight by definition, are left out.
        TieWarning: if decay that the optimizer adds to the gradient becomes weaker, with by how
            much and the way out.
    """
    check_arguments(layer, tensor_name, init, root)
    check_max_residual(max_residual)
    made = make_rule(rule, options)
    places = Places(root) if root is not None else None
    return tie_one(
        layer,
        made,
        tensor_name,
        places,
        init=init,
        max_residual=max_residual,
        cache=cache,
        optimizer=optimizer,
        concerned=lambda concern: warn(f"{concern.fact()} {concern.advice()}"),
    )


@torch.inference_mode(False)  # Parameters made in inference mode could never be trained
def tie_one(
    layer: Layer,
    made: Rule,
    tensor_name: str,
    places: Places | None,
    *,
    init: str = "project",
    max_residual: float | None = None,
    cache: bool = False,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    concerned: Callable[[Concern], None] | None = None,
) -> Layer:
    """`register_tie` with a rule that is made, and a root that is looked through.

    ``concerned`` is told of a tie that is hardly meant, while all can still be put back.

    Raises:
        TieError: if anything does not fit. Nothing was changed then.
    """
    if made.reads_layers and _has_lost_its_source(layer, tensor_name):
        return _tie_again(layer, made, tensor_name, places, init=init, cache=cache)
    where = described(layer, tensor_name, places)
    place = f"cannot tie {where} by '{made}'"
    refuse_if_frozen(layer, "register_tie")
    raise_if(place, why_untieable(layer, tensor_name, places) or why_refused(layer, made))
    weight: nn.Parameter = parameters_of(layer)[tensor_name]  # type: ignore[assignment]
    optimizers = optimizer_moves.as_optimizers(optimizer)
    noted = rolled_back_on_error(layer.modules(), optimizers)
    with _long_chains_told(place), _unbound_on_error(made), noted:
        values = _fit(made, layer, tensor_name, places, init, max_residual, place)
        tie = _replace_parameter(layer, tensor_name, made, values.free)
        tie.record.computing = computing_of(layer, tensor_name, made)
        tie.record.kept = memory_for(made, cache)
        tie.record.residual_at_tying = values.residual
        if made.reads_layers:
            tie.record.reading = Reading.start(
                tie.record, tie.record.law, layer, tensor_name, places
            )
        for parameter in tie.free:
            carry_attributes(weight, parameter)
        change = tying(made, weight, tie.free, tensor_name)
        moves = planned_moves(optimizers, change, place)
        optimizer_moves.warn_of_losses(moves, f"tying {where} by '{made}'")
        optimizer_moves.move_gradient(change)
        for move in moves:
            move.apply()
        if made.reads_layers and not tie.free:
            origin = list(origins(layer, tensor_name))
            optimizer_moves.share_gradient(weight, tie.tied, origin)
        asked = init != "project" or max_residual is not None
        residual = None if asked else values.residual
        concern = concern_of(where, tensor_name, made, weight.detach(), residual)
        if concern is not None and concerned is not None:
            concerned(concern)
    optimizer_guard.retire([weight], f"the dense parameter of {where}", _TO_REBUILD)
    optimizer_guard.watch_free_values(tie.free, where)
    return layer


_TO_REBUILD = (
    "Build the optimizer anew, now that the tie is made; to keep its state, pass optimizer= to "
    "register_tie when you tie. If another layer shares that parameter, register_tie finds it "
    "with root=model."
)


def _fit(
    made: Rule,
    layer: nn.Module,
    tensor_name: str,
    places: Places | None,
    init: str,
    max_residual: float | None,
    place: str,
) -> InitialValues:
    """Bind the rule and compute the free values, with all reasons against them."""
    raise_if(place, bind(made, layer, tensor_name, places.root if places is not None else None))
    if any(is_sharded(effective(*source)) for source in made.sources()):
        raise TieError(place, "its source is sharded already.", "Tie before fully_shard.")
    weight: nn.Parameter = parameters_of(layer)[tensor_name]  # type: ignore[assignment]
    found = initial_values(made, weight, init, max_residual)
    if isinstance(found, Reason):
        raise TieError(place, *found)
    raise_if(place, made.why_not_kept())  # now that it has done all that it does
    return found


def _replace_parameter(
    layer: nn.Module, tensor_name: str, made: Rule, free: list[torch.Tensor]
) -> Tie:
    """Put the rule and its free values into the place of the Parameter."""
    remember_order(layer)
    # torch's check calls the law without its sources; ours was made with them
    parametrize.register_parametrization(layer, tensor_name, made, unsafe=made.reads_layers)
    host.install_host(layer)
    tie = tie_of(layer, tensor_name)
    tie.values.unsafe = False
    with torch.no_grad():
        for parameter, value in zip(tie.free, free, strict=True):
            parameter.copy_(value)
    return tie


# A copy whose source has changed -----------------------------------------------------------------


def _has_lost_its_source(layer: nn.Module, tensor_name: str) -> bool:
    """Whether the tensor is tied to a source that was resized, exchanged or lost since."""
    tie = find_tie(layer, tensor_name)
    if tie is None or tie.is_stacked or not tie.rule.reads_layers:
        return False
    try:
        with torch.no_grad():
            tie.weight()
    except TieError:
        return True
    return False


def _tie_again(
    layer: Layer, made: Rule, tensor_name: str, places: Places | None, *, init: str, cache: bool
) -> Layer:
    """Replace a broken copy: one call, from whatever has become of its source (S30, S44)."""
    refuse_if_frozen(layer, "register_tie")
    present = tie_of(layer, tensor_name)
    watches = present.reading.watches if present.reading is not None else []
    with _unbound_on_error(made), rolled_back_on_error(layer.modules(), []):
        value = value_of(made, tensor_name, places.root if places is not None else None)
        shape = present.rule.bound_layout.shape
        if value is None or value.dim() != len(shape):
            value = torch.empty(shape, device="cpu")  # `bind` says what does not fit
        host.remove_host(layer, tensor_name, plain_parameter(value, requires_grad=True))
        declare_shape(layer, tensor_name, tuple(value.shape))
        tie_one(layer, made, tensor_name, places, init=init, cache=cache, optimizer=None)
    for watch in watches:
        watch.leave()
    return layer


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
