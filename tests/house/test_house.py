"""The rules of the house: files and functions that can be read, errors of three parts, rooms."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.support import ROOT, tomllib

LIBRARY = ROOT / "tiedparam"
FILES = sorted(LIBRARY.rglob("*.py"))
LONGEST_FILE = 400
LONGEST_FUNCTION = 60
"""Lines, without the docstring."""


def name_of(file: Path) -> str:
    return file.relative_to(LIBRARY).as_posix()


def functions_of(source: str) -> Iterator[tuple[str, int]]:
    """Each function, and how many lines it has without its docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield node.name, lines


def errors_of(source: str) -> Iterator[tuple[int, int]]:
    """The line of each `TieError` that is made, and the number of its arguments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called == "TieError":
                starred = any(isinstance(value, ast.Starred) for value in node.args)
                yield node.lineno, 3 if starred else len(node.args) + len(node.keywords)


def test_no_file_is_too_long():
    sizes = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert len(sizes) > 50
    assert not {name: lines for name, lines in sizes.items() if lines > LONGEST_FILE}


def test_no_function_is_too_long():
    found = {
        f"{name_of(file)}::{name}": lines
        for file in FILES
        for name, lines in functions_of(file.read_text(encoding="utf-8"))
    }
    assert len(found) > 500
    assert not {name: lines for name, lines in found.items() if lines > LONGEST_FUNCTION}


def test_lines_are_counted_without_the_docstring():
    source = 'def f():\n    """Says\n\n    much."""\n    x = 1\n    return x\n\ndef g(): pass\n'
    assert dict(functions_of(source)) == {"f": 3, "g": 1}


def test_errors_say_where_fact_and_remedy():
    short = [
        f"{name_of(file)}:{line}"
        for file in FILES
        for line, count in errors_of(file.read_text(encoding="utf-8"))
        if count != 3
    ]
    assert not short, "TieError(where, fact, remedy)"


def test_errors_are_found_however_they_are_written():
    source = (
        'raise TieError("all")\nraise tp.TieError("a", "b", "c")\n'
        'TieError("a", *reason)\nTieError("a", "b", remedy="c")\nValueError("a")\n'
    )
    assert list(errors_of(source)) == [(1, 1), (2, 3), (3, 3), (4, 3)]


def test_every_room_has_a_layer():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "importlinter"
    ]["contracts"][0]
    layers = {room for row in contract["layers"] for room in row.split(" | ")}
    assert layers == {path.parent.name for path in LIBRARY.glob("*/__init__.py")}


# The tests --------------------------------------------------------------------------------

TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
PUBLIC = ("", "laws", "rules", "testing", "__main__")
"""What every test may import of `tiedparam`, and all below `rules`: `available_rules` gives it."""

SEEN_FROM_OTHER_ROOMS = {
    # how a layer computes, and what is kept of it, has no public name
    "tie.lookup": {"cli", "compute", "laws", "model"},
    # all that a law says it has, on any layer, which its signature must name
    "laws.forms": {"house"},
    # a module that takes the product in a graph and plain operations in a trace
    "util.torch_modes": {"products"},
    # what a file holds, judged without a model; damaged ones are read in every way there is
    "cli.model_from_file": {"files", "formats", "house", "model"},
    "formats.atomic": {"files"},
    "formats.safetensors": {"files"},
    "util.errors": {"formats"},
    # patched, so that a tie fails midway, a bar comes at once, and a table is out of date
    "state.optimizer_moves": {"layer"},
    "util.progress": {"cli"},
    "state.optimizer_laws": {"house"},
    # the order of tables, by which the pages of rules are judged
    "laws.rule_table": {"house"},
}
"""Private modules that tests of other rooms import, for now, and which rooms these are."""


def modules_imported_by(source: str) -> Iterator[str]:
    """The modules of the library that a test file imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "tiedparam":
                    yield name.name.partition(".")[2]
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "tiedparam":
            module = node.module.partition(".")[2]
            for name in node.names:
                below = LIBRARY.joinpath(*module.split("."), name.name)
                is_module = below.is_dir() or below.with_suffix(".py").exists()
                yield f"{module}.{name.name}".lstrip(".") if is_module else module


def test_private_modules_are_tested_in_their_room():
    seen = {}
    for file in TESTS:
        for module in modules_imported_by(file.read_text(encoding="utf-8")):
            room = module.split(".")[0]
            if module in PUBLIC or room in ("rules", file.parent.name):
                continue
            seen.setdefault(module, set()).add(file.parent.name)
    assert seen == SEEN_FROM_OTHER_ROOMS, "use public names, or test it in its room"


def test_no_test_file_is_imported_by_another():
    assert len(TESTS) > 50
    for file in TESTS:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) (\S+\.)?test_\w+", text, re.MULTILINE), file
