"""Writes into a computed weight would be lost; this makes them an error (S23, S16).

A tied weight is computed at every read, so ``nn.init.zeros_(layer.weight)`` or
``layer.weight.data.mul_(2)`` would write into a temporary. Outside the layer's own forward
the weight is therefore handed out as a `GuardedWeight`, an ordinary tensor for every use
but one: it, its views and its ``.data`` refuse to be written in place.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiedparam.tie.interposed import refuse_absent
from tiedparam.tie.torch_callers import is_swap
from tiedparam.util.callers import caller
from tiedparam.util.errors import TieError, describe
from tiedparam.util.torch_private import (
    GET_BASE,
    declared_writes,
    have_one_storage,
    is_marked_parameter,
    operator_name,
    without_torch_function,
)

_WRITING_OPERATORS = frozenset(
    f"__i{name}__"
    for name in (
        "add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow",
        "and", "or", "xor", "lshift", "rshift",
    )
) | {"__setitem__"}  # fmt: skip


class _LikeAnyTensor(type(Tensor)):  # type: ignore[misc]
    """Lets ``isinstance(tensor, type(layer.weight))`` hold, as it does for a plain tensor.

    ``torch.testing.assert_close`` refuses to compare tensors of unrelated classes, and a
    guarded weight is to be compared with Parameters. torch's own Parameter does the same.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Tensor)


class GuardedWeight(Tensor, metaclass=_LikeAnyTensor):
    """An effective weight that refuses in-place writes; reads see an ordinary tensor.

    ``nn.Parameter(layer.weight)`` is a read: it gives a Parameter of its own memory, which
    may be written (torch makes it of this class, so `tied_place` tells the two apart).

    Not covered: memory that is shared with other libraries (``.numpy()``, dlpack,
    ``untyped_storage()``), where a write goes into the temporary unseen.
    """

    tied_place: tuple[weakref.ref[nn.Module], str] | None = None
    """Layer and tensor name; None once the values are a copy of their own."""
    is_derived: bool = False
    """Whether this is a view or ``detach()`` of what was read, not what was read itself."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        written = _written(func, args, kwargs)
        if written is not None:
            if func is Tensor.requires_grad_ and written.is_derived:
                return _own(written, *args[1:], **kwargs)
            _refuse(written, func)
        with without_torch_function():
            result = func(*args, **kwargs)
        if func == GET_BASE:
            return result  # a guarded one would be a view again, and its base too, without end
        for argument in (*args, *kwargs.values()):
            if type(argument) is GuardedWeight and argument.tied_place is not None:
                _refuse_absent(result, argument, func, (*args, *kwargs.values()))
                result = _guard_views(result, argument)
        return result

    # what torch does not bring before __torch_function__ (S49)

    def set_(self, *args: Any, **kwargs: Any) -> Tensor:
        """Refused, as every write in place is."""
        if self.tied_place is not None:
            _refuse(self, Tensor.set_)
        return super().set_(*args, **kwargs)

    def _use_count(self) -> int:
        if self.tied_place is not None and is_swap(caller()):
            _refuse(self, torch.utils.swap_tensors)
        count: int = super()._use_count()  # type: ignore[misc]
        return count

    # saved, copied and shown as what it is for every reader: an ordinary tensor

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _ordinary(self).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return cast(Tensor, _ordinary(self).__deepcopy__(memo))

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return str(_ordinary(self).__repr__(**options))

    def __format__(self, spec: str) -> str:
        return str(_ordinary(self).__format__(spec))


def guard(weight: Tensor, layer: nn.Module, tensor_name: str) -> Tensor:
    """``weight`` as a `GuardedWeight` that names its layer when it refuses.

    A tensor whose class stands for other numbers (of a source that torchao has quantized, say)
    is handed out as it is: it can be of one class only.
    """
    if type(weight).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return weight
    with without_torch_function():
        guarded = weight.as_subclass(GuardedWeight)
    guarded.tied_place = (weakref.ref(layer), tensor_name)
    return guarded


def unguard(weight: Tensor) -> Tensor:
    """The plain tensor behind a `GuardedWeight`; any other tensor as it is."""
    if type(weight) is GuardedWeight:
        with without_torch_function():
            return weight.as_subclass(Tensor)
    return weight


def place_of(tensor: Tensor) -> tuple[nn.Module, str] | None:
    """Layer and tensor name of a tied weight as it was read; None for any other tensor."""
    if type(tensor) is not GuardedWeight or tensor.tied_place is None or tensor.is_derived:
        return None
    layer, tensor_name = tensor.tied_place
    holder = layer()
    return (holder, tensor_name) if holder is not None else None


def is_read_from(weight: Tensor, layer: nn.Module, tensor_name: str) -> bool:
    """Whether this is the tied tensor of ``layer`` as it was read, not a view or a result."""
    place = place_of(weight)
    return place is not None and place[0] is layer and place[1] == tensor_name


def _own(weight: GuardedWeight, requires_grad: bool = True) -> Tensor:
    """What ``nn.Parameter(layer.weight)`` needs: the same class, but memory of its own."""
    with without_torch_function():
        values = weight.clone(memory_format=torch.contiguous_format)
        return values.as_subclass(GuardedWeight).requires_grad_(requires_grad)


def _ordinary(weight: GuardedWeight) -> Tensor:
    plain = unguard(weight)
    if is_marked_parameter(weight):
        return nn.Parameter(plain.detach(), weight.requires_grad)
    return plain


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GuardedWeight | None:
    """The guarded tensor that ``func`` would write into, if any."""
    outputs = kwargs.get("out")
    targets: list[Any] = [outputs]
    name = operator_name(func) or getattr(func, "__name__", "")
    if func in _HOOKS:
        targets.append(args[0])
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place or name in _WRITING_OPERATORS or kwargs.get("inplace"):
        targets.append(args[0] if args else kwargs.get("tensor", kwargs.get("input")))
    elif name == "__set__" and not (func == _SET_GRAD and args[1] is None):
        targets.append(args[0])
    elif func in _RENORMING and kwargs.get("max_norm") is not None:
        targets.append(args[1])
    targets += declared_writes(func, args, kwargs)
    for target in targets:
        for tensor in target if isinstance(target, (tuple, list)) else (target,):
            if type(tensor) is GuardedWeight and tensor.tied_place is not None:
                return tensor
    return None


_RENORMING = frozenset({F.embedding, F.embedding_bag})


_HOOKS = frozenset({Tensor.register_hook, Tensor.register_post_accumulate_grad_hook})
_SET_GRAD = Tensor.grad.__set__  # type: ignore[union-attr]


def _refuse(weight: GuardedWeight, func: Any) -> None:
    assert weight.tied_place is not None
    layer, tensor_name = weight.tied_place[0](), weight.tied_place[1]
    where = f"'{tensor_name}'" if layer is None else describe(layer, tensor_name)
    owner = getattr(getattr(func, "__self__", None), "__name__", "")
    action = f"setting .{owner}" if func.__name__ == "__set__" else f"'{func.__name__}'"
    if func in _HOOKS:
        way = (
            f"Hook the free values in layer.parametrizations.{tensor_name}, or a clone of the "
            "weight that you compute with."
        )
    elif func.__name__ == "requires_grad_" or owner == "requires_grad":
        way = f"To freeze it call layer.parametrizations.{tensor_name}.requires_grad_(False)."
    else:
        way = (
            "Use tiedparam.assign_(layer, value), tiedparam.init_(layer, init_fn), write to the "
            f"free values in layer.parametrizations.{tensor_name}, or call remove_tie first."
        )
    place = f"{action} on the tied {where}"
    raise TieError(
        place,
        f"{place} would be lost: the weight is computed from its free values at every read.",
        way,
    )


def _refuse_absent(result: Any, weight: GuardedWeight, func: Any, used: tuple[Any, ...]) -> None:
    """Raise if real numbers were made of a weight that is on the meta device (S38)."""
    with without_torch_function():
        made_up = (
            weight.is_meta
            and isinstance(result, Tensor)
            and not result.is_meta
            and not getattr(func, "__name__", "").endswith("_as")  # goes by the shape only
        )
    if made_up:
        assert weight.tied_place is not None
        layer, tensor_name = weight.tied_place[0](), weight.tied_place[1]
        if layer is not None:
            refuse_absent(layer, tensor_name, used)


def _guard_views(result: Any, weight: GuardedWeight) -> Any:
    """Guard what shares memory with a guarded weight: views, ``detach()``, ``.data``."""
    if isinstance(result, Tensor):
        if type(result) is not GuardedWeight and _shares_memory(result, weight):
            assert weight.tied_place is not None
            with without_torch_function():
                result = result.as_subclass(GuardedWeight)
            result.tied_place, result.is_derived = weight.tied_place, True
        return result
    if type(result) in (tuple, list):
        return type(result)(_guard_views(item, weight) for item in result)
    return result


def _shares_memory(left: Tensor, right: Tensor) -> bool:
    with without_torch_function():
        if left.layout is not torch.strided or left.device != right.device:
            return False
        if left.is_meta:  # has no memory, but its views hold the same storage object
            return have_one_storage(left, right)
        return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr() != 0
