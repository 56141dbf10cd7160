"""What a report predicts that a tie gains over an untied layer, against what it gains."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import tiedparam as tp
from benchmarks import contenders as made
from benchmarks import models
from benchmarks.cases.enrolled import case, placed
from benchmarks.measuring import Run, rounded

_Laws = tuple[tuple[str, dict[str, Any]], ...]
_Layer = tuple[str, Callable[[], Any], tuple[int, ...], _Laws]

_LINEAR: _Laws = (
    ("row_repeat", {}),
    ("head_share", {"heads": 16, "groups": 4}),
    ("repeat", {"outputs": 2}),
    ("circulant", {}),
    ("toeplitz", {}),
    ("block_circulant", {"block": 64}),
    ("symmetric", {}),
    ("persymmetric", {}),
    ("centrosymmetric", {}),
    ("hypercomplex", {"algebra": "complex"}),
    ("set_equivariant", {"items": 64}),
    ("masked", {"pattern": "block_diagonal", "blocks": 8}),
    ("masked", {"pattern": "lower"}),
    ("hashed", {"n": 1024}),
    ("joint", {"laws": ["symmetric", ("repeat", {"outputs": 2})]}),
    ("within", {"inner": "symmetric", "rows": slice(0, 64), "columns": slice(0, 64)}),
    ("copy", {"fn": torch.t}),
    ("squared_copy", {}),
)
_CONVOLUTION: _Laws = (
    ("channel_shared", {"over": "in"}),
    ("flip_sym", {}),
    ("kernel_symmetry", {"group": "d4"}),
    ("group_conv", {"group": "p4"}),
)
_STREAMS: _Laws = (("channel_shared", {"over": "groups"}),)


def _layers(quick: bool) -> Iterator[_Layer]:
    """What it is called, how to build it, the shape of its input, and the laws."""
    for size, rows in ((64, 4),) if quick else ((1024, 1), (1024, 64), (256, 32)):
        label = f"Linear({size}, {size}), {rows} row{'s' * (rows > 1)}"
        laws = _LINEAR[::6] if quick else _LINEAR
        yield label, lambda size=size: nn.Linear(size, size), (rows, size), laws
    for channels, samples in ((8, 1),) if quick else ((64, 8), (256, 1)):
        yield (
            f"Conv2d({channels}, {channels}, 3) on {samples} × 14²",
            lambda c=channels: nn.Conv2d(c, c, 3, padding=1),
            (samples, channels, 14, 14),
            _CONVOLUTION[:1] if quick else _CONVOLUTION,
        )
    for kernel in () if quick else (7, 25):
        yield (
            f"Conv1d(64, 64, {kernel}, groups=64) on 8 × 1024",
            lambda k=kernel: nn.Conv1d(64, 64, k, padding=k // 2, groups=64),
            (8, 64, 1024),
            _STREAMS,
        )


@case(
    "prediction",
    "What `report` predicts that a tie gains over an untied layer, and what it gains (CPU time)",
    default_allocator=False,
)
def prediction(run: Run) -> None:
    alone = run.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time_ns if alone else run.setting.clock
    setting = dataclasses.replace(run.setting, seconds=min(0.3, run.setting.seconds), clock=clock)
    for label, build, shape, laws in _layers(run.quick):
        for rule, options in laws:
            pair = placed(run, nn.ModuleDict({"source": build(), "tied": build()}))
            if tp.available_rules()[rule].reads_layers:
                given = {**options, "source": pair["source"]}
            else:
                pair, given = nn.ModuleDict({"tied": pair["tied"]}), options
                made.lawful(pair["tied"], rule, **options)
            tp.register_tie(pair["tied"], rule, **given)
            x = torch.randn(shape)
            (row,) = tp.report(pair["tied"], example=x.to(run.device)).ties
            predicted = {"inference": row.gain_inference, "training": row.gain_training}
            for mode, gain in predicted.items():
                (entry,) = run.compare(
                    f"{label}, {models.label(rule, options)}",
                    made.dense_and_tied(pair, "tied", "weight"),
                    x, modes=(mode,), tolerance=5e-4, setting=setting, rule=rule,
                )  # fmt: skip
                # the least of each: what else the machine does disturbs it least
                dense, tied = (min(run.samples[name]) for name in ("dense", "tiedparam"))
                assert gain is not None
                entry["gain"], entry["predicted"] = rounded(dense / tied), rounded(gain)
