"""Where a copy's source lies: by path from the smallest module that holds both ends.

A copy holds its source itself. What may happen to the modules around it is noticed here:

* another module takes the source's place, or it is taken out (S30);
* a shallow clone of the model (``__new__``, then the tables copied one by one, as the
  meta-learning libraries do) shares what the rule holds, and with it the original's source
  (S43). The rule in the clone is another object than the one that was tied, which tells; its
  source is then looked for by the same path in the module that holds this very rule.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from types import FrameType

from torch import nn

from tiedparam.tie import adapters as _adapters
from tiedparam.tie.offloaded import is_on_disk
from tiedparam.tie.parameter_paths import Places
from tiedparam.util.errors import TieError, warn


class Whereabouts:
    """Where one rule and its source lie.

    Args:
        rule: the rule that was tied. Another rule with these whereabouts is in a clone.
        meeting: the smallest module that holds both ends, where ``root`` was given.
        to_source: the names that lead from there to the source.
        to_rule: the names that lead from there to the rule.
        untying: whether what has become of the source is overlooked, to leave the tie.
    """

    def __init__(
        self,
        rule: nn.Module,
        meeting: nn.Module | None = None,
        to_source: tuple[str, ...] = (),
        to_rule: tuple[str, ...] = (),
        *,
        untying: bool = False,
    ) -> None:
        self.rule = weakref.ref(rule)
        self._meeting = weakref.ref(meeting) if meeting is not None else None
        self.known = meeting is not None
        self.to_source, self.to_rule = to_source, to_rule
        self.untying = untying
        self.in_unit = False  # whether FSDP1 was seen to hold both ends in one unit
        self._warned = False

    @classmethod
    def of(
        cls, rule: nn.Module, layer: nn.Module, tensor_name: str, source: nn.Module, places: Places
    ) -> Whereabouts:
        """The whereabouts of a tie in a model; unknown if it does not hold both."""
        paths = places.path_of(layer), places.path_of(source)
        if None in paths:
            return cls(rule)
        here, there = ([n for n in str(path).split(".") if n] for path in paths)
        common = 0
        while common < min(len(here), len(there)) - 1 and here[common] == there[common]:
            common += 1
        to_rule = (*here[common:], "parametrizations", tensor_name, "0")
        meeting = places.root.get_submodule(".".join(there[:common]))
        return cls(rule, meeting, tuple(there[common:]), to_rule)

    @property
    def meeting(self) -> nn.Module | None:
        """The smallest module that holds both ends, if it is known and lives."""
        return self._meeting() if self._meeting is not None else None

    def moved(self, rule: nn.Module, meeting: nn.Module | None) -> Whereabouts:
        """The same paths, from another module and for another rule."""
        return Whereabouts(rule, meeting, self.to_source, self.to_rule)

    def refuse_exchanged(self, source: nn.Module) -> None:
        """Raise if the source is not what the model has in its place (S30)."""
        found = self.meeting
        if found is None:
            return
        for name in self.to_source:
            inner = found._modules.get(name)
            if inner is None:
                break  # a wrapper on the way, whose layers have other names
            found = inner
        if found is source:
            return
        # a wrapper of the source, as torch.compile makes one, still holds it
        if all(module is not source for module in found.modules()):
            raise TieError(
                f"the source '{'.'.join(self.to_source)}' of a '{self.rule()}' tie was exchanged "
                "for another module, or taken out, and the tie still reads the old one. Call "
                "register_tie again with the new layer as source=, which replaces this tie; or "
                "call remove_tie, which keeps the old one's values."
            )
        self._judge_adapter(found, source)

    def refuse_on_disk(self, source: nn.Module) -> None:
        """Raise if diffusers may keep the source's values on disk (S38)."""
        way, found = [source], self.meeting
        for name in self.to_source:
            found = found._modules.get(name) if found is not None else None
            way += [found] if found is not None else []
        if any(map(is_on_disk, way)):
            raise TieError(
                f"diffusers keeps the source of a '{self.rule()}' tie on disk, and loads it only "
                "while the source itself is called. Leave offload_to_disk_path out, or call "
                "remove_tie before apply_group_offloading."
            )

    def _judge_adapter(self, wrapper: nn.Module, source: nn.Module) -> None:
        place, rule = ".".join(self.to_source), self.rule()
        if _adapters.trains_another(wrapper, source):
            raise TieError(
                f"PEFT trains a copy of the source '{place}' of a '{rule}' tie (modules_to_save), "
                "which the tie does not read. Call remove_tie first."
            )
        if not self._warned and _adapters.adapts(wrapper, source):
            self._warned = True
            warn(
                f"the source '{place}' of a '{rule}' tie carries an adapter. The copy reads the "
                "source without it, and merging writes the adapter into both. Call remove_tie "
                "before you merge."
            )

    # In a shallow clone ----------------------------------------------------------------

    def in_clone(self, rule: nn.Module) -> tuple[Whereabouts, nn.Module]:
        """Whereabouts and source of ``rule``, which a shallow clone has put in place of ours.

        Raises:
            TieError: if the module that holds both ends in the clone is not to be seen.
        """
        held = (m for m in _modules_in_use() if _follow(m, self.to_rule) is rule)
        meeting = next(held, None) if self.known else None
        source = _follow(meeting, self.to_source) if meeting is not None else None
        if source is None:
            raise TieError(
                f"a '{rule}' tie lies in a shallow clone of its model, and its source in there is "
                "not known: it still holds the original's. Tie with root=model, clone a module "
                "that holds both layers, and call that one; or call the original by "
                "torch.func.functional_call with the adapted parameters."
            )
        return self.moved(rule, meeting), source


def _follow(module: nn.Module, path: Iterable[str]) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path:
        found = found._modules.get(name) if found is not None else None
    return found


def _modules_in_use() -> Iterator[nn.Module]:
    """All modules that the callers of this function hold in variables, and what these hold.

    A module does not know what holds it, but a clone that is computed with has been called,
    and a layer that is read was reached through something.
    """
    frame: FrameType | None = sys._getframe(1)
    seen: set[int] = set()
    while frame is not None:
        for value in list(frame.f_locals.values()):
            # by type: isinstance would ask the object, which may be anybody's proxy
            if issubclass(type(value), nn.Module) and id(value) not in seen:
                for module in value.modules():
                    seen.add(id(module))
                    yield module
        frame = frame.f_back
