"""Plans: which layers of a model are tied, by which rule.

A plan is a list of entries, and the first that fits a tensor wins. `plan_file` writes and reads it.
What a pattern matched may name the source, see `captures`.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from torch import nn

from tiedparam.laws.registry import is_pair, rule_class
from tiedparam.laws.rule import Rule
from tiedparam.layer.checks import Init
from tiedparam.layer.rule_options import KnownName
from tiedparam.model.captures import sources_for, takes_captures
from tiedparam.util.errors import TieError

Predicate = Callable[[str, nn.Module], bool]
Pattern = str | type[nn.Module] | Predicate
RuleName = KnownName | str | type[Rule]  # the known ones, so that editors complete them
Member = RuleName | tuple[RuleName, Mapping[str, Any]]
"""One law of a list."""
Value = Member | tuple[list[Any], Mapping[str, Any]]
""": a law, or laws that hold together."""
PlanMapping = Mapping[Any, Value | list[Value] | list[str]]
"""From a `Pattern` to what is tied there. Not typed as such: the keys of a mapping are invariant,
so that type checkers would refuse ``plan = {"conv": "flip_sym"}``, whose keys are strings alone."""

OWN_OPTIONS = ("tensor_name", "init", "exclude")
"""What may stand among a value's options and belongs to the entry, not to the rule."""
EVERY_TENSOR = "*"
"""The tensor name of an entry that ties blocks."""


@dataclass(frozen=True)
class PlanEntry:
    """One line of a plan.

    Attributes:
        pattern: a glob over module names (``fnmatch``, so ``*`` also matches dots), a layer
            type, or a function of (name, module).
        rule: a registered name or a `Rule` subclass; or a list of these and of pairs of one and
            its options, which hold together.
        options: the rule's options; a source is given as its path in the model, or a module. What
            the wildcards of a glob matched goes over to those of the path.
        tensor_name: which tensor of the layers, or a glob over them. By default the weight; every
            tensor, where the path of a source has wildcards.
        init: as in `register_tie`; None takes that of `tie_model`.
        exclude: globs over names of modules and of tensors (``"*norm*"``, ``"*.bias"``) that are
            left out, with all that such a module holds; one alone may be a string.

    Example:
        >>> entry = tp.PlanEntry("layer*.conv2", "channel_shared", {"over": "out"})
        >>> conv = nn.Conv2d(2, 2, 3)
        >>> entry.matches("layer1.0.conv2", conv), entry.matches("layer1.0.conv1", conv)
        (True, False)
    """

    pattern: Pattern
    rule: RuleName | list[Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    tensor_name: str = ""
    init: Init | None = None
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.pattern, (str, type)) or callable(self.pattern)):
            raise TypeError(
                "a pattern is a glob over module names, a layer type or a function of "
                f"(name, module), not {self.pattern!r}"
            )
        if isinstance(self.pattern, type) and not issubclass(self.pattern, nn.Module):
            raise TypeError(f"the pattern {self.pattern.__name__} is not a layer type")
        _refuse_unnamed(self.rule)
        if not isinstance(self.options, Mapping):
            raise TypeError(f"options are a mapping of names to values, not {self.options!r}")
        object.__setattr__(self, "tensor_name", self.tensor_name or self.usual_tensor_name)
        object.__setattr__(self, "exclude", as_globs(self.exclude))

    @cached_property
    def captures(self) -> bool:
        """Whether the source is named by what the pattern matches."""
        return takes_captures(self.pattern, self.options.get("source"))

    @property
    def usual_tensor_name(self) -> str:
        """The tensor name where none is given."""
        return EVERY_TENSOR if self.captures else "weight"

    def options_for(self, name: str) -> Mapping[str, Any]:
        """The options for what the pattern has matched as ``name``."""
        if not (self.captures and isinstance(self.pattern, str)):
            return self.options
        source = sources_for(self.pattern, name, self.options["source"])
        return {**self.options, "source": source}

    def matches(self, name: str, module: nn.Module) -> bool:
        """Whether the pattern selects this module.

        Raises:
            TieError: if the pattern is a function and raises.
        """
        if isinstance(self.pattern, str):
            return _glob(self.pattern).fullmatch(name) is not None
        if isinstance(self.pattern, type):
            return isinstance(module, self.pattern)
        try:
            return bool(self.pattern(name, module))
        except Exception as error:  # the user's own function
            text = self.pattern_text()
            raise TieError(
                f"the pattern {text}",
                f"the pattern {text} raised {type(error).__name__} for '{name}': {error}.",
                "Correct it.",
            ) from error

    def rule_class(self) -> type[Rule]:
        """The class of the rule, or of what holds several laws together.

        Raises:
            TieError: if there is none of that name.
        """
        return rule_class(self.rule)

    def source_layers(self) -> list[nn.Module]:
        """The sources that are given as layers, and not as paths."""
        given = self.options.get("source")
        several = given if isinstance(given, (list, tuple)) else [given]
        return [source for source in several if isinstance(source, nn.Module)]

    def pattern_text(self) -> str:
        """The pattern as messages show it."""
        if isinstance(self.pattern, str):
            return f"'{self.pattern}'"
        return getattr(self.pattern, "__name__", None) or repr(self.pattern)


@dataclass(frozen=True)
class Plan:
    """Entries in order; for every tensor the first that fits wins.

    Example:
        >>> plan = tp.Plan.of({"layer*": "flip_sym", nn.Linear: ("row_repeat", {"groups": 2})})
        >>> [(entry.pattern_text(), entry.rule) for entry in plan.entries]
        [("'layer*'", 'flip_sym'), ('Linear', 'row_repeat')]
    """

    entries: tuple[PlanEntry, ...]

    @classmethod
    def of(cls, plan: Plan | PlanMapping) -> Plan:
        """A plan from ``{pattern: value}``.

        A value is a rule's name or class, a pair of that and its options, or a list of such
        values. Those of a list that name the same tensor hold together; others tie another tensor
        of the layer. Among the options, ``tensor_name`` and ``init`` are `register_tie`'s, and so
        are ``rows`` and ``columns``; ``exclude`` is the entry's.

        Raises:
            TypeError: for anything else.
        """
        if isinstance(plan, Plan):
            return plan
        if not isinstance(plan, Mapping):
            hint = ""
            if isinstance(plan, (str, os.PathLike)):
                hint = ". Use read_plan(path)"
            elif callable(getattr(plan, "plan", None)):  # what scan returned
                hint = ". Use its plan()"
            raise TypeError(
                "a plan is a mapping of patterns to rules, such as {'layer*': 'flip_sym'}, or a "
                "Plan, not "
                f"{type(plan).__name__}{hint}"
            )
        return cls(
            tuple(
                entry
                for pattern, values in plan.items()
                for entry in _entries(pattern, values if isinstance(values, list) else [values])
            )
        )


def _entries(pattern: Pattern, values: list[Any]) -> Iterator[PlanEntry]:
    """One for each tensor that the values name."""
    by_tensor: dict[str, list[PlanEntry]] = {}
    for value in values:
        rule, options = value if isinstance(value, tuple) and len(value) == 2 else (value, {})
        if not isinstance(options, Mapping):
            raise TypeError(f"options are a mapping of names to values, not {options!r}")
        own = {key: options[key] for key in OWN_OPTIONS if key in options}
        rest = {key: option for key, option in options.items() if key not in own}
        entry = PlanEntry(pattern, rule, rest, **own)
        by_tensor.setdefault(entry.tensor_name, []).append(entry)
    for entries in by_tensor.values():
        yield entries[0] if len(entries) == 1 else _together(entries)


def _together(entries: list[PlanEntry]) -> PlanEntry:
    """The entry by which the laws of all these hold, which are for one tensor."""
    pattern, tensor_name = entries[0].pattern, entries[0].tensor_name
    inits = {entry.init: None for entry in entries if entry.init is not None}
    if len(inits) > 1:
        listed = " and ".join(f"'{init}'" for init in inits)
        raise TypeError(
            f"the laws of '{tensor_name}' hold together and have one init, not {listed}"
        )
    laws = [(entry.rule, entry.options) if entry.options else entry.rule for entry in entries]
    excluded = {entry.exclude: None for entry in entries if entry.exclude}
    if len(excluded) > 1:
        raise TypeError(f"the laws of '{tensor_name}' hold together and have one exclude")
    return PlanEntry(
        pattern, laws, {}, tensor_name, next(iter(inits), None), next(iter(excluded), ())
    )


def _refuse_unnamed(rule: Any) -> None:
    """Raise for what is not a rule by name or class, nor a list of such."""
    laws = rule if isinstance(rule, list) and rule else [rule]
    for law in laws:
        if is_pair(law):
            _refuse_unnamed(law[0])
        elif law is not rule:
            _refuse_unnamed(law)
        elif not (isinstance(law, str) or (isinstance(law, type) and issubclass(law, Rule))):
            raise TypeError(
                f"a plan names a rule or a Rule subclass, not {law!r}. Options stand "
                "beside it, such as {'layer*': ('row_repeat', {'groups': 2})}"
            )


def as_globs(given: object) -> tuple[str, ...]:
    """The globs of ``exclude=``: one, or several.

    Raises:
        TypeError: for anything else.
    """
    globs = (given,) if isinstance(given, str) else given
    if isinstance(globs, (list, tuple)) and all(isinstance(each, str) for each in globs):
        return tuple(globs)
    raise TypeError(f"exclude= takes globs over names, such as ['*norm*', '*.bias'], not {given!r}")


def is_left_out(name: str, exclude: Sequence[str]) -> bool:
    """Whether these globs leave out a tensor of this name, or a module that holds it."""
    parts = name.split(".")
    holders = [".".join(parts[: end + 1]) for end in range(len(parts))] if exclude else []
    return any(_glob(each).fullmatch(holder) for each in exclude for holder in holders)


@lru_cache(maxsize=512)
def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(pattern))
