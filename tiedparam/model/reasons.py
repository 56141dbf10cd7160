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
        why: what speaks against it.
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
    """One error for many tensors: ``SeveralTiesError(where, fact, remedy, [(place, reason), …])``.

    The message is a line for each, below the fact that they have in common.
    """

    @property
    def reasons(self) -> Sequence[tuple[str, Reason]]:
        """The places, and why nothing can be done there; a place may be empty."""
        found: Sequence[tuple[str, Reason]] = self.args[3]
        return found

    def worded(self, word: Callable[[Reason], str]) -> str:
        """The message, with each reason in the words of ``word``."""
        lines = [
            f"{place}: {word(reason)}" if place else word(reason) for place, reason in self.reasons
        ]
        parts = [self.fact, some_of(lines, "\n"), word(Reason("", self.remedy))]
        return shortened("\n".join(part for part in parts if part), LONGEST_MESSAGE)
