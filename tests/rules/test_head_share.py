"""head_share: mean-pooled heads, torch's grouped-query attention, counts and refusals."""

from __future__ import annotations

import itertools

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


# Whole attentions, and the smaller layers ------------------------------------------------------


def pooled(tensor: torch.Tensor, heads: int, groups: int) -> torch.Tensor:
    """The mean of the heads of each group."""
    blocks = tensor.detach().unflatten(0, (groups, heads // groups, -1))
    return blocks.mean(1).flatten(0, 1)


class Separate(nn.Module):
    """Projections as Llama calls them, whose attention is torch's with ``enable_gqa``."""

    def __init__(self, heads: int = 6, size: int = 2, *, bias: bool = True) -> None:
        super().__init__()
        self.head_dim, width = size, heads * size
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(width, width, bias, dtype=torch.float64) for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_separate_projections_are_exported_for_grouped_query_attention(groups, bias):
    attention, x = Separate(bias=bias), torch.randn(2, 5, 12, dtype=torch.float64)
    expected = {
        name: pooled(getattr(attention, name).weight, 6, groups) for name in ("k_proj", "v_proj")
    }
    report = tp.share_heads(attention, groups=groups)
    assert len(report.ties) == (4 if bias else 2)
    assert not tp.is_tied(attention.q_proj)
    tied, before = attention(x), list(attention.state_dict())
    small = {name: tp.export_gqa(getattr(attention, name)) for name in expected}
    assert list(attention.state_dict()) == before  # the tied layers are as they were
    for name, layer in small.items():
        assert type(layer) is nn.Linear
        assert (layer.out_features, layer.bias is None) == (groups * 2, not bias)
        torch.testing.assert_close(layer.weight.detach(), expected[name], rtol=1e-14, atol=1e-15)
        for tensor_name in ("weight", "bias") if bias else ("weight",):
            stored_values = free_value(getattr(attention, name), tensor_name)
            assert same_bits(getattr(layer, tensor_name).detach(), stored_values.detach())
        setattr(attention, name, layer)
    torch.testing.assert_close(attention(x), tied, rtol=1e-12, atol=1e-14)


class Fused(nn.Module):
    """One projection, as in vision transformers."""

    def __init__(self, layer: nn.Module, heads: int) -> None:
        super().__init__()
        self.qkv, self.num_heads = layer, heads


def fused(kind: str) -> tuple[nn.Module, nn.Module, str, str]:
    """An attention of 4 heads and width 8, its fused layer, and the names of its tensors."""
    if kind == "in_proj_weight":
        attention = nn.MultiheadAttention(8, 4)
        nn.init.normal_(attention.in_proj_bias)
        return attention, attention, "in_proj_weight", "in_proj_bias"
    if kind == "qkv":
        attention = Fused(nn.Linear(8, 24), 4)
        return attention, attention.qkv, "weight", "bias"
    transformers = pytest.importorskip("transformers")
    attention = transformers.models.gpt2.modeling_gpt2.GPT2Attention(
        transformers.GPT2Config(n_embd=8, n_head=4)
    )
    nn.init.normal_(attention.c_attn.bias)
    return attention, attention.c_attn, "weight", "bias"


@pytest.mark.parametrize("kind", ["in_proj_weight", "qkv", "c_attn"])
def test_fused_projections_keep_their_queries_and_pool_keys_and_values(kind):
    attention, layer, weight_name, bias_name = fused(kind)
    weight = getattr(layer, weight_name).detach().clone()
    weight = weight.t() if kind == "c_attn" else weight  # which stores inputs first
    tensors = {"weight": weight, "bias": getattr(layer, bias_name).detach().clone()}
    tp.share_heads(attention, groups=2)
    small = tp.export_gqa(layer)
    assert (small.in_features, small.out_features) == (8, 8 + 2 * 4)
    for name, dense in tensors.items():
        queries, keys, values = dense.chunk(3)
        expected = torch.cat([queries, pooled(keys, 4, 2), pooled(values, 4, 2)])
        torch.testing.assert_close(getattr(small, name).detach(), expected)
        assert same_bits(getattr(small, name).detach()[:8], queries)
    full = getattr(layer, weight_name).detach()
    full = full.t() if kind == "c_attn" else full
    spread = small.weight.detach()[8:].view(2, 2, 2, 8).repeat_interleave(2, 1)
    assert same_bits(spread.reshape(16, 8), full[8:].contiguous())


def test_heads_are_counted_by_their_size_and_checked():
    attention = Separate()
    assert {row.free_values for row in tp.share_heads(attention, groups=3).ties} == {72, 6}
    attention = nn.Module()
    attention.to_k, attention.to_v = nn.Linear(4, 4), nn.Linear(4, 4)
    with pytest.raises(tp.TieError, match=r"does not say how many heads it has\. Pass heads="):
        tp.share_heads(attention, groups=2)
    assert len(tp.share_heads(attention, groups=2, heads=4).ties) == 4
    with pytest.raises(tp.TieError, match="its keys have 6 heads, and heads=3"):
        tp.share_heads(Separate(), heads=3, groups=1)
    with pytest.raises(tp.TieError, match="no projections of keys and values are found"):
        tp.share_heads(nn.Sequential(nn.Linear(4, 4)), groups=1)
    with pytest.raises(tp.TieError, match="its 'qkv' has 16 rows for 8 inputs"):
        tp.share_heads(Fused(nn.Linear(8, 16), 4), groups=1)


def test_layers_that_are_no_attention_are_left_alone():
    """State-space layers and gated convolutions call what comes first ``in_proj``."""
    model = nn.ModuleList([Separate(), nn.Module(), nn.Module()])
    model[1].in_proj, model[2].in_proj = nn.Linear(4, 16), nn.Linear(4, 12)
    report = tp.share_heads(model, groups=3, heads=6)
    assert {row.layer for row in report.ties} == {"0.k_proj", "0.v_proj"}


def test_all_or_nothing_for_a_whole_model():
    model = nn.Sequential(nn.MultiheadAttention(8, 4), nn.MultiheadAttention(9, 3))
    with pytest.raises(tp.TieError, match="heads=3 cannot be shared out evenly to groups=2"):
        tp.share_heads(model, groups=2)
    assert not tp.is_tied(model)


def shared_and_copies(count: int = 2) -> list[nn.Linear]:
    """A projection with shared heads, a copy of it, a copy of that, and so on."""
    layers = [nn.Linear(8, 8) for _ in range(1 + count)]
    for name in ("weight", "bias"):
        tp.register_tie(layers[0], "head_share", name, heads=4, groups=2)
        for source, layer in itertools.pairwise(layers):
            tp.register_tie(layer, "copy", name, source=source)
    return layers


def test_a_copy_of_shared_heads_is_exported_as_its_source():
    layers = shared_and_copies()
    expected = tp.export_gqa(layers[0])
    for layer in layers[1:]:
        exported = tp.export_gqa(layer)
        assert exported.out_features == 4
        assert torch.equal(exported.weight, expected.weight)
        assert torch.equal(exported.bias, expected.bias)
        x = torch.randn(3, 8)
        torch.testing.assert_close(exported(x).view(3, 2, 2), layer(x).view(3, 4, 2)[:, ::2])


def test_a_copy_without_shared_heads_behind_it_is_not_exported():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    source, copied = shared_and_copies(1)
    tp.remove_tie(source)
    with pytest.raises(tp.TieError, match="is tied by 'copy', not by 'head_share'"):
        tp.export_gqa(copied)
    tp.register_tie(source, "head_share", heads=4, groups=2)
    nn.utils.parametrize.register_parametrization(source, "weight", Doubled())
    with pytest.raises(tp.TieError, match="another parametrization is stacked"):
        tp.export_gqa(copied)


def test_only_heads_that_share_alike_are_exported():
    layer = nn.Linear(8, 8)
    with pytest.raises(tp.TieError, match=r"is not tied\. Tie 'weight' by 'head_share' first"):
        tp.export_gqa(layer)
    tp.register_tie(layer, "head_share", heads=4, groups=2)
    with pytest.raises(tp.TieError, match="'bias'.* is not tied"):
        tp.export_gqa(layer)
    tp.register_tie(layer, "head_share", "bias", heads=4, groups=1)
    with pytest.raises(tp.TieError, match="'bias' and 'weight' do not share the same heads"):
        tp.export_gqa(layer)
    other = tp.register_tie(nn.Linear(8, 8), "symmetric")
    with pytest.raises(tp.TieError, match="is tied by 'symmetric', not by 'head_share'"):
        tp.export_gqa(other)
    joined = nn.Linear(8, 8, bias=False)
    laws = [("head_share", {"heads": 4, "groups": 2, "rows": rows}) for rows in ((0, 8), (4, 8))]
    laws[1][1].update(heads=2, groups=1)
    tp.register_tie(joined, laws)
    with pytest.raises(tp.TieError, match="not by 'head_share'"):
        tp.export_gqa(joined)
    with pytest.raises(TypeError, match="takes a layer, not str"):
        tp.export_gqa("k_proj")


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
