"""How a statement is judged: an AssertionError says what does not hold, and which number differs.

No bare ``assert``: ``python -O`` leaves those out, and only pytest explains them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiedparam.util.bits import same_bits
from tiedparam.util.errors import shortened

LONGEST = 400
"""Characters of a fact; torch's own messages may have thousands."""


def hold(condition: object, fact: str) -> None:
    """Raise with the fact unless the condition holds.

    Raises:
        AssertionError: if it does not.
    """
    if not condition:
        raise AssertionError(fact)


def equal(found: Tensor, expected: Tensor, what: str) -> None:
    """The same dtype, shape and numbers; −0 is 0."""
    _alike(found, expected, what)
    if not torch.equal(found, expected):
        raise AssertionError(_first_difference(found, expected, what, found != expected))


def identical(found: Tensor, expected: Tensor, what: str) -> None:
    """The same to the bit: the sign of zero counts, and a NaN is itself."""
    _alike(found, expected, what)
    if same_bits(found, expected):
        return
    size = found.element_size()
    integers = [value.detach().contiguous().view(torch.uint8) for value in (found, expected)]
    differs = (integers[0] != integers[1]).reshape(*found.shape, size).any(-1)
    raise AssertionError(_first_difference(found, expected, what, differs, " to the bit"))


def close(found: Any, expected: Any, what: str, *, rtol: float, atol: float) -> None:
    """Equal up to rounding, of which the caller says how much may come about."""
    try:
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    except AssertionError as error:
        lines = [line for line in str(error).splitlines() if line]
        said = "; ".join(lines[1:3] if len(lines) > 2 else lines)
        raise AssertionError(f"{what} is off: {said}") from None


def refused(call: Callable[[], object], kind: type[Exception], part: str, what: str) -> None:
    """The call raises such an error, whose message says the part."""
    try:
        call()
    except kind as error:
        hold(part in str(error), f"{what} is refused, but without a word of {part!r}: {error}")
        return
    raise AssertionError(f"{what} is not refused")


def warned(call: Callable[[], object], kind: type[Warning], part: str, what: str) -> None:
    """The call warns so, and the warning says the part."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    said = [str(each.message) for each in caught if issubclass(each.category, kind)]
    hold(said, f"{what} gives no warning")
    hold(any(part in text for text in said), f"{what} warns without a word of {part!r}: {said[0]}")


def fact_of(error: Exception) -> str:
    """What a statement failed with, in one line; the user's own line, if one raised it."""
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError) and text:
        return shortened(text, LONGEST)
    where, name = _line_of(error), type(error).__name__
    return shortened(f"raised {name}: {text}" if text else f"raised {name}", LONGEST) + where


_LIBRARIES = tuple(map(str, (Path(__file__).parents[1], Path(torch.__file__).parent)))
_PYTHON = str(Path(os.__file__).parent)


def _line_of(error: Exception) -> str:
    """The last line of the user's own that was running, as `` (file:12, in forward)``."""
    found, trace = "", error.__traceback__
    while trace is not None:
        file, function = trace.tb_frame.f_code.co_filename, trace.tb_frame.f_code.co_name
        # other packages lie below Python's own folder
        is_pythons = file.startswith((_PYTHON, "<frozen")) and "site-packages" not in file
        if not (is_pythons or file.startswith(_LIBRARIES)):
            found = f" ({Path(file).name}:{trace.tb_lineno}, in {function})"
        trace = trace.tb_next
    return found


def _alike(found: Tensor, expected: Tensor, what: str) -> None:
    hold(isinstance(found, Tensor), f"{what} is a {type(found).__name__} and no tensor")
    hold(
        found.shape == expected.shape,
        f"{what} is {tuple(found.shape)} instead of {tuple(expected.shape)}",
    )
    hold(found.dtype == expected.dtype, f"{what} is {found.dtype} instead of {expected.dtype}")


def _first_difference(
    found: Tensor, expected: Tensor, what: str, differs: Tensor, how: str = ""
) -> str:
    count, entries = int(differs.sum()), found.numel()
    place = tuple(differs.nonzero()[0].tolist())
    values = f"{found[place].item()!r} instead of {expected[place].item()!r}"
    return f"{what} differs{how} in {count} of {entries} entries, at {place} it is {values}"
