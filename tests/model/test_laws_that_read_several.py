"""Laws that read two layers, or read one and have values of their own, in whole models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiedparam as tp
from tiedparam.laws import Linked


@pytest.fixture
def laws(registry):
    @tp.register_rule("test_sum")
    class Sum(Linked):
        law = "W = A.W + B.W"

        def forward(self, a, b):
            return a + b

    @tp.register_rule("test_shifted")
    class Shifted(Linked):
        law = "W = A.W + w"

        def free_shapes(self):
            return ((1,),)

        def fit(self, weight, source):
            return ((weight - source).mean().reshape(1),)

        def forward(self, source, shift):
            return source + shift


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(3, 4) for name in "abcd"})


PLAN = {"c": ("test_sum", {"source": ["a", "b"]}), "d": ("test_shifted", {"source": "c"})}


def test_they_are_tied_by_a_plan_reported_and_untied(laws, model):
    report = tp.tie_model(model, PLAN, init="rescale")
    assert torch.equal(model["c"].weight, model["a"].weight + model["b"].weight)
    assert [row.rule for row in report.ties] == [
        "test_sum of a.weight and b.weight", "test_shifted of c.weight",
    ]  # fmt: skip
    assert [row.free_values for row in report.ties] == [0, 1]
    assert "test_sum of a.weight and b.weight" in str(tp.report(model))
    kept = model["d"].weight.detach().clone()
    tp.untie_model(model)
    assert not tp.is_tied(model)
    assert torch.equal(model["d"].weight, kept)


def test_their_entries_have_no_colour_of_one_value(laws, model):
    pytest.importorskip("matplotlib")
    tp.tie_model(model, PLAN)
    for name in "cd":
        axes = tp.draw_orbits(model[name]).axes[0]
        assert not axes.patches
        assert {text.get_text() for text in axes.texts} == {"f"}  # a function of several values
        assert len({tuple(c) for row in axes.images[0].get_array().tolist() for c in row}) == 1
    tp.draw_weights(model["c"])


def test_a_scan_leaves_them_out_and_looks_on(laws, model):
    report = tp.scan(model)
    rules = {candidate.rule.split(" of ")[0] for candidate in report.candidates}
    assert "copy" in rules
    assert not rules & {"test_sum", "test_shifted"}


def test_a_plan_of_them_goes_through_a_file(laws, model, tmp_path):
    (entry,) = tp.Plan.of({"c": PLAN["c"]}).entries
    options = {**entry.options, "source_name": ["weight", "weight"]}
    plan = tp.Plan((tp.PlanEntry("c", "test_sum", options),))
    tp.write_plan(plan, tmp_path / "named.json")
    assert tp.read_plan(tmp_path / "named.json") == plan
    tp.write_plan(PLAN, tmp_path / "plan.toml")
    tp.tie_model(model, tp.read_plan(tmp_path / "plan.toml"))
    assert torch.equal(model["c"].weight, model["a"].weight + model["b"].weight)


def test_a_source_outside_of_the_model_is_put_back_too(laws, model):
    outside = nn.Linear(3, 4)
    before = dict(outside.__dict__)
    plan = {"c": ("test_sum", {"source": [model["a"], outside]})}
    tp.tie_model(model, plan, dry_run=True)
    assert outside.__dict__.keys() == before.keys()
    report = tp.tie_model(model, plan)
    assert report.ties[0].rule == "test_sum of a.weight and a layer outside of the model"
