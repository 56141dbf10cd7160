"""row_repeat: ``W[o] = w[o // (out/groups)]`` by loops, literal matrices and gradients."""

from __future__ import annotations

import copy
import math
import re

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tiedparam as tp
from tests.support.cases import COMPUTE, DTYPES, assert_refused, canonical_entries, layer_id
from tests.support.tensors import stored, with_weight

KINDS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def assert_rows_repeat(layer: nn.Module, groups: int, tensor_name: str = "weight") -> None:
    """The law by loops: every row is the first row of its block."""
    entries = canonical_entries(layer, tensor_name)
    outputs = max(index[0] for index in entries) + 1
    size = outputs // groups
    for (output, *rest), value in entries.items():
        assert value == entries[(output // size * size, *rest)]


@st.composite
def layers_and_groups(draw: st.DrawFn) -> tuple[nn.Module, int]:
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 100)))
    own_groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    outputs = own_groups * per_group
    groups = draw(st.sampled_from([n for n in range(1, outputs + 1) if outputs % n == 0]))
    inputs = own_groups * draw(st.integers(1, 3))
    dims = draw(st.integers(0, 3))
    if dims == 0:
        return nn.Linear(inputs, outputs, dtype=dtype), groups
    kernel = tuple(draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims)))
    kind = KINDS[dims - 1 + (3 if draw(st.booleans()) else 0)]
    return kind(inputs, outputs, kernel, groups=own_groups, dtype=dtype), groups


@pytest.mark.filterwarnings("ignore:the tie of .* frees nothing")  # some draws do
@given(layers_and_groups())
def test_law_by_loops_and_closed_form_count(drawn):
    layer, groups = drawn
    dense = canonical_entries(layer)
    outputs = max(index[0] for index in dense) + 1
    tp.register_tie(layer, "row_repeat", groups=groups)
    assert_rows_repeat(layer, groups)
    assert stored(layer) == groups * len(dense) // outputs
    size = outputs // groups
    eps = torch.finfo(layer.weight.dtype).eps
    for (output, *rest), value in canonical_entries(layer).items():
        block = range(output // size * size, output // size * size + size)
        mean = sum(dense[(row, *rest)] for row in block) / size
        assert value == pytest.approx(mean, rel=eps, abs=2 * eps)


@pytest.mark.filterwarnings("ignore:the tie of .* frees nothing")  # some draws do
@given(layers_and_groups())
def test_lawful_weights_are_accepted_to_the_bit(drawn):
    layer, groups = drawn
    tp.register_tie(layer, "row_repeat", groups=groups)
    lawful = layer.weight.detach().clone()
    tp.remove_tie(layer)
    tp.register_tie(layer, "row_repeat", groups=groups, init="exact")
    assert torch.equal(layer.weight, lawful)


# Literal matrices ---------------------------------------------------------------------------


def test_literal_2x2_matrix():
    layer = with_weight(nn.Linear(2, 2), [[1.0, 2.0], [3.0, 6.0]])
    tp.register_tie(layer, "row_repeat")
    assert layer.weight.tolist() == [[2.0, 4.0], [2.0, 4.0]]
    assert layer.parametrizations.weight.original0.tolist() == [[2.0, 4.0]]


def test_literal_3x3_matrix():
    layer = with_weight(nn.Linear(3, 3), [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    tp.register_tie(layer, "row_repeat")
    assert layer.weight.tolist() == [[4.0, 5.0, 6.0]] * 3


def test_literal_blocks_of_rows():
    weight = [[1.0, 2.0], [3.0, 4.0], [10.0, 20.0], [30.0, 40.0]]
    layer = tp.register_tie(with_weight(nn.Linear(2, 4), weight), "row_repeat", groups=2)
    assert layer.weight.tolist() == [[2.0, 3.0], [2.0, 3.0], [20.0, 30.0], [20.0, 30.0]]


def test_literal_bias():
    layer = with_weight(nn.Linear(2, 4), [1.0, 3.0, 10.0, 30.0], "bias")
    tp.register_tie(layer, "row_repeat", "bias", groups=2)
    assert layer.bias.tolist() == [2.0, 2.0, 20.0, 20.0]
    assert stored(layer, "bias") == 2
    assert not tp.is_tied(layer, "weight")


def test_literal_transposed_convolution_repeats_outputs_not_inputs():
    # stored as (in, out, 1): output o of input i reads [i][o]
    layer = with_weight(nn.ConvTranspose1d(2, 3, 1), [[[1.0], [2.0], [6.0]], [[0.0], [3.0], [6.0]]])
    tp.register_tie(layer, "row_repeat")
    assert layer.weight.tolist() == [[[3.0], [3.0], [3.0]], [[3.0], [3.0], [3.0]]]
    layer = with_weight(nn.ConvTranspose1d(2, 3, 1), [[[1.0], [2.0], [6.0]], [[0.0], [0.0], [6.0]]])
    tp.register_tie(layer, "row_repeat")
    assert layer.weight.tolist() == [[[3.0], [3.0], [3.0]], [[2.0], [2.0], [2.0]]]


def test_literal_blocks_are_independent_of_the_convolutions_groups():
    # two groups of two outputs each; three rows cannot be cut so, four blocks can
    layer = nn.Conv1d(2, 6, 1, groups=2)
    with_weight(layer, [[[1.0]], [[3.0]], [[5.0]], [[7.0]], [[9.0]], [[11.0]]])
    tp.register_tie(layer, "row_repeat", groups=3)
    assert layer.weight.flatten().tolist() == [2.0, 2.0, 6.0, 6.0, 10.0, 10.0]


def test_literal_embedding_and_norm():
    layer = with_weight(nn.Embedding(4, 1), [[1.0], [3.0], [5.0], [7.0]])
    tp.register_tie(layer, "row_repeat", groups=2)
    assert layer(torch.tensor([0, 1, 2, 3])).flatten().tolist() == [2.0, 2.0, 6.0, 6.0]
    norm = tp.register_tie(with_weight(nn.LayerNorm(3), [1.0, 2.0, 6.0]), "row_repeat")
    assert norm.weight.tolist() == [3.0, 3.0, 3.0]


# Counts, gradients, compute -----------------------------------------------------------------


def test_one_value_per_input_is_stored_to_the_byte():
    layer = tp.register_tie(nn.Linear(512, 1024, bias=False), "row_repeat")
    assert stored(layer) == 512
    (free,) = layer.parameters()
    assert free.untyped_storage().nbytes() == 4 * 512
    saved = safetensors.torch.save(layer.state_dict())
    assert len(saved) - 8 - int.from_bytes(saved[:8], "little") == 4 * 512


def test_four_outputs_give_four_times_the_gradient():
    layer = tp.register_tie(nn.Linear(3, 4, bias=False), "row_repeat")
    layer(torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    (free,) = layer.parameters()
    assert free.grad.tolist() == [[4.0, 8.0, 12.0]]
    (counts,) = tp.get_tie(layer).multiplicities()
    assert counts.flatten().tolist() == [4.0, 4.0, 4.0]


def test_gradient_is_the_sum_of_unequal_outputs():
    layer = tp.register_tie(nn.Linear(3, 4, bias=False), "row_repeat", groups=2)
    output = layer(torch.tensor([1.0, 2.0, 3.0]))
    (output * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    (free,) = layer.parameters()
    assert free.grad.tolist() == [[11.0, 22.0, 33.0], [1100.0, 2200.0, 3300.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_outputs_share_one_dot_product(dtype):
    layer = tp.register_tie(nn.Linear(6, 5, dtype=dtype), "row_repeat")
    (row,) = layer.parametrizations.weight.parameters()
    x = torch.randn(3, 6).to(dtype)
    once = x @ row[0]
    torch.testing.assert_close(layer(x), once[:, None] + layer.bias, **COMPUTE[dtype])


def test_bias_stays_one_per_output():
    layer = nn.Linear(3, 4)
    bias = layer.bias
    tp.register_tie(layer, "row_repeat")
    assert layer.bias is bias
    layer(torch.ones(3)).mul(torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert bias.grad.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_s26b_attention_input_projection():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    tp.register_tie(attention, "row_repeat", "in_proj_weight", groups=3)  # q, k and v
    assert stored(attention, "in_proj_weight") == 3 * 4
    assert_rows_repeat(attention, 3, "in_proj_weight")
    plain = nn.MultiheadAttention(4, 2, batch_first=True)
    plain.load_state_dict(tp.dense_state_dict(attention))
    x = torch.randn(2, 5, 4)
    for training in (True, False):
        attention.train(training)
        plain.train(training)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(attention(x, x, x)[0], plain(x, x, x)[0])


def test_complex_weights_have_a_meaning():
    layer = tp.register_tie(nn.Linear(3, 4, dtype=torch.complex64), "row_repeat")
    assert layer.weight.dtype == torch.complex64
    assert layer.weight.is_complex()
    assert layer.weight.imag.abs().max() > 0
    assert_rows_repeat(layer, 1)


def test_s37_rescale_keeps_the_standard_deviation_and_projection_shrinks_it():
    ratios: dict[str, list[Tensor]] = {"rescale": [], "project": []}
    for init, found in ratios.items():
        for seed in range(10):
            torch.manual_seed(seed)
            layer = nn.Linear(512, 512)
            dense = layer.weight.std()
            tp.register_tie(layer, "row_repeat", init=init)
            found.append(layer.weight.std() / dense)
    assert 0.95 < torch.stack(ratios["rescale"]).mean() < 1.05
    assert 0.042 < torch.stack(ratios["project"]).mean() < 0.046  # 1/sqrt(512)


@pytest.mark.parametrize("groups", [1, 4, 64])
def test_residual_of_a_fresh_layer(groups):
    layer = nn.Linear(300, 256)
    expected = math.sqrt(1 - groups / 256)
    assert tp.residual(layer, "row_repeat", groups=groups) == pytest.approx(expected, rel=0.02)
    tp.register_tie(layer, "row_repeat", groups=groups)
    assert tp.residual(layer, "row_repeat", groups=groups) == 0


# What does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "groups"),
    [
        (lambda: nn.Linear(5, 4), 3),
        (lambda: nn.Linear(5, 4), 8),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), 4),
        (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), 3),
    ],
    ids=layer_id,
)
def test_refuses_groups_that_do_not_divide(build, groups):
    layer = build()
    outputs = getattr(layer, "out_features", None) or layer.out_channels
    assert_refused(
        layer,
        "row_repeat",
        "cannot tie 'weight' of",
        type(layer).__name__,
        f"the {outputs} rows cannot be cut into groups={groups} equal blocks",
        f"Choose a divisor of {outputs}",
        groups=groups,
    )


@pytest.mark.parametrize("groups", [0, -1, True, 2.0, "2", None, [2]], ids=repr)
def test_refuses_groups_that_are_no_positive_integer(groups):
    assert_refused(
        nn.Linear(4, 4),
        "row_repeat",
        f"groups must be a positive integer, not {groups!r}",
        error=(tp.TieError, TypeError),
        groups=groups,
    )


def test_refuses_unknown_options():
    message = assert_refused(nn.Linear(4, 4), "row_repeat", error=TypeError, over="in")
    assert "row_repeat" in message
    assert "over" in message


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_refuses_integers(dtype):
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.ones(3, 3).to(dtype), requires_grad=False)
    assert_refused(layer, "row_repeat", f"no meaning for {dtype}", "Convert the layer first")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_refuses_empty_weights():
    layer = nn.Linear(0, 3)
    assert_refused(layer, "row_repeat", "(3, 0) is empty", "Tie a layer that has weights")


def test_refuses_scalars():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

    assert_refused(Scale(), "row_repeat", "without axes has no rows", "Tie a weight or a bias")


def test_the_mean_of_large_opposite_values_does_not_overflow():
    most = 1.5 * 2.0**127
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[most, most], [-most, most]]))
    rule = tp.get_tie(tp.register_tie(copy.deepcopy(layer), "row_repeat"))
    expected = torch.tensor([[0.0, most], [0.0, most]])
    assert torch.equal(rule.project(layer.weight), expected)
    (generic,) = tp.Rule.right_inverse(rule, layer.weight)
    assert torch.equal(generic, expected[:1])


# Values that are assigned --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "call"),
    [
        (torch.tensor([1.0, 2.0, 3.0]), r"tiedparam\.assign_\(layer, (value\.expand\(4, 3\))\)"),
        (torch.tensor([[1.0, 2.0, 3.0]]), r"assign_\(layer, (value\.expand\(4, 3\))\)"),
        (torch.tensor(2.0), r"assign_\(layer, (value\.expand\(4, 3\))\)"),
        (
            torch.tensor([1.0, 2.0, 3.0]).double(),
            r"assign_\(layer, (value\.to\(torch\.float32\)\.expand\(4, 3\))\)",
        ),
        (torch.ones(4, 3).double(), r"Convert the value first: (value\.to\(torch\.float32\))\."),
    ],
    ids=["a vector", "a row", "a number", "a vector of another type", "another type"],
)
def test_a_vector_that_is_assigned_shows_the_call_that_was_meant(value, call):
    layer = tp.register_tie(nn.Linear(3, 4), "row_repeat")
    before = layer.weight.detach().clone()
    with pytest.raises(tp.TieError, match=call) as caught:
        tp.assign_(layer, value)
    assert torch.equal(layer.weight, before)
    said = re.search(call, str(caught.value))[1]
    tp.assign_(layer, eval(said, {"value": value, "torch": torch}))
    assert torch.equal(layer.weight, value.to(torch.float32).expand(4, 3))
    with pytest.raises(tp.TieError, match=call):
        layer.weight = value


def test_free_values_that_are_assigned_show_where_they_go():
    layer = tp.register_tie(nn.Linear(3, 4), "row_repeat", groups=2)
    rows = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    with pytest.raises(tp.TieError, match=r"call (tiedparam\..*)\.$") as caught:
        tp.assign_(layer, rows)
    call = re.search(r"call (tiedparam\..*)\.$", str(caught.value))[1]
    eval(call, {"tiedparam": tp, "layer": layer, "value": rows})
    assert torch.equal(layer.weight, rows.repeat_interleave(2, 0))


def test_values_that_are_nothing_like_the_weight():
    layer = tp.register_tie(nn.Linear(3, 4), "row_repeat")
    for value in (torch.ones(4), torch.ones(2, 4, 3), torch.ones(3, 4)):
        with pytest.raises(tp.TieError, match=r"cannot assign .* Convert the value first\.$"):
            tp.assign_(layer, value)
