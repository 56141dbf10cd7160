"""transposed_copy: the layers themselves are each other's adjoint, over their geometries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.cases import assert_refused

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EVEN = {"bias": False, "dtype": torch.float64}


def pair(first: nn.Module, second: nn.Module, **options) -> tuple[nn.Module, nn.Module]:
    tp.register_tie(second, "transposed_copy", source=first, **options)
    assert tp.free_values(second) == {}
    return first, second


def assert_adjoint(first: nn.Module, second: nn.Module, *shape: int, sign: int = 1) -> None:
    """``⟨Ax, y⟩ = ±⟨x, By⟩``, by the layers alone."""
    dtype = first.weight.dtype
    x = torch.randn(shape, dtype=dtype)
    forwards = first(x)
    y = torch.randn(forwards.shape, dtype=dtype)
    backwards = second(y)
    assert backwards.shape == x.shape
    left, right = (forwards * y).sum(), (x * backwards).sum()
    assert left.abs() > 1e-3
    torch.testing.assert_close(left, sign * right)


def lengths(positions: int, kernel: tuple[int, ...], geometry: dict) -> list[int]:
    """Of an input from which the stride leaves nothing over."""
    s, p, d = (geometry.get(name, other) for name, other in [
        ("stride", 1), ("padding", 0), ("dilation", 1)
    ])  # fmt: skip
    return [s * (positions - 1) + d * (k - 1) + 1 - 2 * p for k in kernel]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("backwards", [False, True], ids=["conv first", "transposed first"])
@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"stride": 2, "groups": 2},
        {"padding": 1, "groups": 2},
        {"stride": 3, "padding": 1, "dilation": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_transposed_convolution_runs_a_convolution_backwards(axes, geometry, backwards, sign):
    kernel = (3, 2, 4)[:axes]
    convolution = CONVOLUTIONS[axes - 1](4, 6, kernel, **geometry, **EVEN)
    transposed = TRANSPOSED[axes - 1](6, 4, kernel, **geometry, **EVEN)
    layers = (transposed, convolution) if backwards else (convolution, transposed)
    first, second = pair(*layers, sign=sign)
    assert torch.equal(second.weight, sign * first.weight)  # nothing moves
    if backwards:
        assert_adjoint(first, second, 2, 6, *[3] * axes, sign=sign)
    else:
        assert_adjoint(first, second, 2, 4, *lengths(3, kernel, geometry), sign=sign)


@pytest.mark.parametrize("kinds", [CONVOLUTIONS, TRANSPOSED], ids=["conv", "transposed"])
@pytest.mark.parametrize(("groups", "dilation", "padding"), [(1, 1, 0), (2, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_two_layers_of_one_kind_pad_what_the_other_does_not(kinds, axes, groups, dilation, padding):
    kernel = (3, 2, 4)[:axes]
    other = tuple(dilation * (k - 1) - padding for k in kernel)
    if min(other) < 0:
        padding, other = 0, tuple(dilation * (k - 1) for k in kernel)
    options = {"groups": groups, "dilation": dilation, **EVEN}
    first = kinds[axes - 1](4, 6, kernel, padding=padding, **options)
    second = kinds[axes - 1](6, 4, kernel, padding=other, **options)
    pair(first, second)
    assert_adjoint(first, second, 2, 4, *[9] * axes)


def test_circular_padding_is_adjoint_too():
    options = {"padding": 1, "padding_mode": "circular", **EVEN}
    assert_adjoint(*pair(nn.Conv2d(2, 3, 3, **options), nn.Conv2d(3, 2, 3, **options)), 2, 2, 5, 6)


@pytest.mark.parametrize("sign", [1, -1])
def test_linear_layers(sign):
    first, second = pair(nn.Linear(5, 3, **EVEN), nn.Linear(3, 5, **EVEN), sign=sign)
    assert torch.equal(second.weight, sign * first.weight.t())
    assert_adjoint(first, second, 4, 5, sign=sign)


@pytest.mark.parametrize("linear_first", [True, False])
def test_conv1d_of_gpt2_stores_the_other_way_round(linear_first):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layers = nn.Linear(5, 3, bias=False), conv1d(5, 3)  # from 3 to 5
    first, second = pair(*(layers if linear_first else layers[::-1]))
    assert torch.equal(first.weight, second.weight)
    assert_adjoint(first, second, 4, 5 if linear_first else 3)


def test_complex_weights_are_transposed_and_not_conjugated():
    options = {"bias": False, "dtype": torch.complex128}
    first, second = pair(nn.Linear(5, 3, **options), nn.Linear(3, 5, **options))
    assert_adjoint(first, second, 4, 5)
    assert torch.equal(second.weight, first.weight.t())
    convolutions = nn.Conv1d(2, 3, 3, **options), nn.ConvTranspose1d(3, 2, 3, **options)
    assert_adjoint(*pair(*convolutions), 1, 2, 6)


def test_a_source_may_be_tied_and_gradients_add_up():
    first = tp.register_tie(nn.Conv1d(4, 4, 3, **EVEN), "flip_sym")
    second = nn.Conv1d(4, 4, 3, padding=2, **EVEN)
    pair(first, second)
    assert torch.equal(first.weight, second.weight)  # flip_sym is its own adjoint
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    (first(x).sum() + second(x).sum()).backward()
    (free,) = first.parameters()
    assert free.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("first", "second", "parts"),
    [
        (
            nn.Conv1d(4, 6, 3, stride=2),
            nn.Conv1d(6, 4, 3),
            ["strides are (2,) and (1,)", "Tie a transposed convolution of"],
        ),
        (
            nn.Conv1d(4, 6, 3),
            nn.Conv1d(6, 4, 3, stride=2),
            ["strides are (1,) and (2,)", "Tie a transposed convolution of"],
        ),
        (
            nn.ConvTranspose1d(4, 6, 3, stride=2),
            nn.ConvTranspose1d(6, 4, 3, stride=2),
            ["strides are (2,) and (2,)", "Tie a convolution of"],
        ),
        (
            nn.Conv1d(4, 6, 3, stride=2),
            nn.ConvTranspose1d(6, 4, 3),
            ["the source has the stride (2,), and the layer (1,)", "same stride="],
        ),
        (
            nn.Conv1d(4, 6, 3, dilation=2),
            nn.ConvTranspose1d(6, 4, 3),
            ["the source has the dilation (2,), and the layer (1,)", "same dilation="],
        ),
        (
            nn.Conv1d(4, 6, 3, groups=2),
            nn.ConvTranspose1d(6, 4, 3),
            ["the source has 2 groups, and the layer 1", "same groups="],
        ),
        (
            nn.Conv1d(4, 6, 3),
            nn.Conv1d(4, 6, 3),
            ["source's (6, 4, 3) is (4, 6, 3), outputs first", "gives its inputs"],
        ),
        (nn.Embedding(6, 4), nn.Linear(6, 4), ["looks rows up", "Use 'copy'"]),
        (nn.Bilinear(2, 3, 4), nn.Linear(2, 4), ["neither a matrix nor made of", "Use 'copy'"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_is_no_adjoint_is_refused(first, second, parts):
    assert_refused(second, "transposed_copy", *parts, source=first)


def test_options_are_checked():
    source, rule = nn.Linear(3, 3), "transposed_copy"
    assert_refused(nn.Linear(3, 3), rule, "sign=2", "Choose 1 or -1", source=source, sign=2)
    assert_refused(nn.Linear(3, 3), rule, "reads one layer", source=[source, source])
    assert_refused(nn.Linear(3, 3), rule, "no input channels", tensor_name="bias", source=source)


def found_by_scan(model: nn.Module) -> list[tuple[str, str]]:
    candidates = tp.scan(model, ["transposed_copy"]).candidates
    return [(c.layer, c.options["source"]) for c in candidates if c.residual == 0]


def test_files_plans_and_scan_know_it(tmp_path):
    def fresh() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv1d(4, 6, 3, stride=2), nn.ConvTranspose1d(6, 4, 3, stride=2), nn.Conv1d(6, 4, 3)
        )

    model = fresh()
    with torch.no_grad():  # a layer of one kind has the kernels mirrored
        model[2].weight.copy_(model[0].weight.transpose(0, 1).flip(-1))
    assert found_by_scan(model) == []  # with a stride it is no adjoint
    model[0].stride = (1,)
    assert found_by_scan(model) == [("2", "0")]
    model[0].stride = (2,)
    plan = {"1": ("transposed_copy", {"source": "0", "sign": -1})}
    tp.tie_model(model, plan)
    assert torch.equal(model[1].weight, -model[0].weight)
    tp.save(model, tmp_path / "tied.safetensors")
    again = tp.load(tmp_path / "tied.safetensors", fresh())
    assert torch.equal(again[1].weight, model[1].weight)
    assert tp.get_tie(again[1]).sign == -1
    tp.export_dense(model, tmp_path / "dense.safetensors")
    dense = tp.load(tmp_path / "dense.safetensors", fresh())
    assert torch.equal(dense[1].weight, model[1].weight)
