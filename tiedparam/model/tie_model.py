"""Tying and untying whole models: by a plan, and all or nothing.

`tie_model` is many `register_tie`, each of which checks everything before it touches its
layer. The first pass finds what each entry of the plan selects. Then one tie after another is
made under a note of how everything was; whatever cannot be tied is collected, and if there is
anything, all of it is put back, to the object, before the one error is raised.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeVar, get_args

from torch import nn
from torch.optim import Optimizer

from tiedparam.layer.checks import Init
from tiedparam.layer.concerns import Concerns, check_max_residual
from tiedparam.layer.remove import remove_tie
from tiedparam.layer.rollback import rolled_back_on_error
from tiedparam.layer.tie_one import Settings, tie_one
from tiedparam.model.plan import Plan, PlanMapping
from tiedparam.model.reasons import SeveralTiesError, Skipped
from tiedparam.model.report import TieReport, tie_rows
from tiedparam.model.selection import Selected, select, sources_first
from tiedparam.model.target_size import TargetSize, choose_sizes
from tiedparam.model.totals import totals_of
from tiedparam.state.optimizer_moves import as_optimizers
from tiedparam.tie.lookup import ties_in
from tiedparam.tie.parameter_paths import Places
from tiedparam.tie.target import Target
from tiedparam.util.errors import Reason, TieError, key_of, some_of, warn
from tiedparam.util.never_compiled import never_compiled

Model = TypeVar("Model", bound=nn.Module)

LEAVE_UNFIT = "Correct the plan, or pass on_unfit='skip' to leave these as they are."
"""What to do about tensors that cannot carry their rule."""
OnUnfit = Literal["error", "skip"]
"""What becomes of tensors that cannot carry their rule."""


@never_compiled
def tie_model(
    model: nn.Module,
    plan: Plan | PlanMapping,
    *,
    init: Init = "project",
    max_residual: float | None = None,
    cache: bool = False,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    dry_run: bool = False,
    on_unfit: OnUnfit = "error",
    target_size: TargetSize | None = None,
) -> TieReport:
    """Tie the tensors of a model that a plan selects. All or nothing.

    Args:
        model: the model.
        plan: ``{pattern: rule}`` or a `Plan`. A pattern is a glob over module names
            (``"layer*.conv2"``; ``*`` also matches dots), a layer type, or a function of
            (name, module). A rule is a name, a `Rule` subclass, a pair of one and its options,
            or a list of these. Those of a list that name one tensor hold together. Among the
            options ``tensor_name`` and ``init`` may stand, which go to `register_tie`, and
            ``rows`` and ``columns``, and ``exclude``, globs over what is left out; a ``source=``
            may be given as its path in the model. Its wildcards stand for what those of the
            pattern matched, and every tensor is then tied:
            ``{"layers.[1-5].*": ("copy", {"source": "layers.0.*"})}``, see `tie_block`. The first
            entry that selects a tensor wins. Modules without the tensor are passed over.
        init: as in `register_tie`; ``"rescale"`` leaves copies as they are, since they have no
            values of their own.
        max_residual: as in `register_tie`, for every tie.
        cache: as in `register_tie`, for every tie; laws that gain nothing from it ignore it.
        optimizer: the optimizer or optimizers that hold the dense parameters; they are moved
            to the free values, as by `register_tie`.
        dry_run: do everything, put everything back, and return the report of it.
        on_unfit: ``"error"`` changes nothing if a tensor cannot carry its rule, and lists all
            reasons; ``"skip"`` leaves such tensors as they are, and lists them in the report, with
            layer types and functions that select nothing here. A glob that fits no name at all is
            misspelt, and stays an error.
        target_size: how large a checkpoint of the model may be, as a share of the dense model's
            (``"25%"``) or in bytes; headers of files come on top. Laws that have sizes, such as
            ``n`` of ``cluster``, then get for each tensor the size, up to that in the plan, that
            loses least of all weights. None takes the plan as it is.

    Returns:
        The report: what was tied, what was skipped, and what that saves.

    Raises:
        TieError: if an entry selects nothing (with the nearest names); if the target cannot be
            reached (with the smallest size that can); or, listing all reasons, if something does
            not fit. Nothing was changed then.
        TypeError: for arguments of a wrong type and options that a rule does not have.

    Warns:
        TieWarning: one for all ties that free nothing, or keep next to nothing of their weight, as
            `register_tie` warns of each; one for each entry that does nothing, because earlier
            ones have taken all that it selects.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        >>> done = tp.tie_model(model, {"*": "flip_sym"})
        >>> [(row.layer, row.free_values) for row in done.ties]
        [('0', 10), ('2', 10)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"tie_model takes an nn.Module, not {type(model).__name__}")
    if on_unfit not in get_args(OnUnfit):
        raise TieError(
            "on_unfit=", f"on_unfit={on_unfit!r} is unknown.", "Choose 'error' or 'skip'."
        )
    check_max_residual(max_residual)
    plan = Plan.of(plan)
    optimizers = as_optimizers(optimizer)
    outside = [source for entry in plan.entries for source in entry.source_layers()]
    try:
        with rolled_back_on_error([*model.modules(), *outside], optimizers):
            # in here, since a pattern may be a function of the user's, which may do anything
            selected, absent = select(model, plan, init, skip=on_unfit == "skip")
            settings = Settings(init, max_residual, cache, optimizers)
            report = tie_all(
                model,
                selected,
                settings,
                absent=absent,
                on_unfit=on_unfit,
                dry_run=dry_run,
                target_size=target_size,
            )
            if dry_run:
                raise _PutBack
    except _PutBack:
        pass
    return report


def tie_all(
    model: nn.Module,
    selected: list[Selected],
    settings: Settings,
    *,
    absent: Iterable[Skipped] = (),
    on_unfit: OnUnfit = "error",
    dry_run: bool = False,
    remedy: str = LEAVE_UNFIT,
    target_size: TargetSize | None = None,
) -> TieReport:
    """Tie these tensors of a model. Whoever calls puts back what was done before an error.

    Args:
        model: the model.
        selected: the tensors.
        settings: how to tie them; where each says its own ``init``, that.
        absent: what the report says was skipped besides.
        on_unfit: as in `tie_model`.
        dry_run: what the report says.
        remedy: what to do where something does not fit.
        target_size: as in `tie_model`.

    Raises:
        TieError: listing all reasons, if something does not fit; or if the size cannot be reached.
    """
    concerns, skipped = Concerns(), list[Skipped]()
    wanted = sources_first(selected, model)
    places = Places(model)
    choice = choose_sizes(model, wanted, places, target_size, skip=on_unfit == "skip")
    settings = settings._replace(concerned=concerns.note)
    losses: dict[str, list[str]] = {}
    for number, each in enumerate(wanted):
        why = choice.unfit.get(number) or _tie(each, places, settings, losses)
        if why is not None:
            skipped.append(each.skipped(why))
    if skipped and on_unfit == "error":
        count = f"{len(skipped)} of {len(wanted)} ties"
        raise SeveralTiesError(
            "the model",
            f"{count} cannot be made, and nothing was changed:",
            remedy,
            [(left.place, left.why) for left in skipped],
        )
    rows = tie_rows(model)
    made = {(each.path, each.tensor_name) for each in wanted}
    made -= {(left.layer, left.tensor_name) for left in skipped}
    report = TieReport(
        tuple(row for row in rows if (row.layer, row.tensor_name) in made),
        totals_of(model, rows, list(settings.optimizers)),
        (*absent, *skipped),
        dry_run,
        choice.curve,
    )
    concerns.tell(len(made), dry_run=dry_run)
    for loss, tied in losses.items():
        warn(f"tying {some_of(tied)}: {loss}.")
    return report


def _tie(
    each: Selected, places: Places, settings: Settings, losses: dict[str, list[str]]
) -> Reason | None:
    """Tie it and note what optimizers lose, or return why that cannot be."""
    target = Target.among(places, each.layer, each.tensor_name)
    own: list[str] = []
    try:
        tie_one(target, each.rule, settings._replace(init=each.init, lost=own.append))
    except TieError as error:
        return error.reason
    for loss in own:
        losses.setdefault(loss, []).append(f"{target.describe()} by '{each.rule}'")
    return None


class _PutBack(Exception):  # noqa: N818
    """Ends a dry run."""


@never_compiled
def untie_model(model: Model, *, optimizer: Optimizer | Iterable[Optimizer] | None = None) -> Model:
    """Make every tied tensor of a model a plain Parameter again. All or nothing.

    Args:
        model: the model; without ties nothing happens.
        optimizer: the optimizer or optimizers that hold the free values; they are moved to
            the dense parameters, as by `remove_tie`.

    Returns:
        The model itself.

    Raises:
        TieError: listing all reasons, if something cannot be untied. Nothing was changed then.

    Example:
        >>> model = nn.Sequential(tp.register_tie(nn.Linear(4, 4), "flip_sym"))
        >>> tp.is_tied(tp.untie_model(model)), [name for name, _ in model.named_parameters()]
        (False, ['0.weight', '0.bias'])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"untie_model takes an nn.Module, not {type(model).__name__}")
    optimizers = as_optimizers(optimizer)
    ties = [(path, tie) for path, layer in model.named_modules() for tie in ties_in(layer)]
    # even if others have taken their places in the model
    outside = [source for _, tie in ties for source, _ in tie.rule.sources()]
    problems = []
    with rolled_back_on_error([*model.modules(), *outside], optimizers):
        # copies first: an untied copy joins the group of its source's free values
        for path, tie in sorted(ties, key=lambda found: not found[1].rule.reads_layers):
            try:
                remove_tie(tie.layer, tie.tensor_name, optimizer=optimizers)
            except TieError as error:
                problems.append((f"'{key_of(path, tie.tensor_name)}'", error.reason))
        if problems:
            fact = "cannot untie the model; nothing was changed:"
            raise SeveralTiesError("the model", fact, "", problems)
    return model
