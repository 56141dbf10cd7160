"""How messages name tensors, and what they suggest for a name that is unknown."""

from __future__ import annotations

from torch import nn

from tiedparam.util.errors import key_of, nearest


def test_a_tensor_is_called_as_in_the_state_dict():
    model = nn.Sequential(nn.Linear(2, 2))
    assert key_of("0", "weight") in model.state_dict()
    assert key_of("", "weight") in model[0].state_dict()


def test_the_nearest_names_are_suggested_the_nearest_first():
    known = ["row_repeat", "repeat", "flip_sym"]
    assert nearest("row_repet", known) == "Did you mean 'row_repeat' or 'repeat'?"
    assert nearest("flip-sym", known) == "Did you mean 'flip_sym'?"


def test_nothing_is_suggested_where_nothing_is_near():
    assert nearest("circulant", ["row_repeat", "flip_sym"]) == ""
    assert nearest("anything", []) == ""


def test_a_name_out_of_a_file_that_is_no_text_and_a_long_one_are_taken():
    assert nearest(3, ["4"]) == ""
    assert len(nearest("x" * 999, ["x" * 1000])) < 200
