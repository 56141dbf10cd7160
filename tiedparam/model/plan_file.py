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
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tiedparam.formats.atomic import whole_files
from tiedparam.formats.strict_json import read_json
from tiedparam.laws.functions import Functions, as_functions, function_name, with_functions
from tiedparam.laws.registry import find_rule
from tiedparam.laws.rule import Rule
from tiedparam.layer.checks import check_init
from tiedparam.model.plan import OWN_OPTIONS, Plan, PlanEntry, PlanMapping
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


def _is_default(kind: type[Rule], option: str) -> bool:
    parameter = inspect.signature(kind).parameters.get(option)
    return parameter is not None and parameter.default is None


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
    if isinstance(entry.rule, str):
        table["rule"] = entry.rule
    elif entry.rule.name and find_rule(entry.rule.name) is entry.rule:
        table["rule"] = entry.rule.name
    else:
        raise refuse(f"the rule {entry.rule.__name__} is not registered.", "Use register_rule.")
    if entry.tensor_name != "weight":
        table["tensor_name"] = entry.tensor_name
    if entry.init is not None:
        table["init"] = entry.init
    kind = entry.rule_class()
    options = {
        key: _option_to_data(key, value, key in kind.functions, refuse)
        for key, value in entry.options.items()
        if value is not None or not _is_default(kind, key)
    }
    if options:
        table["options"] = options
    return table


_USE_A_GLOB = "Use a glob over module names."


def _option_to_data(
    key: str, value: Any, is_function: bool, refuse: Callable[[str, str], TieError]
) -> Any:
    if value is None:
        raise refuse(
            f"{key}=None is not its default, and neither format holds a None.", "Leave it out."
        )
    if isinstance(value, nn.Module):
        raise refuse(f"{key}= is a module.", "Give its path in the model.")
    if is_function and not isinstance(value, str):
        try:
            value = function_name(value)
        except TieError as error:
            raise refuse(error.fact, error.remedy) from error
    if not _is_plain(value):
        # repr refuses whole numbers of thousands of digits
        shown = repr(value) if isinstance(value, (float, str)) else type(value).__name__
        raise refuse(
            f"{key}={shown} cannot be written.",
            "Files hold strings, finite numbers, truth values and lists of these.",
        )
    return list(value) if isinstance(value, tuple) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) and not isinstance(item, (list, tuple)) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    return isinstance(value, int) and -(2**63) <= value < 2**63  # what TOML promises to hold


_KEYS = ("layers", "type", "rule", "tensor_name", "init", "options")


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
    _refuse_unknown(data, ("tie", "layer"), where)
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
    _refuse_unknown(table, _KEYS, where)
    for key in ("layers", "type", "rule", "tensor_name", "init"):
        if key in table and not isinstance(table[key], str):
            raise TieError(where, f"{key} must be a string, not {table[key]!r}.", "")
    if ("layers" in table) == ("type" in table):
        raise TieError(
            where, f"{where} needs layers= (a glob) or type= (a layer type), one of the two.", ""
        )
    if "rule" not in table:
        raise TieError(where, f"{where} names no rule.", 'Add rule = "...".')
    options = table.get("options", {})
    if not isinstance(options, dict):
        raise TieError(where, f"options must be a table, not {options!r}.", "")
    try:
        rule = find_rule(table["rule"])
        options = with_functions(options, rule.functions, functions)
    except TieError as error:
        raise within(where, error) from error
    _refuse_options(rule, options, where)
    try:
        check_init(table.get("init", "project"))
    except TieError as error:
        raise within(where, error) from error
    return PlanEntry(
        table["layers"] if "layers" in table else _layer_type(table["type"], where),
        rule.name,
        options,
        table.get("tensor_name", "weight"),
        table.get("init"),
    )


def _refuse_options(rule: type[Rule], options: Mapping[str, Any], where: str) -> None:
    for key in OWN_OPTIONS:
        if key in options:
            raise TieError(where, f"{key} is not an option of a rule.", "Write it beside rule =.")
    for key, value in options.items():
        several = isinstance(value, list) and isinstance(options.get("source"), list)
        if key == "source_name" and not (several or isinstance(value, str | None)):
            raise TieError(where, f"source_name must be a string, not {value!r}.", "")
        if key not in rule.functions and value is not None and not _is_plain(value):
            kinds = "a string, a finite number, a truth value or a list of them"
            raise TieError(where, f"{key} must be {kinds}, not a {type(value).__name__}.", "")
    signature = inspect.signature(rule)
    where = f"{where}: options of '{rule.name}'"
    _refuse_unknown(options, signature.parameters, where)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise TieError(where, f"{error}.", "") from error


def _layer_type(name: str, where: str) -> type[nn.Module]:
    known = {
        key: value
        for key, value in vars(nn).items()
        if isinstance(value, type) and issubclass(value, nn.Module)
    }
    if name not in known:
        raise TieError(where, f"torch.nn has no layer type '{name}'.", nearest(name, known))
    return known[name]


def _refuse_unknown(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = list(known)
    for key in table:
        if key not in known:
            names = ", ".join(f"'{name}'" for name in known)
            listed = f"Known are {names}." if known else "There are none."
            raise TieError(where, f"the key '{key}' is unknown.", nearest(key, known) or listed)


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
