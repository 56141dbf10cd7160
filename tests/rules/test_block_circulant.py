"""block_circulant: by scipy block by block, by PEFT's C3A, counts and refusals."""

from __future__ import annotations

import copy

import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tiedparam as tp
from tests.support import computing_of
from tests.support.cases import DTYPES, assert_refused, same_bits
from tests.support.tensors import free_value, stored


def by_blocks(rows_of_blocks: Tensor, block: int) -> Tensor:
    """The matrix by scipy, from the first row of each block."""
    height, width = rows_of_blocks.shape[0], rows_of_blocks.shape[1] // block
    matrix = torch.empty(height * block, width * block, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            row = rows_of_blocks[i, j * block : (j + 1) * block].double().numpy()
            column = [row[-k] for k in range(block)]
            part = torch.from_numpy(scipy.linalg.circulant(column))
            assert part[0].tolist() == row.tolist()
            matrix[i * block : (i + 1) * block, j * block : (j + 1) * block] = part
    return matrix


@st.composite
def layers_and_blocks(draw: st.DrawFn) -> tuple[nn.Module, int]:
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 100)))
    block, height, width = draw(st.integers(2, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kind = draw(st.sampled_from([nn.Linear, nn.Embedding]))
    return kind(height * block, width * block, dtype=dtype), block


@given(layers_and_blocks())
def test_the_weight_is_scipys_and_the_values_are_means(drawn):
    layer, block = drawn
    dense = layer.weight.detach().double()
    tp.register_tie(layer, "block_circulant", block=block)
    weight, free = layer.weight.detach(), free_value(layer).detach()
    rows, columns = weight.shape
    assert free.shape == (rows // block, columns)
    assert stored(layer) == rows * columns // block
    assert torch.equal(weight.double(), by_blocks(free, block))
    eps = torch.finfo(weight.dtype).eps
    for i in range(0, rows, block):
        for j in range(0, columns, block):
            for shift in range(block):
                tied = [float(dense[i + r, j + (r + shift) % block]) for r in range(block)]
                mean = pytest.approx(sum(tied) / block, rel=2 * eps, abs=2 * eps)
                assert float(free[i // block, j + shift]) == mean


@given(layers_and_blocks())
def test_lawful_weights_are_accepted_to_the_bit(drawn):
    layer, block = drawn
    tp.register_tie(layer, "block_circulant", block=block)
    lawful = layer.weight.detach().clone()
    tp.register_tie(tp.remove_tie(layer), "block_circulant", block=block, init="exact")
    assert same_bits(layer.weight.detach(), lawful)


def test_one_block_is_circulant_and_blocks_of_one_are_free():
    one, other = nn.Linear(7, 7), nn.Linear(7, 7)
    other.load_state_dict(one.state_dict())
    tp.register_tie(one, "block_circulant", block=7)
    tp.register_tie(other, "circulant")
    torch.testing.assert_close(one.weight, other.weight)
    first_column = free_value(one)[0, [0, 6, 5, 4, 3, 2, 1]]
    torch.testing.assert_close(first_column, free_value(other)[0])
    free = nn.Linear(4, 6)
    with pytest.warns(tp.TieWarning, match="frees nothing"):
        tp.register_tie(free, "block_circulant", block=1)
    assert stored(free) == 24


def test_the_kernel_of_c3a_is_the_free_value():
    c3a = pytest.importorskip("peft.tuners.c3a.utils")
    layer = nn.Linear(12, 8, bias=False)
    tp.register_tie(layer, "block_circulant", block=4)
    kernel = free_value(layer).detach().view(2, 3, 4)
    torch.testing.assert_close(layer.weight, c3a.get_circulant_fast(kernel))
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), c3a.BlockCircularConvolution.apply(x, kernel))


def test_the_gradient_is_the_sum_and_each_turn_of_a_block_is_passed_on():
    layer = nn.Linear(256, 192, bias=False, dtype=torch.float64)
    tp.register_tie(layer, "block_circulant", block=32)
    assert stored(layer) == 256 * 192 // 32
    cotangent = torch.randn(192, 256, dtype=torch.float64)
    layer.weight.backward(cotangent)
    blocks = cotangent.reshape(6, 32, 8, 32)
    expected = sum(blocks[:, r].roll(-r, 2) for r in range(32)).reshape(6, 256)
    torch.testing.assert_close(free_value(layer).grad, expected, rtol=1e-12, atol=1e-12)
    x = torch.randn(3, 8, 32, dtype=torch.float64)
    turned = layer(x.roll(5, 2).flatten(1)).reshape(3, 6, 32)
    expected = layer(x.flatten(1)).reshape(3, 6, 32).roll(5, 2)
    torch.testing.assert_close(turned, expected, rtol=1e-12, atol=1e-12)


def test_a_matrix_that_is_stored_the_other_way_round():
    rule = tp.available_rules()["block_circulant"](block=2)
    assert rule.bind(tp.Layout((4, 6), transposed=True), torch.float64) is None  # 6 outputs
    weight = rule(torch.randn(rule.free_shapes()[0], dtype=torch.float64))
    assert weight.shape == (4, 6)
    first_rows = weight.t()[::2]
    assert torch.equal(weight.t(), by_blocks(first_rows, 2))
    assert rule.free_count == 12


def test_a_file_holds_the_values_and_the_option(tmp_path):
    layer = tp.register_tie(nn.Linear(6, 4), "block_circulant", block=2)
    tp.save(layer, tmp_path / "layer.safetensors")
    other = tp.load(tmp_path / "layer.safetensors", nn.Linear(6, 4))
    assert same_bits(other.weight.detach(), layer.weight.detach())
    assert str(tp.get_tie(other)) == "block_circulant(block=2)"


# What does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize("block", [4, 5, 12])
def test_refuses_what_does_not_divide(block):
    assert_refused(
        nn.Linear(6, 9), "block_circulant", "9 outputs and 6 inputs", f"block={block}",
        "Choose a divisor of 3", block=block,
    )  # fmt: skip


@pytest.mark.parametrize("block", [0, -2, True, 2.0, "2", None, [2]], ids=repr)
def test_refuses_what_is_no_positive_integer(block):
    assert_refused(
        nn.Linear(4, 4), "block_circulant", f"block must be a positive integer, not {block!r}",
        block=block,
    )  # fmt: skip


def test_refuses_what_is_not_a_matrix():
    conv = nn.Conv2d(4, 4, 3)
    assert_refused(conv, "block_circulant", "the tensor (4, 4, 3, 3) has 4 axes", block=2)
    assert_refused(nn.Linear(4, 4), "block_circulant", "has 1 axis", tensor_name="bias", block=2)


def test_blocks_of_one_entry_are_the_dense_layer():
    torch.manual_seed(0)
    dense = nn.Linear(6, 4)
    tied = tp.register_tie(copy.deepcopy(dense), "block_circulant", block=1, cache=False)
    assert computing_of(tied) is None  # nothing is transformed
    assert tp.get_tie(tied).free_count == 24
    assert torch.equal(tied.weight, dense.weight)
    x = torch.randn(3, 6)
    assert torch.equal(tied(x), dense(x))
    with pytest.raises(tp.TieError, match="compute='fft' is not a form"):
        tp.register_tie(copy.deepcopy(dense), "block_circulant", block=1, compute="fft")
