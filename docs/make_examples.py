"""Copy the example of each recipe into its page: ``python docs/make_examples.py``.

An example is a file of docs/examples that runs by itself. Its page shows it whole, between two
markers, and the output below them is written by hand and checked::

    <!-- example: inference.py begin -->
    (the file, in a block of code)
    <!-- example: inference.py end -->

Files ``.py`` become python blocks, files ``.sh`` become sh blocks.
"""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
EXAMPLES = DOCS / "examples"
COMMAND = "python docs/make_examples.py"
KINDS = {".py": "python", ".sh": "sh"}
_BEGIN = re.compile(r"^<!-- example: (\S+) begin -->$", re.MULTILINE)


def shown(page: str) -> list[str]:
    """The names of the files that the text of a page shows, in order."""
    return _BEGIN.findall(page)


def block(name: str) -> str:
    """A file of docs/examples as a block of code.

    Raises:
        ValueError: if there is no such file, or if it is of a kind that pages do not show.
    """
    file = EXAMPLES / name
    if file.suffix not in KINDS or not file.is_file():
        raise ValueError(f"a page wants to show {name!r}, which docs/examples does not have")
    return f"```{KINDS[file.suffix]}\n{file.read_text(encoding='utf-8').strip()}\n```"


def with_examples(page: str) -> str:
    """The text of a page with its examples brought up to date.

    Raises:
        ValueError: if a marker has no end, or its file does not exist.
    """
    for name in shown(page):
        begin, end = (f"<!-- example: {name} {edge} -->" for edge in ("begin", "end"))
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"the page must have one place between {begin!r} and {end!r}")
        before, _, rest = page.partition(begin)
        after = rest.partition(end)[2]
        page = f"{before}{begin}\n{block(name)}\n{end}{after}"
    return page


def main() -> None:
    """Rewrite the pages in place."""
    for path in sorted(DOCS.rglob("*.md")):
        page = path.read_text(encoding="utf-8")
        if names := shown(page):
            path.write_text(with_examples(page), encoding="utf-8")
            print(f"wrote {', '.join(names)} into {path.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
