"""masked: torch's triangles, blocks and a grouped convolution, loops, and masks of users."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support import computing_of
from tests.support.cases import COMPUTE, DTYPES, assert_refused, canonical_entries
from tests.support.tensors import free_value, with_weight


def masked_weight(layer: nn.Module, **options) -> tuple[torch.Tensor, torch.Tensor]:
    dense = layer.weight.detach().clone()
    tp.register_tie(layer, "masked", **options)
    return layer.weight.detach().clone(), dense


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3)])
def test_triangles_are_those_of_torch(shape, dtype):
    for pattern, of_torch in (("lower", torch.tril), ("upper", torch.triu)):
        layer = nn.Linear(shape[1], shape[0], dtype=dtype)
        weight, dense = masked_weight(layer, pattern=pattern)
        assert torch.equal(weight, of_torch(dense))
        assert not weight[weight == 0].signbit().any()


def test_blocks_are_torchs_block_diagonal():
    weight, dense = masked_weight(nn.Linear(6, 9), pattern="block_diagonal", blocks=3)
    blocks = [dense[3 * i : 3 * i + 3, 2 * i : 2 * i + 2] for i in range(3)]
    assert torch.equal(weight, torch.block_diag(*blocks))


def test_blocks_compute_what_a_grouped_convolution_computes():
    layer, grouped = nn.Conv1d(6, 9, 5).double(), nn.Conv1d(6, 9, 5, groups=3).double()
    tp.register_tie(layer, "masked", pattern="block_diagonal", blocks=3)
    with torch.no_grad():
        grouped.bias.copy_(layer.bias)
        for group in range(3):
            rows = slice(3 * group, 3 * group + 3)
            grouped.weight[rows] = layer.weight[rows, 2 * group : 2 * group + 2]
    x = torch.randn(2, 6, 11, dtype=torch.float64)
    torch.testing.assert_close(layer(x), grouped(x), **COMPUTE[torch.float64])
    assert tp.get_tie(layer).free_count == grouped.weight.numel()


@pytest.mark.parametrize(("width", "below", "above"), [(1, 1, 1), ((2, 0), 2, 0), ([0, 3], 0, 3)])
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(5, 6),
        lambda: nn.Conv2d(6, 4, 3, groups=2),
        lambda: nn.ConvTranspose1d(6, 4, 3, groups=2),
    ],
)
def test_bands_by_counting(build, width, below, above):
    layer = build()
    dense = canonical_entries(layer)
    tp.register_tie(layer, "masked", pattern="banded", width=width)
    for (output, channel, *position), value in canonical_entries(layer).items():
        free = -below <= channel - output <= above
        assert value == (dense[(output, channel, *position)] if free else 0)


def test_masks_of_the_first_axes_and_of_all():
    build = lambda: nn.Conv2d(3, 4, 3)  # noqa: E731
    chess = torch.arange(12).view(4, 3) % 2 == 0
    rows = torch.tensor([True, False, True, False])
    causal = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    causal[..., 1, 2:] = causal[..., 2:, :] = False  # PixelCNN's
    whole = torch.rand(4, 3, 3, 3) < 0.5
    for mask, as_whole in (
        (chess, chess[:, :, None, None]),
        (rows, rows[:, None, None, None]),
        (causal, causal),
        (whole, whole),
    ):
        layer = build()
        weight, dense = masked_weight(layer, mask=mask)
        assert torch.equal(weight, torch.where(as_whole, dense, 0.0))
        spread = as_whole.expand(dense.shape)
        assert tp.get_tie(layer).free_count == spread.sum()
        assert torch.equal(free_value(layer)[0], dense[spread])
        assert torch.equal(tp.get_tie(layer).free_entries, spread)
        (packed,) = tp.get_tie(layer).data().values()
        assert packed.numel() == -(-mask.numel() // 8)


def test_a_mask_of_a_transposed_weight_is_in_its_own_axes():
    mask = torch.arange(8).view(4, 2) < 3  # W[in, out]
    layer = nn.ConvTranspose1d(4, 2, 3)
    weight, dense = masked_weight(layer, mask=mask)
    assert torch.equal(weight, torch.where(mask[..., None], dense, 0.0))
    bias = torch.tensor([True, False])
    tp.register_tie(layer, "masked", "bias", mask=bias)
    assert layer.bias[1] == 0 != layer.bias[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_zeros_beside_infinity(dtype):
    layer = tp.register_tie(nn.Linear(4, 4, dtype=dtype), "masked", pattern="lower")
    with torch.no_grad():
        free_value(layer).fill_(-torch.inf)
    weight = layer.weight.detach()
    above = weight[torch.ones(4, 4).triu(1).bool()]
    assert (above == 0).all()
    assert not above.signbit().any()
    layer.weight.mul(2).sum().backward()
    assert torch.equal(free_value(layer).grad, torch.full((1, 10), 2, dtype=dtype))
    # also what is folded may be anything where the weight is zero
    gradient = torch.full((4, 4), torch.nan, dtype=dtype).triu(1).nan_to_num(0, 0, 0)
    gradient[0, 3] = torch.nan
    (folded,) = tp.get_tie(layer).adjoint(gradient)
    assert torch.equal(folded, torch.zeros(1, 10, dtype=dtype))


def test_counts_on_large_shapes():
    for options, count in (
        ({"pattern": "lower"}, 512 * 513 // 2),
        ({"pattern": "block_diagonal", "blocks": 8}, 512 * 64),
        ({"pattern": "banded", "width": 2}, 5 * 512 - 6),
    ):
        layer = tp.register_tie(nn.Linear(512, 512), "masked", **options)
        assert tp.get_tie(layer).free_count == count == free_value(layer).numel()


def test_training_goes_on_as_with_zeros_put_in_after_every_step():
    torch.manual_seed(0)
    dense = nn.Linear(6, 5).double()
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64)
    mask = torch.rand(5, 6) < 0.6
    with torch.no_grad():
        dense.weight.copy_(torch.where(mask, dense.weight, 0.0))
    tied = copy.deepcopy(dense)
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.1) for layer in (dense, tied)]

    def steps(count: int) -> None:
        for _ in range(count):
            for layer, optimizer in zip((dense, tied), optimizers, strict=True):
                optimizer.zero_grad()
                (layer(x) - y).square().sum().backward()
                optimizer.step()
                if layer is dense or not tp.is_tied(layer):
                    with torch.no_grad():
                        layer.weight.copy_(torch.where(mask, layer.weight, 0.0))

    steps(3)
    tp.register_tie(tied, "masked", mask=mask, optimizer=optimizers[1], init="exact")
    steps(3)
    torch.testing.assert_close(tied.weight, dense.weight, rtol=0, atol=1e-14)


def test_a_file_brings_the_mask_back(tmp_path):
    mask = torch.rand(5, 6) < 0.6
    layer = tp.register_tie(nn.Linear(6, 5), "masked", mask=mask)
    tp.save(layer, tmp_path / "masked.safetensors")
    fresh = tp.load(tmp_path / "masked.safetensors", nn.Linear(6, 5))
    assert torch.equal(fresh.weight, layer.weight)
    assert torch.equal(tp.get_tie(fresh).free_entries, mask)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, ("neither",)),
        ({"pattern": "lower", "mask": torch.ones(4, 6) > 0}, ("both",)),
        ({"pattern": "diagonal"}, ("'diagonal'", "'banded'")),
        ({"pattern": "block_diagonal"}, ("blocks=",)),
        ({"pattern": "block_diagonal", "blocks": 3}, ("4 outputs", "6 inputs", "blocks=3")),
        ({"pattern": "block_diagonal", "blocks": 0}, ("blocks", "0")),
        ({"pattern": "banded"}, ("width=",)),
        ({"pattern": "banded", "width": -1}, ("width=-1 is no number of diagonals",)),
        ({"pattern": "banded", "width": (1, 2, 3)}, ("[1, 2, 3] is no number of diagonals",)),
        ({"pattern": "lower", "width": 1}, ("width=1", "'lower'")),
        ({"mask": torch.zeros(4, 6) > 0}, ("(4, 6)", "24")),
        ({"mask": torch.ones(4, 6)}, ("torch.float32", "mask != 0")),
        ({"mask": [[True]]}, ("list",)),
        ({"mask": torch.ones(6, 4) > 0}, ("(6, 4)", "(4, 6)")),
        ({"mask": torch.ones(4, 6, 1) > 0}, ("(4, 6, 1)", "(4, 6)")),
        ({"mask": torch.ones(4, 6, device="meta") > 0}, ("no values",)),
        ({"mask": "4x6 sha256:0123456789abcdef"}, ("file", "tiedparam.load")),
        ({"mask": "lower"}, ("'lower'",)),
    ],
)
def test_refusals(options, parts):
    assert_refused(nn.Linear(6, 4), "masked", *parts, **options)


def test_a_band_may_be_wider_than_any_matrix():
    layer = tp.register_tie(nn.Linear(6, 4), "masked", pattern="banded", width=(10**30, 0))
    assert torch.equal(layer.weight, layer.weight.tril())


def test_a_sparse_mask_is_a_mask():
    layer = nn.Linear(4, 4)
    tp.register_tie(layer, "masked", mask=torch.eye(4).bool().to_sparse())
    assert torch.equal(layer.weight, layer.weight.diagonal().diag())


def test_a_pattern_needs_two_axes():
    assert_refused(nn.Linear(6, 4), "masked", "(4,)", tensor_name="bias", pattern="lower")


def test_lawful_weights_are_seen_as_such():
    layer = with_weight(nn.Linear(5, 5), torch.randn(5, 5).tril())
    assert tp.residual(layer, "masked", pattern="lower") == 0
    assert tp.residual(layer, "masked", pattern="upper") > 0.3


@pytest.mark.parametrize("shape", [(6, 4), (4, 4), (3, 3)])
def test_a_mask_of_blocks_computes_as_the_pattern_does_wherever_it_goes(shape):
    outputs, inputs = shape
    blocks = 2 if outputs % 2 == 0 else 3
    mask = torch.block_diag(*[torch.ones(outputs // blocks, inputs // blocks)] * blocks) > 0
    torch.manual_seed(0)
    dense = nn.Linear(inputs, outputs)
    named = tp.register_tie(
        copy.deepcopy(dense), "masked", pattern="block_diagonal", blocks=blocks, compute="blocks"
    )
    given = tp.register_tie(copy.deepcopy(dense), "masked", mask=mask, compute="blocks")
    x = torch.randn(5, inputs)
    for layer in (given, copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        computing_of(layer).seen = seen = []
        assert torch.equal(layer(x), named(x))
        assert seen == ["blocks"]
    given.to_empty(device="cpu")
    for buffer in given.buffers():
        buffer.zero_()
    with pytest.raises(tp.TieError, match="overwritten, such as by to_empty"):
        given(x)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(4, 4).tril(),
        torch.eye(4).flip(0),  # blocks beside the diagonal
        torch.block_diag(torch.ones(1, 1), torch.ones(3, 3)),  # of other sizes
        torch.block_diag(torch.ones(2, 2), torch.eye(2)),
        torch.cat([torch.zeros(1, 4), torch.ones(3, 4)]),
        torch.ones(4, 4).index_fill(0, torch.tensor([3]), 0.0),
    ],
)
def test_other_masks_are_not_taken_for_blocks(mask):
    assert computing_of(tp.register_tie(nn.Linear(4, 4), "masked", mask=mask > 0)) is None
