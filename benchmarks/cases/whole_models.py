"""Whole models, and stacks of layers in the shapes that people use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import tiedparam as tp
from benchmarks import models
from benchmarks.cases.enrolled import ANY_RULE, ANY_RULE_TRAINING, case, placed
from benchmarks.goals import Goal
from benchmarks.measuring import Run

_STAGE_GOALS = tuple(
    Goal(f"{rule}, training: ≤ 1.03 × dense", "ratio", 1.03, "training", f", {rule}", 32)
    for rule in ("flip_sym", "squared_copy")
)


@case(
    "resnet_stage",
    "A ResNet-18 stage of two basic blocks, every rule on all its convolutions",
    (*_STAGE_GOALS, *ANY_RULE_TRAINING),
)
def resnet_stage(run: Run) -> None:
    for channels, size in [(16, 8)] if run.quick else [(64, 28), (128, 14)]:
        for rule in tp.available_rules():
            found = models.model_contenders(placed(run, models.resnet_stage(channels)), rule)
            if found is not None:
                batch = 4 if run.quick else 32
                run.compare(f"{channels} channels on {size}², {rule}", found,
                            torch.randn(batch, channels, size, size),
                            modes=("training",), tolerance=1e-6,
                    in_double=True)  # fmt: skip


@case(
    "models",
    "Whole models, training step: ResNet-18 on 32² and two Transformer encoder blocks",
    ANY_RULE_TRAINING,
)
def whole_models(run: Run) -> None:
    width, size, batch, length = (8, 8, 4, 8) if run.quick else (64, 32, 32, 64)
    d = 32 if run.quick else 512
    for rule in tp.available_rules():
        for name, model, x in (
            (f"ResNet-18 on {size}²", models.resnet18(width), torch.randn(batch, 3, size, size)),
            (f"Transformer, d={d}", models.transformer(d), torch.randn(batch, length, d)),
        ):
            found = models.model_contenders(placed(run, model), rule)
            if found is not None:
                run.compare(
                    f"{name}, {rule}", found, x, modes=("training",), tolerance=1e-6, in_double=True
                )


@case(
    "shapes",
    "Stacks of layers in the shapes people use, every rule on all layers that can carry it",
    ANY_RULE,
)
def shapes_in_use(run: Run) -> None:
    width = 16 if run.quick else 512
    stacks: list[tuple[str, Callable[[], Any], tuple[int, ...]]] = [
        (f"Transformer MLP, {width} to {4 * width}", lambda: models.mlp(width), (64, width)),
        (f"audio stack, {width // 2} channels", lambda: models.audio_stack(width // 2), (1, 1024)),
        (f"ResNet-50 block, {width // 2} channels on 14²",
         lambda: models.bottleneck(width // 2), (width // 2, 14, 14)),
    ]  # fmt: skip
    for shapes, build, sizes in stacks:
        for rule in tp.available_rules():
            found = models.model_contenders(placed(run, build()), rule)
            if found is None:
                continue
            for batch in (2,) if run.quick else (1, 32):
                run.compare(f"{shapes}, {rule}", found, torch.randn(batch, *sizes),
                            tolerance=1e-6, in_double=True)  # fmt: skip
