"""Bytes, and time against size."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

import tiedparam as tp
from benchmarks import contenders as made
from benchmarks import memory, models
from benchmarks.cases.enrolled import case, placed
from benchmarks.measuring import Run


@case(
    "memory",
    "Bytes: Conv2d(256, 256, 3) on 14², batch 32; rules that read a source with their source",
    default_allocator=False,
)
def memory_case(run: Run) -> None:
    channels, size, batch = (16, 8, 2) if run.quick else (256, 14, 32)
    layer = memory.convolution(channels)
    for rule in tp.available_rules():
        for options in models.variants(rule, layer):
            target = f"layer:{rule}:{channels}:{size}:{batch}"
            found = memory.layer_contenders(rule, options, channels)
            if found is None:
                continue
            label = f"Conv2d({channels}, {channels}, 3) on {size}², {models.label(rule, options)}"
            x = torch.randn(batch, channels, size, size)
            counted = {c.name: memory.count(c, x) for c in found}
            for what in next(iter(counted.values())):
                run.note_bytes(label, what, {n: v[what] for n, v in counted.items()}, batch=batch)
            if options == models.variants(rule, layer)[0]:
                sizes = {c.name: memory.peak(target, c.name, "training", run.device) for c in found}
                run.note_bytes(label, "peak memory, training", sizes, batch=batch)


@case(
    "scaling",
    "One kernel for all input channels: time against channels, batch and kernel size",
    default_allocator=False,
)
def scaling(run: Run) -> None:
    setting = dataclasses.replace(run.setting, seconds=min(2.0, run.setting.seconds))
    points = [("channels", c, c, 8, 3) for c in (16, 32, 64, 128, 256, 512)]
    points += [("batch", n, 64, n, 3) for n in (1, 2, 4, 8, 16, 32, 64)]
    points += [("kernel", k, 64, 8, k) for k in (1, 3, 5, 7, 9)]
    if run.quick:
        points = [p for p in points if p[2] <= 64 and p[3] <= 8 and p[4] <= 3]
    for axis, at, channels, batch, kernel in points:
        layer = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        layer = made.lawful(placed(run, layer), "channel_shared")
        run.compare(f"Conv2d({channels}, {channels}, {kernel}) on 14²",
                    made.channel_shared(layer)[:3], torch.randn(batch, channels, 14, 14),
                    setting=setting, axis=axis, at=at, limit=1 / channels)  # fmt: skip
