"""Layers in the shapes of the stories: one kernel, one row, one bank of filters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks import contenders as made
from benchmarks import memory
from benchmarks.cases.enrolled import ANY_RULE, case, placed
from benchmarks.goals import Goal
from benchmarks.measuring import Run


def _channel_shared_goals() -> Iterator[Goal]:
    bounds = {
        "Conv2d(64, 64, 3) on 28²": {"fixed": (8, 6), "default": (2.5, 4)},
        "Conv2d(256, 256, 3) on 14²": {"fixed": (20, 18), "default": (8, 10)},
    }
    for shapes, allocators in bounds.items():
        for allocator, pair in allocators.items():
            for mode, bound in zip(("inference", "training"), pair, strict=True):
                note = "" if allocator == "fixed" else ", default allocator"
                yield Goal(f"{shapes}, {mode}{note}: ≥ {bound} × faster than dense", "speedup",
                           bound, mode, shapes, 32, allocator=allocator)  # fmt: skip
        for mode in ("inference", "training"):
            yield Goal(f"{shapes}, {mode}: at most the time of the hand-written form", "ratio",
                       1.0, mode, shapes, 32, against=(made.HAND_WRITTEN,))  # fmt: skip


@case(
    "channel_shared",
    "One kernel for all input channels, 3×3 convolutions",
    (*_channel_shared_goals(), *ANY_RULE),
)
def channel_shared(run: Run) -> None:
    shapes = [(64, 28), (256, 14)] if run.quick else [(64, 28), (128, 28), (256, 14), (512, 7)]
    for channels, size in shapes:
        layer = made.lawful(
            placed(run, nn.Conv2d(channels, channels, 3, padding=1)), "channel_shared"
        )
        for batch in (32, 1):
            run.compare(
                f"Conv2d({channels}, {channels}, 3) on {size}²",
                made.channel_shared(layer),
                torch.randn(batch, channels, size, size),
            )


def _row_repeat_goals() -> Iterator[Goal]:
    for features, bound in ((1024, 20), (4096, 60)):
        shapes = f"Linear({features}, {features})"
        for mode in ("inference", "training"):
            yield Goal(f"{shapes}, {mode}: ≥ {bound} × faster than dense", "speedup", bound, mode,
                       shapes)  # fmt: skip
            yield Goal(f"{shapes}, {mode}: at most 60 µs over the hand-written form",
                       "microseconds", 60, mode, shapes,
                       against=(made.HAND_WRITTEN,))  # fmt: skip


@case("row_repeat", "One row for all outputs, Linear layers", tuple(_row_repeat_goals()))
def row_repeat(run: Run) -> None:
    for features in (1024,) if run.quick else (1024, 4096):
        layer = made.lawful(placed(run, nn.Linear(features, features)), "row_repeat")
        for batch in (64,) if run.quick else (64, 512):
            run.compare(
                f"Linear({features}, {features})",
                made.row_repeat(layer),
                torch.randn(batch, features),
            )


_RECIPES = ("fold into batch", "users' reshape to 2-d", "users' loop and cat")
_STREAMS = "Conv1d(256, 1024, "


@case(
    "streams",
    "Independent streams that share one bank of filters, length 1,024, 4 filters",
    (
        Goal("256 channels, inference: ≤ 0.8 × dense", "ratio", 0.8, "inference", _STREAMS, 32),
        Goal("256 channels, training: ≤ 1.0 × dense", "ratio", 1.0, "training", _STREAMS, 32),
        Goal("256 channels, training: ≥ 10 × faster than the loop", "speedup", 10, "training",
             _STREAMS, 32, against=("users' loop and cat",)),
        *(Goal(f"256 channels, {mode}: less peak memory than each user recipe", "ratio", 1.0,
               f"peak memory, {mode}", _STREAMS, against=_RECIPES)
          for mode in ("inference", "training")),
    ),
)  # fmt: skip
def streams(run: Run) -> None:
    shapes = [(256, 3, 32)]
    if run.quick:
        shapes = [(16, 3, 4)]
    else:
        shapes += [(64, 7, 32), (256, 7, 32), (1024, 3, 8)]
    for channels, kernel, batch in shapes:
        label = f"Conv1d({channels}, {4 * channels}, {kernel}, groups={channels})"
        layer = placed(run, memory.streams_layer(channels, kernel))
        found = made.streams(layer)
        if channels > 256:  # the users' loop alone takes minutes there
            found = [c for c in found if c.name != "users' loop and cat"]
        measured = found[:2] if run.quick else found
        # weight gradients sum millions of float32 products, in another order per contender
        run.compare(label, found, torch.randn(batch, channels, 1024), tolerance=5e-4)
        if ((channels, kernel) == (256, 3) or run.quick) and not run.times_only:
            for mode in ("inference", "training"):
                target = f"streams:{channels}:{kernel}:{batch}"
                sizes = {c.name: memory.peak(target, c.name, mode, run.device) for c in measured}
                run.note_bytes(label, f"peak memory, {mode}", sizes, batch=batch)
