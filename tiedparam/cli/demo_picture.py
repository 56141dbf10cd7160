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
    "A corner of each weight: red is positive, blue negative, each block on its own scale. "
    "Framed: a stored value. Not framed: computed by the law.\n"
    "Outputs go down, inputs across. The marks show where three of the stored values are used. "
    "Above the model as trained, below its copies, tied and fine-tuned."
)


@dataclass(frozen=True)
class Drawn:
    """One column of the picture.

    Attributes:
        rule: the name of the rule.
        law: its equation.
        above: what is said of the dense layers.
        below: what is said of the tied ones.
        dense: the trained layers by their paths; a copy comes after its source.
        tied: the same layers, tied and fine-tuned.
    """

    rule: str
    law: str
    above: str
    below: str
    dense: Mapping[str, nn.Module]
    tied: Mapping[str, nn.Module]


def draw(laws: Sequence[Drawn], out: Path) -> None:
    """One column per law: the trained weight above, the tied and fine-tuned one below."""
    size = (2.8 * len(laws), 7.3)  # inches; narrower columns would run into each other
    figure = needed("matplotlib.figure").Figure(figsize=size, facecolor="white")
    for column, law in zip(figure.subfigures(1, len(laws)), laws, strict=True):
        write = partial(column.text, 0.5, ha="center", color=INK)
        write(y=0.945, s=law.rule, size=15, weight="bold")
        write(y=0.905, s=law.law, size=10.5)
        write(y=0.86, s=law.above, size=10.5)
        write(y=0.46, s=law.below, size=10.5)
        _draw_layers(column, law.dense, bottom=0.48, marked=False)
        _draw_layers(column, law.tied, bottom=0.08, marked=True)
    figure.text(0.5, 0.02, CAPTION, ha="center", size=11, color=INK, linespacing=1.5)
    figure.savefig(out, format="png", dpi=120)


def _draw_layers(
    column: Any, layers: Mapping[str, nn.Module], *, bottom: float, marked: bool
) -> None:
    panels = [corner_of(layer, CELLS // len(layers)) for layer in layers.values()]
    marks = busiest(panels) if marked else []
    height = 0.37 / len(layers)
    for number, (path, panel) in enumerate(zip(layers, panels, strict=True), 1):
        axes = column.add_axes((0.1, bottom + 0.37 - number * height, 0.8, height))
        axes.set_ylabel(path, size=10, color=INK, labelpad=1)
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
