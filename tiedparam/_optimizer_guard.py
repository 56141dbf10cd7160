"""No optimizer steps on a parameter that a tie has replaced, or with foreign state (S17–S19).

A tie makes fresh Parameters. An optimizer built before goes on holding the old one and
would never train the layer, in silence. One hook on torch's optimizers, installed with the
first tie, raises before such a step writes anything, fused steps included.

State that ``optimizer.load_state_dict`` assigned by index can land on the wrong parameter
(S19), and fused kernels would read it out of bounds (S17): where a free value is involved,
shapes are compared before the first step that follows.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from tiedparam._errors import TieError
from tiedparam._optimizer import PARAMETER_SHAPED

_retired: Any = WeakIdKeyDictionary()  # replaced parameter → why no optimizer may hold it
_free: Any = WeakIdKeyDictionary()  # free value → name of its tensor
_checked_state: weakref.WeakKeyDictionary[Optimizer, Any] = weakref.WeakKeyDictionary()
_installed = False


def retire(parameters: list[nn.Parameter], where: str, remedy: str) -> None:
    """From now on, stepping an optimizer that holds one of these raises."""
    _install()
    for parameter in parameters:
        _free.pop(parameter, None)
        _retired[parameter] = f"{where}, which was replaced. {remedy}"


def watch_free_values(parameters: list[nn.Parameter], where: str) -> None:
    """Compare loaded optimizer state with these parameters' shapes before a step uses it."""
    _install()
    for parameter in parameters:
        _free[parameter] = where


def _install() -> None:
    global _installed
    if not _installed:
        register_optimizer_step_pre_hook(_before_step)
        _installed = True


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if len(_retired):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in _retired:
                    raise TieError(
                        f"the {type(optimizer).__name__} still holds {_retired[parameter]}"
                    )
    if len(_free) and _checked_state.get(optimizer) is not optimizer.state:
        _check_state(optimizer)
        _checked_state[optimizer] = optimizer.state


def _check_state(optimizer: Optimizer) -> None:
    involved = [_free[p] for group in optimizer.param_groups for p in group["params"] if p in _free]
    if not involved:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for key in PARAMETER_SHAPED & state.keys():
                value = state[key]
                if isinstance(value, Tensor) and value.shape != parameter.shape:
                    raise TieError(
                        f"the {type(optimizer).__name__} holds '{key}' of shape "
                        f"{tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}: "
                        f"its state was loaded by index, and tying {involved[0]} changed the "
                        "order of the parameters. Load the state into the dense model's "
                        "optimizer first, then tie with register_tie(..., optimizer=optimizer)."
                    )
