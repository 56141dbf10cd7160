"""Draw the tying pattern of every rule into docs/images: ``python docs/make_pictures.py``.

One SVG file for each law. Every square is an entry of a small weight, outputs down and inputs
across, a block for each kernel, whatever the order in which the layer stores them. Entries of one
number and colour share one stored value; numbers run in reading order, kernel by kernel. A dark
frame marks the first entry of each stored value; ``0`` and ``v`` are fixed by the law. A rule of
copies has no stored values: its source is drawn with it, filled with 1, 2, 3, …, and the copy shows
what ``fn`` makes of them. Colours and numbers are those of `tp.draw_orbits`.

A picture is about 300 pixels wide, or as wide as it must be, on white paper of its own. The files
depend on the rules alone, so `tests/house/test_docs.py` can compare them to the byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from math import prod
from pathlib import Path
from textwrap import wrap
from typing import Any

import torch
from make_tables import bound_examples, shipped_rules
from torch import Tensor, nn

import tiedparam as tp
from tiedparam.laws.fitted import is_fitted
from tiedparam.laws.sharing import Sharing
from tiedparam.model.mosaic import blocks, mosaic, shape_text
from tiedparam.model.orbit_colours import colours_of
from tiedparam.model.orbit_numbers import (
    first_of_each,
    numbered,
    orbit_numbers,
    origins_of,
    text_of,
)

IMAGES = Path(__file__).resolve().parent / "images"
COMMAND = "python docs/make_pictures.py"
CELL, GAP, MARGIN, LINE = 26, 8, 12, 18
NARROW, WIDE = 276, 320
"""How wide a picture is at least, without its margins, and at most if parts can go below others."""

Case = tuple[Callable[[], nn.Module], str, dict[str, Any]]  # build, path of the layer, options


def _waves(outputs: int, inputs: int) -> nn.Linear:
    """A layer with the same numbers on every machine."""
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(outputs * inputs).mul(7).remainder(13).view(outputs, -1))
    return layer


# What to draw where the first example would not show the pattern well.
CASES: dict[str, dict[str, Case]] = {
    "flip_sym": {
        "flip_sym": (lambda: nn.Conv2d(3, 3, 3), "", {}),
        "flip_sym-even": (lambda: nn.Conv2d(2, 2, 2), "", {}),
        "flip_sym-linear": (lambda: nn.Linear(5, 5), "", {}),
        "flip_sym-sign": (lambda: nn.Conv2d(2, 2, 3), "", {"sign": -1}),
    },
    "kernel_symmetry": {
        "kernel_symmetry-d4": (lambda: nn.Conv2d(2, 1, 5), "", {"group": "d4"}),
        "kernel_symmetry-hv": (lambda: nn.Conv2d(2, 1, (3, 5)), "", {"group": "hv"}),
        "kernel_symmetry-c4-sign": (
            lambda: nn.Conv2d(2, 1, 4),
            "",
            {"group": "c4", "sign": -1},
        ),
    },
    "group_conv": {
        "group_conv-lift": (lambda: nn.Conv2d(1, 4, 3), "", {"lift": True}),
        "group_conv-p4m": (lambda: nn.Conv2d(1, 8, 2), "", {"group": "p4m", "lift": True}),
        "group_conv-p4": (lambda: nn.Conv2d(4, 4, 2), "", {}),
    },
    "reverse_complement": {
        "reverse_complement": (lambda: nn.Conv1d(4, 2, 3), "", {}),
        "reverse_complement-odd": (lambda: nn.Conv1d(3, 3, 3), "", {}),
    },
    "centrosymmetric": {"centrosymmetric": (lambda: nn.Linear(6, 5), "", {})},
    "persymmetric": {"persymmetric": (lambda: nn.Linear(5, 5), "", {})},
    "set_equivariant": {
        "set_equivariant": (lambda: nn.Linear(8, 8), "", {"items": 4}),
    },
    "hypercomplex": {
        "hypercomplex-complex": (lambda: nn.Linear(6, 4), "", {}),
        "hypercomplex-quaternion": (lambda: nn.Linear(4, 8), "", {"algebra": "quaternion"}),
    },
    "row_repeat": {
        "row_repeat": (lambda: nn.Linear(6, 4), "", {}),
        "row_repeat-groups": (lambda: nn.Linear(6, 4), "", {"groups": 2}),
    },
    "channel_shared": {
        "channel_shared-in": (lambda: nn.Conv2d(3, 2, 3), "", {"over": "in"}),
        "channel_shared-out": (lambda: nn.Conv2d(3, 2, 3), "", {"over": "out"}),
        "channel_shared-all": (lambda: nn.Conv2d(3, 2, 3), "", {"over": "all"}),
        "channel_shared-groups": (
            lambda: nn.Conv1d(3, 6, 5, groups=3),
            "",
            {"over": "groups"},
        ),
    },
    "repeat": {
        f"repeat-{order}": (lambda: nn.Linear(4, 6), "", {"outputs": 2, "order": order})
        for order in ("block", "tile")
    }
    | {"repeat-inputs": (lambda: nn.Linear(4, 6), "", {"outputs": 3, "inputs": 2})},
    "head_share": {"head_share": (lambda: nn.Linear(4, 8), "", {"heads": 4, "groups": 2})},
    "block_circulant": {"block_circulant": (lambda: nn.Linear(6, 6), "", {"block": 3})},
    "symmetric": {"symmetric": (lambda: nn.Linear(5, 5), "", {})},
    "skew": {"skew": (lambda: nn.Linear(5, 5), "", {})},
    "masked": {
        "masked-lower": (lambda: nn.Linear(5, 5), "", {"pattern": "lower"}),
        "masked-block_diagonal": (
            lambda: nn.Linear(6, 4),
            "",
            {"pattern": "block_diagonal", "blocks": 2},
        ),
        "masked-banded": (lambda: nn.Linear(6, 6), "", {"pattern": "banded", "width": 1}),
    },
    "cluster": {
        "cluster": (lambda: _waves(5, 6), "", {"n": 4}),
        "cluster-output": (lambda: _waves(4, 6), "", {"n": 2, "per": "output"}),
    },
    "toeplitz": {"toeplitz": (lambda: nn.Linear(5, 4), "", {})},
    "hankel": {"hankel": (lambda: nn.Linear(5, 4), "", {})},
    "joint": {
        "joint": (
            lambda: nn.Conv2d(2, 2, 3),
            "",
            {"laws": ["flip_sym", ("kernel_symmetry", {"group": "d4"})]},
        ),
    },
    "within": {
        "within": (lambda: nn.Linear(4, 8), "", {"inner": "flip_sym", "rows": slice(2, 6)}),
    },
    "copy": {
        "copy": (
            lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)),
            "1",
            {"source": "0", "fn": torch.t},
        ),
    },
    "transposed_copy": {
        "transposed_copy": (
            lambda: nn.Sequential(nn.Conv1d(3, 2, 3), nn.Conv1d(2, 3, 3)),
            "1",
            {"source": "0"},
        ),
    },
    "bank": {"bank": (tp.rules.Bank.examples()[0].build, "2", {"source": "0"})},
    "squared_copy": {
        "squared_copy": (
            lambda: nn.Sequential(nn.Conv1d(2, 2, 3), nn.Conv1d(2, 2, 3)),
            "1",
            {"source": "0"},
        ),
    },
}


def pictures() -> Iterator[tuple[str, str]]:
    """File names and contents of all pictures."""
    for name, rule in shipped_rules().items():
        if name in CASES:
            for title, (build, path, options) in CASES[name].items():
                model = build()
                layer = model.get_submodule(path)
                tp.register_tie(layer, rule, root=model, **options)
                yield f"{title}.svg", picture(tp.get_tie(layer))
        else:
            bound = next(bound_examples(rule))
            if not is_fitted(bound):  # no entry is one of its values
                yield f"{name}.svg", picture(bound)


def picture(rule: tp.Rule) -> str:
    """The pattern of one bound rule as SVG."""
    shape = rule.bound_layout.canonical_shape
    count = f"{rule.free_count} of {prod(shape)} values" if rule.free_count else "nothing"
    name = re.sub(r"'(\w+ )?sha256:\w+'", "…", str(rule))  # tensors, which the picture shows
    head = [name, f"weight {shape_text(shape)}: {count} stored"]
    if isinstance(rule, Sharing):
        return _svg(rule.law, head, _templates(rule))
    if rule.free_count:
        origins = origins_of(rule)
        marked = first_of_each(origins.numbers)
        texts = [
            text_of(*entry)
            for entry in zip(
                *(x.flatten().tolist() for x in (origins.numbers, origins.fixed, origins.computed)),
                strict=True,
            )
        ]
        return _svg(rule.law, head, [_Grid("", origins.numbers, texts, marked)])
    return _svg(rule.law, head, _source_and_copy(rule))


def _source_and_copy(rule: Any) -> list[_Grid]:
    """The source filled with 1, 2, 3, …, and what the law makes of that."""
    ((source, name),) = rule.sources()
    stored = getattr(source, name).detach()
    layout = tp.Layout.of(source, name, tuple(stored.shape))
    with torch.no_grad():
        getattr(source, name).copy_(numbered(layout))
        copied = rule.bound_layout.canonical(rule(*rule.read())).long()
    numbers = layout.canonical(numbered(layout))
    every = torch.ones(numbers.shape, dtype=torch.bool)
    none = torch.zeros(copied.shape, dtype=torch.bool)
    return [
        _Grid("source", numbers, _numbers(numbers), every),
        _Grid("copy", orbit_numbers(rule), _numbers(copied), none),
    ]


def _templates(rule: Any) -> list[_Grid]:
    """Templates filled with 1, 2, 3, …, and their sum."""
    templates = torch.arange(1, prod(rule.shared_shape()) + 1).reshape(rule.shared_shape())
    parts = [
        _Grid(f"template {number}", each, _numbers(each), torch.ones_like(each).bool())
        for number, each in enumerate(templates, start=1)
    ]
    total = templates.sum(0)
    none = torch.zeros_like(total)
    return [*parts, _Grid("sum, coefficients 1", none, _numbers(total), none.bool())]


def _numbers(tensor: Tensor) -> list[str]:
    return [text_of(number) for number in tensor.flatten().tolist()]


@dataclass
class _Grid:
    """A weight as rows of blocks: outputs down, inputs across, a kernel in every block.

    Attributes:
        caption: what it is, if there are several.
        numbers: for each entry the number of the stored value that it comes from.
        texts: what to print on each entry, in reading order.
        marked: whether it gets the dark frame.
    """

    caption: str
    numbers: Tensor
    texts: list[str]
    marked: Tensor

    @property
    def gap(self) -> int:
        """Between kernels; a matrix is drawn without gaps."""
        return GAP if prod(self.numbers.shape[2:]) > 1 else 0

    @property
    def lines(self) -> list[str]:
        """What goes down and across, below the caption."""
        axes = "outputs ↓" if self.numbers.dim() < 2 else "outputs ↓, inputs →"
        kernel = self.numbers.shape[2:]
        lines = [f"{self.caption}:", axes] if self.caption else [axes]
        if prod(kernel) > 1:
            lines.append(f"in each block a kernel of {shape_text(kernel)}")
        return lines

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels of the cells."""
        outputs, inputs, height, length = blocks(self.numbers).shape
        width = inputs * (length * CELL + self.gap) - self.gap
        return width, outputs * (height * CELL + self.gap) - self.gap

    def cells(self, left: int, top: int, colours: dict[int, str]) -> Iterator[str]:
        """One square and its number for every entry; frames last, so that they lie on top."""
        numbers, marked = blocks(self.numbers), blocks(self.marked)
        _, _, height, length = numbers.shape
        frames = []
        places = torch.cartesian_prod(*(torch.arange(n) for n in numbers.shape)).tolist()
        for (o, c, y, x), text in zip(places, self.texts, strict=True):
            px = left + c * (length * CELL + self.gap) + x * CELL
            py = top + o * (height * CELL + self.gap) + y * CELL
            fill = colours[abs(int(numbers[o, c, y, x]))]
            yield f'<rect x="{px}" y="{py}" width="{CELL}" height="{CELL}" fill="{fill}"/>'
            small = {3: ' class="s"', 4: ' class="xs"'}.get(len(text), "")
            yield f'<text x="{px + CELL // 2}" y="{py + CELL // 2 + 5}"{small}>{text}</text>'
            if marked[o, c, y, x]:
                frames.append(
                    f'<rect x="{px + 2}" y="{py + 2}" width="{CELL - 4}" height="{CELL - 4}" '
                    'class="free"/>'
                )
        yield from frames


def _svg(law: str, head: list[str], parts: list[_Grid]) -> str:
    colours = colours_of(
        *(mosaic(part.numbers, max(part.numbers.shape, default=1), gap=0) for part in parts)
    )
    inner = max(NARROW, *(part.size[0] for part in parts))
    lines = [
        (line, kind)
        for text, kind in zip(head, ("l b", "l"), strict=True)
        for line in wrap(text, inner // 7)
    ]
    body = [
        f'<text x="{MARGIN}" y="{MARGIN + LINE * number - 5}" class="{kind}">'
        f"{escape(line, quote=False)}</text>"
        for number, (line, kind) in enumerate(lines, start=1)
    ]
    left, top, below = MARGIN, MARGIN + LINE * len(lines), 0
    for part in parts:
        width, height = part.size
        if left > MARGIN and left + width > MARGIN + max(WIDE, inner):
            left, top, below = MARGIN, top + below + MARGIN, 0
        for number, line in enumerate(part.lines, start=1):
            y = top + LINE * number - 4
            body.append(f'<text x="{left}" y="{y}" class="l">{escape(line, quote=False)}</text>')
        head_height = LINE * len(part.lines) + 4
        body += part.cells(left, top + head_height, colours)
        inner = max(inner, left + width - MARGIN)
        left, below = left + width + 2 * MARGIN, max(below, head_height + height)
    width, height = inner + 2 * MARGIN, top + below + MARGIN
    title = escape(f"{head[0]}: {law}; {head[1]}", quote=False)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" aria-labelledby="t d">',
            f'<title id="t">{title}</title>',
            f'<desc id="d">{escape(" ".join(_described(parts)), quote=False)}</desc>',
            "<style>text{font:13px sans-serif;text-anchor:middle;fill:#222}"
            "text.s{font-size:11px}text.xs{font-size:9px}"
            "text.l{font-size:12.5px;text-anchor:start}text.b{font-weight:bold}"
            "rect{stroke:#fff;stroke-width:1}"
            "rect.free{fill:none;stroke:#222;stroke-width:1.5}</style>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>',
            *body,
            "</svg>\n",
        ]
    )


def _described(parts: list[_Grid]) -> Iterator[str]:
    """What is to be seen, for those who do not see it: the numbers, row by row."""
    yield "Entries of one number share one stored value."
    for part in parts:
        yield f"{' '.join(part.lines)}:"
        rows, each = part.numbers.shape[0], prod(part.numbers.shape[1:])
        yield "; ".join(" ".join(part.texts[row * each :][:each]) for row in range(rows)) + "."


def main() -> None:
    """Rewrite all pictures, and remove those that no rule has any more."""
    IMAGES.mkdir(exist_ok=True)
    drawn = dict(pictures())
    for old in IMAGES.glob("*.svg"):
        if old.name not in drawn:
            old.unlink()
    for name, content in drawn.items():
        (IMAGES / name).write_text(content, encoding="utf-8")
    print(f"drew {len(drawn)} pictures in {IMAGES}")


if __name__ == "__main__":
    main()
