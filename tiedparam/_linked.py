"""Laws that make a weight a function of another layer's weight: what they share."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam._errors import TieError, describe, describe_layer
from tiedparam._layout import Layout
from tiedparam._offloaded import can_be_loaded, loaded
from tiedparam._rule import Rule
from tiedparam._sharded import gathered
from tiedparam._stock import effective, parametrization_list


class Linked(Rule):
    """``W = fn(source.W)``: no free values; gradients of both uses arrive in the source.

    The source is held as module and tensor name, not as a Parameter, so that
    ``load_state_dict(assign=True)`` does not cut the tie (S29), and not as a submodule, so
    that no key is duplicated (S27). Where ``root`` is given the tie also knows the smallest
    module that holds both layers: it raises when the source is exchanged for another
    module (S30), and when a part without the source is deep-copied (S13).
    """

    complex_valued = True
    gains_from_cache = False  # the numbers are the source's: checking costs what computing does

    def __init__(
        self, source: nn.Module | str, source_name: str | None, fn: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        if not isinstance(source, (nn.Module, str)):
            raise TypeError(
                f"source= takes the layer to read (or, with root=, its path), not {source!r}"
            )
        if source_name is not None and not isinstance(source_name, str):
            raise TypeError(f"source_name= takes the name of a tensor, not {source_name!r}")
        if not callable(fn):
            raise TypeError(f"fn= takes a function of the source's tensor, not {fn!r}")
        # a tuple: a module in an attribute would become a submodule of this one
        self._source: tuple[nn.Module | str] = (source,)
        self.source_name = source_name
        self.fn = fn
        self._meeting: weakref.ref[nn.Module] | None = None
        self._path_to_source: tuple[str, ...] = ()
        self.watch: Any = None  # the checkpoint machinery's hook on the source

    @property
    def source(self) -> nn.Module:
        """The layer whose tensor is read.

        Raises:
            TieError: if the source is a path that has not been looked up yet, or if another
                module has taken its place in the model (S30).
        """
        (source,) = self._source
        if isinstance(source, str):
            raise TieError(f"the source '{source}' is a path; register the tie with root=model.")
        if self._meeting is not None and not torch.compiler.is_compiling():
            self._refuse_exchanged_source(source)
        return source

    @property
    def meeting(self) -> nn.Module | None:
        """The smallest module that holds both ends, where ``root`` was given."""
        return self._meeting() if self._meeting is not None else None

    def sources(self) -> Iterator[tuple[nn.Module, str]]:
        """The one tensor that is read."""
        yield self.source, self.source_name or "weight"

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        """None: every number is the source's."""
        return ()

    def forward(self, *free: Tensor) -> Tensor:
        """Apply the function to the source's effective tensor."""
        source, name = self.source, self.source_name or "weight"
        present = effective(source, name)
        # only then: a chain of copies on meta would be computed 2ⁿ times
        if can_be_loaded(source) and present is not None and present.is_meta:
            with loaded(source):
                present = effective(source, name)
        if not isinstance(present, Tensor):
            raise TieError(
                f"the source {describe_layer(source)} of a '{self}' tie has lost its '{name}'. "
                "Give it one again, or call remove_tie."
            )
        weight = self.fn(gathered(present))
        if (
            self.layout is not None
            and torch._C._get_tracing_state() is None  # would warn of the comparison
            and weight.shape != self.layout.shape
        ):
            raise TieError(
                f"the source '{name}' of {describe_layer(source)} is {tuple(present.shape)} now, "
                f"and '{self}' ties a tensor {self.layout.shape}. Tie again with source=."
            )
        return weight

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Nothing to store; binds a rule that was given to torch directly."""
        self.bind_shape(weight)
        return ()

    def representatives(self, weight: Tensor) -> tuple[Tensor, ...]:
        """None."""
        return ()

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """The function of the source, read where the source stores it."""
        ((source, name),) = self.sources()
        yield self.fn(getattr(source, name))

    def bind(self, layer: nn.Module, tensor_name: str, root: nn.Module | None) -> str | None:
        """Find the source, refuse cycles and shapes that do not fit."""
        if self.source_name is None:
            self.source_name = tensor_name
        reason = self._find_source(root)
        if reason:
            return reason
        source, name = self.source, self.source_name
        present = getattr(source, name, None)
        if not isinstance(present, Tensor):
            return (
                f"the source {describe_layer(source)} has no tensor '{name}'. "
                "Name one with source_name=."
            )
        if isinstance(present, nn.UninitializedParameter):
            return "the source is lazy and has no shape yet. Run one forward pass first."
        cycle = _reaches(source, name, layer, tensor_name)
        if cycle:
            return (
                f"the source {describe(source, name)} depends on this tensor: the ties would "
                "form a cycle. Tie both layers to a third, or only one to the other."
            )
        weight = getattr(layer, tensor_name)
        try:
            with torch.no_grad():
                probe = effective(source, name).detach().clone()
                result = self.fn(probe)
        except Exception as error:
            return (
                f"fn raised {type(error).__name__} on the source's shape {tuple(present.shape)}: "
                f"{error}. Correct fn=."
            )
        if probe._version:
            return "fn changes the source's tensor in place. Let it return a new tensor."
        reason = _misfit(result, present, weight)
        if reason:
            return reason
        self.layout = Layout.of(layer, tensor_name, tuple(weight.shape))
        self._remember_meeting(layer, root)
        return None

    def _bind_layout(self, layout: Layout, dtype: torch.dtype) -> str | None:
        # only reached without register_tie: the layer, and with it cycles, are unknown
        ((source, name),) = self.sources()
        present = effective(source, name)
        with torch.no_grad():
            result = self.fn(present.detach())
        reason = _misfit(result, present, torch.empty(layout.shape, dtype=dtype, device="meta"))
        if reason is None:
            self.layout = layout
        return reason

    def _find_source(self, root: nn.Module | None) -> str | None:
        (source,) = self._source
        if isinstance(source, nn.Module):
            return None
        if root is None:
            return f"the source '{source}' is a path, and the model is unknown. Pass root=model."
        try:
            self._source = (root.get_submodule(source),)
        except AttributeError:
            return f"the model has no layer '{source}'. Correct source=."
        return None

    # The smallest module that holds both ends ------------------------------------------

    def _remember_meeting(self, layer: nn.Module, root: nn.Module | None) -> None:
        if root is None:
            return
        paths = {id(module): name for name, module in root.named_modules()}
        if id(layer) not in paths or id(self.source) not in paths:
            return
        here, there = ([n for n in paths[id(m)].split(".") if n] for m in (layer, self.source))
        common = 0
        while common < min(len(here), len(there)) - 1 and here[common] == there[common]:
            common += 1
        self._path_to_source = tuple(there[common:])
        self._meeting = weakref.ref(root.get_submodule(".".join(there[:common])))

    def _refuse_exchanged_source(self, source: nn.Module) -> None:
        found = self.meeting
        if found is None:
            return
        for name in self._path_to_source:
            found = found._modules.get(name) if found is not None else None
        # a wrapper of the source, as torch.compile makes one, still holds it
        if found is None or all(module is not source for module in found.modules()):
            raise TieError(
                f"the source '{'.'.join(self._path_to_source)}' of a '{self}' tie was exchanged "
                "for another module, or taken out, and the tie still reads the old one. Call "
                "remove_tie and register_tie again, with the new layer as source=."
            )

    @contextmanager
    def old_source_allowed(self) -> Iterator[None]:
        """Read the old source even if another module has taken its place, to untie."""
        meeting, self._meeting = self._meeting, None
        try:
            yield
        finally:
            self._meeting = meeting

    def refuse_partial_copy(self, layer: nn.Module, memo: dict[int, Any], where: str) -> None:
        """Raise if a deepcopy in progress would leave the source behind (S13).

        Args:
            layer: the layer that is being copied; it may be its own source.
            memo: deepcopy's dictionary of what it has entered; empty for the layer alone.
            where: how to name the tied tensor.
        """
        (source,) = self._source
        meeting = self.meeting
        copied_whole = (id(meeting) in memo) if meeting is not None else bool(memo)
        if not copied_whole and id(source) not in memo and source is not layer:
            raise TieError(
                f"cannot copy {where} without its source: the copy would read a private layer "
                "that is in nobody's parameters(). Copy a module that holds both, or call "
                "remove_tie first."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Linked:
        copied: Linked = type(self).__new__(type(self))
        memo[id(self)] = copied
        meeting = self.meeting
        state = {key: value for key, value in self.__dict__.items() if key != "_meeting"}
        copied.__dict__.update(deepcopy(state, memo))
        replica = memo.get(id(meeting)) if meeting is not None else None
        copied._meeting = weakref.ref(replica) if replica is not None else None
        return copied

    def __getstate__(self) -> dict[str, Any]:
        # a weakref cannot be pickled; its target travels with the model that it holds
        meeting = self.meeting
        return {**self.__dict__, "_meeting": meeting}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        meeting = state["_meeting"]
        self._meeting = weakref.ref(meeting) if meeting is not None else None


def _reaches(layer: nn.Module, name: str, goal: nn.Module, goal_name: str) -> bool:
    """Whether the tensor ``name`` of ``layer`` is, or is computed from, the goal tensor."""
    if layer is goal and name == goal_name:
        return True
    if not parametrize.is_parametrized(layer, name):
        return False
    return any(
        _reaches(source, source_name, goal, goal_name)
        for rule in parametrization_list(layer, name)
        if isinstance(rule, Rule)
        for source, source_name in rule.sources()
    )


def _misfit(result: object, source: Tensor, weight: Tensor) -> str | None:
    if not isinstance(result, Tensor):
        return f"fn must return a tensor, not {type(result).__name__}. Correct fn=."
    if result.shape != weight.shape:
        return (
            f"the source {tuple(source.shape)} gives {tuple(result.shape)}, and the tensor is "
            f"{tuple(weight.shape)}. Pass fn= to make the shapes fit, for example a transpose."
        )
    if result.dtype != weight.dtype:
        return (
            f"the source gives {result.dtype}, and the tensor is {weight.dtype}. "
            "Convert one of the layers first."
        )
    if weight.device.type != "meta" and result.device != weight.device:
        return (
            f"the source is on {result.device}, and the tensor on {weight.device}. "
            "Move both to one device first."
        )
    return None
