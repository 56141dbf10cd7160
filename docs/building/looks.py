"""How the pages look where CSS cannot tell what it sees: a hook of mkdocs."""

from __future__ import annotations

import re
from html import unescape

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

LONG = 44
"""Columns from which on a printed sentence may be broken, as on a telephone."""
LONG_INDENTED = 100
"""The same where it is indented, which a layer's repr is: its lines fit all but telephones."""

_PRINTED = re.compile(
    r'(<div class="language-text highlight"><pre><span></span><code>)(.*?)(</code>)', re.S
)
_COLUMNS = re.compile(r"\S  +\S|-----|^\||^(?:tensor\()? *\[")
_CELL = re.compile(r"(<td[^>]*>)(.*?)(</td>)", re.S)
_MEASURE = re.compile(r"(?<![\w.,–<&#])\d[\d.,]*(?:–\d[\d.,]*)?(?: (?:×|[KMG]?B|[mµ]s)(?!\w))?")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let a search find the pages for users before those for maintainers."""
    if page.file.src_uri.startswith("maintainers/"):
        page.meta.setdefault("search", {"boost": 0.5})
    return markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mark what may be broken, long sentences that a block prints, and what may not, measures."""
    html = _PRINTED.sub(lambda block: block[1] + with_sentences(block[2]) + block[3], html)
    return _CELL.sub(lambda cell: cell[1] + with_measures(cell[2]) + cell[3], html)


def with_sentences(printed: str) -> str:
    """What a block prints, its long lines marked.

    Not those of tables and tensors, whose columns would part.
    """
    lines = printed.split("\n")
    columns = [False, *(bool(_COLUMNS.search(line)) for line in lines), False]
    marked = []
    for line, before, here, after in zip(lines, columns, columns[1:], columns[2:], strict=False):
        is_long = len(unescape(line)) > (LONG_INDENTED if line.startswith(" ") else LONG)
        breaks = is_long and not here and not (before and after)
        marked.append(f'<span class="sentence">{line}</span>' if breaks else line)
    return "\n".join(marked)


def with_measures(cell: str) -> str:
    """A cell of a table whose ranges and units stay in one line: ``2.7–3.4 ×``, ``149 KB``."""

    def marked(match: re.Match[str]) -> str:
        whole = match[0]
        return f'<span class="measure">{whole}</span>' if re.search("[– ]", whole) else whole

    parts = re.split(r"(<code.*?</code>|<[^>]*>)", cell, flags=re.S)
    return "".join(part if part.startswith("<") else _MEASURE.sub(marked, part) for part in parts)
