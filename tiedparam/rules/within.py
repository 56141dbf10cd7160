"""A law on some rows and columns of a tensor; the rest is free."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tiedparam.laws import Reason
from tiedparam.laws.block import Block, Range, as_slice, block_of, shown
from tiedparam.laws.coded import Coded
from tiedparam.laws.earlier import ReorderedLaw, renewed
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout
from tiedparam.laws.orbits import Orbits
from tiedparam.laws.registry import law_text, make_rule, register_rule, stated
from tiedparam.laws.rule import Rule
from tiedparam.laws.times import Making


@register_rule("within")
class Within(Orbits, ReorderedLaw):
    """A law on a block of a tensor, the rest free: W[rows, columns] = S(W[rows, columns]).

    `register_tie` makes it of any law with ``rows=`` or ``columns=``:
    ``register_tie(attention, "flip_sym", "in_proj_weight", rows=slice(0, 64))``. For several
    blocks of one tensor pass a list of such laws.

    Rows are outputs and columns are inputs (of a group), however the layer stores them: rows of
    GPT-2's ``c_attn``, which stores ``(inputs, outputs)``, are columns of its tensor. The law sees
    the block as if it were a whole weight.

    Args:
        inner: the law: a name, a `Rule` subclass, a `Rule`, a pair of a name or class and its
            options, or a list of such.
        rows: which outputs, a slice without a step, or its two numbers; None for all. Negative
            numbers count from the end.
        columns: which inputs, likewise.

    Shapes: ``free``: the tensors of the law, for a weight of the block's shape; then, by the
    tensor's own axes, what lies outside of the block on the first axis, and what lies beside it
    on the second. In a grouped convolution the rows are whole groups, or lie within one.

    Source: a direct sum of a law and no law; it is fused projections that ask for it, such as the
    queries, keys and values in torch's ``in_proj_weight``.

    Example:
        >>> attention = nn.MultiheadAttention(4, 2)
        >>> _ = tp.register_tie(attention, "flip_sym", "in_proj_weight", rows=slice(0, 4))
        >>> queries, keys, values = attention.in_proj_weight.chunk(3)
        >>> torch.equal(queries, queries.t()), torch.equal(keys, keys.t())
        (True, False)
        >>> tp.get_tie(attention, "in_proj_weight").free_count  # of 48
        42
    """

    family = "laws together"
    holds_laws: ClassVar[tuple[str, ...]] = ("inner",)
    law = "W[rows, columns] = S(W[rows, columns])"
    _block: Block

    def __init__(
        self, inner: object, *, rows: Range | None = None, columns: Range | None = None
    ) -> None:
        super().__init__()
        self.rows = as_slice("rows", rows)
        self.columns = as_slice("columns", columns)
        self.inner: Rule = make_rule(inner, {})

    def options(self) -> dict[str, Any]:
        """The law, and of rows and columns those that are not all."""
        return {"inner": stated(self.inner), **self._ranges()}

    def statement(self) -> tuple[Any, dict[str, Any]]:
        """The law, and rows and columns among its options."""
        law, options = self.inner.statement()
        return law, {**options, **self._ranges()}

    @property
    def making(self) -> Making:
        """As the law in the block takes, and to join it with the rest."""
        own = self.inner.making
        part = prod(self._block.layout.shape) / prod(self.bound_layout.shape)
        return Making(
            own.entries * part + 0.22,
            own.trained * part + 0.65,
            own.call + 15,
            own.trained_call + 60,
            (own.small[0] + 15, own.small[1] + 65),
        )

    def _ranges(self) -> dict[str, list[int | None]]:
        """Start and stop, as files have them, of what was given."""
        both = {"rows": self.rows, "columns": self.columns}
        return {name: [x.start, x.stop] for name, x in both.items() if x is not None}

    def check(self, layout: Layout) -> Reason | None:
        """The block must lie in the tensor, and carry the law, which reads no other layer."""
        if self.inner.reads_layers:
            return Reason(
                f"'{self.inner}' reads another layer, and gives a whole tensor.",
                "Leave out rows= and columns=, and let fn= make all of it.",
            )
        if self.inner.compute not in ("auto", "dense"):
            return Reason(
                f"compute={self.inner.compute!r} is a form of layers that the law ties whole.",
                "Leave out compute=.",
            )
        if isinstance(self.inner, Coded) and self.inner.checksum:
            return Reason(
                f"the pattern of '{self.inner}' is data, which a part of a tensor does not keep.",
                "Leave out rows= and columns=, and give the pattern of the whole tensor.",
            )
        block = block_of(layout, self.rows, self.columns)
        if isinstance(block, Reason):
            return block
        reason = self.inner.reason_against(block.layout)
        return None if reason is None else self._of_the_block(reason, block)

    def reason_against_dtype(self, dtype: torch.dtype) -> Reason | None:
        """The law must have a meaning for it."""
        return self.inner.reason_against_dtype(dtype)

    def _of_the_block(self, reason: Reason, block: Block) -> Reason:
        shape = block.layout.canonical_shape
        return Reason(f"in {self._where()}, of shape {shape}: {reason.fact}", reason.remedy)

    def _where(self) -> str:
        named = [f"{name} {shown(slice(*given))}" for name, given in self._ranges().items()]
        return " and ".join(named) or "all of it"

    def bind(self, layout: Layout, dtype: torch.dtype) -> Reason | None:
        """Fit the rule to one tensor, and its law to the block."""
        reason = super().bind(layout, dtype)
        block = block_of(layout, self.rows, self.columns)
        if reason is not None or isinstance(block, Reason):
            return reason
        inner = copy(self.inner)  # one that was given can still tie
        reason = inner.bind(block.layout, dtype)
        if reason is not None:
            self.layout: Layout | None = None
            return self._of_the_block(reason, block)
        self._block = block
        self.rows, self.columns = block.ranges  # counted from 0, as files have them
        self._modules = {"inner": inner}  # not into the table, which a shallow copy shares
        return None

    def bind_device(self, device: torch.device) -> None:
        """As the law has it."""
        self.inner.bind_device(device)

    # The law, and free values beside its own ------------------------------------------------------

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The law's; then what lies outside of the block, and beside it."""
        return (*self.inner.free_shapes(), *self._block.rest_shapes)

    def forward(self, *free: Tensor) -> Tensor:
        """Expand the block, and join it with the rest."""
        own, rest = self._parted(free)
        return self._block.joined(self.inner(*own), rest)

    def spread(self, *free: Tensor) -> Tensor:
        """`forward` with zeros in the place of fixed numbers."""
        own, rest = self._parted(free)
        return self._block.joined(self.inner.spread(*own), rest)

    def from_earlier(self, free: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The law's, if they lie in an earlier order, and the rest."""
        own, rest = self._parted(free)
        free_values = renewed(self.inner, own)
        return None if free_values is None else (*free_values, *rest)

    def _parted(self, free: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        count = len(free) - len(self._block.rest_shapes)
        return free[:count], free[count:]

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """Those of the law in the block, around which nothing changes."""
        block = block_of(self.bound_layout, self.rows, self.columns)
        if isinstance(block, Reason):
            return
        part, rest = block.cut(weight)
        for image in self.inner.for_layout(block.layout).symmetries(part):
            yield block.joined(image, rest)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The nearest values of the law, and the rest as it is."""
        self.bind_shape(weight)
        part, rest = self._block.cut(weight.detach())
        return (*self.inner.right_inverse(part), *rest)

    def representatives(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The law's, and the rest."""
        part, rest = self._block.cut(weight.detach())
        return (*self.inner.representatives(part), *rest)

    def adjoint(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The law's sums, and the rest."""
        part, rest = self._block.cut(weight.detach())
        return (*self.inner.adjoint(part), *rest)

    def multiplicities(self) -> tuple[Tensor, ...]:
        """The law's, and 1."""
        shapes = self._block.rest_shapes
        ones = (torch.ones(shape, dtype=torch.float64, device="cpu") for shape in shapes)
        return (*self.inner.multiplicities(), *ones)

    def orbit_labels(self) -> Tensor:
        """The law's, and a number of its own for every other entry."""
        first, rest = self.inner.free_count + 1, []
        for shape in self._block.rest_shapes:
            count = torch.Size(shape).numel()
            numbers = torch.arange(first, first + count, device="cpu")
            rest.append(numbers.reshape(shape))
            first += count
        return self._block.joined(self.inner.orbit_labels(), rest)

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """None: there are too many."""
        return ()

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Rows, columns and both; vectors, grouped and transposed layers."""
        square = {"inner": "flip_sym", "rows": slice(2, 5)}
        shared = ("channel_shared", {"over": "in"})
        return (
            Example(lambda: nn.Linear(3, 9), square),
            Example(lambda: nn.Conv1d(6, 6, 3), square | {"columns": slice(-3, None)}),
            Example(
                lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
                {"inner": shared, "rows": slice(3, 6)},
            ),
            Example(
                lambda: nn.Conv2d(8, 8, 3, groups=4),
                {"inner": ("channel_shared", {"over": "groups"}), "rows": slice(2, 6)},
            ),
            Example(
                lambda: nn.Linear(2, 8),
                {"inner": ("repeat", {"outputs": 2}), "rows": slice(4, None)},
                tensor_name="bias",
            ),
            Example(
                lambda: nn.Linear(4, 6),
                {"inner": ["flip_sym", ("repeat", {"outputs": 2})], "rows": slice(0, 4)},
            ),
        )

    def __str__(self) -> str:
        ranges = "".join(f", {name}={given}" for name, given in self._ranges().items())
        return f"{self.name}(inner={law_text(stated(self.inner))}{ranges})"
