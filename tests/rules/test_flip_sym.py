"""flip_sym: ``W[i, j, x] = W[j, i, flip(x)]`` by loops, literal matrices and adjoints."""

from __future__ import annotations

import copy
import io
import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tiedparam as tp
from tests.support.cases import DTYPES, assert_refused, canonical_entries, layer_id
from tests.support.tensors import stored, with_weight
from tiedparam.testing import check_rule

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def assert_flip_symmetric(layer: nn.Module) -> None:
    """The law by loops, in every group of its own."""
    groups = getattr(layer, "groups", 1)
    kernel = getattr(layer, "kernel_size", ())
    entries = canonical_entries(layer)
    c = max(index[1] for index in entries) + 1
    for (output, j, *x), value in entries.items():
        group, i = divmod(output, c)
        mirrored = [size - 1 - position for size, position in zip(kernel, x, strict=True)]
        assert value == entries[(group * c + j, i, *mirrored)]
    assert len(entries) == groups * c * c * math.prod(kernel)


@st.composite
def square_layers(draw: st.DrawFn) -> nn.Module:
    dims = draw(st.integers(0, 3))
    c, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 100)))
    if dims == 0:
        return nn.Linear(c, c, dtype=dtype)
    kernel = tuple(draw(st.lists(st.integers(1, 4), min_size=dims, max_size=dims)))
    kind = (TRANSPOSED if draw(st.booleans()) else CONVOLUTIONS)[dims - 1]
    return kind(groups * c, groups * c, kernel, groups=groups, dtype=dtype)


# The law and the counts -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the tie of .* frees nothing")  # some draws do
@given(square_layers())
def test_law_by_loops_and_closed_form_count(layer):
    dense = canonical_entries(layer)
    c = layer.weight.shape[1]
    groups, kernel = getattr(layer, "groups", 1), getattr(layer, "kernel_size", ())
    tp.register_tie(layer, "flip_sym")
    assert_flip_symmetric(layer)
    f = c if all(size % 2 for size in kernel) else 0
    assert stored(layer) == groups * (c * c * math.prod(kernel) + f) // 2
    # and every entry is the mean of the two that the law makes equal
    eps = torch.finfo(layer.weight.dtype).eps
    for (output, j, *x), value in canonical_entries(layer).items():
        group, i = divmod(output, c)
        mirrored = [size - 1 - position for size, position in zip(kernel, x, strict=True)]
        mean = (dense[(output, j, *x)] + dense[(group * c + j, i, *mirrored)]) / 2
        assert value == pytest.approx(mean, rel=eps, abs=eps / 2)


MANY_CHANNELS = [
    lambda: nn.Linear(34, 34),
    lambda: nn.Linear(68, 68),
    lambda: nn.Linear(33, 33),
    lambda: nn.Linear(128, 128),
    lambda: nn.Conv1d(34, 34, 3),
    lambda: nn.Conv1d(68, 68, 2),
    lambda: nn.Conv2d(36, 36, (3, 2)),
    lambda: nn.Conv1d(136, 136, 3, groups=2),
    lambda: nn.ConvTranspose1d(72, 72, 3, groups=2),
]


@pytest.mark.parametrize("build", MANY_CHANNELS, ids=layer_id)
def test_law_by_loops_for_many_channels(build):
    """An expansion may cut large kernels into blocks, which small examples would not reach."""
    layer = build()
    dense = layer.weight.detach().clone()
    c, groups, kernel = dense.shape[1], getattr(layer, "groups", 1), dense.shape[2:]
    tp.register_tie(layer, "flip_sym")
    assert_flip_symmetric(layer)
    rule = tp.get_tie(layer)
    f = c if all(size % 2 for size in kernel) else 0
    assert stored(layer) == groups * (c * c * math.prod(kernel) + f) // 2 == rule.free_count
    # the law, and the nearest weight that keeps it: what is left over is antisymmetric
    weight = layer.weight.detach().clone()
    (mirrored,) = rule.symmetries(dense)
    torch.testing.assert_close(weight, (dense + mirrored) / 2, rtol=1e-6, atol=1e-7)
    for values, derived in zip(
        rule.right_inverse(weight), tp.Rule.right_inverse(rule, weight), strict=True
    ):
        assert torch.equal(values, derived)
    for parameter, value in zip(
        layer.parametrizations.weight.parameters(), rule.right_inverse(weight), strict=True
    ):
        assert torch.equal(parameter, value)


@pytest.mark.parametrize("build", MANY_CHANNELS, ids=layer_id)
def test_gradients_for_many_channels(build):
    rule = tp.get_tie(tp.register_tie(build(), "flip_sym"))
    free = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in rule.free_shapes()]
    cotangent = torch.randn(rule.bound_layout.shape, dtype=torch.float64)
    gradients = torch.autograd.grad(rule(*free), free, cotangent)
    labels = rule.orbit_labels().flatten()
    assert labels.unique().tolist() == list(range(1, rule.free_count + 1))
    sums = torch.zeros(rule.free_count, dtype=torch.float64)
    sums.index_add_(0, labels - 1, cotangent.flatten())
    found = torch.cat([gradient.flatten() for gradient in gradients])
    torch.testing.assert_close(found, sums, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(rule, free, fast_mode=True)
    assert torch.autograd.gradgradcheck(rule, free, fast_mode=True)


def test_contract_for_many_channels():
    """More than one tile of the table, and a last tile that is smaller."""
    check_rule(tp.rules.FlipSym, examples=[tp.Example(lambda: nn.Linear(34, 34))])


@pytest.mark.parametrize(
    ("channels", "kernel", "count", "dense"),
    [(3, 3, 42, 81), (64, 3, 18_464, 36_864), (256, 3, 295_040, 589_824)],
)
def test_counts_of_the_stories_to_the_byte(channels, kernel, count, dense):
    layer = nn.Conv2d(channels, channels, kernel, bias=False)
    assert layer.weight.numel() == dense
    tp.register_tie(layer, "flip_sym")
    assert stored(layer) == count
    assert sum(p.untyped_storage().nbytes() for p in layer.parameters()) == 4 * count
    saved = safetensors.torch.save(layer.state_dict())
    assert len(saved) - 8 - int.from_bytes(saved[:8], "little") == 4 * count
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    assert 4 * count < file.tell() < 4 * count + 4096


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: nn.Conv2d(3, 3, 2), 18),  # no centre: half of 36
        (lambda: nn.Conv2d(3, 3, (3, 2)), 27),
        (lambda: nn.Conv2d(3, 3, 1), 6),  # only the centre: a triangle
        (lambda: nn.Conv1d(3, 3, 3), 15),
        (lambda: nn.Conv3d(3, 3, 3), 123),
        (lambda: nn.Conv2d(6, 6, 3, groups=2), 84),
        (lambda: nn.ConvTranspose2d(6, 6, 3, groups=2), 84),
        (lambda: nn.Conv2d(5, 5, 3, groups=5), 25),
        (lambda: nn.Linear(3, 3), 6),
        (lambda: nn.Linear(1, 1), 1),
    ],
    ids=layer_id,
)
@pytest.mark.filterwarnings("ignore:the tie of .* frees nothing")  # one value is one
def test_counts_by_hand(build, count):
    layer = tp.register_tie(build(), "flip_sym")
    assert stored(layer) == count
    assert all(p.numel() for p in layer.parameters())  # FSDP2 raises on empty ones
    assert_flip_symmetric(layer)


def test_literal_2x2_matrix():
    layer = with_weight(nn.Linear(2, 2), [[1.0, 2.0], [4.0, 5.0]])
    tp.register_tie(layer, "flip_sym")
    assert layer.weight.tolist() == [[1.0, 3.0], [3.0, 5.0]]


def test_literal_3x3_matrix():
    layer = with_weight(nn.Linear(3, 3), [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    tp.register_tie(layer, "flip_sym")
    assert layer.weight.tolist() == [[1.0, 3.0, 5.0], [3.0, 5.0, 7.0], [5.0, 7.0, 9.0]]


def test_literal_odd_kernel_of_two_channels():
    layer = with_weight(
        nn.Conv1d(2, 2, 3),
        [[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], [[6.0, 7.0, 8.0], [9.0, 10.0, 11.0]]],
    )
    tp.register_tie(layer, "flip_sym")
    assert layer.weight.tolist() == [
        [[1.0, 1.0, 1.0], [5.5, 5.5, 5.5]],
        [[5.5, 5.5, 5.5], [10.0, 10.0, 10.0]],
    ]
    layer = with_weight(
        nn.Conv1d(2, 2, 3), [[[0.0, 5.0, 4.0], [1.0, 2.0, 3.0]], [[7.0, 4.0, 3.0], [0.0, 1.0, 8.0]]]
    )
    tp.register_tie(layer, "flip_sym")
    assert layer.weight.tolist() == [
        [[2.0, 5.0, 2.0], [2.0, 3.0, 5.0]],
        [[5.0, 3.0, 2.0], [4.0, 1.0, 4.0]],
    ]


def test_literal_even_kernel_of_two_channels():
    layer = with_weight(nn.Conv1d(2, 2, 2), [[[0.0, 4.0], [1.0, 2.0]], [[4.0, 9.0], [7.0, 7.0]]])
    tp.register_tie(layer, "flip_sym")
    assert layer.weight.tolist() == [[[2.0, 2.0], [5.0, 3.0]], [[3.0, 5.0], [7.0, 7.0]]]


def test_literal_2d_kernel_is_turned_by_180_degrees():
    layer = with_weight(nn.Conv2d(1, 1, 3), [[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]]])
    tp.register_tie(layer, "flip_sym", init="project")
    assert layer.weight.tolist() == [[[[5.0] * 3] * 3]]
    lawful = [[[[1.0, 2.0, 3.0], [4.0, 5.0, 4.0], [3.0, 2.0, 1.0]]]]
    layer = with_weight(nn.Conv2d(1, 1, 3), lawful)
    tp.register_tie(layer, "flip_sym", init="exact")  # its own 180° turn, not symmetric
    assert layer.weight.tolist() == lawful


def test_the_mean_of_the_largest_values_does_not_overflow():
    most = 1.5 * 2.0**127  # the largest float32 is not quite 2**128
    layer = with_weight(
        nn.Linear(3, 3), [[most, most, most], [most / 2, -most, 1.0], [-most, 3.0, most]]
    )
    tp.register_tie(layer, "flip_sym")
    mean = 0.75 * most  # the sum would be infinite, and so would be the difference of ±most
    assert layer.weight.tolist() == [[most, mean, 0.0], [mean, -most, 2.0], [0.0, 2.0, most]]


def test_literal_groups_do_not_mix():
    layer = nn.Conv1d(4, 4, 1, groups=2)
    with_weight(layer, [[[1.0], [2.0]], [[4.0], [5.0]], [[10.0], [20.0]], [[40.0], [50.0]]])
    tp.register_tie(layer, "flip_sym")
    assert layer.weight.tolist() == [
        [[1.0], [3.0]],
        [[3.0], [5.0]],
        [[10.0], [30.0]],
        [[30.0], [50.0]],
    ]


def test_stored_order_is_fixed():
    """Checkpoints hold the free values in this order; changing it would misread old files."""
    layer = tp.register_tie(nn.Linear(3, 3), "flip_sym")
    with torch.no_grad():
        layer.parametrizations.weight.original0.copy_(torch.arange(6.0).reshape(2, 3))
    # the last two rows of the lower triangle, and in the place that is left the first, backwards
    assert layer.weight.tolist() == [[2.0, 0.0, 3.0], [0.0, 1.0, 4.0], [3.0, 4.0, 5.0]]
    layer = tp.register_tie(nn.Linear(2, 2), "flip_sym")
    with torch.no_grad():
        layer.parametrizations.weight.original0.copy_(torch.arange(3.0).reshape(3, 1))
    assert layer.weight.tolist() == [[2.0, 0.0], [0.0, 1.0]]
    layer = tp.register_tie(nn.Conv1d(2, 2, 3), "flip_sym")
    with torch.no_grad():
        values = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0])
        layer.parametrizations.weight.original0.copy_(values.reshape(1, 7))
    assert layer.weight.tolist() == [
        [[3.0, 11.0, 3.0], [0.0, 1.0, 2.0]],
        [[2.0, 1.0, 0.0], [10.0, 12.0, 10.0]],
    ]
    layer = tp.register_tie(nn.Conv1d(3, 3, 2), "flip_sym")
    with torch.no_grad():
        layer.parametrizations.weight.original0.copy_(torch.arange(9.0).reshape(1, 9))
    # read kernel by kernel: diagonal, two free, an image, diagonal, one free, two images, diagonal
    assert layer.weight.tolist() == [
        [[6.0, 6.0], [0.0, 1.0], [2.0, 3.0]],
        [[1.0, 0.0], [7.0, 7.0], [4.0, 5.0]],
        [[3.0, 2.0], [5.0, 4.0], [8.0, 8.0]],
    ]


def test_multiplicity_is_two_and_one_on_the_diagonal_of_the_centre():
    layer = tp.register_tie(nn.Conv2d(3, 3, 3), "flip_sym")
    counts = torch.cat([count.flatten() for count in tp.get_tie(layer).multiplicities()])
    assert sorted(counts.tolist()) == [1.0] * 3 + [2.0] * 39


# Self-adjoint layers ----------------------------------------------------------------------


def adjoint_gap(layer: nn.Module, *sizes: int) -> float:
    """``|⟨Ax, y⟩ − ⟨x, Ay⟩|``, relative to what rounding could explain."""
    channels = layer.weight.shape[1] * getattr(layer, "groups", 1)
    x, y = torch.randn(2, 1, channels, *sizes, dtype=torch.float64)
    with torch.no_grad():
        image, back = layer(x), layer(y)
    assert image.shape == y.shape
    return float(abs((image * y).sum() - (x * back).sum()) / (image.norm() * y.norm()))


def convolution(dims: int, kernel: int | tuple[int, ...], **options) -> nn.Module:
    kind = options.pop("kind", CONVOLUTIONS[dims - 1])
    channels = options.pop("channels", 3)
    return kind(channels, channels, kernel, bias=False, dtype=torch.float64, **options)


@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(
    ("dims", "kernel"), [(1, 3), (1, 5), (2, 3), (2, (3, 5)), (2, 1), (3, (3, 1, 3))]
)
def test_odd_kernels_are_self_adjoint(dims, kernel, dilation, mode):
    sizes = (kernel,) * dims if isinstance(kernel, int) else kernel
    padding = tuple(dilation * (size // 2) for size in sizes)
    layer = convolution(dims, kernel, padding=padding, dilation=dilation, padding_mode=mode)
    image = (9, 8, 7)[:dims]
    assert adjoint_gap(layer, *image) > 1e-3  # a dense one is not
    tp.register_tie(layer, "flip_sym")
    assert adjoint_gap(layer, *image) < 1e-13


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d], ids=lambda kind: kind.__name__)
def test_grouped_and_transposed_ones_are_self_adjoint(kind, groups):
    layer = convolution(2, 3, kind=kind, channels=6, groups=groups, padding=1)
    assert adjoint_gap(layer, 6, 7) > 1e-3
    tp.register_tie(layer, "flip_sym")
    assert adjoint_gap(layer, 6, 7) < 1e-13


def test_linear_is_self_adjoint():
    layer = nn.Linear(6, 6, bias=False, dtype=torch.float64)
    x, y = torch.randn(2, 6, dtype=torch.float64)
    assert abs(layer(x) @ y - x @ layer(y)) > 1e-3
    tp.register_tie(layer, "flip_sym")
    assert abs(layer(x) @ y - x @ layer(y)) < 1e-14


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_that_reads_inner_pixels_twice_is_not_self_adjoint(mode):
    layer = convolution(2, 3, padding=1, padding_mode=mode)
    tp.register_tie(layer, "flip_sym")
    assert adjoint_gap(layer, 6, 7) > 1e-3


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_even_kernels_are_not_self_adjoint(mode):
    layer = convolution(2, 2, padding="same", padding_mode=mode)
    tp.register_tie(layer, "flip_sym")
    assert_flip_symmetric(layer)  # the law holds, but the window has no centre to mirror about
    assert adjoint_gap(layer, 6, 7) > 1e-3


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_convolution_equals_its_transpose_with_the_same_weight(groups, dilation):
    options = {"padding": dilation, "dilation": dilation, "groups": groups}
    layer = convolution(2, 3, channels=4, **options)
    x = torch.randn(2, 4, 8, 9, dtype=torch.float64)
    dense = layer.weight
    assert not torch.allclose(
        F.conv2d(x, dense, **options), F.conv_transpose2d(x, dense, **options)
    )
    tp.register_tie(layer, "flip_sym")
    expected = F.conv_transpose2d(x, layer.weight, **options)
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)


def test_training_keeps_the_layer_self_adjoint():
    layer = convolution(2, 3, padding=1)
    tp.register_tie(layer, "flip_sym")
    before = layer.weight.detach().clone()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    x, target = torch.randn(2, 4, 3, 6, 6, dtype=torch.float64)
    for _ in range(20):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    assert (layer.weight - before).abs().max() > 0.1
    assert_flip_symmetric(layer)
    assert adjoint_gap(layer, 6, 7) < 1e-13


# A fresh layer ------------------------------------------------------------------------------


def test_s37_rescale_keeps_the_standard_deviation_and_projection_shrinks_it():
    ratios: dict[str, list[Tensor]] = {"rescale": [], "project": []}
    for init, found in ratios.items():
        for seed in range(10):
            torch.manual_seed(seed)
            layer = nn.Conv2d(32, 32, 3)
            dense = layer.weight.std()
            tp.register_tie(layer, "flip_sym", init=init)
            found.append(layer.weight.std() / dense)
    assert 0.95 < torch.stack(ratios["rescale"]).mean() < 1.05
    assert 0.69 < torch.stack(ratios["project"]).mean() < 0.73


def test_residual_of_a_fresh_layer():
    layer = nn.Conv2d(64, 64, 3)
    expected = math.sqrt(1 - 18_464 / 36_864)
    assert tp.residual(layer, "flip_sym") == pytest.approx(expected, rel=0.02)
    tp.register_tie(layer, "flip_sym")
    assert tp.residual(layer, "flip_sym") == 0


def test_s26b_attention_projection():
    attention = nn.MultiheadAttention(6, 2, batch_first=True).eval()
    tp.register_tie(attention.out_proj, "flip_sym")
    weight = attention.out_proj.weight.detach().clone()
    assert torch.equal(weight, weight.T)
    plain = nn.MultiheadAttention(6, 2, batch_first=True).eval()
    plain.load_state_dict(tp.dense_state_dict(attention))
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(attention(x, x, x)[0], plain(x, x, x)[0])
    attention.train()(x, x, x)[0].sum().backward()
    (free,) = attention.out_proj.parametrizations.parameters()
    assert free.grad.norm() > 0


# What does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "inputs", "outputs"),
    [
        (lambda: nn.Conv2d(3, 4, 3), 3, 4),
        (lambda: nn.Conv2d(4, 8, 3, groups=2), 4, 8),
        (lambda: nn.ConvTranspose2d(4, 8, 3, groups=2), 4, 8),
        (lambda: nn.ConvTranspose1d(3, 4, 3), 3, 4),
        (lambda: nn.Linear(5, 4), 5, 4),
        (lambda: nn.Embedding(7, 4), 4, 7),
    ],
    ids=layer_id,
)
def test_refuses_layers_that_are_not_square(build, inputs, outputs):
    layer = build()
    assert_refused(
        layer,
        "flip_sym",
        "cannot tie 'weight' of",
        type(layer).__name__,
        "'flip_sym'",
        f"out_channels ({outputs}) must equal in_channels ({inputs})",
        "Tie a square layer, or use 'channel_shared'",
    )


def test_refuses_a_bias():
    assert_refused(
        nn.Linear(3, 3), "flip_sym", "no input channels", "Tie a weight", tensor_name="bias"
    )


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool], ids=str)
def test_refuses_numbers_without_meaning(dtype):
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.ones(3, 3).to(dtype), requires_grad=False)
    assert_refused(layer, "flip_sym", f"no meaning for {dtype}", "Convert the layer first")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_refuses_empty_weights():
    assert_refused(nn.Linear(0, 0), "flip_sym", "(0, 0) is empty", "Tie a layer that has weights")


def test_has_no_options():
    message = assert_refused(nn.Conv2d(4, 4, 3), "flip_sym", error=TypeError, groups=2)
    assert "flip_sym" in message
    assert "groups" in message


def test_layers_of_a_shape_and_their_copies_share_one_expansion():
    """torch 2.6 compiles anew for another object; see test_s32 in tests/layer/test_host.py."""
    first, second, other = (
        tp.register_tie(nn.Linear(n, n), "flip_sym", init="rescale") for n in (4, 4, 5)
    )
    expansions = [
        tp.get_tie(layer)._expansion for layer in (first, second, copy.deepcopy(first), other)
    ]
    assert expansions[0] is expansions[1] is expansions[2]
    assert expansions[3] is not expansions[0]
