"""What the measurements should show, as data, and how far they are from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measuring import rounded


@dataclass(frozen=True)
class Goal:
    """A bound on one figure; of several comparisons that it names, the worst counts.

    Attributes:
        text: as tables show it.
        measure: ``"speedup"`` (at least ``bound``), ``"ratio"`` of times or bytes, or
            ``"microseconds"`` over the other contender, or ``"absolute"`` microseconds (at
            most ``bound``).
        mode: ``"inference"``, ``"training"`` or another mode of the case.
        shapes: a part of the comparison's shapes.
        against: the contenders to compare with; those that were not measured do not count.
        dense_ms: only comparisons in which the reference takes at least so long.
    """

    text: str
    measure: str
    bound: float
    mode: str
    shapes: str = ""
    batch: int | None = None
    contender: str = "tiedparam"
    against: tuple[str, ...] = ("dense",)
    allocator: str = "fixed"
    dense_ms: float = 0.0

    def evaluate(self, comparisons: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The worst value, where it was found, and whether the goal is met."""
        at_least = self.measure == "speedup"
        values = list(self._values(comparisons))
        found: dict[str, Any] = {
            "goal": self.text,
            "bound": self.bound,
            "at_least": at_least,
            "value": None,
            "where": None,
            "met": None,
        }
        if values:
            value, where = (min if at_least else max)(values)
            found["value"], found["where"] = rounded(value), where
            found["met"] = value >= self.bound if at_least else value <= self.bound
        return found

    def _values(self, comparisons: Sequence[dict[str, Any]]) -> Iterator[tuple[float, str]]:
        for comparison in comparisons:
            if comparison["mode"] != self.mode or self.shapes not in comparison["shapes"]:
                continue
            if self.batch is not None and comparison.get("batch") != self.batch:
                continue
            contenders = comparison["contenders"]
            mine = contenders.get(self.contender, {}).get(self.allocator)
            reference = next(iter(contenders.values())).get(self.allocator, {})
            if mine is None or reference.get("ms", 0.0) < self.dense_ms:
                continue
            for name in self.against:
                other = contenders.get(name, {}).get(self.allocator)
                if other is not None:
                    yield self._value(mine, other), f"{comparison['shapes']}, against {name}"

    def _value(self, mine: dict[str, float], other: dict[str, float]) -> float:
        if self.measure == "speedup":
            return other["ratio"] / mine["ratio"]
        if self.measure == "ratio":
            return mine["ratio"] / other["ratio"]
        if self.measure == "absolute":
            return mine["ms"] * 1e3
        if other["extra_us"] == 0:  # the reference: the difference round by round is exact
            return mine["extra_us"]
        return (mine["ms"] - other["ms"]) * 1e3
