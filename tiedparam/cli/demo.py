"""The demo: one small CNN on real digits, tied by six laws, measured and drawn.

Reads top to bottom: the ties, the model, the data, what is measured, what is printed and drawn.
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
from math import ceil
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Optimizer

from tiedparam.cli.demo_picture import Drawn, draw
from tiedparam.layer.register import register_tie
from tiedparam.layer.residual import residual
from tiedparam.model.pictures import needed
from tiedparam.model.tie_block import tie_block
from tiedparam.model.totals import state_bytes
from tiedparam.tie.lookup import get_tie, ties_in
from tiedparam.util.errors import Reason, TieError, raise_if
from tiedparam.util.progress import progress
from tiedparam.util.table import Column, Table

BATCH = 64
LEVELS = 16


@dataclass(frozen=True)
class TieLine:
    """One line of code as data: what is run is what is printed."""

    layer: str
    rule: Any  # a name, or a list of names and pairs
    options: Mapping[str, Any] = field(default_factory=dict)
    block: bool = False  # the layer with all that it holds

    @property
    def title(self) -> str:
        """The rule's name; of several how many they are."""
        return self.rule if isinstance(self.rule, str) else "two laws at once"

    def apply(self, model: nn.Module) -> None:
        """Tie the layer of ``model``."""
        if self.block:
            tie_block(self.layer, rule=self.rule, root=model, **self.options)
            return
        register_tie(model.get_submodule(self.layer), self.rule, root=model, **self.options)

    def residual(self, model: nn.Module) -> float:
        """How far the layer of ``model`` is from the law."""
        return residual(model.get_submodule(self.layer), self.rule, root=model, **self.options)

    def __str__(self) -> str:
        if self.block:
            return f"tp.tie_block(model.{self.layer}, model.{self.options['source']}, root=model)"
        options = "".join(f", {name}={json.dumps(value)}" for name, value in self.options.items())
        rule = str(self.rule).replace("'", '"') if self.title != self.rule else f'"{self.rule}"'
        return f"tp.register_tie(model.{self.layer}, {rule}, root=model{options})"


FLIP_SYM = TieLine("conv1", "flip_sym")
TWO_LAWS = TieLine("conv1", ["flip_sym", ("kernel_symmetry", {"group": "d4"})])
CHANNEL_SHARED = TieLine("stem", "channel_shared", {"over": "in"})
ROW_REPEAT = TieLine("hidden", "row_repeat", {"groups": 16})
COPY = TieLine("conv2", "copy", {"source": "conv1"}, block=True)
SQUARED_COPY = TieLine("conv2", "squared_copy", {"source": "conv1"})

TIES = (FLIP_SYM, TWO_LAWS, CHANNEL_SHARED, ROW_REPEAT, COPY, SQUARED_COPY)
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
        _needed(package)
    raise_if(f"cannot write '{out}'", _why_not_writable(out))
    with _reproducible(seed):
        data = load_digits(seed)
        dense = build_model()
        train(dense, data, epochs, seed, learning_rate=2e-3, title="training")
        measure = partial(tie_and_tune, dense, data=data, epochs=epochs, seed=seed)
        baseline, _ = measure((), title="(dense)")
        tied = [(tie, *measure((tie,), title=tie.title)) for tie in TIES]
        together, _ = measure(TOGETHER, title="four at once")
    draw([drawn(tie, row, dense, model) for tie, row, model in tied], out)
    rows = [baseline, *(row for _, row, _ in tied), together]
    print(summary(rows, data, epochs, seed, out))


def _why_not_writable(out: Path) -> Reason | None:
    if out.suffix.lower() != ".png":
        return Reason("the picture is a PNG.", "Choose a name that ends in .png.")
    if out.is_dir():
        return Reason("it is a folder.", "Name a file in it.")
    if not os.access(out.absolute().parent, os.W_OK):
        return Reason("its folder does not exist or is not writable.", "Choose another.")
    return None


_needed = partial(needed, who="the demo needs", extra="demo")


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
    digits = _needed("sklearn.datasets").load_digits()
    split = _needed("sklearn.model_selection").train_test_split
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
    dense: nn.Module, ties: tuple[TieLine, ...], data: Data, epochs: int, seed: int, title: str
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
    """Train in place by Adam, with a bar on a terminal. Returns the optimizer."""
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
    """Percent of the held-out pictures that are classified correctly."""
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


def check_law(model: nn.Module, tie: TieLine) -> int:
    """Compare what is tied with its rule's symmetries; how many comparisons that took.

    Raises:
        TieError: unless there is one at least, and each is equal to the bit.
    """
    ties = ties_in(model.get_submodule(tie.layer))
    with torch.no_grad():
        equal = [
            torch.equal(weight, image)
            for each in ties
            for weight in [each.weight()]
            for image in each.rule.symmetries(weight)
        ]
    if not equal or not all(equal):
        key = f"'{tie.layer}.{ties[0].tensor_name}'"
        raise TieError(key, f"{key} breaks its law {ties[0].rule.law}.", "Please report this.")
    return len(equal)


# What is printed and drawn -------------------------------------------------------------------


def _rounded(name: str, head: str, digits: int) -> Column[Row]:
    """A column of numbers, some of which there are not."""
    value = attrgetter(name)

    def shown(row: Row) -> str:
        return "" if value(row) is None else f"{value(row):.{digits}f}"

    return Column(name, head, value, shown)


COLUMNS: list[Column[Row]] = [
    Column("title", "law", lambda row: row.title),
    Column("layer", "layer", lambda row: row.layer),
    _rounded("residual", "residual", 3),
    Column("parameters", "parameters", lambda row: row.parameters),
    Column("checkpoint_bytes", "checkpoint B", lambda row: row.checkpoint_bytes),
    Column("optimizer_bytes", "optimizer B", lambda row: row.optimizer_bytes),
    _rounded("before", "before", 1),
    _rounded("after_tying", "tied", 1),
    _rounded("after_tuning", "fine-tuned", 1),
]


def summary(rows: list[Row], data: Data, epochs: int, seed: int, out: Path) -> str:
    """All that goes to stdout."""
    trained, held_out = len(data.train_labels), len(data.test_labels)
    steps = epochs * ceil(trained / BATCH)
    lines = "\n".join(map(str, TIES))
    comparisons = sum(row.comparisons for row in rows)
    together = ", ".join(f"{tie.rule} on {tie.layer}" for tie in TOGETHER)
    return f"""\
scikit-learn's digits: {trained:,} pictures to train, {held_out} held out; seed {seed}.
A CNN of stock layers, trained for {epochs} epochs. Each row is a deep copy of it: tied, then
fine-tuned for {steps:,} steps.

{Table(COLUMNS, rows).text()}

residual      how far the trained weight was from the law: |W - nearest lawful W| / |W|
accuracy      before, tied and fine-tuned: held-out pictures that are classified correctly, in %
(dense)       not tied, fine-tuned for as many steps: the row to compare with
two laws …    flip_sym, and kernels that equal their rotations and flips (kernel_symmetry, d4)
four at once  {together}
One held-out picture is {100 / held_out:.2f} %, and this is one seed: small differences say nothing.

After fine-tuning every law holds bit for bit ({comparisons} comparisons by torch.equal).
The kernels, dense beside tied: {out}

The six lines that did it, one per row, after "import tiedparam as tp":

{lines}"""


def drawn(tie: TieLine, row: Row, dense: nn.Module, tied: nn.Module) -> Drawn:
    """What the picture shows of one law."""
    rule = get_tie(tied.get_submodule(tie.layer))
    entries = weight_of(dense.get_submodule(tie.layer)).numel()
    paths = [tie.options["source"], tie.layer] if "source" in tie.options else [tie.layer]
    return Drawn(
        tie.title,
        rule.law,
        f"dense: {entries:,} stored, {row.before:.1f} %",
        f"tied: {rule.free_count:,} stored, {row.after_tuning:.1f} %",
        {path: dense.get_submodule(path) for path in paths},
        {path: tied.get_submodule(path) for path in paths},
    )
