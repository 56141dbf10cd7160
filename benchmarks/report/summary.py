"""docs/speed.md, for users: ten lines, three charts, and where a tie is slower."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.cases.families import FAMILIES, SIZE, Family
from benchmarks.report import charts
from benchmarks.report.results import (
    COMMAND,
    FOLDER,
    Result,
    comparisons,
    fill,
    gains,
    machines,
    of_case,
    span,
    table,
)

HEAD = ("what the law shares", "layer", "inference", "training step", "gains from")
_WORTH = 1.1
"""Times faster than dense, from which on a line says that a law gains."""

_TITLE = f"""# Does my case get faster?

<!-- by `{COMMAND}` from `benchmarks/results/`; do not edit -->
"""

_SHORT = fill(
    "**Often, yes.** Where the law lets the layer skip work, it is many times as fast, from a "
    "certain size on. Other laws make the weight anew in each call, which costs [a little, or "
    "more](#where-a-tie-is-slower), and next to nothing in inference once the weight is "
    "[kept](#how-to-make-it-faster)."
)

_FASTER = """## How to make it faster

```python
import torch

import tiedparam as tp

model = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512))
tp.register_tie(model[0], "circulant", init="rescale")
tp.register_tie(model[2], "symmetric", cache=True, init="rescale")  # looks whether values changed
batch = torch.randn(16, 512)
tp.tune(model, batch, training=True)  # keeps the fastest form of each layer
with tp.frozen(model.eval()), torch.no_grad():  # computes each weight once
    answer = model(batch)
```

- **Inference**: [`frozen` or `cache=True`](recipes/inference.md) keep the weight. For a server or a
  file, export, or untie a copy of the model, which is then a stock one.
- **Training**: [`tune`](recipes/whole-models.md#tune-it-to-your-machine) measures the forms of each
  layer on your shapes and your machine. Larger batches share one computation of the weight.
- **Before tying**: `tp.scan(model, example=batch)` says what a tie [would
  gain](recipes/whole-models.md#what-would-it-gain); after it, `tp.report(model, example=batch)`.
- **Under `torch.compile`** a tied layer keeps most of its gain: the product is one operator of the
  graph. [Each case](maintainers/benchmarks/goals.md) is measured against eager mode.
"""


def render(results: Sequence[Result]) -> str:
    """The page's text."""
    if not results:
        return f"{_TITLE}\nNo results yet.\n"
    parts = [_TITLE, _SHORT]
    for device in dict.fromkeys(result["device"] for result in results):
        parts.append(_answer(results, device))
    parts += [_FASTER, _peers(results), _machines(results)]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


_PICTURES = {
    "gains": (
        "How many times faster than dense each law is",
        "Each bar ends at the least of the machines, the line at the most.",
    ),
    "sizes": (
        "Time against size: dense, tied, and the limit",
        "The limit is dense's time times the law's share of the operations: what lies above it is "
        "memory, fixed costs, and kernels that reach less than those of a dense product. "
        "On {first}.",
    ),
    "rows": (
        "How many times faster than dense, against the number of rows",
        f"Linear layers of {SIZE:,} features, the least of the machines.",
    ),
}


# The answer -------------------------------------------------------------------------------


def _answer(results: Sequence[Result], device: str) -> str:
    if not of_case(results, "scaling", device):
        return ""
    where = "one thread of a CPU" if device == "cpu" else "a GPU"
    text = f"## On {where}\n\n"
    text += fill(
        "How many times faster than the dense stock layer, from the least to the most over the "
        "[machines](#machines); below 1 it is slower. A *step* is forward and backward. The last "
        f"column says from where on both gain at least {_WORTH:g} times; below it gains less, "
        "or is slower than dense."
    )
    text += "\n"
    text += table(HEAD, lines(results, device))
    first = _name(of_case(results, "scaling", device)[0]["machine"])
    for name, (title, caption) in _PICTURES.items():
        text += f"\n![{title}]({charts.FOLDER}/{device}-{name}.svg)\n\n" + fill(
            caption.format(first=first)
        )
    slower = _slower(results, device)
    return f"{text}\n{slower}" if slower else text


def lines(results: Sequence[Result], device: str) -> list[list[str]]:
    """A line for each family."""
    return [line for family in FAMILIES if (line := _line(results, device, family))]


def _line(results: Sequence[Result], device: str, family: Family) -> list[str] | None:
    size, batch = family.usual
    cells = []
    for mode in ("inference", "training"):
        found = gains(_of(results, device, family, mode=mode, size=size, batch=batch))
        if not found:
            return None
        cells.append(span(found))
    samples = "rows" if family.convolution is None else "samples"
    layer = f"{family.label(size)}, {batch} {samples}"
    return [f"{family.title} (`{family.rule}`)", layer, *cells, _from(results, device, family)]


def _of(results: Sequence[Result], device: str, family: Family, **wanted: Any) -> Iterator[Any]:
    return comparisons(results, "scaling", device=device, family=family.title, **wanted)


def _from(results: Sequence[Result], device: str, family: Family) -> str:
    """The size from which on the law gains on every machine, and the number of rows."""
    size, batch = family.usual
    sizes = {n: gains(_of(results, device, family, size=n, batch=batch)) for n in family.sizes}
    batches = {n: gains(_of(results, device, family, size=size, batch=n)) for n in family.batches}
    unit = "features" if family.convolution is None else "channels"
    first = _first(sizes)
    if first is None:
        return "–"
    text = f"{first:,} {unit}"
    least = _first(batches)
    if least is not None and least > family.batches[0]:
        rows = "rows" if family.convolution is None else "samples"
        text += f", and {least} {rows} at {size:,}"
    return text


def _first(found: dict[int, list[float]]) -> int | None:
    """From where on all values reach `_WORTH`."""
    first = None
    for at, values in reversed(found.items()):
        if not values or min(values) < _WORTH:
            break
        first = at
    return first


# Where a tie is slower --------------------------------------------------------------------

_LITTLE = 1.05
"""Times as long as dense, below which a line is not worth a reader's time."""

_KEPT = ("tiedparam", "tiedparam, cache=True", "tiedparam, frozen")


def _slower(results: Sequence[Result], device: str) -> str:
    """The laws that compute their weight anew, and what a tie adds to a small layer."""
    found = [
        *_losing(results, device),
        *_single(results, device),
        *_stages(results, device),
        *_small(results, device),
    ]
    kept = list(_keeping(results, device))
    if not found and not kept:
        return ""
    text = "## Where a tie is slower\n\n" + "".join(f"- {line}\n" for line in found)
    if kept:
        text += "\n" + fill(
            "A law without a form of its own makes the weight anew in each call, and then computes "
            "as a dense layer. The fewer rows there are, the more that counts, unless the weight "
            "is kept. So many times as long as dense it takes in inference, where that is more "
            f"than {_LITTLE:g}:"
        )
        text += "\n"
        text += table(["layer", "law", "rows", "made anew", "`cache=True`", "`frozen`"], kept)
    return text


def _losing(results: Sequence[Result], device: str) -> Iterator[str]:
    """The families that gain nowhere."""
    for line in lines(results, device):
        title, layer, inference, training, first = line
        if first == "–":
            yield f"{title}, {layer}: {inference} as fast in inference, {training} in training."


def _single(results: Sequence[Result], device: str) -> Iterator[str]:
    """What a single row gains, which repays no work that is done once for a call."""
    told = []
    for family in FAMILIES:
        if family.convolution is None:
            times = [
                span(gains(_of(results, device, family, mode=mode, size=SIZE, batch=1)), "")
                for mode in ("inference", "training")
            ]
            if all(times):
                told.append(f"`{family.rule}` {' / '.join(times)}")
    if told:
        yield (
            f"A single row of Linear({SIZE}, {SIZE}), times as fast in inference / in training: "
            f"{'; '.join(told)}."
        )


def _stages(results: Sequence[Result], device: str) -> Iterator[str]:
    stages: dict[str, list[float]] = {}
    for comparison in comparisons(results, "resnet_stage", device=device, mode="training"):
        law = comparison["shapes"].rpartition(", ")[2]
        figures = comparison["contenders"].get("tiedparam", {}).get("fixed")
        if figures and law not in ("channel_shared", "row_repeat"):
            stages.setdefault(law, []).append(figures["ratio"])
    if stages:
        times = span([ratio for found in stages.values() for ratio in found], "")
        names = ", ".join(f"`{law}`" for law in stages)
        yield f"A training step of a ResNet stage, batch 32: {times} of dense's time ({names})."


def _small(results: Sequence[Result], device: str) -> Iterator[str]:
    small = {
        mode: [
            comparison["contenders"]["tiedparam"]["fixed"]["extra_us"]
            for comparison in comparisons(results, "small_layers", device=device, mode=mode)
        ]
        for mode in ("inference", "training")
    }
    if all(small.values()):
        yield (
            f"A layer that does next to nothing: {span(small['inference'], ' µs')} more for a "
            f"call, {span(small['training'], ' µs')} for a step."
        )


def _keeping(results: Sequence[Result], device: str) -> Iterator[list[str]]:
    """The case `inference`: computed, cached and frozen."""
    rows: dict[tuple[str, str], dict[str, list[float]]] = {}
    for comparison in comparisons(results, "inference", device=device):
        times = rows.setdefault((comparison["shapes"], str(comparison["batch"])), {})
        for name in _KEPT:
            if name in comparison["contenders"]:
                figure = comparison["contenders"][name]["fixed"]["ratio"]
                times.setdefault(name, []).append(figure)
    for (shapes, batch), times in rows.items():
        layer, _, law = shapes.rpartition(", ")
        if max(times.get(_KEPT[0], [0])) > _LITTLE:
            yield [layer, f"`{law}`", batch, *(span(times.get(name, []), "") for name in _KEPT)]


# Other libraries --------------------------------------------------------------------------


def _peers(results: Sequence[Result]) -> str:
    """Our time as a share of each other library's."""
    rows = []
    pairs: dict[tuple[str, str], dict[str, list[float]]] = {}
    for comparison in comparisons(results, "peers"):
        contenders = comparison["contenders"]
        mine = contenders["tiedparam"]["fixed"]["ratio"]
        for name, figures in contenders.items():
            if name not in ("dense", "tiedparam"):
                modes = pairs.setdefault((comparison["shapes"], name), {})
                gain = figures["fixed"]["ratio"] / mine
                modes.setdefault(comparison["mode"], []).append(gain)
    for (shapes, name), modes in pairs.items():
        rows.append(
            [shapes, name, *(span(modes.get(mode, [])) for mode in ("inference", "training"))]
        )
    if not rows:
        return ""
    head = ["layer", "other library", "inference", "training step"]
    return (
        "## Against other libraries\n\n"
        "How many times faster a tied layer is than the same law in another library; below 1, it\n"
        "is slower. e2cnn keeps its filters in evaluation mode, as `frozen` would.\n\n"
        + table(head, rows)
    )


# Machines ---------------------------------------------------------------------------------


def _name(machine: dict[str, Any]) -> str:
    return f"{machine['name']} ({machine['used by torch']})"


def _machines(results: Sequence[Result]) -> str:
    text = f"The machines: {'; '.join(map(_name, machines(results)))}. "
    if any(machine["limits"] for machine in machines(results)):
        text += "*Limited* means that wider instructions, which the processor has, were not used. "
    text += (
        f"[Benchmarks]({FOLDER}/index.md) has the full tables of each, how it is measured, which "
        "goals are met and which are not, and the command that measures yours."
    )
    return "## Machines\n\n" + fill(text)
