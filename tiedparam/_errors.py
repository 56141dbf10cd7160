"""What tiedparam raises and warns, and how a message names the place it speaks of."""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import Any

import torch
from torch import nn


class TieError(RuntimeError):
    """A tie cannot be made or kept.

    The message names the layer, the fact and the next step, and nothing was changed when
    it is raised. It is a ``RuntimeError``, as torch's own refusals are, so code that
    already handles those handles this one.
    """


class TieWarning(UserWarning):
    """Values were changed as asked, by more than rounding: a loaded weight was projected."""


def warn(message: str) -> None:
    """Give a `TieWarning` at the line that called the library, whatever decorators lie between."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _package(frame) in ("tiedparam", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, TieWarning, stacklevel=level)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def describe_layer(layer: nn.Module) -> str:
    """One line for one layer: ``Conv2d(3, 3, kernel_size=(3, 3), …)``, never its children."""
    kind = type(layer).__name__.removeprefix("FSDP").removeprefix("Tied")
    return f"{kind}({extra_repr(layer)})"


def extra_repr(layer: nn.Module) -> str:
    """What a layer says of itself, without computing the tensors that it asks itself for.

    A Linear asks whether it has a bias. A bias that cannot be computed now is often what the
    message is about.
    """
    lists = layer._modules.get("parametrizations")
    if lists is None:
        return layer.extra_repr()
    names = list(lists._modules)
    stock = next(
        kind
        for kind in type(layer).__mro__
        if issubclass(kind, nn.Module)  # fully_shard mixes in a class that is none
        and not any(isinstance(getattr(kind, name, None), property) for name in names)
    )
    stand_in: Any = object.__new__(stock)
    stand_in.__dict__.update(layer.__dict__, _parameters={**layer._parameters}, _modules={})
    stand_in._parameters.update(dict.fromkeys(names, torch.empty(0)))
    text: str = stand_in.extra_repr()
    return text


def visible(text: str, keep: str = "") -> str:
    """Control characters as escapes: names from files must not steer the reader's terminal."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def describe(layer: nn.Module, tensor_name: str, root: nn.Module | None = None) -> str:
    """Name a tensor: ``'encoder.conv2.weight'`` where the root is known, else by its layer."""
    if root is not None:
        for path, module in root.named_modules():
            if module is layer:
                return f"'{path}.{tensor_name}'" if path else f"'{tensor_name}'"
    return f"'{tensor_name}' of {describe_layer(layer)}"
