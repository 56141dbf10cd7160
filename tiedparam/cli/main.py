"""The shell: ``tiedparam <command>``, or ``python -m tiedparam <command>``.

Results go to stdout, as text or with ``--json`` as JSON and nothing else; progress, warnings
and errors go to stderr. Exit codes: 0 fine, 1 it could not be done (stderr says why, with a line
for each reason), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from tiedparam._version import __version__
from tiedparam.cli import commands
from tiedparam.cli.arguments import CODES, program
from tiedparam.cli.wording import in_one_line, message_of
from tiedparam.util.errors import TieError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; by default those of the process.

    Returns:
        The exit code: 0, or 1 after a `TieError` or `OSError`, whose message is printed, with a
        line for each reason; 130 if it was interrupted. Without a command the help goes to stderr
        and the code is 2.

    Raises:
        SystemExit: from argparse, with 2 for wrong usage and 0 after ``--help``.
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal of another encoding shows what it can
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    shell = parser()
    arguments = shell.parse_args(argv)
    if arguments.command is None:
        shell.print_help(sys.stderr)
        return 2
    try:
        _import_modules(getattr(arguments, "imports", ()))
        with _warnings_in_one_line():
            code: int | None = arguments.run(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a closed pipe is still an error that can be told
    except BrokenPipeError:  # the reader has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (TieError, OSError) as error:
        print(f"{shell.prog} {arguments.command}: {message_of(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{shell.prog} {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return code or 0


def parser() -> argparse.ArgumentParser:
    """The parser of the whole shell."""
    shell = argparse.ArgumentParser(
        prog=program(),
        description=(
            "Weight tying for stock PyTorch layers. Works on checkpoint files, from names and "
            "shapes alone, without the code of their models."
        ),
        epilog=(
            "examples:\n"
            "  tiedparam demo\n"
            "  tiedparam scan model.safetensors --plan plan.toml\n"
            "  tiedparam tie model.safetensors --plan plan.toml -o tied.safetensors\n"
            "  tiedparam report tied.safetensors\n"
            "  tiedparam untie tied.safetensors -o dense.safetensors\n"
            f"{CODES}"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shell.add_argument("--version", action="version", version=f"tiedparam {__version__}")
    commands.add_all(shell.add_subparsers(title="commands", dest="command", metavar="<command>"))
    return shell


def _import_modules(names: Iterable[str]) -> None:
    """Import the user's modules, which register their rules.

    Raises:
        TieError: if one cannot be imported.
    """
    for name in names:
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # where the console script does not look
        try:
            import_module(name)
        except Exception as error:  # code of the user's
            raise TieError(
                f"--import {name}",
                f"{type(error).__name__}: {error}.",
                "Give the dotted name of a module in this folder, or of one that is installed.",
            ) from error


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    def show(message: object, *_: object, **__: object) -> None:
        print(f"warning: {in_one_line(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        # that torch will drop something is advice to programmers, not to those who run a command
        warnings.simplefilter("ignore", FutureWarning)
        warnings.showwarning = show
        yield
