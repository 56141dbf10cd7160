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
