"""The benchmarks run, refuse wrong contenders, and enrol every rule."""

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
from benchmarks import contenders, machine
from benchmarks.cases import CASES
from benchmarks.measuring import Contender, DisagreementError, Run, Setting, summarize
from tests.support import ROOT


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


@pytest.mark.slow
def test_limited_instructions_reach_torch(tmp_path):
    run_command("--quick", "--isa", "avx2", "--case", "cache", "--out", str(tmp_path))
    result = json.loads((tmp_path / "cpu-cache.json").read_text(encoding="utf-8"))
    assert result["machine"]["limits"] == machine.INSTRUCTIONS["avx2"]
    assert result["machine"]["used by torch"] in ("AVX2", "DEFAULT")


def test_an_unknown_case_is_named(capsys):
    options = command._parser().parse_args(["--case", "nonsense"])
    assert command._measure(options) == 2
    assert "no case nonsense; there are: channel_shared" in capsys.readouterr().err
