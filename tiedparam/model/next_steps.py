"""What to type to tie by a plan: one line of Python. `cli.next_steps` has the shell's."""

from __future__ import annotations

from typing import Any

from tiedparam.laws.registry import law_text
from tiedparam.model.plan import Plan
from tiedparam.model.plan_file import plan_to_data
from tiedparam.model.plan_laws import laws_of
from tiedparam.util.errors import TieError

SPELLED_OUT = 3
"""Of how many ties a line may consist; more of them are named by the plan that holds them."""


def in_python(plan: Plan) -> str | None:
    """The call of `tie_model` that spells the plan out; None if it is long or has no names."""
    tables = tables_of(plan)
    if tables is None:
        return None
    values: dict[str, list[str]] = {}
    for table in tables:
        options = dict(table.get("options", {}))
        if not str(options.get("fn", "torch.")).startswith("torch."):
            return None  # a function of the user's, called otherwise there than in a file
        given = [f"{key!r}: {value!r}" for key, value in options.items() if key != "fn"]
        given += [f"'fn': {options['fn']}"] if "fn" in options else []
        own = [f"{key!r}: {table[key]!r}" for key in ("tensor_name", "init") if key in table]
        inside = ", ".join([*given, *own])
        rule = law_text(laws_of(table["rule"]))
        value = f"({rule}, {{{inside}}})" if inside else rule
        values.setdefault(table["layers"], []).append(value)
    entries = (
        f"{pattern!r}: {of[0] if len(of) == 1 else '[' + ', '.join(of) + ']'}"
        for pattern, of in values.items()
    )
    return f"tp.tie_model(model, {{{', '.join(entries)}}})"


def tables_of(plan: Plan) -> list[dict[str, Any]] | None:
    """A short plan as the tables of a file; None if it is long or has no names."""
    if not 0 < len(plan.entries) <= SPELLED_OUT:
        return None
    try:
        return [dict(table) for table in plan_to_data(plan)["tie"]]
    except TieError:  # a rule or a function that has no name in text
        return None
