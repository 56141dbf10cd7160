"""A pytest plugin that notes a run of all tests, for the table in docs/maintainers/versions.md.

``pytest -p tests.support.record --record FOLDER`` writes one file for each pair of Python and
torch, and only if the whole suite was asked for and nothing failed.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
from typing import Any

import pytest
import torch

from tests.support import ROOT, peers


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", metavar="FOLDER", help="note this run of all tests there")


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """Write the file, from the counts that the last line shows."""
    folder = config.getoption("record")
    if folder is None or hasattr(config, "workerinput"):  # one of xdist's workers
        return
    counts = {kind: len(reports) for kind, reports in terminalreporter.stats.items()}
    if config.option.keyword or config.option.markexpr or config.args != config.getini("testpaths"):
        terminalreporter.write_line("not recorded: only a part of the tests was asked for")
    elif exitstatus != pytest.ExitCode.OK:
        terminalreporter.write_line("not recorded: not everything passed")
    elif not (ROOT / ".git").exists():  # an sdist's folder; a repository around it is another one
        terminalreporter.write_line("not recorded: there is no commit to name outside of git")
    else:
        path = ROOT / folder / f"{_python()}-{_torch()}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_record(counts, folder), indent=2) + "\n", encoding="utf-8")
        terminalreporter.write_line(f"recorded in {path}")


def _record(counts: dict[str, int], folder: str) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(folder),
        "passed": counts.get("passed", 0),
        "skipped": counts.get("skipped", 0),
        "peers": {name: version for name in sorted(peers()) if (version := _version(name))},
    }


def _python() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def _torch() -> str:
    return re.match(r"[\d.]+", torch.__version__)[0]  # type: ignore[index]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(folder: str) -> str:
    """The commit, and whether files other than the records differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{folder}")
    return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
