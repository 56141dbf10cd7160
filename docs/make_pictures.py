"""Draw the tying pattern of every rule into docs/images: ``python docs/make_pictures.py``.

One SVG file for each law. Every square is an entry of a small weight, outputs down and inputs
across, whatever the order in which the layer stores them; entries of one colour
share one stored value and carry its number. A dark frame marks the first entry of each
orbit. A rule of copies has no stored values: its source is drawn beside it, filled with
1, 2, 3, …, and the copy shows what ``fn`` makes of them.

The files depend on the rules alone, so `tests/house/test_docs.py` can compare them to the byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from math import prod
from pathlib import Path
from typing import Any

import torch
from make_tables import bound_examples, shipped_rules
from torch import Tensor, nn

import tiedparam as tp
from tiedparam.laws.fitted import is_fitted
from tiedparam.laws.sharing import Sharing
from tiedparam.model.pictures import blocks, first_of_each, orbit_colour, orbit_numbers

IMAGES = Path(__file__).resolve().parent / "images"
COMMAND = "python docs/make_pictures.py"
CELL, GAP, MARGIN, HEAD = 22, 8, 10, 24

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
    if isinstance(rule, Sharing):
        return _picture_of_templates(rule)
    if rule.free_count:
        labels = orbit_numbers(rule)
        head = f"{rule}, weight {shape}: {rule.free_count} of {prod(shape)} values stored"
        zeros = [torch.zeros(shape) for shape in rule.free_shapes()]
        numbers = rule.bound_layout.canonical(rule(*zeros).detach()) != 0
        return _svg(head, [("", _Grid(labels.abs(), labels, first_of_each(labels), numbers))])
    ((source, name),) = rule.sources()
    stored = getattr(source, name).detach()
    numbers = torch.arange(1.0, stored.numel() + 1).reshape(stored.shape)
    with torch.no_grad():
        getattr(source, name).copy_(numbers)
        copied = rule.bound_layout.canonical(rule(*rule.read()))
    numbers = tp.Layout.of(source, name, tuple(stored.shape)).canonical(numbers)
    every = torch.ones(numbers.shape, dtype=torch.bool)
    none = torch.zeros(copied.shape, dtype=torch.bool)
    parts = [
        ("source", _Grid(numbers.long(), numbers.long(), every)),
        ("copy", _Grid(orbit_numbers(rule), copied.long(), none)),
    ]
    return _svg(f"{rule}, weight {shape}: nothing stored", parts)


def _picture_of_templates(rule: Any) -> str:
    """Templates filled with 1, 2, 3, …, and their sum."""
    templates = torch.arange(1, prod(rule.shared_shape()) + 1).reshape(rule.shared_shape())
    parts = [
        (f"template {number}", _Grid(each, each, torch.ones(each.shape, dtype=torch.bool)))
        for number, each in enumerate(templates, start=1)
    ]
    total = templates.sum(0)
    none = torch.zeros(total.shape, dtype=torch.bool)
    parts.append(("with coefficients 1", _Grid(none.long(), total, none)))
    stored = f"{rule.free_count} of {total.numel()} values stored"
    head = f"{rule}, weight {tuple(total.shape)}: {stored}, beside the templates"
    return _svg(head, parts)


class _Grid:
    """A weight as rows of blocks: outputs down, inputs across, a kernel in every block.

    Args:
        colours: for each entry the number of the stored value that it comes from.
        texts: the number to print on it.
        marked: whether it gets the dark frame.
        fixed: whether it is fixed to another number than 0.
    """

    def __init__(
        self, colours: Tensor, texts: Tensor, marked: Tensor, fixed: Tensor | None = None
    ) -> None:
        self.colours, self.texts, self.marked = (blocks(t) for t in (colours, texts, marked))
        self.fixed = blocks(torch.zeros_like(colours) if fixed is None else fixed)
        self.outputs, self.inputs, self.height, self.length = self.colours.shape
        # a bias has outputs alone
        self.axes = "outputs ↓" if colours.dim() < 2 else "outputs ↓, inputs →"
        # a matrix is drawn without gaps
        self.gap = GAP if self.height * self.length > 1 else 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        width = self.inputs * (self.length * CELL + self.gap) - self.gap
        return width, self.outputs * (self.height * CELL + self.gap) - self.gap

    def cells(self, left: int, top: int) -> Iterator[str]:
        """One square and its number for every entry; frames last, so that they lie on top."""
        frames = []
        for o, c, y, x in torch.cartesian_prod(
            *(torch.arange(n) for n in self.colours.shape)
        ).tolist():
            px = left + c * (self.length * CELL + self.gap) + x * CELL
            py = top + o * (self.height * CELL + self.gap) + y * CELL
            fill = _colour(int(self.colours[o, c, y, x]))
            yield f'<rect x="{px}" y="{py}" width="{CELL}" height="{CELL}" fill="{fill}"/>'
            text = "v" if self.fixed[o, c, y, x] else int(self.texts[o, c, y, x])
            yield f'<text x="{px + CELL // 2}" y="{py + 15}">{text}</text>'
            if self.marked[o, c, y, x]:
                frames.append(
                    f'<rect x="{px + 1}" y="{py + 1}" width="{CELL - 2}" height="{CELL - 2}" '
                    'class="free"/>'
                )
        yield from frames


def _svg(head: str, parts: list[tuple[str, _Grid]]) -> str:
    body, left, bottom = [], MARGIN, 0
    for caption, grid in parts:
        top = MARGIN + HEAD
        said = f"{caption}: {grid.axes}" if caption else grid.axes
        body.append(f'<text x="{left}" y="{top + 12}" class="left">{escape(said)}</text>')
        top += HEAD
        body += grid.cells(left, top)
        width, height = grid.size
        width = max(width, 7 * len(said))
        left, bottom = left + width + 4 * MARGIN, max(bottom, top + height)
    width = max(left - 3 * MARGIN, 2 * MARGIN + 7 * len(head))
    height = bottom + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img">',
            f"<title>{escape(head)}</title>",
            "<style>text{font:11px sans-serif;text-anchor:middle;fill:#222}"
            "text.left{font-size:13px;text-anchor:start}"
            "rect{stroke:#fff;stroke-width:1}"
            "rect.free{fill:none;stroke:#222;stroke-width:2}</style>",
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            f'<text x="{MARGIN}" y="{MARGIN + 12}" class="left">{escape(head)}</text>',
            *body,
            "</svg>\n",
        ]
    )


def _colour(number: int) -> str:
    if not number:
        return "#f2f2f2"
    return "#" + "".join(f"{round(part * 255):02x}" for part in orbit_colour(number))


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
