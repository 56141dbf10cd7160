"""JSON that says everything once, and nothing that other readers would read otherwise."""

from __future__ import annotations

import json
from math import isfinite
from typing import Any


def read_json(text: str | bytes) -> Any:
    """What ``text`` holds: the one door for JSON out of files.

    Args:
        text: the file's text, or its bytes in UTF-8.

    Raises:
        ValueError: if it is not JSON by the standard: a key that stands twice in one table, of
            which Python's reader would take the last in silence; ``NaN`` and ``Infinity``; a
            number that no float holds; half of a surrogate pair, which is not text.
        RecursionError: if it is nested too deeply.
    """
    if isinstance(text, bytes):
        text = text.decode()
    content = json.loads(
        text,
        object_pairs_hook=_table,
        parse_constant=_constant,
        parse_float=_number,
        parse_int=_whole_number,
    )
    if "\\u" in text:  # only an escape can make what UTF-8 cannot hold
        json.dumps(content, ensure_ascii=False).encode()
    return content


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"the key '{key}' stands twice in one table")
        table[key] = value
    return table


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")


def _number(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text} is larger than any float")
    return value


def _whole_number(text: str) -> int:
    if text == "-0":  # a float to other readers
        raise ValueError("-0 is not a whole number")
    return int(text)
