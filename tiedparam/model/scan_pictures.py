"""Pictures of scans. Each function returns a matplotlib figure; none shows or saves it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tiedparam.model.pictures import INK, needed, new_figure
from tiedparam.model.scan_report import NEAR, Candidate, ScanReport
from tiedparam.util.errors import TieError, key_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_ROWS = 40
_MOST_NUMBERS = 400
_FOUND = ("#67001f", "#b2182b", "#d6604d", "#f4a582")  # from 0 on: strong
_OTHERS = ("#d4d4d4", "#f4f4f4")  # from 0 on: pale
_HATCH = {"facecolor": "white", "edgecolor": "#c4c4c4", "hatch": "/////"}
_MARKERS = "osD^v"


def draw_residuals(report: ScanReport) -> Figure:
    """The residuals of every layer against what a random tensor has.

    Args:
        report: what `scan` returned.

    Returns:
        The figure: a row for each tensor, a dot for each law at its residual, ``‖W − L‖ / ‖W‖``
        with ``L`` the nearest lawful weight, joined to a stroke where a random tensor of the same
        mean and spread lies. A dot far to the left of its stroke is a law that is kept. What the
        report's `ScanReport.found` lists is filled, all else is hollow.
        Of a large model the tensors with the clearest finds are drawn, and the title says how
        many there are.

    Raises:
        TieError: if there is nothing to draw, or matplotlib is not installed.

    Example:
        >>> figure = tp.draw_residuals(tp.scan(nn.Linear(8, 8), ["flip_sym", "row_repeat"]))
        >>> figure.savefig("residuals.png")
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['weight', 'bias']
        >>> print(figure.axes[0].get_title())
        Residuals of 2 of 2 tensors, 0 finds
    """
    candidates, rows, title = _clearest(report)
    found = {id(candidate) for candidate in report.found()}
    kinds = sorted({_kind(c) for c in candidates})
    pitch = min(0.5, max(0.3, 0.05 * len(kinds)))  # inches for a row
    tall = max(1 + pitch * len(rows), 1 + 0.17 * (len(kinds) + 3))  # the legend has room, too
    figure, (axes,) = new_figure(1, framed=True, size=(9.5, tall))
    for row in range(0, len(rows), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#f4f4f4", linewidth=0, zorder=0)
    axes.vlines(0, -0.5, len(rows) - 0.5, color="#999999", linewidth=0.8)
    styles = {}
    for number, kind in enumerate(kinds):
        height = 0.35 - 0.7 * number / max(1, len(kinds) - 1)  # laws side by side in a row
        style = {"color": f"C{number % 10}", "marker": _MARKERS[number // 10 % len(_MARKERS)]}
        for filled in (False, True):
            drawn = [c for c in candidates if _kind(c) == kind and (id(c) in found) == filled]
            if not drawn:  # an empty line would count at the figure's corner
                continue
            y = [rows.index(_name(c)) + height for c in drawn]
            residuals, expected = [c.residual for c in drawn], [c.expected for c in drawn]
            axes.hlines(y, residuals, expected, color=style["color"], linewidth=0.8)
            axes.plot(expected, y, "|", color=INK, markersize=5, clip_on=False)
            axes.plot(residuals, y, linestyle="", clip_on=False, zorder=3, **_dot(style, filled))
        styles[kind] = style
    axes.set_yticks(range(len(rows)), rows, size=8)
    axes.set(xlabel="residual ‖W − L‖ / ‖W‖, where L is the nearest lawful weight", ylabel="tensor")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    most = max(max(c.residual, c.expected) for c in candidates) or 1.0
    axes.set_xlim(-0.03 * most, 1.03 * most)  # room for what lies at 0
    count = sum(id(c) in found for c in candidates)
    axes.set_title(f"Residuals of {title} tensors, {_finds(count)}", size=10)
    _explain(axes, styles)
    return figure


def draw_scan(report: ScanReport) -> Figure:
    """A scan as a heat map: tensors down, laws across, residuals relative to random tensors.

    Args:
        report: what `scan` returned.

    Returns:
        The figure: what the report's `ScanReport.found` lists has a frame, its number
        (`Candidate.relative`) and a strong colour, the darker the nearer to the law. Other fields
        are pale grey: as far from the law as a random tensor, or near by luck. A field is hatched
        where a law does not fit, or any tensor like this one keeps it. A copy's field shows its
        nearest find, or nearest source. Numbers are left out of the pale fields where there are
        more than 400 fields.
        Of a large model the tensors with the clearest finds are drawn, and the title says how
        many there are.

    Raises:
        TieError: if there is nothing to draw, or matplotlib is not installed.

    Example:
        >>> figure = tp.draw_scan(tp.scan(nn.Linear(8, 8), ["flip_sym", "row_repeat"]))
        >>> figure.savefig("scan.png")
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['flip_sym', 'flip_sym(sign=-1)', 'row_repeat(groups=1)']
        >>> print(figure.axes[0].get_title())
        2 of 2 tensors, 0 finds: residual / that of a random tensor
    """
    candidates, rows, title = _clearest(report)
    columns = sorted({_kind(c) for c in candidates})
    finds = {id(c) for c in report.found()}
    fields: dict[tuple[int, int], Candidate] = {}
    for c in sorted(candidates, key=lambda c: (id(c) not in finds, c.relative)):
        fields.setdefault((rows.index(_name(c)), columns.index(_kind(c))), c)
    found = {field for field, c in fields.items() if id(c) in finds}
    slanted = 0.06 * max(map(len, columns))  # inches that the names of the laws take below
    size = (max(6.5, 3.5 + 0.45 * len(columns)), 1.8 + slanted + 0.24 * len(rows))
    figure, (axes,) = new_figure(1, framed=True, size=size)
    axes.patch.set(**_HATCH)
    colours = needed("matplotlib.colors").LinearSegmentedColormap.from_list
    for ramp, shown in ((_OTHERS, fields.keys() - found), (_FOUND, found)):
        values = [[math.nan] * len(columns) for _ in rows]
        for row, column in shown:
            values[row][column] = fields[row, column].relative or 0.0
        image = axes.imshow(values, cmap=colours("", ramp), vmin=0, vmax=NEAR, aspect="auto")
    few = len(rows) * len(columns) <= _MOST_NUMBERS
    for (row, column), c in fields.items():
        if few or (row, column) in found:
            _write(axes, row, column, c.relative or 0.0, found=(row, column) in found)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", size=8)
    axes.set_yticks(range(len(rows)), rows, size=8)
    axes.set(xlabel="law", ylabel="tensor")
    ratio = "residual / that of a random tensor"
    count = sum(id(c) in finds for c in candidates)
    axes.set_title(f"{title} tensors, {_finds(count)}: {ratio}", size=10)
    figure.colorbar(image, ax=axes, label="relative, of finds")
    _explain_fields(figure)
    return figure


def _write(axes: Any, row: int, column: int, relative: float, *, found: bool) -> None:
    """The number of a field, and its frame if it is a find."""
    ink = "#8a8a8a" if not found else "white" if relative < NEAR / 2 else INK
    number = f"{relative:.2f}"
    weight = "bold" if found else "normal"
    axes.text(column, row, number, size=7, ha="center", va="center", color=ink, weight=weight)
    if found:
        frame = needed("matplotlib.patches").Rectangle(
            (column - 0.5, row - 0.5), 1, 1, fill=False, color=INK, linewidth=1.5
        )
        axes.add_patch(frame)


def _explain_fields(figure: Figure) -> None:
    patch = needed("matplotlib.patches").Patch
    handles = [
        patch(facecolor=_FOUND[1], edgecolor=INK, linewidth=1.5, label="found"),
        patch(
            facecolor=_OTHERS[1],
            edgecolor=_OTHERS[0],
            label="not found: far from the law, or near by luck",
        ),
        patch(**_HATCH, label="the law does not fit, or any tensor keeps it"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def _dot(style: dict[str, str], filled: bool) -> dict[str, Any]:
    inside = style["color"] if filled else "white"
    return {**style, "markersize": 6 if filled else 4.5, "markerfacecolor": inside}


def _explain(axes: Any, styles: Mapping[str, dict[str, str]]) -> None:
    """A legend: what the marks mean, and the laws by colour."""
    line = needed("matplotlib.lines").Line2D
    grey = {"color": "#555555", "marker": "o"}
    marks = [
        (_dot(grey, filled=True), "found"),
        (_dot(grey, filled=False), "not found"),
        ({"color": INK, "marker": "|"}, "a random tensor"),
        *((_dot(style, filled=True), kind) for kind, style in styles.items()),
    ]
    handles = [line([], [], linestyle="", label=label, **style) for style, label in marks]
    axes.legend(handles=handles, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))


def _finds(count: int) -> str:
    return "1 find" if count == 1 else f"{count} finds"


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
