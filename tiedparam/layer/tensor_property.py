"""What ``layer.weight`` gives and takes while it is tied.

The readers differ. The layer's own forward computes with the plain tensor; torch's tools get what
serves them; everybody else gets the tensor guarded against writes, which would be lost.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from tiedparam.compute.forms import torchs_own
from tiedparam.compute.kept import recall
from tiedparam.laws.layout import declared_shape
from tiedparam.layer.values import assign_
from tiedparam.tie import torch_callers
from tiedparam.tie.adapters import PEFT
from tiedparam.tie.interposed import refuse_absent
from tiedparam.tie.lookup import find_tie, is_tied
from tiedparam.tie.reading import ResizedSourceError
from tiedparam.tie.sources import overlooking_sources, refuse_separate_source
from tiedparam.tie.write_guard import guard
from tiedparam.util.callers import caller
from tiedparam.util.errors import TieError, describe
from tiedparam.util.never_compiled import never_compiled
from tiedparam.util.parametrized import parametrization_list
from tiedparam.util.sharded import is_sharded
from tiedparam.util.torch_modes import is_traced_or_transformed
from tiedparam.util.torch_private import (
    effective,
    is_parametrized,
    parameters_of,
)

inside: threading.local = threading.local()
""".call: the layer whose forward this thread runs, and its arguments."""


def tensor_property(name: str, stock: type[nn.Module]) -> property:
    """The property of a tied tensor, for the class of tied layers of a stock class."""
    # torch's own methods never write into their weight; others might, in place
    torchs = torchs_own(stock)

    def read(self: nn.Module) -> Tensor:
        if not is_parametrized(self, name):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        traced = is_traced_or_transformed()
        call = None if torch.compiler.is_compiling() else _own_call(self)
        own_forward = not traced and call is not None
        weight = None if traced else recall(self, name, own_forward=own_forward)
        try:
            if weight is None:
                weight = effective(self, name)
        except TieError as error:
            if torch.compiler.is_compiling():
                raise
            weight = _despite(error, self, name, caller(), computing=traced or own_forward)
        except AttributeError as error:
            # Module.__getattr__ would turn it into "no attribute 'weight'" (S26)
            where = describe(self, name)
            fact = f"computing the tied {where} raised AttributeError: {error}"
            raise TieError(where, fact, "") from error
        if call is not None and weight.is_meta:
            refuse_absent(self, name, call)
        if type(weight) is not Tensor and not traced and is_sharded(weight):
            return _sharded_weight(self, name, weight, own_forward)
        if traced or (own_forward and torchs is not None and torchs.computes_layer(self, stock)):
            return weight
        if not is_tied(self, name):
            return weight
        handed_on = own_forward and torchs is not None and torchs.hands_on(self)
        return _for_others(weight, self, name, caller(), handed_on=handed_on)

    def write(self: nn.Module, value: Tensor) -> None:
        set_tensor(self, name, value, caller())

    return property(read, write)


def _own_call(layer: nn.Module) -> tuple[Any, ...] | None:
    """The arguments of the layer's own forward, if this thread runs it."""
    call = getattr(inside, "call", None)
    return call[1:] if call is not None and call[0] is layer else None


def _for_others(
    weight: Tensor, layer: nn.Module, name: str, reader: FrameType, *, handed_on: bool
) -> Tensor:
    """The weight for a reader that is not torch's forward of this very layer."""
    if torch_callers.is_stock_forward(reader) and not handed_on:
        if weight.is_meta:
            refuse_absent(layer, name, reader.f_locals.values())
        return weight
    torch_callers.refuse_old_reparametrization(layer, name, reader)
    if PEFT in sys.modules:  # it reads a weight that it is about to adapt
        from tiedparam.tie.merges import watch_merges

        watch_merges()
    return guard(weight, layer, name)


@never_compiled  # torch 2.8 cannot trace the error that goes on
def _despite(
    error: TieError, layer: nn.Module, name: str, reader: FrameType, *, computing: bool
) -> Tensor:
    """A copy's weight where its source has changed, if this reader may have it."""
    tie = find_tie(layer, name)
    resized = isinstance(error, ResizedSourceError)
    if (
        tie is None
        or tie.record.reading is None
        or not (resized or torch_callers.is_removal(reader))
    ):
        raise error
    with overlooking_sources(tie.values):
        weight = tie.weight()
    if resized and tuple(weight.shape) == declared_shape(layer, name):  # both ends were: it goes on
        tie.record.own_reading().renew(tie.record.law, layer, name, weight)
    elif computing or torch_callers.is_stock_forward(reader):
        raise error
    return weight


def _sharded_weight(layer: nn.Module, name: str, weight: Tensor, inside: bool) -> Tensor:
    """A weight under ``fully_shard`` is a DTensor, whose class the write guard cannot take."""
    tie = find_tie(layer, name)
    if tie is not None and tie.rule.reads_layers and tie.record.split is None:
        own = [parameter for parameter in parameters_of(layer).values() if parameter is not None]
        if inside or not all(is_sharded(parameter) for parameter in own):
            refuse_separate_source(tie)
    return weight


def set_tensor(layer: nn.Module, name: str, value: Tensor, writer: FrameType) -> None:
    """``layer.weight = value`` for a parametrized tensor."""
    if is_tied(layer, name):
        torch_callers.refuse_functional_call(layer, name, writer)
        assign_(layer, value, name)
    else:
        parametrization_list(layer, name).right_inverse(value)
