"""Checkpoint files of every kind, read as one table: names → tensors.

A ``.safetensors`` file, what ``torch.save`` wrote of a state dict, several of either kind
with an index file, or a folder that holds one of these as transformers' ``save_pretrained`` names
it. The tensors are read when they are used. Pickles are read with torch's
``weights_only=True``, so no code of a file is ever run.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiedparam.formats.atomic import PathLike
from tiedparam.formats.exports import (
    INDEX,
    MARK,
    index_of,
    left_by_older,
    read_index,
    refuse_mixture,
)
from tiedparam.formats.safetensors import SafetensorsFile
from tiedparam.formats.torch_archive import is_mappable
from tiedparam.util.errors import TieError, quoted, shortened, some_of

_IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What transformers calls the weights in a folder; each is a whole checkpoint."""
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", INDEX)
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.\w+)")


class StoredCheckpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name.

    Args:
        path: a file, the index of a sharded checkpoint (``*.index.json``), or a folder that holds
            one of the two.
        key: in which entry of a file by ``torch.save`` the state dict stands, if that holds more.

    Attributes:
        path: of the file.
        metadata: what a single safetensors file's header says beside the tensors.
        module_metadata: what torch notes of each module in a saved state dict.

    Raises:
        TieError: if the files do not hold a checkpoint, or not a whole one, or a folder holds
            none or several.
        OSError: if they cannot be opened.
    """

    def __init__(self, path: PathLike, key: str | None = None) -> None:
        self.path = file_of(Path(path))
        self.metadata: dict[str, str] = {}
        self.module_metadata: dict[str, Any] = {}
        self._parts: dict[str, Mapping[str, Tensor]] = {}
        if self.path.name.endswith(INDEX):
            self._open_shards(key)
            return
        try:
            tensors = _open_one(self.path, key)
        except FileNotFoundError:
            index = index_of(self.path)
            if not index.exists():
                raise
            raise TieError(f"there is no '{self.path}'. Name its index, '{index}'.") from None
        if isinstance(tensors, SafetensorsFile):
            self.metadata = tensors.metadata
        else:
            self.module_metadata = _module_metadata(tensors)
        self._parts = dict.fromkeys(tensors, tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def _open_shards(self, key: str | None) -> None:
        try:
            places, mark = read_index(self.path)
        except FileNotFoundError:
            _refuse_lost_index(self.path)
            raise
        shards: dict[str, Mapping[str, Tensor]] = {}
        for name in dict.fromkeys(places.values()):
            file = self.path.with_name(name)
            try:
                shards[name] = _open_one(file, key)
            except FileNotFoundError as error:
                raise TieError(
                    f"'{self.path}' names the file {quoted(name)}, which is not beside it. "
                    "Fetch all of its files."
                ) from error
        refuse_mixture(self.path, mark, {name: _mark_of(shard) for name, shard in shards.items()})
        listed: dict[str, set[str]] = {name: set() for name in shards}
        for tensor, name in places.items():
            listed[name].add(tensor)
        for name, shard in shards.items():
            if listed[name] != set(shard):
                wrong = [quoted(tensor) for tensor in sorted(listed[name] ^ set(shard))]
                raise TieError(
                    f"'{self.path}' and its file {quoted(name)} disagree on {some_of(wrong)}. "
                    "Fetch both again."
                )
        self._parts = {key: shards[place] for key, place in places.items()}


def file_of(path: Path) -> Path:
    """The file that a path means: itself, or the one checkpoint of a folder.

    Raises:
        TieError: if a folder holds no checkpoint, or several; the message says what it holds.
    """
    if not path.is_dir():
        return path
    known = [name for name in _IN_FOLDERS if (path / name).is_file()]
    if len(known) == 1:
        return path / known[0]
    if known:
        raise TieError(
            f"the folder '{path}' holds several checkpoints: {_names(known)}. Name the one "
            f"that you mean, such as '{path / known[0]}'."
        )
    names = sorted(entry.name for entry in path.iterdir() if entry.name.endswith(_ENDINGS))
    shards = [match for name in names if (match := _SHARD.fullmatch(name)) is not None]
    lost = [shard for shard in shards if f"{shard[1]}{shard[2]}{INDEX}" not in names]
    if lost:
        raise TieError(
            f"the folder '{path}' holds parts of a checkpoint without their index: "
            f"{_names([shard[0] for shard in lost])}. Fetch '{lost[0][1]}{lost[0][2]}{INDEX}' as "
            "well."
        )
    parts = {shard[0] for shard in shards}
    names = [name for name in names if name not in parts]  # their index stands for them
    expected = _names(_IN_FOLDERS)
    if names:
        raise TieError(
            f"the folder '{path}' holds none of {expected}. It holds {_names(names)}. Name the "
            f"file that you mean, such as '{path / names[0]}'."
        )
    raise TieError(
        f"the folder '{path}' holds no checkpoint: none of {expected}. Name another folder, or a "
        "file."
    )


def index_beside(path: Path) -> Path | None:
    """The index beside a file that is named as one of several, if there is one."""
    match = _SHARD.fullmatch(path.name)
    index = path.with_name(f"{match[1]}{match[2]}{INDEX}") if match is not None else path
    return index if match is not None and index.is_file() else None


def files_of(path: Path) -> list[Path]:
    """All files that a checkpoint consists of."""
    path = file_of(path)
    if not path.name.endswith(INDEX):
        return [path]
    places, _ = read_index(path)
    return [path, *(path.with_name(name) for name in dict.fromkeys(places.values()))]


def _module_metadata(tensors: object) -> dict[str, Any]:
    """What torch notes of each module, as far as it has the form that torch gives it."""
    noted = getattr(tensors, "_metadata", None)
    return {
        path: entry
        for path, entry in (noted.items() if isinstance(noted, Mapping) else ())
        if isinstance(path, str)
        and isinstance(entry, dict)
        and type(entry.get("version")) in (int, type(None))
    }


def _mark_of(shard: Mapping[str, Tensor]) -> str | None:
    return shard.metadata.get(MARK) if isinstance(shard, SafetensorsFile) else None


def _refuse_lost_index(index: Path) -> None:
    """Say what an index that does not exist may mean."""
    single = index.with_name(index.name.removesuffix(INDEX))
    if single.is_file():
        raise TieError(f"there is no '{index}'. Name the file '{single}'.") from None
    if left_by_older(single):
        raise TieError(
            f"there is no '{index}', and shards of that name are there: an export over an older "
            "one was interrupted. Export the model again."
        ) from None


def _open_one(path: Path, key: str | None) -> Mapping[str, Tensor]:
    with path.open("rb") as file:
        start, size = file.read(9), os.fstat(file.fileno()).st_size
    # "{" follows the length in a safetensors file; a zip or a pickle has other things there
    is_archive = start[:4] == b"PK\x03\x04"
    if start[8:] != b"{" and (is_archive or start[:1] == b"\x80"):
        return _open_torch(path, key, is_archive)
    # of a safetensors file the first eight bytes are a length
    if start[8:] not in (b"", b"{") and int.from_bytes(start[:8], "little") > size:
        raise TieError(
            f"'{path}' is no checkpoint. What is read: a safetensors file, what torch.save wrote "
            "of a state dict, or the index of several (*.index.json)."
        )
    if key is not None:
        raise TieError(
            f"'{path}' is a safetensors file, which has no entries such as '{key}'. "
            "Read it without a key."
        )
    return SafetensorsFile(path)


def _open_torch(path: Path, key: str | None, is_archive: bool) -> Mapping[str, Tensor]:
    if path.suffix.lower() == ".safetensors":  # torch.load goes by the name
        raise TieError(
            f"'{path}' is no safetensors file: it was written by torch.save. Call it '.pt'."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch suspects of a file that is none
            # mapped where that is right: a tensor's bytes are read when it is used
            mapped = is_archive and is_mappable(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # every kind of broken pickle has an exception of its own
        said = str(error).lower()
        unknown = isinstance(error, pickle.UnpicklingError) and "unsupported" in said
        if "weights_only" in said or unknown:
            reason = "it holds more than tensors, and code of a file is never run"
        else:
            reason = "it is damaged or not a torch file"
        raise TieError(
            f"cannot read '{path}': {reason}. Save model.state_dict() and nothing else."
        ) from error
    place = f"'{path}'"
    if key is not None:
        if not isinstance(loaded, Mapping) or key not in loaded:
            names = [quoted(name) for name in loaded] if isinstance(loaded, Mapping) else []
            raise TieError(f"{place} has no entry '{key}'. It has {some_of(names) or 'none'}.")
        loaded, place = loaded[key], f"the entry '{key}' of {place}"
    problem = _not_a_state_dict(loaded)
    if problem is not None:
        raise TieError(f"{place} holds no state dict: {problem}")
    tensors: Mapping[str, Tensor] = loaded
    return tensors


def _not_a_state_dict(loaded: object) -> str | None:
    if not isinstance(loaded, Mapping):
        return f"it holds a {type(loaded).__name__}. Save model.state_dict()."
    for key, value in loaded.items():
        if isinstance(key, str) and isinstance(value, Tensor):
            if value.layout is not torch.strided or value.is_meta:
                kind = "on the meta device" if value.is_meta else f"of the layout {value.layout}"
                return f"its entry {quoted(key)} is {kind}. Save dense tensors with values."
            continue
        inner = [
            k for k, v in loaded.items() if isinstance(v, Mapping) and _not_a_state_dict(v) is None
        ]
        if inner:
            name = shortened(inner[0])
            return f"its entry '{name}' is one. Save that alone (in the shell: --key {name})."
        shown = quoted(key) if isinstance(key, str) else shortened(repr(key))
        return f"its entry {shown} is a {type(value).__name__}. Save model.state_dict() alone."
    return None


def _names(names: Sequence[str]) -> str:
    return some_of([quoted(name) for name in names])
