"""Where a copy's source lies: by path from the smallest module that holds both ends.

A tie holds its source itself. What may happen to the modules around it is noticed here:

* another module takes the source's place, or it is taken out (S30);
* a shallow clone of the model (``__new__``, then the tables copied one by one, as the
  meta-learning libraries do) shares what the tie holds, and with it the original's source
  (S43). The list of parametrizations in the clone is another object than the one that was tied,
  which tells; its source is then looked for by the same path in the module that holds that list.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from tiedparam.laws.rule import Rule
from tiedparam.tie import adapters
from tiedparam.tie.offloaded import is_on_disk
from tiedparam.tie.parameter_paths import Places
from tiedparam.util.callers import caller
from tiedparam.util.errors import TieError, key_of, warn
from tiedparam.util.parametrized import tensor_at
from tiedparam.util.torch_private import submodules_of


class Whereabouts:
    """Where one source of a tie lies.

    Args:
        common_root: the smallest module that holds both ends, where ``root`` was given.
        to_source: the names that lead from there to the source.
        to_values: the names that lead from there to the tie's list of parametrizations.

    Attributes:
        in_unit: whether FSDP1 was seen to hold both ends in one unit.
        stage: the pipeline stage that was seen to hold both.
    """

    def __init__(
        self,
        common_root: nn.Module | None = None,
        to_source: tuple[str, ...] = (),
        to_values: tuple[str, ...] = (),
    ) -> None:
        self._common_root = weakref.ref(common_root) if common_root is not None else None
        self.is_known: bool = common_root is not None
        self.to_source: tuple[str, ...] = to_source
        self.to_values: tuple[str, ...] = to_values
        self.in_unit = False
        self.stage: Any = None
        self._warned = False

    @classmethod
    def of(
        cls, layer: nn.Module, tensor_name: str, source: nn.Module, places: Places | None
    ) -> Whereabouts:
        """Where a tie and its source lie in a model; unknown if it does not hold both."""
        if places is None:
            return cls()
        paths = places.path_of(layer), places.path_of(source)
        if None in paths:
            return cls()
        here, there = ([n for n in str(path).split(".") if n] for path in paths)
        common = 0
        while common < min(len(here), len(there)) - 1 and here[common] == there[common]:
            common += 1
        common_root = places.root.get_submodule(".".join(there[:common]))
        to_values = (*here[common:], "parametrizations", tensor_name)
        return cls(common_root, tuple(there[common:]), to_values)

    @property
    def common_root(self) -> nn.Module | None:
        """The smallest module that holds both ends, if it is known and lives."""
        return self._common_root() if self._common_root is not None else None

    @property
    def path(self) -> str:
        """Where the source lies in `common_root`."""
        return ".".join(self.to_source)

    @property
    def shown(self) -> str:
        """The same for people: of what a tie shares, where its tensor lies."""
        return key_of(*tensor_at(self.path, "")).removesuffix(".")

    def moved(self, common_root: nn.Module | None) -> Whereabouts:
        """The same paths, from another module."""
        return Whereabouts(common_root, self.to_source, self.to_values)

    def of_reader_beside(self, other: Whereabouts) -> Whereabouts:
        """Where the tie of ``other``, which reads the same source, lies for our tie."""
        root, further = self.common_root, other.common_root
        if root is None or further is None:
            return Whereabouts()
        # one root holds the other, since both hold the source
        more = len(self.to_source) - len(other.to_source)
        to_values, to_other = self.to_values, other.to_values
        if more >= 0:
            to_other = (*self.to_source[:more], *to_other)
        else:
            root, to_values = further, (*other.to_source[:-more], *to_values)
        while to_values[0] == to_other[0]:
            root = root.get_submodule(to_values[0])
            to_values, to_other = to_values[1:], to_other[1:]
        return Whereabouts(root, to_other, to_values)

    def reversed(self) -> Whereabouts:
        """Where our tie lies for its source, a tie as well."""
        return Whereabouts(self.common_root, self.to_values, self.to_source)

    def __getstate__(self) -> tuple[nn.Module | None, tuple[str, ...], tuple[str, ...]]:
        # a weakref cannot be pickled; its target travels with the model that it holds
        return self.common_root, self.to_source, self.to_values

    def __setstate__(
        self, state: tuple[nn.Module | None, tuple[str, ...], tuple[str, ...]]
    ) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def refuse_exchanged(self, source: nn.Module, rule: Rule) -> None:
        """Raise if the source is not what the model has in its place (S30)."""
        found = self.common_root
        if found is None:
            return
        for name in self.to_source:
            inner = submodules_of(found).get(name)
            if inner is None:
                break  # a wrapper on the way, whose layers have other names
            found = inner
        if found is source:
            return
        # a wrapper of the source, as torch.compile makes one, still holds it
        if all(module is not source for module in found.modules()):
            place = f"the source '{self.shown}' of a '{rule}' tie"
            fact = f"{place} was exchanged for another module, or taken out, and the tie still "
            remedy = (
                "Call register_tie again with the new layer as source=, which replaces this tie; "
                "or call remove_tie, which keeps the old one's values."
            )
            if isinstance(source, parametrize.ParametrizationList):
                remedy = (
                    "Untie a layer before you take it out: remove_tie hands on what it shares. Now "
                    "call remove_tie here, which keeps the values."
                )
            raise TieError(place, f"{fact}reads the old one.", remedy)
        self._judge_adapter(found, source, rule)

    def refuse_on_disk(self, source: nn.Module, rule: Rule) -> None:
        """Raise if diffusers may keep the source's values on disk (S38)."""
        way, found = [source], self.common_root
        for name in self.to_source:
            found = submodules_of(found).get(name) if found is not None else None
            way += [found] if found is not None else []
        if any(map(is_on_disk, way)):
            raise TieError(
                f"the source of a '{rule}' tie",
                f"diffusers keeps the source of a '{rule}' tie on disk, and loads it only while "
                "the source itself is called.",
                "Leave offload_to_disk_path out, or call remove_tie before apply_group_offloading.",
            )

    def _judge_adapter(self, wrapper: nn.Module, source: nn.Module, rule: Rule) -> None:
        place = f"the source '{self.shown}' of a '{rule}' tie"
        if adapters.trains_another(wrapper, source):
            raise TieError(
                place,
                f"PEFT trains a copy of {place} (modules_to_save), which the tie does not read.",
                "Call remove_tie first.",
            )
        if not self._warned and adapters.adapts(wrapper, source):
            self._warned = True
            warn(
                f"{place} carries an adapter. The copy reads the source without it, and merging "
                "writes the adapter into both.",
                "Call remove_tie before you merge.",
            )

    # In a shallow clone ----------------------------------------------------------------

    def in_clone(self, values: nn.Module, rule: Rule) -> tuple[Whereabouts, nn.Module]:
        """The same for ``values``, which a shallow clone has put in the place of ours; its source.

        Raises:
            TieError: if the module that holds both ends in the clone is not to be seen.
        """
        held = (m for m in _modules_in_use() if _follow(m, self.to_values) is values)
        common_root = next(held, None) if self.is_known else None
        source = _follow(common_root, self.to_source) if common_root is not None else None
        if source is None:
            place = f"a '{rule}' tie"
            raise TieError(
                place,
                f"{place} is in a shallow clone of its model, and its source in that clone is not "
                "known: it still holds the original's.",
                "Tie with root=model, clone a module that holds both layers, and call that one; or "
                "call the original by torch.func.functional_call with the adapted parameters.",
            )
        return self.moved(common_root), source


def _follow(module: nn.Module, path: Iterable[str]) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path:
        found = submodules_of(found).get(name) if found is not None else None
    return found


def _modules_in_use() -> Iterator[nn.Module]:
    """All modules that the callers of this function hold in variables, and what these hold.

    A module does not know what holds it, but a clone that is computed with has been called,
    and a layer that is read was reached through something.
    """
    frame: FrameType | None = caller()
    seen: set[int] = set()
    while frame is not None:
        for value in list(frame.f_locals.values()):
            # by type: isinstance would ask the object, which may be anybody's proxy
            if issubclass(type(value), nn.Module) and id(value) not in seen:
                for module in value.modules():
                    seen.add(id(module))
                    yield module
        frame = frame.f_back
