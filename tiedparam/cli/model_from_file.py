"""A checkpoint file as a model of stock layers, made from names and shapes alone.

So that `scan`, `tie_model`, `report`, `save` and `export_dense` work on a file without the code
of its model. A weight with two axes is taken for that of an ``nn.Linear``, one with three to
five for that of a convolution. Groups, transposition, and whether a matrix has its inputs first
cannot be seen in a shape: `LayerHint` states them. The tensors are views of the file, read when
they are used.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from tiedparam.files import header as files_header
from tiedparam.files.header import Header
from tiedparam.files.law_options import sources_in
from tiedparam.files.load import load
from tiedparam.files.plain_state import aliases_of
from tiedparam.files.stored_tie import StoredTie
from tiedparam.formats.atomic import PathLike
from tiedparam.formats.checkpoint import StoredCheckpoint
from tiedparam.laws.functions import Functions
from tiedparam.model.plan_file import read_data
from tiedparam.util.errors import TieError, key_of, quoted, shortened, some_of, within
from tiedparam.util.torch_private import (
    buffers_of,
    original_key,
    parameters_of,
    set_state_version,
)

_FREE = re.compile(r"(?:(?P<layer>.*)\.)?parametrizations\.(?P<tensor>[^.]+)\.original\d*")
_DEEPEST = 100
"""Modules in modules: torch visits them by recursion."""

_STATISTICS = frozenset({"running_mean", "running_var"})
_CONVOLUTIONS: dict[int, tuple[Any, Any]] = {
    3: (nn.Conv1d, nn.ConvTranspose1d),
    4: (nn.Conv2d, nn.ConvTranspose2d),
    5: (nn.Conv3d, nn.ConvTranspose3d),
}


@dataclass(frozen=True)
class LayerHint:
    """What a file does not show of a layer.

    Attributes:
        pattern: a glob over layer names.
        groups: the groups of a convolution.
        transposed: whether it is a transposed convolution, or a matrix with its inputs first.
    """

    pattern: str
    groups: int = 1
    transposed: bool = False


class InputsFirst(nn.Module):
    """Stands for GPT-2's ``Conv1D``, a linear layer that stores ``W[in, out]`` (`Layout`)."""


def read_hints(path: PathLike) -> list[LayerHint]:
    """The tables ``[[layer]]`` of a plan's file: ``layers`` (a glob), ``groups``, ``transposed``.

    Raises:
        TieError: if one of them is malformed.
        OSError: if the file cannot be read.
    """
    data = read_data(path)
    tables = data.get("layer", []) if isinstance(data, dict) else []
    hints = []
    for number, table in enumerate(tables if isinstance(tables, list) else [tables], start=1):
        if not _is_hint(table):
            where = f"entry {number} of the tables 'layer' in '{path}'"
            raise TieError(
                where,
                f"{where} is malformed.",
                'Write layers = "a glob", and groups = a number or transposed = true.',
            )
        hints.append(
            LayerHint(table["layers"], table.get("groups", 1), table.get("transposed", False))
        )
    return hints


def _is_hint(table: Any) -> bool:
    return (
        isinstance(table, dict)
        and table.keys() <= {"layers", "groups", "transposed"}
        and isinstance(table.get("layers"), str)
        and type(table.get("groups", 1)) is int
        and type(table.get("transposed", False)) is bool
    )


def open_model(
    path: PathLike,
    hints: Iterable[LayerHint] = (),
    key: str | None = None,
    functions: Functions | None = None,
) -> nn.Module:
    """The model that a checkpoint file holds the state of, as far as the file shows it.

    Args:
        path: any file that `tiedparam.load` reads. One by `tiedparam.save` comes out tied.
        hints: groups and transposition of layers; for each the first that fits counts.
            What the header of a tied file says goes first.
        key: in which entry of a file by ``torch.save`` the state dict stands.
        functions: what copies in the file may have as ``fn=``; see `tiedparam.load`.

    Returns:
        A model with the file's names, whose layers cannot be called in a meaningful order.

    Raises:
        TieError: if the file is damaged, its names make no model, it was tied without a header
            that says how, or a hint fits no layer.
        OSError: if the file cannot be read.
    """
    stored, hints = StoredCheckpoint(path, key), list(hints)
    try:
        header = files_header.read(stored.metadata)
        if header is None:
            tensors = dict(stored)
            aliases = aliases_of(stored)
            _refuse_unknown_ties(tensors)
            model = _build(tensors, aliases, {}, hints)
        else:
            tensors, aliases, twins = _dense_form(stored, header)
            known = [_hint_of(tie) for tie in header.ties if tie.tensor == "weight"]
            model = _build(tensors, aliases, twins, [*known, *hints])
        _refuse_idle(hints, tensors)
    except TieError as error:
        raise within(f"cannot make a model from '{path}'", error) from error
    versions = header.versions if header is not None else _versions(stored.module_metadata)
    for name, module in model.named_modules():
        if name in versions:
            set_state_version(module, versions[name])
    return model if header is None else load(path, model, functions=functions)


def _refuse_unknown_ties(names: Iterable[str]) -> None:
    for name in names:
        if (match := _FREE.fullmatch(name)) is not None:
            key = quoted(key_of(match["layer"] or "", match["tensor"]))
            raise TieError(
                key,
                f"{key} is parametrized in it, and it does not say how.",
                "Load it into its model in Python, and write it with tiedparam.save or "
                "tiedparam.export_dense.",
            )


def _hint_of(tie: StoredTie) -> LayerHint:
    return LayerHint(glob.escape(tie.layer), tie.groups, tie.transposed)


def _versions(module_metadata: Mapping[str, Any]) -> dict[str, int]:
    return {
        path: entry["version"]
        for path, entry in module_metadata.items()
        if isinstance(entry, dict) and type(entry.get("version")) is int
    }


def _dense_form(
    stored: StoredCheckpoint, header: Header
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """What a tied file would hold without its ties, with tensors that have no values.

    Returns:
        The tensors, the names of tensors that are one with another, and the paths of layers
        that are one with another.
    """
    ties = {tie.key: tie for tie in header.ties}
    known: dict[str, torch.dtype] = {}
    of_laws = tuple(tie.path_of_rule for tie in header.ties)
    result = {
        name: torch.empty(value.shape, dtype=value.dtype, device="meta")
        for name, value in stored.items()
        if _FREE.fullmatch(name) is None and not name.startswith(of_laws)
    }
    aliases, twins = {}, {}
    for alias, kept in header.aliases.items():
        one, other = _FREE.fullmatch(alias), _FREE.fullmatch(kept)
        if one is not None and other is not None:
            twins[one["layer"] or ""] = other["layer"] or ""
        elif kept in result:
            result[alias] = result[kept]
            aliases[alias] = kept
    for tie in header.ties:
        if tie.stacked:
            raise TieError(
                quoted(tie.key),
                f"another parametrization was stacked on the tie of {quoted(tie.key)}.",
                "Load it into its model in Python.",
            )
        dtype = _dtype_of(tie, ties, stored, header.aliases, known)
        result[tie.key] = torch.empty(tie.shape, dtype=dtype, device="meta")
    return result, aliases, twins


def _dtype_of(
    tie: StoredTie,
    ties: Mapping[str, StoredTie],
    stored: Mapping[str, Tensor],
    aliases: Mapping[str, str],
    known: dict[str, torch.dtype],
) -> torch.dtype:
    """The dtype of a tied tensor; ``known`` keeps those of the copies that were followed."""
    chain: dict[str, None] = {}
    key = tie.key
    while key in ties and key not in chain and key not in known:
        chain[key] = None
        tie = ties[key]
        first = original_key(tie.layer, tie.tensor, 0)
        first = aliases.get(first, first)
        if first in stored:
            key = first
            break
        # along the chain of copies; of several sources the first one says it
        key = next((key_of(*source) for source in sources_in(tie.options)), "")
    if key in known:
        known.update(dict.fromkeys(chain, known[key]))
        return known[key]
    key = aliases.get(key, key)
    if key not in stored:
        raise TieError(
            quoted(tie.key), f"it has no values for {quoted(tie.key)}.", "Fetch or save it again."
        )
    known.update(dict.fromkeys(chain, stored[key].dtype))
    return stored[key].dtype


# From names to layers ----------------------------------------------------------------------


def _build(
    tensors: Mapping[str, Tensor],
    aliases: Mapping[str, str],
    twins: Mapping[str, str],
    hints: list[LayerHint],
) -> nn.Module:
    layers: dict[str, dict[str, Tensor]] = {"": {}}
    for key, value in tensors.items():
        path, _, name = key.rpartition(".")
        ancestors = path.split(".") if path else []
        if len(ancestors) > _DEEPEST:
            raise TieError(
                quoted(key),
                f"the name {quoted(key)} is nested {len(ancestors):,} modules deep.",
                "Rename it.",
            )
        for depth in range(1, len(ancestors) + 1):
            layers.setdefault(".".join(ancestors[:depth]), {})
        layers[path][name] = value
    for path in twins:
        if path not in layers or twins[path] not in layers:
            raise TieError(
                quoted(path), f"its alias {quoted(path)} is wrong.", "Fetch or save it again."
            )
    modules = {
        path: _layer(path, content, _hint_for(path, hints))
        for path, content in layers.items()
        if path not in twins
    }
    modules |= {path: modules[kept] for path, kept in twins.items()}
    for path in layers:
        if path:
            parent, _, name = path.rpartition(".")
            if parent not in twins:
                _named(path, modules[parent].add_module, name, modules[path])
    for alias, kept in aliases.items():
        path, _, name = alias.rpartition(".")
        kept_path, _, kept_name = kept.rpartition(".")
        if path not in twins:
            for table_of in (parameters_of, buffers_of):
                table: dict[str, Any] = table_of(modules[path])
                if name in table:
                    table[name] = table_of(modules[kept_path]).get(kept_name)
    return modules[""]


def _layer(path: str, tensors: Mapping[str, Tensor], hint: LayerHint | None) -> nn.Module:
    weight = tensors.get("weight")
    layer = nn.Module()
    if weight is not None and _is_trained("weight", weight) and 0 not in weight.shape:
        bias = "bias" in tensors
        if weight.dim() == 2:
            outputs, inputs = weight.shape
            inputs_first = hint is not None and hint.transposed
            layer = (
                InputsFirst() if inputs_first else nn.Linear(inputs, outputs, bias, device="meta")
            )
        elif weight.dim() in _CONVOLUTIONS:
            layer = _convolution(path, tuple(weight.shape), bias, hint or LayerHint(path))
    for name, value in tensors.items():
        if _is_trained(name, value):
            parameter = nn.Parameter(value)
            _named(key_of(path, name), layer.register_parameter, name, parameter)
        else:
            _named(key_of(path, name), layer.register_buffer, name, value)
    return layer


def _convolution(path: str, shape: tuple[int, ...], bias: bool, hint: LayerHint) -> nn.Module:
    first, second, *kernel = shape
    if hint.groups < 1 or first % hint.groups:
        raise TieError(
            quoted(path),
            f"{quoted(path)} cannot have {hint.groups} groups, because its weight is {shape}.",
            f"Give a divisor of {first}.",
        )
    inputs, outputs = second * hint.groups, first
    if hint.transposed:
        inputs, outputs = first, second * hint.groups
    kind = _CONVOLUTIONS[len(shape)][hint.transposed]
    made: nn.Module = kind(
        inputs, outputs, tuple(kernel), groups=hint.groups, bias=bias, device="meta"
    )
    return made


def _is_trained(name: str, value: Tensor) -> bool:
    """Whether it is a Parameter, and not a buffer, as far as one can tell."""
    return name not in _STATISTICS and (value.is_floating_point() or value.is_complex())


def _hint_for(path: str, hints: Iterable[LayerHint]) -> LayerHint | None:
    return next((hint for hint in hints if fnmatchcase(path, hint.pattern)), None)


def _refuse_idle(hints: Iterable[LayerHint], tensors: Mapping[str, Tensor]) -> None:
    axes = {
        key.rpartition(".")[0]: value.dim()
        for key, value in tensors.items()
        if key.rpartition(".")[2] == "weight"
    }
    convolutions = [path for path, count in axes.items() if count in _CONVOLUTIONS]
    matrices = [path for path, count in axes.items() if count == 2]
    for hint in hints:
        either = hint.transposed and hint.groups == 1
        fitting = [*convolutions, *matrices] if either else convolutions
        if not any(fnmatchcase(path, hint.pattern) for path in fitting):
            known = some_of([quoted(path) for path in fitting]) or "none"
            kind = "convolution or matrix" if either else "convolution"
            raise TieError(
                f"'{hint.pattern}'", f"no {kind} is called '{hint.pattern}'.", f"It has {known}."
            )


def _named(key: str, enter: Any, *arguments: Any) -> None:
    try:
        enter(*arguments)
    except KeyError as error:
        raise TieError(
            quoted(key),
            f"no tensor of a model can have the name {quoted(key)} ({shortened(error)}).",
            "Rename it.",
        ) from error
