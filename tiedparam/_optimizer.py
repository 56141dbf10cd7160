"""Moving an optimizer between a dense parameter and its free values, state included.

With ``B`` the expansion, ``m`` the multiplicity of a free value and ``g`` the dense
gradient, a free value receives the gradient ``Bᵀg``. The state follows from that:

=====================================  =======================  =====================
state                                  tying                    untying
=====================================  =======================  =====================
gradient-like (``.grad``,              ``Bᵀs``                  ``B(s / m)``
``momentum_buffer``, ``exp_avg``, …)
second moments (``exp_avg_sq``,        ``m · |B|ᵀs``            ``|B|(s / m²)``
``square_avg``, Adagrad's ``sum``, …)
weight-like (ASGD's ``ax``; RMSprop's  ``Bᵀs / m``              ``B s``
momentum of normalized steps)
``step`` and other scalars             cloned                   cloned
=====================================  =======================  =====================

so that with equal gradients within each orbit an Adam trajectory goes on unchanged.
Second moments have no sign: ``|B|`` adds where a signed orbit subtracts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from tiedparam._rule import Rule

_GRADIENT_LIKE = frozenset({"momentum_buffer", "exp_avg", "grad_avg"})
_SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"})
_WEIGHT_LIKE = frozenset({"ax"})
PARAMETER_SHAPED = _GRADIENT_LIKE | _SECOND_MOMENTS | _WEIGHT_LIKE
"""Names of optimizer state that has the shape of its parameter."""

Maps = dict[str, Callable[[Sequence[Tensor]], list[Tensor]]]


def maps_to_free(rule: Rule) -> Maps:
    """How gradient-like, squared and weight-like dense tensors become free ones."""

    def counted(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        counts = rule.multiplicities()
        return [(t, m.to(t.device, t.dtype)) for t, m in zip(tensors, counts, strict=True)]

    def gradient(dense: Sequence[Tensor]) -> list[Tensor]:
        (value,) = dense
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        return [part.to(value.dtype) for part in rule.adjoint(wide)]

    def second_moment(dense: Sequence[Tensor]) -> list[Tensor]:
        (value,) = dense
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        signs = _signs(rule, wide)
        return [(m * part).to(value.dtype) for part, m in counted(rule.adjoint(wide * signs))]

    def weight(dense: Sequence[Tensor]) -> list[Tensor]:
        return list(rule.right_inverse(dense[0]))

    return {"gradient": gradient, "second": second_moment, "weight": weight}


def refuse_nonlinear(rule: Rule, old: Sequence[nn.Parameter], optimizers: list[Optimizer]) -> None:
    """The maps hold for linear laws; what there is to move under another law is refused.

    Raises:
        ValueError: with the reason, if there is a gradient or optimizer state to move.
    """
    stepped = any(o.state.get(p) for o in optimizers for p in old)
    if not (stepped or any(p.grad is not None for p in old)) or _is_linear(rule):
        return
    what = "optimizer state" if stepped else "a pending gradient"
    raise ValueError(
        f"the rule is not linear, and how {what} follows is not known. Call zero_grad, or build "
        "the optimizer afterwards"
    )


def _is_linear(rule: Rule) -> bool:
    generator = torch.Generator().manual_seed(0)
    left, right = (
        [torch.randn(s, dtype=torch.float64, device="cpu", generator=generator) for s in shapes]
        for shapes in (rule.free_shapes(), rule.free_shapes())
    )
    with torch.no_grad():
        both = rule(*(a + 2 * b for a, b in zip(left, right, strict=True)))
        return torch.allclose(both, rule(*left) + 2 * rule(*right))


def maps_to_dense(rule: Rule) -> Maps:
    """How gradient-like, squared and weight-like free tensors become a dense one."""

    def divided(free: Sequence[Tensor], power: int) -> list[Tensor]:
        counts = rule.multiplicities()
        return [t / m.to(t.device, t.dtype) ** power for t, m in zip(free, counts, strict=True)]

    def gradient(free: Sequence[Tensor]) -> list[Tensor]:
        return [_dense(rule(*divided(free, 1)))]

    def second_moment(free: Sequence[Tensor]) -> list[Tensor]:
        value = rule(*divided(free, 2))
        return [_dense(value * _signs(rule, value))]

    def weight(free: Sequence[Tensor]) -> list[Tensor]:
        return [_dense(rule(*free))]

    return {"gradient": gradient, "second": second_moment, "weight": weight}


@dataclass
class Move:
    """One planned exchange of parameters in one optimizer; nothing is changed until `apply`."""

    optimizer: Optimizer
    group: dict[str, Any]
    position: int
    old: list[nn.Parameter]
    new: list[nn.Parameter]
    state: list[dict[str, Any]]
    names: list[str] | None

    def apply(self) -> None:
        """Exchange the parameters in their group, in place, and their state."""
        params: list[Any] = self.group["params"]
        for parameter in self.old:
            self.optimizer.state.pop(parameter, None)
        kept = [p for p in params if not _among(p, self.old)]
        # in place: schedulers and LBFGS hold the list itself
        params[:] = [*kept[: self.position], *self.new, *kept[self.position :]]
        if self.names is not None:
            self.group["param_names"][:] = self.names
        for parameter, state in zip(self.new, self.state, strict=True):
            if state:
                self.optimizer.state[parameter] = state


def as_optimizers(optimizer: Optimizer | Iterable[Optimizer] | None) -> list[Optimizer]:
    """The ``optimizer=`` argument as a list.

    Raises:
        TypeError: if something in it is not an optimizer.
    """
    if optimizer is None:
        return []
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    if not isinstance(optimizers, Iterable):
        raise TypeError(f"optimizer= takes torch optimizers, not {type(optimizer).__name__}")
    optimizers = list(optimizers)
    for item in optimizers:
        if not isinstance(item, Optimizer):
            raise TypeError(f"optimizer= takes torch optimizers, not {type(item).__name__}")
    return optimizers


def plan_moves(
    optimizers: Sequence[Optimizer],
    old: list[nn.Parameter],
    new: list[nn.Parameter],
    maps: Maps,
    tensor_name: str,
) -> list[Move]:
    """Plan the exchange of ``old`` for ``new`` in every optimizer that holds ``old``.

    Raises:
        ValueError: with the reason, if no optimizer holds them, if they stand in several
            groups, or if there is state whose meaning is not known.
    """
    moves = []
    for optimizer in optimizers:
        groups = [
            group for group in optimizer.param_groups
            if any(_among(p, group["params"]) for p in old)
        ]  # fmt: skip
        if not groups:
            continue
        if len(groups) > 1 or not all(_among(p, groups[0]["params"]) for p in old):
            raise ValueError(
                f"the {type(optimizer).__name__} holds its free values in several groups, or "
                "only some of them. Put them into one group"
            )
        if isinstance(optimizer, LBFGS) and optimizer.state:
            raise ValueError(
                "LBFGS holds one history for all of its parameters, which cannot follow. Build "
                "the optimizer after tying"
            )
        group = groups[0]
        positions = [i for i, p in enumerate(group["params"]) if _among(p, old)]
        states = [dict(optimizer.state.get(p, {})) for p in old]
        moved = _map_state(optimizer, states, old, len(new), maps)
        names = _renamed(group, positions, len(new), tensor_name)
        moves.append(Move(optimizer, group, positions[0], old, new, moved, names))
    if optimizers and old and not moves and any(p.requires_grad for p in old):
        raise ValueError(
            "none of the optimizers holds it. Pass the optimizer that was built from this model"
        )
    return moves


def plan_addition(
    optimizers: Sequence[Optimizer], new: nn.Parameter, beside: list[nn.Parameter]
) -> list[Move]:
    """Plan to add a parameter that no optimizer held, to the group that holds its source.

    Args:
        optimizers: the optimizers to look through.
        new: the parameter.
        beside: what its source is computed from.

    Raises:
        ValueError: with the reason, if no optimizer holds the source and there is a choice.
    """
    moves = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(_among(p, group["params"]) for p in beside):
                moves.append(_addition(optimizer, group, new))
                break
    if optimizers and not moves:
        if len(optimizers) > 1 or len(optimizers[0].param_groups) > 1:
            raise ValueError(
                "there are several groups and none holds its source. Call remove_tie without "
                "optimizer= and add the parameter to the group you want"
            )
        moves.append(_addition(optimizers[0], optimizers[0].param_groups[0], new))
    return moves


def _addition(optimizer: Optimizer, group: dict[str, Any], new: nn.Parameter) -> Move:
    names = None
    if "param_names" in group:
        taken = set(group["param_names"])
        name = next(n for i in itertools.count(1) if (n := f"untied_{i}") not in taken)
        names = [*group["param_names"], name]
    return Move(optimizer, group, len(group["params"]), [], [new], [{}], names)


def move_gradient(old: Sequence[nn.Parameter], new: Sequence[nn.Parameter], maps: Maps) -> None:
    """Carry a pending ``.grad`` over."""
    if new and any(parameter.grad is not None for parameter in old):
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in old]
        with torch.no_grad():
            for parameter, gradient in zip(new, maps["gradient"](gradients), strict=True):
                parameter.grad = gradient


def share_gradient(weight: nn.Parameter, copy: Rule, origin: Sequence[nn.Parameter]) -> None:
    """Add the pending ``.grad`` of a tensor that is a copy now to what it is computed from."""
    trained = [parameter for parameter in origin if parameter.requires_grad]
    if weight.grad is None or not trained:
        return
    with torch.enable_grad():
        shares = torch.autograd.grad(copy(), trained, weight.grad, allow_unused=True)
    for parameter, share in zip(trained, shares, strict=True):
        if share is not None:
            parameter.grad = share if parameter.grad is None else parameter.grad + share


def _map_state(
    optimizer: Optimizer,
    states: list[dict[str, Any]],
    old: list[nn.Parameter],
    new_count: int,
    maps: Maps,
) -> list[dict[str, Any]]:
    if new_count == 0 or not any(states):
        return [{} for _ in range(new_count)]
    moved: list[dict[str, Any]] = [{} for _ in range(new_count)]
    if len({frozenset(state) for state in states}) > 1:
        raise ValueError(
            f"the {type(optimizer).__name__} holds state for some of its free values only, as "
            "after a step with the others frozen, and how that follows is not known. Build the "
            "optimizer afterwards"
        )
    for key in states[0]:
        values = [state.get(key) for state in states]
        if _is_scalar(values[0]):
            for state in moved:
                value = values[0]
                state[key] = value.clone() if isinstance(value, Tensor) else value
            continue
        kind = _kind(key, states[0])
        shaped = all(
            isinstance(v, Tensor) and v.shape == p.shape for v, p in zip(values, old, strict=True)
        )
        if kind is None or not shaped:
            raise ValueError(
                f"the {type(optimizer).__name__} holds the state '{key}', and how it follows a "
                "tie is not known. Build the optimizer after tying"
            )
        with torch.no_grad():
            mapped = maps[kind](values)  # type: ignore[arg-type]
        for state, value in zip(moved, mapped, strict=True):
            state[key] = value
    return moved


def _kind(key: str, state: dict[str, Any]) -> str | None:
    if key == "momentum_buffer" and "square_avg" in state:
        return "weight"  # RMSprop's buffer holds steps, normalized already
    if key in _GRADIENT_LIKE:
        return "gradient"
    if key in _SECOND_MOMENTS:
        return "second"
    return "weight" if key in _WEIGHT_LIKE else None


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0
    return value is None or isinstance(value, (bool, int, float, str))


def _renamed(
    group: dict[str, Any], positions: list[int], new_count: int, tensor_name: str
) -> list[str] | None:
    """The group's ``param_names`` (torch keeps them beside ``params``) after the exchange."""
    if "param_names" not in group:
        return None
    names: list[str] = list(group["param_names"])
    first = names[positions[0]]
    stored = f"parametrizations.{tensor_name}.original"
    if stored in first:
        added = [first[: first.index(stored)] + tensor_name]
    else:
        added = [f"{first.removesuffix(tensor_name)}{stored}{index}" for index in range(new_count)]
    kept = [name for index, name in enumerate(names) if index not in positions]
    return [*kept[: positions[0]], *added, *kept[positions[0] :]]


def _among(parameter: Any, parameters: Iterable[Any]) -> bool:
    return any(parameter is other for other in parameters)


def _signs(rule: Rule, like: Tensor) -> Tensor:
    """``B1``: 1 for every entry, −1 where a signed orbit subtracts."""
    return rule.forward(*(like.new_ones(shape) for shape in rule.free_shapes()))


def _dense(value: Tensor) -> Tensor:
    return value.clone(memory_format=torch.contiguous_format)
