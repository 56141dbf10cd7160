"""Repetition in order: W[o] = w[o // r] (blocks), or W[o] = w[o mod (O/r)] (tiles)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from tiedparam.laws import Reason
from tiedparam.laws.broadcast import Blocks, Broadcast, Compute
from tiedparam.laws.layout import Layout
from tiedparam.laws.registry import register_rule
from tiedparam.laws.rule import Example

Order = Literal["block", "tile"]
_LAWS: dict[Order, str] = {"block": "W[o] = w[o // r]", "tile": "W[o] = w[o mod (O/r)]"}


def repeated(shape: Sequence[int], copies: int, order: Order) -> Blocks:
    """The canonical ``shape`` with ``copies`` equal outputs each: neighbours, or whole tiles."""
    outputs, *rest = shape
    if order == "block":
        return Blocks((outputs // copies, copies), tuple(rest), shared=(1,))
    return Blocks((copies, outputs // copies), tuple(rest), shared=(0,))


@register_rule("repeat")
class Repeat(Broadcast):
    """Every output stands ``r`` times, for any tensor with an output axis, such as a bias.

    ============  =========================  ==========================  ==================
    ``order``     law                        outputs ``1 2 3``, twice    as torch says it
    ============  =========================  ==========================  ==================
    ``"block"``   ``W[o] = w[o // r]``       ``1 1 2 2 3 3``             repeat_interleave
    ``"tile"``    ``W[o] = w[o mod (O/r)]``  ``1 2 3 1 2 3``             tile
    ============  =========================  ==========================  ==================

    ``order="tile"`` is the pattern of ``channel_shared(over="groups")``: with ``outputs`` the
    number of groups, the biases of streams that share one bank of filters are shared as the
    filters are. ``order="block"`` is `row_repeat`, told how often and not how many.

    Args:
        outputs: ``r``, how often every output stands; it must divide the number of outputs ``O``.
        order: ``"block"``, equal outputs side by side, or ``"tile"``, the whole row of outputs
            again and again.
        compute: how the layer computes: ``"auto"``, the fastest way that it has; ``"dense"``,
            ``"reduced"`` or ``"windows"`` force one, for measuring.

    Shapes: ``free``: ``(O/r, *rest)``; ``weight``: ``(O, *rest)``, in the canonical layout.
    Each stored value has ``r`` copies and receives the sum of their gradients.

    Source: ``repeat_interleave`` and ``tile`` of torch, as patterns of a weight; the projection
    is the orbit mean (Ravanbakhsh et al. 2017).

    Example:
        >>> layer = tp.register_tie(nn.Linear(4, 6), "repeat", "bias", outputs=2, order="tile")
        >>> _ = tp.assign_(layer, torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0]), "bias")
        >>> layer.parametrizations.bias.original0.tolist()
        [1.0, 2.0, 3.0]
    """

    family = "repetition"
    law: str = "W[o] = w[o // r]  (order='block'; also 'tile')"

    def __init__(self, outputs: int, *, order: Order = "block", compute: Compute = "auto") -> None:
        super().__init__(compute)
        self.outputs = outputs
        self.order: Order = order
        self.law: str = (
            _LAWS.get(order, type(self).law) if isinstance(order, str) else type(self).law
        )

    def options(self) -> dict[str, Any]:
        """``outputs``, and ``order`` where it is not ``"block"``."""
        return {"outputs": self.outputs} | ({} if self.order == "block" else {"order": self.order})

    def check(self, layout: Layout) -> Reason | None:
        """``outputs`` must be a positive divisor of the number of outputs, ``order`` known."""
        if not isinstance(self.order, str) or self.order not in _LAWS:
            known = ", ".join(f"'{order}'" for order in _LAWS)
            return Reason(f"order={self.order!r} is unknown.", f"Choose one of {known}.")
        if not isinstance(self.outputs, int) or isinstance(self.outputs, bool) or self.outputs < 1:
            return Reason(f"outputs must be a positive integer, not {self.outputs!r}.")
        if not layout.shape:
            return Reason("a tensor without axes has no outputs.", "Tie a weight or a bias.")
        out = layout.canonical_shape[0]
        if out % self.outputs:
            return Reason(
                f"{out} outputs cannot stand outputs={self.outputs} times each.",
                f"Choose a divisor of {out}.",
            )
        return None

    def blocks(self) -> Blocks:
        """``(O/r, r, *rest)`` shared along the second axis, or ``(r, O/r, *rest)`` the first."""
        return repeated(self.bound_layout.canonical_shape, self.outputs, self.order)

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
        )
