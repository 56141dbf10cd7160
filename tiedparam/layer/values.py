"""Writing the effective weight the safe way: assign, initialise, reset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tiedparam.compute import frozen as _cache
from tiedparam.laws.linked import Linked
from tiedparam.tie.lookup import free_values, get_tie, is_stacked, ties_of
from tiedparam.tie.offloaded import refuse_offloaded
from tiedparam.tie.write_guard import unguard
from tiedparam.util.errors import TieError, describe
from tiedparam.util.sharded import is_sharded, whole, write
from tiedparam.util.torch_private import effective, has_values, parametrization_lists


def assign_(
    layer: nn.Module, value: Tensor, tensor_name: str = "weight", *, project: bool = False
) -> nn.Module:
    """Set the effective weight: ``layer.weight = value`` with a say in what may change.

    Args:
        layer: the tied layer.
        value: a tensor of the weight's shape and dtype, on any device.
        tensor_name: which tensor.
        project: take the nearest lawful weight instead of raising if ``value`` breaks the law.

    Returns:
        The layer. The free values keep their identity; only their contents change. Assigning
        to a copy the very tensor that it copies is no change, and renews the tie if that was
        resized.

    Raises:
        TieError: if the tensor is not tied, is a copy and ``value`` is not what it copies, has
            another shape or dtype, or (without ``project``) breaks the law, by how much the
            message says; or if the values are elsewhere (accelerate's offloading), so that the
            write would be lost.
    """
    rule = get_tie(layer, tensor_name)
    where = describe(layer, tensor_name)
    _cache.refuse_if_frozen(layer, "assigning")
    refuse_offloaded(layer, where, "assign to")
    if not isinstance(value, Tensor):
        raise TypeError(f"assign_ takes a tensor, not {type(value).__name__}")
    if isinstance(rule, Linked):
        if rule.is_what_it_copies(value):
            rule.renew(layer, tensor_name, tuple(value.shape))
            return layer
        raise TieError(
            f"cannot assign to {where}: it is computed from another layer's tensor by '{rule}'. "
            "Assign to the source, or call remove_tie first."
        )
    if is_stacked(layer, tensor_name):
        raise TieError(
            f"cannot assign to {where}: another parametrization is stacked on the tie. "
            f"Remove that one first (del layer.parametrizations.{tensor_name}[1:])."
        )
    value = unguard(value)
    if is_traceable_wrapper_subclass(value) and not is_sharded(value):
        # what torchao's quantize_ puts in the place of a weight
        raise TieError(
            f"cannot assign a {type(value).__name__} to {where}: the free values are plain "
            "numbers. To quantize the layer call remove_tie first."
        )
    value = whole(value.detach())
    with torch.no_grad():
        present = effective(layer, tensor_name)
        if value.shape != present.shape or value.dtype != present.dtype:
            sizes = {shape: number for number, shape in enumerate(rule.free_shapes())}
            raise TieError(
                f"cannot assign {value.dtype} {tuple(value.shape)} to {where}, which is "
                f"{present.dtype} {tuple(present.shape)}. "
                f"{_meant(value, present, tensor_name, sizes)}"
            )
        if has_values(value) and not has_values(present):
            raise TieError(
                f"cannot assign to {where}: it is on the meta device, where numbers are lost. Call "
                "to_empty first."
            )
        if not has_values(value):
            if not has_values(present):
                return layer  # shapes alone, and they agree
            raise TieError(
                f"cannot assign to {where}: the value has no numbers, it is on the meta device. "
                "Give it some first, or move the layer with to('meta')."
            )
        free = rule.right_inverse(value)
        if not project and not torch.equal(rule(*free), value):
            raise TieError(
                f"the value breaks the law {rule.law} of {where} (residual "
                f"{rule.residual(value):.2e}). To take the nearest lawful weight call "
                "tiedparam.assign_(layer, value, project=True); to keep the value as it is, call "
                "remove_tie first."
            )
        for parameter, content in zip(free_values(layer, tensor_name), free, strict=True):
            write(parameter, content)
    return layer


def _meant(
    value: Tensor, present: Tensor, tensor_name: str, free: Mapping[tuple[int, ...], int]
) -> str:
    """The call that was meant, as far as shape and dtype of the value tell."""
    cast = "" if value.dtype == present.dtype else f".to({present.dtype})"
    shape = tuple(present.shape)
    if value.shape == present.shape:
        return f"Convert the value first: value{cast}."
    if _stretches(value.shape, shape):  # one row for all, say, which many laws keep
        return f"To repeat the value call tiedparam.assign_(layer, value{cast}.expand{shape})."
    if tuple(value.shape) in free:
        parameter = f"layer.parametrizations.{tensor_name}.original{free[tuple(value.shape)]}"
        return f"To set the free values call {parameter}.copy_(value) under torch.no_grad()."
    return "Convert the value first."


def _stretches(shape: torch.Size, goal: tuple[int, ...]) -> bool:
    return len(shape) <= len(goal) and all(
        size in (1, wanted) for size, wanted in zip(shape[::-1], goal[::-1], strict=False)
    )


def init_(
    layer: nn.Module, init_fn: Callable[[Tensor], Any], tensor_name: str = "weight"
) -> nn.Module:
    """Initialise a tied tensor as if it were dense, keeping one representative per orbit.

    A projection would shrink an i.i.d. initialisation by the square root of the
    multiplicity (S37); a representative keeps the distribution, and constants.

    Args:
        layer: the tied layer.
        init_fn: an ``nn.init`` function (or any that fills a tensor in place), called once
            on a dense tensor of the weight's shape, dtype and device.
        tensor_name: which tensor.

    Returns:
        The layer. A copy-tied tensor is left alone, so that ``model.apply`` works.

    Raises:
        TieError: if the tensor is not tied, if ``init_fn`` does not fill its tensor, or if the
            values are elsewhere (accelerate's offloading), so that the write would be lost.
    """
    rule = get_tie(layer, tensor_name)
    _cache.refuse_if_frozen(layer, "initialising")
    if isinstance(rule, Linked):
        return layer
    refuse_offloaded(layer, describe(layer, tensor_name), "initialise")
    with torch.no_grad():
        dense = _empty_dense(layer, tensor_name)
        init_fn(dense)
        if _is_unfilled(dense):
            raise TieError(
                f"init_fn left entries of {describe(layer, tensor_name)} unfilled. Pass a function "
                "that fills its tensor in place, as those of torch.nn.init do."
            )
        keep_representatives(layer, tensor_name, dense)
    return layer


def _empty_dense(layer: nn.Module, tensor_name: str) -> Tensor:
    """A tensor like the effective weight, to be filled; whole where the layer is sharded."""
    weight = effective(layer, tensor_name)
    # not a number: what is not filled can be told
    return torch.full(weight.shape, torch.nan, dtype=weight.dtype, device=weight.device)


def _is_unfilled(dense: Tensor) -> bool:
    return has_values(dense) and bool(dense.isnan().any())


def keep_representatives(layer: nn.Module, tensor_name: str, dense: Tensor) -> None:
    """Fill the free values with one member of each orbit of ``dense``."""
    rule = get_tie(layer, tensor_name)
    with torch.no_grad():
        chosen = rule.representatives(dense)
        for parameter, content in zip(free_values(layer, tensor_name), chosen, strict=True):
            write(parameter, content)


def reset_parameters(layer: nn.Module, stock_class: type[nn.Module]) -> None:
    """Run the stock class's ``reset_parameters`` on dense stand-ins of the tied tensors.

    Everything else that it resets (a bias, running statistics) is the layer's own. A
    copy-tied tensor is left alone: its source is not re-initialised behind its back (S23).
    """
    _cache.refuse_if_frozen(layer, "reset_parameters()")
    refuse_offloaded(layer, f"a tied {stock_class.__name__}", "reset")
    stand_in = stock_class.__new__(stock_class)
    stand_in.__dict__.update(layer.__dict__)
    stand_in._parameters = dict(layer._parameters)
    stand_in._modules = {k: v for k, v in layer._modules.items() if k != "parametrizations"}
    with torch.no_grad():
        for name in parametrization_lists(layer):
            stand_in._parameters[name] = nn.Parameter(_empty_dense(layer, name))
    stock_class.reset_parameters(stand_in)  # type: ignore[attr-defined]
    for name, rule in ties_of(layer).items():
        dense_parameter = stand_in._parameters[name]
        if isinstance(rule, Linked) or dense_parameter is None:
            continue
        if not _is_unfilled(dense_parameter):  # a reset of the bias alone, say
            keep_representatives(layer, name, dense_parameter)
    # what the stock method assigned instead of filling in place
    for name in layer._parameters:
        layer._parameters[name] = stand_in._parameters[name]
    for name, value in stand_in.__dict__.items():
        if name not in ("_parameters", "_modules"):
            layer.__dict__[name] = value
