"""Errors about a thing, told of a larger one, and lists of reasons."""

from __future__ import annotations

import pytest

from tiedparam import TieError
from tiedparam.util.errors import Reason, refuse, within

WHERE = "cannot load 'file'"


def test_the_place_of_an_inner_error_is_kept():
    told = within(WHERE, TieError("'0.weight'", "it is too wide.", "Cut it."))
    assert (told.where, told.fact, told.remedy) == (WHERE, "'0.weight': it is too wide.", "Cut it.")
    assert str(told) == "cannot load 'file': '0.weight': it is too wide. Cut it."


@pytest.mark.parametrize(
    "inner",
    [
        TieError("'0.weight'", "'0.weight' is too wide.", "Cut it."),
        TieError("'file'", "'0.weight' is too wide.", "Cut it."),
        TieError(WHERE, "'0.weight' is too wide.", "Cut it."),
        TieError("'0.weight' is too wide. Cut it."),
    ],
)
def test_nothing_is_said_twice(inner):
    assert str(within(WHERE, inner)) == "cannot load 'file': '0.weight' is too wide. Cut it."


def test_one_reason_is_told_and_several_are_listed():
    refuse(WHERE, [], "no")
    wide, lost = Reason("'a' is too wide.", "Cut it."), Reason("'b' is missing.")
    with pytest.raises(TieError) as caught:
        refuse(WHERE, [wide], "it does not fit")
    assert caught.value.args == (WHERE, *wide)
    with pytest.raises(TieError) as caught:
        refuse(WHERE, [wide, lost], "it does not fit")
    assert str(caught.value) == (
        "cannot load 'file': it does not fit:\n  'a' is too wide. Cut it.\n  'b' is missing."
    )
