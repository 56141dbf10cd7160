"""A progress bar on stderr for work that takes seconds; nothing for work that does not."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PATIENCE = 1.0
"""Seconds of work after which a bar appears."""

_WIDTH = 30
_BETWEEN = 0.1  # seconds between two drawings


@contextmanager
def progress(total: int, title: str, shown: bool | None = None) -> Iterator[Callable[[int], None]]:
    """Show how much of a counted piece of work is done.

    Args:
        total: how much work there is, in any unit.
        title: what is being done.
        shown: True or False; None shows a bar if stderr is a terminal and the work is not
            over after `PATIENCE` seconds.

    Yields:
        A function that says how much more is done.
    """
    patience = PATIENCE if shown is None else 0.0
    if sys.stderr is None:  # a program without a console
        shown = False
    elif shown is None:
        shown = sys.stderr.isatty()
    if not shown:
        yield lambda amount: None
        return
    bar = _Bar(total, title, patience)
    try:
        yield bar.advance
    finally:
        bar.close()


class _Bar:
    """What is drawn: the title, a bar, and the share that is done."""

    def __init__(self, total: int, title: str, patience: float) -> None:
        self.total, self.title = total, title
        self.done, self.drawn = 0, False
        self.due = time.monotonic() + patience

    def advance(self, amount: int) -> None:
        self.done += amount
        now = time.monotonic()
        if now >= self.due:
            self.due = now + _BETWEEN
            self._draw()

    def _draw(self) -> None:
        share = min(1.0, self.done / self.total) if self.total else 1.0
        filled = int(share * _WIDTH)
        bar = "#" * filled + "." * (_WIDTH - filled)
        print(f"\r{self.title} [{bar}] {share:4.0%}", end="", file=sys.stderr, flush=True)
        self.drawn = True

    def close(self) -> None:
        if self.drawn:
            self._draw()
            print(file=sys.stderr)
