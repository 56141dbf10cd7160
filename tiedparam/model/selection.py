"""What a plan selects in a model, or why it selects nothing; and what must be tied first."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from tiedparam.laws.registry import make_rule
from tiedparam.laws.rule import Rule
from tiedparam.layer.checks import Init, check_init
from tiedparam.layer.host import stock_class
from tiedparam.model.captures import wildcards
from tiedparam.model.plan import Plan, PlanEntry, is_left_out
from tiedparam.model.reasons import SeveralTiesError, Skipped
from tiedparam.tie.binding import find_sources
from tiedparam.tie.target import Target
from tiedparam.util.errors import Reason, TieError, key_of, nearest, quoted, some_of, warn
from tiedparam.util.parametrized import parametrization_lists
from tiedparam.util.torch_private import parameters_of


@dataclass
class Selected:
    """One tensor, and the rule that is to tie it."""

    path: str
    layer: nn.Module
    tensor_name: str
    rule: Rule
    init: Init
    again: Callable[[Mapping[str, Any]], Rule]
    """Makes the rule anew, with these options in the place of its own."""

    @property
    def stored_bytes(self) -> int:
        """What the tensor takes now; 0 if it is no Parameter of the layer."""
        parameter = parameters_of(self.layer).get(self.tensor_name)
        return 0 if parameter is None or is_lazy(parameter) else parameter.nbytes

    def skipped(self, why: Reason) -> Skipped:
        """The tensor left as it is."""
        return Skipped(self.path, self.tensor_name, why, str(self.rule))


def select(
    model: nn.Module, plan: Plan, default_init: Init, *, skip: bool
) -> tuple[list[Selected], list[Skipped]]:
    """The ties that a plan asks for, in the model's order; and the entries that select nothing.

    Raises:
        TieError: if an entry names an unknown rule or init; or if one selects no tensor at all,
            unless that is to be skipped. A glob that no module's name fits is misspelt, even so.

    Warns:
        TieWarning: if earlier entries have taken everything that an entry selects.
    """
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if is_layer(module):
            names.setdefault(module, []).append(path)
    known = {path: module for module, paths in names.items() for path in paths}
    inits = [_checked(entry, default_init, known) for entry in plan.entries]
    found = [_Found() for _ in plan.entries]
    ties = []
    for module, paths in names.items():
        held, taken = tensor_names(module), dict[str, PlanEntry]()
        for entry, init, sought in zip(plan.entries, inits, found, strict=True):
            for tensor_name, name in _fitting(entry, paths, module, held, sought):
                sought.selects = True
                if tensor_name in taken:
                    sought.taken_by.setdefault(taken[tensor_name].pattern_text())
                    continue
                taken[tensor_name], sought.wins = entry, True
                options, of_block = entry.options_for(name), entry.captures
                target = Target(module, tensor_name, model)
                make = maker(target, entry.rule, options, of_block=of_block)
                ties.append(selected(paths[0], module, tensor_name, make, init))
    absent, problems = list[Skipped](), []
    for entry, sought in zip(plan.entries, found, strict=True):
        if sought.selects:
            sought.tell(entry)
            continue
        reason = _why_nothing(entry, names, sought)
        if skip and (sought.without or not isinstance(entry.pattern, str)):
            rule = make_rule(entry.rule, entry.options)
            pattern = entry.pattern_text().strip("'")
            absent.append(Skipped(pattern, entry.tensor_name, reason, str(rule)))
        else:
            problems.append(("", reason))
    if problems:
        raise SeveralTiesError("the plan", "", "", problems)
    return ties, absent


@dataclass
class _Found:
    """What was found for one entry of a plan.

    Attributes:
        selects: whether it selects any tensor.
        wins: whether one of them is its own.
        taken_by: the patterns of the entries that were before it, elsewhere.
        without: the modules that its pattern fits, and that have no such tensor.
        left_out: whether its ``exclude=`` left out what it would have selected.
    """

    selects: bool = False
    wins: bool = False
    taken_by: dict[str, None] = field(default_factory=dict)
    without: list[str] = field(default_factory=list)
    left_out: bool = False

    def tell(self, entry: PlanEntry) -> None:
        """Warn if the entry does nothing."""
        if not self.wins:
            warn(
                f"the entry {entry.pattern_text()} of the plan does nothing: all that it selects "
                f"is taken by {some_of(list(self.taken_by))} before it.",
                "The first entry that selects a tensor wins. Put this one first, or leave it out.",
            )


def _fitting(
    entry: PlanEntry, paths: list[str], module: nn.Module, held: list[str], sought: _Found
) -> Iterator[tuple[str, str]]:
    """The tensors of a module that an entry selects, each with the name that its pattern fits."""
    path = next((path for path in paths if entry.matches(path, module)), None)
    fitting = [name for name in held if fnmatch.fnmatchcase(name, entry.tensor_name)]
    if path is not None and not fitting and not entry.captures:
        sought.without.append(paths[0])
    for tensor_name in fitting:
        keys = [key_of(each, tensor_name) for each in paths]
        # a block may hold tensors itself, and those of a layer may be meant by their own names
        by_key = (key for key in keys if entry.captures and entry.matches(key, module))
        name = path if path is not None else next(by_key, None)
        if name is None:
            continue
        if any(is_left_out(key, entry.exclude) for key in keys):
            sought.left_out = True
        elif not _is_its_own_source(entry, name, paths if name == path else keys):
            yield tensor_name, name


def _is_its_own_source(entry: PlanEntry, name: str, names: list[str]) -> bool:
    """Whether what was matched is what it is to be tied to: ``layers.*.*`` fits the first too.

    Args:
        entry: of the plan.
        name: what its pattern fits.
        names: all names of the same, in a model that holds it in several places.
    """
    if not entry.captures:
        return False
    source = entry.options_for(name)["source"]
    sources = source if isinstance(source, list) else [source]
    return any(each in sources for each in names)


def selected(
    path: str,
    layer: nn.Module,
    tensor_name: str,
    make: Callable[[Mapping[str, Any]], Rule],
    init: Init,
) -> Selected:
    """A tensor to be tied; what reads layers has no entries that share a value."""
    rule = make({})
    start: Init = "project" if rule.reads_layers and init == "rescale" else init
    return Selected(path, layer, tensor_name, rule, start, make)


def maker(
    target: Target, rule: Any, options: Mapping[str, Any], *, of_block: bool
) -> Callable[[Mapping[str, Any]], Rule]:
    """What makes the rule for a tensor; in a block, for a vector that cannot carry it, a copy."""
    if of_block and _is_for_matrices(target, rule, options):
        read = {key: options[key] for key in _WHAT_IS_READ if key in options}
        return lambda others: make_rule("copy", {**read, **others})
    return lambda others: make_rule(rule, {**options, **others})


_WHAT_IS_READ = ("source", "source_name")
_WIDE = 1 << 14


def _is_for_matrices(target: Target, rule: Any, options: Mapping[str, Any]) -> bool:
    """Whether the target is a vector, which cannot carry the rule, while a matrix could."""
    tensor = target.parameter
    if tensor is None or is_lazy(tensor) or tensor.dim() > 1:
        return False
    made = make_rule(rule, options)
    if not made.reads_layers:  # as with rows= or columns=
        return False
    # a source that is not found is for the tie to tell, and so is what is wrong for matrices, too
    if find_sources(made, target) is not None or made.reason_against(target.layout) is None:
        return False
    matrix = nn.Linear(_WIDE, _WIDE, device="meta")
    given = options["source"]
    read = [matrix] * len(given) if isinstance(given, (list, tuple)) else matrix
    made = make_rule(rule, {**options, "source": read})
    of_matrix = Target(matrix, "weight")
    return find_sources(made, of_matrix) is None and made.reason_against(of_matrix.layout) is None


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one of the model's own, and not what a tie has put there."""
    return not isinstance(module, (parametrize.ParametrizationList, Rule))


def tensor_names(module: nn.Module) -> list[str]:
    """The tensors of a module's own, tied or not."""
    stored = [name for name, value in parameters_of(module).items() if value is not None]
    if not parametrize.is_parametrized(module):
        return stored
    return [*stored, *parametrization_lists(module)]


def _checked(entry: PlanEntry, default_init: Init, known: Mapping[str, nn.Module]) -> Init:
    make_rule(entry.rule, entry.options)
    init = entry.init if entry.init is not None else default_init
    check_init(init)
    given = entry.options.get("source")
    for source in given if isinstance(given, (list, tuple)) else [given]:
        if not isinstance(source, str) or entry.captures or not wildcards(source):
            continue
        path, _, name = source.rpartition(".")
        if source not in known and not (path in known and name in tensor_names(known[path])):
            raise TieError(
                f"the entry {entry.pattern_text()} of the plan",
                f"the source '{source}' has a wildcard that the pattern has not.",
                "It stands for what the same wildcard of the pattern matched: write as many of "
                "each kind there.",
            )
    return init


def _why_nothing(entry: PlanEntry, names: Mapping[nn.Module, list[str]], sought: _Found) -> Reason:
    what = f"the pattern {entry.pattern_text()} selects nothing:"
    if sought.left_out:
        return Reason(f"{what} exclude={list(entry.exclude)} leaves out all of it.", "Correct it.")
    if sought.without:
        shown = ", ".join(f"'{path}'" for path in sought.without[:3])
        more = f" and {len(sought.without) - 3} more" if len(sought.without) > 3 else ""
        return Reason(
            f"{what} {shown}{more} has no Parameter '{entry.tensor_name}' of its own.",
            "Name the layers that hold it.",
        )
    holders = [
        (path, module)
        for module, paths in names.items()
        for path in paths
        if fnmatch.filter(tensor_names(module), entry.tensor_name)
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
    by_tensor = {(tie.layer, tie.tensor_name): tie for tie in ties}
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
    target = Target(tie.layer, tie.tensor_name, model)
    if tie.rule.reads_layers and find_sources(tie.rule, target) is None:
        for place in tie.rule.sources():
            if place in by_tensor:
                yield by_tensor[place]
