"""How a tie reads the layers that its law names, whatever becomes of them.

A law that reads other layers computes from tensors. Where these come from is found here, at every
read: the layer may be exchanged (S30), resized (S44), computed by an old-style hook (S45),
offloaded (S38), sharded (S31, S53), or another one in a shallow clone of the model (S43).
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from tiedparam.laws.layout import Layout, declare_shape
from tiedparam.tie.changed_source import Shapes, fitted_sources, is_misread, shapes_of, why_unlike
from tiedparam.tie.computed_source import recompute, why_computed
from tiedparam.tie.offloaded import can_be_loaded, loaded
from tiedparam.tie.parameter_paths import Places
from tiedparam.tie.split import ALIKE
from tiedparam.tie.stages import STAGES, refuse_other_stage
from tiedparam.tie.whereabouts import Whereabouts
from tiedparam.tie.wrapped import refuse_other_unit
from tiedparam.util.errors import TieError, describe_layer, key_of, quoted, warn
from tiedparam.util.parametrized import tensor_at, tensor_of
from tiedparam.util.sharded import gathered, is_sharded
from tiedparam.util.torch_modes import is_traced
from tiedparam.util.torch_private import effective, is_managed_by_fsdp

if TYPE_CHECKING:
    from tiedparam.laws.linked import Linked


class ResizedSourceError(TieError):
    """A source has another size now than when it was tied."""


class Waiting(Protocol):
    """What waits until a source is loaded."""

    depth: int
    """How many ties are behind its own: those are called before it."""

    def __call__(self) -> None:
        """Go on: the source is loaded."""


class SourceWatch:
    """A load hook on one source: what waits for its values is called once they are in.

    It lives as long as the tie: however that ends, the hook is gone with it.
    """

    def __init__(self, source: nn.Module) -> None:
        self.waiting: list[Waiting] = []
        self._handle = source.register_load_state_dict_post_hook(self)

    def __call__(self, module: nn.Module, incompatible_keys: Any) -> None:
        """Call what has waited for the source, which is loaded now: what others read first."""
        for call in sorted(self.waiting, key=lambda each: each.depth):
            call()
        self.waiting.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"waiting": [], "_handle": self._handle}  # that load is over by then

    def leave(self) -> None:
        """Take the hook away from the source."""
        self._handle.remove()


class Reading:
    """How one tie reads its sources, and where they lie. Kept by its list of parametrizations.

    Attributes:
        places: where each source lies.
        shapes: the shapes that their tensors had when the tie was made.
        watches: the hooks on them, for those who wait until they are loaded.
        is_leaving: whether what has become of the sources is overlooked, to leave the tie.
    """

    def __init__(
        self,
        values: nn.Module,
        places: Iterable[Whereabouts],
        shapes: Iterable[tuple[int, ...]],
        watches: Iterable[SourceWatch] = (),
    ) -> None:
        self._values = weakref.ref(values)
        self.places: tuple[Whereabouts, ...] = tuple(places)
        self.shapes: tuple[tuple[int, ...], ...] = tuple(shapes)
        self.watches: list[SourceWatch] = list(watches)
        self.is_leaving: bool = False
        for watch in self.watches:
            weakref.finalize(values, watch.leave).atexit = False

    @classmethod
    def start(
        cls, values: nn.Module, rule: Linked, layer: nn.Module, name: str, places: Places | None
    ) -> Reading:
        """That of a tie that is being made; notes where its sources lie in a model."""
        sources = list(rule.sources())
        return cls(
            values,
            [Whereabouts.of(layer, name, source, places) for source, _ in sources],
            [tuple(effective(*source).shape) for source in sources],
            [SourceWatch(source) for source, _ in sources],
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_values": self._values()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a clone that was pickled unread has the original's, which goes on serving that (S43)
        self.__dict__.update(state)
        values: nn.Module = state["_values"]
        self._values = weakref.ref(values)
        for watch in self.watches:
            weakref.finalize(values, watch.leave).atexit = False

    def serves(self, values: nn.Module) -> bool:
        """Whether this belongs to that very list, and not to the one that it was cloned from."""
        return self._values() is values

    def serving(self, values: nn.Module) -> Reading:
        """The same for another list, a shallow copy."""
        return Reading(values, self.places, self.shapes, self.watches)

    def copied(
        self, values: nn.Module, watches: list[SourceWatch], memo: dict[int, Any]
    ) -> Reading:
        """That of a deep copy of the list; what else was copied so far stands in ``memo``."""
        places = [place.moved(memo.get(id(place.common_root))) for place in self.places]
        return Reading(values, places, self.shapes, watches)

    # Computing --------------------------------------------------------------------------

    def compute(self, rule: Linked, free: Iterable[Tensor]) -> Tensor:
        """The tied tensor, from the sources and these free values.

        Raises:
            TieError: if a source is not what it was.
        """
        read, free = self.read_all(rule), tuple(free)
        try:
            weight: Tensor = rule(*read, *free)
        except Exception as error:
            elsewhere = [is_sharded(tensor) for tensor in read]
            if any(elsewhere) and not all([*elsewhere, *map(is_sharded, free)]):  # S31
                raise self.apart(rule, elsewhere.index(True)) from error
            other = why_unlike(read, free)
            if other is None and shapes_of(read) == self.shapes:
                raise
            if self.is_leaving and free:
                return self._last(rule, read, free, error)
            if other is not None:
                raise TieError(_first(rule), *other) from error
            fact = f"{_sizes_now(rule, read)}, on which {_function_of(rule)} raised"
            fact += f" {type(error).__name__}: {error}."
            raise TieError(_first(rule), fact, self._way_on(rule, free)) from error
        if rule.layout is None or is_traced():  # would warn of the comparison
            return weight
        tied = rule.layout.shape
        if weight.shape == tied and is_misread(read, self.shapes, tied, bool(free)):
            if self.is_leaving:
                return self._last(rule, read, free, None)
            fact = f"{_sizes_now(rule, read)}, and '{rule}' was tied to {_listed(self.shapes)}."
            raise TieError(_first(rule), fact, self._way_on(rule, free))
        if weight.shape != tied and not self.is_leaving:
            fact = f"{_sizes_now(rule, read)}, and '{rule}' ties a tensor {tied}."
            raise ResizedSourceError(_first(rule), fact, _renewal(rule))
        return weight

    def _last(
        self, rule: Linked, read: list[Tensor], free: tuple[Tensor, ...], error: Exception | None
    ) -> Tensor:
        """What the tie gives as it is left, with sources of the size and kind that it was tied to.

        Raises:
            TieError: if there is no such thing.
        """
        try:
            weight: Tensor = rule(*fitted_sources(read, self.shapes, free), *free)
        except Exception as another:
            fact = f"{_sizes_now(rule, read)}, on which {_function_of(rule)} raised"
            fact += f" {type(another).__name__}: {another}."
            raise TieError(_first(rule), fact, self._way_on(rule, ())) from (error or another)
        if shapes_of(read) != self.shapes:
            warn(
                f"{_sizes_now(rule, read)}, and '{rule}' ties a tensor {tuple(weight.shape)}: it "
                "is computed from the part that both sizes have, with zeros for the rest.",
                "Check the values.",
            )
        return weight

    def _way_on(self, rule: Linked, free: tuple[Tensor, ...]) -> str:
        """What to do about a source whose size does not go with the values of the tie."""
        if not free:
            return _renewal(rule)
        return (
            f"Give the source a tensor {_listed(self.shapes)} again, or call remove_tie, which "
            "takes the part of it that both sizes have."
        )

    def read_for_forms(self, rule: Linked) -> tuple[Tensor, ...] | None:
        """The tensors of all sources; None where `compute` has something to say of them.

        Raises:
            TieError: if one is not what it was.
        """
        read = tuple(self.read_all(rule))
        if any(map(is_sharded, read)):
            return None
        if not is_traced() and shapes_of(read) != self.shapes:
            return None
        return read

    def apart(self, rule: Linked, number: int) -> TieError:
        """The error of a source of which only a part is here, while the layer is whole (S31)."""
        source, place = list(rule.sources())[number], self.places[number]
        if place.common_root is None:
            where, named, pair = f"a '{rule}' tie", _named(source), "source_layer, layer"
        else:
            holder, name = tensor_at(place.path, source[1])
            own, tied = tensor_at(".".join(place.to_values), "")
            where = f"cannot compute {quoted(key_of(own, tied))} by '{rule}'"
            named, pair = f"its source {quoted(key_of(holder, name))}", f"{holder}, {own}"
        if not is_managed_by_fsdp(source[0]):
            return TieError(where, f"{named} is parallelized, and the layer is not.", ALIKE)
        fact = f"{named} belongs to another fully_shard unit, and only a part of it is here."
        remedy = f"Put both into one unit, with fully_shard([{pair}]) or by sharding only a module "
        return TieError(where, fact, f"{remedy}that holds both.")

    def read_all(self, rule: Linked) -> list[Tensor]:
        """The tensors of all sources, gathered where they are sharded.

        Raises:
            TieError: if one is not what it was.
        """
        return [cast(Tensor, gathered(tensor)) for tensor in self.present(rule)]

    def present(self, rule: Linked) -> list[Tensor]:
        """The tensors of all sources, as they are.

        Raises:
            TieError: if one is not what it was.
        """
        read, places = [], self.places
        for i, (source, name) in enumerate(rule.given):  # plainly: this runs at every call
            read.append(self.read_source(source, name, places[i], rule))  # type: ignore[arg-type]
        return read

    def read_source(self, source: nn.Module, name: str, place: Whereabouts, rule: Linked) -> Tensor:
        """The tensor of one source, if it is there and what it was.

        Raises:
            TieError: if it is not.
        """
        compiling = torch.compiler.is_compiling()
        if place.is_known and not (compiling or self.is_leaving):
            place.refuse_exchanged(source, rule)
        computed = why_computed(source, name)
        if computed is not None:
            if not self.is_leaving:
                raise TieError(f"'{rule}' cannot be computed", *computed)
            recompute(source, name)
        if not compiling:
            if is_managed_by_fsdp(source) and not place.in_unit:
                refuse_other_unit(rule, self._values(), source, place)
                place.in_unit = True
            if STAGES in sys.modules:
                refuse_other_stage(rule, self._values(), source, place)
            if "diffusers" in sys.modules:
                place.refuse_on_disk(source, rule)
        present = tensor_of(source, name)
        # only then: a chain of copies on meta would be computed 2ⁿ times
        if can_be_loaded(source) and present is not None and present.is_meta:
            with loaded(source):
                present = tensor_of(source, name)
        if present is None:
            fact = f"the source {describe_layer(source)} of a '{rule}' tie has lost its '{name}'."
            raise TieError(f"a '{rule}' tie", fact, _renewal(rule))
        return present

    def of_clone(self, values: nn.Module, rule: Linked) -> Reading:
        """That of ``values``, which a shallow clone has put in the place of our own list (S43).

        Raises:
            TieError: if the sources in the clone are not known.
        """
        if torch.compiler.is_compiling():
            place = f"a '{rule}' tie"
            raise TieError(place, f"{place} is in a shallow clone.", "Call it once, then compile.")
        found = [place.in_clone(values, rule) for place in self.places]
        names = [name for _, name in rule.sources()]
        rule.read_from(list(zip((source for _, source in found), names, strict=True)))
        # the hooks on the sources are the original's, which the clone shares
        return Reading(values, [place for place, _ in found], self.shapes)

    # What may become of the sources -----------------------------------------------------

    @contextmanager
    def overlooking(self, rule: Linked) -> Iterator[None]:
        """Compute with what there is, for this one tie."""
        for (source, _), place in zip(rule.sources(), self.places, strict=True):
            place.refuse_on_disk(source, rule)
        before, self.is_leaving = self.is_leaving, True
        try:
            yield
        finally:
            self.is_leaving = before

    def refuse_exchanged(self, rule: Linked) -> None:
        """Raise if another module has taken the place of a source."""
        for (source, _), place in zip(rule.sources(), self.places, strict=True):
            place.refuse_exchanged(source, rule)

    def refuse_partial_copy(
        self, rule: Linked, layer: nn.Module, memo: dict[int, Any], where: str
    ) -> None:
        """Raise if a deepcopy in progress would leave a source behind (S13).

        Args:
            rule: the law.
            layer: the layer that is being copied; it may be its own source.
            memo: deepcopy's dictionary of what it has entered; empty for the layer alone.
            where: how to name the tied tensor.
        """
        for (source, _), place in zip(rule.sources(), self.places, strict=True):
            root = place.common_root
            copied_whole = (id(root) in memo) if root is not None else bool(memo)
            within = any(part is source for part in layer.modules())
            if not copied_whole and id(source) not in memo and not within:
                raise TieError(
                    f"cannot copy {where} without its source",
                    "the copy would read a private layer that is in no model's parameters().",
                    "Copy a module that holds both, or call remove_tie first.",
                )

    def renew(self, rule: Linked, layer: nn.Module, tensor_name: str, weight: Tensor) -> None:
        """Tie the size that the sources have now."""
        shape = tuple(weight.shape)
        rule.bind(Layout.of(layer, tensor_name, shape), weight.dtype)
        self.shapes = tuple(tuple(tensor.shape) for tensor in rule.read())
        declare_shape(layer, tensor_name, shape)

    def shown(self, rule: Linked) -> str:
        """What is read, in a few words, for ``print(model)``."""
        shown = []
        for (source, name), place in zip(rule.sources(), self.places, strict=True):
            try:
                place.refuse_exchanged(source, rule)
            except TieError:
                shown.append("a source that was exchanged")
                continue
            root = place.common_root
            if root is None:
                text = f"{name} of {describe_layer(source)}"
            else:
                within = type(root).__name__.removeprefix("FSDP").removeprefix("Tied")
                text = f"{key_of(*tensor_at(place.path, name))} in this {within}"
            shown.append(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…")
        return f"reads {', '.join(shown)}"


_LONGEST = 100


def _sizes_now(rule: Linked, read: list[Tensor]) -> str:
    named = zip(map(_named, rule.sources()), read, strict=True)
    return ", ".join(f"{name} is {tuple(tensor.shape)} now" for name, tensor in named)


def _listed(shapes: Shapes) -> str:
    return ", ".join(map(str, shapes))


def _named(source: tuple[nn.Module, str]) -> str:
    return f"the source '{source[1]}' of {describe_layer(source[0])}"


def _first(rule: Linked) -> str:
    """The place of an error about what the sources are now."""
    return _named(next(rule.sources()))


def _function_of(rule: Linked) -> str:
    return rule.functions[0] if rule.functions else "its forward"


def _renewal(rule: Linked) -> str:
    return (
        f"Tie again: register_tie(layer, '{rule.name or type(rule).__name__}', source=...) "
        "replaces this tie, whatever the size."
    )
