"""What tests of several rooms share; no test stands here."""

import re
import sys
from pathlib import Path

import pytest
import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["ROOT", "older_than", "peers", "tomllib", "with_fsdp2"]

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""


def older_than(version: str) -> bool:
    """Whether this torch is older: then it lacks what a test is about, or does it otherwise."""
    return torch.__version__ < version


with_fsdp2 = pytest.mark.skipif(
    older_than("2.7"), reason="fully_shard of torch 2.6 computes on accelerators only"
)


def peers() -> set[str]:
    """The packages that pages may use and an environment may lack."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = project["optional-dependencies"]["ecosystem"]
    return {re.match(r"[\w-]+", requirement)[0] for requirement in needed}
