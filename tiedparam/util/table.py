"""Tables: one description of columns, shown as text, Markdown, HTML, and plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from tiedparam.util.errors import Reason, visible

Record = TypeVar("Record")

SEE_ALL_ROWS = "See rows() or to_markdown()."
"""What to do about rows that are not shown."""


def show(value: Any) -> str:
    """A value as a reader wants it: ``1,728``, ``0.013``, ``–`` for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "∞" if value > 0 else str(value)
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, tuple):
        return "×".join(map(str, value)) or "scalar"
    return visible(str(value))


@dataclass(frozen=True)
class Column(Generic[Record]):
    """One column of a table.

    Attributes:
        name: the key in plain data.
        head: what stands above it.
        value: what a record has there.
        shown: how it is written; `show` by default.
    """

    name: str
    head: str
    value: Callable[[Record], Any]
    shown: Callable[[Record], str] | None = None

    def text(self, record: Record) -> str:
        """The cell as a reader sees it."""
        if self.shown is not None:
            return visible(self.shown(record))
        return show(self.value(record))


class Table(Generic[Record]):
    """Columns and the records to show in them.

    Args:
        columns: what to show of each record.
        records: the rows.
    """

    def __init__(self, columns: Sequence[Column[Record]], records: Iterable[Record]) -> None:
        self.columns: list[Column[Record]] = list(columns)
        self.records: list[Record] = list(records)

    def text(self) -> str:
        """Aligned columns, numbers to the right."""
        heads, cells = self._cells()
        widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
        right = self._numeric()
        lines = [heads, ["-" * width for width in widths], *cells]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(line, widths, right, strict=True)
            ).rstrip()
            for line in lines
        )

    def markdown(self) -> str:
        """A table for Markdown pages."""
        heads, cells = self._cells()
        rule = ["---:" if right else "---" for right in self._numeric()]
        lines = [heads, rule, *([cell.replace("|", "\\|") for cell in line] for line in cells)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def html(self) -> str:
        """A ``<table>`` for notebooks."""
        heads, cells = self._cells()
        styles = [f' style="text-align:{"right" if r else "left"}"' for r in self._numeric()]

        def row(tag: str, line: list[str]) -> str:
            inside = (
                f"<{tag}{style}>{_escaped(cell)}</{tag}>"
                for cell, style in zip(line, styles, strict=True)
            )
            return f"<tr>{''.join(inside)}</tr>"

        body = "\n".join(row("td", line) for line in cells)
        return f"<table>\n<thead>{row('th', heads)}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"

    def data(self) -> list[dict[str, Any]]:
        """A flat dictionary for every row, ready for ``pandas.DataFrame``."""
        return [{c.name: c.value(record) for c in self.columns} for record in self.records]

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        return [c.head for c in self.columns], [
            [c.text(record) for c in self.columns] for record in self.records
        ]

    def _numeric(self) -> list[bool]:
        return [
            any(isinstance(c.value(record), (int, float)) for record in self.records)
            for c in self.columns
        ]


class TableReport(Generic[Record]):
    """A result that is read as a table with notes below it.

    A subclass says what `table` shows and which `remarks` follow, and may say what stands above it
    (`headline`) and what to type next (`next_steps`); all the forms come from that.
    """

    shown_rows: ClassVar[int | None] = None
    """How many rows ``str`` and a notebook show; Markdown and data have them all."""

    def table(self) -> Table[Record]:
        """The rows."""
        raise NotImplementedError

    def remarks(self) -> list[Reason]:
        """What stands below the table: facts, some with what to do about them."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        """What stands below the table, one line each."""
        return list(map(str, self.remarks()))

    def headline(self) -> str:
        """What stands above the table; nothing, unless a subclass says more."""
        return ""

    def next_steps(self) -> list[str]:
        """What to type next, one line of code each; nothing, unless a subclass says more."""
        return []

    def to_data(self) -> dict[str, Any]:
        """Everything as dictionaries, lists, strings, numbers, truth values and None."""
        return {"rows": plain(self.rows()), "notes": self.notes()}

    def rows(self) -> list[dict[str, Any]]:
        """A flat dictionary for every row, ready for ``pandas.DataFrame(report.rows())``."""
        return self.table().data()

    def to_json(self, indent: int | None = 2) -> str:
        """`to_data` as JSON; infinities and NaN become null."""
        return json.dumps(self.to_data(), indent=indent, ensure_ascii=False, allow_nan=False)

    def to_markdown(self) -> str:
        """The table and the notes in Markdown."""
        shown, notes, steps = self.table(), self.notes(), self.next_steps()
        return _joined(
            self.headline(),
            shown.markdown() if shown.records else "",
            "\n".join(f"- {note}" for note in notes),
            "\n".join(["```", *steps, "```"]) if steps else "",
        )

    def __str__(self) -> str:
        return self.text(self.next_steps())

    def text(self, next_steps: Sequence[str], word: Callable[[Reason], str] = str) -> str:
        """What ``str`` shows, with other steps to take and other remedies: the shell has its own.

        Args:
            next_steps: what to type next, one line each.
            word: how a remark is said.
        """
        shown, notes = self._shortened(word)
        return _joined(
            visible(self.headline()),
            shown.text() if shown.records else "",
            "\n".join(notes),
            "\n".join(["Next:", *(f"  {visible(step)}" for step in next_steps)])
            if next_steps
            else "",
        )

    def _repr_html_(self) -> str:
        shown, notes = self._shortened(str)
        steps = "\n".join(self.next_steps())
        parts = [
            f"<p>{_escaped(self.headline())}</p>" if self.headline() else "",
            shown.html() if shown.records else "",
            *(f"<p>{_escaped(note)}</p>" for note in notes),
            f"<pre>{_escaped(steps)}</pre>" if steps else "",
        ]
        return "".join(part + "\n" for part in parts if part)

    def _shortened(self, word: Callable[[Reason], str]) -> tuple[Table[Record], list[str]]:
        table, remarks = self.table(), self.remarks()
        hidden = len(table.records) - self.shown_rows if self.shown_rows is not None else 0
        if hidden > 0:
            del table.records[self.shown_rows :]
            remarks.insert(0, Reason(f"{hidden:,} more rows are not shown.", SEE_ALL_ROWS))
        return table, list(map(word, remarks))


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def plain(value: Any) -> Any:
    """``value`` in JSON's types: tuples become lists, what is not finite becomes None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _escaped(text: str) -> str:
    from html import escape  # for notebooks alone: its table of entities is long

    return escape(text)
