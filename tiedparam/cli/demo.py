"""The demo: one small CNN on real digits, tied by every law, measured and drawn.

Reads top to bottom: the ties, the model, the data, what is measured, the table, the picture.
Pixels of scikit-learn's digits count from 0 to 16. They enter as 16 channels, ``pixel ≥ t``
for each level ``t``, so a kernel that all input channels share is a kernel on the grey image.
"""

from __future__ import annotations

import io
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Optimizer

from tiedparam import TieError, get_tie, is_tied, register_tie, residual
from tiedparam.model.pictures import first_of_each
from tiedparam.model.report import state_bytes
from tiedparam.util.progress import progress

BATCH = 64
LEVELS = 16


@dataclass(frozen=True)
class Tie:
    """One line of code as data: what is run is what is printed."""

    layer: str
    rule: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> None:
        """Tie the layer of ``model``."""
        register_tie(model.get_submodule(self.layer), self.rule, root=model, **self.options)

    def residual(self, model: nn.Module) -> float:
        """How far the layer of ``model`` is from the law."""
        return residual(model.get_submodule(self.layer), self.rule, root=model, **self.options)

    def __str__(self) -> str:
        options = "".join(f", {name}={json.dumps(value)}" for name, value in self.options.items())
        return f'tp.register_tie(model.{self.layer}, "{self.rule}", root=model{options})'


FLIP_SYM = Tie("conv1", "flip_sym")
CHANNEL_SHARED = Tie("stem", "channel_shared", {"over": "in"})
ROW_REPEAT = Tie("hidden", "row_repeat", {"groups": 16})
COPY = Tie("conv2", "copy", {"source": "conv1"})
SQUARED_COPY = Tie("conv2", "squared_copy", {"source": "conv1"})

TIES = (FLIP_SYM, CHANNEL_SHARED, ROW_REPEAT, COPY, SQUARED_COPY)
TOGETHER = (FLIP_SYM, CHANNEL_SHARED, ROW_REPEAT, COPY)
"""All laws in one model, except that conv2 can be only one function of conv1."""


def demo(out: Path, *, seed: int = 0, epochs: int = 30) -> None:
    """Run the demo: the table goes to stdout, the picture to ``out``.

    Progress is drawn on stderr, if that is a terminal.

    Args:
        out: the PNG file to write.
        seed: of the split, the weights and the order of the pictures.
        epochs: of the training, and of each fine-tuning.

    Raises:
        TieError: before anything is run, if a package of the ``demo`` extra is missing or
            ``out`` cannot be written; after it, if a law were broken.
    """
    for package in ("sklearn", "matplotlib"):
        needed(package)
    reason = _why_not_writable(out)
    if reason is not None:
        raise TieError(f"cannot write '{out}': {reason}")
    with _reproducible(seed):
        data = load_digits(seed)
        dense = build_model()
        train(dense, data, epochs, seed, learning_rate=2e-3, title="training")
        measure = partial(tie_and_tune, dense, data=data, epochs=epochs, seed=seed)
        baseline, _ = measure((), title="(dense)")
        tied = [(tie, *measure((tie,), title=tie.rule)) for tie in TIES]
        together, _ = measure(TOGETHER, title="four at once")
    draw(dense, tied, out)
    rows = [baseline, *(row for _, row, _ in tied), together]
    print(summary(rows, data, epochs, seed, out))


def _why_not_writable(out: Path) -> str | None:
    if out.suffix.lower() != ".png":
        return "the picture is a PNG. Choose a name that ends in .png."
    if out.is_dir():
        return "it is a folder. Name a file in it."
    if not os.access(out.absolute().parent, os.W_OK):
        return "its folder does not exist or is not writable. Choose another."
    return None


def needed(module: str) -> Any:
    """Import a module of the ``demo`` extra.

    Raises:
        TieError: if it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise TieError(
            f"the demo needs '{error.name}', which is not installed: pip install 'tiedparam[demo]'"
        ) from error


# Model and data -----------------------------------------------------------------------------


def build_model() -> nn.Sequential:
    """A CNN of stock layers: ``(N, 16, 8, 8)`` pictures to ``(N, 10)`` logits."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(LEVELS, 16, 3, padding=1),
            relu0=nn.ReLU(),
            conv1=nn.Conv2d(16, 16, 3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(16, 16, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            hidden=nn.Linear(64, 64),
            relu3=nn.ReLU(),
            head=nn.Linear(64, 10),
        )
    )


@dataclass(frozen=True)
class Data:
    """The digits, split: pictures ``(N, 16, 8, 8)`` and labels ``(N,)``."""

    train_pictures: Tensor
    train_labels: Tensor
    test_pictures: Tensor
    test_labels: Tensor


def load_digits(seed: int) -> Data:
    """All 1,797 digits, a quarter of each class held out."""
    digits = needed("sklearn.datasets").load_digits()
    split = needed("sklearn.model_selection").train_test_split
    parts = split(
        digits.images, digits.target, test_size=0.25, stratify=digits.target, random_state=seed
    )
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    return Data(_by_level(train_images), train_labels, _by_level(test_images), test_labels)


def _by_level(images: Tensor) -> Tensor:
    levels = torch.arange(1, LEVELS + 1).reshape(1, LEVELS, 1, 1)
    return (images.unsqueeze(1) >= levels).float()


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seeded, on one thread (sums in another order round otherwise); all put back after."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


# What is measured ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table, all of it measured in this run. Accuracies in percent."""

    title: str
    layer: str
    residual: float | None
    parameters: int
    checkpoint_bytes: int
    optimizer_bytes: int
    before: float
    after_tying: float | None
    after_tuning: float
    comparisons: int


def tie_and_tune(
    dense: nn.Module, ties: tuple[Tie, ...], data: Data, epochs: int, seed: int, title: str
) -> tuple[Row, nn.Module]:
    """Tie a copy of a trained model, fine-tune it, and measure.

    Raises:
        TieError: if a tied weight does not satisfy its law to the bit afterwards.
    """
    model = deepcopy(dense)
    alone = ties[0] if len(ties) == 1 else None
    distance = alone.residual(model) if alone else None
    for tie in ties:
        tie.apply(model)
    after_tying = accuracy(model, data) if ties else None
    # built after tying, so it holds the free values only
    optimizer = train(model, data, epochs, seed, learning_rate=1e-3, title=title)
    row = Row(
        title=title,
        layer=alone.layer if alone else "",
        residual=distance,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        checkpoint_bytes=checkpoint_bytes(model),
        optimizer_bytes=state_bytes(optimizer),
        before=accuracy(dense, data),
        after_tying=after_tying,
        after_tuning=accuracy(model, data),
        comparisons=sum(check_law(model, tie) for tie in ties),
    )
    return row, model


def train(
    model: nn.Module, data: Data, epochs: int, seed: int, *, learning_rate: float, title: str
) -> Optimizer:
    """Train in place by Adam, with a bar if somebody watches. Returns the optimizer."""
    optimizer = Adam(model.parameters(), lr=learning_rate)
    order = torch.Generator().manual_seed(seed)
    pictures, labels = data.train_pictures, data.train_labels
    batches = [
        batch
        for _ in range(epochs)
        for batch in torch.split(torch.randperm(len(labels), generator=order), BATCH)
    ]
    with progress(len(batches), f"{title:>15}") as advance:
        for batch in batches:
            optimizer.zero_grad()
            loss = cross_entropy(model(pictures[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            advance(1)
    return optimizer


def accuracy(model: nn.Module, data: Data) -> float:
    """Percent of the held-out pictures that are classified rightly."""
    with torch.no_grad():
        right = model(data.test_pictures).argmax(1) == data.test_labels
    return 100 * float(right.double().mean())


def checkpoint_bytes(model: nn.Module) -> int:
    """The size of the file that ``torch.save(model.state_dict())`` writes."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getbuffer().nbytes


def weight_of(layer: nn.Module) -> Tensor:
    """The layer's weight, stored or computed."""
    return cast(Tensor, layer.weight)


def check_law(model: nn.Module, tie: Tie) -> int:
    """Compare a tied weight with its rule's symmetries; how many comparisons that took.

    Raises:
        TieError: unless there is one at least, and each is equal to the bit.
    """
    layer = model.get_submodule(tie.layer)
    rule = get_tie(layer)
    with torch.no_grad():
        weight = weight_of(layer)
        equal = [torch.equal(weight, image) for image in rule.symmetries(weight)]
    if not equal or not all(equal):
        raise TieError(f"'{tie.layer}.weight' breaks its law {rule.law}. Please report this.")
    return len(equal)


# The table ----------------------------------------------------------------------------------

HEADER = f"""\
{"":33}{"param-":>9}{"checkpoint":>12}{"optimizer":>11}   accuracy in %, held out
{"law":15}{"layer":8}{"residual":>10}{"eters":>9}{"bytes":>12}{"bytes":>11}\
{"before":>9}{"tied":>7}{"fine-tuned":>12}"""


def format_row(row: Row) -> str:
    """One line of the table."""
    distance = "" if row.residual is None else f"{row.residual:.3f}"
    tied = "" if row.after_tying is None else f"{row.after_tying:.1f}"
    return (
        f"{row.title:15}{row.layer:8}{distance:>10}{row.parameters:>9,}{row.checkpoint_bytes:>12,}"
        f"{row.optimizer_bytes:>11,}{row.before:>9.1f}{tied:>7}{row.after_tuning:>12.1f}"
    )


def summary(rows: list[Row], data: Data, epochs: int, seed: int, out: Path) -> str:
    """All that goes to stdout."""
    trained, held_out = len(data.train_labels), len(data.test_labels)
    steps = epochs * ceil(trained / BATCH)
    rule_off = "-" * len(HEADER.splitlines()[-1])
    table = "\n".join([HEADER, rule_off, *map(format_row, rows)])
    lines = "\n".join(map(str, TIES))
    comparisons = sum(row.comparisons for row in rows)
    together = ", ".join(f"{tie.rule} on {tie.layer}" for tie in TOGETHER)
    return f"""\
scikit-learn's digits: {trained:,} pictures to train, {held_out} held out; seed {seed}.
A CNN of stock layers, trained for {epochs} epochs. Each row is a deep copy of it: tied, then
fine-tuned for {steps:,} steps.

{table}

residual      how far the trained weight was from the law: |W - nearest lawful W| / |W|
(dense)       not tied, fine-tuned for as many steps: the row to compare with
four at once  {together}
One held-out picture is {100 / held_out:.2f} %, and this is one seed: small differences say nothing.

After fine-tuning every law holds bit for bit ({comparisons} comparisons by torch.equal).
The kernels, dense above tied: {out}

The five lines that did it, one per law, after "import tiedparam as tp":

{lines}"""


# The picture --------------------------------------------------------------------------------

CELLS = 12
"""A panel shows a corner of 12 × 12 entries: the kernels of 4 × 4 channels, or a matrix."""
INK = "#222222"
CAPTION = (
    "A corner of each weight: red is positive, blue negative, each block on its own scale. "
    "Framed: a stored value. Not framed: computed by the law.\n"
    "Outputs go down, inputs across. The marks show where three of the stored values are used. "
    "Above the model as trained, below its copies, tied and fine-tuned."
)


def draw(dense: nn.Module, tied: list[tuple[Tie, Row, nn.Module]], out: Path) -> None:
    """One column per law: the trained weight above, the tied and fine-tuned one below."""
    figure = needed("matplotlib.figure").Figure(figsize=(14, 7.3), facecolor="white")
    for column, (tie, row, model) in zip(figure.subfigures(1, len(tied)), tied, strict=True):
        _draw_law(column, dense, model, tie, row)
    figure.text(0.5, 0.02, CAPTION, ha="center", size=11, color=INK, linespacing=1.5)
    figure.savefig(out, format="png", dpi=120)


def _draw_law(column: Any, dense: nn.Module, tied: nn.Module, tie: Tie, row: Row) -> None:
    rule = get_tie(tied.get_submodule(tie.layer))
    entries = weight_of(dense.get_submodule(tie.layer)).numel()
    write = partial(column.text, 0.5, ha="center", color=INK)
    write(y=0.945, s=tie.rule, size=15, weight="bold")
    write(y=0.905, s=rule.law, size=10.5)
    write(y=0.86, s=f"dense: {entries:,} stored, {row.before:.1f} % right", size=10.5)
    write(y=0.46, s=f"tied: {rule.free_count:,} stored, {row.after_tuning:.1f} % right", size=10.5)
    # a copy is drawn below its source
    paths = [tie.options["source"], tie.layer] if "source" in tie.options else [tie.layer]
    for model, bottom in ((dense, 0.48), (tied, 0.08)):
        panels = [_corner_of(model.get_submodule(path), CELLS // len(paths)) for path in paths]
        marks = _busiest(panels) if model is tied else []
        height = 0.37 / len(paths)
        for number, (path, panel) in enumerate(zip(paths, panels, strict=True), 1):
            axes = column.add_axes((0.1, bottom + 0.37 - number * height, 0.8, height))
            axes.set_ylabel(path, size=10, color=INK, labelpad=1)
            _draw_panel(axes, panel, marks)


@dataclass(frozen=True)
class Panel:
    """A corner of a weight as matrices of ``(rows, CELLS)``.

    Attributes:
        values: the entries.
        labels: the number of the stored value that each entry shows.
        stored: whether the entry stands for its stored value: the first that shows it.
        kernel: the side of the square kernels, 1 for a plain matrix.
    """

    values: Tensor
    labels: Tensor
    stored: Tensor
    kernel: int


def _corner_of(layer: nn.Module, rows: int) -> Panel:
    weight = weight_of(layer).detach()
    labels = torch.arange(1, weight.numel() + 1).reshape(weight.shape)
    stored = torch.ones(weight.shape, dtype=torch.bool)
    if is_tied(layer):
        rule = get_tie(layer)
        if rule.free_count:
            labels = rule.orbit_labels().abs()
            stored = first_of_each(labels)
        else:  # a copy, entry by entry
            stored[:] = False
    kernel = weight.shape[-1] if weight.dim() == 4 else 1

    def corner(tensor: Tensor) -> Tensor:
        if kernel == 1:
            return tensor[:rows, :CELLS]
        channels = tensor[: rows // kernel, : CELLS // kernel]  # (outputs, inputs, kernel, kernel)
        return channels.transpose(1, 2).reshape(rows, CELLS)

    return Panel(corner(weight), corner(labels), corner(stored), kernel)


def _busiest(panels: list[Panel]) -> list[int]:
    """The labels of the three largest stored values that show more than once."""
    seen = torch.cat([panel.labels.flatten() for panel in panels]).tolist()
    first = panels[0]
    order = first.values.abs().flatten().argsort(descending=True)
    labels = [int(first.labels.flatten()[i]) for i in order if first.stored.flatten()[i]]
    return [label for label in labels if seen.count(label) > 1][:3]


def _draw_panel(axes: Any, panel: Panel, marks: list[int]) -> None:
    """Entries as coloured squares, the stored ones framed, some marked."""
    patches, collections = needed("matplotlib.patches"), needed("matplotlib.collections")
    kernel, rows = panel.kernel, len(panel.values)
    gap = 0.5 if kernel > 1 else 0.0
    scale = float(panel.values.abs().max())
    for framed in (False, True):
        where = (panel.stored == framed).nonzero().tolist()
        corners = [(c + gap * (c // kernel), r + gap * (r // kernel)) for r, c in where]
        squares = [patches.Rectangle(corner, 0.88, 0.88) for corner in corners]
        edge = INK if framed else "none"
        cells = collections.PatchCollection(squares, cmap="RdBu_r", edgecolor=edge, linewidth=1)
        cells.set_array([float(panel.values[r, c]) for r, c in where])
        cells.set_clim(-scale, scale)
        cells.set_snap(False)  # snapped to pixels, equal gaps look unequal
        axes.add_collection(cells)
        for (x, y), (r, c) in zip(corners, where, strict=True):
            if int(panel.labels[r, c]) in marks:
                shape = "o^s"[marks.index(int(panel.labels[r, c]))]
                style = {"markerfacecolor": "white", "markeredgecolor": INK, "markersize": 6}
                axes.plot(x + 0.44, y + 0.44, shape, **style)
    width, height = (size + gap * (size // kernel - 1) for size in (CELLS, rows))
    axes.set(xlim=(-0.2, width + 0.1), ylim=(height + 0.1, -0.2), aspect="equal")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
