"""Warnings in two parts, as errors have them."""

from __future__ import annotations

import warnings

import pytest

import tiedparam as tp
from tiedparam.util.errors import Reason, warn


def test_a_warning_says_its_fact_and_its_remedy():
    with pytest.warns(tp.TieWarning, match=r"^it keeps nothing\. Leave it out\.$") as caught:
        warn("it keeps nothing.", "Leave it out.")
    assert caught[0].message.reason == Reason("it keeps nothing.", "Leave it out.")
    assert caught[0].filename == __file__


def test_a_warning_of_somebody_else_is_taken_whole():
    with pytest.warns(tp.TieWarning, match=r"^all of it$") as caught:
        warnings.warn("all of it", tp.TieWarning, stacklevel=1)
    assert caught[0].message.reason == Reason("all of it")


def test_a_list_has_its_remedy_on_a_line_of_its_own():
    assert str(tp.TieWarning("two:\none\nother", "Do it.")) == "two:\none\nother\nDo it."
