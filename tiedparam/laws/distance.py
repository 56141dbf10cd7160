"""How far two tensors are from each other, at whatever scale their numbers have."""

from __future__ import annotations

import torch
from torch import Tensor


def halved_difference(left: Tensor, right: Tensor) -> Tensor:
    """``(left − right) / 2``, which cannot overflow; 0 where they are equal infinities."""
    return torch.where(left == right, 0, left / 2 - right / 2)


def relative_distance(weight: Tensor, lawful: Tensor) -> float:
    """``‖weight − lawful‖ / ‖weight‖`` in float32 or wider; 0 if they are equal."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    values, lawful = weight.to(wide), lawful.to(wide)
    distance = torch.linalg.vector_norm(values - lawful)
    norm = torch.linalg.vector_norm(values)
    if not (1e-15 < norm < 1e15 and distance.isfinite()):  # squares may have left the range
        scale = torch.maximum(values.abs().amax(), lawful.abs().amax())
        if not (scale.isfinite() and scale > 0):
            scale = torch.ones_like(scale)
        # halves: the difference of large values cannot overflow
        distance = torch.linalg.vector_norm(halved_difference(values, lawful) / scale)
        norm = torch.linalg.vector_norm(values / 2 / scale)
    return float(distance / norm) if distance else 0.0
