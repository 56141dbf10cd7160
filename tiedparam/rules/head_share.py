"""Attention heads that share: W[h·d + r] = V[(h // g)·d + r]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tiedparam.laws import Reason
from tiedparam.laws.broadcast import Blocks, Broadcast, Compute
from tiedparam.laws.choices import why_no_count
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout
from tiedparam.laws.registry import register_rule


@register_rule("head_share")
class HeadShare(Broadcast):
    """Rows come in heads, and neighbouring heads share theirs: ``W[h·d + r] = V[(h // g)·d + r]``.

    The rows are ``heads`` blocks of ``d`` rows, and every ``g = heads/groups`` neighbours are one:
    the keys and values of grouped-query attention, in a layer that computes as many heads as
    before. With ``groups=1`` it is multi-query attention. The bias has rows, too: tie it as well.

    Args:
        heads: how many heads the rows are; it must divide the number of rows.
        groups: how many of them differ; it must divide ``heads``.
        compute: how the layer computes: ``"auto"``, the fastest way that it has; ``"dense"``
            or ``"reduced"`` force one, for measuring.

    Shapes: ``free``: ``(groups·d, *rest)``, the projection of the grouped model; ``weight``:
    ``(heads·d, *rest)``, in the canonical layout. Multiplicity ``g``. The projection is the mean of
    each group's heads.

    Source: "GQA: training generalized multi-query transformer models from multi-head checkpoints"
    (Ainslie et al. 2023), which pools heads so.

    Example:
        >>> keys = tp.register_tie(nn.Linear(8, 8), "head_share", heads=4, groups=2)
        >>> heads = keys.weight.view(4, 2, 8)
        >>> torch.equal(heads[0], heads[1]), torch.equal(heads[1], heads[2])
        (True, False)
    """

    family = "repetition"
    law = "W[h·d + r] = V[(h // (heads/groups))·d + r]"

    def __init__(self, heads: int, groups: int, compute: Compute = "auto") -> None:
        super().__init__(compute)
        self.heads: int = heads
        self.groups: int = groups

    def options(self) -> dict[str, Any]:
        """``heads`` and ``groups``."""
        return {"heads": self.heads, "groups": self.groups}

    def check(self, layout: Layout) -> Reason | None:
        """``heads`` must divide the number of rows, and ``groups`` that of heads."""
        for name, count in self.options().items():
            reason = why_no_count(name, count)
            if reason is not None:
                return reason
        if not layout.shape:
            return Reason("a tensor without axes has no rows.", "Tie a weight or a bias.")
        rows = layout.canonical_shape[0]
        if rows % self.heads:
            return Reason(
                f"the {rows} rows are not heads={self.heads} blocks of equal size.",
                f"Choose a divisor of {rows}: the number of heads of the attention.",
            )
        if self.heads % self.groups:
            return Reason(
                f"heads={self.heads} cannot be shared out evenly to groups={self.groups}.",
                f"Choose a divisor of {self.heads}.",
            )
        return None

    def blocks(self) -> Blocks:
        """``(groups, heads/groups, d, *rest)``, shared along the heads of a group."""
        rows, *rest = self.bound_layout.canonical_shape
        heads = (self.groups, self.heads // self.groups, rows // self.heads)
        return Blocks(heads, tuple(rest), shared=(1,))

    def part(self, axis: int, parts: int, number: int) -> HeadShare | None:
        """Of the rows, a slice has whole groups of heads, or heads of the one that there is."""
        if axis:
            return self
        if self.heads % parts or (self.groups > 1 and self.groups % parts):
            return None
        return HeadShare(self.heads // parts, max(1, self.groups // parts))

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """None: a layer does not say how many heads its rows are."""
        return ()

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Several groups and one, on a weight and a bias; heads of one row."""
        return (
            Example(lambda: nn.Linear(6, 8), {"heads": 4, "groups": 2}),
            Example(lambda: nn.Linear(6, 6), {"heads": 3, "groups": 1}),
            Example(lambda: nn.Linear(6, 8), {"heads": 4, "groups": 2}, tensor_name="bias"),
            Example(lambda: nn.Linear(5, 6), {"heads": 6, "groups": 3}),
        )
