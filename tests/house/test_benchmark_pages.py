"""The pages of the benchmarks are made of their results, and current."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import __main__ as command
from benchmarks import goal_cases, machine, report
from benchmarks.cases import CASES
from benchmarks.cases.families import FAMILIES
from benchmarks.goals import Goal
from tests.support import ROOT
from tests.support.benchmark_sample import SAMPLE


@pytest.fixture
def sample(tmp_path):
    goals = [goal.evaluate(SAMPLE["comparisons"]) for goal in CASES["channel_shared"].goals]
    command.write(tmp_path / "cpu-channel_shared.json", {**SAMPLE, "goals": goals})
    return tmp_path


def test_the_tables_are_made_of_the_results_and_always_the_same(sample):
    page = sample / "speed.md"
    assert command.main(["--report", "--out", str(sample), "--docs", str(page)]) == 0
    made = {name: (sample / name).read_text(encoding="utf-8") for name in report.pages(sample)}
    behind = {f"maintainers/benchmarks/{name}.md" for name in ("index", "goals", "one")}
    assert set(made) == {"speed.md", *behind}
    assert made == report.pages(sample)
    assert "](maintainers/benchmarks/index.md)" in made["speed.md"]
    assert "[tables](one.md)" in made["maintainers/benchmarks/index.md"]
    text = made["maintainers/benchmarks/one.md"]
    assert (
        "| `channel_shared` | Conv2d(64, 64, 3) on 28², inference: ≥ 8 × faster than dense | 5 |"
        in text
    )
    assert "**not met**, short by 60 %" in text
    assert "0.2 [0.1–0.3]" in text
    assert "not measured" in text


def on_another_machine(result, factor):
    """The same on a machine on which the tied layer takes so many times as long."""
    result = json.loads(json.dumps(result))
    result["machine"] |= {"key": "another", "name": "another", "limits": {"A": "avx2"}}
    for comparison in result["comparisons"]:
        for figures in comparison["contenders"]["tiedparam"].values():
            figures["ratio"] *= factor
    return result


def scaling_result(gain):
    """The case `scaling`: a gain from the usual size on, and next to none below."""
    found = []
    for family in FAMILIES:
        for size, batch in family.points(quick=False):
            faster = gain if size >= family.usual[0] else 1.5
            for mode in ("inference", "training"):
                figures = {"dense": 1.0, "tiedparam": 1 / faster}
                found.append({
                    "shapes": family.label(size), "mode": mode, "batch": batch, "size": size,
                    "family": family.title, "limit": 0.1,
                    "contenders": {name: {"fixed": {
                        "ratio": ratio, "lower": ratio, "upper": ratio, "ms": ratio, "extra_us": 0,
                    }} for name, ratio in figures.items()},
                })  # fmt: skip
    return {**SAMPLE, "case": "scaling", "goals": [], "comparisons": found}


def test_the_page_says_from_where_on_a_law_gains_on_every_machine(tmp_path):
    command.write(tmp_path / "cpu-scaling.json", scaling_result(4.0))
    (tmp_path / "other").mkdir()
    other = on_another_machine(scaling_result(4.0), 2)
    command.write(tmp_path / "other" / "cpu-scaling.json", other)
    made = report.pages(tmp_path)
    text = made["speed.md"]
    lines = [line for line in text.splitlines() if line.startswith("| circulant")]
    assert lines == [
        "| circulant (`circulant`) | Linear(1024, 1024), 64 rows | 2–4 × | 2–4 × | 1,024 features |"
    ]
    assert text.count(" | 2–4 × | 2–4 × | ") == len(FAMILIES)
    small = report.readme.figures(report.load(tmp_path))
    assert "| circulant (`circulant`) | Linear(1024, 1024), 64 rows | 2–4 × | 2–4 × |\n" in small
    table = made["maintainers/benchmarks/index.md"]
    assert "| B | another | AVX2 | L2 1024K | yes | [tables](another.md) |" in table


def test_three_machines_are_told_apart(tmp_path):
    """Two real ones, of which one has no result of this case, and an emulated one."""
    goals = [Goal("1,024: ≥ 5 ×", "speedup", 9, "inference", row="head_share").evaluate(
        SAMPLE["comparisons"])]  # fmt: skip
    goals = [{"row": "head_share", "theme": "x", **goal} for goal in goals]
    comparisons = [{**c, "theme": "x"} for c in SAMPLE["comparisons"]]
    of_goals = {**SAMPLE, "case": "goals", "goals": goals, "comparisons": comparisons}
    for key, limits, parts in (
        ("first", {}, (scaling_result(4.0), of_goals)),
        ("second", {}, (scaling_result(2.0),)),
        ("third", {"A": "avx2"}, (scaling_result(3.0), of_goals)),
    ):
        (tmp_path / key).mkdir()
        for part in parts:
            part = json.loads(json.dumps(part))
            part["machine"] |= {"key": key, "name": key, "limits": limits}
            command.write(tmp_path / key / f"cpu-{part['case']}.json", part)
    made = report.pages(tmp_path)
    text = made["speed.md"]
    assert text.count(" | 2–4 × | 2–4 × | ") == len(FAMILIES)
    assert "The machines: first (AVX2); second (AVX2); third (AVX2). *Limited* means" in text
    table = made["maintainers/benchmarks/index.md"]
    rows = re.findall(r"^\| ([A-Z]) \| (\w+) \|.* (yes|no) \| ", table, re.MULTILINE)
    assert rows == [("A", "first", "no"), ("B", "second", "no"), ("C", "third", "yes")]
    goals_page = made["maintainers/benchmarks/goals.md"]
    assert "| case | goal | A | C |" in goals_page
    assert "1,024: ≥ 5 ×: A 5, C 5." in goals_page


def test_where_a_tie_is_slower_is_said_with_what_keeps_the_weight(tmp_path):
    command.write(tmp_path / "cpu-scaling.json", scaling_result(0.8))
    kept = {"dense": 1.0, "tiedparam": 2.0, "tiedparam, frozen": 1.01}
    found = [
        {
            "shapes": f"Linear({size}, {size}), flip_sym", "mode": "inference", "batch": 1,
            "contenders": {name: {"fixed": {"ratio": 1.01 if size > 9 else ratio, "extra_us": 1}}
                           for name, ratio in kept.items()},
        } for size in (8, 16)
    ]  # fmt: skip
    result = {**SAMPLE, "case": "inference", "goals": [], "comparisons": found}
    command.write(tmp_path / "cpu-inference.json", result)
    text = report.pages(tmp_path)["speed.md"]
    assert "- circulant (`circulant`), Linear(1024, 1024), 64 rows: 0.8 × as fast in inf" in text
    assert "| Linear(8, 8) | `flip_sym` | 1 | 2 | – | 1.01 |" in text
    assert "Linear(16, 16)" not in text


def test_the_charts_are_drawn_of_the_case_scaling(tmp_path):
    pytest.importorskip("matplotlib")
    command.write(tmp_path / "cpu-scaling.json", scaling_result(4.0))
    report.write(tmp_path, tmp_path / "speed.md")
    first = report.charts.digest(report.load(tmp_path))
    drawn = {path.name: path.read_bytes() for path in tmp_path.rglob("*.svg")}
    assert set(drawn) == {f"cpu-{name}.svg" for name in report.charts.CHARTS}
    assert all(first.encode() in picture for picture in drawn.values())
    report.write(tmp_path, tmp_path / "speed.md")
    assert drawn == {path.name: path.read_bytes() for path in tmp_path.rglob("*.svg")}
    command.write(tmp_path / "cpu-scaling.json", scaling_result(3.0))
    assert report.charts.digest(report.load(tmp_path)) != first


def test_the_page_lists_what_is_missed_with_the_floor_and_what_was_tried(tmp_path):
    goal = Goal("1,024: ≥ 5 ×", "speedup", 5, "inference", row="head_share",
                floor="hand-written", tried="All of it.")  # fmt: skip
    found = {"row": "head_share", "theme": "x", **goal.evaluate(SAMPLE["comparisons"])}
    missed = {**found, "met": False, "value": 4.5}
    comparisons = [{**c, "theme": "x"} for c in SAMPLE["comparisons"]]
    result = {**SAMPLE, "case": "goals", "goals": [found, missed], "comparisons": comparisons}
    command.write(tmp_path / "cpu-goals.json", result)
    pages = report.pages(tmp_path)
    goals = pages["maintainers/benchmarks/goals.md"]
    assert "## Goals: 1 of 2 met" in goals
    assert "| ≥ 3.3 and 4 × | 1 of 2 |" in goals
    line = "- **head_share 4 of 16, 1,024 and 4,096.** 1,024: ≥ 5 ×: A 4.5 (floor 6.25). *All of"
    assert f"{line} it.*\n" in goals
    assert "Goals" not in pages["speed.md"]
    assert "### Measured for the goals: x" in pages["maintainers/benchmarks/one.md"]
    assert "| **missed**: All of it. |" in pages["maintainers/benchmarks/one.md"]


def test_the_goals_of_the_result_files_are_judged_as_now():
    for path in report.files(command.RESULTS, "goals"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert json.loads(json.dumps(report.judge(result))) == result, f"run {report.COMMAND}"


def test_a_goal_may_be_reworded_without_measuring(tmp_path, monkeypatch):
    comparisons = [{**c, "theme": "x"} for c in SAMPLE["comparisons"]]
    path = tmp_path / "cpu-goals.json"
    command.write(path, {**SAMPLE, "case": "goals", "goals": [], "comparisons": comparisons})
    goal = Goal("in other words", "speedup", 5, "inference", row="head_share")
    theme = goal_cases.Theme("x", lambda run: None, (goal,))
    monkeypatch.setattr(goal_cases, "themes", lambda only=(): [theme])
    report.write(tmp_path, tmp_path / "speed.md")
    (found,) = json.loads(path.read_text(encoding="utf-8"))["goals"]
    assert (found["goal"], found["value"], found["met"]) == ("in other words", 5, True)
    assert "| in other words | 5 × " in (
        tmp_path / "maintainers" / "benchmarks" / "one.md"
    ).read_text("utf-8")


def test_the_pages_are_current():
    """Run the command of the message after the results or what is said of them have changed."""
    made = report.pages(command.RESULTS)
    for name, text in made.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, f"run {report.COMMAND}"
    there = {path.name for path in (ROOT / "docs" / report.FOLDER).iterdir()}
    assert there == {name.rpartition("/")[2] for name in made} - {"speed.md"}


def test_the_charts_are_current():
    results = report.load(command.RESULTS)
    for device in {result["device"] for result in results if result["case"] == "scaling"}:
        for name in report.charts.CHARTS:
            path = ROOT / "docs" / report.charts.FOLDER / f"{device}-{name}.svg"
            assert report.charts.digest(results, device) in path.read_text(encoding="utf-8"), (
                f"run {report.COMMAND}"
            )


def test_the_page_can_be_read_in_one_go():
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1_200
    for name in ("index", "goals"):
        text = (ROOT / "docs" / report.FOLDER / f"{name}.md").read_text(encoding="utf-8")
        assert len(text.split()) <= 2_500


def test_the_readme_figures_are_those_of_the_result_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    results = report.load(command.RESULTS)
    assert text == report.readme.put_into(text, results), f"run {report.COMMAND}"
    assert report.readme.figures(results).count(" × |") >= 10


# Machines ----------------------------------------------------------------------------------


def test_limits_are_carried_by_the_name_and_the_record(monkeypatch):
    for name in machine.INSTRUCTIONS["avx2"]:
        monkeypatch.delenv(name, raising=False)
    free = machine.record("cpu")
    assert free["limits"] == {}
    assert "limited" not in free["name"]
    for name, value in machine.INSTRUCTIONS["avx2"].items():
        monkeypatch.setenv(name, value)
    limited = machine.record("cpu")
    assert limited["limits"] == machine.INSTRUCTIONS["avx2"]
    assert limited["name"].startswith(f"{free['name']}, limited to ")
    assert limited["key"] == f"{free['key']}-limited"  # torch asked once, before the limit


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("Intel(R) Xeon(R) CPU @ 2.20GHz 6 85 AVX512", "intel-xeon-6-85-avx512"),
        ("AMD Ryzen 7 5800X 8-Core Processor 25 33 AVX2", "amd-ryzen-7-5800x-25-33-avx2"),
    ],
)
def test_the_folder_of_a_machine_says_which_it_is(name, key):
    assert machine._slug(name) == key


def test_every_result_says_on_which_machine_it_was_taken():
    found = list(command.RESULTS.glob("*/*.json"))
    assert len(found) > 15
    for path in found:
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["machine"]["key"] == path.parent.name
        assert {"name", "instructions", "used by torch", "caches", "limits"} <= set(
            result["machine"]
        )
    assert not list(command.RESULTS.glob("*.json"))
