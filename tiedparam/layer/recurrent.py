"""LSTM, GRU and RNN with tied weights: their list of weights is computed, not kept (S14).

A stock recurrent layer keeps its weights a second time, in the list ``_flat_weights`` that
its kernels take. Of a tied layer that list would hold computed tensors of an earlier forward,
which cannot be deep-copied, or the dense Parameter that the tie replaced. So the class of tied
layers computes the list at every forward, and the layer's own keeps nothing.

The cells (``LSTMCell``, ...) read their weights as attributes and need none of this.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tiedparam.util.torch_private import flat_weight_names, forget_flat_weights

_running = threading.local()  # .weights: of the layer whose forward this thread is running


def computation(stock: type[nn.Module]) -> Callable[..., Any] | None:
    """The forward of tied layers of a recurrent class, or None for every other class."""
    if not issubclass(stock, nn.RNNBase):
        return None

    def forward(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return stock.forward(layer, *args, **kwargs)
        outer = getattr(_running, "weights", None)
        _running.weights = (layer, _weights(layer))  # the stock forward asks several times
        try:
            return stock.forward(layer, *args, **kwargs)
        finally:
            _running.weights = outer

    return forward


def members(stock: type[nn.Module]) -> dict[str, Any]:
    """What the class of tied layers overrides for a recurrent stock class."""
    if not issubclass(stock, nn.RNNBase):
        return {}
    return {
        "_flat_weights": property(_flat_weights, lambda layer, value: None),
        "_init_flat_weights": clear_flat_weights,
        "_update_flat_weights": lambda layer: None,
        "flatten_parameters": lambda layer: None,
        "__setstate__": _set_state,
    }


def clear_flat_weights(layer: Any) -> None:
    """Let go of the kept weights, so that the stock class collects them at its next forward.

    Does nothing to layers that are not recurrent.
    """
    if isinstance(layer, nn.RNNBase):
        forget_flat_weights(layer)


def _flat_weights(layer: Any) -> list[Tensor | None]:
    running, weights = getattr(_running, "weights", None) or (None, [])
    return weights if running is layer else _weights(layer)


def _weights(layer: Any) -> list[Tensor | None]:
    return [getattr(layer, name, None) for name in flat_weight_names(layer)]


def _set_state(layer: Any, state: dict[str, Any]) -> None:
    # not RNNBase's, which would compute the weights while a copy's source is not there yet
    nn.Module.__setstate__(layer, state)
    clear_flat_weights(layer)
