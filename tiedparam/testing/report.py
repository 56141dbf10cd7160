"""What came of the contract for one law, to be read."""

from __future__ import annotations

from dataclasses import dataclass

from tiedparam.testing.statement import Statement


@dataclass(frozen=True)
class Outcome:
    """What came of one statement.

    Attributes:
        statement: the statement.
        judged: for how many examples.
        facts: the examples in which it does not hold, each with what was found there.
    """

    statement: Statement
    judged: int
    facts: dict[str, str]


@dataclass(frozen=True)
class RuleReport:
    """Which statements of the contract hold for a law; printed, a line for each.

    Those that do not hold come first, each with what it means and what to correct; among them
    the first ones explain the others, more often than not.

    Attributes:
        name: the law.
        law: its equation.
        examples: the examples with which it was judged.
        outcomes: what came of each statement.

    Example:
        >>> report = tp.testing.check_rule(tp.rules.RowRepeat, quick=True)
        >>> report.passed, len(report.examples), len(report.outcomes) > 30
        (True, 6, True)
        >>> print(report)
        row_repeat: W[o] = w[o // (out/groups)]
        All ... statements hold for 6 examples: Linear-weight-4x5, ...
          holds  every_example_can_be_tied
        ...
    """

    name: str
    law: str
    examples: tuple[str, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def passed(self) -> bool:
        """Whether every statement holds for every example."""
        return not any(outcome.facts for outcome in self.outcomes)

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.law}", self._sum()]
        for outcome in sorted(self.outcomes, key=lambda outcome: not outcome.facts):
            lines.append(f"  {'FAILS' if outcome.facts else 'holds'}  {outcome.statement.name}")
            for example, fact in outcome.facts.items():
                lines.append(f"           {example}: {fact}")
            if outcome.facts:
                lines.append(f"           Means: {outcome.statement.meaning}")
                lines.append(f"           Correct: {outcome.statement.correct}")
        return "\n".join(lines)

    def _sum(self) -> str:
        failed = sum(bool(outcome.facts) for outcome in self.outcomes)
        count, number = len(self.outcomes), len(self.examples)
        examples = f"{number} example{'s' if number > 1 else ''}: {', '.join(self.examples)}"
        if not failed:
            return f"All {count} statements hold for {examples}"
        statements = "statement" if count == 1 else "statements"
        verb = "does" if failed == 1 else "do"
        return f"{failed} of {count} {statements} {verb} not hold for {examples}"
