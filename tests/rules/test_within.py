"""A law on a part of a tensor: by slices of the dense weight, in every kind of layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.cases import COMPUTE, assert_refused, assert_satisfies
from tests.support.tensors import stored
from tiedparam.rules import FlipSym, Joint, Within

HEADS = 4


def square_and_rest(tensor, rows, columns=slice(None)):
    """Whether a part is symmetric; and the rest."""
    part, rest = tensor[rows, columns], tensor.clone()
    rest[rows, columns] = 0
    return torch.equal(part, part.t()), rest


# What it ties --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (slice(0, 4), None),
        (slice(3, 7), None),
        (slice(-4, None), None),
        (None, slice(0, 9)),
        (slice(2, 5), slice(1, 4)),
        (slice(None, 3), slice(-3, None)),
        ([1, 3], (0, 2)),
        ([5, None], None),
        (slice(0, 9, 1), slice(0, 9)),
    ],
)
def test_a_block_is_lawful_and_the_rest_stays(rows, columns):
    height = 9
    width = 4 if columns is None else 9
    layer = nn.Linear(width, height, dtype=torch.float64)
    before = layer.weight.detach().clone()
    tp.register_tie(layer, "flip_sym", rows=rows, columns=columns)
    wanted = [slice(None) if r is None else r if isinstance(r, slice) else slice(*r)
              for r in (rows, columns)]  # fmt: skip
    lawful, rest = square_and_rest(layer.weight.detach(), *wanted)
    part = before[wanted[0], wanted[1]]
    assert lawful
    assert torch.equal(rest, square_and_rest(before, *wanted)[1])
    torch.testing.assert_close(
        layer.weight.detach()[wanted[0], wanted[1]], (part + part.t()) / 2, rtol=0, atol=1e-15
    )
    n = len(part)
    assert stored(layer) == n * (n + 1) // 2 + height * width - n * n
    # what is free is not decayed, moved or averaged with the law
    for counts, free in zip(tp.get_tie(layer).multiplicities(),
                            layer.parametrizations.weight.parameters(), strict=True):  # fmt: skip
        assert counts.shape == free.shape


def test_it_is_bound_to_numbers_counted_from_zero():
    layer = tp.register_tie(nn.Linear(4, 12), "flip_sym", rows=slice(-4, None))
    rule = tp.get_tie(layer)
    assert (rule.rows, rule.columns) == (slice(8, 12), None)
    assert str(rule) == "within(inner='flip_sym', rows=[8, 12])"


def test_labels_number_the_law_first_and_then_the_rest():
    labels = tp.get_tie(tp.register_tie(nn.Linear(2, 4), "flip_sym", rows=slice(1, 3)))
    found = labels.orbit_labels()
    assert torch.equal(found[1:3], found[1:3].t())
    assert found[1:3].unique().tolist() == [1, 2, 3]
    assert found[[0, 3]].tolist() == [[4, 5], [6, 7]]
    assert labels.derived_labels().tolist() == [[1, 2], [3, 4], [4, 5], [6, 7]]


def test_free_values_of_a_channels_last_weight_are_contiguous():
    layer = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    tp.register_tie(layer, "flip_sym", rows=slice(0, 2), columns=slice(0, 2))
    assert all(free.is_contiguous() for free in layer.parametrizations.weight.parameters())


def test_vectors():
    layer = nn.Linear(2, 8)
    before = layer.bias.detach().clone()
    tp.register_tie(layer, "repeat", "bias", outputs=2, rows=slice(2, 6))
    means = before[2:6].view(2, 2).mean(1).repeat_interleave(2)
    torch.testing.assert_close(layer.bias[2:6].detach(), means)
    assert torch.equal(layer.bias[:2], before[:2])
    assert torch.equal(layer.bias[6:], before[6:])
    assert stored(layer, "bias") == 6


def test_the_bias_of_a_grouped_layer_is_cut_by_groups():
    conv = nn.Conv1d(8, 8, 3, groups=4)
    tp.register_tie(conv, "channel_shared", "weight", over="groups", rows=slice(2, 8))
    tp.register_tie(conv, "repeat", "bias", outputs=3, order="tile", rows=slice(2, 8))
    for tensor in (conv.weight, conv.bias):
        assert torch.equal(tensor[2:4], tensor[4:6])
        assert torch.equal(tensor[2:4], tensor[6:8])
        assert not torch.equal(tensor[:2], tensor[2:4])
    assert tp.get_tie(conv, "bias").inner.bound_layout.layer_groups == 3


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_rows_are_outputs_and_columns_inputs_of_a_group(kind, groups):
    layer = kind(12, 12, 3, groups=groups)
    layout = tp.Layout.of(layer, "weight", tuple(layer.weight.shape))
    before = layout.canonical(layer.weight.detach()).clone()
    tp.register_tie(layer, "flip_sym", rows=slice(1, 4), columns=slice(2, 5))
    after = layout.canonical(layer.weight.detach())
    block = after[1:4, 2:5]
    assert torch.equal(block, block.transpose(0, 1).flip(2))
    changed = after != before
    changed[1:4, 2:5] = False
    assert not changed.any()
    assert_satisfies(tp.get_tie(layer), layer.weight.detach())


def test_whole_groups_are_a_grouped_part():
    for kind in (nn.Conv1d, nn.ConvTranspose1d):
        layer = tp.register_tie(kind(12, 12, 3, groups=4), "flip_sym", rows=slice(3, 9))
        layout = tp.get_tie(layer).bound_layout
        canonical = layout.canonical(layer.weight.detach())
        for start in (3, 6):
            block = canonical[start : start + 3]
            assert torch.equal(block, block.transpose(0, 1).flip(2))
        assert tp.get_tie(layer).inner.bound_layout.groups == 2
        assert stored(layer) == 2 * (3 * 3 * 3 + 3) // 2 + 2 * 3 * 3 * 3


def test_gpt2_stores_its_inputs_first():
    transformers = pytest.importorskip("transformers")
    layer = transformers.pytorch_utils.Conv1D(3 * HEADS, HEADS)  # (inputs, outputs)
    before = layer.weight.detach().clone()
    tp.register_tie(layer, "flip_sym", rows=slice(HEADS, 2 * HEADS))
    keys = layer.weight[:, HEADS : 2 * HEADS].detach()
    assert torch.equal(keys, keys.t())
    assert torch.equal(layer.weight[:, :HEADS], before[:, :HEADS])
    assert torch.equal(layer.weight[:, 2 * HEADS :], before[:, 2 * HEADS :])


def test_fused_queries_keys_and_values():
    attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    laws = [
        ("flip_sym", {"rows": slice(0, 8)}),
        ("row_repeat", {"groups": 2, "rows": slice(8, 16)}),
    ]
    tp.register_tie(attention, laws, "in_proj_weight")
    queries, keys, _ = attention.in_proj_weight.detach().chunk(3)
    assert torch.equal(queries, queries.t())
    assert torch.equal(keys, keys[::4].repeat_interleave(4, 0))
    assert stored(attention, "in_proj_weight") == 8 * 9 // 2 + 2 * 8 + 8 * 8
    dense = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    dense.load_state_dict(tp.dense_state_dict(attention))
    inputs = torch.randn(3, 5, 8, dtype=torch.float64)
    for ours, theirs in zip(attention(*[inputs] * 3), dense(*[inputs] * 3), strict=True):
        torch.testing.assert_close(ours, theirs, **COMPUTE[torch.float64])
    optimizer = torch.optim.SGD(attention.parameters(), lr=0.1)
    attention(*[inputs] * 3)[0].square().sum().backward()
    optimizer.step()
    queries = attention.in_proj_weight[:8].detach()
    assert torch.equal(queries, queries.t())


def test_overlapping_parts_hold_together():
    layer = tp.register_tie(
        nn.Linear(4, 6), [("flip_sym", {"rows": slice(0, 4)}), ("flip_sym", {"rows": slice(2, 6)})]
    )
    weight = layer.weight.detach()
    for part in (weight[:4], weight[2:]):
        assert torch.equal(part, part.t())
    assert isinstance(tp.get_tie(layer), Joint)


def test_laws_together_on_a_part():
    layer = nn.Linear(4, 8)
    tp.register_tie(layer, ["flip_sym", ("repeat", {"outputs": 2})], rows=slice(0, 4))
    part = layer.weight[:4].detach()
    assert torch.equal(part, part.t())
    assert torch.equal(part, part[::2].repeat_interleave(2, 0))
    assert stored(layer) == 3 + 16
    again = nn.Linear(4, 8)
    pair = (["flip_sym", ("repeat", {"outputs": 2})], {"rows": slice(0, 4)})
    tp.register_tie(again, pair)
    assert str(tp.get_tie(again)) == str(tp.get_tie(layer))


def test_nothing_may_be_left_of_a_part():
    class Skew(FlipSym):
        law = "W = −Wᵀ"

        def symmetries(self, weight):
            yield -weight.t()

    meta = tp.register_tie(nn.Linear(4, 6, device="meta"), ["flip_sym", Skew], rows=slice(0, 4))
    assert meta.weight.is_meta
    layer = tp.register_tie(nn.Linear(4, 6), ["flip_sym", Skew], rows=slice(0, 4))
    assert not layer.double().weight[:4].any()
    assert layer.weight.dtype == torch.float64
    assert stored(layer) == 8


def test_an_instance_ties_elsewhere_after_a_look():
    rule, layer = FlipSym(), nn.Linear(4, 8)
    assert 0 < tp.residual(layer, rule, rows=slice(0, 4)) < 1
    tp.register_tie(layer, rule, rows=slice(0, 4))
    assert rule.layout is None
    copied = copy.deepcopy(layer)
    assert torch.equal(copied.weight, layer.weight)


def test_a_law_with_an_option_of_that_name_keeps_it():
    class Top(tp.Rule):
        law = "W[o] = w, o < rows"

        def __init__(self, rows):
            super().__init__()
            self.count = rows

        def options(self):
            return {"rows": self.count}

        def free_shapes(self):
            return ((1, *self.bound_layout.shape[1:]), (self.bound_layout.shape[0] - self.count,
                                                        *self.bound_layout.shape[1:]))  # fmt: skip

        def forward(self, top, rest):
            return torch.cat([top.expand(self.count, -1), rest])

        def symmetries(self, weight):
            yield torch.cat([weight[: self.count].roll(1, 0), weight[self.count :]])

    layer = tp.register_tie(nn.Linear(3, 5), Top, rows=2)
    assert isinstance(tp.get_tie(layer), Top)
    assert torch.equal(layer.weight[0], layer.weight[1])


# Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rows": slice(0, 9)}, ["rows 0:9", "beyond the 8", "from 0 to 8"]),
        ({"rows": slice(-9, None)}, ["rows -9:", "beyond the 8"]),
        ({"rows": slice(4, 4)}, ["rows 4:4 of 8 are none"]),
        ({"rows": slice(5, 2)}, ["rows 5:2 of 8 are none"]),
        ({"columns": slice(0, 5)}, ["columns 0:5", "beyond the 4"]),
        ({"rows": slice(0, 8, 2)}, ["rows 0:8:2", "step is 2"]),
        ({"rows": slice(None, None, -1)}, ["step is -1"]),
        ({"rows": slice(0, 3)}, ["in rows 0:3, of shape (3, 4)", "(3)", "(4)", "square layer"]),
    ],
)
def test_what_is_no_part_is_told_by_numbers(options, said):
    assert_refused(nn.Linear(4, 8), "flip_sym", *said, **options)


def test_parts_across_groups_are_refused():
    assert_refused(nn.Conv1d(8, 8, 3, groups=4), "row_repeat", "rows 1:3", "2 outputs", "groups",
                   rows=slice(1, 3))  # fmt: skip
    assert_refused(nn.ConvTranspose1d(8, 8, 3, groups=4), "row_repeat", "columns 0:1", "2 groups",
                   rows=slice(0, 4), columns=slice(0, 1))  # fmt: skip


def test_vectors_have_no_columns():
    assert_refused(nn.Linear(2, 4), "row_repeat", "a vector of 4 has no columns",
                   tensor_name="bias", columns=slice(0, 2))  # fmt: skip


def test_copies_of_a_part_are_refused():
    assert_refused(nn.Linear(4, 4), "copy", "reads another layer", "fn= make all of it",
                   source=nn.Linear(4, 4), rows=slice(0, 2))  # fmt: skip


@pytest.mark.parametrize("given", [3, "0:4", slice("a", "b"), [1, 2, 3], [0.0, 2.0], range(4)])
def test_what_is_no_range_is_a_type_error(given):
    with pytest.raises(TypeError, match="rows= takes a slice, such as"):
        tp.register_tie(nn.Linear(4, 8), "flip_sym", rows=given)


def test_complex_weights_are_refused_as_the_law_does():
    message = assert_refused(
        nn.Linear(4, 8).to(torch.complex64), "flip_sym", "complex64", rows=slice(0, 4)
    )
    assert "of shape" not in message  # what is wrong is not the part
    layer = tp.register_tie(nn.Linear(4, 8).to(torch.complex64),
                            ("repeat", {"outputs": 2}), rows=slice(0, 4))  # fmt: skip
    assert isinstance(tp.get_tie(layer), Within)
