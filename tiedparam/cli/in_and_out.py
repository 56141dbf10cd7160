"""What the commands of the shell share: the file that they open, and what they print and write."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from tiedparam.cli.arguments import functions, hints
from tiedparam.cli.model_from_file import LayerHint, open_model
from tiedparam.cli.wording import in_shell
from tiedparam.formats.exports import left_by_older
from tiedparam.formats.safetensors import refuse_foreign_suffix
from tiedparam.util.errors import TieError
from tiedparam.util.table import TableReport


def model_of(arguments: argparse.Namespace, more: Iterable[LayerHint] = ()) -> nn.Module:
    """The model of the command's file."""
    known = [*hints(arguments), *more]
    return open_model(arguments.file, known, arguments.key, functions(arguments))


def print_report(result: TableReport[Any], as_json: bool, **more: Any) -> None:
    """A report on stdout, with more facts about files, or the shell's own steps to take."""
    if as_json:
        print(json.dumps({**result.to_data(), **more}, indent=2, ensure_ascii=False))
        return
    print(result.text(more.get("next_steps", ()), in_shell))
    if "files" in more:
        sizes = f"{more['bytes']:,} B, from {more['bytes_before']:,} B"
        print(f"Wrote {', '.join(more['files'])}: {sizes}.")


def print_written(
    report: TableReport[Any], arguments: argparse.Namespace, files: Sequence[Path], before: int
) -> None:
    """A report, and which files were written; ``before`` counts the bytes of the input."""
    names = [str(file) for file in files]
    print_report(report, arguments.json, files=names, bytes=size_of(files), bytes_before=before)


def size_of(files: Iterable[Path]) -> int:
    """The bytes of all of them."""
    return sum(file.stat().st_size for file in files)


def refuse_to_overwrite(arguments: argparse.Namespace, *others: Path) -> None:
    """Raise if a file that would be written is there and ``--force`` is not."""
    for file in (arguments.output, *left_by_older(arguments.output), *others):
        if file.exists() and not arguments.force:
            raise exists_already(file)
    refuse_foreign_suffix(arguments.output)


def exists_already(file: Path) -> TieError:
    """The error of a file that is there and may not be replaced."""
    return TieError(f"'{file}'", f"'{file}' exists already.", "Pass --force to replace it.")


@contextmanager
def wrong_types_are_told() -> Iterator[None]:
    """A plan's option of a wrong type is the user's error, and no traceback."""
    try:
        yield
    except TypeError as error:
        raise TieError("", str(error), "") from error
