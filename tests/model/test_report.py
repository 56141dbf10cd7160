"""report: what is stored, computed and saved, counted a second way; and how tables look."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils import parametrize

import tiedparam as tp
from tests.support.models import ResNet, images, train
from tiedparam.tie.lookup import tie_of

PLAN = {
    "layer1.conv1": "flip_sym",
    "layer*.conv2": ("channel_shared", {"over": "all"}),
    "layer2.conv1": ("copy", {"source": "layer1.conv1"}),
    "head": ("row_repeat", {"tensor_name": "bias"}),
}


def tied_model() -> ResNet:
    model = ResNet()
    tp.tie_model(model, PLAN)
    return model


def test_rows_say_what_is_tied():
    model = ResNet()
    dense = copy.deepcopy(model)
    tp.tie_model(model, PLAN)
    report = tp.report(model)
    assert [f"{row.layer}.{row.tensor_name}" for row in report.ties] == [
        "layer1.conv1.weight", "layer1.conv2.weight", "layer2.conv1.weight",
        "layer2.conv2.weight", "head.bias",
    ]  # fmt: skip
    flip, shared, copied, _, bias = report.ties
    assert (flip.rule, flip.shape, flip.dense_values, flip.free_values) == (
        "flip_sym", (4, 4, 3, 3), 144, 74,
    )  # fmt: skip
    assert flip.multiplicity == (1, 2)
    assert flip.residual == tp.residual(dense.layer1.conv1, "flip_sym")
    assert (shared.multiplicity, shared.compression) == ((16, 16), 16)
    assert (shared.multiply_adds_dense, shared.multiply_adds_tied) == (144, 9)
    assert copied.rule == "copy of layer1.conv1.weight"
    assert (copied.free_values, copied.multiplicity, copied.compression) == (0, None, math.inf)
    # compared with what the source holds now, not with what it held
    assert copied.residual == tp.residual(dense.layer2.conv1, "copy", source=model.layer1.conv1)
    assert (bias.rule, bias.shape, bias.free_values) == ("row_repeat(groups=1)", (5,), 1)
    assert (bias.multiply_adds_dense, bias.multiply_adds_tied) == (0, 0)


def file_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """The bytes of a safetensors file behind its header."""
    written = safetensors.torch.save(tensors)
    return len(written) - 8 - int.from_bytes(written[:8], "little")


@pytest.mark.feature(
    "Whole models", "`report`: values, bytes of checkpoint and optimizer, multiply-adds"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_totals_are_what_files_and_optimizers_hold(dtype):
    model = ResNet()
    model.register_buffer("scratch", torch.zeros(1000), persistent=False)
    dense = copy.deepcopy(model).to(dtype)
    tp.tie_model(model.to(dtype), PLAN)
    optimizers = [torch.optim.Adam(m.parameters()) for m in (dense, model)]
    for each, optimizer in zip((dense, model), optimizers, strict=True):
        for parameter in each.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    totals = tp.report(model, optimizer=optimizers[1]).totals
    assert totals.values_dense == sum(p.numel() for p in dense.parameters())
    assert totals.values_stored == sum(p.numel() for p in model.parameters())
    assert totals.checkpoint_dense == file_bytes(dense.state_dict())
    assert totals.checkpoint_stored == file_bytes(model.state_dict())

    def moments(optimizer: torch.optim.Optimizer) -> int:
        return sum(
            state[key].numel() * state[key].element_size()
            for state in optimizer.state.values()
            for key in ("exp_avg", "exp_avg_sq")
        )

    assert totals.optimizer_dense == moments(optimizers[0])
    assert totals.optimizer_stored == moments(optimizers[1])
    steps = 4 * len(list(model.parameters()))  # and a counter for each
    assert totals.optimizer_held == totals.optimizer_stored + steps
    assert tp.report(model).totals.optimizer_held is None


def test_frozen_and_shared_parameters_count_as_they_should():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(4, 4), "d": nn.Linear(4, 4)})
    model["d"].weight = model["c"].weight
    shared.weight.requires_grad_(False)
    dense = tp.report(model)
    assert str(dense).startswith("Nothing is tied.\nValues of the model: 44 of 44 dense (100.0%).")
    tp.tie_model(model, {"a": "flip_sym"})
    report = tp.report(model)
    assert len(report.ties) == 1
    assert not report.ties[0].trained
    assert report.totals.values_dense == dense.totals.values_stored == 44
    assert report.totals.values_stored == 44 - 6
    assert report.totals.optimizer_dense == report.totals.optimizer_stored == 2 * 4 * (44 - 16)


def test_lazy_layers_count_nothing_until_they_have_a_size():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3), nn.LazyBatchNorm1d())
    assert tp.tie_model(model, {"0": "flip_sym"}).totals.values_stored == 10 + 4
    model(torch.randn(2, 4))
    assert tp.report(model).totals.values_stored == 10 + 4 + 4 * 3 + 3 + 2 * 3


def test_multiply_adds_are_those_of_the_form_in_which_the_layer_trains():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv1d(8, 32, 3, groups=8))
    tp.register_tie(model[0], "channel_shared")
    tp.register_tie(model[1], "channel_shared", over="groups")
    summed, streams = tp.report(model).ties
    assert (summed.multiply_adds_dense, summed.multiply_adds_tied) == (16 * 16 * 9, 16 * 9)
    assert (streams.multiply_adds_dense, streams.multiply_adds_tied) == (32 * 3, 32 * 3)


def test_multiply_adds_of_an_example():
    report = tp.report(tied_model(), example=images())
    assert {row.positions for row in report.ties} == {72, 2}
    # flip_sym and the copy of it save none
    assert report.totals.multiply_adds_dense == 72 * 4 * 144
    assert report.totals.multiply_adds_tied == 72 * (144 + 144 + 9 + 9)
    assert "Multiply-adds of these, forward: 22,032 of 41,472 dense (53.1%)." in str(report)
    assert "Multiply-adds" not in str(tp.report(tied_model()))


def test_gains_are_predicted_until_they_are_measured():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    plan = {"0": "row_repeat", "1": "persymmetric"}
    dry = tp.tie_model(model, plan, dry_run=True, init="rescale").ties
    tp.tie_model(model, plan, init="rescale")
    predicted, dense = tp.report(model).ties
    assert [(row.gain_inference, row.gain_training) for row in dry] == [
        (row.gain_inference, row.gain_training) for row in (predicted, dense)
    ]
    assert predicted.gain_inference > 1 > dense.gain_inference
    assert predicted.gain_training > 1 > dense.gain_training
    assert not any(row.inference_measured or row.training_measured for row in (predicted, dense))

    (tuned,) = (row for row in tp.tune(model, torch.randn(4, 256)).tuned if row.times)
    keys = list(model.state_dict())
    for held in (model, copy.deepcopy(model)):
        measured = tp.report(held).ties[0]
        assert measured.gain_inference == tuned.gain
        assert measured.gain_training == predicted.gain_training
        assert (measured.inference_measured, measured.training_measured) == (True, False)
    assert tp.report(model).rows()[0]["inference_measured"]
    assert list(model.state_dict()) == keys
    assert tp.report(pickle.loads(pickle.dumps(model))).ties == (predicted, dense)
    (tuned,) = (
        row for row in tp.tune(model, torch.randn(4, 256), training=True).tuned if row.times
    )
    measured = tp.report(model).ties[0]
    assert (measured.gain_training, measured.training_measured) == (tuned.gain, True)
    tp.untie_model(model)
    tp.tie_model(model, plan, init="rescale")
    assert tp.report(model).ties[0].gain_inference == predicted.gain_inference


def test_a_source_outside_and_rules_that_torch_registered():
    outside = nn.Linear(3, 3)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tp.register_tie(model[0], "copy", source=outside)
    parametrize.register_parametrization(
        model[1], "weight", tp.available_rules()["flip_sym"](), unsafe=True
    )
    copied, plain_rule = tp.report(model).ties
    assert copied.rule == "copy of a layer outside of the model"
    assert copied.trained
    assert plain_rule.residual is None
    assert str(tp.report(model)).count("–") > 1


def test_the_residual_at_tying_is_remembered():
    model = tied_model()
    before = [row.residual for row in tp.report(model).ties]
    assert all(residual > 0 for residual in before)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    file = io.BytesIO()
    torch.save(model.layer1.conv1, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert tie_of(again).residual_at_tying == before[0]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [row.residual for row in tp.report(copied).ties] == before
    assert not any("residual" in key for key in model.state_dict())
    tp.untie_model(model)
    tp.tie_model(model, PLAN)
    assert [row.residual for row in tp.report(model).ties] == [0] * 5


@pytest.mark.parametrize("init", ["project", "rescale"])
def test_the_residual_is_that_of_the_nearest_weight_whatever_init(init):
    layer = nn.Linear(5, 5)
    expected = tp.residual(layer, "flip_sym")
    tp.register_tie(layer, "flip_sym", init=init)
    assert tie_of(layer).residual_at_tying == expected
    lawful = nn.Linear(5, 5)
    with torch.no_grad():
        lawful.weight.copy_(layer.weight)
    tp.register_tie(lawful, "flip_sym", init="exact")
    assert tie_of(lawful).residual_at_tying == 0
    on_meta = tp.register_tie(nn.Linear(5, 5, device="meta"), "flip_sym")
    assert tie_of(on_meta).residual_at_tying is None
    assert tp.report(on_meta).ties[0].residual is None


def test_arguments_of_a_wrong_type():
    with pytest.raises(TypeError, match="report takes an nn.Module"):
        tp.report({})
    with pytest.raises(TypeError, match="optimizer= takes torch optimizers"):
        tp.report(nn.Linear(2, 2), optimizer=3)


# Forms -----------------------------------------------------------------------------------------


def test_text_is_aligned_and_complete():
    lines = str(tp.report(tied_model())).splitlines()
    assert lines[0].split()[:4] == ["tensor", "rule", "shape", "dense"]
    assert lines[2].split()[:3] == ["layer1.conv1.weight", "flip_sym", "4×4×3×3"]
    ends = [line.index("flip_sym") for line in lines if "flip_sym" in line]
    starts = lines[0].index("rule")
    assert ends[0] == starts
    right_edge = lines[0].index("dense") + len("dense")
    assert {line[right_edge - 3 : right_edge].strip() for line in lines[2:6]} == {"144"}
    assert lines[7] == ""
    assert lines[8] == "Values of the model: 249 of 737 dense (33.8%)."


def test_json_and_rows_hold_everything():
    report = tp.report(tied_model(), example=images())
    data = json.loads(report.to_json())
    assert data["kind"] == "report"
    assert data["totals"] == vars(report.totals)
    assert data["notes"] == report.notes()
    assert [row["compression"] for row in data["rows"]] == [144 / 74, 16.0, None, 16.0, 5.0]
    for row, tie in zip(report.rows(), report.ties, strict=True):
        for key, value in vars(tie).items():
            assert row[key] == value
    skipped = tp.tie_model(ResNet(), {"stem": "flip_sym", "head": "row_repeat"}, on_unfit="skip")
    data = json.loads(skipped.to_json())
    assert (data["kind"], data["dry_run"]) == ("tie", False)
    assert data["skipped"][0]["layer"] == "stem"


@pytest.mark.parametrize("rule", ["copy", "squared_copy"])
@pytest.mark.parametrize("ask", [tp.report, lambda model: tp.draw_orbits(model[1])])
def test_nothing_is_said_of_a_copy_whose_source_was_exchanged(rule, ask):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tp.register_tie(model[1], rule, source="0", root=model)
    ask(model)
    model[0] = nn.Linear(4, 4)
    with pytest.raises(tp.TieError, match="the source '0' .* was exchanged"):
        ask(model)


def test_masks_and_fixed_numbers_count_as_stored_and_not_as_dense():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    dense = sum(value.nbytes for value in model.state_dict().values())
    mask = torch.eye(16).bool()
    tp.register_tie(model[0], "masked", mask=mask)
    tp.register_tie(model[1], "fixed", mask=mask)
    totals = tp.report(model).totals
    assert totals.checkpoint_dense == dense
    assert totals.checkpoint_stored == sum(v.nbytes for v in model.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_form_that_is_named_in_vain_is_said(dtype):
    model = nn.Sequential(
        tp.register_tie(nn.Linear(8, 8), "circulant", compute="fft", init="rescale"),
        tp.register_tie(nn.Linear(8, 8), "row_repeat", compute="reduced", init="rescale"),
        tp.register_tie(nn.Linear(8, 8), "circulant", init="rescale"),
    ).to(dtype)
    found = tp.report(model)
    in_vain = "fft" if dtype is torch.bfloat16 else None
    assert [row.form_in_vain for row in found.ties] == [in_vain, None, None]
    said = "'0.weight' computes densely: compute='fft' serves float32 and float64 alone."
    assert (said in found.notes()) == (in_vain is not None)
