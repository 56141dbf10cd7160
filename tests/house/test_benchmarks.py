"""The benchmarks run, refuse wrong contenders, enrol every rule, and make their page."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import tiedparam as tp
from benchmarks import __main__ as command
from benchmarks import contenders, goal_cases, report
from benchmarks.cases import CASES
from benchmarks.goals import Goal
from benchmarks.measuring import Contender, DisagreementError, Run, Setting, summarize
from tests.support import ROOT

SAMPLE = {
    "case": "channel_shared",
    "title": "A title",
    "quick": False,
    "device": "cpu",
    "machine": "a processor",
    "threads": 1,
    "versions": {"python": "3.11", "torch": "2.13.0", "tiedparam": "0"},
    "commit": "0123456789abcdef",
    "date": "2026-01-01",
    "seconds": 1.0,
    "comparisons": [
        {
            "shapes": "Conv2d(64, 64, 3) on 28²",
            "mode": mode,
            "batch": 32,
            "contenders": {
                "dense": {
                    allocator: {"ratio": 1, "lower": 1, "upper": 1, "ms": 40, "extra_us": 0}
                    for allocator in ("fixed", "default")
                },
                "tiedparam": {
                    "fixed": {"ratio": tied, "lower": 0.1, "upper": 0.3, "ms": 8, "extra_us": -3e4},
                    "default": {"ratio": 0.5, "lower": 0.4, "upper": 0.6, "ms": 20, "extra_us": -2},
                },
                "hand-written": {
                    "fixed": {"ratio": 0.16, "lower": 0.1, "upper": 0.3, "ms": 8, "extra_us": -3e4},
                },
            },
        }
        for mode, tied in (("inference", 0.2), ("training", 0.1))
    ],
}


@pytest.fixture
def swift(monkeypatch):
    setting = Setting(seconds=0, rounds=(2, 2), slice_ms=0)
    monkeypatch.setattr(Setting, "quick", classmethod(lambda cls: setting))


def run_command(*arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_writes_a_result_with_everything_it_depends_on(tmp_path):
    run_command("--quick", "--case", "flip_sym_expansion", "--out", str(tmp_path))
    result = json.loads((tmp_path / "cpu-flip_sym_expansion.json").read_text(encoding="utf-8"))
    assert result["quick"] is True
    assert result["device"] == "cpu"
    assert result["threads"] == 1
    assert result["versions"]["torch"] == torch.__version__
    assert result["versions"]["tiedparam"] == tp.__version__
    assert result["machine"]
    assert result["date"]
    assert "commit" in result
    assert result["allocator"]["fixed"] == command.ALLOCATOR
    assert len(result["goals"]) == len(CASES["flip_sym_expansion"].goals)
    assert len(result["comparisons"]) == 3
    for comparison in result["comparisons"]:
        assert next(iter(comparison["contenders"])) == "clone of the dense weight"
        for figures in comparison["contenders"].values():
            for allocator in ("fixed", "default"):
                assert {"ratio", "lower", "upper", "ms"} <= set(figures[allocator])
    (small,) = [g for g in result["goals"] if "150 µs" in g["goal"]]
    assert small["value"] > 0
    assert small["met"] is (small["value"] <= 150)


@pytest.mark.slow
def test_every_available_rule_is_enrolled(swift):
    comparisons = command.measure("every_rule", quick=True, device="cpu")
    assert {c["rule"] for c in comparisons} == set(tp.available_rules())
    for comparison in comparisons:
        assert list(comparison["contenders"]) == ["dense", "tiedparam"]
    # by its examples, and on the layers of common size
    assert any(c["shapes"].startswith("Linear(64, 64), flip_sym") for c in comparisons)
    labels = [(c["shapes"], c["mode"]) for c in comparisons]
    assert len(set(labels)) == len(labels)


def test_a_rule_of_ones_own_is_enrolled(swift, registry):
    @tp.register_rule("another_flip")
    class Another(tp.available_rules()["flip_sym"]):
        pass

    comparisons = command.measure("small_layers", quick=True, device="cpu")
    assert any("another_flip" in c["shapes"] for c in comparisons)


def shared_layer():
    return contenders.lawful(nn.Conv2d(4, 4, 3, padding=1), "channel_shared")


def quick_run():
    return Run(quick=True, setting=Setting(seconds=0, rounds=(2, 2), slice_ms=0))


@pytest.mark.parametrize("name", ["channel_shared", "row_repeat", "streams"])
def test_all_ways_to_compute_a_story_agree(name):
    layer, x = {
        "channel_shared": (shared_layer, torch.randn(2, 4, 5, 5)),
        "row_repeat": (lambda: contenders.lawful(nn.Linear(6, 5), "row_repeat"), torch.randn(2, 6)),
        "streams": (
            lambda: contenders.lawful(
                nn.Conv1d(3, 6, 3, padding=1, groups=3), "channel_shared", over="groups"
            ),
            torch.randn(2, 3, 8),
        ),
    }[name]
    run = quick_run()
    found = getattr(contenders, name)(layer())
    run.compare("shapes", found, x)
    assert [c["mode"] for c in run.comparisons] == ["inference", "training"]
    assert list(run.comparisons[0]["contenders"]) == [c.name for c in found]


def broken(change):
    layer = shared_layer()
    dense, tied = contenders.channel_shared(layer)[:2]
    return [dense, change(tied)]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda c: Contender("bad", lambda x: c.forward(x) * 1.001, c.weights, c.others, c.expand),
         "the output differs"),
        (lambda c: Contender("bad", lambda x: c.forward(x)[:1], c.weights, c.others, c.expand),
         r"the output is \(1, 4, 5, 5\), not \(2, 4, 5, 5\)"),
        (lambda c: Contender("bad", lambda x: c.forward(x.detach()) + 0 * x.sum(), c.weights,
                             c.others, c.expand),
         "the gradient of the input differs"),
        (lambda c: Contender("bad", c.forward, c.weights, c.others, lambda: 2 * c.expand()),
         "differs"),
    ],
)  # fmt: skip
def test_a_contender_that_disagrees_is_refused(change, what):
    run = quick_run()
    with pytest.raises(DisagreementError, match=f"'bad': .*{what}"):
        run.compare("shapes", broken(change), torch.randn(2, 4, 5, 5))
    assert run.comparisons == []


def test_a_wrong_recipe_stops_its_case(swift, monkeypatch):
    monkeypatch.setattr(contenders.Expanding, "forward", lambda self, w: 2 * w.expand(
        [self.copies if a == self.axis else n for a, n in enumerate(w.shape)]))  # fmt: skip
    with pytest.raises(DisagreementError, match="'plain parametrization'"):
        command.measure("row_repeat", quick=True, device="cpu")


def test_figures_are_medians_of_the_ratios_of_each_round():
    figures = summarize({"dense": [1e6, 2e6, 4e6], "tied": [2e6, 2e6, 2e6]})
    assert figures["dense"]["ratio"] == figures["dense"]["upper"] == 1
    assert figures["tied"] == {
        "ratio": 1.0, "lower": 0.75, "upper": 1.5, "ms": 2.0, "extra_us": 0.0,
    }  # fmt: skip


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


def test_goals_name_comparisons_that_the_cases_make():
    names = {name for case in CASES.values() for goal in case.goals for name in goal.against}
    layers = [
        *contenders.channel_shared(shared_layer()),
        *contenders.streams(
            contenders.lawful(nn.Conv1d(2, 4, 3, groups=2), "channel_shared", over="groups")
        ),
    ]
    others = {"clone of the dense weight", "users' averaging"}
    assert names <= {c.name for c in layers} | others


@pytest.fixture
def sample(tmp_path):
    goals = [goal.evaluate(SAMPLE["comparisons"]) for goal in CASES["channel_shared"].goals]
    command.write(tmp_path / "cpu-channel_shared.json", {**SAMPLE, "goals": goals})
    return tmp_path


def test_the_page_is_made_of_the_results_and_always_the_same(sample):
    page = sample / "benchmarks.md"
    assert command.main(["--report", "--out", str(sample), "--docs", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    report.write(sample, page)
    assert page.read_text(encoding="utf-8") == text
    assert (
        "| `channel_shared` | Conv2d(64, 64, 3) on 28², inference: ≥ 8 × faster than dense | 5 |"
        in text
    )
    assert "**not met**, short by 60 %" in text
    assert "0.2 [0.1–0.3]" in text
    assert "not measured" in text


def test_the_readme_table_is_made_of_the_results(sample):
    text = report.readme_table(sample)
    assert (
        "| `channel_shared` | Conv2d(64, 64, 3) on 28², batch 32 | 5 × | 2 × | 10 × | 2 × |" in text
    )
    assert report.readme_table(sample / "none") == report._table(
        text.splitlines()[0].strip("| ").split(" | "), []
    )


def test_the_page_names_cases_that_exist():
    page = ROOT / "docs" / "benchmarks.md"
    if not page.exists():
        pytest.skip("docs/benchmarks.md is not generated yet")
    text = page.read_text(encoding="utf-8")
    assert text == report.render(report.load(command.RESULTS), command.RESULTS, page)
    named = {line.split("`")[1] for line in text.splitlines() if line.startswith("## `")}
    assert named <= set(CASES)


def test_the_readme_figures_are_those_of_the_result_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split(report.FIGURES_BEGIN)[1].split(report.FIGURES_END)[0].strip()
    assert block == report.readme_table(command.RESULTS).strip(), f"run {report.COMMAND}"
    assert block.count("×") >= 10


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
    both = close.evaluate([entry(tiedparam=1.011), entry(tiedparam=1.012), entry(tiedparam=1.5)])
    assert both["value"] == 1.5


def test_an_unknown_case_is_named(capsys):
    options = command._parser().parse_args(["--case", "nonsense"])
    assert command._measure(options) == 2
    assert "no case nonsense; there are: channel_shared" in capsys.readouterr().err
