"""The demo: one small CNN on real digits, tied by every law, measured and drawn.

Reads top to bottom: the ties, the model, the data, what is measured, the table, the picture.
Pixels of scikit-learn's digits count from 0 to 16. They enter as 16 channels, ``pixel ≥ t``
for each level ``t``, so a kernel that all input channels share is a kernel on the grey image.
"""

from __future__ import annotations

import io
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Optimizer

from tiedparam._errors import TieError
from tiedparam._register import register_tie, residual
from tiedparam._values import get_tie, is_tied

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
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
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
    """Run the demo: the table goes to stdout, progress to stderr, the picture to ``out``.

    Args:
        out: the PNG file to write.
        seed: of the split, the weights and the order of the pictures.
        epochs: of the training, and of each fine-tuning.

    Raises:
        TieError: before anything is run, if a package of the ``demo`` extra is missing or
            ``out`` cannot be written; after it, if a law were broken.
    """
    for package in ("sklearn", "matplotlib", "tqdm"):
        needed(package)
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise TieError(f"cannot write '{out}': no such folder, or a folder itself. Correct --out.")
    with _reproducible(seed):
        data = load_digits(seed)
        dense = build_model()
        train(dense, data, epochs, seed, learning_rate=2e-3, title="training, dense")
        models: dict[str, nn.Module] = {}
        rows = []
        plan = {"(dense)": (), **{tie.rule: (tie,) for tie in TIES}, "four at once": TOGETHER}
        for title, ties in plan.items():
            row, models[title] = tie_and_tune(dense, ties, data, epochs, seed, title)
            rows.append(row)
    draw(dense, models, out)
    print(summary(rows, data, epochs, seed, out))


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
    layers: str
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
    residuals = [tie.residual(model) for tie in ties]
    for tie in ties:
        tie.apply(model)
    after_tying = accuracy(model, data) if ties else None
    # built after tying, so it holds the free values only
    optimizer = train(model, data, epochs, seed, learning_rate=1e-3, title=title)
    row = Row(
        title=title,
        layers=", ".join(tie.layer for tie in ties),
        residual=residuals[0] if len(ties) == 1 else None,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        checkpoint_bytes=checkpoint_bytes(model),
        optimizer_bytes=optimizer_bytes(optimizer),
        before=accuracy(dense, data),
        after_tying=after_tying,
        after_tuning=accuracy(model, data),
        comparisons=sum(check_law(model, tie) for tie in ties),
    )
    return row, model


def train(
    model: nn.Module, data: Data, epochs: int, seed: int, *, learning_rate: float, title: str
) -> Optimizer:
    """Train in place by Adam, with a progress bar on stderr. Returns the optimizer."""
    optimizer = Adam(model.parameters(), lr=learning_rate)
    order = torch.Generator().manual_seed(seed)
    pictures, labels = data.train_pictures, data.train_labels
    batches = [
        batch
        for _ in range(epochs)
        for batch in torch.randperm(len(labels), generator=order).split(BATCH)
    ]
    for batch in needed("tqdm").tqdm(batches, desc=f"{title:>15}", unit="step", file=sys.stderr):
        optimizer.zero_grad()
        cross_entropy(model(pictures[batch]), labels[batch]).backward()
        optimizer.step()
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


def optimizer_bytes(optimizer: Optimizer) -> int:
    """The bytes of all tensors in the optimizer's state."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def check_law(model: nn.Module, tie: Tie) -> int:
    """Compare a tied weight with its rule's symmetries; how many comparisons that took.

    Raises:
        TieError: unless there is one at least, and each is equal to the bit.
    """
    layer = model.get_submodule(tie.layer)
    rule = get_tie(layer)
    with torch.no_grad():
        equal = [torch.equal(layer.weight, image) for image in rule.symmetries(layer.weight)]
    if not equal or not all(equal):
        raise TieError(f"'{tie.layer}.weight' breaks its law {rule.law}. Please report this.")
    return len(equal)


# The table ----------------------------------------------------------------------------------

HEADER = f"""\
{"":33}{"param-":>8}{"checkpoint":>12}{"optimizer":>11}   accuracy in %, held-out pictures
{"law":14}{"layer":9}{"residual":>10}{"eters":>8}{"bytes":>12}{"bytes":>11}\
{"before":>9}{"tied":>8}{"fine-tuned":>13}"""


def format_row(row: Row) -> str:
    """One line of the table."""
    # several layers are named below the table
    layers = row.layers if "," not in row.layers else ""
    distance = "" if row.residual is None else f"{row.residual:.3f}"
    tied = "" if row.after_tying is None else f"{row.after_tying:.1f}"
    return (
        f"{row.title:14}{layers:9}{distance:>10}{row.parameters:>8,}{row.checkpoint_bytes:>12,}"
        f"{row.optimizer_bytes:>11,}{row.before:>9.1f}{tied:>8}{row.after_tuning:>13.1f}"
    )


def summary(rows: list[Row], data: Data, epochs: int, seed: int, out: Path) -> str:
    """All that goes to stdout."""
    width = len(HEADER.splitlines()[1])
    table = [HEADER, "-" * width, *map(format_row, rows)]
    together = ", ".join(f"{tie.layer} {tie.rule}" for tie in TOGETHER)
    steps = epochs * -(-len(data.train_labels) // BATCH)
    picture = 100 / len(data.test_labels)
    comparisons = sum(row.comparisons for row in rows)
    return "\n".join(
        [
            f"scikit-learn's digits: {len(data.train_labels):,} pictures to train, "
            f"{len(data.test_labels)} held out; seed {seed}.",
            f"A CNN of stock layers, trained for {epochs} epochs. Each row is a copy of it: tied, "
            f"then fine-tuned for {steps} steps.",
            "",
            *table,
            "",
            "residual      how far the trained weight was from the law: |W - nearest lawful W| / |W|",
            "(dense)       not tied, fine-tuned for as many steps: the row to compare with",
            f"four at once  {together}",
            f"One held-out picture is {picture:.2f} %, and this is one seed: read small differences "
            "as none.",
            "",
            f"After fine-tuning every law holds bit for bit: {comparisons} of {comparisons} "
            "comparisons by torch.equal.",
            f"The kernels, dense beside tied: {out}",
            "",
            "The five lines that did it, one per law (import tiedparam as tp):",
            "",
            *map(str, TIES),
        ]
    )


# The picture --------------------------------------------------------------------------------

CELLS = 12
"""A panel shows a corner of 12 × 12 entries: the kernels of 4 × 4 channels, or a matrix."""
INK = "#222222"


def draw(dense: nn.Module, models: Mapping[str, nn.Module], out: Path) -> None:
    """One column per law: the trained weight above, the tied and fine-tuned one below."""
    figure = needed("matplotlib.figure").Figure(figsize=(14, 7), facecolor="white")
    columns = figure.subfigures(1, len(TIES), wspace=0)
    for column, tie in zip(columns, TIES, strict=True):
        _draw_law(column, dense, models[tie.rule], tie)
    figure.text(
        0.5,
        0.025,
        "A corner of each weight; red is positive, blue negative.  "
        "Framed: a stored value.  Not framed: computed, bit for bit the colour that its law says.",
        ha="center",
        size=10.5,
        color=INK,
    )
    figure.savefig(out, format="png", dpi=120)


def _draw_law(column: Any, dense: nn.Module, tied: nn.Module, tie: Tie) -> None:
    layer = tied.get_submodule(tie.layer)
    rule = get_tie(layer)
    write = partial(column.text, 0.5, ha="center", color=INK)
    write(y=0.945, s=tie.rule, size=15, weight="bold")
    write(y=0.905, s=rule.law, size=10.5)
    entries = layer.weight.numel()
    write(y=0.862, s=f"{tie.layer}, trained: {entries:,} values stored", size=9.5)
    write(y=0.452, s=f"{tie.layer}, tied: {rule.free_count:,} values stored", size=9.5)
    # a copy is shown below its source
    paths = [tie.options["source"], tie.layer] if "source" in tie.options else [tie.layer]
    for model, bottom in ((dense, 0.48), (tied, 0.07)):
        height = 0.37 / len(paths)
        for number, path in enumerate(reversed(paths)):
            axes = column.add_axes((0.09, bottom + number * height, 0.86, height))
            _draw_weight(axes, model.get_submodule(path), CELLS // len(paths))
            if len(paths) > 1:
                axes.set_ylabel(path, size=9, color=INK, labelpad=2)


def _draw_weight(axes: Any, layer: nn.Module, rows: int) -> None:
    """The first entries of a weight as squares, the stored ones framed."""
    patches, collections = needed("matplotlib.patches"), needed("matplotlib.collections")
    values = _corner(layer.weight.detach(), rows)
    framed = _corner(stored_entries(layer), rows)
    scale = float(values.abs().max())
    gap = 0.5 if layer.weight.dim() == 4 else 0.0  # between kernels
    squares: dict[bool, list[Any]] = {False: [], True: []}
    colours: dict[bool, list[float]] = {False: [], True: []}
    for row in range(rows):
        for column in range(CELLS):
            frame = bool(framed[row, column])
            corner = (column + gap * (column // 3), row + gap * (row // 3))
            squares[frame].append(patches.Rectangle(corner, 0.9, 0.9))
            colours[frame].append(float(values[row, column]))
    for frame, edge in ((False, "none"), (True, INK)):
        cells = collections.PatchCollection(squares[frame], cmap="RdBu_r", edgecolor=edge)
        cells.set_array(colours[frame])
        cells.set_clim(-scale, scale)
        cells.set_linewidth(1.0)
        axes.add_collection(cells)
    axes.set(xlim=(-0.2, CELLS + 3 * gap + 0.1), ylim=(rows + gap * (rows // 3 - 1) + 0.1, -0.2))
    axes.set(aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _corner(weight: Tensor, rows: int) -> Tensor:
    """A ``(rows, 12)`` matrix: whole kernels, an output per block of rows; or plain entries."""
    if weight.dim() == 4:
        channels = weight[: rows // 3, : CELLS // 3]
        return channels.transpose(1, 2).reshape(rows, CELLS)
    return weight[:rows, :CELLS]


def stored_entries(layer: nn.Module) -> Tensor:
    """A mask of the weight: one entry for each stored value, the first that shows it."""
    mask = torch.ones(layer.weight.shape, dtype=torch.bool)
    if not is_tied(layer):
        return mask
    mask[:] = False
    rule = get_tie(layer)
    if rule.free_count:
        labels = rule.orbit_labels().abs().flatten()
        numpy = needed("numpy")
        _, first = numpy.unique(labels.numpy(), return_index=True)
        mask.view(-1)[first] = True
    return mask
