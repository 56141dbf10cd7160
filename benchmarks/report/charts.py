"""The charts of docs/speed.md, from the case `scaling`; matplotlib is imported here only.

Each picture carries a digest of the figures it was drawn from, so that a test can say whether it
is current without drawing it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases.families import FAMILIES, Family
from benchmarks.report.results import Comparison, Result, comparisons, gains, of_case

FOLDER = "charts"
"""Of the pictures, below the documents."""
_INFERENCE, _TRAINING = "#1f77b4", "#d95f02"
_MODES = {"inference": _INFERENCE, "training": _TRAINING}


def digest(results: Sequence[Result], device: str = "cpu") -> str:
    """Of all figures that the charts show."""
    shown = [(r["machine"]["key"], r["comparisons"]) for r in of_case(results, "scaling", device)]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def write(results: Sequence[Result], folder: Path) -> bool:
    """Draw the charts of every device. Returns False where matplotlib is missing."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    style = {"svg.hashsalt": "charts", "svg.fonttype": "none", "font.family": "sans-serif",
             "font.size": 8, "axes.titlesize": 8, "axes.spines.top": False,
             "axes.spines.right": False}  # fmt: skip
    with mpl.rc_context(style):
        for device in dict.fromkeys(result["device"] for result in results):
            if not of_case(results, "scaling", device):
                continue
            metadata = {"Date": None, "Creator": None, "Description": digest(results, device)}
            for name, draw in CHARTS.items():
                figure = draw(results, device)
                figure.savefig(folder / f"{device}-{name}.svg", metadata=metadata)
    return True


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _points(
    results: Sequence[Result], device: str, family: Family, mode: str, along: str
) -> list[Comparison]:
    """Along sizes or batches, the other one at its usual value."""
    size, batch = family.usual
    fixed = {"batch": batch} if along == "size" else {"size": size}
    found = comparisons(results, "scaling", device=device, family=family.title, mode=mode, **fixed)
    return sorted(found, key=lambda comparison: comparison[along])


def bars(results: Sequence[Result], device: str) -> Any:
    """How many times faster than dense, at the usual size; a line spans the machines."""
    figure = _figure(7.5, 3.6)
    panel = figure.subplots()
    places = range(len(FAMILIES))[::-1]
    for offset, (mode, colour) in zip((0.19, -0.19), _MODES.items(), strict=True):
        for place, family in zip(places, FAMILIES, strict=True):
            size, batch = family.usual
            found = gains(comparisons(results, "scaling", device=device, family=family.title,
                                      size=size, batch=batch, mode=mode))  # fmt: skip
            if not found:
                continue
            least, most = min(found), max(found)
            at = place + offset
            panel.barh(
                at, least - 1, 0.36, left=1, color=colour, label=mode if place == 0 else None
            )
            panel.plot([least, most], [at, at], color="black", linewidth=1)
            end, side = (most, "left") if least >= 1 else (least, "right")
            panel.annotate(f"{least:.2g}", (end, at), (3 if side == "left" else -3, 0),
                           textcoords="offset points", va="center", ha=side,
                           fontsize=6.5)  # fmt: skip
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set(xscale="log", xlabel="times faster than the dense layer (the least of the machines)")
    panel.set_yticks(list(places), [f"{f.title}: {f.label(f.usual[0])}" for f in FAMILIES])
    panel.xaxis.set_major_formatter("{x:g}")
    panel.margins(x=0.12)
    panel.legend(frameon=False, loc="lower right")
    return figure


def sizes(results: Sequence[Result], device: str) -> Any:
    """Time against size on log axes, with the dense layer and the limit as lines."""
    figure = _figure(10, 4.6)
    first = of_case(results, "scaling", device)[:1]
    panels = figure.subplots(2, (len(FAMILIES) + 1) // 2).flat
    for panel, family in zip(panels, FAMILIES, strict=False):
        for mode, style in (("inference", "-"), ("training", "--")):
            points = _points(first, device, family, mode, "size")
            at = [p["size"] for p in points]
            for name, colour in (("dense", "grey"), ("tiedparam", _INFERENCE)):
                times = [p["contenders"][name]["fixed"]["ms"] for p in points]
                panel.plot(at, times, style, color=colour, marker="o", markersize=2, linewidth=1.2,
                           label=f"{'tied' if name != 'dense' else name}, {mode}")  # fmt: skip
            if mode == "inference":
                limit = [p["contenders"]["dense"]["fixed"]["ms"] * p["limit"] for p in points]
                panel.plot(at, limit, ":", color="black", linewidth=1,
                           label="limit: operations of the law")  # fmt: skip
        panel.set(xscale="log", yscale="log", title=family.title)
        panel.set_xticks(at, [f"{n // 1024}k" if n >= 1024 else str(n) for n in at])
        panel.minorticks_off()
        panel.yaxis.set_major_formatter("{x:g}")
    figure.supylabel("ms per call", fontsize=8)
    figure.supxlabel("features of a Linear layer, 64 rows; channels of a convolution, batch 8",
                     fontsize=8)  # fmt: skip
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
    return figure


def rows(results: Sequence[Result], device: str) -> Any:
    """Gain against the number of rows, the least of the machines."""
    from matplotlib import colormaps

    figure = _figure(8, 3.4)
    panels = figure.subplots(1, 2, sharey=True)
    linear = [family for family in FAMILIES if family.convolution is None]
    for panel, mode in zip(panels, _MODES, strict=True):
        for family, colour in zip(linear, colormaps["tab10"].colors, strict=False):
            points = _points(results, device, family, mode, "batch")
            at = list(dict.fromkeys(p["batch"] for p in points))
            least = [min(gains(p for p in points if p["batch"] == n)) for n in at]
            panel.plot(at, least, marker="o", markersize=3, color=colour, label=family.title)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set(xscale="log", yscale="log", title=mode, xlabel="rows")
        panel.set_xticks(at, [str(n) for n in at])
        panel.minorticks_off()
        panel.yaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel("times faster than dense")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", frameon=False)
    return figure


CHARTS: dict[str, Callable[[Sequence[Result], str], Any]] = {
    "gains": bars,
    "sizes": sizes,
    "rows": rows,
}
