"""What the measurements should show, as data, and how far they are from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.measuring import rounded


class Found(NamedTuple):
    """One value of a goal, with its quartiles, and whether it will do."""

    value: float
    where: str
    met: bool
    spread: tuple[float, float] | None
    floor: float | None
    instead: float | None


@dataclass(frozen=True)
class Goal:
    """A bound on one figure; of several comparisons that it names, the worst counts.

    Attributes:
        text: as tables show it.
        measure: ``"speedup"`` (at least ``bound``), ``"ratio"`` of times or bytes, or
            ``"microseconds"`` or ``"milliseconds"`` over the other contender, or ``"absolute"``
            microseconds, or a ``"count"`` of something (at most ``bound``).
        mode: ``"inference"``, ``"training"`` or another mode of the case.
        shapes: a part of the comparison's shapes.
        against: the contenders to compare with; those that were not measured do not count.
        dense_ms: only comparisons in which the reference takes at least so long.
        row: of the table of goals.
        floor: a contender that shows what torch's operations allow.
        or_microseconds: so little over the other contender will do as well.
        or_dense: a comparison with the note ``form="dense"`` will do as well.
        tried: what was tried, for a goal that is missed.
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
    row: str = ""
    floor: str = ""
    or_microseconds: float | None = None
    or_dense: bool = False
    tried: str = ""

    @property
    def at_least(self) -> bool:
        """Whether large values are good."""
        return self.measure == "speedup"

    def evaluate(self, comparisons: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The worst value, where it was found, and whether the goal is met."""
        values = list(self._values(comparisons))
        found: dict[str, Any] = {
            "goal": self.text,
            "measure": self.measure,
            "bound": self.bound,
            "at_least": self.at_least,
            "value": None,
            "spread": None,
            "floor": None,
            "instead": None,
            "where": None,
            "met": None,
            "tried": self.tried,
        }
        if values:
            sign = 1 if self.at_least else -1
            worst = min(values, key=lambda v: (v.met, sign * v.value))
            found["value"], found["where"] = rounded(worst.value), worst.where
            if worst.spread is not None:
                found["spread"] = [rounded(edge) for edge in worst.spread]
            found["floor"] = None if worst.floor is None else rounded(worst.floor)
            found["instead"] = None if worst.instead is None else rounded(worst.instead)
            found["met"] = worst.met
        return found

    def _values(self, comparisons: Sequence[dict[str, Any]]) -> Iterator[Found]:
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
            floor = contenders.get(self.floor, {}).get(self.allocator)
            dense = self.or_dense and comparison.get("form") == "dense"
            for name in self.against if self.measure != "count" else (self.contender,):
                other = contenders.get(name, {}).get(self.allocator)
                if other is None:
                    continue
                value = self._value(mine, other)
                met = value >= self.bound if self.at_least else value <= self.bound
                instead = None
                if not met and self.or_microseconds is not None:
                    instead = _microseconds(mine, other)
                    met = instead <= self.or_microseconds
                yield Found(
                    value,
                    f"{comparison['shapes']}, against {name}",
                    met or dense,
                    self._spread(mine, other),
                    None if floor is None else self._value(floor, other),
                    instead,
                )

    def _value(self, mine: dict[str, float], other: dict[str, float]) -> float:
        if self.measure == "speedup":
            return other["ratio"] / mine["ratio"]
        if self.measure == "ratio":
            return mine["ratio"] / other["ratio"]
        if self.measure == "absolute":
            return mine["ms"] * 1e3
        if self.measure == "count":
            return mine["count"]
        extra = _microseconds(mine, other)
        return extra / 1e3 if self.measure == "milliseconds" else extra

    def _spread(
        self, mine: dict[str, float], other: dict[str, float]
    ) -> tuple[float, float] | None:
        """From the quartiles, both ways at their worst."""
        if self.measure not in ("speedup", "ratio") or "lower" not in mine:
            return None
        edges = mine["lower"] / other["upper"], mine["upper"] / other["lower"]
        return (1 / edges[1], 1 / edges[0]) if self.measure == "speedup" else edges


def _microseconds(mine: dict[str, float], other: dict[str, float]) -> float:
    if other["extra_us"] == 0:  # the reference: the difference round by round is exact
        return mine["extra_us"]
    return (mine["ms"] - other["ms"]) * 1e3


def number(value: float) -> str:
    """Three digits, without exponents: 0.0123, 1.23, 12.3, 1230."""
    shown = f"{value:.3g}"
    return f"{float(shown):.0f}" if "e" in shown and abs(value) >= 1 else shown
