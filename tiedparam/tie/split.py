"""How ranks share one tied tensor under tensor parallelism: each computes its own part by a law.

``parallelize_module`` cuts the weight of a layer along one axis. The free values are then cut
likewise, or all ranks hold them, and the law of the part (`tiedparam.laws.parts`) computes the part
from what the rank has: nothing is gathered. A law that cannot do that is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from tiedparam.laws.parts import Cut, Parts, parts_of
from tiedparam.laws.rule import Rule
from tiedparam.util.errors import Reason, TieError
from tiedparam.util.sharded import cut_of, is_sharded, joined, own_part


class Split:
    """How one tied tensor is shared by the ranks of a mesh. Kept by its list of parametrizations.

    Args:
        rule: the law of the whole tensor.
        mesh: the mesh of ranks.
        placements: where the mesh has which part of the tensor.
        where: how to name the tensor.

    Attributes:
        over: the axis of the mesh whose ranks share the tensor; None if all of them hold it.
        number: which of the parts is this rank's.
        parts: the laws of the parts, or why there are none.
    """

    def __init__(self, rule: Rule, mesh: Any, placements: Iterable[Any], where: str) -> None:
        self.rule: Rule = rule
        self.mesh: Any = mesh
        self.placements: tuple[Any, ...] = tuple(placements)
        self.where: str = where
        found = cut_of(self.placements)
        self.number: int = 0 if found is None else mesh.get_local_rank(found[0])
        self.over: int | None = found[0] if found else None
        whole = tuple(Cut(shape, None) for shape in rule.free_shapes())
        self.parts: Parts | Reason = Parts(rule, 0, (rule,), whole)
        if found is not None:
            self.parts = parts_of(rule, found[1], mesh.size(found[0]))
        self._judged: dict[tuple[Cut, ...], Reason | None] = {}

    def why_not(self, sources: tuple[Cut, ...] = ()) -> Reason | None:
        """Why the parts cannot be computed, or None.

        Args:
            sources: how the tensors that the law reads are cut.
        """
        if isinstance(self.parts, Reason):
            return self.parts
        if sources not in self._judged:
            self._judged[sources] = self.parts.why_no_slices(sources)
        return self._judged[sources]

    def weight(self, free: Iterable[Tensor | None], sources: Iterable[Tensor]) -> Tensor:
        """The tied tensor, of which this rank computes its part.

        Args:
            free: the free values, sharded.
            sources: what the law reads.

        Raises:
            TieError: if a source is not spread over the same ranks, or cut so that the part cannot
                be computed from it.
        """
        read = tuple(sources)
        if read:
            reason = self._why_not_from(read)
            if reason is not None:
                raise TieError(f"cannot compute {self.where} by '{self.rule}' in parts", *reason)
        assert isinstance(self.parts, Parts)
        part = self.parts.rules[self.number]
        weight = part(*(own_part(tensor, self.over) for tensor in (*read, *free)))
        return joined(weight, self.mesh, self.placements)

    def _why_not_from(self, sources: tuple[Any, ...]) -> Reason | None:
        if not all(is_sharded(s) and s.device_mesh == self.mesh for s in sources):
            return Reason("its source is not parallelized on the same mesh.", ALIKE)
        found = [(source, cut_of(source.placements)) for source in sources]
        reason = self.why_not(tuple(Cut(tuple(s.shape), c[1] if c else None) for s, c in found))
        if reason is None:
            return None
        return Reason("its source is cut otherwise than its law needs.", ALIKE)


ALIKE = (
    "Name both layers in the plan of parallelize_module, or neither. A copy is cut along the axis "
    "of its source (an embedding RowwiseParallel, its head ColwiseParallel), a transposed one "
    "along the other."
)
