"""mypy and pyright on a user's script: it is clean, and mistakes in it are found.

Skipped where they are not installed, unless TIEDPARAM_TYPE_CHECKERS=required: CI sets it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support import ROOT

SCRIPT = (ROOT / "tests" / "house" / "users_script.py").read_text(encoding="utf-8")
MISTAKES = {
    "a rule's name": ('"channel_shared"', '"channel_share"'),
    "an option's name": ('"row_repeat", groups=2, o', '"row_repeat", group=2, o'),
    "a value of an option": ('ChannelShared(over="in")', 'ChannelShared(over="inn")'),
    "init": ('init="exact"', 'init="exactly"'),
    "no source": ("source=model.second, ", ""),
}
"""Five mistakes: what is right, and what is wrong."""

MORE = {
    "a value beside a name": ('over="out"', 'over="inn"'),
    "a number as text": ('"row_repeat", groups=2)', '"row_repeat", groups="2")'),
    "a rule's name, to look": ('"flip_sym")', '"flip_sim")'),
    "a form": ('compute="dense"', 'compute="dens"'),
    "on_unfit": ('on_unfit="skip"', 'on_unfit="skipped"'),
    "a weight and free values": ("free=torch.zeros_like(parameter)", "parameter, free=parameter"),
    "a part": ("rows=slice(0, 8)", "rows=8"),
    "a law of a list": ('ChannelShared(over="in")])', "3])"),
    "what kind of layer comes back": ("first: nn.Conv2d", "first: nn.Linear"),
}


def mistaken(right: str, wrong: str) -> tuple[str, int]:
    """The script with one mistake, and the line where it stands."""
    before, found, after = SCRIPT.partition(right)
    assert found, f"the script has no {right!r}"
    return before + wrong + after, before.count("\n") + 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The script, with each mistake alone and with the five together; and laws of users."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "right.py").write_text(SCRIPT, encoding="utf-8")
    for number, (right, wrong) in enumerate((MISTAKES | MORE).values()):
        text, _ = mistaken(right, wrong)
        (folder / f"wrong_{number}.py").write_text(text, encoding="utf-8")
    text = SCRIPT
    for right, wrong in MISTAKES.values():
        text = text.replace(right, wrong, 1)
    (folder / "five.py").write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "tests" / "house" / "users_rules.py", folder)
    return folder


def environment() -> dict[str, str]:
    """This checkout first, and the programs that are installed beside this Python."""
    folder = str(Path(sys.executable).parent)
    path = os.pathsep.join([folder, os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def run(module: str, *arguments: str, cwd: Path) -> str:
    """What a type checker prints; skips the test where there is none."""
    if find_spec(module) is None:
        if os.environ.get("TIEDPARAM_TYPE_CHECKERS") == "required":
            pytest.fail(f"{module} is not installed")
        pytest.skip(f"{module} is not installed")
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def found_by_mypy(folder: Path) -> set[tuple[str, int]]:
    """The files and lines with errors."""
    said = run("mypy", "--strict", "--cache-dir", str(folder / "cache"), ".", cwd=folder)
    found = re.findall(r"^(\w+\.py):(\d+): error:", said, re.MULTILINE)
    return {(name, int(line)) for name, line in found}


def found_by_pyright(folder: Path) -> set[tuple[str, int]]:
    """The files and lines with errors."""
    data = json.loads(run("pyright", "--outputjson", ".", cwd=folder))
    assert data["summary"]["filesAnalyzed"] == len(list(folder.glob("*.py")))
    return {
        (Path(each["file"]).name, each["range"]["start"]["line"] + 1)
        for each in data["generalDiagnostics"]
        if each["severity"] == "error"
    }


@pytest.mark.parametrize("find", [found_by_mypy, found_by_pyright], ids=["mypy", "pyright"])
def test_each_mistake_is_found_where_it_stands_and_nothing_else(find, folder):
    lines = [mistaken(*each)[1] for each in (MISTAKES | MORE).values()]
    five = {("five.py", line) for line in lines[: len(MISTAKES)]}
    assert len(five) == len(MISTAKES) == 5
    assert find(folder) == five | {(f"wrong_{n}.py", line) for n, line in enumerate(lines)}


def test_every_public_symbol_has_a_type():
    said = run(
        "pyright", "--verifytypes", "tiedparam", "--ignoreexternal", "--outputjson", cwd=ROOT
    )
    found = json.loads(said)["typeCompleteness"]
    wrong = {
        each["name"]: [one["message"] for one in each["diagnostics"]]
        for each in found["symbols"]
        if each["isExported"] and not each["isTypeKnown"]
    }
    assert not wrong
    assert found["completenessScore"] == 1
    assert found["exportedSymbolCounts"]["withKnownType"] > 1000
