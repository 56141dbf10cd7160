"""Laws whose pattern is data: a user's mask, an index, permutations."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tiedparam.laws.entry_table import EntryTable
from tiedparam.laws.layout import Layout
from tiedparam.laws.orbits import Orbits
from tiedparam.laws.rule import Rule
from tiedparam.util.bits import checksum_of
from tiedparam.util.errors import Reason, TieError
from tiedparam.util.torch_modes import is_traced_or_transformed, plain_numbers
from tiedparam.util.torch_private import buffers_of, has_values, unsaved_buffers_of, version_of

_MARK = "sha256:"
"""What stands between the sizes and the checksum where an option names data."""


class Coded(Orbits):
    """A law of which no option can say the pattern, because it is data.

    A subclass packs what it is given in its constructor, and calls `keep`. From then on the data
    are buffers of the rule: uint8 codes, which no cast touches, and perhaps numbers of the
    weight's dtype. They are in state dicts and files, and move with the layer. In `options`, and
    so in headers and signatures, `tag` stands for them; a subclass calls `expect` if it is made
    with a tag, and a file's data then comes by `take`.

    The codes never change while the tie lives, so a checksum tells whether they are still there.
    It is compared when the weight is computed for the first time after they were moved or written;
    after ``to_empty()``, and on the meta device, reading the weight raises until they were loaded.

    Attributes:
        checksum: of the codes; empty if the rule holds no data.
        coded_shape: the shape of what is packed.
        fault: why that has no meaning, which `check` returns.

    Example:
        >>> from tiedparam.laws import Coded
        >>> mask = torch.tensor([[True, False], [True, True]])
        >>> layer = tp.register_tie(nn.Linear(2, 2), "masked", mask=mask)
        >>> isinstance(tp.get_tie(layer), Coded), tp.get_tie(layer).tag[:10]
        (True, '2x2 sha256')
        >>> layer.state_dict()["parametrizations.weight.0.mask_bits"]
        tensor([13], dtype=torch.uint8)
    """

    fault: Reason | None = None
    made_of_weight: bool = False
    """Whether the data are made of the weight when it is tied, which is known only then."""

    apart: ClassVar[frozenset[str]] = Orbits.apart | {"_shared", "_shapes", "_seen"}
    _inner: ClassVar[tuple[str, ...]] = (
        "adopt", "bind_tensor", "fault", "holds_numbers", "made_of_weight", "why_other_data",
        "why_stale", "with_data",
    )  # fmt: skip
    _shared: EntryTable | None = None
    _shapes: tuple[tuple[int, ...], ...] = ()
    _seen: tuple[tuple[weakref.ref[Any], int, int | None], ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.checksum: str = ""
        self.coded_shape: tuple[int, ...] = ()

    # What is held -------------------------------------------------------------------------------

    def keep(self, shape: tuple[int, ...], codes: Mapping[str, Tensor]) -> None:
        """Hold packed data instead of what was held before.

        Args:
            shape: the shape of what was packed.
            codes: uint8 tensors by the names of the buffers that they are to be.
        """
        self.hold(codes)
        self.coded_shape = shape
        with plain_numbers():
            self.checksum = checksum_of(codes)

    def expect(self, tag: str) -> None:
        """Be the law that `tag` of another rule stands for, once its data was taken."""
        sizes, _, self.checksum = tag.partition(_MARK)
        try:
            self.coded_shape = tuple(int(size) for size in sizes.strip().split("x"))
        except ValueError:
            self.fault = Reason(f"{tag!r} is not data, and names none.", "Give a tensor.")

    def take(self, data: Mapping[str, Tensor]) -> Reason | None:
        """Hold the data of a file, or say why it is not the data that is expected."""
        own = {name: value.detach().clone() for name, value in data.items()}
        reason = self.why_other_data(own)
        if reason is None:
            self.hold(own)
        return reason

    def hold(self, data: Mapping[str, Tensor]) -> None:
        """Make these tensors buffers, by their names."""
        # a table of its own: whoever noted the rule's attributes can put the old one back
        self.__dict__["_buffers"] = dict(self.__dict__["_buffers"])
        for name, value in data.items():
            self.register_buffer(name, value)

    def data(self) -> dict[str, Tensor]:
        """All that is held, codes and numbers, by the names of the buffers."""
        unsaved = unsaved_buffers_of(self)
        held = buffers_of(self).items()
        return {name: value for name, value in held if value is not None and name not in unsaved}

    def anew(self, options: Mapping[str, Any]) -> Rule | None:
        """A fresh rule that makes its data of the weight, with some options changed.

        None for a law whose data is always given.
        """
        return None

    def adopt(self, data: Mapping[str, Tensor]) -> None:
        """Take note that this data, against which nothing was said, is about to be loaded."""

    @property
    def tag(self) -> str:
        """Sizes and checksum of the data, which stand for it in `options`."""
        return f"{'x'.join(map(str, self.coded_shape))} {_MARK}{self.checksum}"

    @property
    def holds_numbers(self) -> bool:
        """Whether the law is numbers of the weight's dtype beside the codes, which may change."""
        return False

    def _why_not_in(self, dtype: torch.dtype, table: EntryTable) -> Reason | None:
        # the table only counts numbers that the law holds
        return None if self.holds_numbers else super()._why_not_in(dtype, table)

    def why_other_data(self, data: Mapping[str, Tensor]) -> Reason | None:
        """Why these are not the codes that the rule has or expects, or None.

        What has no values, and what is no code, is not judged.
        """
        codes = {name: value for name, value in data.items() if value.dtype == torch.uint8}
        if not all(map(has_values, codes.values())) or not (codes or self.checksum):
            return None
        if not codes:
            return Reason(f"the data of '{self}' is missing.", "Fetch or save it again.")
        with plain_numbers():
            there = checksum_of(codes)
        if there == self.checksum:
            return None
        return Reason(
            f"it has the pattern {_MARK}{there}, and '{self}' another.",
            "Tie the layer by that pattern, or load a dense state dict.",
        )

    def check(self, layout: Layout) -> Reason | None:
        """There must be data, and it must have a meaning."""
        if self.fault is None and self.checksum and not self.data():
            return Reason(
                f"'{self.tag}' stands for data in a file, and the data is not at hand.",
                "Give the tensor itself, or read the file by tiedparam.load.",
            )
        return self.fault

    def numbers_of_law(self) -> dict[str, Tensor]:
        """None: the checksum of the codes stands for them."""
        return {}

    def why_not_kept(self) -> Reason | None:
        """What the rule holds beside the data, which a file would lose; or None."""
        own, beside = self.data(), self.for_layout(self.bound_layout)
        held = {name: value for name, value in self._buffers.items() if name not in own}
        beside.__dict__["_buffers"] = held
        return super(Coded, beside).why_not_kept()

    # Whether it is still there ------------------------------------------------------------------

    @property
    def _table(self) -> EntryTable:
        if not torch.compiler.is_compiling() and not self._is_as_checked():
            self._check_data()
        if self._shared is None:  # a copy of which only now the data has come
            found = self._found(self.bound_layout)
            if isinstance(found, Reason):
                raise TieError(f"a copy of '{self}'", *found)
            self._shared = found
        return self._shared

    @_table.setter
    def _table(self, table: EntryTable) -> None:
        self._shared = table
        self._shapes = super().free_shapes()

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        """As `Orbits` says. They are known without the data, so that it can be loaded."""
        return self._shapes

    def _forget_table(self) -> None:
        """Find it again by the data when it is needed next."""
        self._shared, self._seen = None, ()

    def _is_as_checked(self) -> bool:
        held: Any = self._buffers.values()
        if len(self._seen) != len(held):
            return False
        for tensor, (seen, pointer, version) in zip(held, self._seen, strict=True):
            known: Any = seen()
            if known is not tensor or known.data_ptr() != pointer:
                return False
            if version is not None and version != version_of(known):
                return False
        return True

    def _check_data(self) -> None:
        if is_traced_or_transformed() or "_is_replica" in self.__dict__:
            return  # the tensors are stand-ins of those that were checked
        reason = self.why_stale()
        if reason is not None:
            raise TieError(f"the law '{self}'", *reason)
        held: Any = self._buffers.values()
        if all(map(has_values, held)):
            self._seen = tuple(map(_seen, held))

    def why_stale(self) -> Reason | None:
        """Why the buffers are not the data that the rule was made with, or None."""
        data = self.data()
        is_lost = any(value.is_meta for value in data.values())
        if not is_lost and self.why_other_data(data) is None:
            return None
        how = "on the meta device" if is_lost else "overwritten, such as by to_empty()"
        return Reason(
            f"its data ({', '.join(data)}) is {how}.",
            "Load a state dict or a file of the tied model, which has it; or tie the layer once it "
            "has memory.",
        )

    # Binding ------------------------------------------------------------------------------------

    def bind_tensor(self, weight: Tensor, layout: Layout) -> Reason | None:
        """`bind`, where the tensor itself is at hand; the data moves to its device."""
        reason = self.bind(layout, weight.dtype)
        if reason is None and has_values(weight):
            self.hold({name: value.to(weight.device) for name, value in self.data().items()})
        return reason

    def bind_shape(self, weight: Tensor) -> None:
        """`Rule.bind_shape`, with the tensor at hand.

        Raises:
            TieError: if a tensor of this shape cannot carry the rule.
        """
        if self.layout is None:
            reason = self.bind_tensor(weight, Layout(tuple(weight.shape)))
            if reason is not None:
                raise TieError(f"cannot tie a tensor {tuple(weight.shape)} by '{self}'", *reason)
            self.bind_device(weight.device)

    def with_data(self, data: Mapping[str, Tensor]) -> Self:
        """The bound rule with the data of a state dict."""
        other = self.for_layout(self.bound_layout)
        other.hold(data)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Without the table, and without what is known of this rule's own tensors."""
        left_out = ("_shared", "_seen")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        if self.layout is not None and self.why_stale() is None:
            self._check_data()
            _ = self._table


def is_tag(option: object) -> bool:
    """Whether an option is a text that stands for data."""
    return isinstance(option, str) and _MARK in option


def data_of(rule: Rule) -> dict[str, Tensor]:
    """The data of a law that is data; none for others."""
    return rule.data() if isinstance(rule, Coded) else {}


def _seen(tensor: Tensor) -> tuple[weakref.ref[Any], int, int | None]:
    """What changes if a tensor gets other numbers.

    Writes are counted on the CPU alone: DistributedDataParallel writes the first process's buffers
    before every forward, and comparing them elsewhere would wait for the device each time. There
    is nothing to lose: the table has the pattern, and what reads the buffers compares them.
    """
    counted = tensor.device.type == "cpu" and not tensor.is_inference()
    return weakref.ref(tensor), tensor.data_ptr(), version_of(tensor) if counted else None
