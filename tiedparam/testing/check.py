"""The whole contract in one call."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator

import torch

from tiedparam.laws.example import Example
from tiedparam.laws.rule import Rule
from tiedparam.testing.cases import Case, Inputs, cases_of
from tiedparam.testing.contract import STATEMENTS
from tiedparam.testing.judge import fact_of
from tiedparam.testing.report import Outcome, RuleReport
from tiedparam.testing.statement import Statement
from tiedparam.util.errors import nearest

FIRST = "every_example_can_be_tied"
"""Where this one does not hold the others have nothing to say."""


def check_rule(
    rule: type[Rule],
    *,
    examples: Iterable[Example] | None = None,
    quick: bool = False,
    statements: Iterable[str] | None = None,
    inputs: Inputs | None = None,
) -> RuleReport:
    """Judge a law by the whole contract: every statement with every example.

    A test of one line, ``check_rule(MyRule)``, which needs no test library. The law need not be
    registered. Random numbers, the default dtype and device, and warnings are afterwards as they
    were before; what the process has compiled is compiled again.

    Args:
        rule: the class of the law.
        examples: the layers and options to judge it by; by default its own ``examples()``.
        quick: leave out what takes long: compiling, exporting, 100 steps of optimizers, and
            numerical derivatives.
        statements: the names of those to judge, all of `STATEMENTS` by default.
        inputs: for a layer that the library does not know how to call: makes the inputs of a
            layer, a tuple of tensors, for so many samples.

    Returns:
        A report, which prints a line for each statement.

    Raises:
        AssertionError: if a statement does not hold. The text is the report: what was found in
            which example, what that means and what to correct.
        TypeError: if the rule is no class of a law, or has no examples.
        ValueError: for a statement that there is not.

    Example:
        >>> class Even(tp.Rule):
        ...     law = "W[o, c] = W[o, n-1-c]"
        ...     def free_shapes(self): return ((3, 2),)
        ...     def forward(self, half): return torch.cat([half, half.flip(1)], 1)
        ...     def symmetries(self, weight): yield weight.flip(1)
        >>> print(tp.testing.check_rule(Even, examples=[tp.Example(lambda: nn.Linear(4, 3))]))
        Even: W[o, c] = W[o, n-1-c]
        All ... statements hold for 1 example: Linear-weight-3x4...
    """
    chosen = _chosen(statements, quick)
    with _own_surroundings():
        cases = _cases(rule, examples, inputs)
        facts: dict[str, dict[str, str]] = {statement.name: {} for statement in chosen}
        judged = dict.fromkeys(facts, 0)
        for case in cases:
            shown = case.shown_example
            for statement in chosen:
                if FIRST in facts and shown in facts[FIRST]:
                    break
                if not statement.applies_to(case):
                    continue
                judged[statement.name] += 1
                fact = _what_is_wrong(statement, case)
                if fact is not None:
                    facts[statement.name][shown] = fact
        report = RuleReport(
            cases[0].name,
            str(rule.law),
            tuple(case.shown_example for case in cases),
            tuple(Outcome(s, judged[s.name], facts[s.name]) for s in chosen if judged[s.name]),
        )
    if not report.passed:
        raise AssertionError(str(report))
    return report


def _chosen(statements: Iterable[str] | None, quick: bool) -> list[Statement]:
    names = list(STATEMENTS) if statements is None else [FIRST, *statements]
    for name in names:
        if name not in STATEMENTS:
            raise ValueError(f"there is no statement {name!r}. {nearest(name, STATEMENTS)}")
    found = [statement for name, statement in STATEMENTS.items() if name in names]
    return [statement for statement in found if not (quick and statement.slow)]


def _cases(
    rule: type[Rule], examples: Iterable[Example] | None, inputs: Inputs | None
) -> list[Case]:
    if not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise TypeError(f"check_rule takes the class of a law, not {rule!r}")
    if examples is None and not inspect.ismethod(rule.examples):
        raise TypeError(f"{rule.__qualname__}.examples must be a classmethod")
    cases = cases_of(rule, examples, inputs)
    if not cases:
        raise TypeError(
            f"{rule.__qualname__} has no examples. Pass examples=[tiedparam.Example(...)], or "
            "write the classmethod examples()"
        )
    return cases


def _what_is_wrong(statement: Statement, case: Case) -> str | None:
    """What a statement finds in a case, in one line, or None."""
    try:
        statement(case)
    except Exception as error:  # whatever a user's law raises is about that law
        return fact_of(error)
    return None


@contextlib.contextmanager
def _own_surroundings() -> Iterator[None]:
    """The defaults of torch while the law is judged, and those of the caller afterwards."""
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_rng_state, state)
        stack.callback(torch.set_default_dtype, dtype)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.empty(0).device.type != "cpu":  # only then: the compiler traces the context, too
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        yield
