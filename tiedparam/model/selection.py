"""What a plan selects in a model, or why it selects nothing; and what must be tied first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from tiedparam.laws.registry import make_rule
from tiedparam.laws.rule import Rule
from tiedparam.layer.checks import Init, check_init
from tiedparam.layer.host import stock_class
from tiedparam.model.plan import Plan, PlanEntry
from tiedparam.model.reasons import SeveralTiesError, Skipped
from tiedparam.tie.binding import find_sources
from tiedparam.tie.target import Target
from tiedparam.util.errors import Reason, nearest, quoted
from tiedparam.util.torch_private import parameters_of


@dataclass
class Selected:
    """One tensor, and the entry of the plan that won it."""

    path: str
    layer: nn.Module
    entry: PlanEntry
    rule: Rule
    init: Init

    @property
    def stored_bytes(self) -> int:
        """What the tensor takes now; 0 if it is no Parameter of the layer."""
        parameter = parameters_of(self.layer).get(self.entry.tensor_name)
        return 0 if parameter is None or is_lazy(parameter) else parameter.nbytes

    def skipped(self, why: Reason) -> Skipped:
        """The tensor left as it is."""
        return Skipped(self.path, self.entry.tensor_name, why, str(self.rule))


def select(
    model: nn.Module, plan: Plan, default_init: Init, *, skip: bool
) -> tuple[list[Selected], list[Skipped]]:
    """The ties that a plan asks for, in the model's order; and the entries that select nothing.

    Raises:
        TieError: if an entry names an unknown rule or init; or if one selects no tensor at all,
            unless that is to be skipped. A glob that no module's name fits is misspelt, even so.
    """
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, (parametrize.ParametrizationList, Rule)):
            names.setdefault(module, []).append(path)
    inits = [_checked(entry, default_init) for entry in plan.entries]
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
                rule, init = make_rule(entry.rule, entry.options), inits[number]
                if rule.reads_layers and init == "rescale":
                    init = "project"
                ties.append(Selected(paths[0], module, entry, rule, init))
    absent, problems = list[Skipped](), []
    for entry, found, left_out in zip(plan.entries, selects, without, strict=True):
        if found:
            continue
        reason = _why_nothing(entry, names, left_out)
        if skip and (left_out or not isinstance(entry.pattern, str)):
            rule = make_rule(entry.rule, entry.options)
            pattern = entry.pattern_text().strip("'")
            absent.append(Skipped(pattern, entry.tensor_name, reason, str(rule)))
        else:
            problems.append(("", reason))
    if problems:
        raise SeveralTiesError("the plan", "", "", problems)
    return ties, absent


def _checked(entry: PlanEntry, default_init: Init) -> Init:
    make_rule(entry.rule, entry.options)
    init = entry.init if entry.init is not None else default_init
    check_init(init)
    return init


def _has(module: nn.Module, tensor_name: str) -> bool:
    """Whether the module has such a tensor of its own, tied or not."""
    stored = parameters_of(module).get(tensor_name)
    return stored is not None or parametrize.is_parametrized(module, tensor_name)


def _why_nothing(
    entry: PlanEntry, names: Mapping[nn.Module, list[str]], without: list[str]
) -> Reason:
    what = f"the pattern {entry.pattern_text()} selects nothing:"
    if without:
        shown = ", ".join(f"'{path}'" for path in without[:3])
        more = f" and {len(without) - 3} more" if len(without) > 3 else ""
        return Reason(
            f"{what} {shown}{more} has no Parameter '{entry.tensor_name}' of its own.",
            "Name the layers that hold it.",
        )
    holders = [
        (path, module)
        for module, paths in names.items()
        for path in paths
        if _has(module, entry.tensor_name)
    ]
    if isinstance(entry.pattern, str):
        known = [path for path, _ in holders]
        return Reason(f"{what} no module has such a name.", _choice(entry.pattern, known))
    if isinstance(entry.pattern, type):
        known = sorted({stock_class(module).__name__ for _, module in holders})
        return Reason(
            f"{what} the model has no such layer.", _choice(entry.pattern.__name__, known)
        )
    return Reason(f"{what} it is false for every module.")


def _choice(name: str, known: list[str]) -> str:
    """What to write instead of ``name``."""
    shown = ", ".join(map(quoted, known[:5]))
    listed = f"The model has {shown}{', …' if len(known) > 5 else ''}." if known else ""
    return nearest(name, known) or listed


# Sources first ---------------------------------------------------------------------------------


def sources_first(ties: list[Selected], model: nn.Module) -> list[Selected]:
    """The same ties, every copy behind the tie of its source, so that it is compared with
    what its source will hold.
    """
    by_tensor = {(tie.layer, tie.entry.tensor_name): tie for tie in ties}
    ordered: dict[int, Selected] = {}
    entered: set[int] = set()

    def visit(tie: Selected) -> None:
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
    tie: Selected, by_tensor: Mapping[tuple[nn.Module, str], Selected], model: nn.Module
) -> Iterator[Selected]:
    # a source that is not found is for register_tie to tell
    target = Target(tie.layer, tie.entry.tensor_name, model)
    if tie.rule.reads_layers and find_sources(tie.rule, target) is None:
        for place in tie.rule.sources():
            if place in by_tensor:
                yield by_tensor[place]
