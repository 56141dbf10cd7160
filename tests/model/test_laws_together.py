"""Plans and scans that hold several laws for one tensor, or laws for a part of one."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import tiedparam as tp
from tiedparam.laws import Orbits
from tiedparam.rules import FlipSym, Joint, RowRepeat

REPEAT = ("repeat", {"outputs": 2})


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 12), nn.MultiheadAttention(4, 2))


PLAN = {
    "0": ["flip_sym", REPEAT, ("repeat", {"outputs": 2, "tensor_name": "bias"})],
    "1": [("flip_sym", {"rows": slice(0, 4)}), ("flip_sym", {"rows": slice(4, 8)})],
    "2": (["flip_sym", REPEAT], {"tensor_name": "in_proj_weight", "rows": slice(4, 8)}),
}


def by_hand() -> nn.Sequential:
    model = network()
    tp.register_tie(model[0], ["flip_sym", REPEAT])
    tp.register_tie(model[0], "repeat", "bias", outputs=2)
    tp.register_tie(model[1], PLAN["1"])
    tp.register_tie(model[2], ["flip_sym", REPEAT], "in_proj_weight", rows=slice(4, 8))
    return model


def assert_equal_models(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


# Plans ---------------------------------------------------------------------------------------


def test_a_plan_ties_as_single_calls_do():
    model = network()
    done = tp.tie_model(model, PLAN)
    assert_equal_models(model, by_hand())
    assert [(row.layer, row.tensor_name, row.free_values) for row in done.ties] == [
        ("0", "weight", 3), ("0", "bias", 2), ("1", "weight", 36), ("2", "in_proj_weight", 35),
    ]  # fmt: skip
    assert "joint(laws=['flip_sym', ('repeat', {'outputs': 2})])" in str(done)
    tp.untie_model(model)
    assert not tp.is_tied(model)


def test_a_list_for_several_tensors_stays_one():
    entries = tp.Plan.of({"x": ["flip_sym", ("row_repeat", {"tensor_name": "bias"})]}).entries
    assert [(entry.rule, entry.tensor_name) for entry in entries] == [
        ("flip_sym", "weight"), ("row_repeat", "bias"),
    ]  # fmt: skip
    assert tp.Plan.of({"x": []}).entries == ()


def test_values_with_one_init_share_it():
    (entry,) = tp.Plan.of({"x": ["flip_sym", ("repeat", {"outputs": 2, "init": "exact"})]}).entries
    assert (entry.rule, entry.init) == (["flip_sym", REPEAT], "exact")
    assert entry.rule_class() is Joint
    plan = {"x": [("flip_sym", {"init": "exact"}), (RowRepeat, {"init": "project"})]}
    with pytest.raises(TypeError, match="have one init, not 'exact' and 'project'"):
        tp.Plan.of(plan)


@pytest.mark.parametrize(
    "value", [["flip_sym", FlipSym()], [3], (["flip_sym", 3], {}), [["flip_sym", None]]]
)
def test_what_a_plan_cannot_name_is_a_type_error(value):
    with pytest.raises(TypeError, match=r"a plan names a rule or a Rule subclass, not"):
        tp.Plan.of({"x": value})


def test_all_or_nothing():
    model = network()
    before = model.state_dict()
    with pytest.raises(tp.TieError, match=r"rows 0:99 reach beyond the 12"):
        tp.tie_model(model, {"0": "flip_sym", "1": ("flip_sym", {"rows": slice(0, 99)})})
    assert not tp.is_tied(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    report = tp.tie_model(
        model, {"0": "flip_sym", "1": ("flip_sym", {"rows": slice(0, 99)})}, on_unfit="skip"
    )
    assert [left.layer for left in report.skipped] == ["1"]


# Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_plan_comes_back_from_a_file(suffix, tmp_path):
    path = tmp_path / f"plan.{suffix}"
    tp.write_plan(PLAN, path)
    plan = tp.read_plan(path)
    model = network()
    tp.tie_model(model, plan)
    assert_equal_models(model, by_hand())
    again = tmp_path / f"again.{suffix}"
    tp.write_plan(plan, again)
    assert again.read_bytes() == path.read_bytes()


def test_how_a_file_states_them(tmp_path):
    path = tmp_path / "plan.toml"
    tp.write_plan({"x": ["flip_sym", ("repeat", {"outputs": 2, "rows": slice(None, 4)})]}, path)
    assert path.read_text() == (
        '[[tie]]\nlayers = "x"\nrule = ["flip_sym", ["repeat", { outputs = 2, rows = [0, 4] }]]\n'
    )
    tp.write_plan({"x": (["flip_sym", REPEAT], {"columns": [2, 6]})}, path)
    assert "options = { columns = [2, 6] }" in path.read_text()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (("flip_sym", {"rows": slice(4, None)}), r"rows=slice\(4, None, None\).*where it starts"),
        (("flip_sym", {"rows": slice(0, 4, 2)}), "more than two numbers"),
        (["flip_sym", type("Own", (Orbits,), {})], "Own is not registered"),
    ],
)
def test_what_a_file_cannot_hold_is_told(value, said, tmp_path):
    with pytest.raises(tp.TieError, match=said):
        tp.write_plan({"x": value}, tmp_path / "plan.toml")
    assert not (tmp_path / "plan.toml").exists()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"rule": []}, r"rule must be a string or a list of laws, not \[\]"),
        ({"rule": 3}, "rule must be a string or a list of laws, not 3"),
        ({"rule": ["flip_sym", 3]}, "a list of laws, not 3"),
        ({"rule": ["flip_sym", "flipsym"]}, "entry 1 of .*no rule 'flipsym'"),
        ({"rule": ["flip_sym", ["repeat", {"output": 2}]]}, "the key 'output' is unknown"),
        ({"rule": ["flip_sym", ["index", {}]]}, "missing a required argument: 'index'"),
        ({"rule": ["flip_sym", "row_repeat"], "options": {"groups": 2}}, r"\['groups'\] of a list"),
        ({"rule": "flip_sym", "options": {"rows": 4}}, "rows must be a list of two numbers, not 4"),
        ({"rule": "flip_sym", "options": {"rows": "0:4"}}, "rows must be a list of two numbers"),
        ({"rule": ["flip_sym", ["repeat", {"outputs": 2, "init": "exact"}]]}, "not an option of"),
        ({"rule": ["flip_sym", "row_repeat"], "options": 3}, "options must be a table, not 3"),
    ],
)
def test_a_wrong_file_is_told_by_its_entry(entry, said, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"tie": [{"layers": "x", **entry}]}))
    with pytest.raises(tp.TieError, match=said):
        tp.read_plan(path)


# Scans ---------------------------------------------------------------------------------------


def fused() -> nn.Sequential:
    """A layer of which the first block is symmetric."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 48)
    with torch.no_grad():
        layer.weight[:24] += layer.weight[:24].clone().t()
    return nn.Sequential(layer, nn.Linear(24, 24))


def test_scan_finds_a_part_and_ties_it():
    model = fused()
    seen = tp.scan(model, [("flip_sym", {"rows": slice(None, -24)}), ["flip_sym", REPEAT]])
    (found,) = seen.found()
    assert (found.layer, found.free_values, found.residual) == ("0", 24 * 25 // 2 + 24 * 24, 0)
    assert found.options == {"rows": [0, 24]}
    assert "tp.tie_model(model, {'0': ('flip_sym', {'rows': [0, 24]})})" in str(seen)
    joint = [row for row in seen.candidates if row.rule_class is Joint]
    assert [(row.layer, row.free_values) for row in joint] == [("1", 12 * 13 // 2)]
    assert joint[0].expected == pytest.approx((1 - 78 / 576) ** 0.5, abs=0.02)
    tp.tie_model(model, seen.plan(), max_residual=0)
    assert tp.get_tie(model[0]).free_count == found.free_values


def test_scan_plans_laws_together_by_a_list():
    model = fused()
    with torch.no_grad():
        even = model[1].weight[::2, ::2].clone()
        even += even.clone().t()
        model[1].weight.copy_(even.repeat_interleave(2, 0).repeat_interleave(2, 1))
    seen = tp.scan(model, [["flip_sym", REPEAT]])
    (entry,) = seen.plan().entries
    assert (entry.pattern, entry.rule) == ("1", ["flip_sym", REPEAT])
    assert "{'1': ['flip_sym', ('repeat', {'outputs': 2})]}" in str(seen)


def test_scan_lists_laws_that_fit_nowhere_and_leaves_out_what_leaves_nothing():
    seen = tp.scan(fused(), [["flip_sym", "skew"], ("flip_sym", {"rows": slice(0, 99)})])
    assert seen.candidates == ()
    said = " ".join(str(left.why) for left in seen.not_looked_at)
    assert "rows 0:99 reach beyond" in said
    assert "raised" not in said


def test_scan_by_default_tries_no_laws_together():
    assert not {"joint", "within"} & {row.rule_class.name for row in tp.scan(fused()).candidates}
