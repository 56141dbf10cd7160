"""Goals for whole stages of a ResNet, in training: an example of how a module here looks."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks import models
from benchmarks.goals import Goal
from benchmarks.measuring import Run

_RULES = ("flip_sym", "squared_copy")

GOALS = tuple(
    Goal(f"{rule}, {channels} channels: ≤ 1.02 × dense", "ratio", 1.02, "training",
         f"{channels} channels on {size}², {rule}", row="resnet")
    for rule in _RULES for channels, size in ((64, 28), (128, 14))
)  # fmt: skip


def measure(run: Run) -> None:
    """Two basic blocks of one width, the rule on all their convolutions."""
    longer = dataclasses.replace(run.setting, seconds=4 * run.setting.seconds)  # for 2 percent
    for channels, size in [(16, 8)] if run.quick else [(64, 28), (128, 14)]:
        for rule in _RULES:
            found = models.model_contenders(models.resnet_stage(channels).to(run.device), rule)
            assert found is not None
            batch = 4 if run.quick else 32
            run.compare(f"{channels} channels on {size}², {rule}", found,
                        torch.randn(batch, channels, size, size),
                        modes=("training",), tolerance=1e-6, in_double=True,
                        setting=longer)  # fmt: skip
