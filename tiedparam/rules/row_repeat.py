"""Row repetition: W[o] = w[o // (out/groups)]."""

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
from tiedparam.rules.repeat import repeated


@register_rule("row_repeat")
class RowRepeat(Broadcast):
    """Equal rows: ``W[o] = w[o // (out/groups)]``, for any tensor with an output axis.

    With ``groups=1`` all outputs read one stored row; with more, the rows come in
    ``groups`` blocks of equal rows. The option is independent of a convolution's own
    groups.

    Args:
        groups: how many different rows there are; it must divide the number of outputs.
        compute: how the layer computes: ``"auto"``, the fastest way that it has; ``"dense"``
            or ``"reduced"`` force one, for measuring.

    Shapes: ``free``: ``(groups, *rest)``; ``weight``: ``(out, *rest)``, in the canonical
    layout. Each stored value has ``out/groups`` copies and receives the *sum* of their
    gradients, which is an ``out/groups`` times larger effective learning rate under SGD.

    Source: "linear layer in which all rows are the same", the PyTorch forum; the
    projection is the orbit mean (Ravanbakhsh et al. 2017).

    Example:
        >>> layer = tp.register_tie(nn.Linear(2, 4), "row_repeat", groups=2)
        >>> _ = tp.assign_(layer, torch.arange(8.0).reshape(4, 2), project=True)
        >>> layer.weight.tolist()
        [[1.0, 2.0], [1.0, 2.0], [5.0, 6.0], [5.0, 6.0]]
    """

    family = "repetition"
    law = "W[o] = w[o // (out/groups)]"

    def __init__(self, groups: int = 1, compute: Compute = "auto") -> None:
        super().__init__(compute)
        self.groups = groups

    def options(self) -> dict[str, Any]:
        """``groups``."""
        return {"groups": self.groups}

    def check(self, layout: Layout) -> Reason | None:
        """``groups`` must be a positive divisor of the number of outputs."""
        reason = why_no_count("groups", self.groups)
        if reason is not None:
            return reason
        if not layout.shape:
            return Reason("a tensor without axes has no rows.", "Tie a weight or a bias.")
        out = layout.canonical_shape[0]
        if out % self.groups:
            return Reason(
                f"the {out} rows cannot be cut into groups={self.groups} equal blocks.",
                f"Choose a divisor of {out}.",
            )
        return None

    def blocks(self) -> Blocks:
        """``(groups, out/groups, *rest)``, shared along the rows of a block."""
        shape = self.bound_layout.canonical_shape
        return repeated(shape, shape[0] // self.groups, "block")

    def part(self, axis: int, parts: int, number: int) -> RowRepeat | None:
        """Of the rows, a slice has as many blocks fewer, or lies within the one that there is."""
        if axis or self.groups == 1:
            return self
        return RowRepeat(self.groups // parts) if self.groups % parts == 0 else None

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """One row for all outputs; one for every group of a grouped convolution."""
        return ({}, {"groups": layout.groups}) if layout.groups > 1 else ({},)

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Linear and bias, convolutions of every kind, an embedding."""
        return (
            Example(lambda: nn.Linear(5, 4)),
            Example(lambda: nn.Linear(5, 6), {"groups": 3}),
            Example(lambda: nn.Linear(5, 6), {"groups": 2}, tensor_name="bias"),
            Example(lambda: nn.Conv2d(4, 6, 3, groups=2), {"groups": 3}),
            Example(lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), {"groups": 2}),
            Example(lambda: nn.Embedding(6, 3), {"groups": 2}),
        )
