"""A statement of the contract: what must hold for each example of a law, and what if it does not.

The other files of this folder make statements of functions, by the decorator `states`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from tiedparam.testing.cases import Case
from tiedparam.util.errors import TieWarning

Kind = Literal["every law", "laws with values", "laws with fitted values", "copies"]


@dataclass(frozen=True)
class Statement:
    """One statement of the contract, which is called with a `Case`.

    Attributes:
        name: the statement in a few words.
        run: the function that judges it; it raises if the statement does not hold.
        kind: of which laws it speaks: of every law; of those whose weight consists of free values;
            of those whose free values are solved for, beside what they read of other layers or as
            factors of a product; or of those that only read other layers.
        correct: what the author of a law corrects if it does not hold.
        slow: whether it takes longer than all the others together.

    Example:
        >>> from tiedparam.testing import STATEMENTS
        >>> statement = STATEMENTS["right_inverse_undoes_forward"]
        >>> statement.kind, statement.slow
        ('laws with values', False)
        >>> print(statement.meaning)
        Free values that were expanded come back to the bit, infinities and tiny numbers too.
    """

    name: str
    run: Callable[[Case], None]
    kind: Kind
    correct: str
    slow: bool

    @property
    def meaning(self) -> str:
        """What must hold, in a sentence or two."""
        first, _, _ = (self.run.__doc__ or "").partition("\n\n")
        return " ".join(first.split())

    def applies_to(self, case: Case) -> bool:
        """Whether it says something of the law of a case."""
        return self.kind in ("every law", case.kind)

    def __call__(self, case: Case) -> None:
        """Judge one example.

        Of warnings only ours count, as errors; but one that the tie was probably not intended is
        not about the law: small examples with few values lose most of their weight, as they should.

        Raises:
            Exception: if the statement does not hold; an AssertionError where that was judged.
        """
        torch.default_generator.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", TieWarning)
            warnings.filterwarnings("ignore", "the tie of .* keeps ", TieWarning)
            self.run(case)


def states(
    kind: Kind, correct: str, *, slow: bool = False
) -> Callable[[Callable[[Case], None]], Statement]:
    """Decorator: make a function of a case a statement of the contract."""

    def state(run: Callable[[Case], None]) -> Statement:
        return Statement(run.__name__, run, kind, correct, slow)

    return state
