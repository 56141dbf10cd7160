"""Tables for every reader: text, Markdown, HTML and rows."""
# ruff: noqa: E501

from __future__ import annotations

import html.parser
import math

import pytest
import torch

from tiedparam.util.errors import Reason
from tiedparam.util.table import Column, Table, TableReport, plain, show


class Cells(html.parser.HTMLParser):
    """The cells of a table, as a browser reads them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture
def awkward() -> TableReport:
    """Names that text, Markdown and HTML must not take for their own."""

    class Awkward(TableReport):
        def table(self):
            columns = [
                Column("name", "<name>", lambda r: r[0]),
                Column("value", "value", lambda r: r[1], lambda r: f"{r[1]} B"),
            ]
            return Table(columns, [("a|b<i>&amp;", 1), ("é", 22), ("c", None)])

        def remarks(self):
            return [Reason("x < y")]

    return Awkward()


def test_html_and_markdown_escape(awkward):
    cells = Cells(awkward._repr_html_())
    assert cells.rows == [
        ["<name>", "value"],
        ["a|b<i>&amp;", "1 B"],
        ["é", "22 B"],
        ["c", "None B"],
    ]
    assert "<p>x &lt; y</p>" in awkward._repr_html_()
    assert awkward.to_markdown() == (
        "| <name> | value |\n| --- | ---: |\n| a\\|b<i>&amp; | 1 B |\n| é | 22 B |\n| c | None B |\n\n- x < y"
    )
    assert str(awkward) == (
        "<name>        value\n-----------  ------\na|b<i>&amp;     1 B\né              22 B\n"
        "c            None B\n\nx < y"
    )
    assert awkward.rows() == [
        {"name": "a|b<i>&amp;", "value": 1}, {"name": "é", "value": 22}, {"name": "c", "value": None},
    ]  # fmt: skip


def test_values_as_a_reader_wants_them():
    shown = [None, True, False, 1234567, 0.0, 0.12345, 1234.5, math.inf, -math.inf, (), (3, 4), "x"]
    assert [show(value) for value in shown] == [
        "–", "yes", "no", "1,234,567", "0", "0.123", "1,234", "∞", "-inf", "scalar", "3×4", "x",
    ]  # fmt: skip
    assert plain({"a": (1, math.nan), 2: [math.inf, torch.float32]}) == {
        "a": [1, None], "2": [None, "torch.float32"],
    }  # fmt: skip
