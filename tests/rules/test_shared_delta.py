"""shared_delta: the start is numpy's truncated decomposition, and every factor is alive."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.cases import assert_refused, canonical_entries

LAYERS = {
    "Linear": lambda: nn.Linear(5, 6),
    "Conv2d": lambda: nn.Conv2d(4, 6, (3, 2), groups=2),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
}


def matrix_of(layer: nn.Module) -> np.ndarray:
    """Outputs × inputs and kernel positions, by counting."""
    entries = canonical_entries(layer)
    rows = 1 + max(index[0] for index in entries)
    return np.array([entries[index] for index in sorted(entries)]).reshape(rows, -1)


def factors_of(layer: nn.Module) -> list[torch.Tensor]:
    return [value.detach().clone() for value in tp.free_values(layer).values()]


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_the_start_is_the_truncated_decomposition(build, rank):
    source, layer = build().double(), build().double()
    base, goal = matrix_of(source), matrix_of(layer)
    left, sizes, right = np.linalg.svd(goal - base, full_matrices=False)
    nearest = base + left[:, :rank] * sizes[:rank] @ right[:rank]
    said = tp.residual(layer, "shared_delta", source=source, rank=rank)
    tp.register_tie(layer, "shared_delta", source=source, rank=rank)
    np.testing.assert_allclose(matrix_of(layer), nearest, atol=1e-12)
    lost = np.sqrt((sizes[rank:] ** 2).sum()) / np.linalg.norm(goal)  # Eckart and Young
    assert said == pytest.approx(lost)
    u, v = factors_of(layer)
    assert tp.get_tie(layer).free_count == rank * sum(goal.shape)
    torch.testing.assert_close(v.flatten(1) @ v.flatten(1).T, torch.eye(rank, dtype=v.dtype))
    torch.testing.assert_close(u.norm(dim=0), torch.from_numpy(sizes[:rank].copy()))


def test_factors_that_are_left_over_are_alive():
    source = nn.Linear(8, 8)
    layer = copy.deepcopy(source)
    with torch.no_grad():
        layer.weight[0] += 1  # one direction, of three
    tp.register_tie(layer, "shared_delta", source=source, rank=3)
    u, v = factors_of(layer)
    assert u[:, 1:].abs().max() < 1e-6
    torch.testing.assert_close(v @ v.T, torch.eye(3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, goal = torch.randn(32, 8), torch.randn(32, 8)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) - goal).square().mean().backward()
        optimizer.step()
    assert all((after != before).any(1).all() for before, after in zip(
        [u.T, v], [factors_of(layer)[0].T, factors_of(layer)[1]], strict=True
    ))  # fmt: skip


def test_rank_0_is_a_copy():
    source, layer = nn.Linear(6, 6), nn.Linear(6, 6)
    tp.register_tie(layer, "shared_delta", source=source, rank=0)
    assert torch.equal(layer.weight, source.weight)
    assert tp.free_values(layer) == {}


@pytest.mark.parametrize(
    ("rank", "parts"),
    [(6, ["6×5 has no rank 6", "at most 5"]), (-1, ["not -1"]), (True, ["not True"])],
)
def test_ranks_are_checked(rank, parts):
    assert_refused(nn.Linear(5, 6), "shared_delta", *parts, source=nn.Linear(5, 6), rank=rank)


def test_what_is_no_matrix_is_refused():
    one, other = nn.Linear(3, 4), nn.Linear(3, 4)
    given = {"source": one, "rank": 1}
    assert_refused(other, "shared_delta", "is no matrix", tensor_name="bias", **given)
    assert_refused(nn.Linear(2, 4), "shared_delta", "source's tensor is (4, 3)", **given)
    assert_refused(other, "shared_delta", "reads one layer", source=[one, one], rank=1)


def test_complex_weights_have_complex_factors():
    source, layer = (nn.Linear(6, 6, dtype=torch.complex128) for _ in range(2))
    difference = (layer.weight - source.weight).detach().numpy()
    sizes = np.linalg.svd(difference)[1]
    goal = layer.weight.detach().clone()
    tp.register_tie(layer, "shared_delta", source=source, rank=2)
    lost = (layer.weight - goal).norm().item()
    assert lost == pytest.approx(np.sqrt((sizes[2:] ** 2).sum()))


def test_autocast_leaves_the_weight_as_it_is():
    source, layer = nn.Linear(6, 6), nn.Linear(6, 6)
    tp.register_tie(layer, "shared_delta", source=source, rank=2)
    weight = layer.weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.weight, weight)
        assert layer(torch.randn(2, 6)).dtype == torch.bfloat16


# Through the life of a model ----------------------------------------------------------------


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))


PLAN = {
    "1": ("shared_delta", {"source": "0", "rank": 2}),
    "2": ("scaled_copy", {"source": "1", "per": "output"}),  # of a tied layer
    "3": ("transposed_copy", {"source": "2"}),
}


def test_a_chain_of_such_laws_through_copies_files_and_dense_dictionaries(tmp_path):
    model = net()
    report = tp.tie_model(model, PLAN)
    assert [row.free_values for row in report.ties] == [24, 6, 0]
    weights = [layer.weight.detach().clone() for layer in model]
    assert torch.equal(weights[3], weights[2].T)
    tp.save(model, tmp_path / "tied.safetensors")
    loaded = tp.load(tmp_path / "tied.safetensors", net(1))
    tp.export_dense(model, tmp_path / "dense.safetensors")
    plain = tp.load(tmp_path / "dense.safetensors", net(1))
    dense = net(1)
    tp.tie_model(dense, PLAN)
    dense.load_state_dict(tp.dense_state_dict(model))
    twins = [copy.deepcopy(model), loaded, plain, dense]
    for twin, (layer, weight) in itertools.product(twins, enumerate(weights)):
        torch.testing.assert_close(twin[layer].weight, weight, rtol=1e-4, atol=1e-5)
    with torch.no_grad(), tp.frozen(model.eval()):
        torch.testing.assert_close(model(torch.ones(1, 6)), plain(torch.ones(1, 6)))
    assert {tp.get_tie(layer).name for layer in loaded[1:]} == {rule for rule, _ in PLAN.values()}
    tp.untie_model(model)
    assert not tp.is_tied(model)
    for layer, weight in zip(model, weights, strict=True):
        assert torch.equal(layer.weight, weight)


def test_a_plan_goes_through_a_file(tmp_path):
    tp.write_plan(PLAN, tmp_path / "plan.toml")
    model, other = net(), net()
    tp.tie_model(model, tp.read_plan(tmp_path / "plan.toml"))
    tp.tie_model(other, PLAN)
    assert torch.equal(model[3].weight, other[3].weight)


# What may become of the source ------------------------------------------------------------------


def tied_pair(
    law: str = "shared_delta", size: tuple[int, int] = (5, 3), **options
) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*size), nn.Linear(*size))
    options = options or {"rank": 1}
    tp.register_tie(model[1], law, source="0", root=model, **options)
    return model


LAWS = {
    "shared_delta": ("shared_delta", {"rank": 1}),
    "per input": ("scaled_copy", {"per": "input"}),
}
WAYS_OUT = {
    "remove_tie": lambda model: tp.remove_tie(model[1]),
    "untie_model": tp.untie_model,
}


@pytest.mark.parametrize("way", WAYS_OUT)
@pytest.mark.parametrize(("law", "options"), LAWS.values(), ids=LAWS)
def test_s44_a_source_of_another_size_leaves_what_both_sizes_have(law, options, way):
    model = tied_pair(law, **options)
    own = [value.detach().clone() for value in tp.free_values(model[1]).values()]
    model[0].weight = nn.Parameter(torch.randn(2 if law == "shared_delta" else 3, 7))
    for use in (lambda: model[1].weight, lambda: model[1](torch.ones(2, 5))):
        with pytest.raises(
            tp.TieError, match=r"7\) now.*tensor \(3, 5\) again, or call remove_tie"
        ):
            use()
    base = torch.zeros(3, 5)
    rows = len(model[0].weight)
    base[:rows] = model[0].weight.detach()[:, :5]
    with pytest.warns(tp.TieWarning, match="from the part that both sizes have"):
        WAYS_OUT[way](model)
    wanted = base + own[0] @ own[1] if law == "shared_delta" else base * own[0]
    torch.testing.assert_close(model[1].weight.detach(), wanted)
    assert model[1](torch.ones(2, 5)).shape == (2, 3)


def test_s44_a_source_of_the_old_size_is_read_again():
    model = tied_pair()
    before, source = model[1].weight.detach().clone(), model[0].weight
    model[0].weight = nn.Parameter(torch.randn(3, 7))
    with pytest.raises(tp.TieError):
        model[1](torch.ones(2, 5))
    model[0].weight = source
    assert torch.equal(model[1].weight, before)


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (4, 9)])
def test_s44_a_source_is_not_read_by_broadcasting(shape):
    model = tied_pair(size=(6, 6))
    model[0].weight = nn.Parameter(torch.ones(shape))
    said = r"is \({}, {}\) now, and 'shared_delta\(rank=1\)' was tied to \(6, 6\)".format(*shape)
    for use in (lambda: model[1].weight, lambda: model[1](torch.ones(2, 6))):
        with pytest.raises(tp.TieError, match=said):
            use()
    with pytest.warns(tp.TieWarning, match="with zeros for the rest"):
        tp.remove_tie(model[1])


def test_s44_a_sum_of_two_is_not_read_by_broadcasting():
    layers = [nn.Linear(4, 4) for _ in range(3)]
    tp.register_tie(layers[2], "copy", source=layers[:2], fn=torch.add)
    layers[1].weight = nn.Parameter(torch.ones(1, 4))
    with pytest.raises(tp.TieError, match=r"\(1, 4\) now.*was tied to"):
        layers[2](torch.ones(2, 4))


def test_a_source_that_was_cast_alone_says_so():
    model = tied_pair()
    before = model[1].weight.detach().clone()
    model[0].half()
    for use in (lambda: model[1].weight, lambda: model[1](torch.ones(2, 5))):
        with pytest.raises(tp.TieError, match=r"float16 now, and .* torch.float32. Convert both"):
            use()
    tp.remove_tie(model[1])
    assert model[1].weight.dtype == torch.float32
    torch.testing.assert_close(model[1].weight.detach(), before, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("law", "options"), LAWS.values(), ids=LAWS)
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ({"dtype": torch.float16}, "source is torch.float16, .*Convert one of the layers first"),
        ({"device": "meta"}, "source is on meta, .*Move both to one device first"),
    ],
    ids=["dtype", "device"],
)
def test_a_source_of_another_kind_is_refused(law, options, kind, said):
    source, layer = nn.Linear(5, 3, **kind), nn.Linear(5, 3)
    with pytest.raises(tp.TieError, match=said):
        tp.register_tie(layer, law, source=source, **options)
    assert not tp.is_tied(layer)
