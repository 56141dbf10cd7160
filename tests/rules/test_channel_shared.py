"""channel_shared: each ``over`` by loops, literal weights and the identities of story 3."""

from __future__ import annotations

import math
import re

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tiedparam as tp
from tests.support.cases import COMPUTE, DTYPES, assert_refused, canonical_entries, layer_id
from tests.support.tensors import free_value, with_weight

OVERS = ("in", "out", "all", "groups")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONVOLVE_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def first_of_orbit(layer: nn.Module, over: str, index: tuple[int, ...]) -> tuple[int, ...]:
    """The law by hand: where the value of an entry stands for the first time."""
    output, channel, *position = index
    if over == "in":
        return (output, 0, *position)
    if over == "out":
        return (0, channel, *position)
    if over == "all":
        return (0, 0, *position)
    return (output % (layer.out_channels // layer.groups), channel, *position)


@st.composite
def layers_and_overs(draw: st.DrawFn) -> tuple[nn.Module, str]:
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 100)))
    over = draw(st.sampled_from(OVERS))
    groups = draw(st.integers(2 if over == "groups" else 1, 4))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    dims = draw(st.integers(0 if over != "groups" else 1, 3))
    if dims == 0:
        return nn.Linear(inputs, outputs, dtype=dtype), over
    kernel = tuple(draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims)))
    kind = (TRANSPOSED if draw(st.booleans()) else CONVOLUTIONS)[dims - 1]
    return kind(inputs, outputs, kernel, groups=groups, dtype=dtype), over


@pytest.mark.filterwarnings("ignore:the tie of .* frees nothing")  # some draws do
@given(layers_and_overs())
def test_law_by_loops_and_closed_form_count(drawn):
    layer, over = drawn
    dense = canonical_entries(layer)
    outputs = max(index[0] for index in dense) + 1
    channels = max(index[1] for index in dense) + 1  # per group
    positions = len(dense) // outputs // channels
    groups = getattr(layer, "groups", 1)
    tp.register_tie(layer, "channel_shared", over=over)
    entries = canonical_entries(layer)
    orbits: dict[tuple[int, ...], list[float]] = {}
    for index, value in entries.items():
        first = first_of_orbit(layer, over, index)
        assert value == entries[first]
        orbits.setdefault(first, []).append(dense[index])
    counts = {
        "in": outputs * positions,
        "out": channels * positions,
        "all": positions,
        "groups": outputs // groups * channels * positions,
    }
    assert free_value(layer).numel() == len(orbits) == counts[over]
    eps = torch.finfo(layer.weight.dtype).eps
    for first, members in orbits.items():
        mean = sum(members) / len(members)
        assert entries[first] == pytest.approx(mean, rel=eps, abs=2 * eps)


@pytest.mark.filterwarnings("ignore:the tie of .* frees nothing")  # some draws do
@given(layers_and_overs())
def test_lawful_weights_are_accepted_to_the_bit(drawn):
    layer, over = drawn
    tp.register_tie(layer, "channel_shared", over=over)
    lawful = layer.weight.detach().clone()
    tp.remove_tie(layer)
    tp.register_tie(layer, "channel_shared", over=over, init="exact")
    assert torch.equal(layer.weight, lawful)


# Literal weights ----------------------------------------------------------------------------

WEIGHT = [  # three outputs, two inputs, two positions
    [[1.0, 2.0], [3.0, 6.0]],
    [[0.0, 0.0], [2.0, 4.0]],
    [[5.0, 1.0], [1.0, 5.0]],
]


def test_literal_in():
    layer = tp.register_tie(with_weight(nn.Conv1d(2, 3, 2), WEIGHT), "channel_shared")
    rows = [[2.0, 4.0], [1.0, 2.0], [3.0, 3.0]]
    assert free_value(layer).reshape(3, 2).tolist() == rows
    assert layer.weight.tolist() == [[row, row] for row in rows]


def test_literal_out():
    layer = with_weight(nn.Conv1d(2, 3, 2), WEIGHT)
    tp.register_tie(layer, "channel_shared", over="out")
    assert free_value(layer).reshape(2, 2).tolist() == [[2.0, 1.0], [2.0, 5.0]]
    assert layer.weight.tolist() == [[[2.0, 1.0], [2.0, 5.0]]] * 3


def test_literal_all():
    layer = with_weight(nn.Conv1d(2, 3, 2), WEIGHT)
    tp.register_tie(layer, "channel_shared", over="all")
    assert free_value(layer).flatten().tolist() == [2.0, 3.0]
    assert layer.weight.tolist() == [[[2.0, 3.0]] * 2] * 3


def test_literal_groups():
    layer = nn.Conv1d(2, 4, 2, groups=2)  # two streams, two filters
    with_weight(layer, [[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 4.0]], [[5.0, 0.0]]])
    tp.register_tie(layer, "channel_shared", over="groups")
    assert free_value(layer).reshape(2, 2).tolist() == [[3.0, 3.0], [4.0, 2.0]]
    assert layer.weight.tolist() == [[[3.0, 3.0]], [[4.0, 2.0]], [[3.0, 3.0]], [[4.0, 2.0]]]


def test_literal_transposed_convolution():
    # stored as (in, out, k): canonical V[o, c] is stored at [c][o]
    stored = [[[1.0], [2.0], [3.0]], [[5.0], [0.0], [1.0]]]
    expected = {
        "in": [[[3.0], [1.0], [2.0]]] * 2,
        "out": [[[2.0]] * 3, [[2.0]] * 3],
        "all": [[[2.0]] * 3] * 2,
    }
    for over, weight in expected.items():
        layer = with_weight(nn.ConvTranspose1d(2, 3, 1), stored)
        tp.register_tie(layer, "channel_shared", over=over)
        assert layer.weight.tolist() == weight
    layer = with_weight(nn.ConvTranspose1d(2, 4, 1, groups=2), [[[1.0], [2.0]], [[3.0], [6.0]]])
    tp.register_tie(layer, "channel_shared", over="groups")
    assert layer.weight.tolist() == [[[2.0], [4.0]]] * 2


def test_literal_linear():
    matrix = [[1.0, 3.0], [5.0, 7.0]]
    expected = {"in": [[2.0, 2.0], [6.0, 6.0]], "out": [[3.0, 5.0]] * 2, "all": [[4.0] * 2] * 2}
    for over, weight in expected.items():
        layer = tp.register_tie(with_weight(nn.Linear(2, 2), matrix), "channel_shared", over=over)
        assert layer.weight.tolist() == weight
        assert free_value(layer).dim() > 0


@pytest.mark.parametrize(
    ("over", "law"),
    [
        ("in", "W[o, c, x] = w[o, x]"),
        ("out", "W[o, c, x] = w[c, x]"),
        ("all", "W[o, c, x] = w[x]"),
        ("groups", "W[k·m + r, c, x] = w[r, c, x]"),
    ],
)
def test_repr_shows_the_law_of_this_option(over, law):
    layer = tp.register_tie(nn.Conv1d(4, 4, 3, groups=2), "channel_shared", over=over)
    assert tp.get_tie(layer).law == law
    assert f"over='{over}'" in repr(layer)
    assert law in repr(layer)


def test_saved_bytes():
    counts = {"in": 64 * 9, "out": 64 * 9, "all": 9}
    for over, count in counts.items():
        layer = nn.Conv2d(64, 64, 3, bias=False)
        tp.register_tie(layer, "channel_shared", over=over)
        assert free_value(layer).untyped_storage().nbytes() == 4 * count
        saved = safetensors.torch.save(layer.state_dict())
        assert len(saved) - 8 - int.from_bytes(saved[:8], "little") == 4 * count


# What the layers compute --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_summing_the_channels_first_is_the_same(dims, dtype):
    layer = CONVOLUTIONS[dims - 1](5, 4, 3, padding=1, stride=2, dtype=dtype)
    tp.register_tie(layer, "channel_shared", over="in")
    x = torch.randn(2, 5, *[6] * dims).to(dtype)
    kernel = free_value(layer).reshape(4, 1, *[3] * dims)
    once = CONVOLVE[dims](x.sum(1, keepdim=True), kernel, layer.bias, padding=1, stride=2)
    torch.testing.assert_close(layer(x), once, **COMPUTE[dtype])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_summing_the_channels_first_is_the_same_transposed(dims):
    layer = TRANSPOSED[dims - 1](5, 4, 3, stride=2, dtype=torch.float64)
    tp.register_tie(layer, "channel_shared", over="in")
    x = torch.randn(2, 5, *[4] * dims, dtype=torch.float64)
    kernel = free_value(layer).reshape(1, 4, *[3] * dims)
    once = CONVOLVE_TRANSPOSED[dims](x.sum(1, keepdim=True), kernel, layer.bias, stride=2)
    torch.testing.assert_close(layer(x), once, rtol=1e-12, atol=1e-12)


def test_summing_happens_within_each_group():
    layer = nn.Conv2d(6, 4, 3, groups=2, dtype=torch.float64)
    tp.register_tie(layer, "channel_shared", over="in")
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    sums = torch.stack([x[:, :3].sum(1), x[:, 3:].sum(1)], dim=1)
    once = F.conv2d(sums, free_value(layer).reshape(4, 1, 3, 3), layer.bias, groups=2)
    torch.testing.assert_close(layer(x), once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("over", ["out", "all"])
def test_outputs_that_share_their_filter_differ_by_their_bias_only(over):
    layer = nn.Conv2d(3, 4, 3, dtype=torch.float64)
    tp.register_tie(layer, "channel_shared", over=over)
    plain = layer(torch.randn(2, 3, 6, 6, dtype=torch.float64)) - layer.bias[:, None, None]
    torch.testing.assert_close(plain, plain[:, :1].expand_as(plain), rtol=1e-12, atol=1e-12)
    assert layer.bias.unique().numel() == 4


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", [CONVOLUTIONS, TRANSPOSED], ids=["conv", "conv_transpose"])
def test_streams_are_filtered_one_by_one_by_the_same_bank(kind, dims):
    streams, filters, size = 4, 3, 3
    layer = kind[dims - 1](
        streams, streams * filters, size, groups=streams, bias=False, dtype=torch.float64
    )
    tp.register_tie(layer, "channel_shared", over="groups")
    bank = free_value(layer).reshape(filters, 1, *[size] * dims)
    if kind is TRANSPOSED:
        convolve, bank = CONVOLVE_TRANSPOSED[dims], bank.transpose(0, 1)
    else:
        convolve = CONVOLVE[dims]
    x = torch.randn(2, streams, *[5] * dims, dtype=torch.float64)
    one_by_one = torch.cat([convolve(x[:, s : s + 1], bank) for s in range(streams)], dim=1)
    torch.testing.assert_close(layer(x), one_by_one, rtol=1e-12, atol=1e-12)


def test_streams_of_several_channels():
    layer = nn.Conv1d(6, 8, 3, groups=2, dtype=torch.float64)
    tp.register_tie(layer, "channel_shared", over="groups")
    bank = free_value(layer).reshape(4, 3, 3)
    x = torch.randn(2, 6, 9, dtype=torch.float64)
    expected = torch.cat([F.conv1d(x[:, :3], bank), F.conv1d(x[:, 3:], bank)], dim=1)
    expected = expected + layer.bias[:, None]
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("over", OVERS)
def test_stock_options_of_the_layer_keep_working(over, mode):
    options = {"padding": 2, "padding_mode": mode, "stride": 2, "dilation": 2, "groups": 2}
    layer = nn.Conv2d(4, 6, 3, **options, dtype=torch.float64)
    plain = nn.Conv2d(4, 6, 3, **options, dtype=torch.float64)
    tp.register_tie(layer, "channel_shared", over=over)
    plain.load_state_dict(tp.dense_state_dict(layer))
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)


def test_gradient_of_a_shared_filter_sums_over_the_channels():
    layer = tp.register_tie(nn.Conv1d(3, 2, 1, bias=False), "channel_shared", over="in")
    layer(torch.tensor([[1.0], [10.0], [100.0]])).mul(torch.tensor([[1.0], [2.0]])).sum().backward()
    assert free_value(layer).grad.flatten().tolist() == [111.0, 222.0]


# The bias -----------------------------------------------------------------------------------


@pytest.mark.parametrize("over", OVERS)
def test_bias_stays_per_output(over):
    layer = nn.Conv1d(4, 6, 3, groups=2)
    bias = layer.bias
    tp.register_tie(layer, "channel_shared", over=over)
    assert layer.bias is bias
    assert bias.shape == (6,)


def test_bias_can_be_tied_as_well():
    layer = nn.Conv1d(4, 6, 3, groups=2)
    mean = layer.bias.detach().double().mean()
    tp.register_tie(layer, "channel_shared", over="groups")
    tp.register_tie(layer, "row_repeat", "bias")
    assert {name for name, _ in layer.named_parameters()} == {
        "parametrizations.weight.original0",
        "parametrizations.bias.original0",
    }
    assert layer.bias.unique().numel() == 1
    assert float(layer.bias.detach()[0]) == pytest.approx(float(mean), rel=1e-6)
    layer(torch.randn(2, 4, 5)).sum().backward()
    assert free_value(layer, "bias").grad.tolist() == [2.0 * 6 * 3]
    tp.remove_tie(layer)
    assert tp.is_tied(layer, "bias")
    assert not tp.is_tied(layer, "weight")
    tp.remove_tie(layer, "bias")
    assert type(layer) is nn.Conv1d


# A fresh layer ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "over", "shrinks_to"),
    [
        (lambda: nn.Conv2d(64, 64, 3), "in", 0.125),
        (lambda: nn.Conv2d(64, 64, 3), "out", 0.125),
        (lambda: nn.Conv1d(256, 1024, 9, groups=256), "groups", 0.0625),
    ],
    ids=["in", "out", "groups"],
)
def test_s37_rescale_keeps_the_standard_deviation_and_projection_shrinks_it(
    build, over, shrinks_to
):
    ratios: dict[str, list[Tensor]] = {"rescale": [], "project": []}
    for init, found in ratios.items():
        for seed in range(40):
            torch.manual_seed(seed)
            layer = build()
            dense = layer.weight.square().mean()
            tp.register_tie(layer, "channel_shared", over=over, init=init)
            found.append(layer.weight.square().mean() / dense)
    assert 0.95 < torch.stack(ratios["rescale"]).mean().sqrt() < 1.05
    projected = torch.stack(ratios["project"]).mean().sqrt()
    assert 0.95 * shrinks_to < projected < 1.05 * shrinks_to


@pytest.mark.parametrize(("over", "kept"), [("in", 1 / 32), ("out", 1 / 16), ("all", 1 / 512)])
def test_residual_of_a_fresh_layer(over, kept):
    layer = nn.Conv2d(32, 16, 5)
    expected = math.sqrt(1 - kept)
    assert tp.residual(layer, "channel_shared", over=over) == pytest.approx(expected, rel=0.01)
    tp.register_tie(layer, "channel_shared", over=over)
    assert tp.residual(layer, "channel_shared", over=over) == 0


def test_complex_weights_have_a_meaning():
    layer = nn.Conv1d(3, 2, 2, dtype=torch.complex64)
    dense = layer.weight.detach().clone()
    tp.register_tie(layer, "channel_shared")
    assert layer.weight.dtype == torch.complex64
    expected = dense.mean(1, keepdim=True).expand_as(dense)
    torch.testing.assert_close(layer.weight.detach().clone(), expected)


# What does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["inputs", "IN", "", None, 3, ("in",), ["in"]], ids=repr)
def test_refuses_an_unknown_over(over):
    assert_refused(
        nn.Conv2d(3, 4, 3),
        "channel_shared",
        "cannot tie 'weight' of Conv2d(3, 4",
        f"over={over!r} is unknown",
        "'in', 'out', 'all', 'groups'",
        error=(tp.TieError, TypeError),
        over=over,
    )


@pytest.mark.parametrize(
    "build",
    [lambda: nn.Conv1d(4, 4, 3), lambda: nn.Linear(4, 4), lambda: nn.ConvTranspose1d(2, 2, 1)],
    ids=layer_id,
)
def test_refuses_streams_without_groups(build):
    assert_refused(
        build(),
        "channel_shared",
        "this layer has groups=1",
        "Build the layer with groups=, or use over='in'",
        over="groups",
    )


@pytest.mark.parametrize(
    ("over", "advice"),
    [
        ("in", "Tie a weight; every output has a filter of its own here, and a bias too."),
        ("out", "To give all outputs one bias, as they have one filter, use 'row_repeat'."),
        ("all", "To give all outputs one bias, as they have one filter, use 'row_repeat'."),
        ("groups", "use 'repeat', outputs=2, order='tile'."),
    ],
)
def test_refuses_tensors_without_channels(over, advice):
    assert_refused(
        nn.Conv1d(4, 4, 3, groups=2),
        "channel_shared",
        "no input channels",
        advice,
        tensor_name="bias",
        over=over,
    )


@pytest.mark.feature("Layers", "the bias of streams follows their filters (`repeat`)")
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_the_advice_for_the_bias_of_streams_gives_the_pattern_of_the_filters(kind):
    conv = kind(4, 8, 3, groups=4)
    tp.register_tie(conv, "channel_shared", over="groups")
    with pytest.raises(tp.TieError) as caught:
        tp.register_tie(conv, "channel_shared", "bias", over="groups")
    rule, *options = re.search(r"use '(\w+)', (.*)\.$", str(caught.value)).groups()
    (options,) = options
    chosen = {
        key: int(value) if value.isdecimal() else value.strip("'")
        for key, value in (option.split("=") for option in options.split(", "))
    }
    assert (rule, chosen) == ("repeat", {"outputs": 4, "order": "tile"})
    tp.register_tie(conv, rule, "bias", **chosen)
    assert tp.get_tie(conv, "bias").orbit_labels().tolist() == [1, 2, 1, 2, 1, 2, 1, 2]
    weight = tp.get_tie(conv).bound_layout.canonical(conv.weight.detach().clone())
    for one in range(8):
        for other in range(8):  # outputs have one filter exactly if they have one bias
            same = bool(torch.equal(weight[one], weight[other]))
            assert same == bool(conv.bias[one] == conv.bias[other])


def test_the_advice_for_a_bias_without_groups_names_no_law_that_repeats_nothing():
    assert_refused(
        nn.Conv1d(4, 4, 3), "channel_shared", "has groups=1", tensor_name="bias", over="groups"
    )


def test_the_law_of_streams_does_not_call_an_index_by_the_name_of_the_number_of_groups():
    law = tp.get_tie(
        tp.register_tie(nn.Conv1d(4, 8, 3, groups=4), "channel_shared", over="groups")
    ).law
    assert "g" not in law
    assert "``k`` counts the groups" in tp.available_rules()["channel_shared"].__doc__


def test_refuses_unknown_options():
    message = assert_refused(nn.Conv1d(4, 4, 3), "channel_shared", error=TypeError, groups=2)
    assert "channel_shared" in message
    assert "groups" in message


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_refuses_integers(dtype):
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.ones(3, 3).to(dtype), requires_grad=False)
    assert_refused(layer, "channel_shared", f"no meaning for {dtype}", "Convert the layer first")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_refuses_empty_weights():
    assert_refused(nn.Linear(0, 3), "channel_shared", "(3, 0) is empty")
