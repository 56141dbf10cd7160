"""Tying and untying whole models: by a plan, and all or nothing.

`tie_model` is many `register_tie`, each of which checks everything before it touches its
layer. The first pass finds what each entry of the plan selects. Then one tie after another is
made under a note of how everything was; whatever cannot be tied is collected, and if there is
anything, all of it is put back, to the object, before the one error is raised.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from tiedparam.laws.linked import Linked
from tiedparam.laws.registry import make_rule
from tiedparam.laws.rule import Rule
from tiedparam.layer.checks import INITS
from tiedparam.layer.concerns import Concerns, check_max_residual
from tiedparam.layer.register import remove_tie, tie_one
from tiedparam.model.plan import Pattern, Plan, PlanEntry, Value
from tiedparam.model.report import Skipped, TieReport, tie_rows, totals_of
from tiedparam.state.optimizer_moves import as_optimizers
from tiedparam.tie.binding import find_sources
from tiedparam.tie.lookup import ties_of
from tiedparam.tie.parameter_paths import Places
from tiedparam.tie.rollback import rolled_back_on_error
from tiedparam.util.errors import TieError, some_of
from tiedparam.util.torch_private import never_compiled

Model = TypeVar("Model", bound=nn.Module)

_ON_UNFIT = ("error", "skip")


@never_compiled
def tie_model(
    model: nn.Module,
    plan: Plan | Mapping[Pattern, Value | list[Value]],
    *,
    init: str = "project",
    max_residual: float | None = None,
    cache: bool = False,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    dry_run: bool = False,
    on_unfit: str = "error",
) -> TieReport:
    """Tie the tensors of a model that a plan selects. All or nothing.

    Args:
        model: the model.
        plan: ``{pattern: rule}`` or a `Plan`. A pattern is a glob over module names
            (``"layer*.conv2"``; ``*`` also matches dots), a layer type, or a function of
            (name, module). A rule is a name, a `Rule` subclass, a pair of one and its options,
            or a list of these. Among the options ``tensor_name`` and ``init`` may stand, which
            go to `register_tie`; a ``source=`` may be given as its path in the model. The first
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

    Returns:
        The report: what was tied, what was skipped, and what that saves.

    Raises:
        TieError: if an entry selects nothing (with the nearest names), or, listing all
            reasons, if something does not fit. Nothing was changed then.
        TypeError: for arguments of a wrong type and options that a rule does not have.

    Warns:
        TieWarning: one for all ties that free nothing, or keep next to nothing of their weight, as
            `register_tie` warns of each.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"tie_model takes an nn.Module, not {type(model).__name__}")
    if on_unfit not in _ON_UNFIT:
        raise TieError(f"on_unfit={on_unfit!r} is unknown. Choose 'error' or 'skip'.")
    check_max_residual(max_residual)
    plan = Plan.of(plan)
    optimizers = as_optimizers(optimizer)
    skipped, concerns = list[Skipped](), Concerns()
    given = [entry.options.get("source") for entry in plan.entries]
    outside = [source for source in given if isinstance(source, nn.Module)]
    try:
        with rolled_back_on_error([*model.modules(), *outside], optimizers):
            # in here, since a pattern may be a function of the user's, which may do anything
            selected, absent = _select(model, plan, init, skip=on_unfit == "skip")
            wanted = _sources_first(selected, model)
            places = Places(model)
            for each in wanted:
                reason = each.make(places, optimizers, cache, max_residual, concerns)
                if reason is not None:
                    name = each.entry.tensor_name
                    skipped.append(Skipped(each.path, name, str(each.rule), reason))
            if skipped and on_unfit == "error":
                raise TieError(_all_reasons(skipped, len(wanted)))
            rows = tie_rows(model)
            made = {(each.path, each.entry.tensor_name) for each in wanted}
            made -= {(left.layer, left.tensor_name) for left in skipped}
            report = TieReport(
                tuple(row for row in rows if (row.layer, row.tensor_name) in made),
                totals_of(model, rows, optimizers),
                (*absent, *skipped),
                dry_run,
            )
            concerns.tell(len(made), dry_run=dry_run)
            if dry_run:
                raise _PutBack
    except _PutBack:
        pass
    return report


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
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"untie_model takes an nn.Module, not {type(model).__name__}")
    optimizers = as_optimizers(optimizer)
    ties = [
        (layer, name, rule) for layer in model.modules() for name, rule in ties_of(layer).items()
    ]
    outside = [source for *_, rule in ties for source in _sources(rule)]
    problems = []
    with rolled_back_on_error([*model.modules(), *outside], optimizers):
        # copies first: an untied copy joins the group of its source's free values
        for layer, name, _ in sorted(ties, key=lambda tie: not isinstance(tie[2], Linked)):
            try:
                remove_tie(layer, name, optimizer=optimizers)
            except TieError as error:
                problems.append(str(error))
        if problems:
            listed = some_of(problems, "\n")
            raise TieError(f"cannot untie the model; nothing was changed:\n{listed}")
    return model


def _sources(rule: Rule) -> Iterator[nn.Module]:
    """The layers that a rule reads, even if others have taken their places in the model."""
    if isinstance(rule, Linked):
        for source, _ in rule.sources():
            yield source


# What a plan selects -----------------------------------------------------------------------


@dataclass
class _Tie:
    """One tensor, and the entry of the plan that won it."""

    path: str
    layer: nn.Module
    entry: PlanEntry
    rule: Rule
    init: str

    def make(
        self,
        places: Places,
        optimizers: list[Optimizer],
        cache: bool,
        max_residual: float | None,
        concerns: Concerns,
    ) -> str | None:
        """Tie it, or return why that cannot be."""
        try:
            tie_one(
                self.layer,
                self.rule,
                self.entry.tensor_name,
                places,
                init=self.init,
                max_residual=max_residual,
                cache=cache,
                optimizer=optimizers,
                concerned=concerns.note,
            )
        except TieError as error:
            return str(error.reason)
        return None


def _select(
    model: nn.Module, plan: Plan, default_init: str, *, skip: bool
) -> tuple[list[_Tie], list[Skipped]]:
    """The ties that a plan asks for, in the model's order; and the entries that select nothing.

    Raises:
        TieError: if an entry names an unknown rule or init; or if one selects no tensor at all,
            unless that is to be skipped. A glob that no module's name fits is misspelt, even so.
    """
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, (parametrize.ParametrizationList, Rule)):
            names.setdefault(module, []).append(path)
    rules = [_checked(entry, default_init) for entry in plan.entries]
    selects = [False] * len(plan.entries)
    without: list[list[str]] = [[] for _ in plan.entries]
    ties = []
    for module, paths in names.items():
        taken: set[str] = set()
        for number, entry in enumerate(plan.entries):
            if not any(entry.matches(path, module) for path in paths):
                continue
            if not _has(module, entry.tensor_name):
                without[number].append(paths[0])
                continue
            selects[number] = True
            if entry.tensor_name not in taken:
                taken.add(entry.tensor_name)
                kind, init = rules[number]
                rule = make_rule(kind, dict(entry.options))
                if isinstance(rule, Linked) and init == "rescale":
                    init = "project"
                ties.append(_Tie(paths[0], module, entry, rule, init))
    absent, problems = list[Skipped](), []
    for entry, rule_and_init, found, left_out in zip(
        plan.entries, rules, selects, without, strict=True
    ):
        if found:
            continue
        reason = _why_nothing(entry, names, left_out)
        if skip and (left_out or not isinstance(entry.pattern, str)):
            rule = make_rule(rule_and_init[0], dict(entry.options))
            pattern = entry.pattern_text().strip("'")
            absent.append(Skipped(pattern, entry.tensor_name, str(rule), reason))
        else:
            problems.append(reason)
    if problems:
        raise TieError(some_of(problems, "\n"))
    return ties, absent


def _checked(entry: PlanEntry, default_init: str) -> tuple[type[Rule], str]:
    kind = entry.rule_class()
    make_rule(kind, dict(entry.options))
    init = entry.init if entry.init is not None else default_init
    if init not in INITS:
        raise TieError(f"init={init!r} is unknown. Choose one of {', '.join(map(repr, INITS))}.")
    return kind, init


def _has(module: nn.Module, tensor_name: str) -> bool:
    """Whether the module has such a tensor of its own, tied or not."""
    return module._parameters.get(tensor_name) is not None or parametrize.is_parametrized(
        module, tensor_name
    )


def _why_nothing(entry: PlanEntry, names: Mapping[nn.Module, list[str]], without: list[str]) -> str:
    what = f"the pattern {entry.pattern_text()} selects nothing: "
    if without:
        shown = ", ".join(f"'{path}'" for path in without[:3])
        more = f" and {len(without) - 3} more" if len(without) > 3 else ""
        return (
            f"{what}{shown}{more} has no Parameter '{entry.tensor_name}' of its own. "
            "Name the layers that hold it."
        )
    holders = [
        (path, module)
        for module, paths in names.items()
        for path in paths
        if _has(module, entry.tensor_name)
    ]
    if isinstance(entry.pattern, str):
        return (
            f"{what}no module has such a name. {_nearest(entry.pattern, [p for p, _ in holders])}"
        )
    if isinstance(entry.pattern, type):
        kinds = sorted({type(module).__name__.removeprefix("Tied") for _, module in holders})
        return f"{what}the model has no such layer. {_nearest(entry.pattern.__name__, kinds)}"
    return f"{what}it is false for every module."


def _nearest(pattern: str, paths: list[str]) -> str:
    near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.5)
    if near:
        return "Did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
    shown = ", ".join(f"'{name}'" for name in paths[:5])
    return f"The model has {shown}{', …' if len(paths) > 5 else ''}." if paths else ""


def _sources_first(ties: list[_Tie], model: nn.Module) -> list[_Tie]:
    """The same ties, every copy behind the tie of its source, so that it is compared with
    what its source will hold.
    """
    by_tensor = {(tie.layer, tie.entry.tensor_name): tie for tie in ties}
    ordered: dict[int, _Tie] = {}
    entered: set[int] = set()

    def visit(tie: _Tie) -> None:
        stack = [(tie, _source_ties(tie, by_tensor, model))]
        while stack:  # chains of copies may be longer than Python's recursion
            current, sources = stack[-1]
            entered.add(id(current))
            following = next((s for s in sources if id(s) not in entered), None)
            if following is not None:
                stack.append((following, _source_ties(following, by_tensor, model)))
            else:
                ordered.setdefault(id(current), current)
                stack.pop()

    for tie in ties:
        if id(tie) not in entered:
            visit(tie)
    return list(ordered.values())


def _source_ties(
    tie: _Tie, by_tensor: Mapping[tuple[nn.Module, str], _Tie], model: nn.Module
) -> Iterator[_Tie]:
    # a source that is not found is for register_tie to tell
    name = tie.entry.tensor_name
    if tie.rule.reads_layers and find_sources(tie.rule, name, model) is None:
        for place in tie.rule.sources():
            if place in by_tensor:
                yield by_tensor[place]


def _all_reasons(skipped: list[Skipped], wanted: int) -> str:
    reasons = []
    for left in skipped:
        where = f"{left.layer}.{left.tensor_name}".removeprefix(".")
        reasons.append(f"'{where}' by '{left.rule}': {left.reason}")
    listed = some_of(reasons, "\n")
    return (
        f"{len(skipped)} of {wanted} ties cannot be made, and nothing was changed:\n{listed}\n"
        "Correct the plan, or pass on_unfit='skip' to leave these as they are."
    )
