"""Per-channel sharing: W[o, c, x] = w[o, x], w[c, x], w[x] or w[o mod (O/g), c, x]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from tiedparam.laws import Reason
from tiedparam.laws.broadcast import Blocks, Broadcast, Compute
from tiedparam.laws.choices import why_not_one_of
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout
from tiedparam.laws.registry import register_rule

Over = Literal["in", "out", "all", "groups"]
_LAWS: dict[Over, str] = {
    "in": "W[o, c, x] = w[o, x]",
    "out": "W[o, c, x] = w[c, x]",
    "all": "W[o, c, x] = w[x]",
    "groups": "W[k·m + r, c, x] = w[r, c, x]",
}


@register_rule("channel_shared")
class ChannelShared(Broadcast):
    """The same filter for every channel, ``x`` a kernel position.

    ============  =================================  =======================
    ``over``      law                                free values
    ============  =================================  =======================
    ``"in"``      ``W[o, c, x] = w[o, x]``           ``(O, 1, *kernel)``
    ``"out"``     ``W[o, c, x] = w[c, x]``           ``(1, C/g, *kernel)``
    ``"all"``     ``W[o, c, x] = w[x]``              ``(1, 1, *kernel)``
    ``"groups"``  ``W[k·m + r, c, x] = w[r, c, x]``  ``(O/g, C/g, *kernel)``
    ============  =================================  =======================

    ``"in"`` applies one kernel per output to every input channel, which equals summing
    the channels first. ``"groups"`` filters independent streams (the groups of a grouped
    convolution) with one small bank: ``k`` counts the groups, from 0 to ``g − 1``, and ``r`` the
    ``m = O/g`` filters of a group.

    Args:
        over: which channels share: ``"in"``, ``"out"``, ``"all"`` or ``"groups"``.
        compute: how the layer computes: ``"auto"``, the fastest way that it has; ``"dense"``,
            ``"reduced"`` or ``"windows"`` force one, for measuring.

    ``O`` outputs, ``C`` inputs, ``g`` groups; ``c`` runs within a group; ``weight`` has the
    layer's own shape, and the law is stated for the canonical layout. The bias is left alone; that
    of streams follows the filters by `repeat`, ``outputs=g, order="tile"``.
    Each stored value receives the sum of its copies' gradients.

    Source: "same filter for each channel", the PyTorch forum; the projection is the orbit
    mean (Ravanbakhsh et al. 2017).

    Example:
        >>> conv = tp.register_tie(nn.Conv2d(3, 4, 5), "channel_shared", over="in")
        >>> torch.equal(conv.weight[:, 0], conv.weight[:, 2]), tp.get_tie(conv).free_shapes()
        (True, ((4, 1, 5, 5),))
    """

    family = "repetition"
    law: str = "W[o, c, x] = w[o, x]  (over='in'; also 'out', 'all', 'groups')"

    def __init__(self, over: Over = "in", compute: Compute = "auto") -> None:
        super().__init__(compute)
        self.over: Over = over
        self.law = _LAWS.get(over, type(self).law) if isinstance(over, str) else type(self).law

    def options(self) -> dict[str, Any]:
        """``over``."""
        return {"over": self.over}

    def check(self, layout: Layout) -> Reason | None:
        """``over`` must be known, the tensor must have channels, ``groups`` needs groups."""
        reason = why_not_one_of("over", self.over, Over)
        if reason is not None:
            return reason
        vector = len(layout.shape) < 2
        if self.over == "groups" and (layout.layer_groups if vector else layout.groups) == 1:
            return Reason(
                "over='groups' shares one bank between the groups of a convolution, and this "
                "layer has groups=1.",
                "Build the layer with groups=, or use over='in'.",
            )
        if vector:
            return Reason("the tensor has no input channels.", self._for_vectors(layout))
        return None

    def _for_vectors(self, layout: Layout) -> str:
        """How a bias follows the filters of this law."""
        if self.over == "in":
            return "Tie a weight; every output has a filter of its own here, and a bias too."
        if self.over == "groups":
            options = f"outputs={layout.layer_groups}, order='tile'"
            return f"To repeat a bias as the filters are repeated use 'repeat', {options}."
        return "To give all outputs one bias, as they have one filter, use 'row_repeat'."

    def blocks(self) -> Blocks:
        """The canonical axes, outputs split by group for ``over="groups"``."""
        layout = self.bound_layout
        out, *rest = layout.canonical_shape
        if self.over == "groups":
            return Blocks((layout.groups, out // layout.groups), tuple(rest), shared=(0,))
        shared = {"in": (1,), "out": (0,), "all": (0, 1)}[self.over]
        return Blocks((out,), tuple(rest), shared)

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """Every ``over``; ``"groups"`` where there are groups."""
        return tuple({"over": over} for over in _LAWS if over != "groups" or layout.groups > 1)

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Every ``over`` on convolutions of 1 to 3 dimensions, transposed ones and Linear."""
        return (
            Example(lambda: nn.Conv2d(3, 4, 3)),
            Example(lambda: nn.Conv1d(4, 6, 5, groups=2), {"over": "in"}),
            Example(lambda: nn.Conv3d(2, 3, (3, 2, 1)), {"over": "in"}),
            Example(lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), {"over": "in"}),
            Example(lambda: nn.Conv2d(3, 4, 3), {"over": "out"}),
            Example(lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), {"over": "out"}),
            Example(lambda: nn.Conv2d(3, 4, 3), {"over": "all"}),
            Example(lambda: nn.Linear(5, 4), {"over": "all"}),
            Example(lambda: nn.Conv1d(6, 12, 3, groups=3), {"over": "groups"}),
            Example(lambda: nn.ConvTranspose3d(4, 6, (1, 2, 2), groups=2), {"over": "groups"}),
        )
