"""Writing the effective weight the safe way: assign, initialise, reset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from tiedparam.compute.frozen import refuse_if_frozen
from tiedparam.laws.distance import relative_distance
from tiedparam.laws.fitted import is_lawful
from tiedparam.laws.sharing import redrawn, refitted
from tiedparam.layer.free_values import (
    FreeValues,
    assign_free_values,
    why_not_dense,
    why_without_numbers,
)
from tiedparam.layer.parameter_order import in_order
from tiedparam.tie.lookup import tie_of, ties_in
from tiedparam.tie.offloaded import why_offloaded
from tiedparam.tie.record import Tie
from tiedparam.tie.sources import is_what_it_copies
from tiedparam.tie.write_guard import unguard
from tiedparam.util.errors import Reason, TieError, raise_if
from tiedparam.util.parametrized import parametrization_lists
from tiedparam.util.sharded import is_sharded, whole, write
from tiedparam.util.torch_private import (
    TABLES,
    effective,
    has_values,
    is_traceable_wrapper_subclass,
    parameters_of,
    stand_in,
    submodules_of,
)

Layer = TypeVar("Layer", bound=nn.Module)


@overload
def assign_(
    layer: Layer, value: Tensor, tensor_name: str = ..., *, project: bool = ...
) -> Layer: ...
@overload
def assign_(layer: Layer, *, free: FreeValues, tensor_name: str = ...) -> Layer: ...
def assign_(
    layer: Layer,
    value: Tensor | None = None,
    tensor_name: str = "weight",
    *,
    project: bool = False,
    free: FreeValues | None = None,
) -> Layer:
    """Set the effective weight, or the free values that it is computed from.

    With a weight it is ``layer.weight = value``, with a say in what may change.

    Args:
        layer: the tied layer.
        value: a tensor of the weight's shape and dtype, on any device.
        tensor_name: which tensor.
        project: take the nearest lawful weight instead of raising if ``value`` breaks the law.
        free: instead of ``value``, the free values: the tensor itself where there is one, several
            in the order of `free_values`, or some of them by the names that they have there. Of
            their own shapes and dtype, on any device; another parametrization may be stacked on
            the tie.

    Returns:
        The layer. The free values keep their identity; only their contents change. Assigning
        to a copy the very tensor that it copies changes nothing, and renews the tie if that
        tensor was resized.

    Raises:
        TieError: if the tensor is not tied, is a copy and ``value`` is not what it copies, has
            another shape or dtype, or (without ``project``) breaks the law, by how much the
            message says; if there are other free values than those given; or if the values are
            elsewhere (accelerate's offloading), so that the write would be lost.
        TypeError: for arguments of a wrong type, and unless either ``value`` or ``free`` is given.

    Example:
        >>> layer = tp.register_tie(nn.Linear(2, 2), "flip_sym")
        >>> _ = tp.assign_(layer, torch.tensor([[1.0, 2.0], [0.0, 3.0]]), project=True)
        >>> layer.weight.tolist()
        [[1.0, 1.0], [1.0, 3.0]]
    """
    if (value is None) == (free is None) or (project and free is not None):
        raise TypeError("assign_ takes a weight, with or without project=, or the values of free=")
    tie = tie_of(layer, tensor_name)
    place = f"cannot assign to {tie.describe()}"
    refuse_if_frozen(layer, "assigning")
    raise_if(place, why_offloaded(layer))
    if free is not None:
        assign_free_values(tie, free, place)
        return layer
    if not isinstance(value, Tensor):
        raise TypeError(f"assign_ takes a tensor, not {type(value).__name__}")
    rule, stored = tie.rule, tie.free
    if rule.reads_layers and not stored:
        if not is_what_it_copies(tie.values, value):
            fact = f"it is computed from another layer's tensor by '{rule}'."
            raise TieError(place, fact, "Assign to the source, or call remove_tie first.")
        tie.record.own_reading().renew(tie.record.law, layer, tensor_name, value)
        return layer
    value = unguard(value)
    raise_if(place, _why_not_taken(tie, value))
    value = whole(value.detach())
    with torch.no_grad():
        present = tie.weight()
        raise_if(place, _why_other_than(present, value, tie))
        if not has_values(value):
            return layer  # shapes alone, and they agree
        free = refitted(rule, value, [whole(parameter.detach()) for parameter in stored])
        lawful = rule(*rule.read(), *free)
        if not (project or is_lawful(rule, value, lawful)):
            fact = f"the value breaks the law {rule.law} of {tie.describe()} (residual "
            raise TieError(
                tie.describe(),
                f"{fact}{relative_distance(value, lawful):.2e}).",
                "To take the nearest lawful weight call tiedparam.assign_(layer, value, "
                "project=True); to keep the value as it is, call remove_tie first.",
            )
        for parameter, content in zip(stored, free, strict=True):
            write(parameter, content)
    return layer


def _why_not_taken(tie: Tie, value: Tensor) -> Reason | None:
    """Why no value of this kind can be assigned, whatever its size."""
    if tie.is_stacked:
        return Reason(
            "another parametrization is stacked on the tie.",
            f"Remove that one first (del layer.parametrizations.{tie.tensor_name}[1:]).",
        )
    if is_traceable_wrapper_subclass(value) and not is_sharded(value):
        # what torchao's quantize_ puts in the place of a weight
        return Reason(
            f"the value is a {type(value).__name__}, and the free values are plain numbers.",
            "To quantize the layer call remove_tie first.",
        )
    return why_not_dense(value)


def _why_other_than(present: Tensor, value: Tensor, tie: Tie) -> Reason | None:
    """Why a value does not fit the tensor that is there."""
    if value.shape != present.shape or value.dtype != present.dtype:
        return Reason(
            f"the value is {value.dtype} {tuple(value.shape)}, and the tensor {present.dtype} "
            f"{tuple(present.shape)}.",
            _meant(value, present, tie.rule.free_shapes()),
        )
    return why_without_numbers(present, value)


def _meant(value: Tensor, present: Tensor, free: Sequence[tuple[int, ...]]) -> str:
    """The call that was meant, as far as shape and dtype of the value tell."""
    cast = "" if value.dtype == present.dtype else f".to({present.dtype})"
    shape = tuple(present.shape)
    if value.shape == present.shape:
        return f"Convert the value first: value{cast}."
    if _stretches(value.shape, shape):  # one row for all, say, which many laws keep
        return f"To repeat the value call tiedparam.assign_(layer, value{cast}.expand{shape})."
    if tuple(value.shape) in free:
        given = f"value{cast}" if len(free) == 1 else f"{{name: value{cast}}}"
        return f"To set free values call tiedparam.assign_(layer, free={given})."
    return "Convert the value first."


def _stretches(shape: torch.Size, goal: tuple[int, ...]) -> bool:
    return len(shape) <= len(goal) and all(
        size in (1, wanted) for size, wanted in zip(shape[::-1], goal[::-1], strict=False)
    )


def init_(layer: Layer, init_fn: Callable[[Tensor], Any], tensor_name: str = "weight") -> Layer:
    """Initialise a tied tensor as if it were dense, keeping one representative per orbit.

    A projection would shrink an i.i.d. initialisation by the square root of the
    multiplicity (S37); a representative keeps the distribution, and constants.

    Args:
        layer: the tied layer.
        init_fn: an ``nn.init`` function (or any that fills a tensor in place), called once
            on a dense tensor of the weight's shape, dtype and device.
        tensor_name: which tensor.

    Returns:
        The layer. A copy-tied tensor is left alone, so that ``model.apply`` works; values that a
        law has besides its sources are fitted.

    Raises:
        TieError: if the tensor is not tied, if ``init_fn`` does not fill its tensor, or if the
            values are elsewhere (accelerate's offloading), so that the write would be lost.

    Example:
        >>> layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
        >>> _ = tp.init_(layer, nn.init.zeros_)
        >>> torch.equal(layer.weight, torch.zeros(4, 4))
        True
    """
    tie = tie_of(layer, tensor_name)
    refuse_if_frozen(layer, "initialising")
    if tie.rule.reads_layers and not tie.free:
        return layer
    where = tie.describe()
    raise_if(f"cannot initialise {where}", why_offloaded(layer))
    with torch.no_grad():
        dense = _empty_dense(layer, tensor_name)
        init_fn(dense)
        if _is_unfilled(dense):
            raise TieError(
                where,
                f"init_fn left entries of {where} unfilled.",
                "Pass a function that fills its tensor in place, as those of torch.nn.init do.",
            )
        _keep_representatives(tie, dense)
    return layer


def _empty_dense(layer: nn.Module, tensor_name: str) -> Tensor:
    """A tensor like the effective weight, to be filled; whole where the layer is sharded."""
    weight = effective(layer, tensor_name)
    # not a number: what is not filled can be told
    return torch.full(weight.shape, torch.nan, dtype=weight.dtype, device=weight.device)


def _is_unfilled(dense: Tensor) -> bool:
    return has_values(dense) and bool(dense.isnan().any())


def _keep_representatives(tie: Tie, dense: Tensor) -> None:
    """Fill the free values with one member of each orbit of ``dense``."""
    with torch.no_grad():
        present = [whole(parameter.detach()) for parameter in tie.free]
        chosen = redrawn(tie.rule, dense, present)
        for parameter, content in zip(tie.free, chosen, strict=True):
            write(parameter, content)


def reset_parameters(layer: nn.Module, stock_class: type[nn.Module]) -> None:
    """Run the stock class's ``reset_parameters`` on dense stand-ins of the tied tensors.

    Everything else that it resets (a bias, running statistics) is the layer's own. A
    copy-tied tensor is left alone: its source is not re-initialised behind its back.
    """
    refuse_if_frozen(layer, "reset_parameters()")
    raise_if(f"cannot reset a tied {stock_class.__name__}", why_offloaded(layer))
    parameters = dict(parameters_of(layer))
    modules = {k: v for k, v in submodules_of(layer).items() if k != "parametrizations"}
    with torch.no_grad():
        for name in parametrization_lists(layer):
            parameters[name] = nn.Parameter(_empty_dense(layer, name))
    dense_layer = stand_in(layer, stock_class, in_order(layer, parameters), modules)
    stock_class.reset_parameters(dense_layer)  # type: ignore[attr-defined]
    parameters = parameters_of(dense_layer)
    for tie in ties_in(layer):
        dense_parameter = parameters[tie.tensor_name]
        if not tie.free or dense_parameter is None:
            continue
        if not _is_unfilled(dense_parameter):  # a reset of the bias alone, say
            _keep_representatives(tie, dense_parameter)
    # what the stock method assigned instead of filling in place
    table = parameters_of(layer)
    for name in table:
        table[name] = parameters[name]
    for name, value in dense_layer.__dict__.items():
        if name not in TABLES:
            layer.__dict__[name] = value
