"""Goals: how one is judged, and the case that collects those of all laws."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import tiedparam as tp
from benchmarks import __main__ as command
from benchmarks import goal_cases
from benchmarks.goals import Goal
from benchmarks.measuring import Contender, DisagreementError, Setting
from tests.support.benchmark_sample import SAMPLE


@pytest.fixture
def swift(monkeypatch):
    setting = Setting(seconds=0, rounds=(2, 2), slice_ms=0)
    monkeypatch.setattr(Setting, "quick", classmethod(lambda cls: setting))


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [
        (Goal("", "speedup", 8, "inference"), 5, False),
        (Goal("", "speedup", 8, "training"), 10, True),
        (Goal("", "ratio", 1.0, "inference", against=("hand-written",)), 1.25, False),
        (Goal("", "speedup", 2, "inference", allocator="default"), 2, True),
        (Goal("", "microseconds", 30, "inference"), -3e4, True),
        (Goal("", "absolute", 150, "inference"), 8000, False),
        (Goal("", "ratio", 1.0, "inference", "Conv2d(64", 1), None, None),
        (Goal("", "ratio", 1.0, "inference", dense_ms=50), None, None),
    ],
)
def test_goals_take_the_worst_value_that_they_name(goal, value, met):
    found = goal.evaluate(SAMPLE["comparisons"])
    assert found["value"] == (value if value is None else pytest.approx(value))
    assert found["met"] is met


# The case `goals` --------------------------------------------------------------------------


def themes_of(monkeypatch, **bounds):
    """Modules of which each measures an identity against itself, but for the bad one."""

    def measure(run):
        (name,) = run.only
        if name == "bad":
            raise DisagreementError(name)
        run.compare(name, [Contender("dense", same), Contender("tiedparam", same)], torch.ones(2))

    def same(x):
        return 1 * x

    found = {
        name: goal_cases.Theme(
            name, measure, tuple(goal_cases.both_modes("head_share", name, (bound, bound)))
        )
        for name, bound in bounds.items()
    }
    monkeypatch.setattr(goal_cases, "themes", lambda only=(): [found[n] for n in only or found])


def run_goals(folder, *only):
    arguments = [f"--only={name}" for name in only]
    options = command._parser().parse_args(["--quick", "--case=goals", "--out", str(folder),
                                            *arguments])  # fmt: skip
    status = command._measure(options)
    return status, json.loads((folder / "cpu-goals.json").read_text(encoding="utf-8"))


def test_every_module_of_goals_is_found_and_its_goals_have_a_row():
    found = {theme.name: theme for theme in goal_cases.themes()}
    assert "resnet" in found
    for theme in found.values():
        assert theme.goals, theme.name
        assert {goal.row for goal in theme.goals} <= set(goal_cases.ROWS), theme.name
    with pytest.raises(LookupError, match="no goals nonsense; there are: .*resnet"):
        goal_cases.themes(["nonsense"])


def test_a_module_that_is_measured_again_replaces_its_own_part(swift, monkeypatch, tmp_path):
    themes_of(monkeypatch, one=1e-9, two=1e9)
    status, first = run_goals(tmp_path)
    assert status == 0
    assert [c["theme"] for c in first["comparisons"]] == ["one", "one", "two", "two"]
    assert [(g["theme"], g["met"]) for g in first["goals"]] == [
        ("one", True), ("one", True), ("two", False), ("two", False),
    ]  # fmt: skip
    status, again = run_goals(tmp_path, "one")
    assert [c["theme"] for c in again["comparisons"]] == ["two", "two", "one", "one"]
    assert again["comparisons"][:2] == first["comparisons"][2:]
    assert set(again["themes"]) == {"one", "two"}


def test_a_module_that_fails_does_not_take_the_others_along(swift, monkeypatch, tmp_path, capsys):
    themes_of(monkeypatch, bad=1, good=1e-9)
    status, result = run_goals(tmp_path)
    assert status == 1
    assert "failed: bad" in capsys.readouterr().err
    assert set(result["themes"]) == {"good"}
    assert [g["met"] for g in result["goals"]] == [None, None, True, True]


def test_the_table_of_goals_has_a_line_for_each_row_and_goal(swift, monkeypatch, tmp_path, capsys):
    themes_of(monkeypatch, one=1e-9, two=1e9)
    run_goals(tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == len(goal_cases.ROWS) + 4
    (row,) = [i for i, line in enumerate(lines) if "head_share" in line]
    assert lines[row].endswith("| ≥ 3.3 and 4 × |  | 2 of 4 |")
    assert lines[row + 1].startswith("|  | one, inference: ≥ 1e-09 × |")
    assert [line.split(" | ")[-1] for line in lines[row + 1 : row + 5]] == [
        "met |", "met |", "**missed** |", "**missed** |",
    ]  # fmt: skip


def entry(form=None, **figures):
    return {"shapes": "s", "mode": "inference", "form": form, "contenders": {
        name: {"fixed": {"ratio": ratio, "lower": 0.9 * ratio, "upper": 1.25 * ratio, "ms": ratio,
                         "extra_us": 1e3 * (ratio - 1)}}
        for name, ratio in {"dense": 1.0, **figures}.items()}}  # fmt: skip


def test_a_goal_has_a_spread_and_a_floor():
    goal = Goal("", "speedup", 3, "inference", floor="least", tried="all")
    found = goal.evaluate([entry(tiedparam=0.5, least=0.4), entry(tiedparam=0.4)])
    assert (found["value"], found["floor"], found["met"]) == (2, 2.5, False)
    assert found["spread"] == pytest.approx([0.9 / 0.625, 1.25 / 0.45], rel=1e-3)
    assert goal_cases.reached(found) == "2 × [1.44–2.78]; floor 2.5 ×"
    assert goal_cases.verdict(found) == "**missed**: all"


def test_a_goal_may_be_met_in_another_way():
    slow = Goal("", "ratio", 1.0, "inference")
    assert slow.evaluate([entry(tiedparam=1.01)])["met"] is False
    close = Goal("", "ratio", 1.0, "inference", or_microseconds=12)
    found = close.evaluate([entry(tiedparam=1.01), entry(tiedparam=0.5)])
    assert found["met"] is True
    assert found["value"] == 1.01
    assert goal_cases.reached(found).endswith(", 10 µs over dense")
    assert close.evaluate([entry(tiedparam=1.02)])["met"] is False
    dense = Goal("", "ratio", 1.0, "inference", or_dense=True)
    assert dense.evaluate([entry("dense", tiedparam=1.5)])["met"] is True
    assert dense.evaluate([entry("fft", tiedparam=1.5)])["met"] is False
    # the worst is one that misses, if there is one
    worst = dense.evaluate([entry("dense", tiedparam=1.5), entry("fft", tiedparam=1.2)])
    assert (worst["value"], worst["met"]) == (1.2, False)


def test_the_form_that_a_layer_takes_is_noted():
    entries = [{"mode": "inference"}, {"mode": "training"}]
    goal_cases.note_forms(entries, tp.register_tie(nn.Linear(64, 64), "row_repeat"), 8)
    assert [e["form"] for e in entries] == ["reduced", "reduced"]
    goal_cases.note_forms(entries, tp.register_tie(nn.Linear(4, 4), "index", index=_index()), 8)
    assert [e["form"] for e in entries] == ["dense", "dense"]


def _index():
    return torch.arange(16).view(4, 4) % 3
