"""head_share: mean-pooled heads, torch's grouped-query attention, counts and refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiedparam as tp
from tests.support.cases import DTYPES, assert_refused, same_bits
from tests.support.tensors import free_value, stored


@st.composite
def projections(draw: st.DrawFn) -> tuple[nn.Linear, str, int, int]:
    torch.manual_seed(draw(st.integers(0, 100)))
    groups, of_group, rows = (draw(st.integers(1, 4)) for _ in range(3))
    layer = nn.Linear(
        draw(st.integers(1, 5)), groups * of_group * rows, dtype=draw(st.sampled_from(DTYPES))
    )
    return layer, draw(st.sampled_from(["weight", "bias"])), groups * of_group, groups


@pytest.mark.filterwarnings("ignore:the tie of .* frees nothing")  # some draws do
@given(projections())
def test_heads_are_pooled_by_their_mean(drawn):
    layer, name, heads, groups = drawn
    dense = getattr(layer, name).detach().double()
    tp.register_tie(layer, "head_share", name, heads=heads, groups=groups)
    weight, free = getattr(layer, name).detach(), free_value(layer, name).detach()
    shared, size = heads // groups, dense.shape[0] // heads
    assert stored(layer, name) == dense.numel() // shared
    assert free.shape == (groups * size, *dense.shape[1:])
    for head in range(heads):
        group = head // shared
        rows = weight[head * size : (head + 1) * size]
        assert torch.equal(rows, free[group * size : (group + 1) * size])
        mean = sum(
            dense[other * size : (other + 1) * size]
            for other in range(heads) if other // shared == group
        ) / shared  # fmt: skip
        eps = torch.finfo(weight.dtype).eps
        torch.testing.assert_close(rows.double(), mean, rtol=eps, atol=2 * eps)
    tp.register_tie(
        tp.remove_tie(layer, name), "head_share", name, heads=heads, groups=groups, init="exact"
    )
    assert same_bits(getattr(layer, name).detach(), weight)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_attention_is_torchs_grouped_query_attention(groups):
    """Eight heads that share keys and values, against as many keys as there are groups."""
    heads, size, width = 8, 4, 32
    query, key, value = (nn.Linear(width, width, dtype=torch.float64) for _ in range(3))
    pooled = [
        tensor.detach().unflatten(0, (groups, heads // groups, size)).mean(1).flatten(0, 1)
        for layer in (key, value) for tensor in (layer.weight, layer.bias)
    ]  # fmt: skip
    for layer in (key, value) if groups < heads else ():
        for name in ("weight", "bias"):
            tp.register_tie(layer, "head_share", name, heads=heads, groups=groups)
    x = torch.randn(2, 6, width, dtype=torch.float64)

    def split(rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(-1, (-1, size)).transpose(1, 2)

    ours = F.scaled_dot_product_attention(split(query(x)), split(key(x)), split(value(x)))
    keys, values = F.linear(x, *pooled[:2]), F.linear(x, *pooled[2:])
    grouped = F.scaled_dot_product_attention(
        split(query(x)), split(keys), split(values), enable_gqa=True
    )
    torch.testing.assert_close(ours, grouped, rtol=1e-12, atol=1e-12)
    if groups < heads:
        torch.testing.assert_close(free_value(key).detach(), pooled[0], rtol=1e-14, atol=1e-14)


def test_the_gradient_is_the_sum_over_the_heads_of_a_group():
    layer = nn.Linear(64, 96, dtype=torch.float64)
    tp.register_tie(layer, "head_share", heads=12, groups=3)
    cotangent = torch.randn(96, 64, dtype=torch.float64)
    layer.weight.backward(cotangent)
    summed = cotangent.view(3, 4, 8, 64).sum(1).view(24, 64)
    torch.testing.assert_close(free_value(layer).grad, summed)
    assert tp.get_tie(layer).multiplicities()[0].unique().tolist() == [4]


def test_heads_of_one_row_are_row_repeat_and_one_group_is_a_tile():
    weight = torch.randn(6, 5)
    laws = [
        ("head_share", {"heads": 6, "groups": 2}), ("row_repeat", {"groups": 2}),
        ("head_share", {"heads": 3, "groups": 1}), ("repeat", {"outputs": 3, "order": "tile"}),
    ]  # fmt: skip
    made = []
    for law, options in laws:
        layer = nn.Linear(5, 6)
        with torch.no_grad():
            layer.weight.copy_(weight)
        made.append(tp.register_tie(layer, law, **options).weight.detach().clone())
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[2], made[3])


def test_a_file_holds_heads_and_groups(tmp_path):
    layer = tp.register_tie(nn.Linear(5, 8), "head_share", heads=4, groups=2)
    tp.save(layer, tmp_path / "layer.safetensors")
    other = tp.load(tmp_path / "layer.safetensors", nn.Linear(5, 8))
    assert torch.equal(other.weight, layer.weight)
    assert str(tp.get_tie(other)) == "head_share(heads=4, groups=2)"


# What does not fit --------------------------------------------------------------------------


def test_refuses_heads_and_groups_that_do_not_divide():
    assert_refused(
        nn.Linear(5, 8), "head_share", "the 8 rows are not heads=3 blocks of equal size",
        "Choose a divisor of 8", heads=3, groups=1,
    )  # fmt: skip
    assert_refused(
        nn.Linear(5, 8), "head_share", "heads=4 cannot be shared out evenly to groups=3",
        "Choose a divisor of 4", heads=4, groups=3,
    )  # fmt: skip
    assert_refused(
        nn.Linear(5, 8), "head_share", "heads=4", "groups=8", heads=4, groups=8, tensor_name="bias"
    )


@pytest.mark.parametrize("count", [0, -2, True, 2.0, "2", None], ids=repr)
@pytest.mark.parametrize("name", ["heads", "groups"])
def test_refuses_what_is_no_positive_integer(name, count):
    options = {"heads": 4, "groups": 2, name: count}
    message = f"{name} must be a positive integer, not {count!r}"
    assert_refused(nn.Linear(4, 4), "head_share", message, **options)


def test_refuses_missing_options():
    message = assert_refused(nn.Linear(4, 4), "head_share", error=TypeError, heads=2)
    assert "'groups'" in message
