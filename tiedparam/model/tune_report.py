"""What `tune` found, as a table that people read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tiedparam.compute.timing import Time
from tiedparam.util.errors import Reason
from tiedparam.util.table import Column, Table, TableReport


@dataclass(frozen=True)
class TunedRow:
    """One tied layer.

    Attributes:
        layer: path of the layer in the model.
        rule: the rule with its options, as text.
        shape: of the weight.
        form: the form that the layer computes in from now on.
        automatic: the form that the library would have taken; None if the layer was not called.
        untied: the median of the time that the layer takes without the tie, with a weight of its
            own, and the spread; None if it was not measured.
        times: for each form that serves, the median of its time and the spread, in seconds; of a
            layer that is called several times, added up.
    """

    layer: str
    rule: str
    shape: tuple[int, ...]
    form: str
    automatic: str | None
    untied: Time | None
    times: dict[str, Time]

    @property
    def gain(self) -> float | None:
        """How many times as fast as without the tie the layer computes now: below 1 if slower."""
        return None if self.untied is None else self.untied.seconds / self._seconds

    @property
    def gain_by_tuning(self) -> float | None:
        """How many times as fast as before."""
        if self.automatic not in self.times:
            return None
        return self.times[self.automatic].seconds / self._seconds

    @property
    def _seconds(self) -> float:
        return self.times[self.form].seconds


@dataclass(frozen=True)
class _Milliseconds:
    """What a form took in each row."""

    form: str

    def __call__(self, row: TunedRow) -> float | None:
        return row.times[self.form].seconds * 1e3 if self.form in row.times else None


def _untied_milliseconds(row: TunedRow) -> float | None:
    return None if row.untied is None else row.untied.seconds * 1e3


@dataclass(frozen=True)
class TuneReport(TableReport[TunedRow]):
    """The forms that were measured, and those that were taken.

    Attributes:
        tuned: one row for every tied layer whose law offers forms.
        training: whether forward and backward were measured, or forward alone.

    Example:
        >>> layer = tp.register_tie(nn.Linear(64, 64), "row_repeat", init="rescale")
        >>> found = tp.tune(layer, torch.randn(32, 64), training=True)
        >>> found.training, len(found.rows())
        (True, 1)
    """

    tuned: tuple[TunedRow, ...]
    training: bool

    def table(self) -> Table[TunedRow]:
        """A row for each layer, and a column for each form."""
        forms = dict.fromkeys(form for row in self.tuned for form in row.times)
        columns: list[Column[TunedRow]] = [
            Column("layer", "layer", lambda row: row.layer or "the model itself"),
            Column("rule", "rule", lambda row: row.rule),
            Column("shape", "shape", lambda row: row.shape),
            Column("untied_ms", "untied, ms", _untied_milliseconds),
            *(Column(f"{form}_ms", f"{form}, ms", _Milliseconds(form)) for form in forms),
            Column("form", "takes", lambda row: row.form),
            Column("automatic", "before", lambda row: row.automatic),
            Column("gain", "× dense", lambda row: row.gain),
        ]
        return Table(columns, self.tuned)

    def remarks(self) -> list[Reason]:
        """What was measured, and which layers were not."""
        if not self.tuned:
            return [Reason("No tied layer has another form than the dense one.")]
        what = "Forward and backward pass" if self.training else "Forward pass without gradients"
        remarks = [Reason(f"{what}; medians. × dense compares with the untied layer.")]
        for chosen, why in ((True, "compute= names the form."), (False, "The model called none.")):
            left = [
                row.layer or "the model itself"
                for row in self.tuned
                if not row.times and (row.automatic is not None) is chosen
            ]
            if left:
                remarks.append(Reason(f"Not measured: {', '.join(left)}.", why))
        return remarks

    def to_data(self) -> dict[str, Any]:
        """Rows, notes, and what was measured."""
        return {
            "kind": "tune",
            "training": self.training,
            **super().to_data(),
        }
