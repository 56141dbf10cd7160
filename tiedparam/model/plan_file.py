"""Plans in files, TOML or JSON: written, read, and what is wrong with them.

An entry is a table of names and options; nothing in a file is executed, imported or evaluated::

    [[tie]]
    layers = "layer*.conv2"        # a glob over module names, or: type = "Conv2d"
    rule = "channel_shared"
    options = { over = "in" }

    [[tie]]
    layers = "decoder"
    rule = "copy"
    tensor_name = "weight"
    options = { source = "encoder", fn = "torch.t" }

    [[tie]]
    layers = "blocks.[1-5].*"      # every tensor of these blocks, from that of the first
    rule = "copy"
    exclude = ["*norm*"]
    options = { source = "blocks.0.*" }

    [[tie]]
    layers = "mixer"
    rule = ["flip_sym", ["repeat", { outputs = 2 }]]    # both hold
    options = { rows = [0, 64], columns = [0, 64] }     # of this part
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tiedparam.formats.atomic import whole_files
from tiedparam.formats.strict_json import read_json
from tiedparam.laws.functions import Functions, as_functions, warn_of_script
from tiedparam.layer.checks import check_init
from tiedparam.model.plan import Plan, PlanEntry, PlanMapping, as_globs
from tiedparam.model.plan_laws import (
    law_from_data,
    of_script,
    options_to_data,
    refuse_unknown,
    rule_to_data,
)
from tiedparam.util.errors import LONGEST_MESSAGE, TieError, nearest, shortened, within

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def write_plan(plan: Plan | PlanMapping, path: str | os.PathLike[str]) -> None:
    """Write a plan to a TOML or JSON file, by its suffix. An existing file is replaced.

    Args:
        plan: globs and layer types of ``torch.nn`` as patterns, registered rules, sources as
            paths, functions that a module has by their names.
        path: a name that ends in ``.toml`` or ``.json``.

    Raises:
        TieError: if the plan holds something that has no name, or the suffix is another.
            Nothing was written then.
        OSError: if the file cannot be written.

    Warns:
        TieWarning: if the file will name a law or a function of the script or the notebook that
            runs, which other programs do not have.

    Example:
        >>> from pathlib import Path
        >>> tp.write_plan({nn.Conv2d: ("channel_shared", {"over": "in"})}, "plan.toml")
        >>> print(Path("plan.toml").read_text())
        [[tie]]
        type = "Conv2d"
        rule = "channel_shared"
        options = { over = "in" }
        <BLANKLINE>
    """
    path = Path(path)
    kind = _kind(path)
    data = plan_to_data(Plan.of(plan))
    warn_of_script(
        name for entry in data["tie"] for name in of_script(entry["rule"], entry.get("options"))
    )
    text = (
        to_toml(data) if kind == "toml" else json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    )
    with whole_files() as open_file:
        open_file(path).write(text.encode())


def read_plan(path: str | os.PathLike[str], *, functions: Functions | None = None) -> Plan:
    """Read a plan from a TOML or JSON file, by its suffix. Nothing in it is executed.

    Args:
        path: the file.
        functions: the functions that its entries may name, as in a copy's ``fn``, such as
            ``{"my_module:tile": my_module.tile}``; ``torch.t`` and ``torch.square`` are known.

    Raises:
        TieError: naming the file, the entry and what is wrong: not TOML or JSON, an unknown
            key, rule, layer type or function (with the nearest known names), a wrong type.
        OSError: if the file cannot be read.

    Example:
        >>> tp.write_plan({"layer*.conv2": ("channel_shared", {"over": "in"})}, "plan.json")
        >>> (entry,) = tp.read_plan("plan.json").entries
        >>> entry.pattern, entry.rule, dict(entry.options)
        ('layer*.conv2', 'channel_shared', {'over': 'in'})
    """
    return plan_from_data(read_data(path), f"'{path}'", functions)


def read_data(path: str | os.PathLike[str]) -> Any:
    """What a TOML or JSON file holds.

    Raises:
        TieError: if it is neither.
        OSError: if it cannot be read.
    """
    path = Path(path)
    kind = _kind(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin with a mark
        if kind == "toml":
            return tomllib.loads(text)
        return read_json(text)
    except (ValueError, RecursionError) as error:  # decoding errors are ValueErrors
        reason = shortened(error, LONGEST_MESSAGE // 2)
        raise TieError(
            f"'{path}'", f"'{path}' is not {kind.upper()}: {reason}.", "Correct the file."
        ) from error


def _kind(path: Path) -> str:
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("toml", "json"):
        raise TieError(
            f"'{path}'",
            f"'{path}' has no known format.",
            "Choose a name that ends in .toml or .json.",
        )
    return kind


def plan_to_data(plan: Plan) -> dict[str, Any]:
    """The plan as tables, lists, strings, numbers and truth values.

    Raises:
        TieError: if it holds something that has no name in a file.
    """
    return {"tie": [_entry_to_data(entry) for entry in plan.entries]}


def _entry_to_data(entry: PlanEntry) -> dict[str, Any]:
    def refuse(fact: str, remedy: str) -> TieError:
        where = f"the entry {entry.pattern_text()} cannot be written to a file"
        return TieError(where, fact, remedy)

    table: dict[str, Any] = {}
    if isinstance(entry.pattern, str):
        table["layers"] = entry.pattern
    elif isinstance(entry.pattern, type):
        if getattr(nn, entry.pattern.__name__, None) is not entry.pattern:
            raise refuse("it is not a layer type of torch.nn.", _USE_A_GLOB)
        table["type"] = entry.pattern.__name__
    else:
        raise refuse("a function has no name there.", _USE_A_GLOB)
    table["rule"] = rule_to_data(entry.rule, refuse)
    if entry.tensor_name != entry.usual_tensor_name:
        table["tensor_name"] = entry.tensor_name
    if entry.init is not None:
        table["init"] = entry.init
    if entry.exclude:
        table["exclude"] = list(entry.exclude)
    options = options_to_data(entry.rule_class(), entry.options, refuse)
    if options:
        table["options"] = options
    return table


_USE_A_GLOB = "Use a glob over module names."


_KEYS = ("layers", "type", "rule", "tensor_name", "init", "exclude", "options")


def plan_from_data(data: Any, where: str, functions: Functions | None = None) -> Plan:
    """The plan that tables describe, as TOML and JSON give them.

    Args:
        data: what the file holds.
        where: how messages name the file.
        functions: the functions that its entries may name, besides those known to all files.

    Raises:
        TieError: as `read_plan`.
    """
    begin = "Begin an entry with [[tie]]."
    if not isinstance(data, dict):
        raise TieError(where, f"{where} holds no table 'tie'.", begin)
    # [[layer]] says what a checkpoint file does not show of its layers: a model does
    refuse_unknown(data, ("tie", "layer"), where)
    tables = data.get("tie")
    if not isinstance(tables, list) or not tables:
        raise TieError(where, f"{where} holds no list 'tie'.", begin)
    functions = as_functions(functions)
    return Plan(
        tuple(
            _entry_from_data(table, f"entry {number} of {where}", functions)
            for number, table in enumerate(tables, start=1)
        )
    )


def _entry_from_data(table: Any, where: str, functions: Functions) -> PlanEntry:
    if not isinstance(table, dict):
        raise TieError(where, f"{where} is not a table.", "Begin it with [[tie]].")
    refuse_unknown(table, _KEYS, where)
    for key in ("layers", "type", "tensor_name", "init"):
        if key in table and not isinstance(table[key], str):
            raise TieError(where, f"{key} must be a string, not {table[key]!r}.", "")
    if ("layers" in table) == ("type" in table):
        raise TieError(
            where, f"{where} needs layers= (a glob) or type= (a layer type), one of the two.", ""
        )
    if "rule" not in table:
        raise TieError(where, f"{where} names no rule.", 'Add rule = "...".')
    rule, options = law_from_data(table["rule"], table.get("options", {}), where, functions)
    try:
        check_init(table.get("init", "project"))
        excluded = as_globs(table.get("exclude", []))
    except TieError as error:
        raise within(where, error) from error
    except TypeError as error:
        raise TieError(where, f"{error}.", "") from error
    return PlanEntry(
        table["layers"] if "layers" in table else _layer_type(table["type"], where),
        rule,
        options,
        table.get("tensor_name", ""),
        table.get("init"),
        excluded,
    )


def _layer_type(name: str, where: str) -> type[nn.Module]:
    known = {
        key: value
        for key, value in vars(nn).items()
        if isinstance(value, type) and issubclass(value, nn.Module)
    }
    if name not in known:
        raise TieError(where, f"torch.nn has no layer type '{name}'.", nearest(name, known))
    return known[name]


# TOML --------------------------------------------------------------------------------------


def to_toml(data: Mapping[str, Any]) -> str:
    """A table of lists of tables, as `plan_to_data` makes it, in TOML 1.0."""
    lines = []
    for name, tables in data.items():
        for table in tables:
            lines.append(f"[[{_toml_key(name)}]]")
            lines += [f"{_toml_key(key)} = {_toml(value)}" for key, value in table.items()]
            lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return _toml_string(value)
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_toml_key(key)} = {_toml(item)}" for key, item in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    return f"[{', '.join(_toml(item) for item in value)}]"


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_string(key)


def _toml_string(text: str) -> str:
    # JSON's escapes are TOML's too, except that TOML wants the delete character escaped
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
