"""Bytes."""

from __future__ import annotations

import torch

import tiedparam as tp
from benchmarks import memory, models
from benchmarks.cases.enrolled import case
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
