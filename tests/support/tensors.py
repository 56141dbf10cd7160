"""What a layer is given, and what it stores."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def stored(layer: nn.Module, tensor_name: str = "weight") -> int:
    return sum(p.numel() for p in layer.parametrizations[tensor_name].parameters())


def with_weight(layer: nn.Module, weight: list | Tensor, tensor_name: str = "weight") -> nn.Module:
    with torch.no_grad():
        getattr(layer, tensor_name).copy_(torch.as_tensor(weight))
    return layer


def free_value(layer: nn.Module, tensor_name: str = "weight") -> nn.Parameter:
    (free,) = layer.parametrizations[tensor_name].parameters()
    return free


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8).tolist())
