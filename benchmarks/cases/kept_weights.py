"""Inference with weights that are kept: ``frozen`` and ``cache=True``."""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

import tiedparam as tp
from benchmarks import contenders as made
from benchmarks import models
from benchmarks.cases.enrolled import case, placed
from benchmarks.goals import Goal
from benchmarks.measuring import Contender, Run

FROZEN, CACHED = "tiedparam, frozen", "tiedparam, cache=True"
_CACHED_IS_FASTER = Goal(
    "flip_sym, cache=True: faster than computing the weight anew", "ratio", 1.0, "inference",
    contender=CACHED, against=("tiedparam",),
)  # fmt: skip


@case(
    "inference",
    "Weights that are kept: `frozen` and `cache=True`, for rules that gain from them",
    (
        Goal("flip_sym, frozen, where dense takes ≥ 1 ms: ≤ 1.01 × dense", "ratio", 1.01,
             "inference", "flip_sym", contender=FROZEN, dense_ms=1.0),
        _CACHED_IS_FASTER,
    ),
)  # fmt: skip
def inference(run: Run) -> None:
    channels, size = ((16, 8),) if run.quick else ((64, 28), (256, 14)), 64 if run.quick else 1024
    layers: list[tuple[str, Any, tuple[int, ...]]] = [
        (f"Conv2d({c}, {c}, 3) on {n}²", nn.Conv2d(c, c, 3, padding=1), (c, n, n))
        for c, n in channels
    ]
    layers.append((f"Linear({size}, {size})", nn.Linear(size, size), (size,)))
    for shapes, layer, sizes in layers:
        layer = placed(run, layer).eval()
        for rule in ("flip_sym", "squared_copy"):
            options = models.variants(rule, layer)[0]
            pair = models.tie_pair(layer, rule, options)
            assert pair is not None
            found = made.dense_and_tied(pair, "tied", "weight")
            if tp.get_tie(pair["tied"]).gains_from_cache:
                cached: Any = deepcopy(found[0].forward)
                found.append(Contender(CACHED, tp.register_tie(cached, rule, cache=True)))
            frozen = deepcopy(pair)
            found.append(Contender(FROZEN, frozen["tied"]))
            with tp.frozen(frozen):
                for batch in (2,) if run.quick else (1, 32):
                    run.compare(f"{shapes}, {rule}", found, torch.randn(batch, *sizes),
                                modes=("inference",))  # fmt: skip


class _AlwaysKept(tp.available_rules()["flip_sym"]):  # type: ignore[misc]
    """`flip_sym` that obeys ``cache=True`` whatever its size."""

    gains_from_cache = True


@case(
    "cache",
    "From which size on `flip_sym` obeys `cache=True`: computed, compared and frozen, batch 1",
    (_CACHED_IS_FASTER,),
    default_allocator=False,
)
def cache(run: Run) -> None:
    brief = dataclasses.replace(run.setting, seconds=min(1.0, run.setting.seconds))
    sizes = (16,) if run.quick else (16, 32, 64, 128, 256, 512, 1024)
    layers: list[tuple[str, Any, Tensor]] = [
        (f"Linear({n}, {n})", nn.Linear(n, n), torch.randn(1, n)) for n in sizes
    ]
    layers += [
        (f"Conv2d({c}, {c}, 3) on 8²", nn.Conv2d(c, c, 3, padding=1), torch.randn(1, c, 8, 8))
        for c in sizes[:-1]
    ]
    for shapes, layer, x in layers:
        layer = made.lawful(placed(run, layer), "flip_sym").eval()
        tied = tp.register_tie(deepcopy(layer), "flip_sym")
        kept = tp.register_tie(deepcopy(layer), _AlwaysKept(), cache=True)
        frozen = deepcopy(tied)
        obeys = tp.get_tie(tied).gains_from_cache
        found = [
            Contender("dense", layer),
            Contender("tiedparam", tied),
            Contender(CACHED if obeys else "cache=True, if it were obeyed", kept),
            Contender(FROZEN, frozen),
        ]
        with tp.frozen(frozen):
            run.compare(shapes, found, x, modes=("inference",), setting=brief)
