"""Every rule: on its own examples, on common layers, and on layers that do next to nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import tiedparam as tp
from benchmarks import contenders as made
from benchmarks import models
from benchmarks.cases.enrolled import ANY_RULE, case, placed
from benchmarks.goals import Goal
from benchmarks.measuring import Contender, Run


@case(
    "small_layers",
    "What a tie adds to a call of a layer that does next to nothing",
    tuple(
        Goal(f"{mode}: at most 30 µs per call over dense", "microseconds", 30, mode)
        for mode in ("inference", "training")
    ),
)
def small_layers(run: Run) -> None:
    brief = dataclasses.replace(run.setting, seconds=min(2.0, run.setting.seconds))
    layers: list[tuple[str, Any, Tensor]] = [
        ("Linear(16, 16)", nn.Linear(16, 16), torch.randn(1, 16)),
        ("Conv2d(16, 16, 3) on 8²", nn.Conv2d(16, 16, 3, padding=1), torch.randn(1, 16, 8, 8)),
    ]
    for shapes, layer, x in layers:
        for label, found in _every_rule_on(placed(run, layer)):
            found.append(made.identity(found[0].forward))
            run.compare(f"{shapes}, {label}", found, x, setting=brief)


@case(
    "every_rule",
    "All available rules: their own examples, and two layers of common size, batch 32",
    ANY_RULE,
)
def every_rule(run: Run) -> None:
    brief = dataclasses.replace(run.setting, seconds=min(1.0, run.setting.seconds))
    longer = dataclasses.replace(run.setting, seconds=min(3.0, run.setting.seconds))
    for rule, kind in tp.available_rules().items():
        for example in kind.examples():
            found = _example_contenders(run, rule, example)
            if found is not None:
                label, contenders, x = found
                run.compare(label, contenders, x, setting=brief, rule=rule)
    size, features, batch = (8, 64, 4) if run.quick else (28, 1024, 32)
    channels = 8 if run.quick else 64
    layers: list[tuple[str, Any, Tensor]] = [
        (f"Conv2d({channels}, {channels}, 3) on {size}²",
         nn.Conv2d(channels, channels, 3, padding=1), torch.randn(batch, channels, size, size)),
        (f"Linear({features}, {features})", nn.Linear(features, features),
         torch.randn(batch, features)),
    ]  # fmt: skip
    for shapes, layer, x in layers:
        for label, contenders in _every_rule_on(placed(run, layer)):
            run.compare(
                f"{shapes}, {label}", contenders, x, setting=longer, rule=label.split("(")[0]
            )


def _every_rule_on(layer: Any) -> Iterator[tuple[str, list[Contender]]]:
    """Each law that the layer can carry, with the dense layer and the tied one."""
    for rule in tp.available_rules():
        for options in models.variants(rule, layer):
            pair = models.tie_pair(layer, rule, options)
            if pair is not None:
                yield models.label(rule, options), made.dense_and_tied(pair, "tied", "weight")


def _example_contenders(
    run: Run, rule: str, example: tp.Example
) -> tuple[str, list[Contender], Tensor] | None:
    model = placed(run, example.build())
    layer = model.get_submodule(example.path) if example.path else model
    shape = _input_shape(layer)
    if shape is None:
        return None
    tp.register_tie(layer, rule, example.tensor_name, root=model, **example.options)
    contenders = made.dense_and_tied(model, example.path, example.tensor_name)
    # the options are part of the name, so that no two examples share one
    options = models.label(rule, example.options)
    kind = type(layer).__mro__[1].__name__
    label = f"{kind} {tuple(contenders[0].weights[0].shape)}, {options}"
    return f"{label}, {example.tensor_name}", contenders, torch.randn(shape)


def _input_shape(layer: Any) -> tuple[int, ...] | None:
    """A small input that the layer takes; None for layers that take no floats."""
    if hasattr(layer, "in_features"):
        return (2, layer.in_features)
    if hasattr(layer, "in_channels"):
        return (2, layer.in_channels, *(8,) * len(layer.kernel_size))
    return None
