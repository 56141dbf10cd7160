"""Checkpoint files of every kind, read as one table: names → tensors.

A ``.safetensors`` file, what ``torch.save`` wrote of a state dict, several of either kind
with an index file, or a folder that holds one of these as transformers' ``save_pretrained`` names
it. The tensors are read when they are used. Pickles are read with torch's
``weights_only=True``, so no code of a file is ever run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tiedparam.formats.atomic import PathLike
from tiedparam.formats.checkpoint_files import file_of, refuse_lost_index
from tiedparam.formats.exports import INDEX, MARK, index_of, read_index, refuse_mixture
from tiedparam.formats.safetensors import SafetensorsFile
from tiedparam.formats.torch_state_dict import module_metadata_of, open_state_dict
from tiedparam.util.errors import TieError, quoted, some_of


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
        self.path: Path = file_of(Path(path))
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
            fact = f"there is no '{self.path}'."
            raise TieError(f"'{self.path}'", fact, f"Name its index, '{index}'.") from None
        if isinstance(tensors, SafetensorsFile):
            self.metadata = tensors.metadata
        else:
            self.module_metadata = module_metadata_of(tensors)
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
            refuse_lost_index(self.path)
            raise
        shards: dict[str, Mapping[str, Tensor]] = {}
        for name in dict.fromkeys(places.values()):
            file = self.path.with_name(name)
            try:
                shards[name] = _open_one(file, key)
            except FileNotFoundError as error:
                raise TieError(
                    f"'{self.path}'",
                    f"'{self.path}' names the file {quoted(name)}, which is not beside it.",
                    "Fetch all of its files.",
                ) from error
        refuse_mixture(self.path, mark, {name: _mark_of(shard) for name, shard in shards.items()})
        listed: dict[str, set[str]] = {name: set() for name in shards}
        for tensor, name in places.items():
            listed[name].add(tensor)
        for name, shard in shards.items():
            if listed[name] != set(shard):
                wrong = [quoted(tensor) for tensor in sorted(listed[name] ^ set(shard))]
                raise TieError(
                    f"'{self.path}'",
                    f"'{self.path}' and its file {quoted(name)} disagree on {some_of(wrong)}.",
                    "Fetch both again.",
                )
        self._parts = {key: shards[place] for key, place in places.items()}


def _mark_of(shard: Mapping[str, Tensor]) -> str | None:
    return shard.metadata.get(MARK) if isinstance(shard, SafetensorsFile) else None


def _open_one(path: Path, key: str | None) -> Mapping[str, Tensor]:
    with path.open("rb") as file:
        start, size = file.read(9), os.fstat(file.fileno()).st_size
    # "{" follows the length in a safetensors file; a zip or a pickle has other things there
    is_archive = start[:4] == b"PK\x03\x04"
    if start[8:] != b"{" and (is_archive or start[:1] == b"\x80"):
        return open_state_dict(path, key, is_archive)
    # of a safetensors file the first eight bytes are a length
    if start[8:] not in (b"", b"{") and int.from_bytes(start[:8], "little") > size:
        raise TieError(
            f"'{path}'",
            f"'{path}' is not a checkpoint.",
            "Name a safetensors file, what torch.save wrote of a state dict, or the index of "
            "several (*.index.json).",
        )
    if key is not None:
        raise TieError(
            f"'{path}'",
            f"'{path}' is a safetensors file, which has no entries such as '{key}'.",
            "Read it without a key.",
        )
    return SafetensorsFile(path)
