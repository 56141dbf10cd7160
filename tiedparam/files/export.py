"""A tied model as the dense files that any copy of it takes, in one part or in several."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

import torch
from torch import Tensor, nn

from tiedparam.files.placeholder import placeholder
from tiedparam.files.plain_state import entry_of, plain_state, writing_bar
from tiedparam.formats.atomic import PathLike, whole_files
from tiedparam.formats.exports import MARK, index_content, index_of, left_by_older, shards_of
from tiedparam.formats.safetensors import Entry, check_entries, refuse_foreign_suffix, write
from tiedparam.state.dictionaries import untie_with
from tiedparam.tie.lookup import named_ties_in
from tiedparam.util.errors import TieError, shortened

_SMALL_SHARD, _MANY_SHARDS = 10**6, 100
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def export_dense(
    model: nn.Module, path: PathLike, *, max_shard_size: int | str | None = None
) -> list[Path]:
    """Write the dense model to a safetensors file, as it would be without its ties.

    The tensors are expanded and written one at a time. The names are those of
    ``dense_state_dict(model)``; a tensor with several names is written under each, so that
    every plain copy of the model takes the file. It appears whole or not at all.

    Args:
        model: the model.
        path: the file. One that is there is replaced, and so are the shards and the index that
            an older export of that name left.
        max_shard_size: the largest size of one file in bytes, or like ``"5GB"`` or ``"500MiB"``.
            A larger model is written to ``<name>-00001-of-0000n.safetensors`` and so on, beside
            an index file ``<name>.safetensors.index.json``. A larger tensor has its own file.
            Below 1 MB it may not make more than 100 files.

    Returns:
        The files that were written; the index is the last.

    Raises:
        TieError: if the state is not made of plain tensors with values, or ``max_shard_size`` is
            not a size, or too small. Nothing was written.
        OSError: if a file cannot be written.

    Example:
        >>> model = tp.register_tie(nn.Linear(4, 4), "flip_sym")
        >>> [path.name for path in tp.export_dense(model, "dense.safetensors")]
        ['dense.safetensors']
        >>> torch.equal(tp.load("dense.safetensors", nn.Linear(4, 4)).weight, model.weight)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"export_dense takes a model and a path, in this order, not {type(model).__name__}"
        )
    refuse_foreign_suffix(path)
    limit = None if max_shard_size is None else _bytes_of(max_shard_size)
    state = untie_with(model, plain_state(model), placeholder)
    ties = {prefix + tie.tensor_name: tie for prefix, tie in named_ties_in(model)}
    entries = [entry_of(key, value) for key, value in state.items()]
    check_entries(entries)

    def value_of(entry: Entry) -> Tensor:
        if entry.name not in ties:
            return state[entry.name]
        with torch.no_grad():
            return ties[entry.name].weight()

    path = Path(path)
    shards = _shards(entries, limit)
    if limit is not None and limit < _SMALL_SHARD and len(shards) > _MANY_SHARDS:
        place = f"max_shard_size={max_shard_size!r}"
        fact = f"{place} would make {len(shards):,} files."
        raise TieError(place, fact, "Give a size in bytes, or such as '5GB'.")
    files, metadata = [path], {"format": "pt"}
    if len(shards) > 1:
        files = shards_of(path, len(shards))
        metadata[MARK] = secrets.token_hex(16)
    with whole_files(lambda: left_by_older(path)) as open_file, writing_bar(entries) as advance:
        for file, shard in zip(files, shards, strict=True):
            write(open_file(file), shard, value_of, metadata, advance=advance)
        if len(shards) > 1:
            size = sum(entry.nbytes for entry in entries)
            held = {
                file.name: [entry.name for entry in shard]
                for file, shard in zip(files, shards, strict=True)
            }
            files.append(index_of(path))
            open_file(files[-1]).write(index_content(held, size, metadata[MARK]))
    return files


def _shards(entries: list[Entry], limit: int | None) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if limit is not None and shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _bytes_of(size: int | str) -> int:
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?) ?([KMGT]I?B)?", str(size).upper())
    count = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if count < 1:
        place = f"max_shard_size={shortened(repr(size))}"
        raise TieError(
            place,
            f"{place} is not a size.",
            "Give a number of bytes, or a text such as '5GB'.",
        )
    return count
