"""Kernels with a symmetry of their own: W[o, c, x] = ±W[o, c, γx], γ a flip or a rotation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

from tiedparam.laws import Reason
from tiedparam.laws.choices import why_not_one_of
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout
from tiedparam.laws.orbits import Orbits
from tiedparam.laws.registry import register_rule

KernelGroup = Literal["h", "v", "hv", "point", "c4", "d4"]
Sign = Literal[1, -1]
_SQUARE = ("c4", "d4")


@register_rule("kernel_symmetry")
class KernelSymmetry(Orbits):
    """Every kernel is its own mirror image or rotation: ``W[o, c, x] = ±W[o, c, γx]``.

    ===========  =======  ==========================================  ====================
    ``group``    kernels  γ                                           −1 with ``sign=-1``
    ===========  =======  ==========================================  ====================
    ``"h"``      2-D      flip left-right (the last axis)             the flip
    ``"v"``      2-D      flip up-down (the axis before)              the flip
    ``"hv"``     2-D      both flips, and the half turn               the two flips
    ``"point"``  1 to 3   flip of all axes at once                    the flip
    ``"c4"``     square   quarter, half and three-quarter turn        the quarter turns
    ``"d4"``     square   the turns; flips of h, v and the diagonals  the four flips
    ===========  =======  ==========================================  ====================

    Rotations and flips are about the kernel's centre. With stride 1 and symmetric padding the layer
    then commutes with ``γ`` on the image, bias aside, and up to the sign; transposed convolutions
    do as well. Channels are left alone, so that groups of the convolution do not matter.

    With ``sign=-1`` positions that such a ``γ`` keeps are 0: an axis of ``"h"``, the centre of
    ``"c4"``. Composed elements have the product of the signs: half turns have +1 in ``"hv"``,
    ``"c4"`` and ``"d4"``.

    Args:
        group: the flips and rotations, as above.
        sign: 1, or −1 for kernels that change sign, such as derivatives.

    Shapes: ``free``: ``(O·C/g, n)``; ``weight``: the layer's own. A kernel of ``a×b`` positions
    has these ``n``, with ``P`` positions in all:

    ===========  ============================================  ======================
    ``group``    ``sign=1``                                    ``sign=-1``
    ===========  ============================================  ======================
    ``"h"``      ``a·⌈b/2⌉``                                   ``a·⌊b/2⌋``
    ``"v"``      ``⌈a/2⌉·b``                                   ``⌊a/2⌋·b``
    ``"hv"``     ``⌈a/2⌉·⌈b/2⌉``                               ``⌊a/2⌋·⌊b/2⌋``
    ``"point"``  ``⌈P/2⌉``                                     ``⌊P/2⌋``
    ``"c4"``     ``⌈a²/4⌉``                                    ``⌊a²/4⌋``
    ``"d4"``     ``m(m+1)/2``, ``m = ⌈a/2⌉``                   ``m(m−1)/2``, ``m = ⌊a/2⌋``
    ===========  ============================================  ======================

    Source: Dieleman, De Fauw, Kavukcuoglu 2016, "Exploiting cyclic symmetry in convolutional neural
    networks", for rotated inputs; the signs are the characters of the group of degree one.

    Example:
        >>> conv = tp.register_tie(nn.Conv2d(2, 4, 5), "kernel_symmetry", group="d4")
        >>> torch.equal(conv.weight, conv.weight.rot90(1, (2, 3))), tp.get_tie(conv).free_count
        (True, 48)
    """

    family = "symmetries"
    law = "W[o, c, x] = ±W[o, c, γx]"
    states_whole_group = True

    def __init__(self, group: KernelGroup = "d4", *, sign: Sign = 1) -> None:
        super().__init__()
        self.group: KernelGroup = group
        self.sign: Sign = sign

    def options(self) -> dict[str, Any]:
        """``group``, and ``sign`` where it is −1."""
        return {"group": self.group} | ({} if self.sign == 1 else {"sign": self.sign})

    def check(self, layout: Layout) -> Reason | None:
        """The group must be known and fit the kernel's axes and sizes."""
        reason = why_not_one_of("group", self.group, KernelGroup)
        reason = reason or why_not_one_of("sign", self.sign, Sign)
        if reason is not None:
            return reason
        kernel = layout.kernel
        if not kernel:
            return Reason(
                f"the tensor {layout.shape} has no kernel positions.", "Tie a convolution."
            )
        if self.group != "point" and len(kernel) != 2:
            return Reason(
                f"group='{self.group}' is one of kernels with 2 axes, and the kernel {kernel} has "
                f"{len(kernel)}.",
                "Choose group='point'.",
            )
        if self.group in _SQUARE and kernel[0] != kernel[1]:
            return Reason(
                f"group='{self.group}' turns the kernel {kernel}, which is not square.",
                "Choose one of 'h', 'v', 'hv' and 'point'.",
            )
        return None

    def cell(self) -> tuple[int, ...]:
        """One kernel."""
        return (1, 1, *self.bound_layout.kernel)

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """The image under every ``γ``, times its sign."""
        if self.group in _SQUARE:
            for quarters in (1, 2, 3):
                sign = self.sign**quarters if self.group == "c4" else 1
                yield sign * weight.rot90(quarters, (-2, -1))
        if self.group == "d4":
            mirrored = weight.flip(-1)
            for quarters in range(4):
                yield self.sign * mirrored.rot90(quarters, (-2, -1))
        if self.group in ("h", "hv"):
            yield self.sign * weight.flip(-1)
        if self.group in ("v", "hv"):
            yield self.sign * weight.flip(-2)
        if self.group == "hv":
            yield weight.flip(-2, -1)
        if self.group == "point":
            yield self.sign * weight.flip(tuple(range(2, weight.dim())))

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """All groups that fit the number of axes, with both signs."""
        groups = get_args(KernelGroup) if len(layout.kernel) == 2 else ("point",)
        return tuple({"group": group, "sign": sign} for group in groups for sign in (1, -1))

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Every group; both signs; odd, even and oblong kernels; grouped and transposed layers."""
        return (
            Example(lambda: nn.Conv2d(2, 3, 3), {"group": "d4"}),
            Example(lambda: nn.Conv2d(2, 2, (3, 4)), {"group": "h", "sign": -1}),
            Example(lambda: nn.Conv2d(2, 2, (2, 3)), {"group": "v"}),
            Example(lambda: nn.Conv2d(4, 2, (3, 4), groups=2), {"group": "hv"}),
            Example(lambda: nn.ConvTranspose2d(4, 2, 4, groups=2), {"group": "c4", "sign": -1}),
            Example(lambda: nn.Conv1d(3, 2, 5), {"group": "point"}),
            Example(lambda: nn.Conv3d(1, 2, (3, 1, 2)), {"group": "point", "sign": -1}),
            Example(lambda: nn.Conv2d(1, 2, 4), {"group": "d4", "sign": -1}),
        )
