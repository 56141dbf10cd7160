"""The result files, and figures over all machines."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES
from benchmarks.goals import number

COMMAND = "python -m benchmarks --report"
FOLDER = "maintainers/benchmarks"
"""Of the pages behind the short answer, below the documents."""
Result = dict[str, Any]
Comparison = dict[str, Any]


def files(folder: Path, case: str = "*") -> list[Path]:
    """The result files, without those of quick runs."""
    return [p for p in sorted(folder.rglob(f"*-{case}.json")) if "quick" not in p.parts]


def load(folder: Path) -> list[Result]:
    """The result files by machine, those without limits first, and in the order of the cases."""
    order = list(CASES)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in files(folder)]
    known = [result for result in found if result.get("case") in CASES]

    def place(result: Result) -> Any:
        machine = result["machine"]
        return (result["device"], bool(machine["limits"]), machine["key"],
                order.index(result["case"]))  # fmt: skip

    return sorted(known, key=place)


def machines(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The record of each machine, once."""
    return list({result["machine"]["key"]: result["machine"] for result in results}.values())


def of_machine(results: Sequence[Result], machine: dict[str, Any]) -> list[Result]:
    """The results of one machine."""
    return [result for result in results if result["machine"]["key"] == machine["key"]]


def of_case(results: Sequence[Result], case: str, device: str = "cpu") -> list[Result]:
    """The results of one case, a machine each."""
    return [r for r in results if r["case"] == case and r["device"] == device]


def comparisons(
    results: Sequence[Result], case: str, *, device: str = "cpu", **wanted: Any
) -> Iterator[Comparison]:
    """The comparisons of a case with these values, as ``mode="training"`` and ``batch=32``."""
    for result in of_case(results, case, device):
        for comparison in result["comparisons"]:
            if all(comparison.get(name) == value for name, value in wanted.items()):
                yield comparison


def gains(
    found: Iterator[Comparison], contender: str = "tiedparam", allocator: str = "fixed"
) -> list[float]:
    """How many times faster than the reference a contender is, in each comparison."""
    figures = [c["contenders"].get(contender, {}).get(allocator) for c in found]
    return [1 / figure["ratio"] for figure in figures if figure]


def span(values: Sequence[float], unit: str = " ×") -> str:
    """``3.1–4.7 ×``: from the least to the greatest; one number where they look the same."""
    if not values:
        return "–"
    ends = list(dict.fromkeys(number(value) for value in (min(values), max(values))))
    return "–".join(ends) + unit


def fill(text: str) -> str:
    """A paragraph of a page, in lines of 100 columns."""
    return textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False) + "\n"


def table(head: Sequence[str], rows: Any) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
