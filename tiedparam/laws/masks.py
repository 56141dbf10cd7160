"""Masks that users give: of the tensor's own shape, or of its first axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiedparam.laws.coded import Coded
from tiedparam.laws.layout import Layout
from tiedparam.laws.packing import pack_flags, unpack_flags
from tiedparam.laws.pattern import Pattern
from tiedparam.laws.times import Making
from tiedparam.util.errors import Reason
from tiedparam.util.torch_modes import plain_numbers
from tiedparam.util.torch_private import has_values


class OnMask(Coded):
    """A law of the entries where a mask is True, or of those where it is False."""

    making: Making = Making(0.85, 1.4, call=35, trained_call=110, small=(18, 75))

    def keep_mask(self, mask: Tensor | Reason) -> None:
        """Hold a mask; or, where there is none, the reason as a fault."""
        if isinstance(mask, Reason):
            self.fault: Reason | None = mask
        else:
            self.keep(tuple(mask.shape), {"mask_bits": pack_flags(mask.flatten())})

    def check(self, layout: Layout) -> Reason | None:
        """The mask must fit the tensor."""
        reason = super().check(layout)
        if reason is None and self.checksum:
            reason = why_not_over(self.coded_shape, layout.shape)
        return reason

    def given_mask(self) -> Tensor:
        """The mask in the shape that it was given in, on the CPU."""
        flags = unpack_flags(self.data()["mask_bits"], torch.Size(self.coded_shape).numel())
        return flags.view(self.coded_shape)


def mask_of(mask: Any) -> Tensor | Reason:
    """A mask as it was given, on the CPU; or why it is none."""
    if not isinstance(mask, Tensor):
        return Reason(f"mask is a {type(mask).__name__}.", "Give a tensor of truth values.")
    if mask.dtype != torch.bool:
        return Reason(
            f"mask is {mask.dtype} {tuple(mask.shape)}, and not torch.bool.", "Give mask != 0."
        )
    if not has_values(mask):
        return Reason(f"mask {tuple(mask.shape)} has no values.", "Make it on a real device.")
    with plain_numbers():
        plain: Tensor = mask.detach().cpu().to_dense()
        if not bool(plain.any()):
            return Reason(
                f"mask {tuple(mask.shape)} is False at all of its {mask.numel()} places.",
                "Give one that is True somewhere.",
            )
        return plain


def why_not_over(mask: tuple[int, ...], shape: tuple[int, ...]) -> Reason | None:
    """Why a mask of one shape says nothing of a tensor of another, or None."""
    if len(mask) <= len(shape) and all(
        own in (1, size) for own, size in zip(mask, shape, strict=False)
    ):
        return None
    return Reason(
        f"mask is {mask}, and the tensor {shape}.",
        "Give a mask of the tensor's own shape, or of its first axes; 1 stands for any size.",
    )


def spread_over(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask of the first axes, repeated along the others."""
    return mask.view(*mask.shape, *(1,) * (len(shape) - mask.dim())).expand(shape)


def numbered(free: Tensor) -> Pattern:
    """The pattern of a weight that is free where this is True, and fixed elsewhere."""
    with plain_numbers():
        free = free.flatten()
        number = free.cumsum(0, dtype=torch.int32)
        return Pattern(torch.where(free, number, 0), int(number[-1]), None)
