"""Tensors that an old-style hook computes before each forward of their layer (S45).

``torch.nn.utils.weight_norm``, ``spectral_norm`` and ``prune`` take the Parameter away and
leave a plain attribute, which a forward pre-hook writes anew. Whoever reads it at another time
gets the values, and the graph, of the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from tiedparam.util.errors import Reason, describe_layer
from tiedparam.util.torch_private import forward_pre_hooks_of, is_managed_by_fsdp


def why_computed(layer: nn.Module, tensor_name: str) -> Reason | None:
    """Why the tensor cannot be read at any time, or None if it can."""
    # by the table: this runs at every read of a copy
    if tensor_name not in layer.__dict__ or not isinstance(layer.__dict__[tensor_name], Tensor):
        return None
    hooks = [type(hook).__name__ for hook in _hooks(layer, tensor_name)]
    if not hooks and is_managed_by_fsdp(layer):
        return None  # FSDP1 shows its parts as attributes while a unit computes
    by = f"by {hooks[0]} " if hooks else ""
    return Reason(
        f"the source's '{tensor_name}' in {describe_layer(layer)} is computed {by}before each "
        "forward of that layer (the old weight_norm, spectral_norm, prune), and would be that of "
        "the last one.",
        "Use torch.nn.utils.parametrizations.weight_norm or spectral_norm there, or "
        "make it a Parameter again (prune.remove, remove_weight_norm, remove_spectral_norm).",
    )


def recompute(layer: nn.Module, tensor_name: str) -> None:
    """Let the hooks write the tensor from what is stored now."""
    training, layer.training = layer.training, False  # spectral_norm moves its vectors in training
    try:
        for hook in _hooks(layer, tensor_name):
            hook(layer, ())
    finally:
        layer.training = training


def _hooks(layer: nn.Module, tensor_name: str) -> Iterator[Callable[..., Any]]:
    for hook in forward_pre_hooks_of(layer).values():
        # what torch's three tools call it
        if tensor_name in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            yield hook
