"""scan: every tensor and rule, beside what a random weight would give; found on purpose."""

from __future__ import annotations

import copy
import html
import json
import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tiedparam as tp
from tests.support.counting import most_allocated
from tests.support.models import ResNet, encoder, images, noisy, plant
from tests.support.unchanged import everything
from tiedparam.laws import Linked, Making, form
from tiedparam.model import cost, near_copies, scan_report
from tiedparam.rules import Circulant


def by_name(report: tp.ScanReport) -> dict[tuple[str, str], object]:
    named = {(f"{c.layer}.{c.tensor_name}", c.rule): c for c in report.candidates}
    assert len(named) == len(report.candidates)
    return named


def test_every_tensor_and_rule_that_fits_is_there():
    model = ResNet()
    before = everything(model)
    report = tp.scan(model, pairs=0)
    assert everything(model) == before
    found = by_name(report)
    expected = set()
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            for rule, kind in tp.available_rules().items():
                if kind.reads_layers:
                    continue
                layout = tp.Layout.of(module, name, tuple(parameter.shape))
                for options in kind.variants(layout):
                    try:
                        residual = tp.residual(module, rule, name, **options)
                    except tp.TieError:
                        continue
                    made = kind(**options)
                    assert made.bind(layout, parameter.dtype) is None
                    if made.free_count == parameter.numel():
                        continue
                    expected.add((f"{path}.{name}", str(made)))
                    row = found[f"{path}.{name}", str(made)]
                    assert row.residual == residual
                    assert row.shape == tuple(parameter.shape)
                    assert row.dense_values == parameter.numel()
                    assert row.free_values == made.free_count
                    assert row.compression == parameter.numel() / made.free_count
                    counts = torch.cat([count.flatten() for count in made.multiplicities()])
                    assert row.multiplicity == (counts.min().item(), counts.max().item())
                    if row.constant:  # as norms begin
                        assert row.relative is row.z_score is row.p_value is None
                        continue
                    values = parameter.detach().double()
                    spread = float((values - values.mean()).norm() / values.norm()) ** 2
                    degrees = parameter.numel() - 1
                    # what a law with signs or zeros takes from equal entries
                    equal = made.residual(torch.ones_like(values)) ** 2
                    random = spread * (degrees + 1 - made.free_count - equal) / degrees
                    expected_square = random + (1 - spread) * equal
                    assert row.expected == pytest.approx(math.sqrt(expected_square), rel=1e-5)
    assert set(found) == expected
    assert len(expected) > 30
    assert {c.layer for c in report.candidates} == {
        "stem", "head", *(f"layer{i}.{n}" for i in (1, 2) for n in ("conv1", "conv2", "norm1")),
    }  # fmt: skip


def test_every_variant_of_every_rule_can_be_made():
    layouts = [
        tp.Layout((4,)),
        tp.Layout((4, 4)),
        tp.Layout((4, 2, 3, 3), 2),
        tp.Layout((4, 2, 3), 2, True),
    ]
    # what they say cannot be guessed, or is said by another name
    of_users = {"fixed", "index", "joint", "orbit", "within", "block_circulant", "head_share"}
    of_users |= {"bank", "cluster", "hashed", "symmetric", "skew", "scaled_copy", "shared_delta"}
    for name, kind in tp.available_rules().items():
        for layout in layouts:
            variants = kind.variants(layout)
            axes = {"masked": 2, "transposed_copy": 3}.get(name, 1)
            assert (len(variants) >= 1) != (name in of_users or len(layout.shape) < axes)
            for options in variants:
                assert "source" not in options
                source = {"source": nn.Linear(2, 2)} if issubclass(kind, Linked) else {}
                kind(**options, **source)
    assert {"over": "groups"} in tp.available_rules()["channel_shared"].variants(layouts[2])
    assert {"over": "groups"} not in tp.available_rules()["channel_shared"].variants(layouts[1])
    assert {"groups": 2} in tp.available_rules()["row_repeat"].variants(layouts[2])


def test_chosen_rules_and_options():
    model = ResNet()
    report = tp.scan(model, ["flip_sym", ("row_repeat", {"groups": 2})])
    both = {"flip_sym", "flip_sym(sign=-1)"}  # all variants of a name, and the chosen options
    assert {c.rule for c in report.candidates} == both | {"row_repeat(groups=2)"}
    with pytest.raises(tp.TieError, match="there is no rule 'flip'"):
        tp.scan(model, ["flip"])
    with pytest.raises(TypeError, match="rules= takes a list"):
        tp.scan(model, "flip_sym")
    with pytest.raises(TypeError, match="row_repeat"):
        tp.scan(model, [("row_repeat", {"over": "in"})])
    with pytest.raises(TypeError, match="scan takes an nn.Module"):
        tp.scan(model.state_dict())
    with pytest.raises(TypeError, match="pairs= takes"):
        tp.scan(model, pairs=-1)


# What a random weight would give ---------------------------------------------------------------

SHAPES = [
    (lambda: nn.Conv2d(4, 4, 3), "flip_sym", {}),
    (lambda: nn.Linear(6, 6), "flip_sym", {}),
    (lambda: nn.Conv2d(6, 4, 3, groups=2), "channel_shared", {"over": "groups"}),
    (lambda: nn.Linear(5, 4), "row_repeat", {}),
]


@pytest.mark.parametrize("mean", [0.0, 0.3, -20.0])
@pytest.mark.parametrize(("build", "rule", "options"), SHAPES)
def test_expected_residual_and_z_score_by_monte_carlo(build, rule, options, mean):
    draws, layer = 400, build()
    ratios, scores, likely = [], [], []
    for _ in range(draws):
        with torch.no_grad():
            layer.weight.normal_(mean, std=0.3)
        (row,) = (
            c for c in tp.scan(layer, [(rule, options)]).candidates if c.tensor_name == "weight"
        )
        ratios.append(row.relative**2)
        scores.append(row.z_score)
        likely.append(row.p_value)
    ratios, scores, likely = (torch.tensor(values) for values in (ratios, scores, likely))
    spread = ratios.std().item() / math.sqrt(draws)
    assert ratios.mean().item() == pytest.approx(1, abs=4 * spread)
    # the z score is what its name says: mean 0, deviation 1
    assert abs(scores.mean().item()) < 4 / math.sqrt(draws)
    assert scores.std().item() == pytest.approx(1, abs=0.15)
    for level in (0.5, 0.1, 0.01):  # and so is the p-value, which is a bound
        assert (likely <= level).double().mean().item() <= level + 4 * math.sqrt(level / draws)


@pytest.mark.parametrize("rule", ["copy", "squared_copy"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_expected_residual_of_copies_by_monte_carlo(rule, scale):
    draws, model = 300, nn.ModuleDict({"a": nn.Linear(8, 9), "b": nn.Linear(8, 9)})
    ratios, scores = [], []
    for _ in range(draws):
        with torch.no_grad():
            model["a"].weight.normal_(std=scale)
            model["b"].weight.normal_()
        row = by_name(tp.scan(model, [rule]))["b.weight", f"{rule} of a.weight"]
        ratios.append(row.residual**2 / row.expected**2)
        scores.append(row.z_score)
        if rule == "copy" and scale == 1:
            assert row.expected == pytest.approx(math.sqrt(2), rel=0.2)
    ratios, scores = torch.tensor(ratios), torch.tensor(scores)
    assert ratios.mean().item() == pytest.approx(1, abs=4 * ratios.std().item() / math.sqrt(draws))
    assert abs(scores.mean().item()) < 4 / math.sqrt(draws)
    # the squares are not normal, which widens their cosine with a weight
    assert scores.std().item() == pytest.approx(1, abs=0.2)


def test_copies_of_equal_scale_are_expected_at_the_root_of_two():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        for layer in model:
            layer.weight -= layer.weight.mean()
        model[1].weight.mul_(model[0].weight.norm() / model[1].weight.norm())
    found = by_name(tp.scan(model, ["copy"]))
    assert found["1.weight", "copy of 0.weight"].expected == pytest.approx(math.sqrt(2))
    assert found["1.weight", "copy(fn='t') of 0.weight"].expected == pytest.approx(math.sqrt(2))


def test_nothing_is_found_in_a_fresh_model():
    for seed in range(5):
        torch.manual_seed(seed)
        assert tp.scan(ResNet()).found() == []
        encoder = nn.TransformerEncoderLayer(16, 2, 32)
        assert tp.scan(encoder).found() == []


# What was put in is found ----------------------------------------------------------------------


@pytest.mark.feature("Whole models", "`scan`: near-symmetries beside what a random weight gives")
def test_planted_near_symmetries_stand_out_and_can_be_tied():
    model = encoder()
    planted = set(plant(model))
    report = tp.scan(model)
    found = {(c.layer, c.rule) for c in report.found()}
    # what else is near follows from what was planted
    implied = {
        ("layers.2.linear2", "copy(fn='t') of layers.2.linear1.weight"),
    }
    assert planted <= found
    # nothing else: that squares are positive, and so have a mean, is no law
    assert found == planted | implied
    first = report.ranked()[: len(planted | implied)]
    assert {(c.layer, c.rule) for c in first} == planted | implied
    assert all(c.relative < 0.1 for c in first)
    made = tp.tie_model(model, report.plan())
    assert len(made.ties) == 5
    assert max(row.residual for row in made.ties) < 0.1
    assert tp.scan(model).found() == []


def test_a_scan_finds_the_symmetry_that_training_made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12, bias=False))
    target = torch.randn(12, 12)
    target = target + target.t()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    assert tp.scan(model).found() == []
    for _ in range(300):
        x = torch.randn(64, 12)
        optimizer.zero_grad()
        (model(x) - x @ target).square().mean().backward()
        optimizer.step()
    (row,) = tp.scan(model).found()
    assert row.rule == "flip_sym"
    assert row.relative < 0.05


def test_zero_and_constant_tensors_are_lawful_and_found_nowhere():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight.fill_(0.1)
    report = tp.scan(model)
    rows = [c for c in report.candidates if c.layer in "012" and c.tensor_name == "weight"]
    assert len(rows) > 8
    assert all(c.residual == 0 for c in rows if c.layer == "0")
    # with zeros or minus signs a constant is not lawful
    breaking = ("masked", "hypercomplex", "flip_sym(sign=-1)")
    broken = [c for c in rows if c.rule.startswith(breaking) and c.layer == "1"]
    assert len(broken) == 6
    assert all((c.residual < 1e-6) != (c in broken) for c in rows)
    assert all(c.constant and c.relative is None and c.z_score is None for c in rows)
    assert report.found() == []
    assert not any("copy" in c.rule for c in rows)


def test_values_that_are_not_finite_are_ranked_last():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight[1, 2] = math.nan
    report = tp.scan(model)
    assert math.isnan(report.ranked()[-1].residual)
    assert not math.isnan(report.ranked()[0].residual)
    assert report.found() == []
    json.loads(report.to_json())


# Pairs -----------------------------------------------------------------------------------------


def test_the_bound_on_pairs_is_kept_and_said():
    model = nn.Sequential(*(nn.Linear(40, 40, bias=False) for _ in range(12)))
    with torch.no_grad():
        model[11].weight.copy_(noisy(model[2].weight))  # far apart
        model[7].weight.copy_(noisy(model[4].weight.t()))
    report = tp.scan(model, ["copy"], pairs=1)
    assert report.pairs == scan_report.Pairs(fitting=2 * 66, compared=2 * 11, per_tensor=1)
    assert {c.rule for c in report.found()} == {"copy of 2.weight", "copy(fn='t') of 4.weight"}
    assert "22 of 132 fitting pairs were compared in full, the 1 nearest of" in str(report)
    assert tp.scan(model, ["copy"], pairs=0).candidates == ()
    every = tp.scan(model, ["copy"], pairs=99)
    assert every.notes() == ["Copies: every fitting pair of tensors was compared (132)."]
    assert every.pairs.fitting == every.pairs.compared == len(every.candidates) == 132
    squares = tp.scan(model, ["squared_copy"], pairs=99)
    assert squares.pairs.fitting == 132  # in both directions: it is not its own inverse


def test_pairs_differ_in_nothing_but_their_values():
    model = nn.ModuleDict(
        {
            "a": nn.Linear(8, 8), "b": nn.Linear(8, 8, dtype=torch.float64),
            "c": nn.Linear(8, 9), "d": nn.Embedding(8, 8),
        }
    )  # fmt: skip
    with torch.no_grad():
        model["d"].weight.copy_(model["a"].weight)
    report = tp.scan(model, ["copy"])
    assert {(c.layer, c.rule) for c in report.candidates} == {
        ("d", "copy of a.weight"), ("d", "copy(fn='t') of a.weight"),
    }  # fmt: skip
    assert report.plan().entries[0].options == {"source": "a"}


def test_a_source_of_another_name_is_planned_with_its_name():
    model = nn.ModuleDict({"a": nn.Linear(4, 12), "b": nn.MultiheadAttention(4, 2)})
    with torch.no_grad():
        model["b"].in_proj_weight.copy_(model["a"].weight)
    report = tp.scan(model)
    (entry,) = report.plan().entries
    assert entry.options == {"source": "a", "source_name": "weight"}
    tp.tie_model(model, report.plan())
    assert tp.is_tied(model["b"], "in_proj_weight")


# What is not looked at -------------------------------------------------------------------------


def test_s22_shared_parameters_are_left_out():
    """No rule can be put on one of the layers, so that no plan may propose it."""
    model = nn.ModuleDict({"embed": nn.Embedding(7, 3), "head": nn.Linear(3, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    report = tp.scan(model)
    assert report.candidates == ()
    reason = (
        "it shares its Parameter with '{}', and a rule would take it away. Give one of them a "
        "Parameter of its own, and tie it to the other by 'copy'."
    )
    assert [(left.layer, left.reason) for left in report.not_looked_at] == [
        ("embed", reason.format("head.weight")),
        ("head", reason.format("embed.weight")),
    ]
    model["embed"].padding_idx = 0
    padded = " No other law can go on 'embed.weight', because of its padding_idx."
    assert [left.reason for left in tp.scan(model).not_looked_at] == [
        reason.format("head.weight") + padded,
        reason.format("embed.weight") + padded,
    ]
    # the way that the note names
    model["head"].weight = nn.Parameter(model["head"].weight.detach().clone())
    tp.tie_model(model, {"head": ("copy", {"source": "embed"})})
    assert torch.equal(model["head"].weight, model["embed"].weight)


def test_what_is_left_out_is_listed_with_its_reason():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
            self.empty = nn.Parameter(torch.ones(0, 2))
            self.sparse = nn.Parameter(torch.eye(3).to_sparse())
            self.hooked = nn.Parameter(torch.randn(3, 3))
            self.hooked.register_hook(lambda grad: grad)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.ModuleDict(
            {
                "odd": Odd(),
                "lazy": nn.LazyLinear(3),
                "normed": nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
                "tied": tp.register_tie(nn.Linear(3, 3), "flip_sym"),
                "quantized": torch.ao.nn.quantized.Linear(3, 3),
                "fine": nn.Linear(3, 3),
            }
        )
    report = tp.scan(model)
    reasons = {(left.layer, left.tensor_name): left.reason for left in report.not_looked_at}
    for key, reason in {
        ("odd", "whole"): "torch.int8",
        ("odd", "empty"): "empty",
        ("odd", "sparse"): "only dense, unquantized tensors",
        ("odd", "hooked"): "gradient hooks",
        ("lazy", "weight"): "lazy",
        ("lazy", "bias"): "lazy",
        ("normed", "weight"): "another parametrization",
        ("tied", "weight"): "tied by 'flip_sym' already",
        ("quantized", "weight"): "quantized",
    }.items():
        assert reason in reasons.pop(key)
    assert not reasons
    looked = {(c.layer, c.tensor_name) for c in report.candidates}
    assert looked == {("normed", "bias"), ("tied", "bias"), ("fine", "weight"), ("fine", "bias")}
    assert "Not looked at: lazy.weight, lazy.bias: the layer is lazy" in str(report)


def test_rules_that_an_embedding_refuses_have_no_row():
    model = nn.ModuleDict({"a": nn.Embedding(8, 8), "b": nn.Embedding(8, 8, padding_idx=0)})
    report = tp.scan(model)
    assert {c.rule for c in report.candidates if c.layer == "a"} >= {"flip_sym"}
    # a copy may have a padding row, if its source has
    assert {c.rule_class.name for c in report.candidates if c.layer == "b"} == {
        "copy",
        "squared_copy",
    }
    (left,) = report.not_looked_at
    assert left.layer == "b"
    assert left.reason.startswith("padding_idx keeps one row at zero")


def test_a_model_without_values_is_refused():
    with pytest.raises(tp.TieError, match="'0.weight' is on the meta device. Load the model first"):
        tp.scan(nn.Sequential(nn.Linear(3, 3, device="meta")))
    report = tp.scan(nn.ReLU())
    assert report.candidates == ()
    assert str(report) == "No tensor of the model can carry one of the rules."


# What it costs ---------------------------------------------------------------------------------

LAYERS = [
    (lambda: nn.Linear(6, 8), (5, 6), 5),
    (lambda: nn.Conv2d(4, 8, 3, padding=1), (2, 4, 6, 6), 72),
    (lambda: nn.Conv1d(8, 8, 3, groups=2), (2, 8, 9), 14),
    (lambda: nn.Conv2d(4, 4, 3, stride=2), (1, 4, 7, 7), 9),
    (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 5, 5), 50),
    (lambda: nn.Conv2d(2, 6, 3, groups=2), (1, 2, 5, 5), 9),
]


@pytest.mark.parametrize(("build", "shape", "positions"), LAYERS)
def test_multiply_adds_are_those_that_torch_counts(build, shape, positions):
    layer = build()
    x = torch.randn(shape)
    report = tp.scan(layer, example=x)
    rows = [
        c for c in report.candidates if c.tensor_name == "weight" and c.rule_class.name != "copy"
    ]
    assert len(rows) >= 4
    cheaper = 0
    for row in rows:
        tied = tp.register_tie(build(), row.rule_class, **row.options)
        assert row.positions == positions
        for module, count in ((build(), row.multiply_adds_dense), (tied, row.multiply_adds_tied)):
            with MultiplyAdds() as counted:
                module(x)
            assert counted.total == count * positions, row.rule
        cheaper += row.multiply_adds_tied < row.multiply_adds_dense
    assert cheaper or layer.weight.shape[1] == 1 or getattr(layer, "groups", 1) > 1


class MultiplyAdds(FlopCounterMode):
    """torch's counter, which knows no matrix-vector product."""

    def __init__(self) -> None:
        def mv(matrix_shape, vector_shape, *args, out_shape=None, **kwargs):
            return 2 * matrix_shape[0] * matrix_shape[1]

        super().__init__(display=False, custom_mapping={torch.ops.aten.mv: mv})

    @property
    def total(self) -> float:
        return self.get_total_flops() / 2


def test_attention_embeddings_and_unknown_layers():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

    model = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(4, 2), "table": nn.Embedding(5, 4), "own": Own(),
         "cell": nn.GRUCell(3, 4)}
    )  # fmt: skip
    costs = {
        (c.layer, c.tensor_name): (c.multiply_adds_dense, c.multiply_adds_tied)
        for c in tp.scan(model, ["row_repeat"]).candidates
    }
    assert costs["attention", "in_proj_weight"] == (48, 48)
    assert costs["attention.out_proj", "weight"] == (16, 16)  # read as an attribute
    assert (
        costs["attention.out_proj", "bias"] == (0, 0)
        if ("attention.out_proj", "bias") in costs
        else True
    )
    assert costs["table", "weight"] == (0, 0)
    assert costs["own", "weight"] == (None, None)
    assert costs["cell", "weight_ih"] == (36, 36)


def test_counting_work_leaves_the_model_as_it_was():
    model = ResNet()
    model.layer1.eval()
    before = everything(model)
    counts = cost.work(model, images())
    assert everything(model) == before
    assert {counts[model.stem].positions, counts[model.layer2.conv2].positions} == {72}
    assert counts[model.head] == cost.Work(positions=2, rows=2)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(x) + self.layer(y)

    twice = Twice()
    inputs = torch.randn(5, 3), torch.randn(1, 3)
    assert cost.work(twice, inputs) == {twice.layer: cost.Work(positions=6, rows=3)}
    with pytest.raises(RuntimeError):
        cost.work(twice, (torch.randn(5, 2), torch.randn(1, 3)))
    assert not twice.layer._forward_hooks
    assert twice.training


def test_rows_are_what_a_form_multiplies():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2), nn.ConvTranspose2d(4, 4, 3, stride=2))
    strided, transposed = cost.work(model, torch.randn(2, 4, 7, 7)).values()
    assert strided == cost.Work(positions=2 * 3 * 3, rows=2 * 7 * 7)
    assert transposed == cost.Work(positions=2 * 3 * 3, rows=2 * 3 * 3)


# Gains -----------------------------------------------------------------------------------------


def priced(cost, where="eager"):
    """A law with one form more, which costs so much."""

    class Priced(Circulant):
        @form("by_price", cost=cost, where=where)
        def by_price(self, call):
            return None

    return Priced


def gains_of(model, law, **options):
    return {
        f"{row.layer}.{row.tensor_name}".lstrip("."): (row.gain_inference, row.gain_training)
        for row in tp.scan(model, [law], **options).candidates
    }


def over_dense(layer, law):
    """How many times as fast as in the dense form the layer is said to compute under the law."""
    dense = law()
    dense.compute = "dense"
    rows = [tp.report(tp.register_tie(copy.deepcopy(layer), made)).ties[0] for made in (law, dense)]
    return tuple(
        getattr(rows[0], mode) / getattr(rows[1], mode)
        for mode in ("gain_inference", "gain_training")
    )


def test_gains_are_what_the_cheapest_form_costs():
    law = priced(lambda rule, use: 0.25 if use.training else 0.125)
    assert over_dense(nn.Linear(8, 8), law) == pytest.approx((8, 4))
    hardly = priced(lambda rule, use: 0.96)
    assert over_dense(nn.Linear(8, 8), hardly) == (1, 1)
    unknown = priced(lambda rule, use: None if use.training else 0.5)
    assert over_dense(nn.Linear(8, 8), unknown) == pytest.approx((2, 1))
    report = tp.scan(nn.Linear(8, 8), [law])
    (row,) = report.candidates
    tied = tp.report(tp.register_tie(nn.Linear(8, 8), law)).ties[0]
    assert (row.gain_inference, row.gain_training) == (tied.gain_inference, tied.gain_training)
    head, _, line = str(report).splitlines()[2:5]
    assert head.endswith(" × dense")
    assert line.endswith(f" {row.gain_inference:.2g} / {row.gain_training:.2g}")
    assert report.rows()[0]["gain_training"] == row.gain_training


def test_a_layer_that_makes_its_weight_is_slower_than_one_that_has_it():
    for rows in (1, 64):
        found = gains_of(nn.Linear(1024, 1024), "persymmetric", example=torch.randn(rows, 1024))
        assert all(gain < 0.9 for gain in found["weight"])
    # in a large batch that does not matter any more, nor where nothing is made
    (gain,) = gains_of(nn.Linear(256, 256, bias=False), "persymmetric",
                       example=torch.empty(1 << 13, 256)).values()  # fmt: skip
    assert gain == pytest.approx((1, 1), rel=1e-2)
    conv = gains_of(nn.Conv2d(64, 64, 3), "flip_sym", example=torch.empty(1, 64, 128, 128))
    assert conv["weight"] == pytest.approx((1, 1), rel=1e-2)


class Costly(tp.rules.Persymmetric):
    making = Making(entries=80.0, trained=240.0, small=(700.0, 900.0))


def test_a_law_says_how_long_it_takes_to_make_its_weight():
    for size in (8, 256):
        usual, costly = (gains_of(nn.Linear(size, size), law)["weight"]
                         for law in ("persymmetric", Costly))  # fmt: skip
        assert costly < tuple(gain / 5 for gain in usual)
    block = {"rows": [0, 64], "columns": [0, 64]}
    part, cheap = (gains_of(nn.Linear(256, 256), (law, block))["weight"]
                   for law in (Costly, "persymmetric"))  # fmt: skip
    assert costly < part < cheap


def test_gains_are_those_of_the_example():
    asked = []

    def cost(rule, use):
        asked.append(use.rows)
        return 1.0 if use.rows is None else 1 / use.rows

    usual = gains_of(nn.Linear(8, 8), priced(cost))["weight"]
    assert set(asked) == {None}
    example = torch.randn(3, 5, 8)
    dense = gains_of(nn.Linear(8, 8), "circulant", example=example)["weight"]
    found = gains_of(nn.Linear(8, 8), priced(cost), example=example)["weight"]
    assert found == pytest.approx(tuple(15 * gain for gain in dense))
    assert usual == gains_of(nn.Linear(8, 8), "circulant")["weight"]


def test_gains_of_the_forms_that_serve():
    half = priced(lambda rule, use: 0.5)
    assert over_dense(nn.Linear(8, 8), half) == pytest.approx((2, 2))
    assert over_dense(nn.Linear(8, 8).bfloat16(), half) == (1, 1)
    anywhere = priced(lambda rule, use: 0.5, where="anywhere")
    assert over_dense(nn.Linear(8, 8).bfloat16(), anywhere) == pytest.approx((2, 2))
    assert over_dense(nn.Linear(8, 8, device="meta"), half) == pytest.approx((2, 2))
    gains = {}
    for compute in ("dense", "by_price"):
        slow = priced(lambda rule, use: 2.0)()
        slow.compute = compute
        gains[compute] = tp.report(tp.register_tie(nn.Linear(8, 8), slow)).ties[0].gain_training
    assert gains["by_price"] == pytest.approx(gains["dense"] / 2)


def test_gains_are_not_said_where_nothing_is_known():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

    model = nn.ModuleDict(
        {"attention": nn.MultiheadAttention(8, 2), "table": nn.Embedding(8, 8), "own": Own(),
         "cell": nn.GRUCell(8, 8), "linear": nn.Linear(512, 512)}
    )  # fmt: skip
    gains = gains_of(model, "row_repeat")
    assert {"own.weight", "linear.bias", "cell.weight_hh", "table.weight"} <= set(gains)
    for name, gain in gains.items():
        if name == "linear.weight":
            assert gain > (1, 1)
        elif name in ("table.weight", "attention.out_proj.weight"):
            assert all(0 < each < 1 for each in gain), name
        else:
            assert gain == (None, None), name
    assert " –" in str(tp.scan(model["own"], ["row_repeat"])).splitlines()[4][-3:]


def test_gains_of_copies_and_of_what_is_frozen():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    view, made = (gains_of(model, law)["1.weight"] for law in ("copy", "squared_copy"))
    assert (1, 1) > view > made
    layer = tp.register_tie(nn.Linear(256, 256), "persymmetric").eval()
    free = tp.report(layer).ties[0].gain_inference
    with tp.frozen(layer):
        kept = tp.report(layer).ties[0].gain_inference
    assert free < 0.7 < kept < 1


# Far below any noise: 1,024 times as many multiplications, and not a thousand times the speed
def test_gains_are_no_counts_of_multiplications():
    inference, training = gains_of(nn.Linear(1024, 1024), "row_repeat")["weight"]
    assert 10 < training <= inference < 100


# Size ------------------------------------------------------------------------------------------


def test_no_dense_copies_are_held_beyond_one_layer():
    def peak(layers: int) -> int:
        model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(layers)))
        return most_allocated(lambda: tp.scan(model))

    one_layer = 256 * 256 * 4
    first, few, many = peak(4), peak(4), peak(24)
    assert few > one_layer  # it is measured at all
    # 20 layers more add the samples that copies are looked for by, and no more copies of layers
    assert many - few < one_layer + 20 * 6 * near_copies.SAMPLED * 8
    assert few < 12 * one_layer  # what one law on one layer needs on the way
    # and at first the tables of the shape, of which a bounded number is kept
    assert first < 21 * one_layer


# Forms -----------------------------------------------------------------------------------------


def test_the_report_is_text_markdown_html_json_and_rows():
    model = encoder()
    plant(model)
    report = tp.scan(model, example=torch.randn(1, 3, 16))
    headline, empty, *text = str(report).splitlines()
    assert (headline, empty) == (report.headline(), "")
    assert text[0].split() == [
        "tensor", "rule", "shape", "dense", "free", "ratio", "mult.", "residual", "random",
        "relative", "mult-adds", "tied", "×", "dense",
    ]  # fmt: skip
    hidden = len(report.candidates) - 40
    assert hidden > 0
    assert f"{hidden} more rows are not shown. See rows() or to_markdown()." in text
    assert len(text) == 2 + 40 + 1 + 1 + len(report.notes()) + 1 + 1 + 1
    assert text[-2:] == ["Next:", f"  {report.next_steps()[0]}"]
    markdown = report.to_markdown().splitlines()
    assert len(markdown) == 2 + 2 + len(report.candidates) + 1 + len(report.notes()) + 1 + 3
    assert markdown[-3:] == ["```", *report.next_steps(), "```"]
    assert report._repr_html_().count("<tr>") == 41
    assert report.headline() in html.unescape(report._repr_html_())
    data = json.loads(report.to_json())
    assert data["kind"] == "scan"
    assert data["headline"] == report.headline()
    assert data["next_steps"] == report.next_steps()
    assert len(data["rows"]) == len(report.rows()) == len(report.candidates)
    row = next(row for row in data["rows"] if row["rule"] == "flip_sym")
    assert row["tensor"] == f"{row['layer']}.{row['tensor_name']}"
    assert row["relative"] == pytest.approx(row["residual"] / row["expected"])
    copied = next(row for row in data["rows"] if row["rule"].startswith("copy"))
    assert copied["compression"] is None  # infinite
    assert copied["free_values"] == 0


def test_progress_goes_to_stderr_and_only_if_wanted(capsys):
    model = ResNet()
    tp.scan(model)
    assert capsys.readouterr() == ("", "")
    tp.scan(model, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "scanning" in err
    assert "100%" in err
    assert err.endswith(f"\rscanning [{'#' * 30}] 100%\n")
    tp.scan(model, progress=False)
    assert capsys.readouterr() == ("", "")


def test_a_rule_that_raises_ends_the_look_at_itself_alone(registry):
    @tp.register_rule("test_raises")
    class Raises(tp.Rule):
        def check(self, layout):
            raise ZeroDivisionError("in check")

    report = tp.scan(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert {"flip_sym", "row_repeat(groups=1)"} <= {c.rule for c in report.candidates}
    (left,) = report.not_looked_at
    assert left.layer == "0"
    assert left.reason == (
        "the rule 'test_raises' raised ZeroDivisionError here and was left out from then on: "
        "in check"
    )


@pytest.mark.parametrize("member", ["variants", "__init__", "bind", "residual"])
def test_a_copying_rule_that_raises_ends_the_look_at_itself_alone(member, registry):
    def broken(*_, **__):
        raise ZeroDivisionError("in " + member)

    copy = tp.available_rules()["copy"]
    new = classmethod(broken) if member == "variants" else broken
    tp.register_rule("test_raises")(type("Raises", (copy,), {member: new}))
    report = tp.scan(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    kept = {c.rule for c in report.candidates}
    assert "flip_sym" in kept
    assert any(rule.startswith("copy") for rule in kept)
    assert [left.reason for left in report.not_looked_at] == [
        "the rule 'test_raises' raised ZeroDivisionError here and was left out from then on: "
        f"in {member}"
    ]


def test_examples_may_be_keyword_arguments():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, *, tokens, scale=1):
            return scale * self.layer(tokens)

    example = {"tokens": torch.ones(3, 5, 4), "scale": 2}
    assert {c.positions for c in tp.scan(Named(), example=example).candidates
            if c.tensor_name == "weight"} == {15}  # fmt: skip
    tied = Named()
    tp.register_tie(tied.layer, "flip_sym")
    assert [row.positions for row in tp.report(tied, example=example).ties] == [15]
    with pytest.raises(TypeError, match="mapping of keyword arguments, not int"):
        tp.scan(Named(), example=5)


def test_names_cannot_steer_a_terminal():
    model = nn.Module()
    model.register_module("\x1b[31mred\nnew", nn.Linear(3, 3))
    text = str(tp.scan(model))
    assert "\x1b" not in text
    assert "\\x1b[31mred\\nnew.weight" in text


def test_options_that_fit_nothing_are_said_and_sources_are_not_given():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    report = tp.scan(model, [("row_repeat", {"groups": 9}), ("row_repeat", {"groups": 3})])
    assert {c.rule for c in report.candidates} == {"row_repeat(groups=3)"}
    (left,) = report.not_looked_at
    assert (left.layer, left.tensor_name) == ("0", "weight")
    assert left.reason.startswith("'row_repeat(groups=9)' fits no tensor of the model; ")
    assert "divi" in left.reason
    assert tp.scan(model, [("row_repeat", {"groups": 3})]).not_looked_at == ()
    assert tp.scan(model, ["flip_sym"]).headline().endswith("the rules as they were given.")
    for name in ("source", "source_name"):
        with pytest.raises(tp.TieError, match=f"the sources of 'copy' itself. Leave out {name}="):
            tp.scan(model, [("copy", {name: "0"})])


@pytest.mark.parametrize(
    ("rule", "fact", "remedy"),
    [
        ("symmetric", r"'symmetric' fits no tensor of the model; here, for example: out_", "Tie a"),
        ("flip_sym", r"'flip_sym' fits no tensor of the model; here, for example: out_", "Tie a"),
        ("kernel_symmetry", "no kernel positions", "Tie a convolution"),
        ("head_share", "'head_share' suggests no options to try", "'heads': …, 'groups': …}"),
        (
            "squared_copy",
            "'squared_copy' fits no tensor of the model: no other one",
            "'copy', {'fn",
        ),
    ],
)
def test_a_named_rule_that_fits_nothing_says_why(rule, fact, remedy):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    report = tp.scan(model, [rule])
    assert report.candidates == ()
    (left,) = report.not_looked_at
    assert (left.layer, left.tensor_name) == ("0", "weight")
    assert fact in left.why.fact
    assert remedy in left.why.remedy
    assert tp.scan(model).not_looked_at == ()  # nobody asked for it


def test_a_named_rule_that_suggests_no_options_is_tried_without_any():
    (found,) = tp.scan(planted_by(1), ["symmetric"]).found()
    assert (found.layer, found.rule) == ("0", "symmetric")
    report = tp.scan(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6)), ["symmetric"])
    assert [c.layer for c in report.candidates] == ["1"]
    assert report.not_looked_at == ()


# How many, and what next ------------------------------------------------------------------------


def planted_by(rules: int) -> nn.Sequential:
    """Square layers, the first of which are symmetric."""
    model = nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(8)))
    with torch.no_grad():
        for layer in model[:rules]:
            layer.weight += layer.weight.t().clone()
    return model


def test_a_report_begins_with_how_many_tensors_look_tied():
    assert tp.scan(planted_by(1)).headline() == "1 of 8 tensors looks tied: 0.weight (flip_sym)."
    assert str(tp.scan(planted_by(2))).startswith(
        "2 of 8 tensors look tied: 0.weight (flip_sym), 1.weight (flip_sym).\n\ntensor "
    )
    many = tp.scan(planted_by(7))
    assert many.headline().startswith("7 of 8 tensors look tied: ")
    assert many.headline().count("flip_sym") == 5
    assert many.headline().endswith(" and 2 more.")


def test_a_report_without_finds_says_so_and_what_it_means():
    text = str(tp.scan(planted_by(0)))
    assert text.startswith(
        "None of 8 tensors looks tied: their residuals are about those of random tensors with "
        "the same mean and spread. A law would be imposed, not found: train on after tying.\n"
    )
    assert text.endswith(
        '\nNext:\n  tp.register_tie(layer, "rule", init="rescale")  # by your own choice'
    )
    assert tp.scan(nn.ReLU()).next_steps() == []


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_report_ends_with_the_line_that_ties_what_was_found(count):
    model = planted_by(count)
    seen = tp.scan(model)
    *_, head, line = str(seen).splitlines()
    assert head == "Next:"
    exec(line.strip(), {"tp": tp, "model": model, "seen": seen})
    assert [tp.is_tied(layer) for layer in model] == [n < count for n in range(8)]
    assert tp.scan(model).found() == []


def test_the_line_spells_out_options_sources_and_odd_names():
    model = nn.ModuleDict({"a[1]": nn.Linear(9, 12), "it's": nn.Linear(12, 9),
                           "c": nn.MultiheadAttention(4, 2), "d": nn.Linear(4, 12)})  # fmt: skip
    with torch.no_grad():
        model["it's"].weight.copy_(model["a[1]"].weight.t())
        model["d"].weight.copy_(model["c"].in_proj_weight)
    seen = tp.scan(model)
    (line,) = seen.next_steps()
    assert "'fn': torch.t" in line
    assert "'source_name': 'in_proj_weight'" in line
    exec(line, {"tp": tp, "torch": torch, "model": model})
    assert torch.equal(model["it's"].weight, model["a[1]"].weight.t())
    assert tp.is_tied(model["d"])
    both = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": nn.MultiheadAttention(4, 2)})
    with torch.no_grad():
        for name in ("in_proj_weight", "out_proj.weight"):
            both["b"].get_parameter(name).copy_(both["a"].get_parameter(name))
    exec(tp.scan(both).next_steps()[0], {"tp": tp, "torch": torch, "model": both})
    assert tp.is_tied(both["b"], "in_proj_weight")
    assert tp.is_tied(both["b"].out_proj)


def opposite(weight):
    return -weight


def test_a_function_of_the_users_is_named_by_the_plan():
    """Its name in a file, ``module:name``, is not Python."""
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    with torch.no_grad():
        model[1].weight.copy_(-model[0].weight)
    seen = tp.scan(model, [("copy", {"fn": opposite})])
    (line,) = seen.next_steps()
    exec(line, {"tp": tp, "model": model, "seen": seen})
    assert tp.get_tie(model[1]).fn is opposite


def test_a_rule_without_a_name_is_named_by_the_plan(registry):
    class Own(type(tp.register_tie(nn.Linear(2, 2), "flip_sym").parametrizations.weight[0])):
        name = ""

    seen = tp.scan(planted_by(1), [Own])
    assert seen.next_steps() == ["tp.tie_model(model, seen.plan())  # seen is what scan returned"]
