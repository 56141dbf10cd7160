"""Laws that make a weight a function of another layer's weight: what they share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.laws.functions import find_function, identity
from tiedparam.laws.layout import Layout, declare_shape
from tiedparam.laws.rule import Rule
from tiedparam.tie.computed_source import recompute, why_computed
from tiedparam.tie.offloaded import can_be_loaded, loaded
from tiedparam.tie.parameter_paths import Places
from tiedparam.tie.source import Source, find_source, shown
from tiedparam.tie.whereabouts import Whereabouts
from tiedparam.tie.wrapped import refuse_other_unit
from tiedparam.tie.write_guard import is_read_from
from tiedparam.util.errors import TieError, describe, describe_layer
from tiedparam.util.sharded import gathered
from tiedparam.util.torch_private import effective, parametrization_list


class ResizedSourceError(TieError):
    """The source has another size now than the tied tensor."""


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
        self, source: Source, source_name: str | None, fn: Callable[[Tensor], Tensor] | str
    ) -> None:
        super().__init__()
        if not isinstance(source, (nn.Module, str, Tensor)):
            raise TypeError(
                "source= takes the layer to read (or, with root=, its path), not "
                f"{type(source).__name__}"
            )
        if source_name is not None and not isinstance(source_name, str):
            raise TypeError(f"source_name= takes the name of a tensor, not {source_name!r}")
        if isinstance(fn, str):
            fn = find_function(fn, {})
        if not callable(fn):
            raise TypeError(f"fn= takes a function of the source's tensor, not {fn!r}")
        # a tuple: a module in an attribute would become a submodule of this one
        self._source: tuple[Source] = (source,)
        self.source_name = source_name
        self.fn = fn
        self._whereabouts = Whereabouts(self)
        self._source_shape: tuple[int, ...] = ()
        self.watch: Any = None  # the checkpoint machinery's hook on the source

    @property
    def source(self) -> nn.Module:
        """The layer whose tensor is read.

        Raises:
            TieError: if the source is a path that has not been looked up yet, if another
                module has taken its place in the model (S30), or if it is not known in a
                shallow clone (S43).
        """
        (source,) = self._source
        if not isinstance(source, nn.Module):
            given = f"'{source}' is a path" if isinstance(source, str) else "is a tensor"
            raise TieError(f"the source {given}; register the tie with root=model.")
        where = self._whereabouts
        if where.rule() is not self:
            return self._source_in_clone()
        if where.known and not torch.compiler.is_compiling():
            where.refuse_exchanged(source)
        return source

    def _source_in_clone(self) -> nn.Module:
        if torch.compiler.is_compiling():
            raise TieError(f"a '{self}' tie lies in a shallow clone. Call it once, then compile.")
        self._whereabouts, source = self._whereabouts.in_clone(self)
        self._source = (source,)
        self.watch = None  # the original's: the clone shares its hooks
        return source

    @property
    def meeting(self) -> nn.Module | None:
        """The smallest module that holds both ends, where ``root`` was given."""
        return self._whereabouts.meeting

    @property
    def path_to_source(self) -> str:
        """Where the source lies in `meeting`."""
        return ".".join(self._whereabouts.to_source)

    def sources(self) -> Iterator[tuple[nn.Module, str]]:
        """The one tensor that is read."""
        yield self.source, self.source_name or "weight"

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        """None: every number is the source's."""
        return ()

    def forward(self, *free: Tensor) -> Tensor:
        """Apply the function to the source's effective tensor."""
        source, name = self.source, self.source_name or "weight"
        computed = why_computed(source, name)
        if computed is not None:
            if not self._whereabouts.untying:
                raise TieError(f"'{self}' cannot be computed: {computed}")
            recompute(source, name)
        where = self._whereabouts
        if not torch.compiler.is_compiling():
            if "_is_fsdp_managed_module" in source.__dict__ and not where.in_unit:
                refuse_other_unit(self, source)
                where.in_unit = True
            if "diffusers" in sys.modules:
                where.refuse_on_disk(source)
        present = _tensor_of(source, name)
        # only then: a chain of copies on meta would be computed 2ⁿ times
        if can_be_loaded(source) and present is not None and present.is_meta:
            with loaded(source):
                present = _tensor_of(source, name)
        if present is None:
            raise TieError(
                f"the source {describe_layer(source)} of a '{self}' tie has lost its '{name}'. "
                f"{self._renewal}"
            )
        try:
            weight = self.fn(gathered(present))
        except Exception as error:
            if tuple(present.shape) == self._source_shape:
                raise
            raise TieError(
                f"the source '{name}' of {describe_layer(source)} is {tuple(present.shape)} now, "
                f"on which fn raised {type(error).__name__}: {error}. {self._renewal}"
            ) from error
        if (
            self.layout is not None
            and torch._C._get_tracing_state() is None  # would warn of the comparison
            and weight.shape != self.layout.shape
            and not self._whereabouts.untying
        ):
            raise ResizedSourceError(
                f"the source '{name}' of {describe_layer(source)} is {tuple(present.shape)} now, "
                f"and '{self}' ties a tensor {self.layout.shape}. {self._renewal}"
            )
        return weight

    @property
    def _renewal(self) -> str:
        return (
            f"Tie again: register_tie(layer, '{self.name or type(self).__name__}', source=...) "
            "replaces this tie, whatever the size."
        )

    def is_what_it_copies(self, value: Tensor) -> bool:
        """Whether ``value`` is the source's own tensor, and the law is to be equal to that."""
        if self.fn is not identity:
            return False
        source, name = self.source, self.source_name or "weight"
        if value is source._parameters.get(name) or is_read_from(value, source, name):
            return True
        tied = parametrize.is_parametrized(source, name)
        behind = list(parametrization_list(source, name)) if tied else []
        return (
            len(behind) == 1
            and isinstance(behind[0], Linked)
            and behind[0].is_what_it_copies(value)
        )

    def renew(self, layer: nn.Module, tensor_name: str, shape: tuple[int, ...]) -> None:
        """Tie the size that the source has now."""
        self.layout = Layout.of(layer, tensor_name, shape)
        self._source_shape = tuple(effective(*next(self.sources())).shape)
        declare_shape(layer, tensor_name, shape)

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
        reason = self.find_source(root)
        if reason:
            return reason
        if self.source_name is None:
            self.source_name = tensor_name
        source, name = self.source, self.source_name
        computed = why_computed(source, name)
        if computed is not None:
            return computed
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
        except RecursionError:
            raise
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
        self._source_shape = tuple(present.shape)
        return None

    def locate(self, layer: nn.Module, tensor_name: str, places: Places) -> None:
        """Note where the tie and its source lie in a model."""
        self._whereabouts = Whereabouts.of(self, layer, tensor_name, self.source, places)

    def value_for(self, tensor_name: str, root: nn.Module | None) -> Tensor | None:
        """What an unbound rule would give, by which a tie of unknown size can be renewed."""
        if self.find_source(root) is not None:
            return None
        present = _tensor_of(self.source, self.source_name or tensor_name)
        try:
            with torch.no_grad():
                value = self.fn(present.detach().clone()) if present is not None else None
        except Exception:
            return None  # `bind` says why
        return value if isinstance(value, Tensor) else None

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

    def find_source(self, root: nn.Module | None) -> str | None:
        """Look up what ``source=`` means, or return why it means nothing."""
        found = find_source(*self._source, self.source_name, root)
        if isinstance(found, str):
            return found
        source, self.source_name = found
        self._source = (source,)
        return None

    def extra_repr(self) -> str:
        """The law, and which source it reads."""
        try:
            source: Source = self.source
        except TieError:
            (source,) = self._source  # not found yet, or exchanged: which one the error says
            if isinstance(source, nn.Module):
                return f"{super().extra_repr()}; reads a source that was exchanged"
        place = shown(source, self.source_name or "weight", self.meeting, self.path_to_source)
        return f"{super().extra_repr()}; reads {place}"

    # What may become of the source ------------------------------------------------------

    @contextmanager
    def untying(self) -> Iterator[None]:
        """Compute with what there is, whatever has become of the source, to leave the tie."""
        with ExitStack() as stack:
            for rule in self._chain():
                stack.enter_context(rule._overlooking())
            yield

    def _chain(self) -> Iterator[Linked]:
        """The rule itself, and those of the copies that it reads, one behind the other."""
        rule: object = self
        while isinstance(rule, Linked):
            yield rule
            (source,), name = rule._source, rule.source_name or "weight"
            tied = isinstance(source, nn.Module) and parametrize.is_parametrized(source, name)
            rule = parametrization_list(source, name)[0] if tied else None  # type: ignore[arg-type]

    @contextmanager
    def _overlooking(self) -> Iterator[None]:
        if self._whereabouts.rule() is not self:
            self._source_in_clone()
        found = self._whereabouts
        (source,) = self._source
        if isinstance(source, nn.Module):
            found.refuse_on_disk(source)
        self._whereabouts = Whereabouts(self, untying=True)
        try:
            yield
        finally:
            self._whereabouts = found

    def refuse_exchanged(self) -> None:
        """Raise if this copy, or one that it reads, has lost its source to another module."""
        for rule in self._chain():
            rule.source  # noqa: B018

    def refuse_partial_copy(self, layer: nn.Module, memo: dict[int, Any], where: str) -> None:
        """Raise if a deepcopy in progress would leave the source behind (S13).

        Args:
            layer: the layer that is being copied; it may be its own source.
            memo: deepcopy's dictionary of what it has entered; empty for the layer alone.
            where: how to name the tied tensor.
        """
        if self._whereabouts.rule() is not self:
            self._source_in_clone()
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
        where = self._whereabouts
        state = {key: value for key, value in self.__dict__.items() if key != "_whereabouts"}
        copied.__dict__.update(deepcopy(state, memo))
        copied._whereabouts = where.moved(copied, memo.get(id(where.meeting)))
        copied._end_watch()
        return copied

    def __getstate__(self) -> dict[str, Any]:
        # a weakref cannot be pickled; its target travels with the model that it holds
        where = self._whereabouts
        return {**self.__dict__, "_whereabouts": (where.meeting, where.to_source, where.to_rule)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._whereabouts = Whereabouts(self, *state["_whereabouts"])
        self._end_watch()

    def _end_watch(self) -> None:
        (source,) = self._source
        if self.watch is not None and isinstance(source, nn.Module):
            self.watch.end_with(self, source)


def _tensor_of(layer: nn.Module, name: str) -> Tensor | None:
    """The tensor that ``layer`` computes with, or None if it has none of that name."""
    try:
        present = effective(layer, name)
    except AttributeError:
        if parametrize.is_parametrized(layer, name):
            raise  # an error in what computes it (S26)
        return None
    return present if isinstance(present, Tensor) else None


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
            f"{tuple(weight.shape)}. Pass fn= to 'copy' to make the shapes fit, such as torch.t."
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
