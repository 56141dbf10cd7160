"""The list of parametrizations of a tied tensor: the rule, and what is stacked on it.

What cannot compute on top of a tie is refused, not registered.

torch's ``weight_norm`` and ``orthogonal`` register themselves unchecked, on the ground that
they may choose what is stored. On a tie, which stores its free values, they would leave a
layer that raises at every use.

The list also holds the free values, whose marks for the optimizer guard it hands on when they
are copied, or replaced by ``load_state_dict(assign=True)``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.state import optimizer_guard as _optimizer_guard
from tiedparam.util.errors import TieError
from tiedparam.util.torch_private import through


class TiedList(parametrize.ParametrizationList):
    """The parametrizations of a tied tensor: the rule, and what is stacked on it."""

    def append(self, module: nn.Module) -> TiedList:
        """Stack a parametrization on the tie.

        Raises:
            TieError: if it cannot compute a tensor of the same shape and dtype from the tied
                one. Nothing was changed then.
        """
        name = type(module).__name__.removeprefix("_")
        remedy = "Call remove_tie first, or stack one that computes from the finished tensor."
        training = module.training
        with torch.no_grad():
            tied = self()
            try:
                result = module.eval()(tied)
            except Exception as error:
                raise TieError(
                    f"cannot stack {name} on the tie '{self[0]}': computing from the tied tensor "
                    f"it raised {type(error).__name__}: {error}. {remedy}"
                ) from error
            finally:
                module.train(training)
        if (
            not isinstance(result, Tensor)
            or result.shape != tied.shape
            or result.dtype != tied.dtype
        ):
            raise TieError(
                f"cannot stack {name} on the tie '{self[0]}': it returns another shape or dtype "
                f"than the tied tensor's. {remedy}"
            )
        super().append(module)
        return self

    def forward(self) -> Tensor:
        """What torch's own gives, without looking for each number as an attribute."""
        originals = self._parameters.values()
        if len(originals) != self.ntensors or self.is_tensor:
            return super().forward()  # a replica of nn.DataParallel, say
        return through(self, *originals)  # type: ignore[arg-type]

    @property
    def original(self) -> TiedList:  # type: ignore[override]
        """All free values as one thing, which PEFT's ``target_parameters`` thaws and freezes."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TiedList:
        replica: TiedList = type(self).__new__(type(self))
        memo[id(self)] = replica
        replica.__dict__.update(copy.deepcopy(self.__dict__, memo))
        _optimizer_guard.carry_marks(self._parameters, replica._parameters)
        return replica

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        before = self._parameters.copy()
        super()._load_from_state_dict(*args, **kwargs)
        _optimizer_guard.carry_marks(before, self._parameters)

    def _get_name(self) -> str:
        return "ParametrizationList"  # repr: to a reader it is torch's


def watch(parametrizations: parametrize.ParametrizationList) -> None:
    """Check what is stacked on these parametrizations from now on."""
    parametrizations.__class__ = TiedList
