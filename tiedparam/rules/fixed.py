"""Fixed entries: W[e] = v[e] on the mask, and all others are free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from tiedparam.laws import Coded, Reason
from tiedparam.laws.layout import Layout
from tiedparam.laws.masks import given_mask, numbered, spread_over, why_not_over
from tiedparam.laws.packing import pack_flags, unpack_flags
from tiedparam.laws.pattern import Pattern
from tiedparam.laws.registry import register_rule
from tiedparam.laws.rule import Example
from tiedparam.util.bits import checksum_of
from tiedparam.util.torch_modes import plain_numbers
from tiedparam.util.torch_private import has_values

_WEIGHT = "the weight as it is when it is tied"


@register_rule("fixed")
class Fixed(Coded):
    """Some entries keep the numbers that they have, or are given; the others are trained.

    Fixed numbers are no Parameters: no gradient, no weight decay and no optimizer state reaches
    them. They are cast with the layer.

    Args:
        mask: which entries are fixed: True there. Of the tensor's own shape, or of its first axes,
            such as ``(O,)`` for whole outputs; 1 stands for any size. It is stored with the layer,
            a bit for each of its entries.
        value: what they are fixed to: a number; a tensor of the mask's shape, or of the tensor's,
            of which the entries on the mask are stored; or None, the weight as it is when it is
            tied. Such numbers are a part of the law, and a state dict that has others is refused;
            not so with None, where a state dict of the tied layer brings its own.

    Shapes: ``free``: ``(1, entries that are False)``, in the order of the tensor; ``weight``: any.
    Refused are masks that are all True or all False, and numbers that are not finite.

    Source: ``torch.where(mask, value, weight)`` after every step, which is also the projection.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> mask = torch.tensor([[True, False], [False, False]])
        >>> _ = tp.register_tie(layer, "fixed", mask=mask, value=1.0)
        >>> layer.weight[0, 0].item(), tp.get_tie(layer).free_count
        (1.0, 3)
    """

    family = "zeros and fixed values"
    law: str = "W[e] = v[e] on the mask"
    complex_valued = True

    def __init__(self, mask: Tensor | str, value: float | Tensor | str | None = None) -> None:
        super().__init__()
        self.value: Any = None if isinstance(value, Tensor) else value
        """The number, a checksum of the numbers that were given, or None."""
        if isinstance(mask, str):
            self.expect(mask)
            return
        given = given_mask(mask)
        if isinstance(given, Tensor) and isinstance(value, Tensor):
            given = self._keep_values(given, value)
        if isinstance(given, Reason):
            self.fault = given
        else:
            self.keep(tuple(given.shape), {"mask_bits": pack_flags(given.flatten())})
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor, type(None))):
            self.fault = Reason(f"value={value!r} is no number.", "Give a number or a tensor.")
        elif isinstance(value, (int, float)) and not isfinite(value):
            self.fault = Reason(f"value={value!r} is not finite.", "Give a finite number.")

    def _keep_values(self, mask: Tensor, value: Tensor) -> Tensor | Reason:
        """Store the numbers on the mask; returns the mask in their shape."""
        if not has_values(value) or value.dtype == torch.bool:
            return Reason(f"value is {value.dtype} {tuple(value.shape)} without numbers.")
        with plain_numbers():
            value = value.detach().cpu()
            if value.shape != mask.shape:
                if why_not_over(tuple(mask.shape), tuple(value.shape)) is not None:
                    return Reason(
                        f"value is {tuple(value.shape)}, and mask {tuple(mask.shape)}.",
                        "Give a value for each place of the mask.",
                    )
                mask = spread_over(mask, tuple(value.shape))
            values = value[mask]
            if not bool(values.isfinite().all()):
                count = int((~values.isfinite()).sum())
                return Reason(f"{count} of {len(values)} fixed numbers are not finite.")
            self.hold({"values": values})
            self.value = _checksum(values)
            return mask.contiguous()

    def options(self) -> dict[str, Any]:
        """The mask's tag; the number, or a checksum of the numbers that were given."""
        return {"mask": self.tag} | ({} if self.value is None else {"value": self.value})

    def check(self, layout: Layout) -> Reason | None:
        """The mask must fit the tensor, and leave something."""
        reason = super().check(layout) or why_not_over(self.coded_shape, layout.shape)
        if reason is None and bool(self._mask_given().all()):
            places = self._mask_given().numel()
            fact = f"mask is True at all of its {places} places, so no value is left to train."
            return Reason(fact, "Freeze the layer (requires_grad_(False)), or free some entries.")
        return reason

    def bind_tensor(self, weight: Tensor, layout: Layout) -> Reason | None:
        """`bind`, after the numbers were taken that are to be fixed."""
        takes_weight = self.value is None and self._buffers.get("values") is None
        if takes_weight and super().check(layout) is None:
            reason = why_not_over(self.coded_shape, layout.shape)
            if reason is None and not has_values(weight):
                reason = Reason(
                    f"the fixed numbers are to be {_WEIGHT}, and it has no values.",
                    "Load the layer first, or give value=.",
                )
            if reason is not None:
                return reason
            with plain_numbers():
                mask = spread_over(self._mask_given(), layout.shape).contiguous()
                self.hold({"values": weight.detach().cpu()[mask]})
                self.keep(layout.shape, {"mask_bits": pack_flags(mask.flatten())})
        held = self._buffers.get("values")
        if held is not None:
            self.hold({"values": held.to(weight.dtype)})
        return super().bind_tensor(weight, layout)

    def bind(self, layout: Layout, dtype: torch.dtype) -> Reason | None:
        """Fit the rule to a layout. The numbers must be known."""
        if self.value is None and self.fault is None and self._buffers.get("values") is None:
            return Reason(f"the fixed numbers are to be {_WEIGHT}.", "Tie it by register_tie.")
        return super().bind(layout, dtype)

    @property
    def holds_numbers(self) -> bool:
        """Unless one number was given, which is an option."""
        return not isinstance(self.value, (int, float))

    def why_other_data(self, data: Mapping[str, Tensor]) -> Reason | None:
        """Neither another mask, nor other numbers where the law says them."""
        reason = super().why_other_data(data)
        there, here = data.get("values"), self._buffers.get("values")
        if reason is not None or not isinstance(self.value, str):
            return reason
        if there is None:
            return Reason(f"the numbers of '{self}' are missing.", "Fetch or save it again.")
        if here is there or not has_values(there):
            return None
        with plain_numbers():
            if _checksum(there) == self.value:
                return None
            if here is not None and has_values(here) and _same_numbers(there, here):
                return None
        return Reason(
            f"it has other fixed numbers than '{self}'.", "Tie the layer by those, as value=."
        )

    # The law ------------------------------------------------------------------------------------

    def _mask_given(self) -> Tensor:
        """The mask in the shape that it was given in."""
        flags = unpack_flags(self.data()["mask_bits"], torch.Size(self.coded_shape).numel())
        return flags.view(self.coded_shape)

    @property
    def fixed_entries(self) -> Tensor:
        """Which entries are fixed: truth values of the tensor's shape, on the CPU."""
        return spread_over(self._mask_given(), self.bound_layout.shape)

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """The weight with the fixed numbers on the mask."""
        mask, values = self._mask_given(), self._buffers.get("values")
        numbers = torch.zeros(self.coded_shape, dtype=weight.dtype, device="cpu")
        numbers[mask] = self.value if values is None else values.detach().cpu().to(weight.dtype)
        numbers = spread_over(numbers, tuple(weight.shape)).to(weight.device)
        yield torch.where(self.fixed_entries.to(weight.device), numbers, weight)

    @property
    def is_derived(self) -> bool:
        """The table is; `forward` only puts the numbers in, which may have been cast."""
        return True

    def find_pattern(self) -> Pattern:
        """Read off the mask. Stored numbers are counted, and `forward` puts them in."""
        with plain_numbers():
            mask, free = self._mask_given(), ~self.fixed_entries
            if self._buffers.get("values") is None:
                fixed = torch.where(mask, float(self.value), 0.0).double()
            else:
                fixed = torch.where(mask, mask.flatten().cumsum(0).view(mask.shape), 0).double()
            fixed = spread_over(fixed, tuple(free.shape)).flatten()
            return replace(numbered(free), fixed=fixed if bool(fixed.any()) else None)

    def forward(self, *free: Tensor) -> Tensor:
        """Look up every entry among the free values and the fixed ones."""
        (values,) = free
        fixed = self._buffers.get("values")
        if fixed is None:
            return self._table(values)
        return self._table(values, fixed.to(values.device, values.dtype))

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """None: which entries are fixed is the user's choice."""
        return ()

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Numbers and tensors, on matrices, convolutions and a bias."""
        chess = torch.arange(12, device="cpu").view(4, 3).remainder(2).bool()
        numbers = torch.linspace(-1, 1, 12, device="cpu").view(4, 3)
        rows = torch.tensor([True, False, True, False, False], device="cpu")
        return (
            Example(lambda: nn.Linear(3, 4), {"mask": chess, "value": numbers}),
            Example(lambda: nn.Linear(2, 5), {"mask": rows, "value": 0.5}),
            Example(lambda: nn.ConvTranspose1d(4, 3, 2), {"mask": chess, "value": -1}),
            Example(lambda: nn.Linear(2, 5), {"mask": rows, "value": 0.0}, "", "bias"),
        )


def _checksum(values: Tensor) -> str:
    """The same for equal numbers, whatever their dtype."""
    wide = torch.complex128 if values.is_complex() else torch.float64
    return f"sha256:{checksum_of({'values': values.detach().cpu().to(wide)})}"


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether they are equal in the coarser of their dtypes."""
    one, other = one.detach().cpu(), other.detach().cpu()
    coarse = max(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(one.to(coarse), other.to(coarse))
