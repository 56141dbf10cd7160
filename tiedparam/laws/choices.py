"""What is wrong with the value of an option: not one of a few, or no count."""

from __future__ import annotations

from typing import Any, TypeGuard, get_args

from tiedparam.util.errors import Reason


def why_not_one_of(option: str, value: object, choices: Any) -> Reason | None:
    """Why an option cannot have this value, or None.

    Args:
        option: its name.
        value: what was given.
        choices: the ``Literal`` of what it can be.
    """
    known = get_args(choices)
    # by type as well: True and 1.0 equal 1, and files would not keep the difference
    if any(type(value) is type(each) and value == each for each in known):
        return None
    return Reason(
        f"{option}={value!r} is unknown.", f"Choose one of {', '.join(map(repr, known))}."
    )


def is_whole(value: object, least: int) -> TypeGuard[int]:
    """Whether a value is a whole number, of ``least`` or more. True and 1.0 are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def why_no_count(option: str, value: object) -> Reason | None:
    """Why an option cannot be this number of things, or None."""
    if is_whole(value, 1):
        return None
    return Reason(f"{option} must be a positive integer, not {value!r}.")
