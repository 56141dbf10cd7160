"""The files of one export: what they are called, how they are told apart, what is replaced.

A model is exported to one file, ``model.safetensors``, or to shards that an index names,
``model.safetensors.index.json``. Files cannot be replaced at one instant (S48), so all files of
a sharded export carry its mark, and a mixture of two exports is noticed when it is read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tiedparam.formats.safetensors import SafetensorsFile
from tiedparam.formats.strict_json import read_json
from tiedparam.util.errors import TieError, quoted

MARK = "tiedparam.export"
"""The key of the mark, in the metadata of the index and of each shard."""

INDEX = ".index.json"
_LARGEST_INDEX = 1 << 28
_LONGEST_NAME = 255  # bytes, of a file


def index_of(path: Path) -> Path:
    """The index of a sharded export to ``path``."""
    return path.with_name(path.name + INDEX)


def shards_of(path: Path, count: int) -> list[Path]:
    """The files of an export to ``path`` in ``count`` shards."""
    return [
        path.with_name(f"{path.stem}-{number:05}-of-{count:05}{path.suffix}")
        for number in range(1, count + 1)
    ]


def left_by_older(path: Path) -> list[Path]:
    """What older exports to ``path`` left there: the index first, then the file, then shards.

    A file that is called like a shard is one of them if the index names it or if it is marked.
    Nothing else of this folder belongs to them.
    """
    index = index_of(path)
    try:
        named = set(read_index(index)[0].values())
    except (OSError, TieError):
        named = set()
    pattern = re.compile(rf"{re.escape(path.stem)}-\d{{5,}}-of-\d{{5,}}{re.escape(path.suffix)}")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    like_shards = sorted(file for file in beside if pattern.fullmatch(file.name))
    shards = [shard for shard in like_shards if shard.name in named or _is_marked(shard)]
    # by os.path: a Path raises where a name is too long, as that of the index may be
    return [f for f in (index, path, *shards) if os.path.isfile(f) or os.path.islink(f)]


def _is_marked(path: Path) -> bool:
    try:
        return MARK in SafetensorsFile(path).metadata
    except (OSError, TieError):
        return False


def index_content(shards: Mapping[str, Sequence[str]], size: int, mark: str) -> bytes:
    """The index of shards, given the names of the tensors of each, and their bytes."""
    places = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": size, MARK: mark}, "weight_map": places}
    return json.dumps(index, indent=2, ensure_ascii=False).encode()


def read_index(path: Path) -> tuple[dict[str, str], str | None]:
    """Which tensor stands in which file, once every name is known to be safe, and the mark.

    Raises:
        TieError: if it is not an index.
        OSError: if it cannot be read.
    """
    bad = TieError(
        f"'{path}'",
        f"'{path}' is not an index of a sharded checkpoint: it must hold a table 'weight_map' "
        "from tensors to the names of files beside it.",
        "Fetch it again.",
    )
    if path.stat().st_size > _LARGEST_INDEX:
        raise bad
    try:
        index = read_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise bad from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise bad
    if not all(_is_name_of_a_file(name) for name in places.values()):
        raise bad
    metadata = index.get("metadata")
    mark = metadata.get(MARK) if isinstance(metadata, dict) else None
    if not (mark is None or isinstance(mark, str)):
        raise bad
    return places, mark


def _is_name_of_a_file(name: object) -> bool:
    """Whether it cannot lead out of the folder, whatever the file says."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not set(name) & set("/\\\0")
        and len(name.encode()) <= _LONGEST_NAME
    )


def refuse_mixture(index: Path, mark: str | None, marks: Mapping[str, str | None]) -> None:
    """Raise unless an index and all of its files carry one mark, or none.

    Args:
        index: the index.
        mark: its mark.
        marks: those of its files, by their names.

    Raises:
        TieError: naming the first file that is not of the index's export.
    """
    for name, other in marks.items():
        if other != mark:
            raise TieError(
                f"'{index}'",
                f"'{index}' and its file {quoted(name)} are not from the same export: an export "
                "over an older one was interrupted, or files of two exports were mixed.",
                "Export the model again, or fetch all files of one export.",
            )
