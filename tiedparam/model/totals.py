"""Sums over a model: what it stores, saves and computes, with its ties and without."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from tiedparam.model.tie_row import TieRow
from tiedparam.tie.lookup import ties_in
from tiedparam.util.torch_private import buffers_of, unsaved_buffers_of


@dataclass(frozen=True)
class Totals:
    """Sums over the whole model, tied and not.

    Attributes:
        values_dense: entries of all Parameters, if nothing were tied.
        values_stored: entries of all Parameters that there are; a shared one counts once.
        checkpoint_dense: bytes of Parameters and persistent buffers, if nothing were tied.
        checkpoint_stored: the same as it is; a file adds its header.
        optimizer_dense: bytes of Adam's two states for all trainable values, if nothing
            were tied.
        optimizer_stored: the same as it is.
        optimizer_held: bytes of the tensors that the given optimizers hold as state; None if
            none was given.
        multiply_adds_dense: of the rows of the table whose positions are known, for the
            example, without ties; None without an example.
        multiply_adds_tied: the same with ties.
    """

    values_dense: int
    values_stored: int
    checkpoint_dense: int
    checkpoint_stored: int
    optimizer_dense: int
    optimizer_stored: int
    optimizer_held: int | None = None
    multiply_adds_dense: int | None = None
    multiply_adds_tied: int | None = None


def totals_of(model: nn.Module, rows: Iterable[TieRow], optimizers: list[Optimizer]) -> Totals:
    """The sums over a model whose ties are ``rows``; lazy layers have no numbers to count yet."""
    rows = list(rows)
    parameters = [p for p in model.parameters() if not is_lazy(p)]  # each once
    stored = sum(p.numel() for p in parameters)
    stored_bytes = sum(p.numel() * p.element_size() for p in parameters)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in _saved_buffers(model))
    of_laws = sum(data.numel() * data.element_size() for data in _data_of_laws(model))
    trainable = sum(2 * p.numel() * p.element_size() for p in parameters if p.requires_grad)
    saved = sum(row.dense_values - row.free_values for row in rows)
    saved_bytes = sum((r.dense_values - r.free_values) * r.bytes_per_value for r in rows)
    saved_states = sum(
        2 * (r.dense_values - r.free_values) * r.bytes_per_value for r in rows if r.trained
    )
    counted = [
        (row.multiply_adds_dense * row.positions, row.multiply_adds_tied * row.positions)
        for row in rows
        if row.positions is not None
        and row.multiply_adds_dense is not None
        and row.multiply_adds_tied is not None
    ]
    return Totals(
        values_dense=stored + saved,
        values_stored=stored,
        checkpoint_dense=stored_bytes + saved_bytes + buffers - of_laws,
        checkpoint_stored=stored_bytes + buffers,
        optimizer_dense=trainable + saved_states,
        optimizer_stored=trainable,
        optimizer_held=sum(map(state_bytes, optimizers)) if optimizers else None,
        multiply_adds_dense=sum(dense for dense, _ in counted) if counted else None,
        multiply_adds_tied=sum(tied for _, tied in counted) if counted else None,
    )


def _data_of_laws(model: nn.Module) -> Iterable[Tensor]:
    """What a dense model has no need of: masks and the like."""
    for module in model.modules():
        for tie in ties_in(module):
            yield from tie.data().values()


def _saved_buffers(model: nn.Module) -> Iterable[Tensor]:
    """Those that its state dict holds, each once, without those of lazy layers."""
    found = {}
    for module in model.modules():
        for name, buffer in buffers_of(module).items():
            if buffer is None or is_lazy(buffer):
                continue
            if name not in unsaved_buffers_of(module):
                found[id(buffer)] = buffer
    return found.values()


def state_bytes(optimizer: Optimizer) -> int:
    """The bytes of all tensors in an optimizer's state."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
