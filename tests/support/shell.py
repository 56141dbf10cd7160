"""The shell, called in this process and in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tiedparam.__main__ import main


def call(capsys, *arguments):
    """Exit code, stdout and stderr of one command in this process."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def good(capsys, *arguments):
    code, out, err = call(capsys, *arguments)
    assert (code, err) == (0, "")
    return out


def refused(capsys, *arguments, out=""):
    """The line, or the list of reasons, with which a command fails, which changes no file."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    code, printed, err = call(capsys, *arguments)
    assert code == 1
    assert printed == "" if out == "" else out in printed
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1 or err.splitlines()[0].endswith(":")
    assert "Traceback" not in err
    assert err.startswith(("python -m tiedparam ", "tiedparam "))
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    return err


def usage(capsys, *arguments):
    """What argparse says of a wrong use."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def run(*arguments, **options):
    command = [sys.executable, "-m", "tiedparam", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=environment, **options
    )
