"""Ties that were probably not intended are told: those that free nothing, or keep nothing."""

from __future__ import annotations

import copy
import inspect
import math
import re
import warnings

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.tensors import with_weight
from tests.support.unchanged import snapshot, unchanged
from tiedparam.layer import initial_values


def said(layer: nn.Module, rule: str, *names: str, **arguments) -> str | None:
    """The warning of one tie, or None."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tp.register_tie(layer, rule, *names, **arguments)
    assert all(issubclass(warning.category, tp.TieWarning) for warning in caught)
    assert len(caught) <= 1
    return str(caught[0].message) if caught else None


# A tie that frees nothing ---------------------------------------------------------------------


def test_a_tie_that_frees_nothing_names_the_options_that_would():
    layer = nn.Conv1d(64, 64, 7, groups=64)
    message = said(layer, "channel_shared")
    assert "'weight' of Conv1d(64, 64" in message
    assert "frees nothing: 448 of 448 values are stored" in message
    assert "init='rescale'" in message
    named = dict(re.findall(r"over='(\w+)' would store (\d+)", message))
    assert named == {"out": "7", "all": "7", "groups": "7"}
    for over, stored in named.items():
        other = nn.Conv1d(64, 64, 7, groups=64)
        assert said(other, "channel_shared", over=over, init="rescale") is None
        assert tp.get_tie(other).free_count == int(stored)
    call = re.search(r"tiedparam\.(residual\(layer, .*\))\.$", message)[1]
    fresh = nn.Conv1d(64, 64, 7, groups=64)
    assert 0.5 < eval(call, {"residual": tp.residual, "layer": fresh}) < 1


def test_the_advice_leads_from_a_tie_that_frees_nothing_to_one_that_does():
    layer = nn.Conv1d(64, 64, 7, groups=64)
    before = layer.weight.detach().clone()
    message = said(layer, "channel_shared")
    assert "Call remove_tie (it changes no value here) and tie again with another option" in message
    tp.remove_tie(layer)
    assert torch.equal(layer.weight, before)
    over = re.search(r"over='(\w+)' would", message)[1]
    assert said(layer, "channel_shared", over=over, init="rescale") is None


@pytest.mark.parametrize("init", ["project", "rescale", "exact"])
def test_what_frees_nothing_is_said_however_it_begins(init):
    message = said(nn.Linear(5, 3), "row_repeat", groups=3, init=init)
    assert "15 of 15" in message
    assert "groups=1 would store 5" in message


def test_a_single_output_has_no_option_that_would_help():
    message = said(nn.Linear(5, 1), "row_repeat")
    assert "5 of 5" in message
    assert "would" not in message
    assert message.endswith("Leave it out, or choose another law: tiedparam.scan(model) tries all.")


def test_variants_that_cannot_be_made_are_no_error(registry):
    @tp.register_rule("own_row")
    class Own(tp.available_rules()["row_repeat"]):
        @classmethod
        def variants(cls, layout):
            raise ZeroDivisionError

    assert "frees nothing" in said(nn.Linear(5, 1), "own_row")


# A projection that keeps next to nothing ------------------------------------------------------

S37 = [
    (lambda: nn.Linear(512, 512), "row_repeat", {}, 1 / 512),
    (lambda: nn.Conv2d(64, 64, 3), "channel_shared", {}, 1 / 64),
    (lambda: nn.Conv1d(256, 4096, 15, groups=256), "channel_shared", {"over": "groups"}, 1 / 256),
]


@pytest.mark.feature(
    "Layers", "fresh layers, whose projection keeps next to nothing", needs='`init="rescale"`'
)
@pytest.mark.parametrize(("build", "rule", "options", "share"), S37)
def test_s37_a_fresh_layer_that_is_projected_to_next_to_nothing_is_said(
    build, rule, options, share
):
    layer = build()
    before = layer.weight.detach().double().norm()
    message = said(layer, rule, **options)
    kept = float(layer.weight.detach().double().norm() / before)
    assert kept == pytest.approx(math.sqrt(share), rel=0.2)
    shown = float(re.search(r"keeps ([\d.]+)% of the weight", message)[1])
    assert shown / 100 == pytest.approx(kept, abs=6e-4)
    assert "init='rescale'" in message
    call = re.search(r"tiedparam\.(residual\(layer, .*\))\.$", message)[1]
    residual = float(re.search(r"\(residual ([\d.]+), chance", message)[1])
    found = eval(call, {"residual": tp.residual, "layer": build()})
    assert found == pytest.approx(residual, abs=1e-3)


@pytest.mark.parametrize(("build", "rule", "options", "share"), S37)
def test_s37_the_advice_leads_from_a_projected_fresh_layer_to_its_scale(
    build, rule, options, share
):
    layer = build()
    before = float(layer.weight.detach().std())
    message = said(layer, rule, **options)
    assert "call remove_tie and tie again with init='rescale', which keeps its scale." in message
    tp.remove_tie(layer)
    assert said(layer, rule, init="rescale", **options) is None
    assert float(layer.weight.detach().std()) == pytest.approx(before, rel=0.25)


def test_s37_the_advice_for_a_trained_weight_looks_before_the_tie():
    layer = nn.Linear(256, 256)
    saved = copy.deepcopy(layer.state_dict())
    message = said(layer, "row_repeat")
    assert (
        "A trained weight was replaced by its projection: load it again, and check before"
        in message
    )
    call = re.search(r"tiedparam\.(residual\(layer, .*\))\.$", message)[1]
    names = {"residual": tp.residual, "layer": layer}
    assert eval(call, names) == 0  # the projection itself is lawful, which says nothing
    tp.remove_tie(layer)
    layer.load_state_dict(saved)
    assert eval(call, names) > 0.9


@pytest.mark.parametrize(("build", "rule", "options", "share"), S37)
def test_s37_rescaling_keeps_the_scale_and_is_silent(build, rule, options, share):
    layer = build()
    before = float(layer.weight.detach().std())
    assert said(layer, rule, init="rescale", **options) is None
    assert float(layer.weight.detach().std()) == pytest.approx(before, rel=0.25)


def test_s37_half_of_a_fresh_layer_is_not_next_to_nothing():
    assert said(nn.Conv2d(32, 32, 3), "flip_sym") is None
    assert said(nn.Linear(64, 64), "flip_sym") is None


def test_another_option_that_keeps_more_is_named():
    layer = nn.Conv2d(3, 64, 5)
    message = said(copy.deepcopy(layer), "channel_shared", over="out")
    ((over, percent),) = re.findall(r"over='(\w+)' would keep (\d+)%", message)
    assert over == "in"
    before = layer.weight.detach().norm()
    tp.register_tie(layer, "channel_shared", over=over)
    assert float(layer.weight.detach().norm() / before) == pytest.approx(
        int(percent) / 100, abs=0.01
    )


def near_the_law(noise: float) -> nn.Module:
    row = torch.randn(1, 128)
    return with_weight(nn.Linear(128, 128), row + noise * torch.randn(128, 128))


QUIET = {
    "a trained weight near the law": lambda: near_the_law(0.1),
    "a trained weight with something of it": lambda: near_the_law(2.0),
    "zeros": lambda: with_weight(nn.Linear(128, 128), torch.zeros(())),
    "a constant": lambda: with_weight(nn.Linear(128, 128), torch.tensor(0.3)),
    "a tiny layer, which cancels by luck": lambda: with_weight(
        nn.Linear(2, 20), torch.tensor([1.0, -1.0]).repeat(10)[:, None]
    ),
    "no number": lambda: with_weight(nn.Linear(128, 128), torch.tensor(torch.nan)),
    "infinite": lambda: with_weight(nn.Linear(128, 128), torch.tensor(torch.inf)),
    "on meta": lambda: nn.Linear(128, 128, device="meta"),
}  # fmt: skip


@pytest.mark.parametrize("build", QUIET.values(), ids=QUIET.keys())
def test_what_is_near_the_law_or_says_nothing_of_it_is_silent(build):
    assert said(build(), "row_repeat") is None


def test_a_weight_that_cancels_is_said_though_it_is_no_random_one():
    columns = torch.tensor([1.0, -1.0]).repeat(64)[:, None].expand(128, 128)
    assert "keeps 0.0%" in said(with_weight(nn.Linear(128, 128), columns), "row_repeat")


def test_a_copy_replaces_the_weight_and_is_silent():
    source = with_weight(nn.Linear(64, 64), torch.zeros(()))
    assert said(nn.Linear(64, 64), "copy", source=source) is None
    assert said(nn.Linear(64, 64), "squared_copy", source=nn.Linear(64, 64)) is None


def test_a_bias_is_named_in_the_call():
    layer = nn.Linear(4, 512)
    message = said(layer, "row_repeat", "bias")
    assert "tiedparam.residual(layer, 'row_repeat', 'bias', groups=1)" in message


def test_a_rule_without_a_name_is_named_by_its_class():
    class Unregistered(tp.available_rules()["row_repeat"]):
        name = ""

    layer = nn.Linear(64, 64)
    with pytest.warns(tp.TieWarning, match=r"residual\(layer, Unregistered, groups=1\)"):
        tp.register_tie(layer, Unregistered)


# How it is said -------------------------------------------------------------------------------


def test_the_warning_points_at_the_line_that_ties():
    here = inspect.currentframe()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = here.f_lineno + 1
        tp.register_tie(nn.Linear(512, 512), "row_repeat")
        tp.tie_model(nn.Sequential(nn.Linear(512, 512)), {"0": "row_repeat"})
    assert [(w.filename, w.lineno) for w in caught] == [(__file__, line), (__file__, line + 1)]


def test_as_an_error_the_warning_leaves_everything_as_it_was():
    layer = nn.Linear(512, 512)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before, rule = snapshot(layer), tp.available_rules()["row_repeat"]()
    model = nn.Sequential(nn.Linear(512, 512))
    before_model = snapshot(model[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(tp.TieWarning):
            tp.register_tie(layer, rule, optimizer=optimizer)
        with pytest.raises(tp.TieWarning):
            tp.tie_model(model, {"0": "row_repeat"})
    assert unchanged(before, snapshot(layer))
    assert unchanged(before_model, snapshot(model[0]))
    assert rule.layout is None
    assert optimizer.param_groups[0]["params"] == list(layer.parameters())
    layer(torch.ones(512)).sum().backward()
    optimizer.step()  # and its guard holds nothing against the parameter


def test_the_residual_is_computed_once(monkeypatch):
    calls = []
    original = initial_values.relative_distance
    monkeypatch.setattr(
        initial_values, "relative_distance", lambda *a: calls.append(a) or original(*a)
    )
    rule = tp.available_rules()["row_repeat"]
    projected = []
    inverse = rule.right_inverse
    monkeypatch.setattr(
        rule, "right_inverse", lambda self, w: projected.append(w) or inverse(self, w)
    )
    assert said(nn.Linear(128, 128), "row_repeat") is not None
    once = len(projected)
    assert len(calls) == 1
    assert said(nn.Linear(128, 128), "row_repeat", init="rescale", max_residual=1) is None
    assert len(calls) == 2
    assert len(projected) == 2 * once  # the same work, whether there is a concern or not


# Whole models ---------------------------------------------------------------------------------


def test_a_model_gives_one_warning_of_bounded_length():
    model = nn.ModuleDict({f"layer{i}" + 500 * "x": nn.Linear(64, 64) for i in range(40)})
    model["odd"], model["fine"] = nn.Linear(5, 1), nn.Linear(4, 4)
    with pytest.warns(tp.TieWarning) as caught:
        report = tp.tie_model(model, {"*": "row_repeat"})
    (warning,) = caught
    message = str(warning.message)
    assert message.startswith("41 of 42 ties were probably not intended:\n")
    assert "… and 38 more." in message
    assert "init='rescale'" in message
    assert "max_residual=" in message
    assert "tiedparam.residual" in message
    assert len(message) < 1500
    assert message.count("keeps ") == 3  # and not cut off
    assert len(report.ties) == 42


def test_a_model_names_the_layers():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1))
    with pytest.warns(tp.TieWarning) as caught:
        tp.tie_model(model, {"*": "row_repeat"}, dry_run=True)
    (warning,) = caught
    assert "'0.weight' by 'row_repeat(groups=1)' keeps " in str(warning.message)
    assert "'1.weight' by 'row_repeat(groups=1)' frees nothing: 64 of 64" in str(warning.message)
    assert "untie_model" not in str(warning.message)  # a dry run: there is nothing to undo
    assert not tp.is_tied(model)


def test_the_advice_for_a_model_leads_to_its_scale():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    before = [float(layer.weight.detach().std()) for layer in model]
    with pytest.warns(tp.TieWarning, match="To tie again call untie_model first"):
        tp.tie_model(model, {"*": "row_repeat"})
    with pytest.raises(tp.TieError):
        tp.tie_model(model, {"*": "row_repeat"}, init="rescale")
    tp.untie_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tp.tie_model(model, {"*": "row_repeat"}, init="rescale")
    for layer, deviation in zip(model, before, strict=True):
        assert float(layer.weight.detach().std()) == pytest.approx(deviation, rel=0.3)


def test_a_model_that_is_rescaled_or_refused_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tp.tie_model(nn.Sequential(nn.Linear(64, 64)), {"*": "row_repeat"}, init="rescale")
        with pytest.raises(tp.TieError):
            tp.tie_model(
                nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 6)),
                {"*": ("row_repeat", {"groups": 4})},
            )


def test_loading_replaces_what_the_layer_held_and_is_silent(tmp_path):
    model = nn.Sequential(nn.Linear(128, 128))
    tp.tie_model(model, {"0": "row_repeat"}, init="rescale")
    tp.save(model, tmp_path / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = tp.load(tmp_path / "a.safetensors", nn.Sequential(nn.Linear(128, 128)))
    assert torch.equal(loaded[0].weight, model[0].weight)


# max_residual= --------------------------------------------------------------------------------


@pytest.mark.feature("Layers", "a limit for how far a weight may be from its law: `max_residual=`")
def test_a_weight_too_far_from_the_law_is_refused_before_anything_changed():
    model = nn.Sequential(near_the_law(0.1), nn.Linear(128, 128))
    residual = tp.residual(model[1], "row_repeat")
    before, rule = snapshot(model[1]), tp.available_rules()["row_repeat"]()
    with pytest.raises(tp.TieError) as caught:
        tp.register_tie(model[1], rule, root=model, max_residual=0.3)
    message = str(caught.value)
    assert message.startswith("cannot tie '1.weight' by 'row_repeat(groups=1)': its residual 0.99")
    assert f"{residual:.3g} is above the limit of 0.3" in message
    assert "tiedparam.scan" in message
    assert unchanged(before, snapshot(model[1]))
    assert rule.layout is None
    tp.register_tie(model[0], "row_repeat", root=model, max_residual=0.3)


@pytest.mark.parametrize("init", ["project", "rescale"])
def test_the_limit_holds_for_every_init_and_for_copies(init):
    with pytest.raises(tp.TieError, match="above the limit of 0.5"):
        tp.register_tie(nn.Linear(64, 64), "row_repeat", init=init, max_residual=0.5)
    with pytest.raises(tp.TieError, match="above the limit of 1"):
        tp.register_tie(nn.Linear(64, 64), "copy", source=nn.Linear(64, 64), max_residual=1)


def test_the_limit_itself_is_not_above_it():
    layer = near_the_law(0.5)
    limit = tp.residual(layer, "row_repeat")
    with pytest.raises(tp.TieError, match="above the limit of"):
        tp.register_tie(layer, "row_repeat", max_residual=math.nextafter(limit, 0))
    tp.register_tie(layer, "row_repeat", max_residual=limit)


def test_a_limit_that_is_given_says_that_what_is_below_is_meant():
    assert said(nn.Linear(64, 64), "row_repeat", max_residual=1) is None
    assert "frees nothing" in said(nn.Linear(64, 1), "row_repeat", max_residual=1)


def test_a_weight_that_is_no_number_or_on_meta_is_refused_under_a_limit():
    no_number = with_weight(nn.Linear(4, 4), torch.tensor(torch.nan))
    with pytest.raises(tp.TieError, match="residual nan is above the limit of 1"):
        tp.register_tie(no_number, "row_repeat", max_residual=1)
    with pytest.raises(tp.TieError, match="has no values yet, so its residual is not known"):
        tp.register_tie(nn.Linear(4, 4, device="meta"), "row_repeat", max_residual=1)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        ("0.5", TypeError, "takes a number, not str"),
        (True, TypeError, "takes a number, not bool"),
        ([0.5], TypeError, "takes a number, not list"),
        (-0.1, tp.TieError, "max_residual=-0.1 is not a limit"),
        (math.nan, tp.TieError, "max_residual=nan is not a limit"),
    ],
)
def test_what_is_no_limit_is_refused(value, error, text):
    layer = nn.Linear(4, 4)
    with pytest.raises(error, match=text):
        tp.register_tie(layer, "row_repeat", max_residual=value)
    with pytest.raises(error, match=text):
        tp.tie_model(nn.Sequential(layer), {"0": "row_repeat"}, max_residual=value)
    assert not tp.is_tied(layer)


def test_a_model_under_a_limit_is_all_or_nothing_or_skips():
    model = nn.Sequential(near_the_law(0.1), nn.Linear(128, 128))
    with pytest.raises(
        tp.TieError, match=r"1 of 2 ties cannot be made.*\n'1\.weight' by .*residual"
    ):
        tp.tie_model(model, {"*": "row_repeat"}, max_residual=0.3)
    assert not tp.is_tied(model)
    report = tp.tie_model(model, {"*": "row_repeat"}, max_residual=0.3, on_unfit="skip")
    assert [row.layer for row in report.ties] == ["0"]
    assert [left.layer for left in report.skipped] == ["1"]
    assert "above the limit of 0.3" in report.skipped[0].reason


def test_data_is_named_in_the_advice_and_not_shown():
    index = torch.arange(4096).view(64, 64) % 5
    with pytest.warns(tp.TieWarning, match=r"residual\(layer, 'index', index=index\)"):
        tp.register_tie(nn.Linear(64, 64), "index", index=index)


def test_a_mask_is_not_told_to_be_another_mask_or_rescaled():
    mask = torch.arange(4096).view(64, 64) % 50 == 0
    with pytest.warns(tp.TieWarning, match="would change nothing") as caught:
        tp.register_tie(nn.Linear(64, 64), "masked", mask=mask)
    assert "pattern=" not in str(caught[0].message)
    with pytest.warns(tp.TieWarning, match="frees nothing") as caught:
        tp.register_tie(nn.Linear(64, 64), "masked", mask=torch.ones(64, 64, dtype=torch.bool))
    assert "pattern=" not in str(caught[0].message)
