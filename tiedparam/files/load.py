"""Whole models in files: the free values with their laws, and dense exports.

`load` reads top to bottom: open and check the file, see that every tie, name, shape and dtype
fits; only then tie and fill the model, and put everything back if something fails midway.
"""

from __future__ import annotations

import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from tiedparam.files import header as _header
from tiedparam.files.compatible_entries import entries_for, placeholder, ties_to_make
from tiedparam.files.header import Header
from tiedparam.formats.atomic import PathLike, whole_files
from tiedparam.formats.checkpoint import StoredCheckpoint
from tiedparam.formats.exports import MARK, index_content, index_of, left_by_older, shards_of
from tiedparam.formats.safetensors import Entry, check_entries, refuse_foreign_suffix, write
from tiedparam.laws.functions import Functions, as_functions
from tiedparam.laws.linked import Linked
from tiedparam.layer.register import tie_one
from tiedparam.state.dictionaries import untie_with
from tiedparam.state.optimizer_guard import watch_free_values
from tiedparam.tie.lookup import free_values, is_tied, named_ties, tie_of
from tiedparam.tie.offloaded import TO_BRING_BACK, is_offloaded
from tiedparam.tie.parameter_paths import Places
from tiedparam.tie.rollback import rolled_back_on_error
from tiedparam.util.errors import TieError, shortened
from tiedparam.util.progress import progress
from tiedparam.util.torch_private import effective

Model = TypeVar("Model", bound=nn.Module)

_SMALL_SHARD, _MANY_SHARDS = 10**6, 100
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def save(model: nn.Module, path: PathLike) -> None:
    """Write a model to one safetensors file: free values only, with the laws in its header.

    Of a tied tensor the free values are stored, of a copy nothing, and a tensor that stands
    under several names once. Everything else that ``state_dict()`` has is stored as it is. The
    header says which rules tie which tensors, as names and options, so that `load` can tie a
    fresh model. The file appears whole or not at all.

    Args:
        model: the model; its parameters may lie on any device.
        path: the file. One that is there is replaced, and so are the shards and the index that
            an older export of that name left.

    Raises:
        TieError: if the state is not made of plain tensors with values, or a tie cannot be
            named in a file: a function that no module has by its name (a lambda, a partial), a
            source outside of the model, a rule without a registered name. Nothing was written
            then.
        OSError: if the file cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save takes a model and a path, in this order, not {type(model).__name__}")
    refuse_foreign_suffix(path)
    state = _plain_state(model)
    with torch.no_grad():
        for _, layer, name, rule in named_ties(model):
            if isinstance(rule, Linked):
                effective(layer, name)  # one that its source does not fit could not be loaded
    aliases = aliases_of(state)
    header = _header.of_model(model, aliases)
    entries = [_entry(key, value) for key, value in state.items() if key not in aliases]
    check_entries(entries)
    with whole_files(lambda: left_by_older(Path(path))) as open_file, _bar(entries) as advance:
        write(
            open_file(path),
            entries,
            lambda entry: state[entry.name],
            {_header.KEY: header.to_json()},
            checksum=True,
            advance=advance,
        )


def load(path: PathLike, model: Model, *, functions: Functions | None = None) -> Model:
    """Fill a model from a file: one by `save`, or any dense checkpoint.

    A file by `save` ties a fresh dense model as its header says; a model that is tied already
    must be tied by the same laws. A dense checkpoint is projected where the model is tied, with
    a `TieWarning` for weights that break their law. Names, shapes, dtypes, rules and versions
    are all checked before the model is changed. If anything fails nevertheless, the whole model
    is put back as it was, ties included; for that, its values are held twice meanwhile.

    Args:
        path: a safetensors file, what ``torch.save`` wrote of a state dict, the index file of
            several (``*.index.json``), or a folder that holds one of these under the name that
            transformers' ``save_pretrained`` gives it. Pickles are read with ``weights_only=True``.
        model: the model. Parameters and persistent buffers on the meta device get memory on
            the CPU. A stored value may be widened to the model's dtype, but never rounded.
        functions: the functions that copies in the file may have, by the names under which they
            were saved: ``{"my_module:tile": my_module.tile}``. A file's word alone imports
            nothing. Not needed for `torch.t` and `torch.square`, nor for a copy that is tied by
            its function in the model already.

    Returns:
        The model itself.

    Raises:
        TieError: if the file is damaged, names a function that was not allowed, or does not
            fit the model; the message lists what.
        OSError: if the file cannot be read.

    Warns:
        TieWarning: if a dense weight was projected by more than rounding, or if the file holds
            one tensor where the model has several.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"load(path, model) takes an nn.Module, not {type(model).__name__}")
    functions = as_functions(functions)
    stored = StoredCheckpoint(path)
    try:
        header = _header.read(stored.metadata) or Header([], {}, {})
        if is_offloaded(model):  # what its tensors get is put away unread
            raise TieError(
                "accelerate offloads the model's values, and would bring the old ones back. "
                f"{TO_BRING_BACK}"
            )
        new = ties_to_make(header, model, stored.module_metadata, functions)
        entries = entries_for(model, stored, header, new, functions)
        with _values_kept_on_error(model), rolled_back_on_error(model.modules(), ()):
            places = Places(model)
            for tie, rule in new:
                layer = model.get_submodule(tie.layer)
                if not is_tied(layer, tie.tensor):  # a layer under two names is tied once
                    tie_one(layer, rule, tie.tensor, places)  # whatever it held: it is replaced
            _give_memory(model)
            _load_state_dict(model, entries)
            for tie in header.ties:  # not that of the values that were replaced
                made = tie_of(model.get_submodule(tie.layer), tie.tensor)
                made.residual_at_tying = tie.residual
    except RecursionError as error:
        raise TieError(
            f"cannot load '{path}': its copies read each other in too long a chain. Tie each to "
            "the first."
        ) from error
    except TieError as error:
        raise TieError(f"cannot load '{path}': {error}") from error
    return model


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
        TieError: if the state is not made of plain tensors with values, or the size is none, or
            too small. Nothing was written.
        OSError: if a file cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"export_dense takes a model and a path, in this order, not {type(model).__name__}"
        )
    refuse_foreign_suffix(path)
    limit = None if max_shard_size is None else _bytes_of(max_shard_size)
    state = untie_with(
        model, _plain_state(model), lambda tie: placeholder(tie.layer, tie.tensor_name, tie.rule)
    )
    computed = {prefix + name: (layer, name) for prefix, layer, name, _ in named_ties(model)}
    entries = [_entry(key, value) for key, value in state.items()]
    check_entries(entries)

    def value_of(entry: Entry) -> Tensor:
        if entry.name not in computed:
            return state[entry.name]
        with torch.no_grad():
            return effective(*computed[entry.name])

    path = Path(path)
    shards = _shards(entries, limit)
    if limit is not None and limit < _SMALL_SHARD and len(shards) > _MANY_SHARDS:
        raise TieError(
            f"max_shard_size={max_shard_size!r} would make {len(shards):,} files. "
            "Give a size in bytes, or such as '5GB'."
        )
    files, metadata = [path], {"format": "pt"}
    if len(shards) > 1:
        files = shards_of(path, len(shards))
        metadata[MARK] = secrets.token_hex(16)
    with whole_files(lambda: left_by_older(path)) as open_file, _bar(entries) as advance:
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


# What is written ---------------------------------------------------------------------------


def _plain_state(model: nn.Module) -> OrderedDict[str, Tensor]:
    """The state dict, once it is known to consist of tensors that a file can hold."""
    state = OrderedDict(model.state_dict())
    for key, value in state.items():
        if not isinstance(value, Tensor):
            problem = f"is a {type(value).__name__}, and a safetensors file holds tensors only"
            remedy = "Use torch.save(model.state_dict(), path)."
        elif type(value) is not Tensor or value.layout is not torch.strided or value.is_quantized:
            problem = f"is a {type(value).__name__} of its own kind ({value.layout})"
            remedy = "Make it a plain tensor first: gather what is sharded, dequantize, densify."
        elif value.is_meta:
            problem = "is on the meta device and has no values"
            remedy = "Load or initialise the model first."
            if is_offloaded(model):
                problem, remedy = "is offloaded by accelerate", TO_BRING_BACK
        else:
            continue
        raise TieError(f"cannot save the model: '{key}' {problem}. {remedy}")
    return state


def aliases_of(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that stand under an earlier name already: theirs → the earlier."""
    first: dict[tuple[object, ...], str] = {}
    aliases = {}
    for key, value in state.items():
        if value.numel() == 0:
            continue  # no memory that could be shared
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        earlier = first.setdefault((*place, value.is_conj(), value.is_neg()), key)
        if earlier != key:
            aliases[key] = earlier
    return aliases


def _entry(key: str, value: Tensor) -> Entry:
    return Entry(key, value.dtype, tuple(value.shape))


def _bar(entries: Iterable[Entry]) -> AbstractContextManager[Callable[[int], None]]:
    """A progress bar for what is written, if that takes long and somebody watches."""
    return progress(sum(entry.nbytes for entry in entries), "writing")


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
        raise TieError(
            f"max_shard_size={shortened(repr(size))} is no size. Give a number of bytes, or a text "
            "such as '5GB'."
        )
    return count


# What is changed ---------------------------------------------------------------------------


@contextmanager
def _values_kept_on_error(model: nn.Module) -> Iterator[None]:
    """Put the values of all parameters and buffers back if the block raises."""
    tensors = {id(t): t.detach() for t in [*model.parameters(), *model.buffers()]}
    noted = []
    for memory in tensors.values():
        for axis, stride in enumerate(memory.stride()):
            if stride == 0 and memory.shape[axis] > 1:  # an expanded tensor cannot be written
                memory = memory.narrow(axis, 0, 1)
        if not memory.is_meta:
            noted.append((memory, memory.clone()))
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for memory, values in noted:
                memory.copy_(values)
        raise


def _give_memory(model: nn.Module) -> None:
    """Put parameters and persistent buffers that are on the meta device on the CPU."""
    made: dict[int, Tensor] = {}

    def on_cpu(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty_like(tensor, device="cpu")
        return made[id(tensor)]

    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                fresh = nn.Parameter(on_cpu(parameter), parameter.requires_grad)
                module._parameters[name] = parameters.setdefault(id(parameter), fresh)
        for name, buffer in module._buffers.items():
            persistent = name not in module._non_persistent_buffers_set
            if buffer is not None and buffer.is_meta and persistent:
                module._buffers[name] = on_cpu(buffer)
    if parameters:
        for prefix, layer, name, _ in named_ties(model):
            watch_free_values(free_values(layer, name), f"'{prefix}{name}'")


def _load_state_dict(model: nn.Module, entries: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(entries)
    except RuntimeError as error:  # of a hook or a module of the user's, which nobody can foresee
        raise TieError(str(error)) from error
