"""The cases: which layers, which contenders, and what they should show.

A module here enrols its cases by `case`; the list below says in which order they come.
"""

from __future__ import annotations

import importlib

from benchmarks import goal_cases
from benchmarks.cases.enrolled import CASES, Case, case

__all__ = ["CASES", "Case", "case"]

for _name in (
    "layers",
    "flip_sym_expansion",
    "expansions",
    "whole_models",
    "kept_weights",
    "every_rule",
    "starting",
    "forms",
    "bytes_needed",
    "families",
    "peers",
    "prediction",
):
    importlib.import_module(f"{__name__}.{_name}")

case("goals", "What each law should gain, and what was reached", default_allocator=False)(
    goal_cases.measure
)
