"""What a tied model stores, computes and saves, as tables that people read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tiedparam.compute.kept import is_frozen
from tiedparam.laws.rule import Rule
from tiedparam.model import cost
from tiedparam.model.columns import WHAT_IT_COSTS, WHAT_IT_GAINS, WHAT_IT_TIES, WHERE_IT_LIES
from tiedparam.model.reasons import Skipped
from tiedparam.model.size_curve import SizeStep, curve_remark
from tiedparam.model.tie_row import TieRow
from tiedparam.model.totals import Totals, totals_of
from tiedparam.state.optimizer_moves import as_optimizers
from tiedparam.tie.lookup import origins, ties_in
from tiedparam.tie.record import Tie
from tiedparam.tie.sources import refuse_exchanged
from tiedparam.util.errors import Reason, key_of
from tiedparam.util.parametrized import tensor_at
from tiedparam.util.table import Column, Table, TableReport, plain, show

_COLUMNS: list[Column[TieRow]] = [*WHAT_IT_TIES, *WHAT_IT_COSTS, *WHAT_IT_GAINS]
_ONLY_DATA: list[Column[TieRow]] = [
    *WHERE_IT_LIES,
    Column("gain_training", "", lambda r: r.gain_training),
    Column("inference_measured", "", lambda r: r.inference_measured),
    Column("training_measured", "", lambda r: r.training_measured),
    Column("positions", "", lambda r: r.positions),
    Column("bytes_per_value", "", lambda r: r.bytes_per_value),
    Column("trained", "", lambda r: r.trained),
    Column("form_in_vain", "", lambda r: r.form_in_vain),
]


@dataclass(frozen=True)
class Report(TableReport[TieRow]):
    """The ties of a model and what they save.

    Attributes:
        ties: one row for every tied tensor, in the model's order.
        totals: sums over the whole model.

    Example:
        >>> model = nn.Sequential(tp.register_tie(nn.Linear(4, 4), "flip_sym"), nn.Linear(4, 2))
        >>> found = tp.report(model)
        >>> found.rows()[0]["free_values"], found.rows()[0]["dense_values"]
        (10, 16)
        >>> print(found.notes()[0])
        Values of the model: 24 of 30 dense (80.0%).
    """

    ties: tuple[TieRow, ...]
    totals: Totals

    def table(self) -> Table[TieRow]:
        """One row for every tied tensor."""
        return Table(_COLUMNS, self.ties)

    def rows(self) -> list[dict[str, Any]]:
        """A flat dictionary for every tied tensor."""
        return Table([*_COLUMNS, *_ONLY_DATA], self.ties).data()

    def remarks(self) -> list[Reason]:
        """The totals, with how they are counted."""
        t = self.totals
        remarks = [] if self.ties else [Reason("Nothing is tied.")]
        remarks += [
            _saved("Values of the model", t.values_dense, t.values_stored),
            _saved("Checkpoint, without its header", t.checkpoint_dense, t.checkpoint_stored, " B"),
            _saved("Adam's two states", t.optimizer_dense, t.optimizer_stored, " B"),
        ]
        if t.optimizer_held is not None:
            remarks.append(Reason(f"State held by the optimizer: {show(t.optimizer_held)} B."))
        if t.multiply_adds_dense is not None and t.multiply_adds_tied is not None:
            remarks.append(
                _saved(
                    "Multiply-adds of these, forward", t.multiply_adds_dense, t.multiply_adds_tied
                )
            )
            unknown = sum(
                row.positions is None or row.multiply_adds_tied is None for row in self.ties
            )
            if unknown:
                of_all = f"{unknown} of {len(self.ties)} rows"
                remarks.append(Reason(f"Multiply-adds are not known for {of_all}."))
        remarks += [
            Reason(
                f"'{key_of(row.layer, row.tensor_name)}' computes densely: "
                f"compute='{row.form_in_vain}' serves float32 and float64 alone."
            )
            for row in self.ties
            if row.form_in_vain
        ]
        return remarks

    def to_data(self) -> dict[str, Any]:
        """Rows, totals and notes."""
        return {
            "kind": "report",
            "rows": plain(self.rows()),
            "totals": asdict(self.totals),
            "notes": self.notes(),
        }


@dataclass(frozen=True)
class TieReport(Report):
    """What `tie_model` did, or would do.

    Attributes:
        skipped: what could not be tied and was left alone (``on_unfit="skip"``).
        dry_run: whether everything was put back, so that nothing is tied.
        curve: what `tie_model` found for its ``target_size``: from all at their smallest, step by
            step to where most of the weights is kept for the bytes.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> seen = tp.tie_model(model, {nn.Linear: "flip_sym"}, dry_run=True, on_unfit="skip")
        >>> [row.layer for row in seen.ties], len(seen.skipped), tp.is_tied(model)
        (['0'], 1, False)
    """

    skipped: tuple[Skipped, ...] = ()
    dry_run: bool = False
    curve: tuple[SizeStep, ...] = ()

    def remarks(self) -> list[Reason]:
        """The totals, after what was skipped."""
        remarks = [Reason("A dry run: nothing was changed.")] if self.dry_run else []
        remarks += [
            Reason(f"Skipped: {left.place}: {left.why.fact}", left.why.remedy)
            for left in self.skipped
        ]
        remarks += super().remarks()
        if self.curve:
            remarks.append(curve_remark(self.curve, self.totals.checkpoint_dense))
        return remarks

    def to_data(self) -> dict[str, Any]:
        """Rows, totals, notes and what was skipped."""
        return {
            **super().to_data(),
            "kind": "tie",
            "dry_run": self.dry_run,
            "skipped": [left.to_data() for left in self.skipped],
            "curve": [step._asdict() for step in self.curve],
        }


def _saved(what: str, dense: int, stored: int, unit: str = "") -> Reason:
    share = f" ({stored / dense:.1%})" if dense else ""
    return Reason(f"{what}: {show(stored)}{unit} of {show(dense)}{unit} dense{share}.")


def report(
    model: nn.Module,
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    example: Any = None,
) -> Report:
    """What the ties of a model store, compute and save.

    Args:
        model: a model, tied or not.
        optimizer: the optimizer or optimizers of the model, to count the state that they hold.
        example: an input of the model: a tensor, a tuple of arguments, or a mapping of keyword
            arguments. The model then runs once, in eval mode, to count the positions that each
            layer works on.

    Returns:
        The report: print it, or take its `rows`, `to_markdown` or `to_json`.

    Raises:
        TieError: if a copy's source was exchanged for another module.

    Example:
        >>> model = nn.Sequential(tp.register_tie(nn.Linear(4, 4), "flip_sym"), nn.Linear(4, 2))
        >>> print(tp.report(model))
        tensor    rule      shape  dense  free...
        --------  --------  -----  -----  ----...
        0.weight  flip_sym  4×4       16    10...
        <BLANKLINE>
        Values of the model: 24 of 30 dense (80.0%).
        ...
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report takes an nn.Module, not {type(model).__name__}")
    optimizers = as_optimizers(optimizer)
    rows = tie_rows(model, example)
    return Report(rows, totals_of(model, rows, optimizers))


def tie_rows(model: nn.Module, example: Any = None) -> tuple[TieRow, ...]:
    """One row for every tied tensor of the model; a layer with two names has one row."""
    work = cost.work(model, example) if example is not None else {}
    paths = {id(module): path for path, module in model.named_modules()}
    return tuple(
        _row(path, tie, paths, work.get(layer))
        for path, layer in model.named_modules()
        for tie in ties_in(layer)
    )


def _row(path: str, tie: Tie, paths: dict[int, str], work: cost.Work | None) -> TieRow:
    layer, name, rule = tie.layer, tie.tensor_name, tie.rule
    refuse_exchanged(tie.values)  # what is said would be of a layer that is gone
    shape = rule.bound_layout.shape
    counts = rule.multiplicities() if rule.has_orbits else ()
    costs = cost.multiply_adds(layer, name, shape, rule)
    stored = list(origins(layer, name))
    sample: list[Tensor] = [*stored]
    if not stored and not rule.reads_layers:  # laws together may leave nothing
        sample = [tie.tied()]
    like = sample[0] if sample else torch.empty((), device="cpu")
    gains = cost.gains(
        layer,
        name,
        rule,
        like,
        computing=tie.computing,
        rows=work.rows if work else None,
        kept=is_frozen(tie.values),
    )
    return TieRow(
        layer=path,
        tensor_name=name,
        rule=_described(rule, paths),
        shape=shape,
        dense_values=torch.Size(shape).numel(),
        free_values=rule.free_count,
        multiplicity=(
            (int(min(c.min() for c in counts)), int(max(c.max() for c in counts)))
            if counts
            else None
        ),
        residual=tie.residual_at_tying,
        multiply_adds_dense=costs[0] if costs else None,
        multiply_adds_tied=costs[1] if costs else None,
        positions=work.positions if work else None,
        gain_inference=gains.inference,
        gain_training=gains.training,
        inference_measured=gains.measured[0],
        training_measured=gains.measured[1],
        bytes_per_value=sample[0].element_size() if sample else 0,
        trained=any(parameter.requires_grad for parameter in stored),
        form_in_vain=tie.computing.in_vain(like) if tie.computing else None,
    )


def _described(rule: Rule, paths: dict[int, str]) -> str:
    """The rule, and the tensors that it reads."""
    places = [
        key_of(*tensor_at(paths[id(source)], name))
        if id(source) in paths
        else "a layer outside of the model"
        for source, name in rule.sources()
    ]
    return f"{rule} of {' and '.join(places)}" if places else str(rule)
