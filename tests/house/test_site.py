"""The manual as a site: each page has its place, each public name its section, and all is at hand.

The built site is looked at where TIEDPARAM_SITE names its folder: the session `site` of noxfile.py
sets it. Without it the tests of what mkdocs does are skipped if mkdocs is not installed.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import tiedparam as tp
from tests.support import ROOT
from tiedparam import laws, rules, testing

DOCS = ROOT / "docs"
SITE = os.environ.get("TIEDPARAM_SITE")
SOURCES = sorted([*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")])
NAMES = [file.relative_to(DOCS).as_posix() for file in SOURCES]
LONGEST = 2_500
"""Words of a page."""

MACHINES = re.compile(r"maintainers/benchmarks/(?!index|goals).*")
"""A page for each machine, which only their index names."""

GENERATED = re.compile(rf"reference/.*|works-with\.md|maintainers/features\.md|{MACHINES.pattern}")
"""Pages of tables that are written by scripts, which may be longer."""


def text_of(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.fixture
def script(monkeypatch):
    """The scripts and hooks of the site by their names."""

    def imported(name: str):
        for folder in (DOCS, DOCS / "building"):
            monkeypatch.syspath_prepend(str(folder))
        return importlib.import_module(name)

    return imported


@pytest.fixture
def hook(script):
    """The same, where what the site is made with is installed."""
    for needed in ("griffe", "mkdocs", "nbclient") if SITE is None else ():
        pytest.importorskip(needed)
    return script


# The reference --------------------------------------------------------------------------------


def public_places() -> list[str]:
    """Where each public name stands: the shortest way to it."""
    places = [f"tiedparam.{name}" for name in tp.__all__ if name != "__version__"]
    for module in (laws, rules, testing):
        for name in module.__all__:
            if name in tp.__all__:
                assert getattr(module, name) is getattr(tp, name)
            else:
                places.append(f"{module.__name__}.{name}")
    return places


def test_the_pages_of_the_reference_are_up_to_date(script):
    made = script("make_reference")
    pages = {file.name: file.read_text(encoding="utf-8") for file in made.FOLDER.iterdir()}
    assert pages == made.pages(), f"run '{made.COMMAND}' and commit the result"


def misplaced(texts: list[str]) -> dict[str, int]:
    """The public names that do not have one section, and how many they have; others as well."""
    found = Counter(re.findall(r"^::: (\S+)$", "\n".join(texts), re.MULTILINE))
    wanted = public_places()
    return {name: found[name] for name in {*wanted, *found} if found[name] != wanted.count(name)}


def test_every_public_name_has_one_section(script):
    texts = [file.read_text(encoding="utf-8") for file in script("make_reference").FOLDER.iterdir()]
    assert not misplaced(texts)
    assert "`tiedparam.__version__`" in text_of("reference/index.md")
    shipped = {rule.__name__ for rule in script("make_tables").shipped_rules().values()}
    assert shipped == set(rules.__all__)


def test_a_name_that_is_missing_or_stands_twice_is_noticed():
    right = "".join(f"::: {name}\n" for name in public_places())
    assert not misplaced([right])
    lacking = right.replace("::: tiedparam.rules.Skew\n", "")
    assert misplaced([lacking, "::: tiedparam.scan\n", "::: tiedparam.gone\n"]) == {
        "tiedparam.rules.Skew": 0,
        "tiedparam.scan": 2,
        "tiedparam.gone": 1,
    }


def test_every_name_and_command_is_in_the_table_of_contents(script):
    index = text_of("reference/index.md")
    linked = set(re.findall(r"\(\w[\w-]*\.md#(tiedparam\.[\w.]+)\)", index))
    assert linked == set(public_places())
    commands = script("make_reference").commands()
    assert {"scan", "tie", "untie"} <= set(commands)
    for name, command in commands.items():
        assert f"(shell.md#tiedparam-{name})" in index
        page = text_of("reference/shell.md").partition(f"## tiedparam {name}\n")[2]
        for action in command._actions[1:]:
            assert ", ".join(action.option_strings) in page.partition("\n## ")[0]


# The pages ------------------------------------------------------------------------------------


def nav() -> list[str]:
    """The pages in mkdocs.yml, which is read without its tags."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    block = re.search(r"^nav:\n((?: +.*\n)+)", text, re.MULTILINE)[1]
    return re.findall(r"^ *- (?:[^:\n]+: )?(\S+\.(?:md|ipynb))$", block, re.MULTILINE)


def test_the_navigation_has_every_page_once():
    listed = Counter(nav())
    added = {"maintainers/contributing.md", "maintainers/changelog.md"}
    wanted = {*NAMES, *added} - set(filter(MACHINES.fullmatch, NAMES))
    assert {name for name, times in listed.items() if times > 1} == set()
    assert wanted - set(listed) == set(), "pages that nobody finds"
    assert set(listed) - wanted == set(), "pages that are not there"


@pytest.mark.parametrize("name", NAMES)
def test_no_page_is_too_long(name):
    if GENERATED.fullmatch(name):
        pytest.skip("a generated page may be longer")
    words = len(prose_of(name).split())
    assert words <= LONGEST, "divide it"


def prose_of(name: str) -> str:
    """A page as text; of a notebook, its cells."""
    if not name.endswith(".ipynb"):
        return text_of(name)
    return "\n\n".join("".join(cell["source"]) for cell in json.loads(text_of(name))["cells"])


_FETCHED = re.compile(
    r"!\[[^\]]*\]\((?:https?:)?//|<(?:script|iframe|link|object|embed)\b"
    r"|<[^>]*\b(?:src|srcset|data)\s*=\s*[\"']?(?:https?:)?//|@import|url\([\"']?(?:https?:)?//"
)


@pytest.mark.parametrize("name", NAMES)
def test_no_page_fetches_something_from_another_host(name):
    assert not _FETCHED.findall(prose_of(name))


def test_what_is_fetched_is_found_however_it_is_written():
    for text in (
        "![a](https://x.y/z.png)", "<script>1</script>", '<img alt="" src=//x.y/z.png>',
        '<link href="a">', "@import 'a'", "url(http://x.y)", "<iframe>",
    ):  # fmt: skip
        assert _FETCHED.search(text), text
    assert not _FETCHED.search("[a](https://x.y) ![b](../images/b.svg) <https://x.y>")


# What is rewritten for the site -----------------------------------------------------------------

LIBRARY = {
    "__init__.py": "from a_library.work import join, Options\n__all__ = ['join', 'Options']\n",
    "work.py": '''\
from typing import Literal

Way = Literal["fast", "slow"]

def join(way: Way = "fast") -> None:
    """Join by `Options.way`, see `join` and `_hidden`; ``code`` stays.

    =====  ==========
    way    what it is
    =====  ==========
    fast   in a
           hurry
    slow   | or not
    =====  ==========

    Source: someone.

    Example:
        >>> join()
        1
    """

class Options:
    """Options, by `way`."""

    way = 1
    """A way."""

@register_rule("even")
class Even:
    """Each entry is even.

    Args:
        n: a number.

    Example:
        >>> 1
        1
    """

    law = "W = 2V"

    def check(self, layout):
        """The tensor must be
        a matrix.

        Not more."""
''',
}


@pytest.fixture
def read(hook, tmp_path):
    """A small library, as the site reads it."""
    import griffe

    (tmp_path / "a_library").mkdir()
    for name, text in LIBRARY.items():
        (tmp_path / "a_library" / name).write_text(text, encoding="utf-8")
    extensions = griffe.load_extensions(hook("docstrings").Docstrings)
    library = griffe.load("a_library", search_paths=[tmp_path], extensions=extensions)
    return library["work"]


def test_a_docstring_becomes_markdown_and_its_example_an_example(read):
    text = read["join"].docstring.value
    assert "| way | what it is |\n|---|---|\n| fast | in a hurry |\n" in text
    link = '<autoref identifier="a_library.{}" optional><code>{}</code></autoref>'
    assert link.format("Options.way", "Options.way") in text
    assert link.format("join", "join") in text
    assert "`_hidden`; ``code`` stays" in text
    assert "**Source**: someone." in text
    kinds = [section.kind.value for section in read["join"].docstring.parse("google")]
    assert kinds == ["text", "examples"]
    assert link.format("Options.way", "way") in read["Options"].docstring.value


def test_a_name_of_literals_is_shown_as_the_literals(read):
    assert str(read["join"].parameters["way"].annotation) == "Literal['fast', 'slow']"


def test_a_rule_says_its_law_and_what_it_refuses(read):
    text = read["Even"].docstring.value
    assert text.startswith("Each entry is even.\n\n**Law**: ``W = 2V``\n\nArgs:")
    kinds = [section.kind.value for section in read["Even"].docstring.parse("google")]
    assert kinds == ["text", "parameters", "raises", "examples"]
    assert "The tensor must be a matrix.\n" in text
    assert "Not more" not in text


def test_links_are_made_for_the_place_on_the_site(hook):
    with_links = hook("own_pages").with_links
    made = with_links(
        "[a](docs/speed.md#x) [b](README.md#run-it) [c](CHANGELOG.md) [d](https://x.y) [e](#z)",
        "CONTRIBUTING.md",
        "maintainers/contributing.md",
    )
    assert made == "[a](../speed.md#x) [b](../index.md) [c](changelog.md) [d](https://x.y) [e](#z)"
    page = "[a](../../CONTRIBUTING.md#tests) [b](versions.md) ![c](../images/c.svg)"
    made = with_links(page, "docs/maintainers/design.md", "maintainers/design.md")
    assert made == page.replace("../../CONTRIBUTING.md", "contributing.md")


def test_what_may_be_broken_and_what_may_not_is_marked(hook):
    looks = hook("looks")
    long = "cannot tie 'weight' of Linear: its residual 0.99 is above the limit of 0.5."
    row = "0.weight  flip_sym  8×8×3×3    576   292   1.97  1–2      0.0719"
    assert looks.with_sentences(f"True\n{long}\n{row}").splitlines() == [
        "True",
        f'<span class="sentence">{long}</span>',
        row,
    ]
    cell = '<code>1–2</code> in <a href="#2–3">2.8–3.4 ×</a>, 512 of 1,024'
    kept = cell.replace("2.8–3.4 ×", '<span class="measure">2.8–3.4 ×</span>')
    assert looks.with_measures(cell) == kept


CELLS = (
    ("markdown", "# A story"),
    ("code", "import warnings\nprint(1)\nwarnings.warn('careful')\n2"),
    (
        "code",
        "from IPython.display import SVG, HTML\nSVG('<svg xmlns=\"http://www.w3.org/2000/svg\"/>')",
    ),
    ("code", "HTML('<table>\\n\\n</table>')"),
)


def notebook(*cells: tuple[str, str]) -> str:
    """A notebook without outputs."""
    made = [
        {"cell_type": kind, "source": source, "metadata": {}, "id": f"cell-{number}"}
        | ({"outputs": [], "execution_count": None} if kind == "code" else {})
        for number, (kind, source) in enumerate(cells)
    ]
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": made})


@pytest.mark.slow
def test_a_notebook_runs_and_becomes_a_page(hook):
    text, pictures = hook("notebooks").page_of(notebook(*CELLS))
    itself = "[The notebook itself](notebooks/{the notebook}.ipynb), to run and to change."
    assert text.startswith(f"# A story\n\n{itself}\n\n```python\nimport warnings\nprint(1)\n")
    assert "```text\n1\nUserWarning: careful\n```\n\n```text\n2\n```" in text
    assert "\n\n<table>\n</table>\n" in text
    ((name, content),) = pictures.items()
    assert f"]({name})" in text
    assert content.startswith(b"<svg")


@pytest.mark.slow
def test_a_notebook_that_fails_is_no_page(hook):
    with pytest.raises(Exception, match="ZeroDivisionError"):
        hook("notebooks").page_of(notebook(("code", "1 / 0")))


# The built site ---------------------------------------------------------------------------------


class Built(HTMLParser):
    """A page of the built site: its links, what it fetches, what it says, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = re.findall(r"url\([\"']?([^)\"']+)", text)
        self.anchors: set[str] = set()
        self.text: list[str] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attributes}
        self.anchors |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.fetched.append(given["href"])
        self.fetched += [given[key] for key in ("src", "srcset", "data") if given.get(key)]
        if tag in ("script", "style", "code", "pre"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text.append(data)


@pytest.fixture(scope="module")
def built() -> dict[Path, Built]:
    """Every page of the built site by its file."""
    if SITE is None:
        pytest.skip("the site was not built: nox -s site")
    found = Path(SITE).resolve().rglob("*.html")
    pages = {file: Built(file.read_text(encoding="utf-8")) for file in found}
    assert len(pages) > 40
    return pages


def leads_nowhere(pages: dict[Path, Built]) -> Iterator[tuple[str, str]]:
    """Links within the site to files or anchors that are not there, but for the page for 404."""
    for file, page in pages.items():
        for link in page.links + page.fetched if file.name != "404.html" else ():
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if target.is_dir():
                target /= "index.html"
            anchor = unquote(parts.fragment)
            is_page = target in pages
            if not target.exists() or (is_page and anchor and anchor not in pages[target].anchors):
                yield str(file), link


def test_links_and_anchors_of_the_built_site_exist(built):
    assert not list(leads_nowhere(built))


def test_a_link_that_leads_nowhere_is_noticed(tmp_path):
    (tmp_path / "b.txt").write_text("")
    file = tmp_path / "a.html"
    text = '<p id="p"><a href="#p"><a href="#q"><a href="b.txt"><a href="c/"><a href="https://x.y">'
    file.write_text(text + '<img src="d.svg">')
    found = leads_nowhere({file: Built(file.read_text())})
    assert [link for _, link in found] == ["#q", "c/", "d.svg"]


def test_the_built_site_fetches_nothing_from_another_host(built):
    fetched = {link for page in built.values() for link in page.fetched}
    for style in Path(SITE).rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        fetched |= {match[1] for match in re.finditer(r"(?:url\(|@import )[\"']?([^)\"';]+)", text)}
    assert len(fetched) > 10
    assert not {link for link in fetched if re.match(r"(https?:)?//", link)}


def test_nothing_is_left_of_the_markup(built):
    marks = re.compile(r"^::: .*|``.*|^Example:$|^\|.*\|$|===+|<autoref.*|\]\[.*", re.MULTILINE)
    for file, page in built.items():
        assert not marks.findall("".join(page.text)), file
