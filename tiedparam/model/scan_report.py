"""What a scan found: its rows, how they are ranked, and how they are shown."""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tiedparam.laws.rule import Rule
from tiedparam.model.columns import WHAT_IT_COSTS, WHAT_IT_GAINS, WHAT_IT_TIES, WHERE_IT_LIES
from tiedparam.model.near_copies import SAMPLED
from tiedparam.model.next_steps import in_python
from tiedparam.model.plan import Plan, PlanEntry
from tiedparam.model.reasons import Skipped
from tiedparam.util.errors import Reason, key_of
from tiedparam.util.table import Column, Table, TableReport, plain

_NAMED = 5
"""How many finds the headline names."""
NEAR = 0.5
"""The part of a random tensor's residual below which a tensor looks tied.

Three quarters of the square of what breaks the law are gone then. Training in itself leaves many
tensors at 0.6 to 0.9 of some law, kernels that are alike on both sides above all.
"""
_LUCK = 1e-3
"""How likely a model of random tensors may show a find."""
PAIRS_SET_THE_BOUND = "pairs= sets the bound."
"""How to compare more pairs of tensors, or fewer."""


@dataclass(frozen=True)
class Candidate:
    """One tensor and one law that it can carry.

    Attributes:
        layer: path of the layer in the model.
        tensor_name: which of its tensors.
        rule: the rule with its options, as text.
        rule_class: the rule.
        law: what a plan says of it: its name or class, or a list of laws that hold together.
        options: its options; a source is given as its path.
        shape: of the tensor.
        dense_values: how many entries it has.
        free_values: how many numbers the rule stores.
        multiplicity: how many entries share a free value, least and most; None for a copy.
        residual: ``‖W − project(W)‖ / ‖W‖``; 0 for a zero weight.
        expected: the root mean square residual of random tensors with the mean and the spread of
            this one.
        z_score: how many standard deviations ``residual²`` lies from that of such a tensor; far
            below zero means that the law is kept on purpose. None if all of them are equally far.
        p_value: how likely such a tensor is as near to the law as this one: at most this. None
            for a constant tensor.
        constant: whether all entries are equal: such a tensor keeps many laws trivially.
        multiply_adds_dense: multiply-adds per position without the tie, None if unknown.
        multiply_adds_tied: the same with the tie, in training.
        positions: on how many positions the layer works for the example; None without one.
        gain_inference: how many times as fast as without the tie the layer would compute without
            gradients, below 1 if it is slower: by the law's costs, for the example or a usual
            batch. None for a bias, or if it is not known.
        gain_training: the same with gradients, forward and backward.
    """

    layer: str
    tensor_name: str
    rule: str
    rule_class: type[Rule]
    law: Any
    options: Mapping[str, Any]
    shape: tuple[int, ...]
    dense_values: int
    free_values: int
    multiplicity: tuple[int, int] | None
    residual: float
    expected: float
    z_score: float | None
    p_value: float | None
    constant: bool
    multiply_adds_dense: int | None
    multiply_adds_tied: int | None
    positions: int | None = None
    gain_inference: float | None = None
    gain_training: float | None = None

    @property
    def compression(self) -> float:
        """Dense by free values; infinite for a copy."""
        return self.dense_values / self.free_values if self.free_values else math.inf

    @property
    def relative(self) -> float | None:
        """Residual by expected residual: 1 for a random tensor, 0 for a lawful one.

        Random is a tensor of the same mean and spread, so that a common offset of the entries,
        which every law that shares keeps, does not count. None for a constant tensor, whose
        residual means nothing.
        """
        if self.constant or not self.expected:
            return None
        return self.residual / self.expected

    def entry(self) -> PlanEntry:
        """The entry of a plan that ties this tensor by this rule."""
        law = getattr(self.law, "name", "") or self.law  # a class by its name
        return PlanEntry(glob.escape(self.layer), law, dict(self.options), self.tensor_name)


@dataclass(frozen=True)
class Pairs:
    """How much of the search for copies was done.

    Attributes:
        fitting: pairs of tensor and function of another tensor whose shapes fit.
        compared: how many of them were compared in full; the others by sampled entries only.
        per_tensor: how many were allowed for each tensor and function.
    """

    fitting: int = 0
    compared: int = 0
    per_tensor: int = 0


_COLUMNS: list[Column[Candidate]] = [
    *WHAT_IT_TIES,
    Column("expected", "random", lambda c: c.expected),
    Column("relative", "relative", lambda c: c.relative),
    *WHAT_IT_COSTS,
    *WHAT_IT_GAINS,
]
_ONLY_DATA: list[Column[Candidate]] = [
    *WHERE_IT_LIES,
    Column("gain_training", "", lambda c: c.gain_training),
    Column("z_score", "", lambda c: c.z_score),
    Column("p_value", "", lambda c: c.p_value),
    Column("constant", "", lambda c: c.constant),
    Column("positions", "", lambda c: c.positions),
]


@dataclass(frozen=True)
class ScanReport(TableReport[Candidate]):
    """What `scan` saw. Print it, or go on with `found`, `plan` and `rows`.

    Attributes:
        candidates: every tensor with every rule that fits it, in the model's order.
        not_looked_at: tensors that were left out, and why.
        pairs: how much of the search for copies was done.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        >>> _ = nn.init.eye_(model[1].weight)
        >>> seen = tp.scan(model, ["flip_sym", "row_repeat"])
        >>> [(found.layer, found.rule) for found in seen.found()]
        [('1', 'flip_sym')]
        >>> len(tp.tie_model(model, seen.plan()).ties)
        1
    """

    candidates: tuple[Candidate, ...]
    not_looked_at: tuple[Skipped, ...] = ()
    pairs: Pairs = field(default_factory=Pairs)

    shown_rows: ClassVar[int | None] = 40

    def ranked(self) -> list[Candidate]:
        """The candidates by `Candidate.relative`; those first that luck does not explain."""

        def key(candidate: Candidate) -> tuple[bool, bool, float]:
            relative = candidate.relative
            unknown = relative is None or math.isnan(relative)
            known = 0.0 if unknown or relative is None else relative
            return unknown, not _is_below(candidate.p_value, limit), known

        limit = self._least_likely()
        return sorted(self.candidates, key=key)

    def _least_likely(self) -> float:
        """The p-value below which a candidate is not luck, given how many were compared."""
        one_by_one = sum(not c.rule_class.reads_layers for c in self.candidates)
        return _LUCK / max(1, one_by_one + self.pairs.fitting)

    def found(self, below: float = NEAR) -> list[Candidate]:
        """Near-symmetries that chance does not explain, the clearest first.

        Args:
            below: how small the residual must be, as a part of what a random tensor of the same
                mean and spread has. Its `Candidate.p_value` must be small as well: if all of the
                model's tensors were random, one model in 1,000 would show a find. So a tensor
                of few entries does not stand out by luck, however many are compared.
                Constant tensors are left out.
        """
        limit = self._least_likely()
        return [
            c for c in self.ranked() if _is_below(c.relative, below) and _is_below(c.p_value, limit)
        ]

    def plan(self, below: float = NEAR) -> Plan:
        """A plan for `tie_model`: for each tensor the clearest of what was `found`.

        Where several laws are kept equally well, the one that stores least.
        """
        return Plan(tuple(candidate.entry() for candidate in self._clearest(below)))

    def _clearest(self, below: float = NEAR) -> list[Candidate]:
        best: dict[tuple[str, str], Candidate] = {}
        for candidate in self.found(below):
            key = (candidate.layer, candidate.tensor_name)
            if key not in best or _better(candidate, best[key]):
                best[key] = candidate
        return list(best.values())

    def table(self) -> Table[Candidate]:
        """The ranked candidates."""
        return Table(_COLUMNS, self.ranked())

    def rows(self) -> list[dict[str, Any]]:
        """A flat dictionary for every candidate, in the model's order."""
        return Table([*_COLUMNS, *_ONLY_DATA], self.candidates).data()

    def headline(self) -> str:
        """How many tensors look tied, which, and by what."""
        looked_at = len({(c.layer, c.tensor_name) for c in self.candidates})
        if not looked_at:
            given = " as they were given" if self.not_looked_at else ""
            return f"No tensor of the model can carry one of the rules{given}."
        clearest = self._clearest()
        if not clearest:
            return (
                f"None of {looked_at:,} tensors looks tied{self._why_none()} A law would be "
                "imposed, not found: train on after tying."
            )
        some = [f"{key_of(c.layer, c.tensor_name)} ({c.rule})" for c in clearest[:_NAMED]]
        more = f" and {len(clearest) - _NAMED:,} more" if len(clearest) > _NAMED else ""
        look = "looks" if len(clearest) == 1 else "look"
        return f"{len(clearest):,} of {looked_at:,} tensors {look} tied: {', '.join(some)}{more}."

    def _why_none(self) -> str:
        """What there is where nothing was found."""
        nearest = self.found(below=1.0)[:1]
        if not nearest:
            return (
                ": their residuals are about those of random tensors with the same mean and spread."
            )
        (c,) = nearest
        return (
            f". The nearest is {key_of(c.layer, c.tensor_name)} ({c.rule}), whose residual is "
            f"{c.relative:.2f} of a random tensor's."
        )

    def next_steps(self) -> list[str]:
        """The line that ties what was found."""
        if not self.candidates:
            return []
        plan = self.plan()
        if not plan.entries:
            return ['tp.register_tie(layer, "rule", init="rescale")  # by your own choice']
        spelled_out = in_python(plan)
        return [spelled_out or "tp.tie_model(model, seen.plan())  # seen is what scan returned"]

    def remarks(self) -> list[Reason]:
        """What was not looked at, and how copies were searched."""
        remarks = []
        fitting, compared = self.pairs.fitting, self.pairs.compared
        if fitting and compared == fitting:
            fact = f"Copies: every fitting pair of tensors was compared ({fitting:,})."
            remarks.append(Reason(fact))
        elif fitting:
            fact = (
                f"Copies: {compared:,} of {fitting:,} fitting pairs were compared in full, the "
                f"{self.pairs.per_tensor} nearest of each tensor; the others by {SAMPLED:,} "
                "sampled entries only, and have no row."
            )
            remarks.append(Reason(fact, PAIRS_SET_THE_BOUND))
        by_reason: dict[Reason, list[str]] = {}
        for left_out in self.not_looked_at:
            name = key_of(left_out.layer, left_out.tensor_name)
            by_reason.setdefault(left_out.why, []).append(name)
        for why, names in by_reason.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            which = f"{', '.join(names[:3])}{more}"
            remarks.append(Reason(f"Not looked at: {which}: {why.fact}", why.remedy))
        return remarks

    def to_data(self) -> dict[str, Any]:
        """Rows, notes, what was left out, the bound on copies, and what was found in words."""
        return {
            "kind": "scan",
            "headline": self.headline(),
            "next_steps": self.next_steps(),
            "rows": plain(self.rows()),
            "not_looked_at": [left_out.to_data() for left_out in self.not_looked_at],
            "pairs": plain(vars(self.pairs)),
            "notes": self.notes(),
        }


def _is_below(number: float | None, limit: float) -> bool:
    return number is not None and number < limit


def _better(one: Candidate, other: Candidate) -> bool:
    return one.relative == other.relative and one.free_values < other.free_values
