"""Which files a checkpoint consists of: one, an index and its shards, or those of a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tiedparam.formats.exports import INDEX, left_by_older, read_index
from tiedparam.util.errors import TieError, quoted, some_of

_IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""What transformers calls the weights in a folder; each is a whole checkpoint."""
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", INDEX)
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.\w+)")


def file_of(path: Path) -> Path:
    """The file that a path means: itself, or the one checkpoint of a folder.

    Raises:
        TieError: if a folder holds no checkpoint, or several; the message says what it holds.
    """
    if not path.is_dir():
        return path
    place = f"the folder '{path}'"
    known = [name for name in _IN_FOLDERS if (path / name).is_file()]
    if len(known) == 1:
        return path / known[0]
    if known:
        raise TieError(
            place,
            f"{place} holds several checkpoints: {_names(known)}.",
            f"Name the one that you mean, such as '{path / known[0]}'.",
        )
    names = sorted(entry.name for entry in path.iterdir() if entry.name.endswith(_ENDINGS))
    shards = [match for name in names if (match := _SHARD.fullmatch(name)) is not None]
    lost = [shard for shard in shards if f"{shard[1]}{shard[2]}{INDEX}" not in names]
    if lost:
        parts = _names([shard[0] for shard in lost])
        raise TieError(
            place,
            f"{place} holds parts of a checkpoint without their index: {parts}.",
            f"Fetch '{lost[0][1]}{lost[0][2]}{INDEX}' as well.",
        )
    indexed = {shard[0] for shard in shards}
    names = [name for name in names if name not in indexed]  # their index stands for them
    expected = _names(_IN_FOLDERS)
    if names:
        raise TieError(
            place,
            f"{place} holds none of {expected}. It holds {_names(names)}.",
            f"Name the file that you mean, such as '{path / names[0]}'.",
        )
    raise TieError(
        place,
        f"{place} holds no checkpoint: none of {expected}.",
        "Name another folder, or a file.",
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


def refuse_lost_index(index: Path) -> None:
    """Raise for a missing index, if the files beside it show what happened.

    Raises:
        TieError: if there is one file instead, or shards are there.
    """
    single = index.with_name(index.name.removesuffix(INDEX))
    if single.is_file():
        fact = f"there is no '{index}'."
        raise TieError(f"'{index}'", fact, f"Name the file '{single}'.") from None
    if left_by_older(single):
        raise TieError(
            f"'{index}'",
            f"there is no '{index}', and shards of that name are there: an export over an older "
            "one was interrupted.",
            "Export the model again.",
        ) from None


def _names(names: Sequence[str]) -> str:
    return some_of([quoted(name) for name in names])
