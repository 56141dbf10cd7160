"""JSON that says everything once."""

from __future__ import annotations

import json
from typing import Any


def read_json(text: str) -> Any:
    """What ``text`` holds.

    Raises:
        ValueError: if it is no JSON, or if a key stands twice in one table, of which Python's
            reader would take the last in silence.
        RecursionError: if it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_table)


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"the key '{key}' stands twice in one table")
        table[key] = value
    return table
