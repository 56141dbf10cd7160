"""What ``torch.save`` wrote, judged before torch reads it.

Since torch 1.6 that is a zip archive: a pickle, and a record for the numbers of each storage.
Mapping it, torch takes the pickle's word for the size of a record, and the file's bytes for its
numbers, compressed or not (S47). Reading it, torch leaves memory as it is where a record calls
itself a folder or empty. So an archive that says two things is refused, and one that is not laid
out as ``torch.save`` does it is read and not mapped.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch

_END, _LOCATOR, _END_64 = 22, 20, 56  # bytes of what ends a directory; in a file the other way
_LOCAL = struct.Struct("<4s5H3L2H")
_SPECIAL = 0x61  # flags: encrypted, patched, strongly encrypted
_FOLDER = 0x10  # attribute


def is_mappable(path: Path) -> bool:
    """Whether the numbers of an archive are stored as they are, so that it can be mapped.

    Raises:
        ValueError: if it says two things; the message names one. Other errors of the modules
            that read zips and pickles pass.
    """
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        records = {record.filename: record for record in archive.infolist()}
        _refuse_two_readings(file, archive)
        for record in archive.infolist():
            _refuse_record(record)
            _place(file, record)
        folder = archive.infolist()[0].filename.partition("/")[0]
        pickled = _bytes_of(file, records[f"{folder}/data.pkl"])
    for key, size in _storage_sizes(pickled).items():
        if records[f"{folder}/data/{key}"].file_size != size:
            raise ValueError(f"the record of storage {key} has another size")
    return all(
        record.compress_type == zipfile.ZIP_STORED and record.file_size == record.compress_size
        for record in records.values()
    )


def _refuse_two_readings(file: BinaryIO, archive: zipfile.ZipFile) -> None:
    """Raise where torch's reader of zips could see another directory than Python's."""
    size = file.seek(0, io.SEEK_END)
    start = file.seek(max(0, size - _END - _LOCATOR - _END_64))
    tail = file.read()
    locator = tail[-_END - _LOCATOR : -_END]
    if archive.comment or tail[-_END:][:4] != b"PK\5\6":
        raise ValueError("something follows its directory")
    if locator[:4] == b"PK\6\7" and int.from_bytes(locator[8:16], "little") != start:
        raise ValueError("its directory stands elsewhere")
    records = archive.infolist()
    if min(record.header_offset for record in records) != 0:
        raise ValueError("something stands in front of its first record")
    # torch finds a record whatever the case of its letters
    if len({record.filename.lower() for record in records}) < len(records):
        raise ValueError("two records have one name")


def _refuse_record(record: zipfile.ZipInfo) -> None:
    if record.flag_bits & _SPECIAL:
        raise ValueError(f"the record {record.filename} is encrypted")
    if record.is_dir() or record.external_attr & _FOLDER:
        raise ValueError(f"the record {record.filename} is a folder")
    if record.file_size and not record.compress_size:
        raise ValueError(f"the record {record.filename} is empty")


def _place(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Where the bytes of a record begin, once its own header agrees with the directory."""
    file.seek(record.header_offset)
    mark, _, _, method, *_, name, extra = _LOCAL.unpack(file.read(_LOCAL.size))
    agrees = mark == b"PK\3\4" and method == record.compress_type
    if not agrees or file.read(name) != record.orig_filename.encode():
        raise ValueError(f"the record {record.filename} disagrees with the directory")
    return file.tell() + int(extra)


def _bytes_of(file: BinaryIO, record: zipfile.ZipInfo) -> bytes:
    # not by zipfile, which insists on the checksums that torch need not have written
    file.seek(_place(file, record))
    raw = file.read(record.compress_size)
    if record.compress_type == zipfile.ZIP_DEFLATED:
        return zlib.decompress(raw, -zlib.MAX_WBITS)
    return raw


def _storage_sizes(pickled: bytes) -> dict[str, int]:
    """How many bytes each storage has, as the pickle says. Nothing of it is imported or run."""
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "LONG_BINPUT" and int(argument or 0) > len(pickled):
            raise ValueError("its pickle asks for more memory than it can use")
    reader = _Sizes(io.BytesIO(pickled))
    reader.load()
    return reader.sizes


class _Anything:
    """Stands for whatever a pickle builds: takes everything, does nothing."""

    def __new__(cls, *_: Any) -> _Anything:
        return super().__new__(cls)

    def __call__(self, *_: Any) -> _Anything:
        return self

    __setstate__ = __setitem__ = append = extend = add = __call__


class _Sizes(pickle.Unpickler):
    """Reads a pickle for the storages that it names."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.sizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            # a dtype: calling a storage's class would take memory
            return getattr(getattr(torch, name), "dtype", torch.uint8)
        return _Anything

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count = pid
        size = count * kind.itemsize
        if self.sizes.setdefault(key, size) != size:
            raise ValueError(f"storage {key} has two sizes")
        return _Anything()
