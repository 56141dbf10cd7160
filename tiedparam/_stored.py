"""Checkpoint files of every kind, read as one table: names → tensors.

A ``.safetensors`` file, what ``torch.save`` wrote of a state dict, several of either kind
with an index file, or a folder that holds one of these as transformers' ``save_pretrained`` names
it. The tensors are read when they are used. Pickles are read with torch's
``weights_only=True``, so no code of a file is ever run.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiedparam._atomic import PathLike
from tiedparam._errors import TieError
from tiedparam._safetensors_format import SafetensorsFile

_INDEX = ".index.json"
_LARGEST_INDEX = 1 << 28
_LONGEST_NAME = 255  # bytes, of a file
_IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What transformers calls the weights in a folder; each is a whole checkpoint."""
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", _INDEX)
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
        if self.path.name.endswith(_INDEX):
            self._open_shards(key)
            return
        try:
            tensors = _open_one(self.path, key)
        except FileNotFoundError:
            index = self.path.with_name(self.path.name + _INDEX)
            if not index.exists():
                raise
            raise TieError(f"there is no '{self.path}'. Name its index, '{index}'.") from None
        if isinstance(tensors, SafetensorsFile):
            self.metadata = tensors.metadata
        else:
            self.module_metadata = dict(getattr(tensors, "_metadata", {}))
        self._parts = dict.fromkeys(tensors, tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def _open_shards(self, key: str | None) -> None:
        places = _read_index(self.path)
        shards: dict[str, Mapping[str, Tensor]] = {}
        for name in dict.fromkeys(places.values()):
            file = self.path.with_name(name)
            try:
                shards[name] = _open_one(file, key)
            except FileNotFoundError as error:
                raise TieError(
                    f"'{self.path}' names the file '{name}', which is not beside it. "
                    "Fetch all of its files."
                ) from error
        for name, shard in shards.items():
            listed = {key for key, place in places.items() if place == name}
            if listed != set(shard):
                raise TieError(
                    f"'{self.path}' and its file '{name}' disagree on "
                    f"{_some(sorted(listed ^ set(shard)))}. Fetch both again."
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
            f"the folder '{path}' holds several checkpoints: {_some(known)}. Name the one that you "
            f"mean, such as '{path / known[0]}'."
        )
    names = sorted(entry.name for entry in path.iterdir() if entry.name.endswith(_ENDINGS))
    shards = [match for name in names if (match := _SHARD.fullmatch(name)) is not None]
    if shards:
        index = f"{shards[0][1]}{shards[0][2]}{_INDEX}"
        raise TieError(
            f"the folder '{path}' holds parts of a checkpoint without their index: "
            f"{_some([shard[0] for shard in shards])}. Fetch '{index}' as well."
        )
    expected = _some(list(_IN_FOLDERS))
    if names:
        raise TieError(
            f"the folder '{path}' holds none of {expected}. It holds {_some(names)}. Name the file "
            f"that you mean, such as '{path / names[0]}'."
        )
    raise TieError(
        f"the folder '{path}' holds no checkpoint: none of {expected}. Name another folder, or a "
        "file."
    )


def files_of(path: Path) -> list[Path]:
    """All files that a checkpoint consists of."""
    path = file_of(path)
    if not path.name.endswith(_INDEX):
        return [path]
    return [path, *(path.with_name(name) for name in dict.fromkeys(_read_index(path).values()))]


def _open_one(path: Path, key: str | None) -> Mapping[str, Tensor]:
    with path.open("rb") as file:
        start, size = file.read(9), os.fstat(file.fileno()).st_size
    # "{" follows the length in a safetensors file; a zip or a pickle has other things there
    if start[8:] != b"{" and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"):
        return _open_torch(path, key)
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


def _open_torch(path: Path, key: str | None) -> Mapping[str, Tensor]:
    if path.suffix.lower() == ".safetensors":  # torch.load goes by the name
        raise TieError(
            f"'{path}' is no safetensors file: it was written by torch.save. Call it '.pt'."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch suspects of a file that is none
            try:
                # mapped: a tensor's bytes are read when it is used
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # written before torch 1.6
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # every kind of broken pickle has an exception of its own
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            reason = "it holds more than tensors, and code of a file is never run"
        else:
            reason = "it is damaged or not a torch file"
        raise TieError(
            f"cannot read '{path}': {reason}. Save model.state_dict() and nothing else."
        ) from error
    place = f"'{path}'"
    if key is not None:
        if not isinstance(loaded, Mapping) or key not in loaded:
            names = [repr(name) for name in loaded] if isinstance(loaded, Mapping) else []
            known = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise TieError(f"{place} has no entry '{key}'. It has {known or 'none'}.")
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
                return f"its entry {key!r} is {kind}. Save dense tensors with values."
            continue
        inner = [
            k for k, v in loaded.items() if isinstance(v, Mapping) and _not_a_state_dict(v) is None
        ]
        if inner:
            return (
                f"its entry {inner[0]!r} is one. Save that alone (in the shell: --key {inner[0]})."
            )
        return f"its entry {key!r} is a {type(value).__name__}. Save model.state_dict() alone."
    return None


def _read_index(path: Path) -> dict[str, str]:
    """Which tensor stands in which file, once every name is known to be safe."""
    bad = TieError(
        f"'{path}' is not an index of a sharded checkpoint: it must hold a table 'weight_map' "
        "from tensors to the names of files beside it. Fetch it again."
    )
    if path.stat().st_size > _LARGEST_INDEX:
        raise bad
    try:
        index = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise bad from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise bad
    for name in places.values():
        # never out of the folder, whatever the file says
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise bad
        if len(name.encode(errors="replace")) > _LONGEST_NAME or not _is_utf8(name):
            raise bad
    return places


def _is_utf8(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
