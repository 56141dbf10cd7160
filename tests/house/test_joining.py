"""What is said to those who join agrees with what there is: versions, sessions, commands."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import tiedparam as tp
from tests.support import ROOT, record, tomllib
from tiedparam.testing import check_rule


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def sessions_of(source: str) -> set[str]:
    """The functions of a noxfile that are sessions."""
    return {
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and any("nox.session" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def test_sessions_are_found_however_they_are_written():
    source = (
        "@nox.session\ndef a(s): ...\n@nox.session(tags=['ci'])\n@nox.parametrize('x', [1])\n"
        "def b(s, x): ...\ndef c(): ...\n"
    )
    assert sessions_of(source) == {"a", "b"}


def test_every_session_is_explained():
    sessions = sessions_of(text_of("noxfile.py"))
    assert sessions >= {"lint", "types", "tests"}
    rows = re.findall(r"^\| `(\w+)` \| \S", text_of("CONTRIBUTING.md"), re.MULTILINE)
    assert sessions == set(rows)


# Versions ---------------------------------------------------------------------------------


def pairs_in_the_noxfile() -> list[tuple[str, str]]:
    """Python and torch of the session `tests`."""
    (value,) = (
        node.value
        for node in ast.parse(text_of("noxfile.py")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PAIRS"
    )
    return ast.literal_eval(value)


def two(version: str) -> str:
    """``3.11.7`` → ``3.11``."""
    return ".".join(version.split(".")[:2])


def test_every_pair_has_its_record_and_nothing_else_has(pytestconfig):
    if pytestconfig.getoption("record", None):
        pytest.skip("this run makes the record")
    records = [json.loads(path.read_text()) for path in (ROOT / "docs" / "tested").iterdir()]
    tested = [(two(run["python"]), run["torch"].partition("+")[0]) for run in records]
    assert sorted(tested) == sorted(pairs_in_the_noxfile())
    for run in records:
        assert run["passed"] > 5_000
        assert "changes" not in run["commit"]


def test_a_run_of_a_part_is_not_noted(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)  # a part is below the floor of coverage
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.record", "--record", tmp_path]
    command += ["-p", "no:cacheprovider", "-q", "-n", "1", "-k", "interrupt_is_one", "tests/cli"]
    run = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=200)
    assert "1 passed" in run.stdout
    assert "not recorded: only a part of the tests was asked for" in run.stdout
    assert not list(tmp_path.iterdir())


def test_outside_of_git_nothing_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)  # as a source distribution is
    said, paths = [], ["tests"]
    reporter = SimpleNamespace(stats={}, write_line=said.append)
    config = SimpleNamespace(
        getoption=lambda name: "docs/tested",
        getini=lambda name: paths,
        option=SimpleNamespace(keyword="", markexpr=""),
        args=paths,
    )
    record.pytest_terminal_summary(reporter, pytest.ExitCode.OK, config)
    assert said == ["not recorded: there is no commit to name outside of git"]
    assert not list(tmp_path.iterdir())


def test_what_is_declared_is_what_was_run():
    pythons, torches = (list(values) for values in zip(*pairs_in_the_noxfile(), strict=True))
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    (torch_range,) = (need for need in project["dependencies"] if need.startswith("torch"))
    assert torch_range == f"torch>={min(map(two, torches), key=numbers)},<3"
    assert project["requires-python"] == f">={min(pythons, key=numbers)}"
    classifier = "Programming Language :: Python :: 3."
    minors = [c.removeprefix(classifier) for c in project["classifiers"] if classifier in c]
    assert [f"3.{minor}" for minor in minors] == sorted(set(pythons), key=numbers)
    oldest, *_, newest = sorted(map(two, torches), key=numbers)
    first, *_, last = sorted(pythons, key=numbers)
    said = f"Python {first} to {last} and torch {oldest} to {newest}"
    for page in ("README.md", "docs/maintainers/versions.md"):
        assert said in text_of(page)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_the_commit_hook_has_the_versions_of_the_constraints():
    pins = re.findall(r'"([\w.-]+==[^"]+)"', text_of(".pre-commit-config.yaml"))
    assert pins
    assert set(pins) <= set(text_of("tests/constraints.txt").splitlines())


def test_workflows_run_nox_in_the_python_of_the_constraints():
    (pinned,) = re.findall(r"on Python (\S+?)\.? ", text_of("tests/constraints.txt"))
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        lines = [line.strip() for line in workflow.read_text(encoding="utf-8").splitlines()]
        starts = [at for at, line in enumerate(lines) if line.startswith("python-version:")]
        assert starts
        for at in starts:  # of several versions in a block the last is `python`
            last = at + 2 if lines[at].endswith("|") else at
            assert lines[last].split()[-1].strip('"') == pinned


def test_the_citation_names_this_version():
    assert f"\nversion: {tp.__version__}\n" in text_of("CITATION.cff")


def test_the_command_for_versions_works_and_the_form_asks_for_it():
    (command,) = re.findall(r"^python -c .*$", text_of("CONTRIBUTING.md"), re.MULTILINE)
    assert command in " ".join(text_of(".github/ISSUE_TEMPLATE/fault.yml").split())
    _, *arguments = shlex.split(command)
    printed = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, check=True, capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    assert printed.split()[-2:] == [torch.__version__, tp.__version__]


# A law is one file ------------------------------------------------------------------------


def file_of_a_law() -> str:
    """The block of CONTRIBUTING.md that is the whole file of a law: it opens with the docstring."""
    text = text_of("CONTRIBUTING.md")
    (source,) = re.findall(r'^```python\n(""".*?)^```$', text, re.MULTILINE | re.DOTALL)
    return source


def test_the_file_of_a_law_imports_only_from_the_room_below():
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else name.name
        for node in ast.walk(ast.parse(file_of_a_law()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in node.names
    }
    assert {name for name in imported if name.startswith("tiedparam")} == {"tiedparam.laws"}


@pytest.mark.usefixtures("registry")
def test_the_file_of_a_law_keeps_the_contract(tmp_path, monkeypatch):
    name = "law_of_contributing"
    (tmp_path / f"{name}.py").write_text(file_of_a_law(), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(tp.available_rules())
    importlib.import_module(name)
    (law,) = set(tp.available_rules()) - before
    report = check_rule(tp.available_rules()[law])
    assert len(report.examples) > 1
