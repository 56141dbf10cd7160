"""Which rules a scan tries, and with which options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiedparam.laws.layout import Layout
from tiedparam.laws.registry import available_rules, make_rule, signature_of
from tiedparam.laws.rule import Rule
from tiedparam.model.plan import PlanEntry, Value
from tiedparam.util.errors import Reason, TieError


@dataclass(frozen=True)
class Choice:
    """A rule to try, with its options, or with all of its variants.

    Attributes:
        rule: its class.
        options: those that were given; None if none were.
        law: the rule as it was given, or the laws that hold together.
        named: whether somebody asked for it, and should hear why it fits nothing.
        bare: whether it can do without options.
    """

    rule: type[Rule]
    options: Mapping[str, Any] | None
    law: Any
    named: bool = True
    bare: bool = False

    def make(self, options: Mapping[str, Any]) -> Rule:
        """The rule with these options."""
        return make_rule(self.law, options)

    def variants(self, layout: Layout) -> Sequence[Mapping[str, Any]]:
        """The options to try on a tensor; a rule that suggests none may do without."""
        if self.options is not None:
            return [self.options]
        return self.rule.variants(layout) or ([{}] if self.bare else [])

    def why_no_options(self) -> Reason:
        """Why the rule was tried on no tensor, although it was named."""
        parameters = signature_of(self.rule).parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty] or ["…"]
        options = ", ".join(f"{option!r}: …" for option in needed)
        return Reason(
            f"'{self._name}' suggests no options to try on a tensor of this model.",
            f"If you know them, pass a pair: ({self._name!r}, {{{options}}}).",
        )

    def why_no_source(self) -> Reason:
        """Why a rule that copies was compared with no tensor, although it was named."""
        return Reason(
            f"'{self._name}' fits no tensor of the model: no other one gives its shape.",
            "Pass a pair with a function that gives it, such as ('copy', {'fn': torch.t}).",
        )

    @property
    def _name(self) -> str:
        return self.rule.name or self.rule.__name__


def chosen_rules(rules: Iterable[Value | list[Any]] | None) -> list[Choice]:
    """What `scan` was asked to try; all rules if it was not.

    Raises:
        TieError: if a rule is unknown, or a source was given.
        TypeError: for arguments of a wrong type, and unknown options.
    """
    if rules is None:
        return [Choice(rule, None, rule, named=False) for rule in available_rules().values()]
    if isinstance(rules, (str, type)):
        raise TypeError("rules= takes a list of rules, such as ['flip_sym']")
    chosen = []
    for item in rules:
        rule, options = item if isinstance(item, tuple) else (item, None)
        if isinstance(rule, list):
            options = options or {}
        kind = PlanEntry("*", rule, options or {}).rule_class()
        if options is not None and not kind.reads_layers:
            make_rule(rule, options)  # raises for unknown options, before any work
        given = {"source", "source_name"} & set(options or ())
        if kind.reads_layers and given:
            name, named = kind.name or kind.__name__, " and ".join(f"{n}=" for n in sorted(given))
            raise TieError(
                f"'{name}'",
                f"scan looks for the sources of '{name}' itself.",
                f"Leave out {named}, or call residual for one.",
            )
        chosen.append(Choice(kind, options, rule, bare=options is None and _is_bare(rule)))
    return chosen


def _is_bare(rule: Any) -> bool:
    try:
        make_rule(rule, {})
    except (TypeError, TieError):
        return False
    return True
