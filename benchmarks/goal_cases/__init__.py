"""The case `goals`: what each law should gain, and what was reached.

Each module here measures one theme. It has

``measure(run)``
    adds comparisons to the run, as the cases do: ``run.compare(shapes, contenders, input)``.
    With ``run.quick`` small shapes will do. A module should take about a minute.
``GOALS``
    `Goal`s whose ``row`` is a key of `ROWS`. A goal sees the comparisons of its own module only.

A new module is found by being here. ``python -m benchmarks --case goals`` measures all of them,
``--only fourier`` one; what is measured replaces what the result file had of that module.

A missed goal should have a ``floor``, the name of a contender that shows what torch's operations
allow, and say in ``tried`` what was tried. Example: ``resnet.py``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tiedparam as tp
from benchmarks import contenders as made
from benchmarks.goals import Goal, number
from benchmarks.measuring import Contender, Run
from tiedparam.tie.lookup import tie_of

ROWS: dict[str, tuple[str, str]] = {
    "symmetric": (
        "symmetric Linear, time against dense, inference / training",
        "2,048² and 4,096², 32 and 128 rows: ≤ 1.0 / 1.05; 8 rows: ≤ 0.95 / 0.85; "
        "1,024², 32 and 128 rows: ≤ 1.2 / 1.2",
    ),
    "symmetric_conv": ("flip_sym 1×1 convolution", "as the Linear"),
    "flip_sym": (
        "flip_sym 3×3 expansion, forward and backward, against the users' averaging, "
        "64 / 128 / 256 / 512 channels",
        "≥ 1.2 / 1.1 / 1.25 / 1.3 × as fast, never slower",
    ),
    "circulant": (
        "circulant, batch 64: 256 / 512 / 1,024 / 2,048",
        "≥ 1.4 / 3 / 4.5 / 12 × faster than dense in inference, training ≥ 1.1 / 2 / 5 / 11; "
        "dense by itself where FFT loses",
    ),
    "toeplitz": (
        "toeplitz, hankel 1,024 / 2,048 / 4,096",
        "≥ 2.2 / 5 / 14 ×, training ≥ 2.8 / 5.5 / 13",
    ),
    "block_circulant": (
        "block_circulant 4,096, blocks 16 / 64 / 256; 1,024",
        "≥ 3.8 / 10 / 17 ×; ≥ 2.2 / 3.2 / 2.1; dense by itself below 16",
    ),
    "block_diagonal": ("masked block-diagonal, 8 blocks, 1,024", "≥ 5 ×"),
    "head_share": ("head_share 4 of 16, 1,024 and 4,096", "≥ 3.3 and 4 ×"),
    "structured": (
        "set_equivariant 16 channels × 64 items; group_conv 1×1 p4; complex Linear 1,024",
        "≥ 8; ≥ 2; ≥ 1.05 or dense",
    ),
    "streams": (
        "streams with one filter each, kernels 3 / 7 / 25, 64–256 channels",
        "inference ≥ 0.97 / 0.97 / 3 ×, training ≥ 0.97 / 1.2 / 1.0; 2-d likewise",
    ),
    "compiled": (
        "streams and summed convolutions under `torch.compile`, bfloat16 too",
        "the gain of eager kept",
    ),
    "resnet": ("squared_copy and flip_sym on ResNet stages, training", "≤ 1.02"),
    "small": (
        "small layers: Linear 16², Conv 3→16 on 32², batch 8",
        "≥ 0.9 × as fast as dense, inference and training, or ≤ 12 µs over dense per call",
    ),
    "onnx": (
        "ONNX of tied layers: size and load time in onnxruntime",
        "nodes per layer ≤ 6; load ≤ 2 × untied, or an option that exports the dense weight",
    ),
    "import": ("`import tiedparam` over `import torch`", "≤ 30 ms"),
}
"""The table: a key, the case, and the goal in words."""


@dataclass(frozen=True)
class Theme:
    """One module: its name, what it measures, and its goals."""

    name: str
    measure: Callable[[Run], None]
    goals: tuple[Goal, ...]


def themes(only: Sequence[str] = ()) -> list[Theme]:
    """The modules of this package, or those named.

    Raises:
        LookupError: if there is none of that name.
    """
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    unknown = [name for name in only if name not in names]
    if unknown:
        raise LookupError(f"no goals {', '.join(unknown)}; there are: {', '.join(names)}")
    found = []
    for name in only or names:
        module: Any = importlib.import_module(f"{__name__}.{name}")
        found.append(Theme(name, module.measure, tuple(module.GOALS)))
    return found


def measure(run: Run) -> None:
    """Every module that the run names, or all; comparisons say whose they are."""
    for theme in themes(run.only):
        before = len(run.comparisons)
        theme.measure(run)
        for comparison in run.comparisons[before:]:
            comparison["theme"] = theme.name


def evaluate(comparisons: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All goals of all modules, in the order of the table."""
    order = list(ROWS)
    found = []
    for theme in themes():
        mine = [c for c in comparisons if c["theme"] == theme.name]
        for goal in theme.goals:
            assert goal.row in ROWS, f"{theme.name}: no row {goal.row!r}"
            found.append({"row": goal.row, "theme": theme.name, **goal.evaluate(mine)})
    return sorted(found, key=lambda goal: order.index(goal["row"]))


def against_dense(layer: Any, rule: str, *forms: str, **options: Any) -> list[Contender]:
    """The dense layer with a lawful weight, the tied one, and one forced into each of the forms.

    A contender of another kind is made of the first one's layer, ``found[0].forward``.
    """
    layer = made.lawful(layer, rule, **options)
    found = [made.dense(layer), made.tied(layer, rule, **options)]
    for form in forms:
        found.append(made.tied(layer, rule, f"tiedparam, {form}", compute=form, **options))
    return found


def note_forms(comparisons: Sequence[dict[str, Any]], layer: Any, rows: int) -> None:
    """Note which form the tied layer takes for so many rows, for goals with ``or_dense``."""
    computing = tie_of(layer).computing
    for comparison in comparisons:
        training = comparison["mode"] == "training"
        order = computing.order(tp.get_tie(layer), rows, training, False) if computing else ()
        comparison["form"] = order[0].name if order else "dense"


def both_modes(
    row: str, text: str, bounds: tuple[float | None, float | None], measure: str = "speedup",
    **settings: Any,
) -> Iterator[Goal]:  # fmt: skip
    """The same goal for inference and for training, with a bound each; None leaves one out."""
    for mode, bound in zip(("inference", "training"), bounds, strict=True):
        if bound is not None:
            words = f"≥ {bound:g} ×" if measure == "speedup" else f"≤ {bound:g} × dense"
            yield Goal(f"{text}, {mode}: {words}", measure, bound, mode, row=row, **settings)


def table(goals: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    """Case, goal, what was reached, met or missed: a line for each row, and for what is in it."""
    for row, (title, wanted) in ROWS.items():
        mine = [goal for goal in goals if goal["row"] == row]
        met = sum(goal["met"] is True for goal in mine)
        measured = sum(goal["met"] is not None for goal in mine)
        short = f"{met} of {measured}" if measured else "not measured"
        yield f"**{title}**", wanted, "", short
        for goal in mine:
            yield "", goal["goal"], reached(goal), verdict(goal)


def reached(goal: dict[str, Any]) -> str:
    """The worst median with its quartiles, and the floor where one was measured."""
    if goal["value"] is None:
        return "–"
    unit = {"speedup": " ×", "microseconds": " µs", "absolute": " µs", "milliseconds": " ms"}
    suffix = unit.get(goal["measure"], "")
    text = f"{number(goal['value'])}{suffix}"
    if goal["spread"] is not None:
        text += f" [{number(goal['spread'][0])}–{number(goal['spread'][1])}]"
    if goal["instead"] is not None:
        text += f", {number(goal['instead'])} µs over dense"
    if goal["floor"] is not None:
        text += f"; floor {number(goal['floor'])}{suffix}"
    return text


def verdict(goal: dict[str, Any]) -> str:
    """Whether a goal is met, and if not, what was tried."""
    if goal["met"] is None:
        return "not measured"
    if goal["met"]:
        return "met"
    return f"**missed**: {goal['tried']}" if goal["tried"] else "**missed**"
