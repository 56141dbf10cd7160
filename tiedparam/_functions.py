"""The functions that a file may name as ``fn=`` of a copy; nothing else is ever looked up."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import torch
from torch import Tensor

from tiedparam._errors import TieError

Function = Callable[[Tensor], Tensor]


def identity(weight: Tensor) -> Tensor:
    """The tensor itself."""
    return weight


FUNCTIONS: dict[str, Function] = {
    "identity": identity,
    "torch.square": torch.square,
    "torch.t": torch.t,
}
"""Names in plans and file headers, and what they stand for."""


def find_function(name: str) -> Function:
    """The function that a file, or a user, means by ``name``.

    Raises:
        TieError: if it is none of `FUNCTIONS`; the message suggests the nearest names.
    """
    if isinstance(name, str):
        # "t" is how repr shows torch.t
        bare = {known.__name__: known for known in FUNCTIONS.values()}
        if name in FUNCTIONS or name in bare:
            return FUNCTIONS.get(name) or bare[name]
    near = difflib.get_close_matches(str(name), FUNCTIONS, n=1, cutoff=0.4)
    known = ", ".join(f"'{known}'" for known in FUNCTIONS)
    hint = f"Did you mean '{near[0]}'?" if near else f"Known are {known}."
    raise TieError(
        f"fn={name!r} is no function that a file can name. {hint} Others only in "
        "Python, as the function itself."
    )


def function_name(fn: Function) -> str | None:
    """The name of a function in files, or None if it has none."""
    return next((name for name, known in FUNCTIONS.items() if known is fn), None)
