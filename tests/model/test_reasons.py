"""Why tensors were left as they are, as values and as text."""

from __future__ import annotations

import pickle

import tiedparam as tp
from tiedparam.model.reasons import SeveralTiesError, Skipped

WHY = tp.TieError("", "out_channels (4) must equal in_channels (3).", "Tie a square layer.").reason


def test_what_was_skipped_as_data():
    assert Skipped("body.0", "weight", WHY, "flip_sym").to_data() == {
        "layer": "body.0", "tensor_name": "weight", "rule": "flip_sym",
        "reason": "out_channels (4) must equal in_channels (3). Tie a square layer.",
    }  # fmt: skip
    assert Skipped("body.0", "weight", WHY, "flip_sym").place == "'body.0.weight' by 'flip_sym'"
    alone = Skipped("", "weight", tp.TieError("", "it is empty.", "").reason)
    assert alone.to_data() == {"layer": "", "tensor_name": "weight", "reason": "it is empty."}
    assert alone.place == "'weight'"


def test_several_reasons_are_a_list_with_the_remedy_below():
    error = SeveralTiesError("the model", "2 of 3:", "Leave them.", [("'a'", WHY), ("", WHY)])
    assert str(error) == f"2 of 3:\n'a': {WHY}\n{WHY}\nLeave them."
    assert error.fact == f"2 of 3:\n'a': {WHY}\n{WHY}"
    assert (error.where, error.remedy) == ("the model", "Leave them.")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.reasons == error.reasons


def test_without_a_heading_one_reason_is_one_line():
    assert str(SeveralTiesError("the plan", "", "", [("", WHY)])) == str(WHY)


def test_a_long_list_keeps_its_remedy():
    error = SeveralTiesError("the model", "all:", "Leave them.", [("'x'", WHY)] * 999)
    assert str(error).endswith("more\nLeave them.")
    assert len(str(error)) < 2000
