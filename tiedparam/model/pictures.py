"""Pictures of ties and scans. Every function returns a matplotlib figure; none shows or saves it.

What is drawn of a weight is its corner: blocks of kernels, outputs down and inputs across, as
`mosaic` lays them out, whatever the order in which the layer stores them. matplotlib is imported
when a picture is asked for, and no state of it (pyplot, styles) is touched.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tiedparam.laws.layout import Layout
from tiedparam.laws.rule import Rule
from tiedparam.model.scan_report import Candidate, ScanReport
from tiedparam.tie.lookup import tie_of
from tiedparam.tie.sources import refuse_exchanged
from tiedparam.tie.write_guard import unguard
from tiedparam.util.errors import TieError, describe, key_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CORNER = 8
"""How many outputs and inputs of a weight are drawn, unless something else is asked for."""
INK = "#222222"
_PAPER = (1.0, 1.0, 1.0)
_MOST_ROWS = 40


def draw_orbits(layer: nn.Module, tensor_name: str = "weight", *, corner: int = CORNER) -> Figure:
    """The tying pattern of a weight: entries of one colour share one stored value.

    Args:
        layer: a tied layer.
        tensor_name: which tensor.
        corner: how many outputs and inputs to draw.

    Returns:
        The figure: outputs down, inputs across, in the canonical layout. A dark frame marks the
        first entry of each orbit, a stroke an entry that is minus its stored value. Entries of a
        copy have the colours of its source's entries.

    Raises:
        TieError: if the tensor is not tied, or matplotlib is not installed.

    Example:
        >>> figure = tp.draw_orbits(tp.register_tie(nn.Linear(4, 4), "flip_sym"))
        >>> figure.savefig("orbits.png")
        >>> print(figure.axes[0].get_title())
        flip_sym: W[i, j, x] = W[j, i, flip(x)]
        4×4, 10 of 16 values stored
    """
    tie = tie_of(layer, tensor_name)
    refuse_exchanged(tie.values)
    rule = tie.rule
    figure, axes = _figure(1)
    numbers = orbit_numbers(rule)
    shown = mosaic(numbers.abs(), corner).tolist()
    colours = [[orbit_colour(n) if n else _PAPER for n in row] for row in shown]
    axes[0].imshow(colours, interpolation="nearest")
    if not rule.reads_layers:
        frame(axes[0], mosaic(first_of_each(numbers), corner))
    for y, x in (mosaic(numbers, corner) < 0).nonzero().tolist():
        axes[0].plot([x - 0.3, x + 0.3], [y, y], color=INK)
    shape = rule.bound_layout.canonical_shape
    _name_axes(axes[0], layer, shape, corner, rule.bound_layout.groups)
    stored = f"{rule.free_count:,} of {numbers.numel():,} values stored"
    axes[0].set_title(f"{rule}: {rule.law}\n{'×'.join(map(str, shape))}, {stored}", size=10)
    return figure


def draw_weights(
    weights: nn.Module | Tensor | Sequence[nn.Module | Tensor],
    titles: str | Sequence[str] = (),
    tensor_name: str = "weight",
    *,
    corner: int = CORNER,
) -> Figure:
    """Weights side by side on one scale of colours: dense against tied, say.

    Args:
        weights: layers, tied or not, or tensors; or one of them.
        titles: what to write above them, or above the one.
        tensor_name: which tensor of the layers.
        corner: how many outputs and inputs to draw.

    Returns:
        The figure: red is positive, blue negative. Of a layer, outputs go down and inputs across;
        a tensor, of which that is not known, is drawn as it lies.

    Raises:
        TieError: if a layer has no such tensor, or matplotlib is not installed.

    Example:
        >>> dense, tied = nn.Linear(4, 4), tp.register_tie(nn.Linear(4, 4), "flip_sym")
        >>> figure = tp.draw_weights([dense, tied], ["dense", "tied"])
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['dense', 'tied']
    """
    if isinstance(weights, (nn.Module, Tensor)):
        weights = [weights]
    if isinstance(titles, str):
        titles = [titles]
    values = [_values_of(weight, tensor_name) for weight in weights]
    if not values:
        raise TieError(
            "draw_weights", "draw_weights has no weight to draw.", "Pass layers or tensors."
        )
    layouts = [
        Layout.of(weight, tensor_name, tuple(value.shape))
        if isinstance(weight, nn.Module)
        else Layout(tuple(value.shape))
        for weight, value in zip(weights, values, strict=True)
    ]
    shown = [
        mosaic_with_gaps(layout.canonical(value), corner)
        for layout, value in zip(layouts, values, strict=True)
    ]
    scale = max(float(value.abs().nan_to_num(0).max()) for value in shown) or 1.0
    figure, axes = _figure(len(shown))
    figure.set_layout_engine("constrained", wspace=0.1)
    for number, value in enumerate(shown):
        image = axes[number].imshow(
            value.numpy(), cmap="RdBu_r", vmin=-scale, vmax=scale, interpolation="nearest"
        )
        layout = layouts[number]
        shape = layout.canonical_shape
        _name_axes(axes[number], weights[number], shape, corner, layout.groups)
        if number < len(titles):
            axes[number].set_title(titles[number], size=10)
    figure.colorbar(image, ax=axes, shrink=0.7, label="value")
    return figure


def draw_residuals(report: ScanReport) -> Figure:
    """The residuals of every layer against what a random tensor has.

    Args:
        report: what `scan` returned.

    Returns:
        The figure: a row for each tensor, a dot for each rule at its residual, joined to a stroke
        where a random tensor of the same mean and spread lies. A dot far to the left of its
        stroke is a law that is kept.
        Of a large model the tensors with the clearest finds are drawn, and the title says how
        many there are.

    Raises:
        TieError: if there is nothing to draw, or matplotlib is not installed.

    Example:
        >>> figure = tp.draw_residuals(tp.scan(nn.Linear(8, 8), ["flip_sym", "row_repeat"]))
        >>> figure.savefig("residuals.png")
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['weight', 'bias']
    """
    candidates, rows, title = _clearest(report)
    kinds = sorted({_kind(c) for c in candidates})
    figure, (axes,) = _figure(1, framed=True, size=(9, 2 + 0.3 * len(rows)))
    for number, kind in enumerate(kinds):
        height = 0.3 - 0.6 * number / max(1, len(kinds) - 1)  # rules side by side in a row
        drawn = [c for c in candidates if _kind(c) == kind]
        y = [rows.index(_name(c)) + height for c in drawn]
        residuals, expected = [c.residual for c in drawn], [c.expected for c in drawn]
        axes.hlines(y, residuals, expected, color=f"C{number % 10}", linewidth=0.8)
        axes.plot(expected, y, "|", color=INK, markersize=5)
        axes.plot(residuals, y, "o", color=f"C{number % 10}", markersize=4, label=kind)
    axes.set_yticks(range(len(rows)), rows, size=8)
    axes.set(xlabel="residual, and where a random tensor lies", ylabel="tensor")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_title(f"{title} tensors", size=10)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def draw_scan(report: ScanReport) -> Figure:
    """A scan as a heat map: tensors down, rules across, residuals relative to random tensors.

    Args:
        report: what `scan` returned.

    Returns:
        The figure: dark is near to the law, and a field is empty where a rule does not fit.
        Copies show their nearest source. Of a large model the tensors with the clearest
        finds are drawn, and the title says how many there are.

    Raises:
        TieError: if there is nothing to draw, or matplotlib is not installed.

    Example:
        >>> figure = tp.draw_scan(tp.scan(nn.Linear(8, 8), ["flip_sym", "row_repeat"]))
        >>> figure.savefig("scan.png")
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['flip_sym', 'flip_sym(sign=-1)', 'row_repeat(groups=1)']
    """
    candidates, rows, title = _clearest(report)
    columns = sorted({_kind(c) for c in candidates})
    values = [[math.nan] * len(columns) for _ in rows]
    for c in candidates:
        row, column = rows.index(_name(c)), columns.index(_kind(c))
        if c.relative is not None and not values[row][column] <= c.relative:
            values[row][column] = c.relative  # a copy: of its nearest source
    figure, (axes,) = _figure(1, framed=True, size=(3 + 0.5 * len(columns), 2 + 0.22 * len(rows)))
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", size=8)
    axes.set_yticks(range(len(rows)), rows, size=8)
    axes.set(xlabel="law", ylabel="tensor")
    axes.set_title(f"{title} tensors: residual / that of a random tensor", size=10)
    figure.colorbar(image, ax=axes, label="relative")
    return figure


# What is drawn -----------------------------------------------------------------------------


def orbit_numbers(rule: Rule) -> Tensor:
    """For each entry of a bound rule's weight the number of the stored value it comes from.

    Returns:
        Numbers from 1 in the canonical layout, negative where the entry is minus the value. For a
        copy the number of the source's entry, if each entry comes from one; 0 where it is a
        function of several values.
    """
    layout, sources = rule.bound_layout, list(rule.sources())
    if rule.has_orbits:
        return layout.canonical(rule.orbit_labels())
    if len(sources) > 1 or rule.free_count:
        return layout.canonical(torch.zeros(layout.shape, dtype=torch.int64, device="cpu"))
    ((source, name),) = sources
    shape = unguard(getattr(source, name)).shape
    numbers = torch.arange(1, shape.numel() + 1, dtype=torch.float64, device="cpu").reshape(shape)
    # each entry is some f(number): the chain rule, along the numbers and along ones
    scaled, slope = (
        torch.func.jvp(rule.forward, (numbers,), (along,))[1]
        for along in (numbers, torch.ones_like(numbers))
    )
    origins: Tensor = (scaled / slope).round().nan_to_num(0)
    return layout.canonical(origins.to(torch.int64))


def first_of_each(numbers: Tensor) -> Tensor:
    """True at the first entry of every orbit; entries that are fixed, and have none, are 0."""
    flat = numbers.abs().flatten()
    order = torch.arange(len(flat), device="cpu")
    none = torch.full((int(flat.max()) + 1,), len(flat), device="cpu")
    first = none.scatter_reduce(0, flat, order, "amin")
    return ((first[flat] == order) & (flat > 0)).reshape(numbers.shape)


def orbit_colour(number: int) -> tuple[float, float, float]:
    """Red, green and blue of a stored value; neighbours differ."""
    # the golden ratio spreads neighbours around the colour circle
    return colorsys.hls_to_rgb(number * 0.618034 % 1, (0.68, 0.76, 0.84)[number % 3], 0.65)


def blocks(tensor: Tensor) -> Tensor:
    """A tensor of any number of axes as ``(outputs, inputs, rows, columns of the kernel)``."""
    while tensor.dim() < 4:  # (out, in) and (out, in, length) have one row to a block
        tensor = tensor.unsqueeze(2 if tensor.dim() > 2 else tensor.dim())
    return tensor.flatten(3)


def mosaic(tensor: Tensor, corner: int) -> Tensor:
    """The corner of a tensor as a matrix: blocks of kernels, zeros between them."""
    four = blocks(tensor)[:corner, :corner]
    outputs, inputs, height, width = four.shape
    gap = 1 if height * width > 1 else 0  # a matrix is drawn without gaps
    padded = four.new_zeros(outputs, height + gap, inputs, width + gap)
    padded[:, :height, :, :width] = four.transpose(1, 2)
    matrix = padded.reshape(outputs * (height + gap), inputs * (width + gap))
    return matrix[: len(matrix) - gap, : matrix.shape[1] - gap]


def mosaic_with_gaps(value: Tensor, corner: int) -> Tensor:
    """`mosaic` of numbers, with NaN between the kernels, which is not drawn."""
    between = mosaic(value.new_ones(value.shape, dtype=torch.bool), corner)
    return mosaic(value, corner).masked_fill(~between, float("nan"))


def frame(axes: Any, where: Tensor) -> None:
    """Put a dark frame around the fields of a picture where ``where`` is true."""
    patches = needed("matplotlib.patches")
    for y, x in where.nonzero().tolist():
        field = patches.Rectangle((x - 0.42, y - 0.42), 0.84, 0.84, fill=False, color=INK)
        axes.add_patch(field)


def _values_of(weight: nn.Module | Tensor, tensor_name: str) -> Tensor:
    found = getattr(weight, tensor_name, None) if isinstance(weight, nn.Module) else weight
    if not isinstance(found, Tensor):
        where = describe(weight, tensor_name) if isinstance(weight, nn.Module) else repr(weight)
        raise TieError(
            where, f"{where} is not a tensor that could be drawn.", "Name one with tensor_name=."
        )
    return unguard(found).detach().to("cpu", torch.float32)


def _clearest(report: ScanReport) -> tuple[list[Candidate], list[str], str]:
    """What to draw of a scan: candidates, the names of their tensors, ``"40 of 50"``."""
    ranked = [c for c in report.ranked() if c.relative is not None and math.isfinite(c.relative)]
    if not ranked:
        raise TieError(
            "the scan",
            "the scan found no tensor that could be drawn.",
            "Scan a model with weights.",
        )
    names = list(dict.fromkeys(map(_name, ranked)))
    kept, drawn = set(names[:_MOST_ROWS]), {id(c) for c in ranked}
    candidates = [c for c in report.candidates if id(c) in drawn and _name(c) in kept]
    rows = list(dict.fromkeys(map(_name, candidates)))
    return candidates, rows, f"{len(rows)} of {len(names)}"


def _name(candidate: Candidate) -> str:
    return key_of(candidate.layer, candidate.tensor_name)


def _kind(candidate: Candidate) -> str:
    return candidate.rule.split(" of ")[0]


def _name_axes(
    axes: Any, drawn: nn.Module | Tensor, shape: tuple[int, ...], corner: int, groups: int
) -> None:
    """Say what goes down and across, and how much of it is not drawn."""
    if isinstance(drawn, Tensor):
        names = ["axis 0", "axis 1"]
    elif isinstance(drawn, (nn.Embedding, nn.EmbeddingBag)):
        names = ["embeddings", "features"]
    else:
        names = ["outputs", "inputs of the output's group" if groups > 1 else "inputs"]
    texts = [
        f"{name} (the first {corner:,} of {count:,})" if count > corner else name
        for name, count in zip(names, shape, strict=False)  # a bias has outputs alone
    ]
    if math.prod(shape[2:]) > 1:
        texts[1] += f", {'×'.join(map(str, shape[2:]))} values each"
    for name, text in zip(("ylabel", "xlabel"), texts, strict=False):
        axes.set(**{name: text})


def _figure(
    panels: int, *, framed: bool = False, size: tuple[float, float] | None = None
) -> tuple[Figure, list[Any]]:
    figure = needed("matplotlib.figure").Figure(
        figsize=size or (5.5 * panels, 5.5), facecolor="white", layout="constrained"
    )
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for each in axes:
        if not framed:
            each.set(xticks=[], yticks=[])
            each.spines[:].set_visible(False)
    return figure, axes


def needed(module: str, who: str = "pictures need", extra: str = "pictures") -> Any:
    """Import a module that only an extra installs.

    Args:
        module: its dotted name.
        who: what needs it, as the message says.
        extra: the extra of the package that brings it along.

    Raises:
        TieError: if it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise TieError(
            f"'{error.name}'",
            f"{who} '{error.name}', which is not installed.",
            f"Run pip install 'tiedparam[{extra}]'.",
        ) from error
