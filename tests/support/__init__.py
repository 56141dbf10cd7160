"""What tests of several rooms share; no test stands here."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tiedparam.tie.lookup import tie_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "CHILDREN_ARE_TRACED",
    "ROOT",
    "computing_of",
    "form_of",
    "older_than",
    "peers",
    "tomllib",
    "with_fsdp2",
]

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""

CHILDREN_ARE_TRACED = "COVERAGE_PROCESS_CONFIG"
"""What coverage sets in the environment, so that it counts lines in the processes of tests too."""


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


def computing_of(layer: nn.Module, tensor_name: str = "weight") -> Any:
    """How a tied layer computes; None if densely alone."""
    return tie_of(layer, tensor_name).computing


def form_of(layer: nn.Module, *, traced: bool = False) -> str:
    """The form in which a tied layer is computed first while it trains, or in traced graphs."""
    tie = tie_of(layer, "weight")
    order = tie.computing.order(tie.rule, None, True, False) if tie.computing else ()
    names = [form.name for form in order if form.where == "anywhere" or not traced]
    return names[0] if names else "dense"
