"""The pages of the docs: their fenced blocks, and the places that a link may name."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from docs.building.anchors import anchor_of

FENCE = re.compile(r"^```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the number of its first line."""

    kind: str
    body: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(FENCE.findall(text)), f"a fence of {page} is not closed"
    return [
        Block(match["kind"], match["body"], text.count("\n", 0, match.start("body")) + 1)
        for match in FENCE.finditer(text)
    ]


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them, and of names in the reference."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    names = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    return {*map(anchor_of, headings), *names}
