"""The class of tied layers: stock in everything, with the library's machinery plugged in.

torch gives every parametrized layer a class of its own, whose property closes over that
one layer: copies then break each other (S10, S11), pickling is refused (S12), and every
layer compiles anew (S32). Here all layers of one stock class with the same tied names
share one class, whose properties look the layer up, so that

* a copy stands on its own, and ``pickle``, ``copy`` and ``torch.save`` work;
* torch's own ``remove_parametrizations`` keeps working, one layer at a time.

The stock class stays the first base, which is where torch looks for it. So what `TiedLayer`
overrides is laid into each class itself, not behind the stock one.
"""

from __future__ import annotations

import abc
import copy
import functools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.compute.forward import cheap_forward
from tiedparam.compute.frozen import refuse_if_frozen, refuse_training_forward
from tiedparam.layer import recurrent
from tiedparam.layer.parameter_order import insert_parameter, plain_parameter
from tiedparam.layer.tensor_property import inside, set_tensor, tensor_property
from tiedparam.layer.values import reset_parameters
from tiedparam.state import loading
from tiedparam.tie import owner
from tiedparam.tie.lookup import ties_in
from tiedparam.tie.record import make_record
from tiedparam.tie.torch_callers import is_distribution, refuse_quantization
from tiedparam.util.callers import caller
from tiedparam.util.errors import TieError, describe, extra_repr
from tiedparam.util.parametrized import parametrization_lists
from tiedparam.util.torch_private import (
    apply_to,
    buffers_of,
    is_parametrized,
    load_into,
    parameters_of,
    replicate_for_data_parallel,
    save_from,
    submodules_of,
    with_own_tables,
)

_HOST_CLASSES: dict[tuple[Any, ...], type[nn.Module]] = {}


class HostMeta(abc.ABCMeta):
    """Metaclass of host classes: a shared class must survive one layer's removal.

    It is an ABCMeta, so that a user's class may have a tied layer's class and an abstract one as
    bases, as stateless copies of models for meta-learning do.
    """

    tied_names: tuple[str, ...]
    """The tensors that are parametrized in layers of the class."""
    tied_stock: type[nn.Module]
    """The class that they have without."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """A stock layer, which has no tie yet; of a user's class what that makes."""
        makes_its_own = getattr(cls, "__new__") is not object.__new__  # noqa: B009 — of instances
        if _is_derived(cls) and not makes_its_own:  # fully_shard's classes do
            return super().__call__(*args, **kwargs)  # a class of the user's
        # ``type(layer)(…)`` makes a layer like this one, which is stock: it has no tie yet
        return cls.tied_stock(*args, **kwargs)

    def __delattr__(cls, name: str) -> None:
        # torch's remove_parametrizations deletes the property from the class; other layers
        # still need it, and the leaving layer changes its class instead
        if name not in cls.tied_names:
            super().__delattr__(name)
        elif _is_derived(cls):
            raise TieError(
                f"cannot untie '{name}' of this {cls.__name__}",
                "it is sharded already.",
                "Untie before fully_shard.",
            )


def _is_derived(cls: type) -> bool:
    """Whether this class was derived from a host class, as ``fully_shard`` does."""
    return "tied_names" not in vars(cls)


# Giving a layer its class, and taking it away --------------------------------------------------


def install_host(layer: nn.Module) -> None:
    """Move a layer that ``parametrize`` has just changed to its shared host class."""
    made_by_torch = type(layer)
    stock, names = _kind(layer)
    layer.__class__ = host_class(stock, names)
    parametrization_lists(layer).train(layer.training)
    for tie in ties_in(layer):
        make_record(tie.values)
    owner.remember_layer(layer)
    recurrent.clear_flat_weights(layer)
    if not isinstance(made_by_torch, HostMeta):
        # its properties close over the layer, which would keep it alive (S11)
        for name in names:
            if name in vars(made_by_torch):
                delattr(made_by_torch, name)


def remove_host(layer: nn.Module, tensor_name: str, parameter: nn.Parameter) -> None:
    """Make one tied tensor a plain Parameter again, in its old place among the others."""
    stock = stock_class(layer)
    lists = parametrization_lists(layer)
    del lists[tensor_name]
    names = tuple(sorted(lists))
    if not names:
        del submodules_of(layer)["parametrizations"]
    layer.__class__ = host_class(stock, names) if names else stock
    insert_parameter(layer, tensor_name, parameter)


def stock_class(layer: nn.Module) -> type[nn.Module]:
    """The class that the layer has without its parametrizations."""
    kind: Any = type(layer)
    if isinstance(kind, HostMeta):
        return kind.tied_stock
    return parametrize.type_before_parametrizations(layer)


def host_class(stock: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The one class of all ``stock`` layers whose parametrized tensors are ``names``."""
    if (stock, names) not in _HOST_CLASSES:
        _HOST_CLASSES[stock, names] = _make_host_class(stock, names)
    return _HOST_CLASSES[stock, names]


def _make_host_class(stock: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    members = {
        **{name: _function(member) for name, member in vars(TiedLayer).items() if callable(member)},
        **recurrent.members(stock),
        "forward": _forward_of(stock, names),
        "__module__": stock.__module__,
        "__doc__": stock.__doc__,
        "tied_names": names,
        "tied_stock": stock,
    }
    if not hasattr(stock, "reset_parameters"):
        del members["reset_parameters"]
    for name in _SHOWN_AS_STOCK & members.keys():
        functools.update_wrapper(members[name], getattr(stock, name))
    members.update({name: tensor_property(name, stock) for name in names})
    # a stock class may have a metaclass of its own (ABCMeta, say)
    kind = type(stock)
    meta = HostMeta if issubclass(HostMeta, kind) else type("HostMeta", (HostMeta, kind), {})
    return cast(type[nn.Module], meta(f"Tied{stock.__name__}", (stock,), members))


_SHOWN_AS_STOCK = {"forward", "train", "extra_repr", "reset_parameters"}
"""The methods whose names, signatures and docs are to be those of the stock class."""


def _function(member: Any) -> FunctionType:
    """A function like this one, for a class of its own."""
    made = FunctionType(member.__code__, member.__globals__, member.__name__, member.__defaults__)
    return cast(FunctionType, functools.update_wrapper(made, member, updated=("__dict__",)))


def _forward_of(stock: type[nn.Module], names: tuple[str, ...]) -> Callable[..., Any]:
    """The forward of tied layers of a stock class, which tries its cheaper form first."""
    cheap = cheap_forward(stock) if "weight" in names else None
    of_recurrent = recurrent.computation(stock)

    def computed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        computes = stock.forward if of_recurrent is None else of_recurrent
        return computes(self, *args, **kwargs)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if not compiling:
            refuse_training_forward(self)
        result = None if cheap is None else cheap(self, *args, **kwargs)
        if result is not None:
            return result
        if compiling:
            return computed(self, *args, **kwargs)
        outer = getattr(inside, "call", None)
        inside.call = (self, args, kwargs)
        try:
            return computed(self, *args, **kwargs)
        finally:
            inside.call = outer

    return forward


class TiedLayer(nn.Module):
    """What tied layers override of their stock class; see the top of this file."""

    tied_names: tuple[str, ...]
    tied_stock: type[nn.Module]

    # Attributes -------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig" and value is not None:
            refuse_quantization(self, caller())
        if name == "max_norm" and value is not None and _embeds(self):
            place = f"cannot set max_norm of the tied {describe(self, 'weight')}"
            fact = "it writes into single rows of the weight, which is computed."
            raise TieError(place, fact, "Call remove_tie first.")
        # torch would raise KeyError for a Parameter, and project a tensor in silence (S16, S24)
        if name in self.tied_names and is_parametrized(self, name) and isinstance(value, Tensor):
            set_tensor(self, name, value, caller())
        else:
            self.tied_stock.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.tied_names and is_parametrized(self, name):
            place = f"cannot delete the tied {describe(self, name)}"
            raise TieError(place, "it is computed.", "Call remove_tie first.")
        stock = self.tied_stock
        if name in parameters_of(self) or name in buffers_of(self):
            # torch is about to parametrize this tensor too and will inject a property into the
            # class: give way to a private one. The next `install_host` brings the layer back.
            self.__class__ = _make_host_class(stock, self.tied_names)  # type: ignore[assignment]
        stock.__delattr__(self, name)

    def register_parameter(self, name: str, parameter: Any) -> None:
        """Add a Parameter; a tensor that torch gives back becomes a plain one, in its place."""
        names, stock = self.tied_names, self.tied_stock
        if name in names and not is_parametrized(self, name) and parameter is not None:
            # torch's remove_parametrizations gives the tensor back: computed, perhaps
            # expanded, perhaps another layer's own (S21). The layer gets a plain one.
            remaining = tuple(n for n in names if is_parametrized(self, n))
            if remaining:
                self.__class__ = host_class(stock, remaining)  # type: ignore[assignment]
            insert_parameter(self, name, plain_parameter(parameter, parameter.requires_grad))
        else:
            stock.register_parameter(self, name, parameter)

    def register_buffer(self, name: str, tensor: Any, persistent: bool = True) -> None:
        """Add a buffer; a tensor that torch gives back becomes a Parameter."""
        if name in self.tied_names and not is_parametrized(self, name):
            # under no_grad torch would turn the weight into a buffer (S20)
            self.register_parameter(name, tensor)
        else:
            self.tied_stock.register_buffer(self, name, tensor, persistent)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The layer and what is in it; to tensor parallelism a stock layer that it is to cut."""
        if not torch.compiler.is_compiling() and is_distribution(caller()):
            from tiedparam.layer import parallel  # only then: a tie imports little

            return parallel.parts_to_cut(self, self.tied_stock, memo, prefix)
        stock: Any = self.tied_stock
        found: Iterator[tuple[str, nn.Module]]
        found = stock.named_modules(self, memo, prefix, remove_duplicate)
        return found

    # State ------------------------------------------------------------------------------

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        loading.accept(self, state_dict, prefix, local_metadata, error_msgs)
        load_into(
            self.tied_stock,
            self,
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        save_from(self.tied_stock, self, destination, prefix, keep_vars)
        loading.sign(self, destination, prefix)

    def train(self, mode: bool = True) -> Any:
        """Change the mode, unless the layer is frozen."""
        if mode:
            refuse_if_frozen(self, "train()", undo="modes")
        return self.tied_stock.train(self, mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        refuse_if_frozen(self, "casting or moving", undo="data")
        return apply_to(self.tied_stock, self, fn, recurse)

    def reset_parameters(self) -> None:
        """Reset the tied tensors by what the stock class fills dense ones with."""
        reset_parameters(self, self.tied_stock)

    def extra_repr(self) -> str:
        """What the stock layer says, without computing its tensors."""
        return extra_repr(self)

    # Copies -----------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        for tie in ties_in(self):
            if tie.reading is not None:
                reading = tie.record.own_reading()
                reading.refuse_partial_copy(tie.record.law, self, memo, tie.describe())
        inherited = getattr(self.tied_stock, "__deepcopy__", None)
        if inherited is not None:
            copied = inherited(self, memo)
            owner.remember_layer(copied)
            return copied
        replica = _revive(*_kind(self))
        memo[id(self)] = replica
        replica.__setstate__(copy.deepcopy(_state(self), memo))
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        if _is_derived(type(self)):
            raise TieError(
                f"cannot pickle this {type(self).__name__}",
                "it is sharded.",
                "Save a state dict, with torch.distributed.checkpoint.",
            )
        # copy.copy takes the state as it is: with tables of its own, untying the copy leaves
        # this layer alone
        return _revive, _kind(self), with_own_tables(_state(self))

    def _replicate_for_data_parallel(self) -> Any:
        for tie in ties_in(self):
            if tie.rule.reads_layers:
                raise TieError(
                    f"nn.DataParallel cannot replicate the tied {tie.describe()}",
                    f"on every device, '{tie.rule}' would read the source of the first.",
                    "Use DistributedDataParallel.",
                )
        return replicate_for_data_parallel(self.tied_stock, self)


def _embeds(layer: TiedLayer) -> bool:
    embeddings = (nn.Embedding, nn.EmbeddingBag)
    return "weight" in layer.tied_names and issubclass(layer.tied_stock, embeddings)


def _state(layer: nn.Module) -> dict[str, Any]:
    getstate: Callable[[], Any] | None = getattr(stock_class(layer), "__getstate__", None)
    if getstate is None or getstate is getattr(object, "__getstate__", None):
        return layer.__dict__
    return getstate(layer)  # type: ignore[call-arg, no-any-return]


def _kind(layer: nn.Module) -> tuple[type[nn.Module], tuple[str, ...]]:
    """What picks the host class of a copy: never a private class, which is one layer's own."""
    return stock_class(layer), tuple(sorted(parametrization_lists(layer)))


def _revive(stock: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """Make the empty tied layer that unpickling fills."""
    cls = host_class(stock, names)
    layer = cls.__new__(cls)
    owner.remember_layer(layer)
    return layer
