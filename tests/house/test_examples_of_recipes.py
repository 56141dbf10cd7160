"""Each recipe has an example that runs by itself, and its page shows what the file says.

There are two kinds of example in docs/examples:

- *shown*: its page has the whole file between two markers, and `docs/make_examples.py` copies it
  there. Its block of python is run by `test_docs.py`, which compares the output too.
- *launched*: it takes arguments, several processes or a pretrained model. A block of sh on its page
  starts it (``python docs/examples/minilm.py``), and a test elsewhere runs it.
"""

from __future__ import annotations

import ast
import importlib
import re

import pytest

from tests.support import ROOT

RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.md"))
RECIPES = [page for page in RECIPES if page.name != "index.md"]
EXAMPLES = sorted(
    file for file in (ROOT / "docs" / "examples").iterdir() if file.suffix in {".py", ".sh"}
)
PAGES = sorted((ROOT / "docs").rglob("*.md"))
_SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


OTHERWISE_NAMED = {
    "lightning": "lightning_module",  # lightning.py would be imported instead of the library
    "sharded": "train_distributed",  # one script for many engines, and torchrun starts it
}


@pytest.fixture
def examples(monkeypatch):
    """The script that copies them."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("make_examples")


def launched(page: str) -> set[str]:
    """The names of the examples that a page's blocks of sh start."""
    commands = "\n".join(_SHELL.findall(page))
    return set(re.findall(r"\bdocs/examples/([\w.-]+\.(?:py|sh))\b", commands))


@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_every_recipe_has_its_example(page, examples):
    text = page.read_text(encoding="utf-8")
    shown = examples.shown(text)
    if not launched(text):
        assert len(shown) == 1, f"{page.name} must show one example: see docs/make_examples.py"
    assert len(shown) <= 1
    for name in shown:
        named = OTHERWISE_NAMED.get(page.stem, page.stem)
        assert name.rpartition(".")[0] == named, f"{page.name} shows the example of another"


def test_the_examples_on_the_pages_are_up_to_date(examples):
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        assert page == examples.with_examples(page), (
            f"the example in {path.name} is not what its file says; "
            f"run '{examples.COMMAND}' and commit the result"
        )


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_every_example_is_on_a_page_and_runs(file, examples):
    text = {page: page.read_text(encoding="utf-8") for page in PAGES}
    showing = [page for page in PAGES if file.name in examples.shown(text[page])]
    launching = [page for page in PAGES if file.name in launched(text[page])]
    assert showing or launching, "no page shows or starts it"
    assert len(showing) <= 1, "two pages show it"
    if not showing or file.suffix == ".sh":  # else its block runs with the page
        tests = (ROOT / "tests").rglob("test_*.py")
        named = [path for path in tests if f'"{file.name}"' in path.read_text(encoding="utf-8")]
        assert named, "no test names it, so none runs it"


@pytest.mark.parametrize(
    "file", [file for file in EXAMPLES if file.suffix == ".py"], ids=lambda file: file.name
)
def test_every_example_says_what_it_shows(file, examples):
    said = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert said, "an example begins with a docstring"
    shown = any(file.name in examples.shown(page.read_text(encoding="utf-8")) for page in PAGES)
    assert not shown or len(said.splitlines()) <= 3, "one line or two will do"


def test_an_example_is_copied_into_its_page(examples, tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "EXAMPLES", tmp_path)
    (tmp_path / "a.py").write_text('"""Shows a."""\n\nprint(r"\\1")\n', encoding="utf-8")
    (tmp_path / "b.sh").write_text("echo b\n", encoding="utf-8")
    (tmp_path / "c.txt").write_text("c\n", encoding="utf-8")

    def marked(name, content=""):
        return f"<!-- example: {name} begin -->\n{content}<!-- example: {name} end -->\n"

    page = f"# Title\n\n{marked('a.py', 'old')}\n```text\n1\n```\n\n{marked('b.sh')}"
    python = '```python\n"""Shows a."""\n\nprint(r"\\1")\n```\n'
    wanted = page.replace(marked("a.py", "old"), marked("a.py", python))
    wanted = wanted.replace(marked("b.sh"), marked("b.sh", "```sh\necho b\n```\n"))
    assert examples.with_examples(page) == wanted
    assert examples.with_examples(wanted) == wanted
    assert examples.shown(page) == ["a.py", "b.sh"]
    for wrong, error in (
        (marked("none.py"), "'none.py', which docs/examples does not have"),
        (marked("c.txt"), "does not have"),
        (marked("a.py") * 2, "must have one place"),
        ("<!-- example: a.py begin -->\n", "must have one place"),
    ):
        with pytest.raises(ValueError, match=error):
            examples.with_examples(wrong)


def test_what_a_page_launches_is_found():
    page = "docs/examples/no.py\n```sh\ntorchrun docs/examples/yes.py --a\n```\n"
    assert launched(page) == {"yes.py"}
