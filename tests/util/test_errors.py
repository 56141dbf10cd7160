"""Errors about a thing, told of a larger one, and lists of reasons."""

from __future__ import annotations

import pickle

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


def test_listed_reasons_stay_reasons_for_whoever_words_them():
    several = [Reason("'a' is too wide.", "Cut it."), Reason("'b' is missing.")]
    with pytest.raises(TieError) as caught:
        refuse("'file'", several, "it does not fit")
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        told = within(WHERE, error)
        assert (told.where, told.remedy) == (WHERE, "")
        assert told.worded(lambda reason: reason.fact) == (
            "cannot load 'file': it does not fit:\n  'a' is too wide.\n  'b' is missing."
        )
    assert within("cannot read it", caught.value).fact.startswith("'file': it does not fit:\n  'a'")


def test_a_message_opens_with_its_place_unless_the_fact_names_it():
    assert str(TieError("a.weight", "it is a buffer.", "Tie another.")) == (
        "a.weight: it is a buffer. Tie another."
    )
    assert str(TieError("a.weight", "a.weight is not tied.", "")) == "a.weight is not tied."
    assert str(TieError("all of it")) == "all of it"
