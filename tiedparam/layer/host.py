"""The class of tied layers: stock in everything, with the library's machinery plugged in.

torch gives every parametrized layer a class of its own, whose property closes over that
one layer: copies then break each other (S10, S11), pickling is refused (S12), and every
layer compiles anew (S32). Here all layers of one stock class with the same tied names
share one class, whose properties look the layer up, so that

* a copy stands on its own, and ``pickle``, ``copy`` and ``torch.save`` work;
* torch's own ``remove_parametrizations`` keeps working, one layer at a time.

The stock class stays the first base, which is where torch looks for it. This file is also
where the other machinery meets the layer: write guard, values, checkpoints.
"""

from __future__ import annotations

import abc
import copy
import functools
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.compute import forward as _structured
from tiedparam.compute import frozen as _cache
from tiedparam.laws.layout import declared_shape
from tiedparam.laws.linked import Linked, ResizedSourceError
from tiedparam.layer import recurrent as _recurrent
from tiedparam.layer import values as _values
from tiedparam.state import dictionaries as _checkpoint
from tiedparam.tie import owner as _owner
from tiedparam.tie import record as _stacking
from tiedparam.tie import torch_callers as _callers
from tiedparam.tie.interposed import refuse_absent
from tiedparam.tie.lookup import is_tied, ties_of
from tiedparam.tie.wrapped import refuse_separate_source
from tiedparam.tie.write_guard import guard, guarding_is_off, unguard
from tiedparam.util.errors import TieError, describe, extra_repr
from tiedparam.util.sharded import is_sharded
from tiedparam.util.torch_private import effective, parametrization_list, parametrization_lists

_inside = threading.local()  # .call: the layer whose forward this thread runs, its arguments
_HOST_CLASSES: dict[tuple[Any, ...], type[nn.Module]] = {}


class HostMeta(abc.ABCMeta):
    """Metaclass of host classes: a shared class must survive one layer's removal.

    It is an ABCMeta, so that a user's class may have a tied layer's class and an abstract one as
    bases, as stateless copies of models for meta-learning do.
    """

    tied_names: tuple[str, ...]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """A stock layer, which has no tie yet; of a user's class what that makes."""
        makes_its_own = getattr(cls, "__new__") is not object.__new__  # noqa: B009 — of instances
        if _is_derived(cls) and not makes_its_own:  # fully_shard's classes do
            return super().__call__(*args, **kwargs)  # a class of the user's
        # ``type(layer)(…)`` makes a layer like this one, which is stock: it has no tie yet
        return _stock_of(cls)(*args, **kwargs)

    def __delattr__(cls, name: str) -> None:
        # torch's remove_parametrizations deletes the property from the class; other layers
        # still need it, and the leaving layer changes its class instead
        if name not in cls.tied_names:
            super().__delattr__(name)
        elif _is_derived(cls):
            raise TieError(
                f"cannot untie '{name}' of this {cls.__name__}: it is sharded already. "
                "Untie before fully_shard."
            )


def _is_derived(cls: type) -> bool:
    """Whether somebody, as ``fully_shard`` does, has derived this class from a host class."""
    return "tied_names" not in vars(cls)


def adopt(layer: nn.Module) -> None:
    """Move a layer that ``parametrize`` has just changed to its shared host class."""
    made_by_torch = type(layer)
    stock, names = _kind(layer)
    layer.__class__ = host_class(stock, names)
    parametrization_lists(layer).train(layer.training)
    for name in ties_of(layer):
        _stacking.adopt(parametrization_list(layer, name))
    _owner.remember(layer)
    _recurrent.forget(layer)
    if not isinstance(made_by_torch, HostMeta):
        # its properties close over the layer, which would keep it alive (S11)
        for name in names:
            if name in vars(made_by_torch):
                delattr(made_by_torch, name)


def release(layer: nn.Module, tensor_name: str, parameter: nn.Parameter) -> None:
    """Make one tied tensor a plain Parameter again, in its old place among the others."""
    stock = stock_class(layer)
    lists = parametrization_lists(layer)
    del lists[tensor_name]
    names = tuple(sorted(lists))
    if not names:
        del layer._modules["parametrizations"]
    layer.__class__ = host_class(stock, names) if names else stock
    _insert(layer, tensor_name, parameter)


def remember_order(layer: nn.Module) -> None:
    """Note the order of the parameters before the first tie moves one away (S19)."""
    if "_parameter_order" not in layer.__dict__:
        layer.__dict__["_parameter_order"] = tuple(layer._parameters)


def stock_class(layer: nn.Module) -> type[nn.Module]:
    """The class that the layer has without its parametrizations."""
    kind = type(layer)
    if isinstance(kind, HostMeta):
        return _stock_of(kind)
    return parametrize.type_before_parametrizations(layer)


def _stock_of(cls: type) -> type[nn.Module]:
    # fully_shard, and users, put a class of their own before the host's
    host = next(k for k in cls.__mro__ if isinstance(k, HostMeta) and not _is_derived(k))
    return cast(type[nn.Module], host.__base__)


def host_class(stock: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The one class of all ``stock`` layers whose parametrized tensors are ``names``."""
    if (stock, names) not in _HOST_CLASSES:
        _HOST_CLASSES[stock, names] = _make_host_class(stock, names, _members(stock, names))
    return _HOST_CLASSES[stock, names]


def _members(stock: type[nn.Module], names: tuple[str, ...]) -> dict[str, Any]:
    """What a host class overrides."""
    special = _structured.forward(stock) if "weight" in names else _recurrent.computation(stock)

    embeds = "weight" in names and issubclass(stock, (nn.Embedding, nn.EmbeddingBag))

    def compute(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = special(self, *args, **kwargs) if special is not None else None
        return stock.forward(self, *args, **kwargs) if result is None else result

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return compute(self, *args, **kwargs)
        _cache.refuse_training_forward(self)
        outer = getattr(_inside, "call", None)
        _inside.call = (self, args, kwargs)
        try:
            return compute(self, *args, **kwargs)
        finally:
            _inside.call = outer

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        if name == "qconfig" and value is not None:
            _callers.refuse_quantization(self, sys._getframe(1))
        if name == "max_norm" and value is not None and embeds:
            raise TieError(
                f"cannot set max_norm of the tied {describe(self, 'weight')}: it writes into "
                "single rows of the weight, which is computed. Call remove_tie first."
            )
        # torch would raise KeyError for a Parameter, and project a tensor in silence (S16, S24)
        if name in names and _is_parametrized(self, name) and isinstance(value, Tensor):
            _set(self, name, value, sys._getframe(1))
        else:
            stock.__setattr__(self, name, value)

    def delete_attribute(self: nn.Module, name: str) -> None:
        if name in names and _is_parametrized(self, name):
            raise TieError(
                f"cannot delete the tied {describe(self, name)}: it is computed. Call remove_tie "
                "first."
            )
        if name in self._parameters or name in self._buffers:
            # torch is about to parametrize this tensor too and will inject a property into
            # the class: give way to a private one. The next `adopt` brings the layer back.
            self.__class__ = _make_host_class(stock, names, members)
        stock.__delattr__(self, name)

    def register_parameter(self: nn.Module, name: str, parameter: Any) -> None:
        if name in names and not _is_parametrized(self, name) and parameter is not None:
            # torch's remove_parametrizations gives the tensor back: computed, perhaps
            # expanded, perhaps another layer's own (S21). The layer gets a plain one.
            remaining = tuple(n for n in names if _is_parametrized(self, n))
            if remaining:
                self.__class__ = host_class(stock, remaining)
            _insert(self, name, plain_parameter(parameter, parameter.requires_grad))
        else:
            stock.register_parameter(self, name, parameter)

    def register_buffer(self: nn.Module, name: str, tensor: Any, persistent: bool = True) -> None:
        if name in names and not _is_parametrized(self, name):
            # under no_grad torch would turn the weight into a buffer (S20)
            register_parameter(self, name, tensor)
        else:
            stock.register_buffer(self, name, tensor, persistent)

    def load_from_state_dict(
        self: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        _checkpoint.accept(self, state_dict, prefix, local_metadata, error_msgs)
        stock._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict,
            missing_keys, unexpected_keys, error_msgs,
        )  # fmt: skip

    def save_to_state_dict(
        self: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        stock._save_to_state_dict(self, destination, prefix, keep_vars)
        _checkpoint.sign(self, destination, prefix)

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        if mode:
            _cache.refuse_if_frozen(self, "train()", undo="modes")
        return stock.train(self, mode)

    def apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        _cache.refuse_if_frozen(self, "casting or moving", undo="data")
        return cast(nn.Module, stock._apply(self, fn, recurse))

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> Any:
        for name, rule in ties_of(self).items():
            if isinstance(rule, Linked):
                rule.refuse_partial_copy(self, memo, describe(self, name))
        inherited = getattr(stock, "__deepcopy__", None)
        if inherited is not None:
            copied = inherited(self, memo)
            _owner.remember(copied)
            return copied
        replica = _revive(*_kind(self))
        memo[id(self)] = replica
        replica.__setstate__(copy.deepcopy(_state(self), memo))
        return replica

    def replicate(self: nn.Module) -> Any:
        for name, rule in ties_of(self).items():
            if isinstance(rule, Linked):
                raise TieError(
                    f"nn.DataParallel cannot replicate the tied {describe(self, name)}: on every "
                    f"device, '{rule}' would read the source of the first. Use "
                    "DistributedDataParallel."
                )
        return stock._replicate_for_data_parallel(self)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        if _is_derived(type(self)):
            raise TieError(
                f"cannot pickle this {type(self).__name__}: it is sharded. Save a state dict, with "
                "torch.distributed.checkpoint."
            )
        # copy.copy takes the state as it is: with tables of its own, untying the copy leaves
        # this layer alone
        state = dict(_state(self))
        for table in ("_parameters", "_buffers", "_modules"):
            state[table] = state[table].copy()
        lists = state["_modules"]["parametrizations"] = copy.copy(parametrization_lists(self))
        lists._modules = lists._modules.copy()
        return _revive, _kind(self), state

    members: dict[str, Any] = {
        "__module__": stock.__module__,
        "__doc__": stock.__doc__,
        "forward": functools.wraps(stock.forward)(forward),
        "__setattr__": set_attribute,
        "__delattr__": delete_attribute,
        "register_parameter": register_parameter,
        "register_buffer": register_buffer,
        "_load_from_state_dict": load_from_state_dict,
        "_save_to_state_dict": save_to_state_dict,
        "train": functools.wraps(stock.train)(train),
        "_apply": apply,
        "__deepcopy__": deepcopy,
        "__reduce_ex__": reduce,
        "_replicate_for_data_parallel": replicate,
        "extra_repr": functools.wraps(stock.extra_repr)(extra_repr),
        **_recurrent.members(stock),
    }
    stock_reset = getattr(stock, "reset_parameters", None)
    if stock_reset is not None:

        def reset_parameters(self: nn.Module) -> None:
            _values.reset_parameters(self, stock)

        members["reset_parameters"] = functools.wraps(stock_reset)(reset_parameters)
    for name in names:
        members[name] = _property(name, stock)
    return members


def plain_parameter(value: Tensor, requires_grad: bool) -> nn.Parameter:
    """A contiguous Parameter of its own storage with the values of ``value``."""
    with torch.no_grad():
        dense = unguard(value).detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(dense, requires_grad)


def _make_host_class(
    stock: type[nn.Module], names: tuple[str, ...], members: dict[str, Any]
) -> type[nn.Module]:
    # a stock class may have a metaclass of its own (ABCMeta, say)
    kind = type(stock)
    meta = HostMeta if issubclass(HostMeta, kind) else type("HostMeta", (HostMeta, kind), {})
    made: Any = meta(f"Tied{stock.__name__}", (stock,), dict(members))
    made.tied_names = names
    return cast(type[nn.Module], made)


def _property(name: str, stock: type[nn.Module]) -> property:
    # torch's own methods never write into their weight; others might, in place
    torchs = _structured.torchs_own(stock)

    def read(self: nn.Module) -> Tensor:
        if not _is_parametrized(self, name):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        traced = guarding_is_off()
        call = None if torch.compiler.is_compiling() else _own_call(self)
        own_forward = not traced and call is not None
        weight = None if traced else _cache.recall(self, name, own_forward=own_forward)
        try:
            if weight is None:
                weight = effective(self, name)
        except TieError as error:
            if torch.compiler.is_compiling():
                raise
            weight = _despite(error, self, name, sys._getframe(1), computing=traced or own_forward)
        except AttributeError as error:
            # Module.__getattr__ would turn it into "no attribute 'weight'" (S26)
            raise TieError(
                f"computing the tied {describe(self, name)} raised AttributeError: {error}"
            ) from error
        if call is not None and weight.is_meta:
            refuse_absent(self, name, call)
        if type(weight) is not Tensor and not traced and is_sharded(weight):
            return _sharded_weight(self, name, weight, own_forward)
        if traced or (own_forward and torchs is not None and torchs.computes_layer(self, stock)):
            return weight
        reader = sys._getframe(1)
        if not is_tied(self, name):
            return weight
        if _callers.is_stock_forward(reader) and not (
            own_forward and torchs is not None and torchs.hands_on(self)
        ):
            if weight.is_meta:
                refuse_absent(self, name, reader.f_locals.values())
            return weight
        _callers.refuse_old_reparametrization(self, name, reader)
        return guard(weight, self, name)

    return property(read, lambda self, value: _set(self, name, value, sys._getframe(1)))


def _own_call(layer: nn.Module) -> tuple[Any, ...] | None:
    """The arguments of the layer's own forward, if this thread runs it."""
    call = getattr(_inside, "call", None)
    return call[1:] if call is not None and call[0] is layer else None


def _despite(
    error: TieError, layer: nn.Module, name: str, reader: FrameType, *, computing: bool
) -> Tensor:
    """A copy's weight where its source has changed, if this reader may have it."""
    rule = ties_of(layer).get(name)
    resized = isinstance(error, ResizedSourceError)
    if not isinstance(rule, Linked) or not (resized or _callers.is_removal(reader)):
        raise error
    with rule.untying():
        weight = effective(layer, name)
    shape = tuple(weight.shape)
    if resized and shape == declared_shape(layer, name):  # both ends were: the tie goes along
        rule.renew(layer, name, shape)
    elif computing or _callers.is_stock_forward(reader):
        raise error
    return weight


def _sharded_weight(layer: nn.Module, name: str, weight: Tensor, inside: bool) -> Tensor:
    """A weight under ``fully_shard`` is a DTensor, whose class the write guard cannot take."""
    rule = ties_of(layer).get(name)
    if isinstance(rule, Linked):
        own = [parameter for parameter in layer._parameters.values() if parameter is not None]
        if inside or not all(is_sharded(parameter) for parameter in own):
            refuse_separate_source(layer, name, rule)
    return weight


def _set(layer: nn.Module, name: str, value: Tensor, writer: FrameType) -> None:
    if is_tied(layer, name):
        _callers.refuse_functional_call(layer, name, writer)
        _values.assign_(layer, value, name)
    else:
        parametrization_list(layer, name).right_inverse(value)


def _is_parametrized(layer: nn.Module, name: str) -> bool:
    lists = layer._modules.get("parametrizations")
    return lists is not None and name in lists._modules


def _insert(layer: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Add a Parameter at the place that it had before the tie."""
    order = layer.__dict__.get("_parameter_order", ())
    layer._parameters[name] = parameter
    later = order[order.index(name) + 1 :] if name in order else ()
    for follower in [n for n in layer._parameters if n in later]:
        layer._parameters[follower] = layer._parameters.pop(follower)
    if not parametrize.is_parametrized(layer):
        layer.__dict__.pop("_parameter_order", None)


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
    _owner.remember(layer)
    return layer
