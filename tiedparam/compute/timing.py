"""Times of functions beside each other, on the device where they run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

ROUNDS = 9
_AT_LEAST = 1e-3  # seconds per round and function, far above the clock's grain
_ALTOGETHER = 0.5  # seconds for all rounds of one function, unless a single call takes longer


@dataclass(frozen=True)
class Time:
    """How long a function takes.

    Attributes:
        seconds: the median over the rounds.
        spread: half of the distance between the quartiles.
    """

    seconds: float
    spread: float


def times_of(
    functions: Mapping[str, Callable[[], object]], device: torch.device
) -> dict[str, Time]:
    """The times of functions, measured in turns so that a disturbance meets all of them alike.

    Args:
        functions: by name.
        device: where they run; work that a CUDA device has queued is waited for.
    """
    counts = {name: _calls_per_round(function, device) for name, function in functions.items()}
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            found[name].append(_seconds(function, counts[name], device))
    return {name: _summarized(seconds) for name, seconds in found.items()}


def _calls_per_round(function: Callable[[], object], device: torch.device) -> int:
    _seconds(function, 1, device)  # the first call makes tables and fills caches
    once = max(_seconds(function, 1, device), 1e-7)
    wanted = _AT_LEAST / once
    return max(1, round(min(wanted, _ALTOGETHER / ROUNDS / once)))


def _seconds(function: Callable[[], object], calls: int, device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _wait_for(device)
    return (time.perf_counter() - start) / calls


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summarized(seconds: list[float]) -> Time:
    low, middle, high = statistics.quantiles(seconds, n=4)
    return Time(middle, (high - low) / 2)
