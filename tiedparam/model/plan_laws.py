"""Laws as plans in files state them: names, options, lists of laws, and parts of a tensor.

A law with options in a list is a list of two, its name and a table. ``rows`` and ``columns`` are
lists of two numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from tiedparam.laws.block import as_slice
from tiedparam.laws.functions import (
    Functions,
    function_name,
    is_made_in_script,
    is_of_script,
    with_functions,
)
from tiedparam.laws.registry import PART, find_rule, is_pair, rule_class, signature_of
from tiedparam.laws.rule import Rule
from tiedparam.model.plan import OWN_OPTIONS
from tiedparam.util.errors import TieError, nearest, within

Refuse = Callable[[str, str], TieError]
"""Makes the error of what has no name in a file."""

# Writing -------------------------------------------------------------------------------------


def rule_to_data(rule: Any, refuse: Refuse) -> Any:
    """A rule's name, or a list of laws."""
    if isinstance(rule, list):
        return [_law_to_data(law, refuse) for law in rule]
    if isinstance(rule, str):
        return rule
    if rule.name and find_rule(rule.name) is rule:
        return rule.name
    raise refuse(f"the rule {rule.__name__} is not registered.", "Use register_rule.")


def of_script(rule: Any, options: Any = None) -> Iterator[str]:
    """What the script itself defines of what a plan's data name: laws, and functions in options."""
    if isinstance(rule, list):
        for law in rule:
            yield from of_script(*law) if isinstance(law, list) else of_script(law)
    elif is_made_in_script(find_rule(rule)):
        yield f"the law '{rule}'"
    for value in (options or {}).values():
        if isinstance(value, str) and is_of_script(value):
            yield f"the function '{value}'"


def _law_to_data(law: Any, refuse: Refuse) -> Any:
    if not is_pair(law):
        return rule_to_data(law, refuse)
    options = options_to_data(rule_class(law[0]), law[1], refuse)
    name = rule_to_data(law[0], refuse)
    return [name, options] if options else name


def options_to_data(kind: type[Rule], options: Mapping[str, Any], refuse: Refuse) -> dict[str, Any]:
    """The options of a law, without those that are None by default."""
    return {
        key: _option_to_data(key, value, key in kind.functions, refuse)
        for key, value in options.items()
        if value is not None or not (key in PART or _is_default(kind, key))
    }


def _is_default(kind: type[Rule], option: str) -> bool:
    parameter = signature_of(kind).parameters.get(option)
    return parameter is not None and parameter.default is None


def _option_to_data(key: str, value: Any, is_function: bool, refuse: Refuse) -> Any:
    if isinstance(value, slice):
        return _range_to_data(key, value, refuse)
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


def _range_to_data(key: str, given: slice, refuse: Refuse) -> list[int]:
    if given.start is None:
        given = slice(0, given.stop, given.step)
    if given.stop is None or given.step not in (None, 1):
        raise refuse(f"{key}={given} is more than two numbers.", "Give where it starts and stops.")
    return [int(given.start), int(given.stop)]


# Reading -------------------------------------------------------------------------------------


def law_from_data(
    rule: Any, options: Any, where: str, functions: Functions
) -> tuple[Any, dict[str, Any]]:
    """A rule's name, or a list of laws, and its options, once they are known to be right.

    Raises:
        TieError: naming what is wrong in the entry ``where``.
    """
    if isinstance(rule, list) and rule and not is_pair(rule):
        laws = [_member(law, where, functions) for law in rule]
        own = {key: value for key, value in _table(options, where).items() if key not in PART}
        if own:
            fact = f"the options {sorted(own)} of a list of laws belong to one of them."
            raise TieError(where, fact, 'Write ["row_repeat", { groups = 2 }] in the list.')
        for key, value in options.items():
            _refuse_ranges(key, value, where)
        return laws, options
    if not isinstance(rule, str):
        raise TieError(where, f"rule must be a string or a list of laws, not {rule!r}.", "")
    try:
        kind = find_rule(rule)
        options = with_functions(_table(options, where), kind.functions, functions)
    except TieError as error:
        raise within(where, error) from error
    _refuse_options(kind, options, where)
    return kind.name, options


def _member(law: Any, where: str, functions: Functions) -> Any:
    """One law of a list."""
    rule, options = law if is_pair(law) else (law, {})
    made, options = law_from_data(rule, options, where, functions)
    return (made, options) if options else made


def laws_of(data: Any) -> Any:
    """A rule of a file with tuples for the pairs in it, as `tiedparam.tie_model` takes it."""
    if not isinstance(data, list):
        return data
    return [(law[0], law[1]) if is_pair(law) else law for law in data]


def _table(options: Any, where: str) -> dict[str, Any]:
    if not isinstance(options, dict):
        raise TieError(where, f"options must be a table, not {options!r}.", "")
    return options


def _refuse_ranges(key: str, value: Any, where: str) -> None:
    try:
        as_slice(key, value)
    except TypeError as error:
        raise TieError(where, f"{key} must be a list of two numbers, not {value!r}.", "") from error


def _refuse_options(rule: type[Rule], options: Mapping[str, Any], where: str) -> None:
    for key in OWN_OPTIONS:
        if key in options:
            raise TieError(where, f"{key} is not an option of a rule.", "Write it beside rule =.")
    for key, value in options.items():
        if key in PART and key not in signature_of(rule).parameters:
            _refuse_ranges(key, value, where)
            continue
        several = isinstance(value, list) and isinstance(options.get("source"), list)
        if key == "source_name" and not (several or isinstance(value, str | None)):
            raise TieError(where, f"source_name must be a string, not {value!r}.", "")
        if key not in rule.functions and value is not None and not _is_plain(value):
            kinds = "a string, a finite number, a truth value or a list of them"
            raise TieError(where, f"{key} must be {kinds}, not a {type(value).__name__}.", "")
    signature = signature_of(rule)
    where = f"{where}: options of '{rule.name}'"
    known = [*signature.parameters, *(key for key in PART if key in options)]
    refuse_unknown(options, known, where)
    own = {key: value for key, value in options.items() if key in signature.parameters}
    try:
        signature.bind(**own)
    except TypeError as error:
        raise TieError(where, f"{error}.", "") from error


def refuse_unknown(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise for a key that no table of this kind has."""
    known = list(known)
    for key in table:
        if key not in known:
            names = ", ".join(f"'{name}'" for name in known)
            listed = f"Known are {names}." if known else "There are none."
            raise TieError(where, f"the key '{key}' is unknown.", nearest(key, known) or listed)
