"""The shell says what the library says, with next steps that one types in a shell."""

from __future__ import annotations

import pytest
from torch import nn

import tiedparam as tp
from tiedparam.cli.model_from_file import open_model
from tiedparam.cli.wording import REMEDIES, in_one_line, in_shell, message_of

REMOVE_THE_TIE = "Call remove_tie first."


def reason(fact: str, remedy: str = ""):
    return tp.TieError("", fact, remedy).reason


def test_a_remedy_of_python_becomes_one_of_the_shell():
    assert (
        in_shell(reason("it is tied.", REMOVE_THE_TIE)) == "it is tied. Run tiedparam untie first."
    )
    assert in_shell(reason("it is lazy.", "Run it once.")) == "it is lazy. Run it once."
    assert in_shell(reason("it is tied.")) == "it is tied."


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
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 2)})
    tp.register_tie(model["a"], "flip_sym")
    with pytest.raises(tp.TieError) as caught:
        tp.tie_model(model, {"*": "flip_sym"})
    lines = message_of(caught.value).splitlines()
    assert lines[1] == (
        "'a.weight' by 'flip_sym': it is tied by 'flip_sym' already. Run tiedparam untie first."
    )
    assert lines[2].startswith("'b.weight' by 'flip_sym': ")
    assert lines[3] == "Correct the plan, or pass --skip-unfit to leave these as they are."
    report = tp.tie_model(model, {"*": "flip_sym"}, on_unfit="skip")
    assert REMOVE_THE_TIE in str(report)
    assert REMOVE_THE_TIE not in report.text([], in_shell)
    assert "already. Run tiedparam untie first." in report.text([], in_shell)


def test_reasons_against_a_file_are_reworded_however_many(tmp_path, registry, monkeypatch):
    @tp.register_rule("all_equal")
    class AllEqual(tp.Rule):
        law = "W = w"

        def free_shapes(self):
            return ((1, 1),)

        def forward(self, value):
            return value.expand(self.bound_layout.shape)

        def symmetries(self, weight):
            return [weight.flip(0)]

    path = tmp_path / "model.safetensors"
    for count in (1, 2):
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(count)))
        tp.tie_model(model, {"*": "all_equal"}, init="rescale")
        tp.save(model, path)
        with monkeypatch.context() as patched:
            patched.setattr("tiedparam.laws.registry._RULES", {})
            with pytest.raises(tp.TieError) as caught:
                open_model(path)
        lines = [line for line in message_of(caught.value).splitlines() if "no rule" in line]
        assert len(lines) == count
        assert all(line.endswith("Rules of your own need --import.") for line in lines)
        assert "import its module first" in str(caught.value)


def test_a_scan_and_a_broken_law_name_options_of_the_shell():
    layers = [nn.Linear(6, 6) for _ in range(5)]
    report = tp.scan(nn.Sequential(*layers), ["copy"], pairs=1)
    assert "have no row. pairs= sets the bound." in str(report)
    assert "have no row. --pairs sets the bound." in report.text([], in_shell)
    with pytest.raises(tp.TieError) as caught:
        tp.register_tie(layers[0], "flip_sym", init="exact")
    assert str(caught.value).endswith(" Use init='project' to take the nearest lawful weight.")
    assert message_of(caught.value).endswith(
        " Choose 'project' instead of 'exact' to take the nearest lawful weight."
    )


def test_control_characters_of_names_do_not_steer_the_terminal():
    assert (
        message_of(tp.TieError("", "it is called 'a\x1b[2J'.", "")) == "it is called 'a\\x1b[2J'."
    )


def test_a_warning_in_one_line():
    assert in_one_line(tp.TieWarning("first:\nsecond\nthird.\n", "Do it.")) == (
        "first: second; third. Do it."
    )
