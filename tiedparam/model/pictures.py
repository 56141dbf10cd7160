"""Pictures of weights and of the patterns in them. Each function returns a matplotlib figure.

None shows or saves it. What is drawn of a weight is its corner: blocks of kernels, outputs down and
inputs across, as `mosaic` lays them out, whatever the order in which the layer stores them.
matplotlib is imported when a picture is asked for, and no state of it (pyplot, styles) is touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib import import_module
from textwrap import fill
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tiedparam.laws.layout import Layout
from tiedparam.laws.rule import Rule
from tiedparam.model.mosaic import mosaic, mosaic_with_gaps, shape_text
from tiedparam.model.orbit_colours import COLOURS, colours_of, parts_of
from tiedparam.model.orbit_numbers import FIXED, ZERO, Origins, first_of_each, origins_of, texts_of
from tiedparam.tie.lookup import find_tie, tie_of
from tiedparam.tie.sources import refuse_exchanged
from tiedparam.tie.write_guard import unguard
from tiedparam.util.errors import TieError, describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CORNER = 8
"""How many outputs and inputs of a weight are drawn, unless something else is asked for."""
INK = "#222222"
_PAPER = (1.0, 1.0, 1.0)
MOST_NUMBERS = 1024
"""How many cells a picture may have, those between the kernels too, to have numbers in them."""
_SMALLEST, _LARGEST = 5.5, 10.0  # the type of the numbers, in points


def draw_orbits(layer: nn.Module, tensor_name: str = "weight", *, corner: int = CORNER) -> Figure:
    """The tying pattern of a weight: entries of one number share one stored value.

    Args:
        layer: a tied layer.
        tensor_name: which tensor.
        corner: how many outputs and inputs to draw.

    Returns:
        The figure: outputs down, inputs across, a block for each kernel, in the canonical layout.
        Each cell is an entry. It has the number of its stored value, 1, 2, 3, … in reading order
        (kernel by kernel, over the whole weight), with a minus where it is minus that value; ``0``
        or ``v`` where the law fixes it to zero or to another number; and ``f`` where it is a
        function of several values. A copy has the numbers of its source's entries. A dark frame
        marks the first entry of each stored value. Cells of one number have one colour, and those
        that touch others have clearly another, for colour-blind readers too. Beyond 48 values
        colours come again.

        The title has the rule, the law and how many values are stored, and says where only a corner
        is drawn. Of more than 1,024 cells, or where type would be smaller than 5.5 points, numbers
        are left out, and strokes stand for the minuses; the note below the picture says so, and
        which ``corner=`` has numbers.

    Raises:
        TieError: if the tensor is not tied, or matplotlib is not installed.

    Example:
        >>> figure = tp.draw_orbits(tp.register_tie(nn.Linear(4, 4), "flip_sym"))
        >>> figure.savefig("orbits.png")
        >>> print(figure.axes[0].get_title())
        flip_sym: W[i, j, x] = W[j, i, flip(x)]
        4×4, 10 of 16 values stored
        >>> [text.get_text() for text in figure.axes[0].texts]  # row by row
        ['1', '2', '3', '4', '2', '5', '6', '7', '3', '6', '8', '9', '4', '7', '9', '10']
    """
    tie = tie_of(layer, tensor_name)
    refuse_exchanged(tie.values)
    rule = tie.rule
    layout, origins = rule.bound_layout, origins_of(rule)
    cells = texts_of(origins, corner)
    numbers = mosaic(origins.numbers, corner)
    side, type_size = _sizes(numbers.shape, cells)
    height, width = (side * count for count in numbers.shape)
    figure, (axes,) = new_figure(1, size=(max(5.0, width + 1), height + 2))
    colours = colours_of(mosaic(origins.numbers, corner, gap=0))
    image = [[_PAPER] * numbers.shape[1] for _ in range(len(numbers))]
    for y, x, _ in cells:
        image[y][x] = parts_of(colours[abs(int(numbers[y, x]))])
    axes.imshow(image, interpolation="nearest")
    if not rule.reads_layers:
        frame(axes, mosaic(first_of_each(origins.numbers), corner))
    if type_size:
        for y, x, text in cells:
            inside = axes.text(x, y, text, size=type_size, ha="center", va="center", color=INK)
            inside.set_in_layout(False)  # measuring hundreds of them takes long
    else:
        for y, x in (numbers < 0).nonzero().tolist():
            axes.plot([x - 0.3, x + 0.3], [y, y], color=INK)
    name_axes(axes, layer, layout.canonical_shape, corner, layout.groups)
    lines = _title_of_orbits(rule, layer, corner)
    axes.set_title(_wrapped(lines, figure.get_figwidth() * 12), size=10)
    note = _note_on(rule, origins, corner, cells, numbers=bool(type_size))
    figure.supxlabel(_wrapped([note], figure.get_figwidth() * 15), size=8, color=INK)
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
        titles: what to write above them, or above the one. By default what each is: its layer,
            shape and law.
        tensor_name: which tensor of the layers.
        corner: how many outputs and inputs to draw; the axes say how many there are.

    Returns:
        The figure: red is positive, blue negative. Of a layer, outputs go down and inputs across;
        a tensor, of which that is not known, is drawn as it lies.

    Raises:
        TieError: if a layer has no such tensor, or matplotlib is not installed.

    Example:
        >>> dense, tied = nn.Linear(4, 4), tp.register_tie(nn.Linear(4, 4), "flip_sym")
        >>> figure = tp.draw_weights([dense, tied])
        >>> for axes in figure.axes[:2]:
        ...     print(axes.get_title())
        weight of Linear, 4×4
        not tied
        weight of Linear, 4×4
        tied by flip_sym
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
    figure, axes = new_figure(len(shown))
    figure.set_layout_engine("constrained", wspace=0.1)
    for number, value in enumerate(shown):
        image = axes[number].imshow(
            value.numpy(), cmap="RdBu_r", vmin=-scale, vmax=scale, interpolation="nearest"
        )
        weight, layout = weights[number], layouts[number]
        shape = layout.canonical_shape
        name_axes(axes[number], weight, shape, corner, layout.groups)
        title = titles[number] if number < len(titles) else _what(weight, tensor_name, shape)
        axes[number].set_title(title, size=10)
    figure.colorbar(image, ax=axes, shrink=0.7, label="value")
    return figure


# Orbits ------------------------------------------------------------------------------------


def _sizes(
    shape: Sequence[int], cells: Sequence[tuple[int, int, str]]
) -> tuple[float, float | None]:
    """The side of a cell in inches, and the type of its number in points; None has no numbers."""
    longest = max(len(text) for _, _, text in cells)
    digit = 0.62 / 72  # of the type's size, in inches
    side = min(max(0.34, longest * digit * 7 / 0.85), 8.5 / max(shape))
    size = min(_LARGEST, 0.85 * side / (longest * digit), 0.6 * side * 72)
    return side, size if size >= _SMALLEST and math.prod(shape) <= MOST_NUMBERS else None


def _title_of_orbits(rule: Rule, layer: nn.Module, corner: int) -> list[str]:
    shape = rule.bound_layout.canonical_shape
    stored = f"{rule.free_count:,} of {math.prod(shape):,} values stored"
    lines = [f"{rule}: {rule.law}", f"{shape_text(shape)}, {stored}"]
    cut = [
        f"{corner:,} of {count:,} {name}"
        for name, count in zip(axis_names(layer, 1), shape, strict=False)
        if count > corner
    ]
    return [*lines, f"a corner, the first {', '.join(cut)}"] if cut else lines


def _note_on(
    rule: Rule,
    origins: Origins,
    corner: int,
    cells: Sequence[tuple[int, int, str]],
    *,
    numbers: bool,
) -> str:
    """What the marks of a picture mean: only of those that it has."""
    texts = {text for _, _, text in cells}
    values = {text.lstrip("−") for text in texts} - {ZERO, FIXED, "f"}
    said = []
    if values and rule.reads_layers:
        said.append("Numbers and colours are those of the source's entries, in reading order.")
    elif values:
        what = "number" if numbers else "colour"
        said.append(f"One {what}, one stored value; its first entry is framed.")
    if any(text.startswith("−") for text in texts):
        said.append(f"{'A minus' if numbers else 'A stroke'}: minus the value.")
    fixed = [text for text in (ZERO, FIXED) if text in texts]
    if fixed:
        said.append(f"{' and '.join(fixed) if numbers else 'Grey'}: fixed by the law.")
    if bool(origins.computed.any()):
        what = "f" if numbers else "Grey"
        said.append(f"{what}: computed from several values, so no one value could be numbered.")
    if not numbers:
        said.append(
            f"{len(cells):,} entries are too many for numbers{_with_numbers(origins, corner)}."
        )
    if len(values) > COLOURS:
        said.append(f"{len(values):,} values in {COLOURS} colours, which come again.")
    return " ".join(said)


def _with_numbers(origins: Origins, corner: int) -> str:
    """Which corner would have numbers."""
    most = min(corner - 1, math.isqrt(MOST_NUMBERS))
    for smaller in range(most, 0, -1):
        shape = mosaic(origins.computed, smaller).shape
        if math.prod(shape) <= MOST_NUMBERS and _sizes(shape, texts_of(origins, smaller))[1]:
            return f"; corner={smaller} has them"
    return ""


def _wrapped(lines: Iterable[str], width: float) -> str:
    return "\n".join(fill(line, int(width)) for line in lines)


def frame(axes: Any, where: Tensor) -> None:
    """Put a dark frame around the fields of a picture where ``where`` is true."""
    patches = needed("matplotlib.patches")
    for y, x in where.nonzero().tolist():
        field = patches.Rectangle((x - 0.42, y - 0.42), 0.84, 0.84, fill=False, color=INK)
        field.set_in_layout(False)
        axes.add_patch(field)


# Weights -----------------------------------------------------------------------------------


def _values_of(weight: nn.Module | Tensor, tensor_name: str) -> Tensor:
    found = getattr(weight, tensor_name, None) if isinstance(weight, nn.Module) else weight
    if not isinstance(found, Tensor):
        where = describe(weight, tensor_name) if isinstance(weight, nn.Module) else repr(weight)
        raise TieError(
            where, f"{where} is not a tensor that could be drawn.", "Name one with tensor_name=."
        )
    return unguard(found).detach().to("cpu", torch.float32)


def _what(weight: nn.Module | Tensor, tensor_name: str, shape: Sequence[int]) -> str:
    """The title of what has none."""
    if isinstance(weight, Tensor):
        return f"tensor, {shape_text(shape)}"
    tie = find_tie(weight, tensor_name)
    kind = type(weight).__name__.removeprefix("Tied")
    tied = "not tied" if tie is None else f"tied by {tie.rule}"
    return f"{tensor_name} of {kind}, {shape_text(shape)}\n{fill(tied, 60)}"


# What all pictures share -------------------------------------------------------------------


def name_axes(
    axes: Any, drawn: nn.Module | Tensor, shape: tuple[int, ...], corner: int, groups: int
) -> None:
    """Say what goes down and across, and how much of it is not drawn."""
    names = axis_names(drawn, groups)
    texts = [
        f"{name} (the first {corner:,} of {count:,})" if count > corner else name
        for name, count in zip(names, shape, strict=False)  # a bias has outputs alone
    ]
    if math.prod(shape[2:]) > 1:
        texts[1] += f", {'×'.join(map(str, shape[2:]))} values each"
    for name, text in zip(("ylabel", "xlabel"), texts, strict=False):
        axes.set(**{name: text})


def axis_names(drawn: nn.Module | Tensor, groups: int) -> tuple[str, str]:
    """What goes down and across."""
    if isinstance(drawn, Tensor):
        return "axis 0", "axis 1"
    if isinstance(drawn, (nn.Embedding, nn.EmbeddingBag)):
        return "embeddings", "features"
    return "outputs", "inputs of the output's group" if groups > 1 else "inputs"


def new_figure(
    panels: int, *, framed: bool = False, size: tuple[float, float] | None = None
) -> tuple[Figure, list[Any]]:
    """A figure with panels side by side, without ticks and frames unless ``framed``."""
    figure = needed("tiedparam.model.shown_figure").ShownFigure(
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
