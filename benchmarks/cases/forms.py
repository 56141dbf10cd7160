"""Each form of computing a layer, and ``torch.compile``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

import tiedparam as tp
from benchmarks import contenders as made
from benchmarks import models
from benchmarks.cases.enrolled import case, placed
from benchmarks.measuring import Run, Setting
from tiedparam.tie.lookup import tie_of

Layer = tuple[str, Callable[[int], Any], tuple[int, ...]]
_LAYERS: tuple[Layer, ...] = (
    ("conv2d 3×3 on 14²", lambda c: nn.Conv2d(c, c, 3, padding=1), (14, 14)),
    ("conv2d 1×1 on 14²", lambda c: nn.Conv2d(c, c, 1), (14, 14)),
    ("conv2d 5×5 on 14²", lambda c: nn.Conv2d(c, c, 5, padding=2), (14, 14)),
    ("conv2d 7×7 on 14²", lambda c: nn.Conv2d(c, c, 7, padding=3), (14, 14)),
    ("conv1d 3 on 196", lambda c: nn.Conv1d(c, c, 3, padding=1), (196,)),
    ("conv3d 3×3×3 on 6³", lambda c: nn.Conv3d(c, c, 3, padding=1), (6, 6, 6)),
    ("conv_transpose2d 3×3 on 14²", lambda c: nn.ConvTranspose2d(c, c, 3, padding=1), (14, 14)),
    ("linear", lambda c: nn.Linear(c, c), ()),
)


@case(
    "forms",
    "The form that a broadcast law takes, against all that it offers",
    default_allocator=False,
)
def forms(run: Run) -> None:
    channels = (8, 32) if run.quick else (4, 16, 64, 256)
    setting = dataclasses.replace(run.setting, seconds=min(0.3, run.setting.seconds / 4))
    for kind, build, sizes in _LAYERS[:1] if run.quick else _LAYERS:
        for c in channels:
            for rule, options in _laws_for_forms(kind):
                layer = placed(run, build(c))
                for batch in (1,) if run.quick else (1, 32):
                    x = torch.randn(batch, c, *sizes)
                    label = f"{kind}, {c} channels, {models.label(rule, options)}"
                    _compare_forms(run, label, layer, rule, options, x, setting)
    for label, build, c, sizes in _STREAM_LAYERS[:1] if run.quick else _STREAM_LAYERS:
        layer = placed(run, build(c))
        for batch in (1,) if run.quick else (1, 32):
            x = torch.randn(batch, c, *sizes)
            _compare_forms(run, label, layer, "channel_shared", {"over": "groups"}, x, setting)


def _streams_for_forms() -> Iterator[tuple[str, Callable[[int], Any], int, tuple[int, ...]]]:
    """Streams: kernels, then numbers of filters, of signals and of images."""
    signals = [(c, 4, k, (1024,)) for c in (16, 64, 256) for k in (3, 5, 7, 9)]
    signals += [(64, m, 3, (1024,)) for m in (1, 2, 8, 16)] + [(64, 4, 17, (1024,))]
    images = [(64, m, 3, size) for m in (1, 2, 4, 8) for size in ((14, 14), (28, 28))]
    images += [(16, 16, 5, (28, 28)), (16, 4, 3, (8, 8, 8)), (16, 16, 3, (8, 8, 8))]
    for c, m, k, sizes in signals + images:
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(sizes) - 1]
        shape = "×".join(map(str, sizes))
        label = f"{kind.__name__.lower()} {k} on {shape}, {c} streams of {m} filters"
        yield (
            label,
            lambda c, kind=kind, m=m, k=k: kind(c, c * m, k, padding=k // 2, groups=c),
            c, sizes,
        )  # fmt: skip


_STREAM_LAYERS = tuple(_streams_for_forms())


def _laws_for_forms(kind: str) -> list[tuple[str, dict[str, Any]]]:
    laws: list[tuple[str, dict[str, Any]]] = [("channel_shared", {"over": "in"})]
    if kind.startswith(("linear", "conv2d 3×3")):
        laws += [("channel_shared", {"over": "all"}), ("row_repeat", {})]
    return laws


def _compare_forms(
    run: Run, label: str, layer: Any, rule: str, options: dict[str, Any], x: Tensor,
    setting: Setting,
) -> None:  # fmt: skip
    layer = made.lawful(deepcopy(layer), rule, **options)
    tied = tp.register_tie(deepcopy(layer), rule, **options)
    offered = ["dense", *tie_of(tied).computing.forms]
    if options.get("over") == "groups":
        offered = [form for form in offered if form != "reduced"]  # it saves nothing there
    forced = [made.tied(layer, rule, form, compute=form, **options) for form in offered]
    stock = dataclasses.replace(made.dense(layer), name="stock layer")
    for mode in ("inference", "training"):
        chosen = _chosen(tied, x, mode)
        (entry,) = run.compare(
            label, [stock, *forced], x, modes=(mode,), setting=setting, chosen=chosen
        )
        times = {form: entry["contenders"][form]["fixed"]["ratio"] for form in offered}
        best = min(times, key=lambda name: times[name])
        entry["best"] = best
        entry["loss"] = round(times[chosen] / times[best] - 1, 4)


def _chosen(tied: Any, x: Tensor, mode: str) -> str:
    """The form in which a layer computes an input: seen, not derived."""
    computing = tie_of(tied).computing
    computing.seen = []
    try:
        with torch.set_grad_enabled(mode == "training"):
            tied(x.to(tied.bias.device).requires_grad_())
        return next(iter(computing.seen), "dense")
    finally:
        computing.seen = None


@case(
    "compiled",
    "Under torch.compile: dense, tied and hand-written",
    default_allocator=False,
    in_quick=False,
)
def compiled(run: Run) -> None:
    conv = made.lawful(placed(run, nn.Conv2d(64, 64, 3, padding=1)), "channel_shared")
    linear = made.lawful(placed(run, nn.Linear(1024, 1024)), "row_repeat")
    for shapes, found, x in (
        ("Conv2d(64, 64, 3) on 28²", made.channel_shared(conv)[:3], torch.randn(32, 64, 28, 28)),
        ("Linear(1024, 1024)", made.row_repeat(linear)[:3], torch.randn(64, 1024)),
    ):
        torch._dynamo.reset()
        faster = [
            dataclasses.replace(c, name=f"{c.name}, compiled", forward=torch.compile(c.forward))
            for c in found
        ]
        run.compare(shapes, [*found, *faster], x)
