"""Whole models in plain torch, and a rule put on every layer that can carry it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiedparam as tp
from benchmarks.contenders import AveragedConv, HiddenListConv
from benchmarks.measuring import Contender

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Linear)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip connection (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve twice, and add the input."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet_stage(channels: int) -> nn.Sequential:
    """Two blocks of one width."""
    return nn.Sequential(BasicBlock(channels, channels), BasicBlock(channels, channels))


def resnet18(width: int = 64) -> nn.Sequential:
    """ResNet-18 without the ImageNet stem: 3x3 first, as for small pictures."""
    stages: list[nn.Module] = [
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        stages.append(BasicBlock(inputs, outputs, 1 if stage == 0 else 2))
        stages.append(BasicBlock(outputs, outputs))
        inputs = outputs
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def transformer(width: int = 512, blocks: int = 2) -> nn.Sequential:
    """Encoder blocks; two, so that the second can copy the first."""
    return nn.Sequential(
        *(
            nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True)
            for _ in range(blocks)
        )
    )


def mlp(width: int) -> nn.Sequential:
    """The feed-forward part of a Transformer block, with the square projection before it."""
    return nn.Sequential(
        nn.Linear(width, width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
    )


def audio_stack(width: int) -> nn.Sequential:
    """Strided convolutions over a waveform, as speech encoders begin."""
    layers: list[nn.Module] = [nn.Conv1d(1, width, 10, stride=5, bias=False), nn.GELU()]
    for kernel in (3, 3, 2):
        layers += [nn.Conv1d(width, width, kernel, stride=2, bias=False), nn.GELU()]
    return nn.Sequential(*layers)


def bottleneck(width: int) -> nn.Sequential:
    """ResNet-50's block without its skip connection: 1×1, 3×3, 1×1."""
    inner = width // 4
    return nn.Sequential(
        nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
        nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
        nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width),
    )  # fmt: skip


def variants(rule: str, layer: nn.Module) -> list[dict[str, Any]]:
    """The options worth trying on a layer's weight; a rule of copies also has a ``source``."""
    kind = tp.available_rules()[rule]
    layout = tp.Layout.of(layer, "weight", tuple(layer.weight.shape))
    source = {"source": None} if "source" in inspect.signature(kind).parameters else {}
    return [{**options, **source} for options in kind.variants(layout)]


def label(rule: str, options: dict[str, Any]) -> str:
    """``channel_shared(over='in')``."""
    values = {k: getattr(v, "__name__", v) for k, v in options.items() if k != "source"}
    shown = ", ".join(f"{k}={v!r}" for k, v in values.items())
    return f"{rule}({shown})" if shown else rule


def tie_pair(layer: nn.Module, rule: str, options: dict[str, Any]) -> nn.ModuleDict | None:
    """A copy of the layer as ``"tied"``, with its ``"source"`` if it has one; None if refused."""
    pair = nn.ModuleDict({"tied": deepcopy(layer)})
    if "source" in options:
        pair["source"] = deepcopy(layer)
        options = {**options, "source": pair["source"]}
    return pair if _tied(pair["tied"], rule, options) else None


def _tied(layer: nn.Module, rule: str, options: dict[str, Any]) -> bool:
    """Tie a fresh layer, unless the rule does not fit or frees nothing, which shows nothing."""
    init = "project" if "source" in options else "rescale"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", tp.TieWarning)
            tp.register_tie(layer, rule, init=init, **options)
    except (tp.TieError, tp.TieWarning):
        return False
    return True


def tie_everywhere(model: nn.Module, rule: str) -> int:
    """Tie every convolution and Linear that can carry the rule; how many were tied.

    A rule that reads another layer ties every second layer of one shape to the one before.
    """
    layers = [m for m in model.modules() if isinstance(m, _KINDS)]
    waiting: dict[tuple[Any, ...], nn.Module] = {}
    count = 0
    for layer in layers:
        chosen = next(iter(variants(rule, layer)), None)
        if chosen is None:
            continue
        if "source" in chosen:
            key = (type(layer), tuple(layer.weight.shape))
            source = waiting.pop(key, None)
            if source is None:
                waiting[key] = layer
                continue
            chosen["source"] = source
        elif isinstance(layer, nn.Linear) and layer.out_features <= 10:
            continue  # a classifier whose outputs are all equal would learn nothing
        count += _tied(layer, rule, chosen)
    return count


def untied(model: nn.Module) -> nn.Module:
    """A copy of the model with plain dense layers and the same weights."""
    model = deepcopy(model)
    for module in model.modules():
        if isinstance(module, _KINDS) and tp.is_tied(module):
            tp.remove_tie(module)
    return model


def contender(name: str, model: nn.Module) -> Contender:
    """A whole model: its output and its input's gradient are compared."""
    return Contender(name, model, (), tuple(model.parameters()))


def model_contenders(model: nn.Module, rule: str) -> list[Contender] | None:
    """The dense model, the tied one, and the users' own where the stories have one."""
    if tie_everywhere(model, rule) == 0:
        return None
    plain = untied(model)
    found = [contender("dense", plain), contender("tiedparam", model)]
    if any(isinstance(module, BasicBlock) for module in model.modules()):
        if rule == "flip_sym":
            found.append(contender("users' averaging", _with_averaging(plain, model)))
        if rule == "squared_copy":
            found.append(contender("users' hidden list", _with_hidden_lists(plain, model)))
    return found


def _with_averaging(plain: nn.Module, tied: nn.Module) -> nn.Module:
    own = deepcopy(plain)
    for mine, theirs in _blocks(own, tied):
        for name in ("conv1", "conv2"):
            if tp.is_tied(getattr(theirs, name)):
                setattr(mine, name, AveragedConv(getattr(mine, name)))
    return own


def _with_hidden_lists(plain: nn.Module, tied: nn.Module) -> nn.Module:
    own = deepcopy(plain)
    names = {module: name for name, module in tied.named_modules()}
    for name, module in list(tied.named_modules()):
        if isinstance(module, nn.Conv2d) and tp.is_tied(module):
            ((source, _),) = tp.get_tie(module).sources()
            parent, _, child = name.rpartition(".")
            conv = own.get_submodule(name)
            replaced = HiddenListConv(conv, own.get_submodule(names[source]))
            setattr(own.get_submodule(parent), child, replaced)
    return own


def _blocks(*models: nn.Module) -> Iterator[tuple[BasicBlock, ...]]:
    lists = [[m for m in model.modules() if isinstance(m, BasicBlock)] for model in models]
    yield from zip(*lists, strict=True)


def tokens(batch: int, length: int, width: int = 512) -> Tensor:
    """Input for `transformer`."""
    return torch.randn(batch, length, width)
