"""cluster: means of clusters, bits that are stored, what is loaded, and other clusters later."""

from __future__ import annotations

import copy
import itertools
import json
import pickle

import pytest
import safetensors
import torch
from torch import nn

import tiedparam as tp
from tests.support.cases import DTYPES, assert_refused
from tests.support.tensors import free_value, with_weight
from tests.support.unchanged import everything

SOME = [[0.1, 0.2, 5.0], [5.2, 0.3, -3.0]]


def seeded(seed: int, inputs: int = 12, outputs: int = 8) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs)


def tied(seed: int = 0, **options) -> nn.Linear:
    return tp.register_tie(seeded(seed), "cluster", **({"n": 4} | options))


def codes_of(layer: nn.Module, tensor_name: str = "weight") -> torch.Tensor:
    return tp.get_tie(layer, tensor_name).orbit_labels() - 1


# Tying -------------------------------------------------------------------------------------------


def test_values_are_the_means_of_the_clusters():
    layer = tp.register_tie(with_weight(nn.Linear(3, 2), SOME), "cluster", n=3)
    assert codes_of(layer).tolist() == [[1, 1, 2], [2, 1, 0]]
    torch.testing.assert_close(free_value(layer).data, torch.tensor([[-3, 0.2, 5.1]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "bits"), [(2, 1), (3, 2), (16, 4), (17, 5), (256, 8)])
def test_so_many_bits_are_stored(n, bits, dtype):
    layer = nn.Linear(24, 18, bias=False, dtype=dtype)
    layer = tp.register_tie(layer, "cluster", n=n)
    free, codes = layer.state_dict().values()
    assert free.shape == (1, n)
    assert free.dtype == dtype
    assert codes.dtype == torch.uint8
    assert codes.numel() == bits * 24 * 18 / 8


def test_each_output_has_values_of_its_own():
    for kind in (nn.Conv1d, nn.ConvTranspose1d):
        torch.manual_seed(0)
        layer = kind(4, 6, 5, groups=2)
        dense = layer.weight.detach().clone()
        tp.register_tie(layer, "cluster", n=3, per="output")
        layout = tp.get_tie(layer).bound_layout
        rows, before = (layout.canonical(x.detach()).flatten(1) for x in (layer.weight, dense))
        assert free_value(layer).shape == (6, 3)
        for row, given in zip(rows, before, strict=True):
            alone = tp.register_tie(
                with_weight(nn.Linear(10, 1), given[None].clone()), "cluster", n=3
            )
            assert torch.equal(row, alone.weight.detach()[0])


def test_a_lawful_weight_comes_back_to_the_bit():
    layer = tied(n=5)
    weight, free = layer.weight.detach().clone(), free_value(layer).detach().clone()
    tp.remove_tie(layer)
    tp.register_tie(layer, "cluster", n=5, init="exact")
    assert torch.equal(layer.weight, weight)
    assert torch.equal(free_value(layer), free)
    assert free.diff().gt(0).all()


def test_a_constant_weight_has_equal_values_that_can_be_trained():
    layer = with_weight(nn.Linear(4, 4), torch.full((4, 4), 0.5))
    tp.register_tie(layer, "cluster", n=4)
    assert torch.equal(free_value(layer), torch.full((1, 4), 0.5))
    torch.manual_seed(0)
    layer(torch.randn(3, 4)).square().sum().backward()
    assert free_value(layer).grad.isfinite().all()
    assert free_value(layer).grad.unique().numel() == 4


def test_a_vector():
    layer = nn.Linear(3, 10)
    tp.register_tie(layer, "cluster", "bias", n=2)
    assert free_value(layer, "bias").shape == (2,)
    assert layer.bias.unique().numel() == 2


def test_gradients_are_sums_over_members_the_same_at_every_run():
    layer, x = tied(n=3), torch.randn(5, 12)
    codes = codes_of(layer)
    dense = nn.Linear(12, 8)
    dense.load_state_dict(tp.dense_state_dict(layer))
    gradients = []
    for _ in range(2):
        layer.zero_grad()
        layer(x).square().sum().backward()
        gradients.append(free_value(layer).grad.clone())
    dense(x).square().sum().backward()
    sums = torch.stack([dense.weight.grad.double()[codes == k].sum() for k in range(3)])
    torch.testing.assert_close(gradients[0].double(), sums[None], rtol=1e-5, atol=1e-5)
    assert torch.equal(*gradients)


@pytest.mark.filterwarnings("ignore:.*frees nothing")
def test_importance_moves_clusters_and_means_and_is_forgotten():
    numbers, weights = torch.tensor([[0.0, 1, 2, 10]]), torch.tensor([[1.0, 100, 100, 0]])
    layer = with_weight(nn.Linear(4, 1), numbers)
    tp.register_tie(layer, "cluster", n=2, weights=weights)
    best = min(
        itertools.combinations(range(1, 4), 1),
        key=lambda cut: sum(
            float((w * (x - (w * x).sum() / w.sum().clamp(min=1e-9)).square()).sum())
            for x, w in zip(numbers[0].tensor_split(cut), weights[0].tensor_split(cut), strict=True)
        ),
    )
    assert codes_of(layer).tolist() == [[0] * best[0] + [1] * (4 - best[0])] == [[0, 0, 1, 1]]
    torch.testing.assert_close(free_value(layer).data, torch.tensor([[100 / 101, 2.0]]))
    assert tp.get_tie(layer).weights is None
    # nobody matters in a cluster: its plain mean
    layer = with_weight(nn.Linear(4, 1), numbers)
    tp.register_tie(layer, "cluster", n=4, weights=weights)
    assert torch.equal(free_value(layer).detach(), numbers)


# Of other laws -----------------------------------------------------------------------------------


def test_values_of_a_symmetric_matrix_count_as_often_as_they_occur():
    # counted once each, 0 and 1 are the nearest; 0 occurs twice
    matrix = torch.tensor([[1.0, 0], [0, 2.1]])
    layer = tp.register_tie(with_weight(nn.Linear(2, 2), matrix), "cluster", n=2, of="flip_sym")
    assert torch.equal(layer.weight, layer.weight.t())
    values = matrix.flatten().sort()[0]
    losses = [
        sum(float((x - x.mean()).square().sum()) for x in values.tensor_split([cut]))
        for cut in range(1, 4)
    ]
    loss = float((layer.weight.detach() - matrix).square().sum())
    assert loss == pytest.approx(min(losses))
    rule = tp.get_tie(layer)
    assert rule.data()["code_bits"].numel() == 1  # three values of one bit
    assert str(rule) == "cluster(n=2, of='flip_sym')"


def test_signs_and_zeros_of_another_law_stay():
    torch.manual_seed(0)
    layer = tp.register_tie(nn.Linear(6, 6), "cluster", n=3, of="skew")
    assert torch.equal(layer.weight, -layer.weight.t())
    assert layer.weight.abs().unique().numel() <= 4
    mask = torch.rand(6, 6) > 0.5
    layer = nn.Linear(6, 6)
    dense = layer.weight.detach().clone()
    tp.register_tie(layer, "cluster", n=3, of=("masked", {"mask": mask}))
    assert torch.equal(layer.weight != 0, mask)
    alone = with_weight(nn.Linear(int(mask.sum()), 1), dense[mask][None])
    tp.register_tie(alone, "cluster", n=3)
    assert torch.equal(free_value(layer), free_value(alone))
    layer = tp.register_tie(
        seeded(0), "cluster", n=3, of=("fixed", {"mask": torch.eye(8, 12).bool(), "value": 2.5})
    )
    assert layer.weight.diagonal().eq(2.5).all()
    assert layer.weight.unique().numel() == 4
    images = list(tp.get_tie(layer).symmetries(layer.weight.detach()))
    assert all(torch.equal(image, layer.weight) for image in images)


def test_importance_of_entries_is_that_of_the_values_they_share():
    matrix = torch.tensor([[0.0, 1], [1, 4]])
    weights = torch.tensor([[1.0, 2], [3, 0.5]])
    layer = with_weight(nn.Linear(2, 2), matrix)
    tp.register_tie(layer, "cluster", n=2, of="flip_sym", weights=weights)
    torch.testing.assert_close(free_value(layer).data, torch.tensor([[5 / 6, 4.0]]))


# State dicts and files ---------------------------------------------------------------------------

KINDS = {
    "tensor": {},
    "output": {"per": "output"},
    "masked": {"of": ("masked", {"mask": torch.arange(96).view(8, 12) % 3 > 0})},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


@every_kind
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_brings_its_clusters(options, assign):
    one, other = tied(1, **options), tied(2, **options)
    assert not torch.equal(codes_of(one), codes_of(other))
    other(torch.randn(2, 12))  # its table is in use
    other.load_state_dict(copy.deepcopy(one.state_dict()), assign=assign)
    assert torch.equal(other.weight, one.weight)
    assert torch.equal(other(torch.ones(1, 12)), one(torch.ones(1, 12)))
    for again in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert torch.equal(again.weight, one.weight)
    dense = tp.untie_state_dict(tied(3, **options), one.state_dict())
    assert torch.equal(dense["weight"], one.weight)


def test_after_to_empty_no_clusters_are_believed_but_those_of_a_state_dict():
    layer, other = tied(1), tied(2)
    layer.to_empty(device="cpu")
    with torch.no_grad():  # memory of others
        tp.get_tie(layer).data()["code_bits"].copy_(tp.get_tie(other).data()["code_bits"])
    for entries in ({}, {"bias": other.bias}):
        layer.load_state_dict(entries, strict=False)
        with pytest.raises(tp.TieError, match=r"to_empty.*Load a state dict"):
            layer.weight  # noqa: B018
    with pytest.raises(RuntimeError, match="no pattern"):
        layer.load_state_dict(seeded(3).state_dict())
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.weight, other.weight)


def test_a_dense_state_dict_is_projected_onto_the_clusters_that_there_are():
    layer, dense = tied(1), seeded(2)
    codes = codes_of(layer)
    with pytest.warns(tp.TieWarning, match="not lawful"):
        layer.load_state_dict(dense.state_dict())
    assert torch.equal(codes_of(layer), codes)
    means = [dense.weight[codes == k].mean() for k in range(4)]
    torch.testing.assert_close(free_value(layer)[0], torch.stack(means))


def test_codes_of_a_state_dict_must_be_clusters():
    layer = tied(1, n=3)
    before = layer.weight.detach().clone()
    key = "parametrizations.weight.0.code_bits"
    for codes, message in (
        (torch.zeros(2, 12), "have no entry"),
        (torch.full((2, 12), 255), "have no entry"),  # 3, of three values
        (torch.zeros(2, 11), "size mismatch"),
    ):
        entries = {**layer.state_dict(), key: codes.to(torch.uint8)}
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(entries)
        assert torch.equal(layer.weight, before)


def test_clusters_that_were_given_are_a_part_of_the_law():
    codes = torch.arange(96).view(8, 12) % 4
    layer = tied(0, codes=codes)
    assert torch.equal(codes_of(layer), codes)
    assert "codes='8x12 sha256:" in str(tp.get_tie(layer))
    before = layer.weight.detach().clone()
    for other in (tied(1), tied(1, codes=codes.flip(1))):
        with pytest.raises(RuntimeError, match="saved under the rule"):
            layer.load_state_dict(other.state_dict())
        with pytest.raises(RuntimeError, match="another"):
            layer.load_state_dict(dict(other.state_dict()))
    assert torch.equal(layer.weight, before)


@every_kind
def test_files_have_the_clusters_and_the_law(tmp_path, options):
    layer = tied(1, **options)
    path = tmp_path / "clustered.safetensors"
    tp.save(layer, path)
    with safetensors.safe_open(path, "pt") as file:
        (text,) = (value for value in file.metadata().values() if value.startswith("{"))
    (said,) = json.loads(text)["ties"]
    assert said["options"].keys() == {"n", *options}
    fresh = tp.load(path, seeded(2))
    assert torch.equal(fresh.weight, layer.weight)
    assert str(tp.get_tie(fresh)) == str(tp.get_tie(layer))
    again = tp.load(path, tied(3, **options))  # one that has clusters of its own
    assert torch.equal(again.weight, layer.weight)


# Other clusters ----------------------------------------------------------------------------------


def test_trained_values_are_joined_by_how_often_they_occur():
    values = torch.tensor([[0.0] * 6 + [1.0] + [2.0] * 2 + [9.0]])
    layer = tp.register_tie(with_weight(nn.Linear(10, 1), values), "cluster", n=4)
    assert tp.recluster(layer, 3) is layer
    assert codes_of(layer).tolist() == [[0] * 6 + [1] * 3 + [2]]
    torch.testing.assert_close(free_value(layer).data, torch.tensor([[0, 5 / 3, 9]]))


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_the_state_of_joined_values_is_that_of_their_sum(kind):
    layer, x = tied(n=6), torch.randn(4, 12)
    options = {"lr": 0.01} | ({"momentum": 0.9} if kind == "SGD" else {})
    optimizer = getattr(torch.optim, kind)(layer.parameters(), **options)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    name = "momentum_buffer" if kind == "SGD" else "exp_avg"
    old, before = codes_of(layer), optimizer.state[free_value(layer)][name][0].clone()
    gradient = free_value(layer).grad[0].clone()
    tp.recluster(layer, 3, optimizer=optimizer)
    new = codes_of(layer)
    member = {int(a): int(b) for a, b in zip(old.flatten(), new.flatten(), strict=True)}
    assert all(member[int(a)] == int(b) for a, b in zip(old.flatten(), new.flatten(), strict=True))
    joined = torch.tensor([member[each] for each in range(6)])
    after = optimizer.state[free_value(layer)][name]
    for state, expected in ((after[0], before), (free_value(layer).grad[0], gradient)):
        sums = torch.zeros(3).index_add_(0, joined, expected)
        torch.testing.assert_close(state, sums)
    optimizer.step()
    assert [p.shape for g in optimizer.param_groups for p in g["params"]] == [(8,), (1, 3)]


def test_another_weight_and_values_of_each_output():
    layer, dense = tied(n=4), seeded(5)
    before = layer.weight.detach().clone()
    tp.recluster(layer, per="output")
    assert torch.equal(layer.weight, before)  # which has no more values in a row
    assert free_value(layer).shape == (8, 4)
    tp.recluster(layer, 5, per="tensor", value=dense.weight)
    tp.register_tie(dense, "cluster", n=5)
    assert torch.equal(layer.weight, dense.weight)


def test_all_clusters_of_a_model_or_none():
    mask = {"mask": torch.arange(64).view(8, 8) % 2 > 0}
    model = nn.Sequential(
        tp.register_tie(nn.Linear(8, 8), "cluster", n=10, of=("masked", mask)),
        tp.register_tie(nn.Linear(8, 8), "flip_sym"),
        tp.register_tie(nn.Linear(8, 1), "cluster", n=6),
        nn.Linear(1, 2),
    )
    before = everything(model)
    with pytest.raises(tp.TieError, match=r"'2.weight': n=9, .* are 8"):
        tp.recluster(model, 9)
    assert everything(model) == before
    tp.recluster(model, 3)
    assert [tp.get_tie(model[i]).n for i in (0, 2)] == [3, 3]
    assert model[0].weight.count_nonzero() == 32
    assert model[0].weight.unique().numel() == 4


def test_an_optimizer_that_was_not_named_is_told():
    layer = tied()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    tp.recluster(layer, 2)
    with pytest.raises(tp.TieError, match="Rebuild the optimizer"):
        optimizer.step()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "n=, per= or value="),
        ({"n": 1}, tp.TieError, "n=1"),
        ({"n": 2, "tensor_name": "bias"}, tp.TieError, "'bias'"),
        ({"value": torch.zeros(3, 3)}, tp.TieError, r"\(3, 3\).*\(8, 12\)"),
        ({"value": torch.full((8, 12), torch.nan)}, tp.TieError, "96 of its 96"),
        ({"value": "x"}, TypeError, "a dense weight, not str"),
        ({"value": torch.ones(8, 12, device="meta")}, tp.TieError, "value has no numbers"),
        ({"n": 64}, tp.TieError, r"n=64 values for 4 different numbers. Pass value="),
        ({"n": 2, "weights": torch.zeros(8, 12)}, tp.TieError, "all zero"),
    ],
)
def test_recluster_refuses(arguments, error, message):
    layer = tied()
    before = everything(layer)
    with pytest.raises(error, match=message):
        tp.recluster(layer, **arguments)
    assert everything(layer) == before
    with pytest.raises(tp.TieError, match="no tensor"):
        tp.recluster(tp.register_tie(nn.Linear(2, 2), "flip_sym"), 2)


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"n": 1}, ("n=1", "2 to 256")),
        ({"n": 257}, ("n=257",)),
        ({"n": 2.0}, ("n=2.0",)),
        ({"n": 97}, ("n=97", "96")),
        ({"n": 13, "per": "output"}, ("n=13", "of an output are 12")),
        ({"n": 2, "per": "row"}, ("per='row'",)),
        ({"n": 2, "weights": torch.ones(8)}, ("(8,)", "(8, 12)")),
        ({"n": 2, "weights": [1]}, ("list",)),
        ({"n": 2, "weights": -torch.ones(8, 12)}, ("weights",)),
        ({"n": 2, "weights": torch.full((8, 12), torch.inf)}, ("infinite",)),
        ({"n": 2, "codes": torch.zeros(8, 12)}, ("torch.float32",)),
        ({"n": 2, "codes": torch.arange(96).view(8, 12) % 3}, ("go up to 2", "n=2")),
        ({"n": 4, "codes": torch.arange(96).view(8, 12) % 3}, ("1 have no entry",)),
        ({"n": 2, "codes": torch.arange(8) % 2}, ("(8,)", "(8, 12)")),
        ({"n": 2, "codes": "8x12 sha256:0123456789abcdef"}, ("file",)),
        ({"n": 2, "of": "flip_sym"}, ("'flip_sym'", "in_channels (12)")),
        ({"n": 2, "of": ("cluster", {"n": 3})}, ("'cluster(n=3)'", "of the weight")),
        (
            {"n": 2, "of": ("row_repeat", {"groups": 1}), "per": "output"},
            ("'row_repeat(groups=1)'", "per="),
        ),
        ({"n": 9, "of": ("channel_shared", {"over": "in"})}, ("n=9", "are 8")),
    ],
)
def test_refusals(options, parts):
    assert_refused(seeded(0), "cluster", *parts, **options)


def test_numbers_that_are_not_finite_or_not_there_are_refused():
    for number, count in ((torch.inf, 2), (torch.nan, 96)):
        weight = torch.randn(8, 12)
        weight.view(-1)[:count] = number
        layer = with_weight(seeded(0), weight)
        with pytest.raises(tp.TieError, match=f"{count} of its 96 numbers are not finite"):
            tp.register_tie(layer, "cluster", n=2)
        assert not tp.is_tied(layer)
    assert_refused(nn.Linear(3, 3, dtype=torch.complex64), "cluster", "complex64", n=2)
    with torch.device("meta"):
        layer = nn.Linear(3, 3)
    with pytest.raises(tp.TieError, match=r"no values.*codes="):
        tp.register_tie(layer, "cluster", n=2)


def test_lists_and_parts_of_tensors_say_what_to_write():
    assert_refused(
        nn.Linear(4, 4), ["flip_sym", ("cluster", {"n": 2})], "('cluster', {'n': 16, 'of': [...]})"
    )
    assert_refused(nn.Linear(4, 4), "cluster", "the whole tensor", n=2, rows=slice(0, 2))
    layer = tp.register_tie(
        nn.Linear(4, 4), "cluster", n=2, of=["flip_sym", ("repeat", {"outputs": 2})]
    )
    assert torch.equal(layer.weight, layer.weight.t())
    assert layer.weight.unique().numel() == 2


def test_a_residual_and_a_plan():
    model = nn.Sequential(seeded(0), nn.ReLU(), nn.Linear(8, 4))
    expected = tp.residual(model[0], "cluster", n=4)
    report = tp.tie_model(model, {nn.Linear: ("cluster", {"n": 4})})
    assert [row.rule for row in report.ties] == ["cluster(n=4)"] * 2
    assert report.ties[0].residual == expected < 0.5
