"""The ways to compute a layer whose weight obeys a law: ours, the users' own, the optimum.

Each function takes a dense stock layer whose weight is lawful already, and makes contenders
that hold copies of its values. The first one is the dense layer itself.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import tiedparam as tp
from benchmarks.measuring import Contender

HAND_WRITTEN = "hand-written"
PLAIN = "plain parametrization"


def lawful(layer: Any, rule: str, **options: Any) -> Any:
    """The layer with the weight that the rule makes of it, dense again."""
    return tp.remove_tie(tp.register_tie(layer, rule, init="rescale", **options))


def dense(layer: Any) -> Contender:
    """The stock layer."""
    return Contender("dense", layer, (layer.weight,), _bias(layer), lambda: layer.weight)


def tied(layer: Any, rule: str, name: str = "tiedparam", **options: Any) -> Contender:
    """The stock layer, tied."""
    return parametrized(tp.register_tie(deepcopy(layer), rule, **options), name)


def parametrized(layer: Any, name: str = "tiedparam") -> Contender:
    """A layer that has a parametrized weight with values of its own."""
    expansion = layer.parametrizations["weight"]
    return Contender(name, layer, tuple(expansion.parameters()), _bias(layer), expansion)


def identity(layer: Any) -> Contender:
    """The least that a parametrization costs."""
    layer = deepcopy(layer)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return parametrized(layer, "identity parametrization")


class Expanding(nn.Module):
    """A user's parametrization: expand what is shared along one axis."""

    def __init__(self, axis: int, copies: int) -> None:
        super().__init__()
        self.axis, self.copies = axis, copies

    def forward(self, free: Tensor) -> Tensor:
        """A view with stride 0."""
        shape = list(free.shape)
        shape[self.axis] = self.copies
        return free.expand(shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The first of the copies."""
        return weight.narrow(self.axis, 0, 1).clone()


class Repeating(nn.Module):
    """A user's parametrization for streams: repeat the bank for every group."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, bank: Tensor) -> Tensor:
        """A copy for every group."""
        return bank.repeat(self.groups, *(1,) * (bank.dim() - 1))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The first group's bank."""
        return weight[: len(weight) // self.groups].clone()


def plain(layer: Any, rule: nn.Module) -> Contender:
    """``register_parametrization`` as torch has it."""
    layer = deepcopy(layer)
    parametrize.register_parametrization(layer, "weight", rule)
    return parametrized(layer, PLAIN)


def channel_shared(layer: nn.Conv2d) -> list[Contender]:
    """One kernel for all input channels."""
    channels, padding = layer.in_channels, layer.padding
    w, b = _leaf(layer.weight[:, :1]), _leaf(layer.bias)

    def summed(x: Tensor) -> Tensor:
        return F.conv2d(x.sum(1, keepdim=True), w, b, padding=padding)

    def repeated(x: Tensor) -> Tensor:
        return F.conv2d(x, w.repeat(1, channels, 1, 1), b, padding=padding)

    def expand() -> Tensor:
        return w.expand(-1, channels, -1, -1)

    return [
        dense(layer),
        tied(layer, "channel_shared", over="in"),
        Contender(HAND_WRITTEN, summed, (w,), (b,), expand),
        plain(layer, Expanding(1, channels)),
        Contender("users' repeat", repeated, (w,), (b,), expand),
    ]


def row_repeat(layer: nn.Linear) -> list[Contender]:
    """One row for all outputs."""
    outputs = layer.out_features
    w, b = _leaf(layer.weight[0]), _leaf(layer.bias)

    def spread(x: Tensor) -> Tensor:
        return (x @ w)[:, None] + b

    def repeated(x: Tensor) -> Tensor:
        return F.linear(x, w.repeat(outputs, 1), b)

    def concatenated(x: Tensor) -> Tensor:
        return F.linear(x, torch.cat([w[None]] * outputs), b)

    def expand() -> Tensor:
        return w.expand(outputs, -1)

    return [
        dense(layer),
        tied(layer, "row_repeat"),
        Contender(HAND_WRITTEN, spread, (w,), (b,), expand),
        plain(layer, Expanding(0, outputs)),
        Contender("users' repeat", repeated, (w,), (b,), expand),
        Contender("users' cat", concatenated, (w,), (b,), expand),
    ]


def streams(layer: nn.Conv1d) -> list[Contender]:
    """One bank of filters for every channel, the channels kept apart."""
    channels, (padding,) = layer.groups, layer.padding
    filters = layer.out_channels // channels
    w, b = _leaf(layer.weight[:filters]), _leaf(layer.bias)

    def folded(x: Tensor) -> Tensor:
        n, _, length = x.shape
        y = F.conv1d(x.reshape(n * channels, 1, length), w, padding=padding)
        return y.reshape(n, channels * filters, -1) + b[:, None]

    def flat(x: Tensor) -> Tensor:
        y = F.conv2d(x.unsqueeze(1), w.unsqueeze(2), padding=(0, padding))
        return y.transpose(1, 2).reshape(len(x), channels * filters, -1) + b[:, None]

    def loop(x: Tensor) -> Tensor:
        parts = []
        for c in range(channels):
            bias = b[c * filters : (c + 1) * filters]
            parts.append(F.conv1d(x[:, c : c + 1], w, bias, padding=padding))
        return torch.cat(parts, 1)

    def expand() -> Tensor:
        return w.repeat(channels, 1, 1)

    return [
        dense(layer),
        tied(layer, "channel_shared", over="groups"),
        plain(layer, Repeating(channels)),
        *(
            Contender(name, forward, (w,), (b,), expand)
            for name, forward in (
                ("fold into batch", folded),
                ("users' reshape to 2-d", flat),
                ("users' loop and cat", loop),
            )
        ),
    ]


def averaged(weight: Tensor) -> Tensor:
    """The users' own flip_sym: average a full weight with its flip-transpose."""
    axes = tuple(range(2, weight.dim()))
    mirror = weight.transpose(0, 1)
    return (weight + (mirror.flip(axes) if axes else mirror)) / 2


class AveragedConv(nn.Module):
    """The users' own flip_sym layer: twice the parameters, averaged in every forward."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(conv.weight.detach().clone()), conv.bias
        self.padding = conv.padding

    def forward(self, x: Tensor) -> Tensor:
        """Average, then convolve."""
        return F.conv2d(x, averaged(self.weight), self.bias, padding=self.padding)


class HiddenListConv(nn.Module):
    """The users' own squared_copy layer: the other layer hidden from torch in a list."""

    def __init__(self, conv: nn.Conv2d, source: nn.Conv2d) -> None:
        super().__init__()
        self.source, self.bias, self.padding = [source], conv.bias, conv.padding

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the square of the source's weight."""
        return F.conv2d(x, self.source[0].weight ** 2, self.bias, padding=self.padding)


def expansion(name: str, make: Callable[[], Tensor], weights: tuple[Tensor, ...]) -> Contender:
    """The making of a weight alone; the input is not read, but must have a gradient."""
    return Contender(name, lambda x: make(), weights, (), make)


def dense_and_tied(root: nn.Module, path: str, tensor_name: str) -> list[Contender]:
    """The dense layer and the tied one, of a model in which one tensor is tied."""
    tied: Any = root.get_submodule(path)
    alone = nn.ModuleDict({"root": deepcopy(root)})
    dense: Any = tp.remove_tie(
        alone["root"].get_submodule(path) if path else alone["root"], tensor_name
    )
    expansion = tied.parametrizations[tensor_name]
    sources = [getattr(layer, name) for layer, name in tp.get_tie(tied, tensor_name).sources()]
    weights = (*expansion.parameters(), *sources)
    first = getattr(dense, tensor_name)
    return [
        Contender("dense", dense, (first,), _others(dense, tensor_name), lambda: first),
        Contender("tiedparam", tied, weights, _others(tied, tensor_name), expansion),
    ]


def _others(layer: nn.Module, tensor_name: str) -> tuple[Tensor, ...]:
    return tuple(p for name, p in layer.named_parameters(recurse=False) if name != tensor_name)


def _leaf(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.detach().clone().requires_grad_()


def _bias(layer: Any) -> tuple[Tensor, ...]:
    return () if layer.bias is None else (layer.bias,)
