"""Several laws at once: every one of them holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from math import lcm
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tiedparam.laws import Reason
from tiedparam.laws.cells import why_no_cell
from tiedparam.laws.coded import Coded
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout
from tiedparam.laws.orbits import Orbits
from tiedparam.laws.registry import law_text, make_rule, register_rule, stated
from tiedparam.laws.rule import Rule


@register_rule("joint")
class Joint(Coded):
    """All of several laws hold, whether or not they commute: W = S₁(W) = S₂(W) = ….

    `register_tie` makes it of a list: ``register_tie(layer, ["flip_sym", ("repeat", {...})])``.
    Entries share a free value if any chain of equalities of the parts connects them. So the
    nearest weight that keeps all laws is a mean over these joint orbits and exact, where
    projecting by one law after another only approaches it.

    If nothing but zeros keeps all laws, the weight is zero, no value is stored, and a `TieWarning`
    says so. Laws that contradict each other, by fixing an entry to two numbers, are refused.

    Args:
        laws: at least two laws, each a name, a `Rule` subclass, a `Rule`, a pair of a name or
            class and its options, or such a list.

    Shapes: as of all laws by symmetries: ``free``: ``(cells, values of a cell)``; a cell is as
    large as the least common multiple of the parts' cells on every axis. Laws that read other
    layers (copies) are refused. The data of a law that is data, such as a mask, is kept with the
    joint law.

    Source: the orbits of the group that the parts' symmetries generate; their projection is the
    orbit mean (Ravanbakhsh et al. 2017). It is the limit of von Neumann's alternating projections.

    Example:
        >>> layer = tp.register_tie(nn.Linear(4, 4), ["flip_sym", ("repeat", {"outputs": 2})])
        >>> torch.equal(layer.weight, layer.weight.t())
        True
        >>> tp.get_tie(layer).free_count  # of 16
        3
    """

    family = "laws together"
    holds_laws: ClassVar[tuple[str, ...]] = ("laws",)
    law = "W = S(W), S of every law"
    may_leave_nothing = True

    def __init__(self, laws: Sequence[object]) -> None:
        super().__init__()
        if not isinstance(laws, (list, tuple)) or len(laws) < 2:
            raise TypeError(f"laws= takes a list of at least two laws, not {laws!r}")
        for number, law in enumerate(laws):
            part = make_rule(law, {})
            if isinstance(part, Coded):  # its data is this rule's, which keeps it as any such law
                self.hold({f"{_prefix(number)}{name}": x for name, x in part.data().items()})
                self.checksum: str = self.checksum + part.checksum
                part = copy(part)
                part.__dict__["_buffers"] = {}
            self.add_module(str(number), part)

    @property
    def laws(self) -> list[Any]:
        """The parts, which are bound to no tensor and hold no data."""
        return list(self._modules.values())

    def _parts_at(self, layout: Layout) -> Iterator[Rule]:
        """The parts with their data, as if they were bound to a tensor of this layout."""
        held = self.data()
        for number, part in enumerate(self.laws):
            bound: Rule = part.for_layout(layout)
            if isinstance(bound, Coded):
                bound.hold(_of_part(number, held))
            yield bound

    def options(self) -> dict[str, Any]:
        """The laws, as one states them."""
        return {"laws": self.statement()[0]}

    def statement(self) -> tuple[Any, dict[str, Any]]:
        """A list of names, classes and pairs."""
        return [stated(part) for part in self.laws], {}

    def check(self, layout: Layout) -> Reason | None:
        """Every part must fit, and read no other layer."""
        for part in self._parts_at(layout):
            reason = _why_not_joined(part) or part.reason_against(layout)
            if reason is None and isinstance(part, Orbits):
                reason = why_no_cell(part.cell(), layout)
            if reason is not None:
                return Reason(f"'{part}': {reason.fact}", reason.remedy)
        return None

    def reason_against_dtype(self, dtype: torch.dtype) -> Reason | None:
        """Every part must have a meaning for it."""
        for part in self.laws:
            reason = part.reason_against_dtype(dtype)
            if reason is not None:
                return Reason(f"'{part}': {reason.fact}", reason.remedy)
        return None

    def why_other_data(self, data: Mapping[str, Tensor]) -> Reason | None:
        """Why the data of a part is not what it has or expects, or None."""
        for number, part in enumerate(self.laws):
            if isinstance(part, Coded):
                reason = part.why_other_data(_of_part(number, data))
                if reason is not None:
                    return reason
        return None

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """Those of all parts."""
        for part in self._parts_at(self.bound_layout):
            yield from part.symmetries(weight)

    def cell(self) -> tuple[int, ...] | None:
        """The least that is made of whole cells of every part."""
        parts = self._parts_at(self.bound_layout)
        cells = [part.cell() if isinstance(part, Orbits) else None for part in parts]
        known = [cell for cell in cells if cell is not None]
        if len(known) < len(cells):
            return None
        return tuple(lcm(*sizes) for sizes in zip(*known, strict=True))

    @property
    def gains_from_cache(self) -> bool:
        """As of other laws by symmetries; a weight of zeros has nothing to compare."""
        return bool(self.free_shapes()) and super().gains_from_cache

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """None: there are too many."""
        return ()

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Laws that commute and laws that do not, grouped and transposed."""
        repeat = ("repeat", {"outputs": 2})
        return (
            Example(lambda: nn.Linear(4, 4), {"laws": ["flip_sym", repeat]}),
            Example(
                lambda: nn.Conv2d(4, 4, 3, groups=2),
                {"laws": ["flip_sym", ("channel_shared", {"over": "groups"})]},
            ),
            Example(lambda: nn.ConvTranspose1d(4, 4, 3), {"laws": ["flip_sym", repeat]}),
        )

    def __str__(self) -> str:
        return f"{self.name}(laws={law_text(self.statement()[0])})"


def _prefix(number: int) -> str:
    """What the names of a part's data begin with."""
    return f"law{number}_"


def _of_part(number: int, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The data of one part, by its own names."""
    start = _prefix(number)
    return {name[len(start) :]: x for name, x in data.items() if name.startswith(start)}


def _why_not_joined(part: Rule) -> Reason | None:
    if part.reads_layers:
        return Reason(
            "it reads another layer, so it has no orbits to join.",
            "Tie the source by the other laws, and this tensor by this law alone.",
        )
    if isinstance(part, Coded) and part.made_of_weight:
        return Reason(
            "its pattern is made of the weight.",
            "Give it the other laws: ('cluster', {'n': 16, 'of': [...]}).",
        )
    if isinstance(part, Coded) and part.holds_numbers:
        return Reason(
            "it holds numbers, which may change while the joint law stands.",
            "Give one number as value=; several such laws can be in the list.",
        )
    if part.compute not in ("auto", "dense"):
        return Reason(
            f"compute={part.compute!r} is a form of this law alone.", "Leave out compute=."
        )
    return None
