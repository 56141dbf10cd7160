"""index: look-ups by torch, scipy's Toeplitz matrices, means by numpy, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiedparam as tp
from tests.support.cases import DTYPES, assert_refused
from tests.support.tensors import free_value


def some_index(seed: int, shape: tuple[int, ...], count: int, *, zeros: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    entries = torch.Size(shape).numel()
    index = torch.randint(-1 if zeros else 0, count, (entries,), generator=generator)
    places = torch.randperm(entries, generator=generator)[:count]
    index[places] = torch.randperm(count, generator=generator)
    return index.view(shape)


@given(
    st.integers(0, 50), st.sampled_from(DTYPES), st.sampled_from([1, 2, 3, 7, 8, 9]), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_the_weight_is_looked_up_by_the_users_numbers(seed, dtype, count, zeros, signed):
    layer = nn.Conv1d(3, 4, 2, dtype=dtype)
    dense = layer.weight.detach().clone()
    index = some_index(seed, (4, 3, 2), count, zeros=zeros)
    signs = torch.randint(2, index.shape) * 2 - 1 if signed else None
    tp.register_tie(layer, "index", index=index, signs=signs)
    free = free_value(layer).detach()
    assert free.shape == (1, count)
    looked_up = free[0][index.clamp(min=0)] * (1 if signs is None else signs)
    weight = layer.weight.detach()
    assert torch.equal(weight, torch.where(index < 0, 0, looked_up))
    assert not weight[index < 0].signbit().any()
    # the nearest such weight, by numpy
    values = (dense.double() * (1 if signs is None else signs)).flatten().numpy()
    where = index.flatten().numpy()
    there = where >= 0
    means = np.bincount(where[there], values[there]) / np.bincount(where[there])
    bound = {"rtol": torch.finfo(dtype).eps, "atol": 1e-7}
    torch.testing.assert_close(free[0].double(), torch.from_numpy(means), **bound)


@given(st.integers(0, 50), st.booleans(), st.booleans())
def test_what_is_packed_comes_back(seed, zeros, signed):
    index = some_index(seed, (3, 5), 6, zeros=zeros)
    signs = torch.randint(2, index.shape) * 2 - 1 if signed else None
    rule = tp.get_tie(tp.register_tie(nn.Linear(5, 3), "index", index=index, signs=signs))
    assert torch.equal(rule.index.long(), index)
    sizes = {name: tuple(value.shape) for name, value in rule.data().items()}
    planes = {"zero_bits": (2,)} if bool((index < 0).any()) else {}
    planes |= {"sign_bits": (2,)} if signed and bool((signs < 0).any()) else {}
    assert sizes == {"index_bits": (3, 2), **planes}


def test_toeplitz_by_scipy():
    index = torch.arange(4)[:, None] - torch.arange(6) + 5
    layer = tp.register_tie(nn.Linear(6, 4).double(), "index", index=index)
    values = free_value(layer)[0].detach().numpy()
    expected = scipy.linalg.toeplitz(values[5:], values[5::-1])
    assert np.array_equal(layer.weight.detach().numpy(), expected)
    assert tp.get_tie(layer).free_count == 4 + 6 - 1


def test_a_large_index_is_packed_and_its_count_exact():
    index = torch.arange(512 * 512).view(512, 512) % 1000
    layer = tp.register_tie(nn.Linear(512, 512), "index", index=index)
    rule = tp.get_tie(layer)
    assert rule.free_count == 1000
    assert {name: value.numel() for name, value in rule.data().items()} == {
        "index_bits": 10 * 512 * 512 // 8
    }
    labels = rule.orbit_labels()
    assert torch.equal(labels, index + 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lawful_weights_are_accepted_to_the_bit_where_the_first_entry_is_minus(dtype):
    index, signs = torch.tensor([[0, 1, 0], [1, 2, 2]]), torch.tensor([[-1, -1, 1], [1, -1, -1]])
    layer = tp.register_tie(nn.Linear(3, 2, dtype=dtype), "index", index=index, signs=signs)
    lawful, free = layer.weight.detach().clone(), free_value(layer).detach().clone()
    tp.remove_tie(layer)
    tp.register_tie(layer, "index", index=index, signs=signs, init="exact")
    assert torch.equal(layer.weight, lawful)
    assert torch.equal(free_value(layer), free)


def test_a_file_brings_the_numbers_back(tmp_path):
    index = some_index(0, (5, 7), 9, zeros=True)
    signs = torch.randint(2, index.shape) * 2 - 1
    layer = tp.register_tie(nn.Linear(7, 5), "index", index=index, signs=signs)
    tp.save(layer, tmp_path / "index.safetensors")
    fresh = tp.load(tmp_path / "index.safetensors", nn.Linear(7, 5))
    assert torch.equal(fresh.weight, layer.weight)
    assert torch.equal(tp.get_tie(fresh).index.long(), index)


LAWFUL = torch.arange(6).view(2, 3)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"index": LAWFUL.t()}, ("(3, 2)", "(2, 3)")),
        ({"index": LAWFUL.float()}, ("torch.float32",)),
        ({"index": LAWFUL * 2}, ("10", "5 of the numbers", "1.")),
        ({"index": LAWFUL - 2}, ("-2",)),
        ({"index": torch.full((2, 3), -1)}, ("all of its 6 places",)),
        ({"index": LAWFUL.tolist()}, ("list",)),
        ({"index": LAWFUL, "signs": torch.ones(3)}, ("(3,)", "(2, 3)")),
        ({"index": LAWFUL, "signs": LAWFUL}, ("5 of 6 signs",)),
        ({"index": LAWFUL, "signs": torch.full((2, 3), 1j)}, ("6 of 6 signs",)),
        ({"index": "2x3 sha256:0123456789abcdef"}, ("file",)),
        ({"index": "all"}, ("'all'",)),
    ],
)
def test_refusals(options, parts):
    assert_refused(nn.Linear(3, 2), "index", *parts, **options)


def test_a_sparse_index_is_an_index():
    index = torch.eye(3).long()
    sparse = {"index": index.to_sparse(), "signs": (2 * index - 1).to_sparse()}
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    tp.register_tie(one, "index", **sparse)
    tp.register_tie(other, "index", index=index, signs=2 * index - 1)
    assert torch.equal(tp.get_tie(one).orbit_labels(), tp.get_tie(other).orbit_labels())
