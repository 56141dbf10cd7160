"""Ties that are lawful but were probably not intended: they free nothing, or keep almost nothing.

A random weight of ``N`` i.i.d. entries is ``chance = √(1 − free/N)`` away from a linear law, and
the nearest lawful weight keeps ``√(free/N)`` of its norm: ``row_repeat`` on 512 outputs keeps
4 % (S37). That is what ``init="project"`` makes of every fresh layer, and of a trained one that
has nothing of the law. The projection is orthogonal, so ``kept² + residual² = 1``, and a weight
that keeps less than `KEPT` is at least ``0.95 · chance`` away, whatever the law.

``max_residual=`` is the user's own limit, above which a tie is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

from torch import Tensor

from tiedparam.laws.coded import data_of, is_tag
from tiedparam.laws.registry import law_text
from tiedparam.laws.rule import Rule
from tiedparam.tie.record import Tie
from tiedparam.util.errors import Reason, TieError, shortened, warn

KEPT = 0.2
"""A weight that keeps less of its norm than this was ruined: 4 % of its energy is left."""
ENTRIES = 128
"""With fewer than so many entries a weight may cancel by luck, and chance says little."""
SHOWN = 3
"""So many ties of one model are described; the others are counted."""
LOOK_FIRST = (
    "For fresh layers pass init='rescale'; for trained ones look first, with tiedparam.residual or "
    "tiedparam.scan, or set a limit with max_residual=."
)
"""What to do about ties that were probably not intended."""
CHOOSE_A_NEARER_LAW = (
    "Leave it dense, choose a law that it nearly keeps (tiedparam.scan lists them), or raise the "
    "limit."
)
"""What to do about a weight that is too far from its law."""
TO_TIE_AGAIN = (
    "To tie again call untie_model first, and reload trained weights: projections replaced them."
)


@dataclass(frozen=True)
class Concern:
    """A tie that was probably not intended.

    Attributes:
        where: the tensor, as messages name it.
        tensor_name: its name in its layer.
        rule: the rule that ties it.
        weight: its values before the tie.
        kept: the share of its norm that the nearest lawful weight has; None if the tie frees
            nothing, or leaves no value to train.
        residual: how far the weight was from the law, where it keeps too little.
    """

    where: str
    tensor_name: str
    rule: Rule
    weight: Tensor
    kept: float | None
    residual: float | None = None

    def fact(self) -> str:
        """The tie, how much it keeps, and the options of its rule that would do better."""
        rule, entries = self.rule, self.weight.numel()
        if rule.free_count == 0:
            fact = f"leaves nothing to train: the law fixes all {entries:,} values."
        elif self.kept is None:
            fact = f"frees nothing: {rule.free_count:,} of {entries:,} values are stored."
        else:
            chance = math.sqrt(1 - rule.free_count / entries)
            fact = (
                f"keeps {self.kept:.1%} of the weight, which was no nearer to the law than a "
                f"random one (residual {self.residual:.3f}, chance {chance:.3f})."
            )
        does = [f"{shown} would {result}" for shown, result in self.others.items()]
        others = f" {', '.join(does)}." if does else ""
        where, law = shortened(self.where, 160), shortened(str(rule), 160)
        return shortened(f"the tie of {where} by '{law}' {fact}{others}", 600)

    def advice(self) -> str:
        """What to do, with the call that looks before tying."""
        if self.rule.free_count == 0:
            return "Call remove_tie, load the weight again, and tie by fewer of the laws."
        if self.kept is None and not self.others:
            return "Leave it out, or choose another law: tiedparam.scan(model) tries all."
        law, options = self.rule.statement()
        tensor = [] if self.tensor_name == "weight" else [f"'{self.tensor_name}'"]
        shown = _shown(options) if self.kept is not None else next(iter(self.others), "")
        call = ", ".join(["layer", law_text(law), *tensor, *([shown] if shown else [])])
        before = f"how far it is: tiedparam.residual({shortened(call, 160)})."
        if self.kept is None:
            return (
                "Call remove_tie (it changes no value here) and tie again with another option. For "
                "a fresh layer add init='rescale', which keeps its scale; for a trained one check "
                f"first {before}"
            )
        if not self._shares:
            return (
                "No two entries share a value, so init='rescale' would change nothing: load the "
                f"weight again, and check before you tie {before}"
            )
        return (
            "For a fresh layer call remove_tie and tie again with init='rescale', which keeps its "
            "scale. A trained weight was replaced by its projection: load it again, and check "
            f"before you tie {before}"
        )

    @property
    def _shares(self) -> bool:
        """Whether any two entries share a free value."""
        rule = self.rule
        return not rule.has_orbits or any(bool((c > 1).any()) for c in rule.multiplicities())

    @cached_property
    def others(self) -> dict[str, str]:
        """The rule's own variants that free something and keep more, really tried."""
        kind, entries, found = type(self.rule), self.weight.numel(), dict[str, str]()
        if data_of(self.rule):
            return {}  # the pattern is the user's, and no variant is near to it
        try:
            layout = self.rule.bound_layout
            for options in kind.variants(layout):
                other = kind(**options)
                misfit = other.bind(layout, self.weight.dtype)
                unlike = other.options() not in ({}, self.rule.options())
                if misfit is not None or other.free_count >= entries or not unlike:
                    continue
                if self.kept is None:
                    found[_shown(other.options())] = f"store {other.free_count:,}"
                elif (kept := _kept(other.residual(self.weight))) > KEPT:
                    found[_shown(other.options())] = f"keep {kept:.0%}"
        except Exception:  # a user's rule may fail to make its variants
            return {}
        return found


def concern_of(tie: Tie, where: str, weight: Tensor, *, asked: bool) -> Concern | None:
    """What is odd about a tie that was just made, or None.

    Args:
        tie: the tie.
        where: its tensor, as messages name it.
        weight: the values before the tie.
        asked: whether the user has said that the nearest lawful weight need not be near.
    """
    rule, residual = tie.rule, tie.residual_at_tying
    free, entries = rule.free_count, weight.numel()
    if free == 0 and rule.reads_layers:
        return None  # a copy takes another layer's values: its own are gone by definition
    if free == 0 or free >= entries:
        return Concern(where, tie.tensor_name, rule, weight, None)
    if asked or residual is None or entries < ENTRIES or rule.reads_layers:
        return None  # nor is chance known of a law that reads layers
    kept = _kept(residual)
    if kept >= KEPT:
        return None
    return Concern(where, tie.tensor_name, rule, weight, kept, residual)


class Concerns:
    """Those of a whole model, for one warning."""

    def __init__(self) -> None:
        self.count: int = 0
        self._facts: list[str] = []

    def note(self, concern: Concern) -> None:
        """Count one; the first are described while their weights are there."""
        self.count += 1
        if len(self._facts) < SHOWN:
            self._facts.append(concern.fact())

    def tell(self, ties: int, *, dry_run: bool) -> None:
        """Warn of those that were noted, if any, among so many ``ties``."""
        if not self.count:
            return
        more = self.count - len(self._facts)
        were = "was" if self.count == 1 else "were"
        lines = [f"{self.count:,} of {ties:,} ties {were} probably not intended:", *self._facts]
        lines += [f"… and {more:,} more."] if more else []
        warn("\n".join(lines), LOOK_FIRST if dry_run else f"{LOOK_FIRST} {TO_TIE_AGAIN}")


# The limit that a user may set ----------------------------------------------------------------


def check_max_residual(value: object) -> None:
    """Raise unless it is a limit of residuals, or None.

    Raises:
        TypeError: if it is not a number.
        TieError: if it is negative or NaN.
    """
    if value is None:
        return
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"max_residual= takes a number, not {type(value).__name__}")
    if not value >= 0:  # type: ignore[operator]  # refuses NaN too
        raise TieError(
            f"max_residual={value!r}",
            f"max_residual={value!r} is not a limit.",
            "Choose a number from 0, for lawful weights only, to 1, for all.",
        )


def why_distant(residual: float | None, limit: float | None) -> Reason | None:
    """Why a weight is further from its law than the user allows, or None."""
    if limit is None:
        return None
    if residual is None:
        return Reason(
            "its weight has no values yet, so its residual is not known.",
            "Load it first, or leave out max_residual=.",
        )
    if not residual <= limit:  # true for NaN, too
        return Reason(
            f"its residual {residual:.3g} is above the limit of {limit:g}.", CHOOSE_A_NEARER_LAW
        )
    return None


def _kept(residual: float) -> float:
    """The share of the norm; by Pythagoras, since the projection is orthogonal."""
    return math.sqrt(max(0.0, 1 - residual**2)) if math.isfinite(residual) else 1.0


def _shown(options: Mapping[str, Any]) -> str:
    """The options as a call has them; data, for which a tag stands, as a variable of its name."""
    return ", ".join(
        f"{key}={key if is_tag(value) else repr(value)}" for key, value in options.items()
    )
