"""The lines of the pages that start an example, by torchrun or alone: it takes such arguments.

What the examples do then, is tested with fewer steps in test_distributed.py and
test_tensor_parallel.py.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys

import pytest

from tests.support import ROOT

pytest.importorskip("torch.distributed.run")
pytest.importorskip("sklearn")

PAGE = ROOT / "docs" / "recipes" / "sharded.md"
LINES = [
    line
    for block in re.findall(
        r"^```sh\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    for line in block.splitlines()
]


class ParsedError(Exception):
    """The script has understood its arguments: that is all that is asked."""


@pytest.mark.parametrize("line", LINES)
def test_a_line_is_understood_by_torchrun_and_by_the_example(line, monkeypatch):
    from torch.distributed.run import get_args_parser

    program, *arguments = shlex.split(line)
    if program == "torchrun":
        options = get_args_parser().parse_args(arguments)
        script, arguments = options.training_script, options.training_script_args
        assert options.nproc_per_node in ("2", "8")
    else:
        assert program == "python"
        script, *arguments = arguments
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser):
        parse(parser)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(ParsedError):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_the_lines_are_found():
    assert len(LINES) == 6
    assert sum(line.startswith("torchrun ") for line in LINES) == 5
