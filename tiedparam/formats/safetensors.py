"""The safetensors format: eight bytes of length, a JSON header, the bytes of the tensors.

Reading maps the file into memory, so a tensor's bytes are read when it is used. Writing takes
the tensors one at a time and never holds two of them. Both ends are written here, and not left
to the package of that name, because its writer takes a dictionary of all tensors at once.

A file may carry a checksum in its metadata: the CRC-32 of all of its bytes, with zeros in the
place of the checksum itself.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tiedparam.formats.atomic import PathLike
from tiedparam.formats.strict_json import read_json
from tiedparam.util.errors import TieError, quoted

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""The names of the format, and torch's."""
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu

CHECKSUM = "tiedparam.crc32"
"""The metadata's key for the checksum."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # of the format
_MOST_AXES = 64  # of torch's element-wise operations
_CHUNK = 1 << 24
_FOREIGN_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".index.json")
_CHECKSUM_START = f'{{"__metadata__":{{"{CHECKSUM}":"'.encode()


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: what can be known of it without reading it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsFile(Mapping[str, Tensor]):
    """A file, checked and mapped into memory; its tensors by name.

    The tensors are views of the file: they cost memory only while they are read, must not be
    written, and stay valid when the file is replaced.

    Args:
        path: the file.

    Raises:
        TieError: if it is not a well-formed safetensors file, or breaks its checksum.
        OSError: if it cannot be opened.
    """

    def __init__(self, path: PathLike) -> None:
        _refuse_big_endian()
        self.path: Path = Path(path)
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise self._bad("it is too short")
            # a private mapping: torch makes tensors of writable memory without a warning
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        length = int.from_bytes(self._bytes[:8], "little")
        if length > min(size - 8, _LONGEST_HEADER):
            raise self._bad("its header is cut off or its length is wrong")
        self._start = 8 + length
        header = self._parse(self._bytes[8 : self._start])
        metadata = header.pop("__metadata__", {})
        if not _is_text_to_text(metadata):
            raise self._bad("its metadata is not a table of texts")
        self.metadata: dict[str, str] = metadata
        self.entries: dict[str, Entry] = {}
        self._offsets: dict[str, int] = {}
        self._read_entries(header, size - self._start)
        if CHECKSUM in metadata:
            self._verify_checksum()

    def __getitem__(self, name: str) -> Tensor:
        entry = self.entries[name]
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
        raw = torch.frombuffer(
            self._bytes, dtype=torch.uint8, count=entry.nbytes, offset=self._offsets[name]
        )
        if self._offsets[name] % entry.dtype.itemsize:
            raw = raw.clone()  # the format does not ask for alignment, and the processor may
        return raw.view(entry.dtype).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def _bad(self, reason: str) -> TieError:
        place = f"'{self.path}'"
        fact = f"{place} is not a valid safetensors file: {reason}."
        return TieError(place, fact, "Fetch or save it again.")

    def _parse(self, raw: bytes) -> dict[str, Any]:
        if raw[:1] != b"{":  # no space in front of it either
            raise self._bad("its header is not a table")
        try:
            header: dict[str, Any] = read_json(raw)
        except (ValueError, RecursionError) as error:
            raise self._bad("its header cannot be read") from error
        return header

    def _read_entries(self, header: dict[str, Any], size: int) -> None:
        spans = []
        for name, value in header.items():
            entry, begin, end = self._entry(name, value)
            if end - begin != entry.nbytes:
                raise self._bad(f"the size of {quoted(name)} disagrees with its shape and dtype")
            spans.append((begin, end, name))
            self.entries[name] = entry
            self._offsets[name] = self._start + begin
        position = 0
        for begin, end, name in sorted(spans):
            if begin != position:
                raise self._bad(f"the place of {quoted(name)} leaves a gap or an overlap")
            position = end
        if position != size:
            raise self._bad(f"it holds {size} bytes of values where its header says {position}")

    def _entry(self, name: str, value: Any) -> tuple[Entry, int, int]:
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._bad(f"its entry {quoted(name)} is malformed")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not (are_sizes(shape) and _are_offsets(offsets)):
            raise self._bad(f"its entry {quoted(name)} is malformed")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            place = f"{quoted(name)} in '{self.path}'"
            raise TieError(
                place,
                f"{place} has the dtype {str(dtype)[:40]!r}, which tiedparam does not read.",
                f"Convert it to one of {', '.join(DTYPES)}.",
            )
        return Entry(name, DTYPES[dtype], tuple(shape)), offsets[0], offsets[1]

    def _verify_checksum(self) -> None:
        place = 8 + len(_CHECKSUM_START)
        head = self._bytes[: self._start]
        if not re.match(re.escape(_CHECKSUM_START) + rb'[0-9a-f]{8}"', head[8:]):
            raise self._bad("its checksum is not in its place")
        checksum = zlib.crc32(head[:place] + bytes(8 * b"0") + head[place + 8 :])
        with memoryview(self._bytes) as view:
            for start in range(self._start, len(view), _CHUNK):
                with view[start : start + _CHUNK] as part:
                    checksum = zlib.crc32(part, checksum)
        if head[place : place + 8] != f"{checksum:08x}".encode():
            raise self._bad("its checksum shows that it was changed or damaged after saving")


def write(
    file: BinaryIO,
    entries: Sequence[Entry],
    value_of: Callable[[Entry], Tensor],
    metadata: Mapping[str, str],
    *,
    checksum: bool = False,
    advance: Callable[[int], object] = lambda size: None,
) -> None:
    """Write a file, one tensor at a time.

    Args:
        file: open for writing, at its beginning.
        entries: what it will hold; see `check_entries`.
        value_of: the tensor of an entry, on any device and in any memory layout. Called once
            for each, in the order of the file.
        metadata: what else the header says.
        checksum: write the file's checksum into its metadata.
        advance: called with the size of each tensor in bytes once it is written.

    Raises:
        TieError: if an entry has no place in the format, or a value is not what its entry says.
    """
    _refuse_big_endian()
    check_entries(entries)
    # wide numbers first, so that each value is aligned to its size
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    head = _header(ordered, {CHECKSUM: 8 * "0", **metadata} if checksum else metadata)
    file.write(head)
    running = zlib.crc32(head)
    staging = bytearray(min(_CHUNK, max((entry.nbytes for entry in ordered), default=0)))
    for entry in ordered:
        value = value_of(entry)
        if tuple(value.shape) != entry.shape or value.dtype != entry.dtype:
            raise TieError(
                f"'{entry.name}'",
                f"'{entry.name}' changed while it was saved: {value.dtype} {tuple(value.shape)} "
                f"instead of {entry.dtype} {entry.shape}.",
                "Do not change the model while it is saved.",
            )
        for part in _raw_parts(value, staging):
            file.write(part)
            if checksum:
                running = zlib.crc32(part, running)
        del value  # before the next is made: two would stand side by side
        advance(entry.nbytes)
    if checksum:
        file.seek(8 + len(_CHECKSUM_START))
        file.write(f"{running:08x}".encode())


def refuse_foreign_suffix(path: PathLike) -> None:
    """Raise if a safetensors file is to be written under the name of another kind of file.

    Raises:
        TieError: naming the suffix. torch.load would say something that misleads.
    """
    name = os.fspath(path).lower()
    suffix = next((suffix for suffix in _FOREIGN_SUFFIXES if name.endswith(suffix)), None)
    if suffix is not None:
        place = f"'{os.fspath(path)}'"
        raise TieError(
            place,
            f"{place} would be a safetensors file, and '{suffix}' says otherwise.",
            "Name it '.safetensors'.",
        )


def check_entries(entries: Sequence[Entry]) -> None:
    """Refuse what has no place in the format.

    Raises:
        TieError: naming the first such tensor.
    """
    for entry in entries:
        if entry.dtype not in _NAMES:
            raise TieError(
                f"'{entry.name}'",
                f"'{entry.name}' is {entry.dtype}, which a safetensors file cannot hold.",
                "Convert it first, or use torch.save(model.state_dict(), path).",
            )
        if entry.name == "__metadata__":
            raise TieError(
                "'__metadata__'",
                "a safetensors file cannot hold a tensor '__metadata__'.",
                "Rename it.",
            )


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for entry in entries:
        table[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.nbytes],
        }
        position += entry.nbytes
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LONGEST_HEADER:
        raise TieError(
            "the header",
            f"the header would have {len(text)} bytes, and safetensors allows {_LONGEST_HEADER}.",
            "Save the model in parts.",
        )
    return len(text).to_bytes(8, "little") + text


def _raw_parts(value: Tensor, staging: bytearray) -> Iterator[memoryview]:
    """The bytes of a tensor, as contiguous memory would have them, by way of ``staging``."""
    if value.numel() == 0:
        return
    stage = torch.frombuffer(staging, dtype=torch.uint8)
    size = value.dtype.itemsize
    flat = value.detach().reshape(-1)
    with memoryview(staging) as view:
        for part in flat.split(len(staging) // size):
            count = part.numel() * size
            # copy_ resolves devices, and lazy conjugation and negation
            stage[:count].view(value.dtype).copy_(part)
            with view[:count] as raw:
                yield raw


def _refuse_big_endian() -> None:
    if sys.byteorder != "little":
        raise TieError(
            "safetensors files",
            "safetensors files are little-endian, and this machine is not.",
            "Use torch.save and torch.load.",
        )


def _is_text_to_text(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _are_offsets(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(are_sizes([n]) for n in value)


def are_sizes(value: object) -> bool:
    """Whether a table out of a file is a shape that torch can make and compute with."""
    if not isinstance(value, list) or len(value) > _MOST_AXES:
        return False
    entries = 1
    for size in value:
        if type(size) is not int or size < 0:
            return False
        entries *= size or 1
        if entries >= 2**63:  # torch cannot make it, even empty
            return False
    return True
