"""The small table of the README: how much faster than the dense stock layer, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.report.results import Result, comparisons, gains, span, table
from benchmarks.report.summary import HEAD, lines

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


_SHOWN = (
    "one kernel for all inputs",
    "one long filter",
    "one row for all outputs",
    "circulant",
    "sets of",
    "symmetric",
)
"""How the titles of the families begin that are shown; docs/speed.md has all."""


def figures(results: Sequence[Result]) -> str:
    """The best known lines of docs/speed.md, and what a tie costs where it saves nothing."""
    shown = [line[:-1] for line in lines(results, "cpu") if line[0].startswith(_SHOWN)]
    return table(HEAD[:-1], [*shown, *_slower(results)])


def _slower(results: Sequence[Result]) -> Iterator[list[str]]:
    """A stage of a ResNet, whose kernels are made anew in each step, and a very small layer."""
    stages = [
        comparison
        for comparison in comparisons(results, "resnet_stage", mode="training")
        if comparison["shapes"].endswith(", flip_sym")
    ]
    if found := gains(iter(stages)):
        where = "; ".join(c["shapes"].removesuffix(", flip_sym") for c in stages)
        yield [
            "a self-adjoint kernel (`flip_sym`)",
            f"stages of a ResNet: {where}",
            "–",
            span(found),
        ]
    small = {
        mode: [
            comparison
            for comparison in comparisons(results, "small_layers", mode=mode)
            if comparison["shapes"].startswith(_SMALL)
        ]
        for mode in ("inference", "training")
    }
    if all(small.values()):
        rules = {c["shapes"].rpartition(", ")[2].partition("(")[0] for c in small["inference"]}
        names = ", ".join(f"`{rule}`" for rule in sorted(rules))
        times = [span(gains(iter(found))) for found in small.values()]
        yield [f"any of {names}", f"a very small one: {_SMALL}, 1 row", *times]


_SMALL = "Linear(16, 16)"


def put_into(text: str, results: Sequence[Result]) -> str:
    """The README's text with the figures between its two marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{figures(results)}\n{END}{after}"
