"""The picture of the demo: for each law the corner of a weight, as trained and tied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tiedparam.model.mosaic import mosaic, mosaic_with_gaps
from tiedparam.model.orbit_numbers import first_of_each, orbit_numbers
from tiedparam.model.pictures import INK, frame, needed
from tiedparam.tie.lookup import get_tie, is_tied

CELLS = 12
"""A panel shows a corner of 12 × 12 entries: the kernels of 4 × 4 channels, or a matrix."""
CAPTION = (
    "A corner of each weight, outputs down and inputs across, on a scale of its own: red is\n"
    "positive, blue negative. Left the trained model, right a copy of it, tied and fine-tuned.\n"
    "Framed: a stored value. Not framed: computed by the law. The marks show where three stored\n"
    "values are used. In per cent: digits that were not trained on and are read right."
)
_LAW, _CAPTION = (5.0, 3.05), 1.05
"""The width and height of what is drawn of a law, and the height of the caption, in inches."""


@dataclass(frozen=True)
class Drawn:
    """What is drawn of one law.

    Attributes:
        rule: the name of the rule.
        law: its equation.
        before: what is said of the dense layers.
        after: what is said of the tied ones.
        dense: the trained layers by their paths; a copy comes after its source.
        tied: the same layers, tied and fine-tuned.
    """

    rule: str
    law: str
    before: str
    after: str
    dense: Mapping[str, nn.Module]
    tied: Mapping[str, nn.Module]


def draw(laws: Sequence[Drawn], out: Path) -> None:
    """Two laws in a row: of each the trained weight, and beside it the tied and fine-tuned one."""
    rows = (len(laws) + 1) // 2
    size = (2 * _LAW[0], rows * _LAW[1] + _CAPTION)  # inches
    figure = needed("matplotlib.figure").Figure(figsize=size, facecolor="white")
    below, captions = figure.subfigures(2, 1, height_ratios=(rows * _LAW[1], _CAPTION))
    for place, law in zip(below.subfigures(rows, 2).flat, laws, strict=False):
        write = partial(place.text, color=INK)
        write(0.06, 0.89, law.rule, size=15, weight="bold")
        write(0.97, 0.89, law.law, size=12, ha="right")
        for left, said, layers in ((0.06, law.before, law.dense), (0.55, law.after, law.tied)):
            write(left + 0.21, 0.8, said, size=11.5, ha="center")
            _draw_layers(place, layers, left=left, marked=layers is law.tied)
    captions.text(0.03, 0.9, CAPTION, va="top", size=11.5, color=INK, linespacing=1.5)
    figure.savefig(out, format="png", dpi=120)


def _draw_layers(place: Any, layers: Mapping[str, nn.Module], *, left: float, marked: bool) -> None:
    panels = [corner_of(layer, CELLS // len(layers)) for layer in layers.values()]
    marks = busiest(panels) if marked else []
    height = 0.73 / len(layers)
    for number, (path, panel) in enumerate(zip(layers, panels, strict=True), 1):
        axes = place.add_axes((left, 0.77 - number * height, 0.42, height))
        axes.set_ylabel(path, size=11, color=INK, labelpad=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        scale = float(panel.values.nan_to_num(0).abs().max())
        axes.imshow(panel.values, cmap="RdBu_r", vmin=-scale, vmax=scale, interpolation="nearest")
        for lines, count in (
            (axes.axhline, len(panel.values)),
            (axes.axvline, panel.values.shape[1]),
        ):
            for edge in range(1, count):  # between entries
                lines(edge - 0.5, color="white", linewidth=1.5, zorder=0.5)
        frame(axes, panel.stored)
        for label, shape in zip(marks, "o^s", strict=False):
            y, x = (panel.labels == label).nonzero(as_tuple=True)
            axes.plot(x, y, shape, markerfacecolor="white", markeredgecolor=INK, markersize=6)


@dataclass(frozen=True)
class Panel:
    """A corner of a weight as matrices, with gaps between the kernels.

    Attributes:
        values: the entries; NaN in the gaps.
        labels: the number of the stored value that each entry shows; 0 in the gaps.
        stored: whether the entry stands for its stored value: the first that shows it.
    """

    values: Tensor
    labels: Tensor
    stored: Tensor


def corner_of(layer: nn.Module, rows: int) -> Panel:
    """``rows`` × `CELLS` entries of a layer's weight, and where they come from."""
    weight = cast(Tensor, layer.weight).detach()
    if is_tied(layer):
        rule = get_tie(layer)
        labels = orbit_numbers(rule).abs()
        # a copy stores nothing
        stored = first_of_each(labels) if rule.free_count else torch.zeros_like(labels).bool()
    else:
        labels = torch.arange(1, weight.numel() + 1, device="cpu").reshape(weight.shape)
        stored = torch.ones_like(labels).bool()
    kernel = weight.shape[-1] if weight.dim() == 4 else 1
    outputs, inputs = rows // kernel, CELLS // kernel
    return Panel(
        mosaic_with_gaps(weight[:outputs], inputs),
        mosaic(labels[:outputs], inputs),
        mosaic(stored[:outputs], inputs),
    )


def busiest(panels: Sequence[Panel]) -> list[int]:
    """The labels of the three largest stored values that show more than once."""
    seen = torch.cat([panel.labels.flatten() for panel in panels]).tolist()
    first = panels[0]
    sizes = first.values.abs().masked_fill(~first.stored, 0).flatten()
    order = sizes.argsort(descending=True)[: int(first.stored.sum())]
    labels = first.labels.flatten()[order].tolist()
    return [label for label in labels if seen.count(label) > 1][:3]
