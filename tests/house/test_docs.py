"""What the documents say is what happens: their code, outputs, tables, pictures and links.

The ```python blocks of a page run in order, in one namespace and in an empty folder. A
```text block that follows a python block is that block's output: what it prints, and the
warnings it causes as ``Category: message``. Line breaks and runs of spaces may differ, so that
long messages can be wrapped.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import io
import re
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tiedparam as tp
from tests.support import ROOT, older_than, peers
from tests.support.pages import FENCE, Block, anchors_of, blocks_of
from tiedparam.laws.rule_table import FAMILIES

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MAINTAINERS = ROOT / "docs" / "maintainers"
WITHOUT_CODE = {
    ROOT / "CHANGELOG.md",
    ROOT / "docs" / "recipes" / "index.md",  # links alone
    ROOT / "docs" / "stories" / "index.md",
    ROOT / "docs" / "recipes" / "shell.md",  # run by test_shell_page.py
    *(ROOT / "docs" / "reference").glob("*.md"),  # docstrings, run by test_examples.py
    # of those for maintainers, those that have none: they look things up
    *(page for page in MAINTAINERS.rglob("*.md") if "```python" not in page.read_text("utf-8")),
}
PAGES_WITH_CODE = [page for page in PAGES if page not in WITHOUT_CODE]
PAGE_NAMES = [str(page.relative_to(ROOT)) for page in PAGES_WITH_CODE]
SINCE = {  # from which torch on a page's outputs are these
    "optimizers.md": "2.9",  # which has Muon
    "files.md": "2.7",  # whose files are a little larger
    "sharded.md": "2.7",  # whose FSDP2 works on a CPU
}


def run_block(block: Block, page: Path, namespace: dict) -> str:
    """Run one python block and return what a reader would see."""
    # blank lines in front, so that a traceback shows the line of the page
    code = compile("\n" * (block.line - 1) + block.body, str(page), "exec")
    seen = io.StringIO()
    with contextlib.redirect_stdout(seen), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", "Guards may run slower on Python 3.13.0"
        )  # torch's advice
        warnings.filterwarnings(
            "ignore", "`isinstance.treespec, LeafSpec.` is deprecated"
        )  # torch's ONNX exporter copies such objects itself
        warnings.simplefilter("always", tp.TieWarning)
        try:
            exec(code, namespace)
        except ModuleNotFoundError as error:
            if error.name not in peers():
                raise
            pytest.skip(f"the page uses {error.name}, which is not installed")
        for warning in caught:
            print(f"{warning.category.__name__}: {warning.message}")
    return seen.getvalue()


@pytest.fixture
def generators(monkeypatch):
    """The scripts that make the tables and the pictures."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("make_tables"), importlib.import_module("make_pictures")


def test_the_pages_are_found():
    wanted = {"README.md", "docs/start/basics.md", "docs/laws/table.md", "docs/laws/your-own.md"}
    wanted |= {"docs/recipes/checkpoints.md", "docs/maintainers/design.md", "CONTRIBUTING.md"}
    assert wanted <= set(PAGE_NAMES)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=PAGE_NAMES)
def test_code_runs_and_prints_what_the_page_says(page, tmp_path, monkeypatch):
    if older_than(SINCE.get(page.name, "0")):
        pytest.skip(f"the page shows what torch has since {SINCE[page.name]}")
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(page)
    kinds = [block.kind for block in blocks]
    assert "python" in kinds, f"{page} shows no code"
    assert set(kinds) <= {"python", "text", "sh"}, "only these kinds are checked"
    module = ModuleType("docs_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # the compiler looks it up
    namespace = vars(module)
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block.kind == "text":
            continue
        shown = following.body if following is not None and following.kind == "text" else ""
        if block.kind == "sh":
            assert not shown, f"line {following.line} of {page}: an output that nobody checks"
            continue
        printed = run_block(block, page, namespace)
        assert printed.split() == shown.split(), (
            f"the code at line {block.line} of {page} prints\n{printed}\nand the page says\n{shown}"
        )
    assert kinds[0] != "text"
    assert ("text", "text") not in pairwise(kinds), "an output nobody checks"


def test_a_wrong_output_is_noticed(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n", encoding="utf-8")
    run = test_code_runs_and_prints_what_the_page_says
    with pytest.raises(AssertionError, match="prints"):
        run(page, tmp_path, monkeypatch)
    page.write_text("only prose\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="shows no code"):
        run(page, tmp_path, monkeypatch)


def test_pages_without_code_have_none():
    assert {MAINTAINERS / "design.md", MAINTAINERS / "how-a-tie-works.md"} <= set(PAGES_WITH_CODE)
    for page in WITHOUT_CODE - {ROOT / "docs" / "recipes" / "shell.md"}:
        assert {block.kind for block in blocks_of(page)} <= {"sh"}, f"{page}: nobody runs its code"


def test_the_first_example_has_six_lines():
    first = next(block for block in blocks_of(ROOT / "README.md") if block.kind == "python")
    assert len(first.body.splitlines()) == 6


# The table of rules ------------------------------------------------------------------------


def test_the_table_of_rules_is_up_to_date(generators):
    tables, _ = generators
    page = (ROOT / tables.PAGE).read_text(encoding="utf-8")
    assert page == tables.with_table(page), (
        f"the table of rules in {tables.PAGE} is not what the registered rules say; "
        f"run '{tables.COMMAND}' and commit the result"
    )


def test_the_table_of_families_is_up_to_date(generators):
    tables, _ = generators
    page = (ROOT / tables.FAMILY_PAGE).read_text(encoding="utf-8")
    assert page == tables.with_family_table(page), f"run '{tables.COMMAND}' and commit the result"
    names = [f"`{name}`" for name in tables.shipped_rules()]
    rows = [line for line in page.splitlines() if line.startswith("| [")]
    assert sorted(name for row in rows for name in re.findall(r"`\w+`", row)) == sorted(names)
    assert len(rows) == len(FAMILIES)


def test_every_rule_has_its_row_and_its_section(generators):
    tables, _ = generators
    shipped = tables.shipped_rules()
    assert {"flip_sym", "row_repeat", "channel_shared", "copy", "squared_copy"} <= set(shipped)
    page = (ROOT / tables.PAGE).read_text(encoding="utf-8")
    for name, rule in shipped.items():
        assert page.count(f"| `{name}` |") >= 1
        laws = {bound.law for bound in tables.bound_examples(rule)}
        assert laws
        for law in laws:
            assert f"| {rule.family} | `{name}` | `{law}` |" in page
        of_family, _ = tables.FAMILY_PAGES[rule.family]
        text = (ROOT / "docs" / of_family).read_text(encoding="utf-8")
        assert re.search(rf"^##+ .*\b{name}\b", text, re.MULTILINE), f"{name} in {of_family}"


def test_the_formulas_count_the_free_values(generators):
    tables, _ = generators
    checked = set()
    for name, rule in tables.shipped_rules().items():
        for bound in tables.bound_examples(rule):
            key = name if name in tables.FORMULAS else str(bound)
            if key not in tables.FORMULAS:
                continue  # a rule without a formula shows the number of its example
            _, count = tables.FORMULAS[key]
            stored = sum(torch.empty(shape).numel() for shape in bound.free_shapes())
            assert count(bound) == stored, f"the formula of {key} is wrong for {bound.layout}"
            checked.add(key)
    assert checked == set(tables.FORMULAS)


@pytest.mark.usefixtures("registry")
def test_a_rule_without_a_row_is_noticed(generators):
    tables, pictures = generators

    class Forgotten(tp.Rule):
        law = "W[i] = w"

        def free_shapes(self):
            return ((1,),)

        def forward(self, *free):
            return free[0].expand(self.bound_layout.shape)

        @classmethod
        def examples(cls):
            return (tp.Example(lambda: torch.nn.Linear(3, 2)),)

    Forgotten.__module__ = "tiedparam.rules.forgotten"
    tp.register_rule("forgotten")(Forgotten)
    with pytest.raises(AssertionError, match=r"run 'python docs/make_tables\.py'"):
        test_the_table_of_rules_is_up_to_date(generators)
    # and nothing but the two commands is needed to enrol it
    assert "| `forgotten` | `W[i] = w` | – |" in tables.table()
    assert "1 of 6 values stored" in dict(pictures.pictures())["forgotten.svg"]


# The table of versions ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "docs/maintainers/versions.md"])
def test_the_table_of_versions_is_up_to_date(name, generators, pytestconfig):
    if pytestconfig.getoption("record", None):
        pytest.skip("this run makes the record")
    tables, _ = generators
    assert name in tables.VERSION_PAGES
    page = (ROOT / name).read_text(encoding="utf-8")
    assert page == tables.with_version_table(page), (
        f"the table of versions in {name} is not what docs/tested says; "
        f"run '{tables.COMMAND}' and commit the result"
    )


# The table of optimizers -------------------------------------------------------------------


@pytest.mark.skipif(older_than("2.9"), reason="the table has Muon, which is in torch since 2.9")
def test_the_table_of_optimizers_is_up_to_date(generators):
    tables, _ = generators
    page = (ROOT / tables.OPTIMIZER_PAGE).read_text(encoding="utf-8")
    assert page == tables.with_optimizer_table(page), (
        f"the table of optimizers in {tables.OPTIMIZER_PAGE} is not what the laws say; "
        f"run '{tables.COMMAND}' and commit the result"
    )


def test_a_changed_law_is_noticed_in_the_table_of_optimizers(generators, monkeypatch):
    from tiedparam.state import optimizer_laws

    changed = dataclasses.replace(optimizer_laws._LAWS[torch.optim.Adam], coupled_decay=())
    monkeypatch.setitem(optimizer_laws._LAWS, torch.optim.Adam, changed)
    with pytest.raises(AssertionError, match=r"run 'python docs/make_tables\.py'"):
        test_the_table_of_optimizers_is_up_to_date(generators)


# The tables of the pretrained model --------------------------------------------------------


def test_the_tables_of_minilm_are_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    tables = importlib.import_module("make_minilm")
    page = (ROOT / "docs" / "recipes" / "minilm.md").read_text(encoding="utf-8")
    assert page == tables.with_tables(page), f"run '{tables.COMMAND}' and commit the result"
    found = tables.results()
    assert len(found["laws"]) > 9
    for row in found["laws"]:
        assert f"| {row['law']} | " in page
    assert len(found["scan"]) > 9


# The table of features ---------------------------------------------------------------------


@pytest.fixture
def compatibility(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("make_compatibility")


@pytest.fixture(scope="module")
def rows_of_features():
    """Read once: the marks of all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        return importlib.import_module("make_compatibility").features()


@pytest.mark.parametrize("name", ["works-with.md", "maintainers/features.md"])
def test_the_pages_of_features_are_what_the_tests_say(name, compatibility, rows_of_features):
    path = ROOT / "docs" / name
    page = compatibility.PAGES[path](rows_of_features)
    remedy = f"run '{compatibility.COMMAND}' and commit the result"
    assert path.read_text(encoding="utf-8") == page, remedy


def test_users_are_told_every_feature_and_no_test(compatibility, rows_of_features):
    rows = rows_of_features
    page = compatibility.for_users(rows)
    lines = page.splitlines()
    for row in rows:
        if row.refused:
            assert f"| {row.what} | {row.refused} |" in lines
        elif row.condition:
            assert row.limit in row.condition
            assert f"| {row.what} | {row.condition} |" in lines
        else:
            assert not row.limit
            assert f"- {row.what}" in lines
        assert row.test.partition("::")[2] not in page
    assert not re.search(r"\btest_|tests/", page)


def test_every_feature_has_one_row_and_a_test_of_its_own(compatibility, rows_of_features):
    rows = rows_of_features
    assert len(rows) > 60
    assert {row.area for row in rows} <= set(compatibility.AREAS)
    assert len({(row.area, row.what) for row in rows}) == len(rows)
    for row in rows:
        assert "|" not in row.what + row.answer
        file, _, name = row.test.partition("::")
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"def {name}(" in source
        # who is refused learns the way; in worker processes (`ranks`) the message is handed back
        body = source.partition(f"def {name}(")[2].partition("\n\n\n")[0]
        assert not row.refused or re.search(r"raises\(|refused\(|^ranks\b", body), row.test


def test_marks_that_cannot_be_read_are_refused(compatibility, tmp_path):
    file = tmp_path / "test_x.py"
    for mark, text in (
        ('"Layers"', "marked by area and feature"),
        ('"Layers", "a", note="b"', "marked by area and feature"),
        ('"Nowhere", "a"', "the area 'Nowhere' is none of"),
    ):
        file.write_text(f"@pytest.mark.feature({mark})\ndef test_a(): ...\n", encoding="utf-8")
        with pytest.raises(ValueError, match=text):
            compatibility.features(tmp_path)
    mark = '@pytest.mark.feature("Layers", "a", needs="b", limit="not c")'
    file.write_text(f"{mark}\ndef test_a(): ...\n", encoding="utf-8")
    (row,) = compatibility.features(tmp_path)
    assert row.answer == "works, needs b, but not c"
    table = compatibility.with_tests([row])
    assert "| a | works, needs b, but not c | `test_x.py::test_a` |" in table
    assert "| a | needs b, but not c |" in compatibility.for_users([row])


# Pictures, links, commands -----------------------------------------------------------------


def test_the_pictures_are_up_to_date(generators):
    _, pictures = generators
    drawn = dict(pictures.pictures())
    assert len(drawn) >= 5
    remedy = f"run '{pictures.COMMAND}' and commit the result"
    assert {path.name for path in pictures.IMAGES.iterdir()} == set(drawn), remedy
    for name, content in drawn.items():
        assert (pictures.IMAGES / name).read_text(encoding="utf-8") == content, f"{name}: {remedy}"
        assert len(content) < 20_000, f"{name} should be a small picture"


def test_every_rule_is_drawn_in_the_docs(generators):
    tables, pictures = generators
    names = {page for page, _ in tables.FAMILY_PAGES.values()}
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in sorted(names)]
    shown = re.findall(r"!\[[^\]]*\]\(../images/([^)]+)\)", "\n".join(pages))
    drawn = {name for name, _ in pictures.pictures()}
    assert drawn
    assert sorted(drawn) == sorted(shown), "the pages of rules show every picture once"


def test_links_and_pictures_exist():
    found = 0
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"\w+:", target):
                continue
            found += 1
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.exists(), f"{page.name} links to {target}, which does not exist"
            assert file.is_relative_to(ROOT), f"{page.name} links out of the repository: {target}"
            if anchor:
                assert anchor in anchors_of(file), f"{page.name} links to {target}: no such heading"
    assert found >= 20


def test_the_readme_has_two_commands_of_one_line():
    commands = [block.body for block in blocks_of(ROOT / "README.md") if block.kind == "sh"]
    assert len(commands) == 2
    demo, test = (command.strip() for command in commands)
    for command in (demo, test):
        assert "\n" not in command
        assert command.startswith("python3 -m venv .venv && ")
        assert " pip install -c tests/constraints.txt -e " in command
    assert demo.endswith(" -m tiedparam demo")
    assert "-m pytest" in test


def test_the_constraints_pin_what_is_tested():
    lines = (ROOT / "tests" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    # every direct dependency of pyproject.toml, extras included, is pinned
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = set(re.findall(r'"([A-Za-z][\w-]*)(?:>=|==|~=)[\d.]+', project)) - {"hatchling"}
    assert {"torch", "pytest", "hypothesis", "ruff", "mypy"} <= needed
    assert needed <= set(pins)


# The pages for maintainers ----------------------------------------------------------------


def test_every_scenario_that_is_named_is_explained():
    page = (MAINTAINERS / "scenarios.md").read_text(encoding="utf-8")
    text, head, table = page.partition("| number | scenario |")
    assert head
    explained = {f"S{number}" for number in re.findall(r"^\| S(\d+b?) \| \S", table, re.MULTILINE)}
    files = [*PAGES, *(ROOT / "tiedparam").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    named = {}
    for file in files:
        content = text if file.name == "scenarios.md" else file.read_text(encoding="utf-8")
        for pair in re.findall(r"\bS(\d+b?)\b|\btest_s(\d+b?)_", content):
            named["S" + "".join(pair).lstrip("0")] = file.name
    assert len(named) > 15
    missing = {number: file for number, file in named.items() if number not in explained}
    assert not missing, "the page must explain these scenarios in its table"
    assert not explained - set(named), "nothing speaks of these scenarios any more"


def test_every_room_of_the_package_has_its_row_and_its_lines():
    page = (MAINTAINERS / "design.md").read_text(encoding="utf-8")
    rooms = [path.parent for path in (ROOT / "tiedparam").glob("*/__init__.py")]
    assert len(rooms) > 8
    for room in rooms:
        row = rf"^\| [^|]*`{room.name}/`[^|]* \|"
        assert re.search(row, page, re.M), f"the page does not say what {room} is for"
        said = ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))
        assert said is not None, f"{room} does not say what it is for"
        assert len(said.split("\n")) >= 3


def test_the_files_that_maintainers_are_told_of_exist():
    found = 0
    for page in MAINTAINERS.glob("*.md"):
        for path in re.findall(r"`((?:\w+/)*\w+\.py)`", page.read_text(encoding="utf-8")):
            found += 1
            places = (ROOT, ROOT / "tiedparam")
            exists = any((place / path).exists() for place in places)
            assert exists, f"{page.name} speaks of {path}"
    assert found > 40


def test_a_newcomer_finds_every_page_for_maintainers():
    index = (MAINTAINERS / "index.md").read_text(encoding="utf-8")
    for page in {*MAINTAINERS.glob("*.md")} - {MAINTAINERS / "index.md"}:
        assert f"]({page.name})" in index, f"{page.name} is not on the page of maintainers"
    for page in MAINTAINERS.glob("*.md"):
        words = len(page.read_text(encoding="utf-8").split())
        assert words <= 2_500 or page.name == "features.md", f"{page.name} has {words} words"
