"""The rules as a table: what ``print(available_rules())`` and ``tiedparam rules`` show."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NoReturn

from tiedparam.laws.rule import Rule
from tiedparam.util.errors import Reason, nearest
from tiedparam.util.table import Column, Table, TableReport

IMPORT_ITS_MODULE = "If it is a rule of your own, import its module first."
"""What to do about a rule that is not known."""


def why_unknown(name: object, known: Iterable[str]) -> Reason:
    """That there is no such rule, and which names are near."""
    hint = nearest(name, known) or f"Known rules: {', '.join(sorted(known))}."
    return Reason(f"there is no rule '{name}'. {hint}", IMPORT_ITS_MODULE)


FAMILIES = (
    "repetition",
    "symmetries",
    "equivariance",
    "matrices",
    "zeros and fixed values",
    "patterns of your own",
    "from trained weights",
    "shared by chance",
    "laws together",
    "copies",
)
"""The headings under which the library's own rules stand, in the order of tables."""


def by_family(rules: Iterable[type[Rule]]) -> list[type[Rule]]:
    """Family by family, and within each by name; families of users come last."""
    known = {family: place for place, family in enumerate(FAMILIES)}
    return sorted(
        rules, key=lambda rule: (known.get(rule.family, len(known)), rule.family, rule.name)
    )


class RuleTable(TableReport[type[Rule]], dict[str, type[Rule]]):
    """Rules by their names: a dictionary that reads as a table, in notebooks too."""

    def table(self) -> Table[type[Rule]]:
        """One row for every rule, family by family."""
        return Table(_COLUMNS, by_family(self.values()))

    def remarks(self) -> list[Reason]:
        """None."""
        return []

    def to_data(self) -> dict[str, Any]:
        """Rows."""
        return {"kind": "rules", "rows": self.rows()}

    def __missing__(self, name: object) -> NoReturn:
        raise KeyError(str(why_unknown(name, self)))

    def __repr__(self) -> str:
        return str(self)


def _options(rule: type[Rule]) -> str:
    """What ``register_tie`` takes for it, with the defaults: ``source=, source_name=None``."""
    shown = []
    for parameter in inspect.signature(rule).parameters.values():
        if parameter.default is inspect.Parameter.empty:
            shown.append(f"{parameter.name}=")
        else:
            value = getattr(parameter.default, "__name__", repr(parameter.default))
            shown.append(f"{parameter.name}={value}")
    return ", ".join(shown)


def _meaning(rule: type[Rule]) -> str:
    """The first line of its own docstring, without marks, and without the law beside it."""
    first = inspect.cleandoc(rule.__doc__ or "").split("\n")[0].replace("``", "")
    return first.replace(f": {rule.law}", "")


_COLUMNS: list[Column[type[Rule]]] = [
    Column("family", "family", lambda rule: rule.family),
    Column("rule", "rule", lambda rule: rule.name),
    Column("law", "law", lambda rule: rule.law),
    Column("options", "options", _options),
    Column("meaning", "meaning", _meaning),
]
