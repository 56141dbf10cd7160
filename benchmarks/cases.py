"""The cases: which layers, which contenders, and what they should show."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import tiedparam as tp
from benchmarks import contenders as made
from benchmarks import expansions, goal_cases, memory, models
from benchmarks.goals import Goal
from benchmarks.measuring import Contender, Run, Setting, summarize
from tiedparam.compute import forward
from tiedparam.tie.lookup import tie_of


@dataclass(frozen=True)
class Case:
    """A named measurement.

    Attributes:
        title: one line for the docs.
        measure: adds comparisons to the run.
        goals: what they should show.
        default_allocator: whether the second column is worth the time.
        in_quick: whether ``--quick`` runs it.
    """

    name: str
    title: str
    measure: Callable[[Run], None]
    goals: tuple[Goal, ...] = ()
    default_allocator: bool = True
    in_quick: bool = True


CASES: dict[str, Case] = {}


def case(
    name: str, title: str, goals: Sequence[Goal] = (), **settings: bool
) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
    """Enrol a case."""

    def enrol(measure: Callable[[Run], None]) -> Callable[[Run], None]:
        CASES[name] = Case(name, title, measure, tuple(goals), **settings)
        return measure

    return enrol


_ANY_RULE = tuple(
    Goal(f"any rule, {mode}, batch 32, where dense takes ≥ 1 ms: ≤ 1.05 × dense",
         "ratio", 1.05, mode, batch=32, dense_ms=1.0)
    for mode in ("inference", "training")
)  # fmt: skip
_ANY_RULE_TRAINING = tuple(goal for goal in _ANY_RULE if goal.mode == "training")


# Layers in the shapes of the stories ------------------------------------------------------


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
    (*_channel_shared_goals(), *_ANY_RULE),
)
def channel_shared(run: Run) -> None:
    shapes = [(64, 28), (256, 14)] if run.quick else [(64, 28), (128, 28), (256, 14), (512, 7)]
    for channels, size in shapes:
        layer = made.lawful(_to(run, nn.Conv2d(channels, channels, 3, padding=1)), "channel_shared")
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
        layer = made.lawful(_to(run, nn.Linear(features, features)), "row_repeat")
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
        layer = _to(run, memory.streams_layer(channels, kernel))
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


# Expansions and models --------------------------------------------------------------------


def _expansion_goals() -> Iterator[Goal]:
    for channels in (256, 512):
        shapes = f"weight ({channels}, {channels}, 3, 3)"
        yield Goal(f"{shapes}: ≤ 3.5 × cloning the weight", "ratio", 3.5, "expansion", shapes,
                   against=("clone of the dense weight",))  # fmt: skip
    yield Goal("weight (64, 64, 3, 3): ≤ 150 µs", "absolute", 150, "expansion",
               "weight (64, 64, 3, 3)", against=("clone of the dense weight",))  # fmt: skip
    yield Goal("always faster than the users' averaging", "speedup", 1.0, "expansion",
               against=("users' averaging",))  # fmt: skip


@case(
    "flip_sym_expansion",
    "flip_sym: forward and backward of the expansion alone",
    tuple(_expansion_goals()),
)
def flip_sym_expansion(run: Run) -> None:
    conv = (64, 128) if run.quick else (64, 256, 512)
    linear = (64,) if run.quick else (64, 512, 1024)
    layers: list[Any] = [nn.Conv2d(c, c, 3, padding=1, bias=False) for c in conv]
    layers += [nn.Linear(c, c, bias=False) for c in linear]
    for layer in layers:
        layer = made.lawful(_to(run, layer), "flip_sym")
        tied = tp.register_tie(deepcopy(layer), "flip_sym").parametrizations["weight"]
        full = layer.weight.detach().clone().requires_grad_()
        own = layer.weight.detach().clone().requires_grad_()
        found = [
            made.expansion("clone of the dense weight", full.clone, (full,)),
            made.expansion("tiedparam", tied, tuple(tied.parameters())),
            made.expansion("users' averaging", lambda w=own: made.averaged(w), (own,)),
        ]
        if isinstance(layer, nn.Linear):
            found += _geotorch_symmetric(layer)
        _compare_expansions(run, f"weight {tuple(layer.weight.shape)}", found)


def _geotorch_symmetric(layer: nn.Linear) -> list[Contender]:
    try:
        import geotorch
    except ImportError:
        return []
    layer = deepcopy(layer)
    values = layer.weight.detach().clone()
    geotorch.symmetric(layer, "weight")
    expansion: Any = layer.parametrizations["weight"]
    with torch.no_grad():
        expansion.original.copy_(values)
    return [made.expansion("geotorch.symmetric", expansion, tuple(expansion.parameters()))]


def _compare_expansions(run: Run, shapes: str, found: list[Contender]) -> None:
    # the contenders read no input: it stands for nothing, and its gradient is left out
    weight = found[0].forward(torch.empty(0))
    cotangent = torch.randn_like(weight)
    calls: dict[str, Callable[[], Any]] = {}
    for contender in found:
        made_now = contender.forward(weight)
        torch.testing.assert_close(made_now, weight, rtol=1e-6, atol=1e-7, msg=contender.name)
        calls[contender.name] = lambda c=contender: torch.autograd.grad(
            c.forward(weight), list(c.weights), cotangent
        )
    run.note(shapes, "expansion", run.time(calls))


case(
    "expansion",
    "Every law: the expansion alone, and its adjoint, against a clone of the weight",
    expansions.GOALS,
)(expansions.measure)


_STAGE_GOALS = tuple(
    Goal(f"{rule}, training: ≤ 1.03 × dense", "ratio", 1.03, "training", f", {rule}", 32)
    for rule in ("flip_sym", "squared_copy")
)


@case(
    "resnet_stage",
    "A ResNet-18 stage of two basic blocks, every rule on all its convolutions",
    (*_STAGE_GOALS, *_ANY_RULE_TRAINING),
)
def resnet_stage(run: Run) -> None:
    for channels, size in [(16, 8)] if run.quick else [(64, 28), (128, 14)]:
        for rule in tp.available_rules():
            found = models.model_contenders(_to(run, models.resnet_stage(channels)), rule)
            if found is not None:
                batch = 4 if run.quick else 32
                run.compare(f"{channels} channels on {size}², {rule}", found,
                            torch.randn(batch, channels, size, size),
                            modes=("training",), tolerance=1e-6,
                    in_double=True)  # fmt: skip


@case(
    "models",
    "Whole models, training step: ResNet-18 on 32² and two Transformer encoder blocks",
    _ANY_RULE_TRAINING,
)
def whole_models(run: Run) -> None:
    width, size, batch, length = (8, 8, 4, 8) if run.quick else (64, 32, 32, 64)
    d = 32 if run.quick else 512
    for rule in tp.available_rules():
        for name, model, x in (
            (f"ResNet-18 on {size}²", models.resnet18(width), torch.randn(batch, 3, size, size)),
            (f"Transformer, d={d}", models.transformer(d), torch.randn(batch, length, d)),
        ):
            found = models.model_contenders(_to(run, model), rule)
            if found is not None:
                run.compare(
                    f"{name}, {rule}", found, x, modes=("training",), tolerance=1e-6, in_double=True
                )


@case(
    "shapes",
    "Stacks of layers in the shapes people use, every rule on all layers that can carry it",
    _ANY_RULE,
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
            found = models.model_contenders(_to(run, build()), rule)
            if found is None:
                continue
            for batch in (2,) if run.quick else (1, 32):
                run.compare(f"{shapes}, {rule}", found, torch.randn(batch, *sizes),
                            tolerance=1e-6, in_double=True)  # fmt: skip


# Inference --------------------------------------------------------------------------------

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
        layer = _to(run, layer).eval()
        for rule in ("flip_sym", "squared_copy"):
            options = models.variants(rule, layer)[0]
            pair = models.tie_pair(layer, rule, options)
            assert pair is not None
            found = _dense_and_tied(pair, "tied", "weight")
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
        layer = made.lawful(_to(run, layer), "flip_sym").eval()
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


# Fixed costs ------------------------------------------------------------------------------


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
        for label, found in _every_rule_on(_to(run, layer)):
            found.append(made.identity(found[0].forward))
            run.compare(f"{shapes}, {label}", found, x, setting=brief)


@case(
    "every_rule",
    "All available rules: their own examples, and two layers of common size, batch 32",
    _ANY_RULE,
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
        for label, contenders in _every_rule_on(_to(run, layer)):
            run.compare(
                f"{shapes}, {label}", contenders, x, setting=longer, rule=label.split("(")[0]
            )


def _every_rule_on(layer: Any) -> Iterator[tuple[str, list[Contender]]]:
    """Each law that the layer can carry, with the dense layer and the tied one."""
    for rule in tp.available_rules():
        for options in models.variants(rule, layer):
            pair = models.tie_pair(layer, rule, options)
            if pair is not None:
                yield models.label(rule, options), _dense_and_tied(pair, "tied", "weight")


def _dense_and_tied(root: nn.Module, path: str, tensor_name: str) -> list[Contender]:
    tied: Any = root.get_submodule(path)
    alone = nn.ModuleDict({"root": deepcopy(root)})
    dense: Any = tp.remove_tie(
        alone["root"].get_submodule(path) if path else alone["root"], tensor_name
    )
    expansion = tied.parametrizations[tensor_name]
    sources = [getattr(layer, name) for layer, name in tp.get_tie(tied, tensor_name).sources()]
    weights = (*expansion.parameters(), *sources)
    first = getattr(dense, tensor_name)
    return [
        Contender("dense", dense, (first,), _others(dense, tensor_name), lambda: first),
        Contender("tiedparam", tied, weights, _others(tied, tensor_name), expansion),
    ]


def _others(layer: nn.Module, tensor_name: str) -> tuple[Tensor, ...]:
    return tuple(p for name, p in layer.named_parameters(recurse=False) if name != tensor_name)


def _example_contenders(
    run: Run, rule: str, example: tp.Example
) -> tuple[str, list[Contender], Tensor] | None:
    model = _to(run, example.build())
    layer = model.get_submodule(example.path) if example.path else model
    shape = _input_shape(layer)
    if shape is None:
        return None
    tp.register_tie(layer, rule, example.tensor_name, root=model, **example.options)
    contenders = _dense_and_tied(model, example.path, example.tensor_name)
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


@case("import", "Starting Python, importing torch, and importing tiedparam as well")
def importing(run: Run) -> None:
    def start(code: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    calls = {
        "import torch": start("import torch"),
        "import torch and tiedparam": start("import torch, tiedparam"),
    }
    rounds = (3, 3) if run.quick else (7, 21)
    setting = Setting(seconds=run.setting.seconds * 5, rounds=rounds, slice_ms=0)
    run.note("a fresh process", "import", run.time(calls, setting))


# Forms, compilers, memory, scaling ----------------------------------------------------------


@case(
    "large_models",
    "Tying whole models: time and peak memory for each layer, against the number of layers",
    default_allocator=False,
)
def large_models(run: Run) -> None:
    small = (50, 100) if run.quick else (1_000, 3_000, 10_000)
    wide = (1, 2) if run.quick else (12, 48)  # 48 of 2,048 features: 201 million values
    features = 64 if run.quick else 2048
    for shapes, width, counts in (
        ("Linear(8, 8), flip_sym", 8, small),
        (f"Linear({features}, {features}), flip_sym", features, wide),
    ):
        times: dict[str, list[float]] = {f"{count:,} layers": [] for count in counts}
        for _ in range(2 if width > 8 else 3):
            for count in counts:
                layers = memory.many_layers(width, count)
                started = time.perf_counter_ns()
                memory.tie_all(layers)
                times[f"{count:,} layers"].append((time.perf_counter_ns() - started) / count)
        run.note(shapes, "tying, each layer", summarize(times))
        sizes = {f"{count:,} layers": memory.peak_of_tying(width, count) for count in counts}
        run.note_bytes(shapes, "peak over the dense model, each layer", sizes)


@case(
    "scan",
    "Looking at a whole model through every rule, against reading its values once",
    default_allocator=False,
)
def scanning(run: Run) -> None:
    for width, count in [(32, 4)] if run.quick else [(512, 100), (1024, 100), (2048, 24)]:
        model = memory.many_layers(width, count)
        values = [p.detach() for p in model.parameters()]
        calls = {
            "one norm of every tensor": lambda v=values: [torch.linalg.vector_norm(t) for t in v],
            "tiedparam.scan": lambda m=model: tp.scan(m, progress=False),
            "tiedparam.scan without copies": lambda m=model: tp.scan(m, pairs=0, progress=False),
        }
        setting = dataclasses.replace(run.setting, rounds=(2, 3))
        shapes = f"{count} × Linear({width}, {width}), {count * width * width / 1e6:.0f} million"
        run.note(shapes, "scan", run.time(calls, setting))


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
    "The grounds of `choose_form`: every form, over kinds of layers, channels and batch",
    default_allocator=False,
)
def forms(run: Run) -> None:
    channels = (8, 32) if run.quick else (4, 16, 64, 256)
    setting = dataclasses.replace(run.setting, seconds=min(0.3, run.setting.seconds / 4))
    for kind, build, sizes in _LAYERS[:1] if run.quick else _LAYERS:
        for c in channels:
            for rule, options in _laws_for_forms(kind):
                layer = _to(run, build(c))
                for batch in (1,) if run.quick else (1, 32):
                    x = torch.randn(batch, c, *sizes)
                    label = f"{kind}, {c} channels, {models.label(rule, options)}"
                    _compare_forms(run, label, layer, rule, options, x, setting)
    for label, build, c, sizes in _STREAM_LAYERS[:1] if run.quick else _STREAM_LAYERS:
        layer = _to(run, build(c))
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
    offered = tie_of(tied).computing.offered
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
    calls = []
    compute = forward.convolve

    def convolve(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return compute(*arguments)

    forward.convolve = convolve
    try:
        with torch.set_grad_enabled(mode == "training"):
            tied(x.to(tied.bias.device).requires_grad_())
    finally:
        forward.convolve = compute
    return "windows" if calls else str(computing.otherwise)


@case(
    "compiled",
    "Under torch.compile: dense, tied and hand-written",
    default_allocator=False,
    in_quick=False,
)
def compiled(run: Run) -> None:
    conv = made.lawful(_to(run, nn.Conv2d(64, 64, 3, padding=1)), "channel_shared")
    linear = made.lawful(_to(run, nn.Linear(1024, 1024)), "row_repeat")
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
        layer = made.lawful(_to(run, layer), "channel_shared")
        run.compare(f"Conv2d({channels}, {channels}, {kernel}) on 14²",
                    made.channel_shared(layer)[:3], torch.randn(batch, channels, 14, 14),
                    setting=setting, axis=axis, at=at, limit=1 / channels)  # fmt: skip


case(
    "goals",
    "What each law should gain, and what was reached",
    default_allocator=False,
)(goal_cases.measure)


def _to(run: Run, layer: Any) -> Any:
    return layer.to(run.device)
