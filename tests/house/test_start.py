"""The first pages: what they promise is there, for every law, and what is generated is current."""

from __future__ import annotations

import importlib
import re

import pytest

from tests.support import ROOT, tomllib

STORIES = (
    "self-adjoint-convolution",
    "equal-rows",
    "one-filter-for-every-channel",
    "a-function-of-another-layer",
    "a-trained-model",
)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(page: str, heading: str) -> str:
    """What stands under a heading of the second rank."""
    return text_of(page).split(f"\n## {heading}\n")[1].split("\n## ")[0]


@pytest.fixture
def laws(monkeypatch):
    """The script that makes the table of wishes and the gallery."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("make_laws")


# Which law, and the gallery ---------------------------------------------------------------


def test_the_table_of_wishes_is_up_to_date(laws):
    page = text_of(laws.PAGE)
    assert page == laws.with_wishes(page), f"run '{laws.COMMAND}' and commit the result"


def test_every_rule_fulfils_a_wish(laws):
    rules = {wish.rule for rows in laws.WISHES.values() for wish in rows}
    assert rules == set(laws.shipped_rules())
    assert text_of(laws.PAGE).count("| [`") == sum(map(len, laws.WISHES.values()))


def test_a_wish_ties_by_the_rule_that_it_names(laws):
    for rows in laws.WISHES.values():
        for wish in rows:
            named, stored, dense = laws.made(wish)
            assert named == {wish.rule}
            assert stored < dense


def test_the_gallery_is_up_to_date_and_shows_every_rule_and_picture_once(laws):
    page = text_of(laws.GALLERY)
    assert page == laws.with_gallery(page), f"run '{laws.COMMAND}' and commit the result"
    assert sorted(re.findall(r"^### (\w+)$", page, re.M)) == sorted(laws.shipped_rules())
    shown = re.findall(r"!\[[^\]]+\]\(\.\./images/([^)]+)\)", page)
    assert sorted(shown) == sorted(path.name for path in laws.IMAGES.glob("*.svg"))


# The start page ---------------------------------------------------------------------------


def test_each_story_has_a_pair_that_gives_the_same_and_leads_to_its_notebook():
    pairs = section("docs/index.md", "I have, I write").split("\n### ")[1:]
    assert len(pairs) == len(STORIES)
    for pair, story in zip(pairs, STORIES, strict=True):
        have, *_ = re.split(r"\n(?:In the second, .*|I write.*)\n", pair, maxsplit=1)
        assert have.count("```python\n") == 1
        assert re.search(r"^(class|def) ", have, re.M), "what people write today is complete"
        assert "tp.register_tie(" in pair
        assert "print(torch.allclose(" in pair
        assert "```text\n" in pair
        assert f"(stories/{story}.ipynb)" in pair
        assert re.search(r"\((laws/\w+\.md#\w+|start/trained\.md)\)", pair)


def test_the_extras_and_versions_are_those_of_the_project():
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    said = section("docs/index.md", "Install")
    extras = re.findall(r"^\| `(\w+)` \| ", said, re.M)
    assert len(extras) >= 3
    assert set(extras) <= set(project["optional-dependencies"])
    python = project["requires-python"].removeprefix(">=")
    (torch,) = re.findall(r"torch>=([\d.]+)", " ".join(project["dependencies"]))
    assert f"Python {python} or later and torch {torch} or later" in " ".join(said.split())
    for need in project["dependencies"]:
        assert re.match(r"[\w-]+", need)[0] in said


def test_the_picture_of_the_demo_is_small_and_its_text_says_what_it_shows(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    maker = importlib.import_module("make_demo_picture")
    assert maker.PICTURE.stat().st_size < maker.MOST_BYTES
    for page, path in (("README.md", "docs/pictures"), ("docs/index.md", "pictures")):
        (alt,) = re.findall(rf"!\[([^\]]+)\]\({path}/demo\.png\)", text_of(page))
        assert len(alt) > 60
    assert "docs/make_demo_picture.py" in text_of("CONTRIBUTING.md")


# The README -------------------------------------------------------------------------------


def test_the_readme_is_a_screen_and_a_half():
    words = [word for word in text_of("README.md").split() if word != "|"]
    assert len(words) < 950


def test_the_readme_says_where_a_tie_is_slower():
    table = text_of("README.md").split("<!-- figures: begin -->")[1].split("<!-- figures: end")[0]
    slower = [line for line in table.splitlines() if re.search(r"\| 0\.\d+[^|]* × \|", line)]
    assert len(slower) >= 3
