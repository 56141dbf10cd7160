"""docs/recipes/shell.md: bash runs its commands, and they print what the page says.

The ```sh blocks of the page run in order in one empty folder, each by a bash of its own, which
must end well. A ```text block that follows one is all that it prints, errors and warnings too;
line breaks and runs of spaces may differ. `tiedparam` and `python` are stand-ins there, which hand
their arguments to this process: it has torch imported, which takes seconds for every command.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from itertools import pairwise
from multiprocessing.connection import Listener
from pathlib import Path

import pytest

from tests.support import ROOT, older_than
from tests.support.pages import blocks_of
from tiedparam.__main__ import main

PAGE = ROOT / "docs" / "recipes" / "shell.md"
EXAMPLE = ROOT / "docs" / "examples" / "shell.sh"

_STAND_IN = """\
#!{python} -ISB
import sys
from multiprocessing.connection import Client

name = sys.argv[0].rpartition("/")[2]
text = sys.stdin.read() if name == "python" else ""
with Client({address!r}, "AF_UNIX") as caller:
    caller.send((name, sys.argv[1:], text))
    out, err, code = caller.recv()
sys.stdout.write(out)
sys.stdout.flush()
sys.stderr.write(err)
sys.exit(code)
"""


class Bash:
    """A bash whose `tiedparam` and `python` are those of this process."""

    def __init__(self, tools: Path) -> None:
        address = str(tools / "calls")
        self._listener = Listener(address, "AF_UNIX")
        for name in ("tiedparam", "python"):
            file = tools / name
            file.write_text(_STAND_IN.format(python=sys.executable, address=address), "utf-8")
            file.chmod(0o755)
        self._environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
        threading.Thread(target=self._serve, daemon=True).start()

    def run(self, script: str) -> tuple[int, str]:
        """The exit code of some lines, and all that they print."""
        done = subprocess.run(
            ["bash", "-c", script],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            timeout=100,
        )
        return done.returncode, done.stdout

    def close(self) -> None:
        """Take no more calls."""
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                caller = self._listener.accept()
            except OSError:  # closed
                return
            with caller:
                caller.send(_answer(*caller.recv()))


def _answer(name: str, arguments: list[str], text: str) -> tuple[str, str, int]:
    """What a program prints to stdout and stderr, and its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if name == "tiedparam":
                code = main(arguments)
            else:
                assert arguments == ["-"], "the page gives its Python by stdin"
                exec(compile(text, "<stdin>", "exec"), {"__name__": "__main__"})
                code = 0
        except SystemExit as end:  # from argparse
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
    return out.getvalue(), err.getvalue(), code


@pytest.fixture
def bash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tiedparam"])
    monkeypatch.setenv("COLUMNS", "100")
    tools = tempfile.mkdtemp()  # a short name, as sockets need
    shell = Bash(Path(tools))
    yield shell
    shell.close()
    shutil.rmtree(tools)


def check(bash: Bash, page: Path) -> None:
    """Run the blocks of a page, and compare what they print."""
    blocks = blocks_of(page)
    kinds = [block.kind for block in blocks]
    assert set(kinds) <= {"sh", "text"}, "only these kinds are checked"
    assert kinds[0] == "sh"
    assert ("text", "text") not in pairwise(kinds), "an output nobody checks"
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block.kind == "text":
            continue
        shown = following.body if following is not None and following.kind == "text" else ""
        code, printed = bash.run(block.body)
        assert code == 0, f"the commands at line {block.line} of {page} fail:\n{printed}"
        assert printed.split() == shown.split(), (
            f"the commands at line {block.line} of {page} print\n{printed}\nand the page says\n"
            f"{shown}"
        )


@pytest.mark.usefixtures("registry")
@pytest.mark.skipif(older_than("2.7"), reason="torch writes a little larger files since 2.7")
def test_the_commands_print_what_the_page_says(bash):
    assert blocks_of(PAGE)[0].body.strip() == EXAMPLE.read_text(encoding="utf-8").strip()
    check(bash, PAGE)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("```sh\ntiedparam rules >rules\n```\n\n```text\nmore\n```\n", "print"),
        ("```sh\ntiedparam report none.pt\n```\n", "fail"),
        ("```sh\ntiedparam report\n```\n", "fail"),
        ("```sh\npython - <<END\n1 / 0\nEND\n```\n", "ZeroDivisionError"),
        ("```sh\necho 1\n```\n", "print"),
        ("```python\nprint(1)\n```\n", "only these kinds"),
        ("```sh\necho 1\n```\n\n```text\n1\n```\n\n```text\n2\n```\n", "nobody checks"),
    ],
    ids=["output", "error", "usage", "python", "silent", "kind", "text"],
)
def test_what_is_wrong_on_a_page_is_noticed(bash, tmp_path, text, what):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(AssertionError, match=what):
        check(bash, page)


def test_what_is_right_on_a_page_is_not_noticed(bash, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\ntiedparam --version | cut -d ' ' -f 1\n```\n\n```text\ntiedparam\n```\n"
        "```sh\npython - <<END\nprint('a')\nEND\ntiedparam tie - 2>/dev/null || echo $?\n```\n"
        "```text\na 2\n```\n",
        encoding="utf-8",
    )
    check(bash, page)


def test_the_example_names_itself_a_bash_script():
    assert EXAMPLE.name == "shell.sh"
    assert EXAMPLE.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
    assert os.access(EXAMPLE, os.X_OK)
