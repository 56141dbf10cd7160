"""hashed: golden numbers, a second implementation in Python's own integers, and what is refused."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.cases import assert_refused
from tests.support.tensors import free_value


def mixed(number: int) -> int:
    number ^= number >> 16
    number = number * 0x7FEB352D % 2**32
    number ^= number >> 15
    number = number * 0x846CA68B % 2**32
    return number ^ number >> 16


def labels_of(entries: int, count: int, seed: int) -> list[int]:
    order, sign = mixed(seed ^ 0x9E3779B9), mixed(seed ^ 0x85EBCA6B)
    dealt = sorted(range(entries), key=lambda entry: mixed(mixed(entry) ^ order))
    value = {entry: turn % count + 1 for turn, entry in enumerate(dealt)}
    return [
        -value[entry] if mixed(mixed(entry) ^ sign) >= 2**31 else value[entry]
        for entry in range(entries)
    ]


@pytest.mark.parametrize(
    ("shape", "n", "seed", "golden"),
    [
        ((3, 4), 5, 7, [-2, 1, -3, -1, 5, 4, 3, 1, -2, 2, -4, 5]),
        ((2, 4), 6, 0, [-6, 2, 3, -1, 4, -1, -2, 5]),
    ],
)
def test_golden_numbers_which_files_depend_on(shape, n, seed, golden):
    layer = tp.register_tie(nn.Linear(shape[1], shape[0]), "hashed", n=n, seed=seed)
    assert tp.get_tie(layer).orbit_labels().flatten().tolist() == golden


@pytest.mark.parametrize(("n", "seed"), [(1, 0), (77, 3), (1000, 2**32 - 1), (1023, 5)])
def test_as_computed_by_integers_without_bounds(n, seed):
    layer = tp.register_tie(nn.Linear(32, 32), "hashed", n=n, seed=seed)
    labels = tp.get_tie(layer).orbit_labels().flatten().tolist()
    assert labels == labels_of(1024, n, seed)
    sizes = Counter(map(abs, labels))
    assert sorted(sizes) == list(range(1, n + 1))
    assert max(sizes.values()) - min(sizes.values()) <= 1


def test_the_weight_is_looked_up_in_the_order_of_outputs_and_inputs():
    layer = tp.register_tie(nn.ConvTranspose1d(2, 3, 4), "hashed", n=6, seed=2)
    labels = torch.tensor(labels_of(24, 6, 2)).view(3, 2, 4)
    expected = free_value(layer)[0][labels.abs() - 1] * labels.sign()
    assert torch.equal(layer.weight.transpose(0, 1), expected)


def test_half_of_the_signs_are_minus_and_seeds_differ():
    labels = [
        tp.get_tie(tp.register_tie(nn.Linear(64, 64), "hashed", n=64, seed=s)).orbit_labels()
        for s in (0, 1)
    ]
    for each in labels:
        # six standard deviations of 4096 coins
        assert abs(int((each < 0).sum()) - 2048) < 192
    # alike by chance: 64 ± 8
    assert int((labels[0].abs() == labels[1].abs()).sum()) < 128


def test_a_file_holds_no_index(tmp_path):
    layer = tp.register_tie(nn.Linear(64, 64, bias=False), "hashed", n=16, seed=9)
    tp.save(layer, tmp_path / "hashed.safetensors")
    assert (tmp_path / "hashed.safetensors").stat().st_size < 4096
    fresh = tp.load(tmp_path / "hashed.safetensors", nn.Linear(64, 64, bias=False))
    assert torch.equal(fresh.weight, layer.weight)


def test_values_of_another_seed_are_refused():
    one, other = (
        tp.register_tie(nn.Linear(8, 8), "hashed", n=16, seed=s, init="rescale") for s in (1, 2)
    )
    before = other.weight.detach().clone()
    with pytest.raises(RuntimeError, match="seed=1"):
        other.load_state_dict(one.state_dict())
    assert torch.equal(other.weight, before)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"n": 0}, ("n=0", "1 to 6")),
        ({"n": 7}, ("n=7", "(2, 3)")),
        ({"n": True}, ("n=True",)),
        ({"n": 2.0}, ("n=2.0",)),
        ({"n": 2, "seed": -1}, ("seed=-1",)),
        ({"n": 2, "seed": 2**32}, ("seed=4294967296",)),
    ],
)
def test_refusals(options, parts):
    assert_refused(nn.Linear(3, 2), "hashed", *parts, **options)
