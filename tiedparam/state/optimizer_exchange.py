"""One exchange of Parameters, and what an optimizer has of the old ones for the new."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tiedparam.laws.fitted import is_fitted
from tiedparam.laws.rule import Rule
from tiedparam.state.optimizer_groups import positions
from tiedparam.state.optimizer_laws import OptimizerLaw
from tiedparam.state.optimizer_maps import Maps, maps_to_dense, maps_to_free
from tiedparam.tie.record import Tie
from tiedparam.util.errors import TieError


class Exchange(NamedTuple):
    """What a tie, or its end, puts into the place of what.

    Attributes:
        rule: the law.
        old: the Parameters that go: a dense one, or free values.
        new: those that come; none if a copy is tied.
        maps: how tensors of each kind become the new ones.
        tensor_name: the name of the tensor in its layer.
        tying: whether the free values come, or go.
    """

    rule: Rule
    old: list[nn.Parameter]
    new: list[nn.Parameter]
    maps: Maps
    tensor_name: str
    tying: bool

    @property
    def remedy(self) -> str:
        """How to do without the move."""
        return f"Build the optimizer after {'tying' if self.tying else 'untying'}."

    def multiplicities(self) -> tuple[float, float] | None:
        """The smallest and the largest, or None if the law has none."""
        if not self.rule.has_orbits:
            return None
        counts = torch.cat([count.flatten() for count in self.rule.multiplicities()])
        return float(counts.min()), float(counts.max())


def tying(tie: Tie, weight: nn.Parameter) -> Exchange:
    """The exchange of a dense weight for the free values of its tie."""
    maps = maps_to_free(tie.rule) if tie.free else {}
    return Exchange(tie.rule, [weight], tie.free, maps, tie.tensor_name, True)


def untying(tie: Tie, weight: nn.Parameter) -> Exchange:
    """The exchange of free values for a dense weight."""
    return Exchange(tie.rule, tie.free, [weight], maps_to_dense(tie.rule), tie.tensor_name, False)


def moved_state(optimizer: Optimizer, law: OptimizerLaw, change: Exchange) -> list[dict[str, Any]]:
    """The state of each new parameter; none where the free values are solved for.

    Raises:
        TieError: with the reason, if an entry is not known, or not what it should be.
    """
    kind = f"the {type(optimizer).__name__}"
    states: list[dict[str, Any]] = [optimizer.state.get(p) or {} for p in change.old]
    moved: list[dict[str, Any]] = [{} for _ in change.new]
    if not moved or not any(states) or is_fitted(change.rule):
        return moved
    if len({frozenset(state) for state in states}) > 1:
        raise TieError(
            kind,
            f"{kind} holds state for some of its free values only, as after a step with the "
            "others frozen, and how that follows is not known.",
            change.remedy,
        )
    for key in states[0]:
        values = [state[key] for state in states]
        follows = law.state.get(key)
        known = follows is not None and all(
            _is_scalar(v) if follows == "scalar" or v is None else _is_like(v, p)
            for v, p in zip(values, change.old, strict=True)
        )
        if follows is None or not known:
            fact = f"{kind} holds the state '{key}', and how it follows a tie is not known."
            raise TieError(kind, fact, change.remedy)
        if follows == "scalar" or values[0] is None:
            if any(bool(value != values[0]) for value in values):
                raise TieError(
                    kind,
                    f"the free values have made different numbers of steps ('{key}' of {kind}), "
                    "and a dense weight has one.",
                    change.remedy,
                )
            mapped = [_copied(values[0]) for _ in moved]
        else:
            with torch.no_grad():
                mapped = change.maps[follows](values)
        for state, value in zip(moved, mapped, strict=True):
            state[key] = value
    return moved


def _is_like(value: Any, parameter: Tensor) -> bool:
    """Whether it is an ordinary tensor of the parameter's shape; 8-bit states are not."""
    return type(value) is Tensor and value.shape == parameter.shape


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0
    return value is None or isinstance(value, (bool, int, float, str))


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def new_names(group: dict[str, Any], change: Exchange) -> list[str]:
    """The new entries of ``param_names``, which torch keeps beside ``params``."""
    if "param_names" not in group:
        return []
    first: str = group["param_names"][positions(change.old, group["params"])[0]]
    name = change.tensor_name
    stored = f"parametrizations.{name}.original"
    if not change.tying:
        return [first[: first.index(stored)] + name if stored in first else first]
    return [f"{first.removesuffix(name)}{stored}{index}" for index in range(len(change.new))]
