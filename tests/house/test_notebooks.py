"""The notebooks of the stories: their form, their links, and that all of their cells run.

A notebook is its own test: its cells assert what its text says. Here the cells run in order in one
namespace, in an empty folder and without Jupyter, so that no kernel has to start. The site shows
them as Jupyter runs them.
"""

from __future__ import annotations

import ast
import json
import linecache
import re
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tiedparam as tp
from tests.support import ROOT
from tests.support.pages import anchors_of

FOLDER = ROOT / "docs" / "stories"
STORIES = [
    "self-adjoint-convolution",
    "equal-rows",
    "one-filter-for-every-channel",
    "a-function-of-another-layer",
    "a-trained-model",
]
NOTEBOOKS = [FOLDER / f"{story}.ipynb" for story in STORIES]
MOST_WORDS, MOST_CELLS, FEWEST_CELLS = 1_500, 25, 15

every_story = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=STORIES)


def cells_of(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def source_of(cell: dict) -> str:
    return "".join(cell["source"])


def check_form(notebook: Path) -> None:
    """Nothing of a run is in the file, and it reads as a page: a title, text, one idea a cell."""
    text = notebook.read_text(encoding="utf-8")
    content = json.loads(text)
    assert text == json.dumps(content, indent=1, ensure_ascii=False) + "\n", "not as Jupyter saves"
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert content["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}
    }
    cells = content["cells"]
    assert FEWEST_CELLS <= len(cells) <= MOST_CELLS
    names = [cell["id"] for cell in cells]
    assert len(set(names)) == len(names)
    for cell, before in zip(cells, [None, *cells], strict=False):
        name, source = cell["id"], source_of(cell)
        assert re.fullmatch(r"[a-z][a-z-]{1,63}", name), f"{name}: an id should say what is there"
        assert cell["metadata"] == {}, name
        assert source == source.strip(), f"{name}: space around it"
        assert source, f"{name} is empty"
        assert max(map(len, source.splitlines())) <= 100, f"{name} has a long line"
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], f"{name} has outputs: clear them before you commit"
            assert cell["execution_count"] is None, f"{name} was run: clear its outputs"
            ast.parse(source, name)  # so no magics either: the cells are plain Python
        else:
            assert cell["cell_type"] == "markdown", name
            assert before is None or before["cell_type"] == "code", f"{name}: text after text"
    texts = [source_of(cell) for cell in cells if cell["cell_type"] == "markdown"]
    titles = [line for text in texts for line in text.splitlines() if line.startswith("# ")]
    assert source_of(cells[0]).splitlines()[0] == titles[0]
    assert len(titles) == 1
    assert len("\n".join(map(source_of, cells)).split()) <= MOST_WORDS


def check_links(notebook: Path) -> None:
    """Every link leads to a page of the docs, and to a heading that it has."""
    texts = [source_of(c) for c in cells_of(notebook) if c["cell_type"] == "markdown"]
    targets = re.findall(r"\]\(([^)\s]+)\)", "\n".join(texts))
    assert targets, "no link to the pages that say more"
    wrong = {target: reason for target in targets if (reason := why_no_link(target))}
    assert not wrong


def why_no_link(target: str) -> str | None:
    """What is wrong with a link in a notebook; None if it leads somewhere."""
    name, _, anchor = target.partition("#")
    page = (FOLDER / name).resolve()
    if not page.is_relative_to(ROOT / "docs"):
        return "out of the docs"
    if page.suffix != ".md":
        return "not a page"
    if not page.exists():
        return "no such page"
    return None if not anchor or anchor in anchors_of(page) else "no such heading"


def run(notebook: Path, module: ModuleType) -> None:
    """Run all cells in the names of a module; tracebacks say which cell, and where in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", tp.TieWarning)  # a cell that expects one prints it
        for cell in cells_of(notebook):
            if cell["cell_type"] == "code":
                name, source = f"<{notebook.name}, cell {cell['id']}>", source_of(cell)
                linecache.cache[name] = (len(source), None, source.splitlines(True), name)
                exec(compile(source, name, "exec"), vars(module))


@pytest.fixture
def empty_module(tmp_path, monkeypatch):
    """A module without names, in an empty folder, with pictures that no screen shows."""
    for needed in ("sklearn", "matplotlib"):
        pytest.importorskip(needed)
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_backend()
    pyplot.switch_backend("agg")
    module = ModuleType("notebook")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # pickles look it up
    with torch.random.fork_rng(devices=[]):
        yield module
    pyplot.switch_backend(before)


def test_every_story_has_its_notebook_and_the_site_shows_it():
    assert sorted(path.name for path in FOLDER.glob("*.ipynb")) == sorted(n.name for n in NOTEBOOKS)
    shown = re.findall(r"stories/([\w-]+)\.ipynb", (ROOT / "mkdocs.yml").read_text("utf-8"))
    assert shown == STORIES


@every_story
def test_the_notebook_is_clean_and_reads_as_a_page(notebook):
    check_form(notebook)


@every_story
def test_its_links_lead_somewhere(notebook):
    check_links(notebook)


@pytest.mark.slow
@pytest.mark.usefixtures("registry")
@every_story
def test_all_cells_run_and_what_they_assert_holds(notebook, empty_module):
    run(notebook, empty_module)
    assert not list(Path.cwd().iterdir()), "files beside the notebook, which the site would show"


# What the checks notice ---------------------------------------------------------------------


def changed(tmp_path: Path, **changes: object) -> Path:
    """A copy of the first notebook, beside the pages, whose last text or code cell is changed."""
    content = json.loads(NOTEBOOKS[0].read_text(encoding="utf-8"))
    kind = "code" if {"outputs", "execution_count", "code"} & {*changes} else "markdown"
    cell = next(cell for cell in reversed(content["cells"]) if cell["cell_type"] == kind)
    cell.update({("source" if key in ("code", "text") else key): changes[key] for key in changes})
    copy = tmp_path / NOTEBOOKS[0].name
    copy.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return copy


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"outputs": [{"output_type": "stream", "name": "stdout", "text": ["1\n"]}]}, "outputs"),
        ({"execution_count": 7}, "was run"),
        ({"code": ["x" * 101]}, "long line"),
        ({"text": []}, "is empty"),
        ({"text": ["and", " so on " * 1_500, "."]}, "long line|1500"),
        ({"id": "3f0a9c1e"}, "an id should"),
        ({"metadata": {"scrolled": True}}, "end"),
        ({"text": ["# Another title"]}, "assert 2 == 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_with_its_form_is_noticed(tmp_path, changes, what):
    check_form(changed(tmp_path))
    with pytest.raises(AssertionError, match=what):
        check_form(changed(tmp_path, **changes))


@pytest.mark.parametrize("magic", ["%matplotlib inline", "!ls", "x ="])
def test_cells_that_are_not_python_are_noticed(tmp_path, magic):
    with pytest.raises(SyntaxError):
        check_form(changed(tmp_path, code=[magic]))


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("../laws/symmetries.md#flip_sym", None),
        ("../laws/symmetries.md#no-such-law", "no such heading"),
        ("../no-such-page.md", "no such page"),
        ("../../README.md", "out of the docs"),
        ("equal-rows.ipynb", "not a page"),
        ("https://example.org/a.md", "no such page"),
    ],
)
def test_a_link_that_leads_nowhere_is_noticed(tmp_path, target, why):
    assert why_no_link(target) == why
    if why:
        with pytest.raises(AssertionError, match=why):
            check_links(changed(tmp_path, text=[f"[more]({target})"]))


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("assert torch.equal(conv.weight, 2 * conv.weight)", AssertionError),
        ("tp.register_tie(nn.Linear(64, 64), 'row_repeat')", tp.TieWarning),
    ],
)
def test_a_cell_that_fails_or_warns_is_noticed(tmp_path, code, error, empty_module):
    notebook = tmp_path / "short.ipynb"
    start = "import torch\nfrom torch import nn\nimport tiedparam as tp\nconv = nn.Conv2d(3, 3, 3)"
    cells = [{"cell_type": "code", "id": name, "source": [text]} for name, text in
             (("start", start), ("wrong", code))]  # fmt: skip
    notebook.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    with pytest.raises(error) as caught:
        run(notebook, empty_module)
    assert any("cell wrong" in str(entry.path) for entry in caught.traceback)
