"""A case, and the list of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.goals import Goal
from benchmarks.measuring import Run


@dataclass(frozen=True)
class Case:
    """A named measurement.

    Attributes:
        title: one line for the docs.
        measure: adds comparisons to the run.
        goals: what they should show.
        default_allocator: whether the second column is worth the time.
        in_quick: whether ``--quick`` runs it.
    """

    name: str
    title: str
    measure: Callable[[Run], None]
    goals: tuple[Goal, ...] = ()
    default_allocator: bool = True
    in_quick: bool = True


CASES: dict[str, Case] = {}


def case(
    name: str, title: str, goals: Sequence[Goal] = (), **settings: bool
) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    """Enrol a case."""

    def enrol(measure: Callable[[Run], None]) -> Callable[[Run], None]:
        CASES[name] = Case(name, title, measure, tuple(goals), **settings)
        return measure

    return enrol


ANY_RULE = tuple(
    Goal(f"any rule, {mode}, batch 32, where dense takes ≥ 1 ms: ≤ 1.05 × dense",
         "ratio", 1.05, mode, batch=32, dense_ms=1.0)
    for mode in ("inference", "training")
)  # fmt: skip
ANY_RULE_TRAINING = tuple(goal for goal in ANY_RULE if goal.mode == "training")


def placed(run: Run, layer: Any) -> Any:
    """The layer on the device of the run."""
    return layer.to(run.device)
