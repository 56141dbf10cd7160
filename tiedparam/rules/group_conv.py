"""Group convolutions: V[o, g, i, h, x] = V[o, 0, i, g⁻¹h, g⁻¹x], g a turn or a flip."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

from tiedparam.laws import Call, Reason, Use, form
from tiedparam.laws.choices import why_not_one_of
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout
from tiedparam.laws.orbits import Orbits
from tiedparam.laws.registry import register_rule
from tiedparam.laws.times import Making, Time, relative_time
from tiedparam.products.quarter_turns import quarter_turn_product
from tiedparam.products.reduced import Parts, convolution_by_sums

PlaneGroup = Literal["p4", "p4m"]
Compute = Literal["auto", "dense", "fourier", "reduced"]
_LIFTING = "V[o, g, i, x] = V[o, 0, i, g⁻¹x]"


def _cost_of_fourier(rule: GroupConv, use: Use) -> float | None:
    if not _is_pointwise(use) or use.layout.groups > 1 or rule.lift or rule.group != "p4":
        return None
    fourier = Time(200, 0.3, values=1.1, entries=1.0)
    return relative_time(use, fourier, rule.making)


def _cost_of_reduced(rule: GroupConv, use: Use) -> float | None:
    if not _is_pointwise(use) or not rule.lift:
        return None
    if use.layout.groups > 1:
        return 1.0  # not measured
    size = 8 if rule.group == "p4m" else 4
    reduced = Time(35, 0.8 / size, values=0.25)
    return relative_time(use, reduced, rule.making)


def _is_pointwise(use: Use) -> bool:
    return use.kind == "convolution" and use.layout.kernel == (1, 1)


@register_rule("group_conv")
class GroupConv(Orbits):
    """A convolution of fields over a group: ``V[o, g, i, h, x] = V[o, 0, i, g⁻¹h, g⁻¹x]``.

    A field has one channel for each element of the group, in which the layer answers to the
    pattern in that orientation. Channels are (field, element), the element fastest: channel
    ``|G|·o + g``. Turning the image turns the output and moves its channels from ``g`` to ``sg``.

    ==========  ===================================================================  ========
    ``group``   elements                                                             ``|G|``
    ==========  ===================================================================  ========
    ``"p4"``    ``k``: ``k`` quarter turns, as ``torch.rot90(image, k, (-2, -1))``   4
    ``"p4m"``   ``k`` as in p4; ``4 + k``: left-right flip, then ``k`` quarter       8
                turns
    ==========  ===================================================================  ========

    With ``lift=True`` the inputs are plain channels, as those of an image, and the law is
    ``V[o, g, i, x] = V[o, 0, i, g⁻¹x]``. Equivariance needs stride 1, symmetric padding, and a
    bias that is the same within a field (``repeat`` with ``outputs=|G|``). Transposed convolutions
    are equivariant as well.

    Args:
        group: ``"p4"``, quarter turns; ``"p4m"``, with flips.
        lift: whether the inputs are plain channels and not fields.
        compute: how a 1×1 convolution computes: ``"auto"``, the fastest way; ``"fourier"``, by the
            transform over quarter turns (p4, between fields), ``"reduced"``, one channel for the
            equal ones of a field (with ``lift``), or ``"dense"`` force one, for measuring.

    Shapes: for ``O`` fields of outputs and ``I`` fields (or plain channels) of inputs in a group
    of the convolution, and ``P`` kernel positions, ``free``: ``(O, I·|G|·P)``, or with ``lift``
    ``(O, I·P)``; a transposed convolution stores them by input fields. ``weight``: the layer's
    own, with square kernels, and whole fields in every group of the convolution.

    Multiplicity ``|G|``, everywhere.

    Source: Cohen, Welling 2016, "Group equivariant convolutional networks".

    Example:
        >>> conv = tp.register_tie(nn.Conv2d(8, 16, 3, padding=1, bias=False), "group_conv")
        >>> image = torch.randn(1, 2, 4, 9, 9)  # two fields
        >>> turned = image.rot90(1, (3, 4)).roll(1, 2)
        >>> answer = conv(image.flatten(1, 2)).unflatten(1, (4, 4))
        >>> expected = answer.rot90(1, (3, 4)).roll(1, 2)
        >>> torch.allclose(conv(turned.flatten(1, 2)).unflatten(1, (4, 4)), expected, atol=1e-5)
        True
    """

    family = "equivariance"
    law: str = "V[o, g, i, h, x] = V[o, 0, i, g⁻¹h, g⁻¹x]"
    making: Making = Making(0.9, 1.8, call=49, trained_call=90)
    states_whole_group = True

    def __init__(
        self, group: PlaneGroup = "p4", *, lift: bool = False, compute: Compute = "auto"
    ) -> None:
        super().__init__()
        self.compute = compute
        self.group: PlaneGroup = group
        self.lift = lift
        self.law = _LIFTING if lift else type(self).law

    def options(self) -> dict[str, Any]:
        """``group``, and ``lift`` where it is true."""
        return {"group": self.group} | ({"lift": True} if self.lift else {})

    @property
    def _size(self) -> int:
        return 8 if self.group == "p4m" else 4

    def check(self, layout: Layout) -> Reason | None:
        """Square kernels, and whole fields in every group of the convolution."""
        reason = why_not_one_of("group", self.group, PlaneGroup)
        if reason is not None:
            return reason
        if not isinstance(self.lift, bool):
            return Reason(f"lift must be True or False, not {self.lift!r}.")
        if len(layout.kernel) != 2 or layout.kernel[0] != layout.kernel[1]:
            return Reason(
                f"the tensor {layout.shape} has no square kernels, which could be turned.",
                "Tie a 2-D convolution; a kernel (1, 1) does what a Linear layer does.",
            )
        outputs, inputs = layout.canonical_shape[0] // layout.groups, layout.canonical_shape[1]
        of_group = " of a group" if layout.groups > 1 else ""
        for side, channels in (("outputs", outputs), ("inputs", inputs)):
            if channels % self._size and not (side == "inputs" and self.lift):
                remedy = f"Choose a multiple of {self._size}"
                remedy += "." if side == "outputs" else ", or lift=True for plain channels."
                return Reason(
                    f"the {channels} {side}{of_group} are not made of fields of {self._size} "
                    f"elements ('{self.group}').",
                    remedy,
                )
        return None

    def cell(self) -> tuple[int, ...]:
        """One field of outputs with one field, or plain channel, of inputs."""
        return (self._size, 1 if self.lift else self._size, *self.bound_layout.kernel)

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """The action of every element on both fields and on the kernel's positions."""
        layout, size = self.bound_layout, self._size
        outputs, inputs, *kernel = layout.canonical_shape
        fields = layout.canonical(weight).reshape(
            outputs // size, size, *((inputs, 1) if self.lift else (inputs // size, size)), *kernel
        )
        for element in range(1, size):
            quarters, flipped = element % 4, element >= 4
            image = (fields.flip(-1) if flipped else fields).rot90(quarters, (-2, -1))
            before = [_before(element, each) for each in range(size)]
            image = image[:, before] if self.lift else image[:, before][:, :, :, before]
            yield layout.native(image.reshape(layout.canonical_shape))

    @form(
        "reduced",
        cost=_cost_of_reduced,
        where="anywhere",
        multiply_adds=lambda rule, use: rule.free_count,
    )
    def by_one_channel(self, call: Call) -> Tensor:
        """Compute one channel of a field: a single position is the same in every orientation."""
        outputs, inputs, *kernel = self.bound_layout.shape
        fields = Parts((outputs // self._size, self._size), shared=(1,))
        weight = call.free[0].view(fields.sizes[0], inputs, *kernel)
        return convolution_by_sums(
            call.stock, call.input, weight, call.bias, Parts((inputs,)), fields
        )

    @form(
        "fourier",
        cost=_cost_of_fourier,
        where="compiled",
        multiply_adds=lambda rule, use: 6 * rule.free_count // 4,
    )
    def by_fourier(self, call: Call) -> Tensor | None:
        """Multiply where a convolution over the group is a few products, if no pixel is skipped."""
        layer, (outputs, inputs, *_) = call.layer, self.bound_layout.shape
        plain = layer.stride == (1, 1) and layer.padding in ((0, 0), "valid", "same")
        if not plain or not call.input.is_contiguous():
            return None
        free = call.free[0].view(outputs // 4, inputs // 4, 4)
        return quarter_turn_product(call.input, free, call.bias)

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """Both groups, with and without lifting."""
        groups = get_args(PlaneGroup)
        return tuple({"group": group, "lift": lift} for group in groups for lift in (False, True))

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Both groups, regular and lifting; odd, even and 1×1 kernels; grouped and transposed."""
        return (
            Example(lambda: nn.Conv2d(4, 8, 3), {"group": "p4"}),
            Example(lambda: nn.Conv2d(2, 8, 3), {"group": "p4", "lift": True}),
            Example(lambda: nn.Conv2d(8, 8, 2), {"group": "p4m"}),
            Example(lambda: nn.Conv2d(8, 8, 1, groups=2), {"group": "p4"}),
            Example(lambda: nn.ConvTranspose2d(8, 8, 2, groups=2), {"group": "p4"}),
            Example(lambda: nn.ConvTranspose2d(2, 8, 3), {"group": "p4m", "lift": True}),
        )


def _before(acting: int, element: int) -> int:
    """What ``acting`` takes to ``element``: the product ``acting⁻¹·element``.

    An element ``4·f + k`` is ``rᵏmᶠ``, with ``m·r = r⁻¹·m``.
    """
    (turned, by), (flipped, k) = divmod(acting, 4), divmod(element, 4)
    # (rᵇmᵗ)⁻¹ rᵏmᶠ = mᵗ rᵏ⁻ᵇ mᶠ
    return 4 * (turned ^ flipped) + ((by - k) if turned else (k - by)) % 4
