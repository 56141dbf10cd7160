"""The shell: ``python -m tiedparam <command>``.

Exit codes: 0 fine, 1 it could not be done (one line on stderr says why), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tiedparam import TieError, __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; by default those of the process.

    Returns:
        The exit code: 0, or 1 after a `TieError` or `OSError`, whose message is printed.
        Without a command the help goes to stderr and the code is 2.

    Raises:
        SystemExit: from argparse, with 2 for wrong usage and 0 after ``--help``.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        arguments.run(arguments)
    except (TieError, OSError) as error:
        print(f"{parser.prog} {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tiedparam",
        description="Weight tying for stock PyTorch layers.",
        epilog="example: python -m tiedparam demo",
    )
    parser.add_argument("--version", action="version", version=f"tiedparam {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="<command>")
    _add_demo(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small CNN on real digits, tie it by every law, show what that costs",
        description=(
            "Train a small CNN of stock layers on scikit-learn's digits, tie a copy of it by "
            "each law, fine-tune the copies, and print one table (stdout; progress goes to "
            "stderr). Writes a picture of the tied kernels. No network, fixed seeds. "
            "Needs pip install 'tiedparam[demo]'."
        ),
        epilog="example: python -m tiedparam demo --epochs 5 --out kernels.png",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--out", type=Path, default=Path("tiedparam-demo.png"), metavar="PNG", help="the picture"
    )
    demo.add_argument(
        "--seed", type=_between(0, 2**32 - 1), default=0, help="of split, weights and order"
    )
    demo.add_argument(
        "--epochs",
        type=_between(1, 1000),
        default=30,
        help="of the training, and of each fine-tuning",
    )
    demo.set_defaults(run=_run_demo)


def _run_demo(arguments: argparse.Namespace) -> None:
    # here: the other commands need not load it
    from tiedparam._demo import demo

    demo(arguments.out, seed=arguments.seed, epochs=arguments.epochs)


def _between(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: the whole numbers from ``low`` to ``high``."""

    def whole_number(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low} to {high}")
        return int(text)

    return whole_number


if __name__ == "__main__":
    sys.exit(main())
