"""Goals for streams with one filter each: convolutions of separate channels that share a kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import goal_cases
from benchmarks.measuring import Contender, Run

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d}
_SHAPES = (
    # samples, channels, sizes, kernel
    (8, 128, (4096,), 3), (32, 256, (1024,), 3),
    (8, 128, (4096,), 7), (32, 256, (1024,), 7),
    (8, 64, (4096,), 25), (8, 256, (1024,), 25),
    (8, 64, (56, 56), 3), (8, 64, (56, 56), 7), (4, 64, (28, 28), 25),
)  # fmt: skip
_BOUNDS = {3: (0.97, 0.97), 7: (0.97, 1.2), 25: (3.0, 1.0)}

_TRIED = (
    "bands, windows and shifted sums lose to torch's own kernel, which the dense form takes; what "
    "is left is the call, some 50 to 100 µs while the output has emptied the caches"
)

GOALS = tuple(
    goal
    for kernel, bounds in _BOUNDS.items()
    for axes in (1, 2)
    for goal in goal_cases.both_modes(
        "streams", f"{axes}-d, kernel {kernel}", bounds, shapes=f"{axes}-d, kernel {kernel},",
        floor="padded by hand", tried=_TRIED,
    )
)  # fmt: skip


def measure(run: Run) -> None:
    """Against the dense layer, and torch's convolution of an input that was padded beforehand."""
    for n, channels, sizes, kernel in _SHAPES[2:3] if run.quick else _SHAPES:
        if run.quick:
            n, sizes = 1, (64,)
        layer = _CONVOLUTIONS[len(sizes)](
            channels, channels, kernel, padding=kernel // 2, groups=channels
        ).to(run.device)
        found = goal_cases.against_dense(layer, "channel_shared", over="groups")
        found.append(_padded(found[0], kernel // 2))
        shown = "×".join(map(str, sizes))
        run.compare(f"{len(sizes)}-d, kernel {kernel}, {channels} channels of {shown}", found,
                    torch.randn(n, channels, *sizes))  # fmt: skip


def _padded(dense: Contender, padding: int) -> Contender:
    """What is left of the dense layer if its kernel gets no padding to do."""
    layer: Any = dense.forward
    convolve = (F.conv1d, F.conv2d)[layer.weight.dim() - 3]
    around = [padding] * 2 * (layer.weight.dim() - 2)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = convolve(F.pad(x, around), layer.weight, layer.bias, groups=layer.groups)
        return y

    return Contender("padded by hand", forward, dense.weights, dense.others, dense.expand)
