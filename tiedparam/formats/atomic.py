"""Files that are written whole or not at all: temporary names, fsync, then a rename."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tiedparam.util.errors import TieError

PathLike = str | os.PathLike[str]
OpenFile = Callable[[PathLike], BinaryIO]


@contextmanager
def whole_files(obsolete: Callable[[], Iterable[Path]] = lambda: ()) -> Iterator[OpenFile]:
    """Write one file or several; they appear under their names when the block ends.

    The last file is the one by which readers find the others, if there are others. Whenever the
    process is killed, that one leads to old files only, or to new ones only, or is not there.

    Args:
        obsolete: says at the end which files the new ones replace, under whatever names.

    Yields:
        A function that opens a file for writing under a temporary name in the folder of its
        path. Opening the next file finishes the one before. At the end of the block all of
        them are on the disk and are renamed, in the order in which they were opened. If the
        block raises, the temporary files are removed and files that were there stay.

    Raises:
        TieError: if a path is not a plain file, but a device or a folder.
    """
    written: list[tuple[Path, Path]] = []
    current: list[BinaryIO] = []

    def finish() -> None:
        for file in current:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        current.clear()

    def open_file(path: PathLike) -> BinaryIO:
        finish()
        target = Path(os.path.realpath(path))  # a link stays, and what it points to is replaced
        if not target.parent.is_dir():
            # without a number: "[Errno 2]" tells a reader nothing
            raise FileNotFoundError(f"the folder '{target.parent}' does not exist. Make it first.")
        mode = _mode_of(target)
        # 50 characters are 200 bytes at most, and a name has room for 255
        temporary = target.with_name(f".{target.name[:50]}.{secrets.token_hex(6)}.tmp")
        file = temporary.open("xb")
        current.append(file)
        written.append((temporary, target))
        if mode is not None:
            os.chmod(temporary, mode)
        return file

    try:
        yield open_file
        finish()
        _put_in_place(written, obsolete())
    except BaseException:
        for file in current:
            with suppress(OSError):  # a full disk raises once more on close
                file.close()
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)
        raise


def _put_in_place(written: list[tuple[Path, Path]], obsolete: Iterable[Path]) -> None:
    """Rename what was written, and remove what it replaces, so that no mixture can be read."""
    obsolete = list(obsolete)
    *parts, (_, head) = written
    if any(target.exists() for _, target in parts):
        # by the old head, one would find parts of both
        head.unlink(missing_ok=True)
        _sync_folder(head.parent)
    for renamed in (parts, written[-1:]):
        for temporary, target in renamed:
            os.replace(temporary, target)
        # on the disk before the next step: a disk that loses power may change the order
        for folder in {target.parent for _, target in renamed}:
            _sync_folder(folder)
    new = {target for _, target in written}
    for path in obsolete:
        if Path(os.path.realpath(path)) not in new:
            path.unlink(missing_ok=True)
            _sync_folder(path.parent)


def _mode_of(target: Path) -> int | None:
    """The permissions of the file that will be replaced, or None if there is none."""
    try:
        status = target.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        place = f"'{target}'"
        raise TieError(place, f"{place} is not a plain file and is not replaced.", "Name another.")
    return stat.S_IMODE(status.st_mode)


def _sync_folder(folder: Path) -> None:
    """Make the renames durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
