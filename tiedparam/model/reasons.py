"""Why tensors of a model were left as they are: one by one, and all in one error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tiedparam.util.errors import LONGEST_MESSAGE, Reason, TieError, key_of, shortened, some_of


@dataclass(frozen=True)
class Skipped:
    """A tensor that was left as it is, and why.

    Where a layer type or function of a plan selected nothing, ``layer`` is its name.

    Attributes:
        layer: path of the layer in the model.
        tensor_name: which of its tensors.
        why: why it was left.
        rule: the rule that a plan wanted, with its options; None where no rule at all can go there.
    """

    layer: str
    tensor_name: str
    why: Reason
    rule: str | None = None

    @property
    def reason(self) -> str:
        """Why, in words."""
        return str(self.why)

    @property
    def place(self) -> str:
        """The tensor, and the rule that was wanted, as messages name them."""
        key = f"'{key_of(self.layer, self.tensor_name)}'"
        return key if self.rule is None else f"{key} by '{self.rule}'"

    def to_data(self) -> dict[str, Any]:
        """Everything as strings."""
        rule = {} if self.rule is None else {"rule": self.rule}
        return {
            "layer": self.layer,
            "tensor_name": self.tensor_name,
            **rule,
            "reason": self.reason,
        }


class SeveralTiesError(TieError):
    """One error for many tensors: ``SeveralTiesError(where, heading, remedy, reasons)``.

    The message has a line for each, below what they have in common.
    """

    @property
    def reasons(self) -> Sequence[tuple[str, Reason]]:
        """The places, and why nothing can be done there; a place may be empty."""
        found: Sequence[tuple[str, Reason]] = self.args[3]
        return found

    @property
    def fact(self) -> str:
        """All of them, as many as a message has room for."""
        return self.fact_in(str)

    def worded(self, word: Callable[[Reason], str]) -> str:
        """The message, with each reason in the words of ``word``; they name the places."""
        return shortened(word(Reason(self.fact_in(word), self.remedy)), LONGEST_MESSAGE)

    def fact_in(self, word: Callable[[Reason], str]) -> str:
        """The list, with each reason in the words of ``word``."""
        heading = [self.args[1]] if self.args[1] else []
        lines = [
            f"{place}: {word(reason)}" if place else word(reason) for place, reason in self.reasons
        ]
        return "\n".join([*heading, some_of(lines, "\n")])
