"""A user's own symmetries: W[g(o), h(c), k(x)] = ± W[o, c, x] for each generator (g, h, k)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

from torch import Tensor, nn

from tiedparam.laws import Coded, Reason
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout
from tiedparam.laws.packing import pack_numbers, unpack_numbers
from tiedparam.laws.permutations import AXES, given_generators, is_identity
from tiedparam.laws.registry import register_rule


@register_rule("orbit")
class Orbit(Coded):
    """Whatever permutations of outputs, inputs and kernel positions leave the weight as it is.

    A few generators state a whole group: all entries that they carry into each other are one
    value, up to the sign, and those that they carry into their own negative are zero.

    Args:
        generators: each a tuple of permutations ``(outputs, inputs)`` or ``(outputs, inputs,
            positions)``, index tensors or lists; None in the place of one leaves that axis alone.
            For a vector, ``(outputs,)``. Inputs are those within a group of the layer; positions
            number the kernel row by row. The permutations are stored with the layer, as packed
            numbers: they are far smaller than the pattern that they produce.
        signs: 1 or −1 for each generator; None is 1 for all.

    Shapes: ``free``: ``(cells, orbits of a cell)``, or ``(orbits,)`` for a vector, where outputs,
    or outputs and inputs, that no generator moves are cells; ``weight``: any.

    Source: parameter-sharing as equivariance (Ravanbakhsh, Schneider, Póczos 2017); the projection
    is the (signed) orbit mean.

    Example:
        >>> turn, swap = [1, 2, 3, 0], [1, 0, 2, 3]  # they generate all permutations of 4
        >>> deep_set = tp.register_tie(
        ...     nn.Linear(4, 4), "orbit", generators=[(turn, turn), (swap, swap)]
        ... )
        >>> tp.get_tie(deep_set).free_count
        2
    """

    family = "patterns of your own"
    law: str = "W[g(o), h(c), k(x)] = ± W[o, c, x]"

    def __init__(
        self,
        generators: Sequence[Sequence[Sequence[int] | Tensor | None]] | str,
        signs: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.signs: list[int] | None = _plain_signs(signs)
        if isinstance(generators, str):
            self.expect(generators)
            return
        axes = given_generators(generators)
        if isinstance(axes, Reason):
            self.fault: Reason | None = axes
            return
        codes = {
            f"{name}_bits": pack_numbers(axis, axis.shape[1] - 1)
            for name, axis in zip(AXES, axes, strict=False)
            if axis.numel()
        }
        self.keep((len(axes[0]), *(axis.shape[1] for axis in axes)), codes)

    def options(self) -> dict[str, Any]:
        """The tag of the permutations, and the signs."""
        signs = {} if self.signs is None else {"signs": self.signs}
        return ({"generators": self.tag} if self.checksum else {}) | signs

    def check(self, layout: Layout) -> Reason | None:
        """The permutations must have the sizes of the axes, and a sign each, if any has one."""
        reason = super().check(layout) or self._why_no_signs()
        if reason is not None:
            return reason
        outputs, *others = layout.canonical_shape
        sizes = [outputs, *others[:1], *([prod(others[1:])] if len(others) > 1 else [])]
        given = self.coded_shape[1:]
        named = dict(zip(AXES, sizes, strict=False))
        if len(given) > len(sizes) or (len(sizes) > 1 and len(given) < 2):
            wanted = ", ".join(list(named)[: max(2, len(given))])
            return Reason(
                f"a generator has {len(given)} permutations, and the tensor {layout.shape}.",
                f"Give ({wanted}).",
            )
        for (axis, size), own in zip(named.items(), given, strict=False):
            if own not in (0, size):
                return Reason(
                    f"the generators permute {own} {axis}, and the tensor has {size}.",
                    f"Give permutations of 0 to {size - 1}.",
                )
        return None

    def _why_no_signs(self) -> Reason | None:
        signs, count = self.signs, self.coded_shape[0]
        if signs is None or (
            isinstance(signs, list) and len(signs) == count and all(s in (1, -1) for s in signs)
        ):
            return None
        return Reason(f"signs={signs!r} for {count} generators.", "Give 1 or -1 for each.")

    def _permutations(self) -> list[list[Tensor | None]]:
        """For each generator the permutation of each axis; None where all leave it alone."""
        count, *sizes = self.coded_shape
        columns: list[Any] = [[None] * count for _ in range(3)]
        for axis, (name, size) in enumerate(zip(AXES, sizes, strict=False)):
            if size:
                columns[axis] = unpack_numbers(self.data()[f"{name}_bits"], size)
        return [list(generator) for generator in zip(*columns, strict=True)]

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """The weight as each generator carries it."""
        layout = self.bound_layout
        canonical = layout.canonical(weight)
        shape = canonical.shape
        flat = canonical.reshape(*shape[:2], -1) if len(shape) > 2 else canonical
        signs = self.signs or [1] * self.coded_shape[0]
        for generator, sign in zip(self._permutations(), signs, strict=True):
            image = flat
            for axis, permutation in enumerate(generator):
                if permutation is not None and flat.shape[axis] == len(permutation):
                    image = image.index_select(axis, permutation.to(weight.device))
            yield sign * layout.native(image.reshape(shape))

    def cell(self) -> tuple[int, ...] | None:
        """One output, if no generator moves any; and one input, if none moves any."""
        shape = list(self.bound_layout.canonical_shape)
        if len(shape) < 2:
            return None
        for axis, moves in enumerate(list(zip(*self._permutations(), strict=True))[:2]):
            if all(move is None or is_identity(move) for move in moves):
                shape[axis] = 1
        return tuple(shape)

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """None: the symmetries are the user's."""
        return ()

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Deep sets, a law of kernel positions, one with a sign and forced zeros, a bias."""
        turn, swap = [1, 2, 3, 0], [1, 0, 2, 3]
        mirror = [2, 1, 0]
        return (
            Example(lambda: nn.Linear(4, 4), {"generators": [(turn, turn), (swap, swap)]}),
            Example(lambda: nn.Conv1d(2, 3, 3), {"generators": [(None, None, mirror)]}),
            Example(lambda: nn.Linear(3, 4), {"generators": [(swap, [1, 0, 2])], "signs": [-1]}),
            Example(
                lambda: nn.ConvTranspose1d(4, 4, 3, groups=2),
                {"generators": [(turn, [1, 0], mirror)]},
            ),
            Example(lambda: nn.Linear(2, 4), {"generators": [(turn,)]}, "", "bias"),
        )


def _plain_signs(signs: Any) -> Any:
    """Signs as files have them; what is none as it is, to be refused."""
    if isinstance(signs, Tensor):
        signs = signs.tolist()
    if not isinstance(signs, (list, tuple)):
        return signs
    return [int(sign) if sign in (1, -1) else sign for sign in signs]
