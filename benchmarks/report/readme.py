"""The small table of the README: how much faster than the dense stock layer, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.results import Result, table
from benchmarks.report.summary import HEAD, lines

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def figures(results: Sequence[Result]) -> str:
    """The lines of docs/speed.md, without the last column."""
    return table(HEAD[:-1], [line[:-1] for line in lines(results, "cpu")])


def put_into(text: str, results: Sequence[Result]) -> str:
    """The README's text with the figures between its two marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{figures(results)}\n{END}{after}"
