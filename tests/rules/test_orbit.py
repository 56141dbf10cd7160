"""orbit: brute-force closures, Burnside's count, the counts of Deep Sets, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiedparam as tp
from tests.support.cases import assert_refused

TURN, SWAP = [1, 2, 3, 0], [1, 0, 2, 3]


def permutation_of(size: int) -> st.SearchStrategy[list[int]]:
    return st.permutations(range(size)).map(list)


def closure(shape, generators, signs) -> dict[tuple[int, ...], tuple[tuple[int, ...], int]]:
    """For each entry the first one of its orbit, and the sign; 0 where that is zero. By search."""
    entries = list(itertools.product(*map(range, shape)))
    found: dict[tuple[int, ...], tuple[tuple[int, ...], int]] = {}
    for start in entries:
        if start in found:
            continue
        reached, waiting = {(start, 1)}, [(start, 1)]
        while waiting:
            entry, sign = waiting.pop()
            for generator, factor in zip(generators, signs, strict=True):
                image = tuple(g[i] for g, i in zip(generator, entry, strict=True))
                if (image, sign * factor) not in reached:
                    reached.add((image, sign * factor))
                    waiting.append((image, sign * factor))
        for entry, sign in reached:
            found[entry] = (start, 0 if (entry, -sign) in reached else sign)
    return found


@pytest.mark.filterwarnings("ignore:the tie of .* frees nothing")  # some draws do
@given(st.data())
def test_the_orbits_are_those_of_a_search(data):
    shape = data.draw(st.sampled_from([(4,), (3, 4), (2, 3, 3)]))
    count = data.draw(st.integers(1, 3))
    generators = [tuple(data.draw(permutation_of(size)) for size in shape) for _ in range(count)]
    signs = [data.draw(st.sampled_from([1, -1])) for _ in range(count)]
    expected = closure(shape, generators, signs)
    layer = nn.Linear(2, 4) if len(shape) == 1 else nn.Linear(4, 3)
    layer = nn.Conv1d(3, 2, 3) if len(shape) == 3 else layer
    name = "bias" if len(shape) == 1 else "weight"
    orbits = {start for start, sign in expected.values() if sign}
    if not orbits:
        assert_refused(layer, "orbit", "fixes every entry", tensor_name=name,
                       generators=generators, signs=signs)  # fmt: skip
        return
    tp.register_tie(layer, "orbit", name, generators=generators, signs=signs)
    weight = getattr(layer, name).detach().clone()
    for entry, (start, sign) in expected.items():
        assert weight[entry] == sign * weight[start]
    assert tp.get_tie(layer, name).free_count == len(orbits)


@pytest.mark.parametrize(
    ("outputs", "inputs"), [(TURN, TURN), (TURN, [1, 2, 0]), ([0, 2, 1, 3], [2, 0, 1])]
)
def test_burnsides_count(outputs, inputs):
    # all elements that one generator gives; the mean of how many entries each of them keeps
    elements, now = [], (list(range(len(outputs))), list(range(len(inputs))))
    while now not in elements:
        elements.append(now)
        now = ([outputs[i] for i in now[0]], [inputs[i] for i in now[1]])
    kept = [
        sum(g == i for i, g in enumerate(one)) * sum(h == i for i, h in enumerate(other))
        for one, other in elements
    ]
    layer = nn.Linear(len(inputs), len(outputs))
    tp.register_tie(layer, "orbit", generators=[(outputs, inputs)])
    assert tp.get_tie(layer).free_count == sum(kept) / len(elements)


@pytest.mark.parametrize("size", [3, 4, 64])
def test_deep_sets_have_two_values(size):
    turn = [*range(1, size), 0]
    swap = [1, 0, *range(2, size)]
    layer = nn.Linear(size, size)
    tp.register_tie(layer, "orbit", generators=[(turn, turn), (swap, swap)])
    assert tp.get_tie(layer).free_count == 2
    x, order = torch.randn(5, size), torch.randperm(size)
    with torch.no_grad():
        layer.bias.fill_(0.5)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_generators_act_on_outputs_and_inputs_of_every_layout():
    generators = [(TURN, [1, 0], [2, 1, 0])]
    layer = nn.ConvTranspose1d(4, 4, 3, groups=2)
    tp.register_tie(layer, "orbit", generators=generators)
    weight = tp.get_tie(layer).bound_layout.canonical(layer.weight.detach().clone())
    for o, c, x in itertools.product(range(4), range(2), range(3)):
        assert weight[TURN[o], [1, 0][c], 2 - x] == weight[o, c, x]


def test_what_no_generator_moves_is_a_cell_and_the_table_small():
    mirror = [[2, 1, 0], [0, 1, 2]]
    flat = [3 * row + column for row in mirror[1] for column in mirror[0]]
    for generators in ([(None, None, flat)], [(list(range(64)), list(range(32)), flat)]):
        layer = nn.Conv2d(32, 64, 3)
        tp.register_tie(layer, "orbit", generators=generators)
        weight = layer.weight.detach().clone()
        assert torch.equal(weight, weight.flip(-1))
        rule = tp.get_tie(layer)
        assert rule.free_shapes() == ((64 * 32, 6),)
        assert rule._table.labels().numel() == 9


def test_positions_number_the_kernel_row_by_row():
    quarter = torch.arange(9).view(3, 3).rot90().flatten()
    layer = tp.register_tie(nn.Conv2d(2, 2, 3), "orbit", generators=[(None, None, quarter)])
    weight = layer.weight.detach().clone()
    assert torch.equal(weight, weight.rot90(1, (-2, -1)))
    assert tp.get_tie(layer).free_count == 4 * 3


def test_a_file_brings_the_generators_back(tmp_path):
    layer = nn.Linear(4, 4)
    tp.register_tie(layer, "orbit", generators=[(TURN, TURN), (SWAP, None)], signs=[1, 1])
    tp.save(layer, tmp_path / "orbit.safetensors")
    fresh = tp.load(tmp_path / "orbit.safetensors", nn.Linear(4, 4))
    assert torch.equal(fresh.weight, layer.weight)
    assert list(tp.get_tie(fresh).symmetries(fresh.weight.detach()))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"generators": []}, ("none",)),
        ({"generators": [TURN]}, ("generator 1", "list")),
        ({"generators": [(TURN,)]}, ("1 permutations", "(outputs, inputs)")),
        ({"generators": [(TURN, TURN, [0])]}, ("3 permutations", "(4, 4)")),
        ({"generators": [(TURN, [0, 1, 2])]}, ("3 inputs", "has 4")),
        ({"generators": [([0, 1], TURN)]}, ("2 outputs", "has 4")),
        ({"generators": [(TURN, TURN), (TURN, [0, 0, 1, 2])]}, ("2: its", "inputs", "misses 3")),
        ({"generators": [([1, 2, 3, 4], TURN)]}, ("outputs", "misses 0")),
        ({"generators": [(TURN, [0.5])]}, ("torch.float32",)),
        ({"generators": [(TURN, TURN), (TURN, [0, 1])]}, ("[2, 4]", "inputs")),
        ({"generators": [(TURN, TURN)], "signs": [1, 1]}, ("[1, 1]", "1 generators")),
        ({"generators": [(TURN, TURN)], "signs": [2]}, ("[2]",)),
        ({"generators": [(TURN, TURN)], "signs": 1}, ("signs=1",)),
        ({"generators": [(TURN, TURN)], "signs": torch.tensor([[1]])}, ("signs=[[1]]",)),
        ({"generators": [(None, None)]}, ("permute nothing",)),
    ],
)  # fmt: skip
def test_refusals(options, parts):
    assert_refused(nn.Linear(4, 4), "orbit", *parts, **options)


def test_signs_may_be_a_tensor_and_a_file_holds_them(tmp_path):
    options = {"generators": [(TURN, TURN)], "signs": torch.tensor([-1])}
    layer = tp.register_tie(nn.Linear(4, 4), "orbit", **options)
    assert tp.get_tie(layer).options()["signs"] == [-1]
    tp.save(layer, tmp_path / "orbit.safetensors")
    fresh = tp.load(tmp_path / "orbit.safetensors", nn.Linear(4, 4))
    assert torch.equal(fresh.weight, layer.weight)


def test_every_entry_may_be_its_own_negative():
    options = {"generators": [(list(range(4)), list(range(4)))], "signs": [-1]}
    assert_refused(nn.Linear(4, 4), "orbit", "fixes every entry", **options)
