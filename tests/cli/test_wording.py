"""The shell says what the library says, with next steps that one types in a shell."""

from __future__ import annotations

import pytest

import tiedparam as tp
from tiedparam.cli.wording import REMEDIES, in_one_line, in_shell, message_of
from tiedparam.layer.register import REMOVE_THE_TIE
from tiedparam.model.reasons import SeveralTiesError
from tiedparam.model.tie_model import LEAVE_UNFIT
from tiedparam.util.errors import Reason


def test_a_remedy_of_python_becomes_one_of_the_shell():
    assert (
        in_shell(Reason("it is tied.", REMOVE_THE_TIE)) == "it is tied. Run tiedparam untie first."
    )
    assert in_shell(Reason("it is lazy.", "Run it once.")) == "it is lazy. Run it once."
    assert in_shell(Reason("it is tied.")) == "it is tied."


@pytest.mark.parametrize("said", REMEDIES.values())
def test_no_remedy_of_the_shell_is_python(said):
    assert "tiedparam." not in said
    assert "=" not in said
    assert "()" not in said


def test_names_and_facts_are_never_reworded():
    fact = f"the layer is called '{REMOVE_THE_TIE}'."
    assert message_of(tp.TieError("x", fact, REMOVE_THE_TIE)) == (
        f"x: {fact} Run tiedparam untie first."
    )
    assert message_of(OSError(REMOVE_THE_TIE)) == REMOVE_THE_TIE


def test_each_of_several_reasons_is_reworded():
    error = SeveralTiesError(
        "the model", "2 cannot be made:", LEAVE_UNFIT,
        [("'a'", Reason("it is tied.", REMOVE_THE_TIE)), ("'b'", Reason("it is lazy."))],
    )  # fmt: skip
    assert message_of(error).splitlines() == [
        "2 cannot be made:",
        "'a': it is tied. Run tiedparam untie first.",
        "'b': it is lazy.",
        "Correct the plan, or pass --skip-unfit to leave these as they are.",
    ]


def test_control_characters_of_names_do_not_steer_the_terminal():
    assert (
        message_of(tp.TieError("", "it is called 'a\x1b[2J'.", "")) == "it is called 'a\\x1b[2J'."
    )


def test_a_warning_in_one_line():
    assert in_one_line(tp.TieWarning("first:\nsecond\nthird.\n", "Do it.")) == (
        "first: second; third. Do it."
    )
