"""Layers with symmetric matrices that compute by panels, judged by the dense ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support import computing_of
from tiedparam.laws import Use

C = 400  # more than one tile


def twins(layer: nn.Module, rule: str = "flip_sym", **options) -> tuple[nn.Module, nn.Module]:
    """By panels, and densely."""
    tied = tp.register_tie(layer, rule, compute="panels", init="rescale", **options)
    free = [p.detach() for p in tied.parametrizations.weight.parameters()]
    dense = tp.register_tie(copy.deepcopy(_untied(tied)), rule, compute="dense", **options)
    for value, own in zip(free, dense.parametrizations.weight.parameters(), strict=True):
        assert torch.equal(value, own)
    return tied, dense


def _untied(layer: nn.Module) -> nn.Module:
    return tp.remove_tie(copy.deepcopy(layer))


def taken(layer: nn.Module, *inputs) -> list[str]:
    """The forms that computed a call."""
    computing = computing_of(layer)
    computing.seen = []
    layer(*inputs)
    seen, computing.seen = computing.seen, None
    return seen


def assert_equal_steps(tied: nn.Module, dense: nn.Module, x: torch.Tensor) -> None:
    assert taken(tied, x) == ["panels"]
    found = []
    for layer in (tied, dense):
        input = x.detach().clone().requires_grad_()
        y = layer(input)
        gradients = torch.autograd.grad(y.square().mean(), [input, *layer.parameters()])
        found.append([y, *gradients])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-13)
    assert found[0][0].is_contiguous()


LAYERS = [
    (lambda: nn.Linear(C, C), (3, 2, C)),
    (lambda: nn.Linear(C, C, bias=False), (C,)),
    (lambda: nn.Linear(C, C), (0, C)),
    (lambda: nn.Conv1d(C, C, 1), (2, C, 5)),
    (lambda: nn.Conv2d(C, C, 1, padding="same"), (2, C, 3, 4)),
    (lambda: nn.Conv2d(2 * C, 2 * C, 1, groups=2), (2, 2 * C, 3, 4)),
    (lambda: nn.Conv2d(C, C, 1, bias=False), (C, 3, 4)),
    (lambda: nn.Conv3d(C, C, 1), (1, C, 2, 1, 2)),
]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_equal_to_the_dense_layer(build, shape, sign):
    tied, dense = twins(build().double(), sign=sign)
    assert_equal_steps(tied, dense, torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("rule", ["symmetric", "skew"])
def test_the_names_for_matrices_have_it(rule):
    tied, dense = twins(nn.Linear(C, C).double(), rule)
    assert_equal_steps(tied, dense, torch.randn(3, C, dtype=torch.float64))
    assert "compute" not in tp.get_tie(tied).options()


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Conv2d(C, C, 1, stride=2), (2, C, 4, 4)),
        (lambda: nn.Conv2d(C, C, 1, padding=1), (2, C, 4, 4)),
        (lambda: nn.Conv2d(C, C, 1, padding=1, padding_mode="circular"), (2, C, 4, 4)),
    ],
)
def test_other_geometries_are_dense(build, shape):
    tied, dense = twins(build())
    x = torch.randn(shape)
    assert taken(tied, x) == []
    assert torch.equal(tied(x), dense(x))


def test_channels_last_is_left_to_the_stock_layer():
    tied, dense = twins(nn.Conv2d(C, C, 1))
    x = torch.randn(2, C, 4, 4).to(memory_format=torch.channels_last)
    assert taken(tied, x) == []
    assert tied(x).stride() == dense(x).stride()


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(384, 384),
        lambda: nn.Conv2d(C, C, 3),
        lambda: nn.ConvTranspose2d(C, C, 1),
        lambda: nn.Embedding(C, C),
    ],
)
def test_layers_without_panels_say_so(build):
    with pytest.raises(tp.TieError, match="compute='panels' is not a form"):
        tp.register_tie(build(), "flip_sym", compute="panels")


def cost(c: int, rows: int | None, **how) -> float:
    layer = tp.register_tie(nn.Linear(c, c), "flip_sym", init="rescale")
    rule = tp.get_tie(layer)
    found = (
        computing_of(layer)
        .forms["panels"]
        .cost(rule, Use("linear", rule.bound_layout, rows, **how))
    )
    assert found is not None
    return found


def test_it_is_taken_where_it_was_measured_to_win():
    for c, rows, training in [
        (512, 8, False), (512, 8, True), (1024, 1, False), (1024, 32, True), (1024, 128, False),
        (1024, 128, True), (2048, 32, False), (2048, 128, True), (1024, None, True),
    ]:  # fmt: skip
        assert cost(c, rows, training=training) < 0.95, (c, rows, training)
    for c, rows, training in [
        (512, 256, False), (512, 64, True), (1024, 1024, False), (1024, 256, True),
        (2048, 4096, True),
    ]:  # fmt: skip
        assert cost(c, rows, training=training) > 0.95, (c, rows, training)


@pytest.mark.parametrize("rows", [1, 8, 32, 128, 1024, None])
def test_a_kept_weight_is_multiplied_as_it_is(rows):
    assert cost(512, rows, kept=True) > 1
    assert cost(2048, rows, kept=True) > 1


def test_frozen_layers_are_dense():
    layer = tp.register_tie(nn.Linear(1024, 1024), "flip_sym", init="rescale").eval()
    x = torch.randn(8, 1024)
    with torch.no_grad():
        assert taken(layer, x) == ["panels"]
        with tp.frozen(layer):
            assert taken(layer, x) == []


def test_half_precision_and_autocast_are_dense():
    tied, _ = twins(nn.Linear(C, C))
    x = torch.randn(2, C)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert taken(tied, x) == []
    assert taken(tied.bfloat16(), x.bfloat16()) == []


def test_a_layer_offers_panels_by_its_own_sizes():
    layer = tp.register_tie(nn.Conv2d(2 * C, 2 * C, 1, groups=2), "flip_sym", init="rescale")
    computing = computing_of(layer)
    assert computing is not None
    assert list(computing.forms) == ["panels"]
    small = tp.register_tie(nn.Conv2d(2 * C, 2 * C, 1, groups=4), "flip_sym", init="rescale")
    assert computing_of(small) is None


def test_compiled_layers_hold_one_operator():
    tied, _ = twins(nn.Linear(C, C))
    x = torch.randn(2, C)
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    found = torch.compile(tied, backend=backend)(x)
    assert any("tiedparam.symmetric_product" in target for graph in graphs for target in graph)
    torch.testing.assert_close(found, tied(x))
