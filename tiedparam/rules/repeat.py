"""Repetition in order: W[o, c] = w[o // r, c // s] (blocks), or by remainders (tiles)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from tiedparam.laws import Reason
from tiedparam.laws.broadcast import Blocks, Broadcast, Compute
from tiedparam.laws.choices import why_no_count
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout
from tiedparam.laws.registry import register_rule

Order = Literal["block", "tile"]
_LAWS: dict[Order, str] = {"block": "W[o] = w[o // r]", "tile": "W[o] = w[o mod (O/r)]"}
_LAWS_WITH_INPUTS: dict[Order, str] = {
    "block": "W[o, c] = w[o // r, c // s]",
    "tile": "W[o, c] = w[o mod (O/r), c mod (C/s)]",
}


def repeated(shape: Sequence[int], copies: int, order: Order, inputs: int = 1) -> Blocks:
    """The canonical ``shape`` with ``copies`` equal outputs each: neighbours, or whole tiles.

    Args:
        shape: the canonical shape of the weight.
        copies: how many outputs are equal.
        order: whether they are neighbours or stand in different tiles.
        inputs: how many inputs are equal.
    """
    outputs, *rest = shape
    shared: tuple[int, ...] = (1,) if order == "block" else (0,)
    if inputs == 1:
        return Blocks(_split(outputs, copies, order), tuple(rest), shared)
    shared = (*shared, 2 + shared[0])
    split = _split(rest[0], inputs, order)
    return Blocks(_split(outputs, copies, order), (split, *rest[1:]), shared)


def _split(size: int, copies: int, order: Order) -> tuple[int, int]:
    """An axis as different parts and their copies, in the order in which they stand."""
    return (size // copies, copies) if order == "block" else (copies, size // copies)


@register_rule("repeat")
class Repeat(Broadcast):
    """Every output stands ``r`` times, and every input ``s`` times: ``W[o, c] = w[ρ(o), σ(c)]``.

    For any tensor with an output axis; a bias, or any other vector, takes ``outputs`` alone.

    ===========  ============================================  ===============  =================
    ``order``    law                                           1 2 3, twice     as torch says it
    ===========  ============================================  ===============  =================
    ``"block"``  ``ρ(o) = o // r``, ``σ(c) = c // s``          ``1 1 2 2 3 3``  repeat_interleave
    ``"tile"``   ``ρ(o) = o mod (O/r)``, ``σ(c) = c mod …``    ``1 2 3 1 2 3``  tile
    ===========  ============================================  ===============  =================

    ``order="tile"`` is the pattern of ``channel_shared(over="groups")``: with ``outputs`` the
    number of groups, the biases of streams that share one bank of filters are shared as the
    filters are. ``order="block"`` is `row_repeat`, told how often and not how many.

    Args:
        outputs: ``r``, how often every output stands; it must divide the number of outputs ``O``.
        inputs: ``s``, how often every input stands; it must divide the number of inputs of a
            group, ``C``.
        order: ``"block"``, equal ones side by side, or ``"tile"``, the whole row of different ones
            again and again.
        compute: how the layer computes: ``"auto"``, the fastest way that it has; ``"dense"``,
            ``"reduced"`` or ``"windows"`` force one, for measuring.

    Shapes: ``free``: ``(O/r, C/s, *kernel)``; ``weight``: ``(O, C, *kernel)``, in the canonical
    layout. Each stored value has ``r·s`` copies and receives the sum of their gradients.

    Source: ``repeat_interleave`` and ``tile`` of torch, as patterns of a weight; the projection
    is the orbit mean (Ravanbakhsh et al. 2017).

    Example:
        >>> layer = tp.register_tie(nn.Linear(4, 6), "repeat", "bias", outputs=2, order="tile")
        >>> _ = tp.assign_(layer, torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0]), "bias")
        >>> layer.parametrizations.bias.original0.tolist()
        [1.0, 2.0, 3.0]
        >>> tp.get_tie(tp.register_tie(layer, "repeat", outputs=2, inputs=4)).free_shapes()
        ((3, 1),)
    """

    family = "repetition"
    law: str = "W[o, c] = w[o // r, c // s]  (order='block'; also 'tile')"

    def __init__(
        self,
        outputs: int = 1,
        inputs: int = 1,
        *,
        order: Order = "block",
        compute: Compute = "auto",
    ) -> None:
        super().__init__(compute)
        self.outputs = outputs
        self.inputs = inputs
        self.order: Order = order
        laws = _LAWS if inputs == 1 else _LAWS_WITH_INPUTS
        self.law: str = (
            laws.get(order, type(self).law) if isinstance(order, str) else type(self).law
        )

    def options(self) -> dict[str, Any]:
        """``outputs``; ``inputs`` and ``order`` where they are not 1 and ``"block"``."""
        options: dict[str, Any] = {"outputs": self.outputs}
        if self.inputs != 1:
            options["inputs"] = self.inputs
        return options if self.order == "block" else {**options, "order": self.order}

    def check(self, layout: Layout) -> Reason | None:
        """``outputs`` and ``inputs`` must divide what they repeat, and ``order`` be known."""
        if not isinstance(self.order, str) or self.order not in _LAWS:
            known = ", ".join(f"'{order}'" for order in _LAWS)
            return Reason(f"order={self.order!r} is unknown.", f"Choose one of {known}.")
        for name, copies in (("outputs", self.outputs), ("inputs", self.inputs)):
            reason = why_no_count(name, copies)
            if reason is not None:
                return reason
        if not layout.shape:
            return Reason("a tensor without axes has no outputs.", "Tie a weight or a bias.")
        out, *rest = layout.canonical_shape
        if out % self.outputs:
            return Reason(
                f"{out} outputs cannot stand outputs={self.outputs} times each.",
                f"Choose a divisor of {out}.",
            )
        if self.inputs == 1:
            return None
        if not rest:
            return Reason(
                f"the tensor {layout.shape} has no inputs that could stand "
                f"inputs={self.inputs} times each.",
                "Leave out inputs=, or tie a weight.",
            )
        if rest[0] % self.inputs:
            of_group = " of a group" if layout.groups > 1 else ""
            return Reason(
                f"{rest[0]} inputs{of_group} cannot stand inputs={self.inputs} times each.",
                f"Choose a divisor of {rest[0]}.",
            )
        return None

    def blocks(self) -> Blocks:
        """``(O/r, r, C/s, s, *kernel)``, or with the copies first where they are tiles."""
        shape = self.bound_layout.canonical_shape
        return repeated(shape, self.outputs, self.order, self.inputs)

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """For the bias of streams, the pattern of their filters. Elsewhere how often is a choice;
        1 stands for it, and ties nothing.
        """
        if len(layout.shape) == 1 and layout.layer_groups > 1:
            return ({"outputs": layout.layer_groups, "order": "tile"},)
        return ({"outputs": 1},)

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Both orders on biases, Linear layers, convolutions of every kind and an embedding."""
        return (
            Example(lambda: nn.Linear(5, 6), {"outputs": 3}),
            Example(lambda: nn.Linear(5, 6), {"outputs": 2, "order": "tile"}),
            Example(
                lambda: nn.Conv1d(4, 8, 3, groups=4), {"outputs": 4, "order": "tile"}, "", "bias"
            ),
            Example(lambda: nn.Conv1d(2, 6, 3), {"outputs": 3}, "", "bias"),
            Example(lambda: nn.Conv2d(4, 6, 3, groups=2), {"outputs": 2}),
            Example(lambda: nn.Conv1d(3, 6, 3, groups=3), {"outputs": 3, "order": "tile"}),
            Example(lambda: nn.Conv1d(2, 8, 3, groups=2), {"outputs": 4, "order": "tile"}),
            Example(lambda: nn.Conv2d(1, 4, 2), {"outputs": 2, "order": "tile"}),
            Example(lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), {"outputs": 2, "order": "tile"}),
            Example(lambda: nn.Embedding(6, 3), {"outputs": 2, "order": "tile"}),
            Example(lambda: nn.Linear(6, 4), {"outputs": 2, "inputs": 3}),
            Example(lambda: nn.Conv1d(8, 4, 3, groups=2), {"inputs": 2, "order": "tile"}),
            Example(lambda: nn.ConvTranspose2d(6, 4, 2), {"inputs": 6}),
        )
