"""No optimizer steps on a parameter that a tie has replaced, or with foreign state (S17–S19).

A tie makes fresh Parameters. An optimizer built before goes on holding the old one and
would never train the layer, in silence. One hook on torch's optimizers, installed with the
first tie, raises before such a step writes anything, fused steps included.

State that ``optimizer.load_state_dict`` assigned by index can land on the wrong parameter
(S19), and fused kernels would read it out of bounds (S17): where a free value is involved,
shapes are compared before the first step that follows. There it is also said if the optimizer is
one, as Muon, that takes what is stored for the weight (S41).

``load_state_dict`` replaces the options of the groups, too, and with them the rates of decay that
were multiplied (S42): an optimizer that was moved takes groups only that say the same of that.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tiedparam.state.optimizer_earlier import renew_state
from tiedparam.state.optimizer_groups import times
from tiedparam.state.optimizer_laws import parameter_shaped_state, why_no_steps
from tiedparam.tie.marks import FREE, RETIRED
from tiedparam.util.errors import Reason, TieError, warn
from tiedparam.util.torch_private import load_pre_hooks_of

_checked_state: weakref.WeakKeyDictionary[Optimizer, Any] = weakref.WeakKeyDictionary()
_forbidden: dict[Any, tuple[list[Tensor], Reason]] = {}  # who forbids → parameters, and why
_installed = False


def retire(parameters: list[nn.Parameter], where: str, remedy: str) -> None:
    """From now on, stepping an optimizer that holds one of these raises."""
    _install()
    for parameter in parameters:
        parameter.__dict__.pop(FREE, None)
        setattr(parameter, RETIRED, Reason(f"{where}, which was replaced.", remedy))


def holds_retired(optimizer: Optimizer) -> bool:
    """Whether a tie has replaced a parameter that the optimizer holds, so that it cannot step."""
    held = (p for group in optimizer.param_groups for p in group["params"])
    return any(hasattr(p, RETIRED) for p in held)


def watch_free_values(parameters: list[nn.Parameter], where: str) -> None:
    """Compare loaded optimizer state with these parameters' shapes before a step uses it."""
    _install()
    for parameter in parameters:
        setattr(parameter, FREE, where)


def forbid_steps(owner: object, parameters: list[Tensor], where: str, remedy: str) -> None:
    """Until `allow_steps`, stepping an optimizer that holds one of these raises."""
    _install()
    _forbidden[owner] = (parameters, Reason(where, remedy))


def allow_steps(owner: object) -> None:
    """End what ``owner`` forbade."""
    _forbidden.pop(owner, None)


def watch_rates(optimizer: Optimizer) -> None:
    """From now on, loading groups with other multiplied rates than those that are here raises."""
    hooks = load_pre_hooks_of(optimizer)
    if _refuse_other_rates not in hooks.values():
        optimizer.register_load_state_dict_pre_hook(_refuse_other_rates)


def _refuse_other_rates(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    here, there = optimizer.param_groups, state_dict["param_groups"]
    if len(here) != len(there):
        return  # torch says so
    for number, (own, loaded) in enumerate(zip(here, there, strict=True)):
        if times(own) != times(loaded):
            raise TieError(
                f"cannot load this state into the {type(optimizer).__name__}",
                f"the decay of group {number} is multiplied by {times(own):g} for its ties here, "
                f"and by {times(loaded):g} in what is loaded.",
                "Load it into an optimizer whose parameters are tied as they were when it was "
                "saved, and tie or untie with optimizer= then.",
            )


def _install() -> None:
    global _installed
    if not _installed:
        register_optimizer_step_pre_hook(_before_step)
        _installed = True


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    place = f"the {type(optimizer).__name__}"
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            why = getattr(parameter, RETIRED, None)
            if why is not None:
                raise TieError(place, f"{place} still holds {why.fact}", why.remedy)
    if _forbidden:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for parameters, why in list(_forbidden.values()):
            if any(id(parameter) in held for parameter in parameters):
                raise TieError(place, f"{place} would step {why.fact}", why.remedy)
    if _checked_state.get(optimizer) is not optimizer.state:
        _check_state(optimizer)
        _checked_state[optimizer] = optimizer.state


def _check_state(optimizer: Optimizer) -> None:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    involved = [getattr(p, FREE) for p in held if hasattr(p, FREE)]
    if not involved:
        return
    renew_state(optimizer)
    reason = why_no_steps(optimizer)
    if reason is not None:
        steps = f"the {type(optimizer).__name__} steps the free values of {involved[0]}."
        warn(f"{steps} {reason.fact}", reason.remedy)
    shaped = parameter_shaped_state(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for key in shaped & state.keys():
                value = state[key]
                if isinstance(value, Tensor) and value.shape != parameter.shape:
                    place = f"the {type(optimizer).__name__}"
                    raise TieError(
                        place,
                        f"{place} holds '{key}' of shape {tuple(value.shape)} for a parameter of "
                        f"shape {tuple(parameter.shape)}: its state was loaded by index, and "
                        f"tying {involved[0]} changed the order of the parameters.",
                        "Load the state into the dense model's optimizer first, then tie with "
                        "register_tie(..., optimizer=optimizer).",
                    )
