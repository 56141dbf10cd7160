"""The columns that the tables of ties and of scans have in common."""

from __future__ import annotations

from typing import Any

from tiedparam.util.errors import key_of
from tiedparam.util.table import Column, show


def _span(multiplicity: tuple[int, int] | None) -> str:
    """``4``, ``1–2``, or ``–`` for a copy."""
    if multiplicity is None:
        return "–"
    least, most = multiplicity
    return show(least) if least == most else f"{show(least)}–{show(most)}"


def _gains(row: Any) -> str:
    """``8.3 / 7.1`` without gradients and with; once where they are equal."""
    both: tuple[float | None, ...] = (row.gain_inference, row.gain_training)
    shown = [show(gain if gain is None else float(f"{gain:.2g}")) for gain in both]
    return " / ".join(dict.fromkeys(shown))


WHAT_IT_TIES: list[Column[Any]] = [
    Column("tensor", "tensor", lambda r: key_of(r.layer, r.tensor_name)),
    Column("rule", "rule", lambda r: r.rule),
    Column("shape", "shape", lambda r: r.shape),
    Column("dense_values", "dense", lambda r: r.dense_values),
    Column("free_values", "free", lambda r: r.free_values),
    Column("compression", "ratio", lambda r: r.compression),
    Column("multiplicity", "mult.", lambda r: r.multiplicity, lambda r: _span(r.multiplicity)),
    Column("residual", "residual", lambda r: r.residual),
]
WHAT_IT_COSTS: list[Column[Any]] = [
    Column("multiply_adds_dense", "mult-adds", lambda r: r.multiply_adds_dense),
    Column("multiply_adds_tied", "tied", lambda r: r.multiply_adds_tied),
]
WHAT_IT_GAINS: list[Column[Any]] = [
    Column("gain_inference", "× dense", lambda r: r.gain_inference, _gains),
]
WHERE_IT_LIES: list[Column[Any]] = [
    Column("layer", "", lambda r: r.layer),
    Column("tensor_name", "", lambda r: r.tensor_name),
]
