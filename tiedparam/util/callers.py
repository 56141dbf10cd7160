"""Who called: the frames above a function, which Python does not promise to have."""

from __future__ import annotations

import sys
from types import FrameType


def caller(above: int = 1) -> FrameType:
    """The frame of so many callers above the function that asks."""
    return sys._getframe(above + 1)  # noqa: SLF001 — the public ways are slow


def module_of(frame: FrameType) -> str:
    """The name of the module whose function a frame runs."""
    return str(frame.f_globals.get("__name__", ""))
