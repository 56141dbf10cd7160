"""Fixed entries: W[e] = v[e] on the mask, and all others are free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tiedparam.laws import Reason
from tiedparam.laws.dtypes import why_not_in
from tiedparam.laws.example import Example
from tiedparam.laws.fixed_values import (
    checksum_of_values,
    same_numbers,
    values_on,
    why_no_number,
)
from tiedparam.laws.layout import Layout
from tiedparam.laws.masks import OnMask, mask_of, numbered, spread_over
from tiedparam.laws.pattern import Pattern
from tiedparam.laws.registry import register_rule
from tiedparam.util.torch_modes import plain_numbers
from tiedparam.util.torch_private import has_values

_WEIGHT = "the weight as it is when it is tied"


@register_rule("fixed")
class Fixed(OnMask):
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
        found: Any = mask_of(mask)
        if isinstance(value, Tensor) and isinstance(found, Tensor):
            found = values_on(found, value)
            if not isinstance(found, Reason):
                found, values = found
                self.hold({"values": values})
                self.value = checksum_of_values(values)
        self.keep_mask(found)
        if not (value is None or isinstance(value, Tensor)):
            self.fault: Reason | None = self.fault or why_no_number(value)

    def options(self) -> dict[str, Any]:
        """The mask's tag; the number, or a checksum of the numbers that were given."""
        return ({"mask": self.tag} if self.checksum else {}) | (
            {} if self.value is None else {"value": self.value}
        )

    def check(self, layout: Layout) -> Reason | None:
        """The mask must fit the tensor, and leave something."""
        reason = super().check(layout)
        if reason is None and bool(self.given_mask().all()):
            places = self.given_mask().numel()
            fact = f"mask is True at all of its {places} places, so no value is left to train."
            return Reason(fact, "Freeze the layer (requires_grad_(False)), or free some entries.")
        return reason

    def bind_tensor(self, weight: Tensor, layout: Layout) -> Reason | None:
        """`bind`, after the numbers were taken that are to be fixed."""
        if self.value is None and self._buffers.get("values") is None:
            reason = self.check(layout)
            if reason is None and not has_values(weight):
                reason = Reason(
                    f"the fixed numbers are to be {_WEIGHT}, and it has no values.",
                    "Load the layer first, or give value=.",
                )
            if reason is not None:
                return reason
            with plain_numbers():
                mask = spread_over(self.given_mask(), layout.shape).contiguous()
                self.hold({"values": weight.detach().cpu()[mask]})
                self.keep_mask(mask)
        reason = super().bind_tensor(weight, layout)
        held = self._buffers.get("values")
        if reason is None and held is not None:
            self.hold({"values": held.to(weight.dtype)})
        return reason

    def bind(self, layout: Layout, dtype: torch.dtype) -> Reason | None:
        """Fit the rule to a layout. The numbers must be known, and the dtype hold them."""
        values = self._buffers.get("values")
        if self.fault is None and self.value is None and values is None:
            return Reason(f"the fixed numbers are to be {_WEIGHT}.", "Tie it by register_tie.")
        reason = None if values is None else why_not_in(dtype, values)
        return reason or super().bind(layout, dtype)

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
        if here is None or here is there or not (has_values(there) and has_values(here)):
            return None  # a file's own numbers, which may have been rounded since they were given
        if checksum_of_values(there) == self.value or same_numbers(there, here):
            return None
        return Reason(
            f"it has other fixed numbers than '{self}'.", "Tie the layer by those, as value=."
        )

    # The law ------------------------------------------------------------------------------------

    @property
    def fixed_entries(self) -> Tensor:
        """Which entries are fixed: truth values of the tensor's shape, on the CPU."""
        return spread_over(self.given_mask(), self.bound_layout.shape)

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """The weight with the fixed numbers on the mask."""
        mask, values = self.given_mask(), self._buffers.get("values")
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
            mask, free = self.given_mask(), ~self.fixed_entries
            if self._buffers.get("values") is None:
                fixed = mask.double().masked_fill(mask, float(self.value))
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
