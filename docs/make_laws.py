"""Write the table of wishes and the gallery of laws: ``python docs/make_laws.py``.

A wish, of `wishes.py`, is what a user wants, in the user's words, and the line that does it. The
line is run, and the page shows what it stores. How fast a law is comes from the result files of the
benchmarks; the pictures are those of `make_pictures`. `tests/house/test_start.py` checks that the
pages are up to date and that every rule of the library is there.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from html import unescape
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from building.anchors import anchor_of
from make_pictures import IMAGES
from make_tables import FAMILY_PAGES, bound_examples, filled, shipped_rules
from torch import nn
from wishes import WISHES, Wish

import tiedparam as tp
from tiedparam.laws.rule_table import by_family

ROOT = Path(__file__).resolve().parent.parent
PAGE, GALLERY = "docs/laws/index.md", "docs/laws/gallery.md"
COMMAND = "python docs/make_laws.py"


# The table of wishes --------------------------------------------------------------------------


@cache
def made(wish: Wish) -> tuple[set[str], int, int]:
    """Run a wish's line: the rules of its layers, what these store, and what dense ones do."""
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"torch": torch, "nn": nn, "tp": tp}
    exec(f"{wish.given}\n{_fresh(wish.line)}", namespace)
    layers = namespace.get("layers") or [namespace["layer"]]
    rules = [tp.get_tie(layer) for layer in layers]
    dense = sum(layer.weight.numel() for layer in layers)
    return {rule.name for rule in rules}, sum(rule.free_count for rule in rules), dense


def _fresh(line: str) -> str:
    """The line for a random layer, which `init="rescale"` keeps from a warning."""
    starts_elsewhere = ("copy", "shared_delta", "bank", "cluster")
    if any(word in line for word in starts_elsewhere):
        return line
    return line.removesuffix(")") + ', init="rescale")'


def _shape(wish: Wish) -> str:
    """The layer of a wish, as ``Linear(64, 64)``, or ``12 × Linear(64, 64)``."""
    built = wish.given.split(";")[0].split(" for ")[0]
    times = "".join(f"{number} × " for number in re.findall(r"range\((\d+)\)", wish.given))
    return times + built.rpartition("nn.")[2]


def speeds() -> dict[str, str]:
    """How many times faster than dense each measured family is: inference and a training step."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.__main__ import RESULTS
    from benchmarks.report.results import load
    from benchmarks.report.summary import lines

    found = {}
    for what, _, inference, training, _ in lines(load(RESULTS), "cpu"):
        family = re.sub(r" \(`\w+`\)$", "", what)
        found[family] = f"{inference.removesuffix(' ×')} / {training.removesuffix(' ×')}"
    return found


def anchor(rule: str) -> str:
    """The place on the page of the rule's family that explains it: ``matrices.md#hankel``."""
    page, _ = FAMILY_PAGES[shipped_rules()[rule].family]
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (heading, *_) = re.findall(rf"^##+ (.*\b{rule}\b.*)$", text, re.MULTILINE)
    return f"{Path(page).name}#{anchor_of(heading)}"


def wishes() -> str:
    """A table for each heading, in Markdown."""
    times = speeds()
    parts = []
    for heading, rows in WISHES.items():
        lines = [
            f"## {heading}\n",
            "| I want | I write | stored, for example | times as fast |",
            "|---|---|---|---|",
        ]
        for wish in rows:
            _, free, dense = made(wish)
            written = wish.line.removeprefix("tp.register_tie(layer, ")
            if written != wish.line:
                written = written.removesuffix(")")
            lines.append(
                f"| {wish.what} | [`{written}`]({anchor(wish.rule)}) "
                f"| {free:,} of {dense:,} in `{_shape(wish)}` "
                f"| {times[wish.family] if wish.family else '–'} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def with_wishes(page: str) -> str:
    """The text of a page with its table of wishes brought up to date."""
    return filled(page, "wishes", wishes())


# The gallery ----------------------------------------------------------------------------------


def line_of(rule: str) -> Wish:
    """The first wish that the rule fulfils."""
    return next(wish for rows in WISHES.values() for wish in rows if wish.rule == rule)


def gallery() -> str:
    """All laws with their pictures, family by family, in Markdown."""
    drawn = {}
    for path in sorted(IMAGES.glob("*.svg"), key=lambda path: path.stem):
        (title,) = re.findall("<title.*?>(.*?)</title>", path.read_text(encoding="utf-8"))
        drawn[path.name] = unescape(title)
    parts = []
    for family, rules in groupby(by_family(shipped_rules().values()), lambda rule: rule.family):
        page, what = FAMILY_PAGES[family]
        parts.append(f"## {family[0].upper()}{family[1:]}\n\n[{what[0].upper()}{what[1:]}]"
                     f"({Path(page).name}).")  # fmt: skip
        parts += [_shown(rule, drawn) for rule in rules]
    return "\n\n".join(parts)


def _shown(rule: type[tp.Rule], drawn: dict[str, str]) -> str:
    name = rule.name
    laws = dict.fromkeys(bound.law for bound in bound_examples(rule))
    text = f"### {name}\n\n" + "; ".join(f"`{law}`" for law in laws)
    text += f". [Options and cost]({anchor(name)})."
    text += f"\n\n```python\n{line_of(name).given}\n{_fresh(line_of(name).line)}\n```"
    mine = [file for file in drawn if re.fullmatch(rf"{name}(-.*)?\.svg", file)]
    if mine:
        text += "\n\n" + "\n".join(f"![{_alt(drawn[file])}](../images/{file})" for file in mine)
    return text


def _alt(title: str) -> str:
    """The law and what it stores, of a picture's title.

    Without brackets, which would end the text, and without checksums of data.
    """
    named = re.split(r": [WV]\b|, weight", title)[0]
    named = re.sub(r"'[^']*sha256:[^']*'", "…", named)
    return f"{named}: {title.rpartition(': ')[2]}".replace("[", "(").replace("]", ")")


def with_gallery(page: str) -> str:
    """The text of a page with its gallery brought up to date."""
    return filled(page, "laws", gallery())


def main() -> None:
    """Rewrite the two pages in place."""
    for name, content in ((PAGE, with_wishes), (GALLERY, with_gallery)):
        page = ROOT / name
        page.write_text(content(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {name}")


if __name__ == "__main__":
    main()
