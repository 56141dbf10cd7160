"""Layers of circulant, toeplitz, hankel and block_circulant that multiply spectra."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiedparam as tp
from tests.support import computing_of, form_of
from tests.support.tensors import free_value

# law, inputs, outputs, options; odd and prime sizes, not square, short blocks and long ones
LAYERS: list[tuple[str, int, int, dict[str, Any]]] = [
    ("circulant", 24, 24, {}),
    ("circulant", 17, 17, {}),
    ("toeplitz", 24, 24, {}),
    ("toeplitz", 9, 14, {}),
    ("hankel", 14, 9, {}),
    ("hankel", 17, 17, {}),
    ("block_circulant", 24, 16, {"block": 8}),
    ("block_circulant", 15, 10, {"block": 5}),
    ("block_circulant", 98, 147, {"block": 49}),
]
ONE_EACH = [LAYERS[0], LAYERS[2], LAYERS[4], LAYERS[6]]


def names(given: Any) -> str | None:
    return f"{given[0]}-{given[2]}x{given[1]}" if isinstance(given, tuple) else None


each_layer = pytest.mark.parametrize("given", LAYERS, ids=names)
each_law = pytest.mark.parametrize("given", ONE_EACH, ids=names)


def twins(
    given: tuple[str, int, int, dict[str, Any]], compute: str = "fft", **settings: Any
) -> tuple[nn.Linear, nn.Linear]:
    """A tied layer, and a stock layer that holds the same weight."""
    law, inputs, outputs, options = given
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, **settings)
    tp.register_tie(layer, law, init="rescale", compute=compute, **options)
    return layer, tp.remove_tie(copy.deepcopy(layer))


def transforms(compute: Callable[[], Any]) -> int:
    """How many Fourier transforms are computed; a profiler does not stand in the way of forms."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compute()
    found = (event.count for event in profile.key_averages() if "aten::_fft" in event.key)
    return sum(found)


def assert_alike(layer: nn.Linear, twin: nn.Linear, x: Tensor, bound: float) -> None:
    """Output, and gradients of the input, the free values and the bias."""
    given = [x.clone().requires_grad_() for _ in range(2)]
    found, expected = layer(given[0]), twin(given[1])
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
    cotangent = torch.randn_like(expected)
    found.backward(cotangent)
    expected.backward(cotangent)
    (folded,) = tp.get_tie(layer).adjoint(twin.weight.grad)
    pairs = [(given[0].grad, given[1].grad), (free_value(layer).grad, folded)]
    if twin.bias is not None:
        pairs.append((layer.bias.grad, twin.bias.grad))
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=bound, atol=bound * 100)


@each_layer
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_computes_what_its_dense_twin_does(given, bias):
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        for shape in ((5,), (), (0,), (2, 3, 4)):
            layer, twin = twins(given, bias=bias, dtype=dtype)
            assert form_of(layer) == "fft"
            assert_alike(layer, twin, torch.randn(*shape, given[1], dtype=dtype), bound)


@each_law
def test_it_is_the_form_that_computes(given):
    layer, _ = twins(given)
    long = given[0] != "block_circulant"  # whose short blocks are transformed by products
    x = torch.randn(3, given[1])
    assert transforms(lambda: layer(x)) == 3 * long
    dense, _ = twins(given, "dense")
    assert transforms(lambda: dense(x)) == 0
    read = "aten::index_select" if given[0] == "block_circulant" else "aten::unfold"
    with torch.profiler.profile() as profile:
        layer(x)
    assert read not in {event.key for event in profile.key_averages()}  # nothing is expanded


@each_layer
def test_second_derivatives(given):
    layer, twin = twins(given, dtype=torch.float64)
    x = torch.randn(3, given[1], dtype=torch.float64)
    results = []
    for one in (layer, twin):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(one(x).pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(slope.pow(2).sum(), [x, *one.parameters()]))
    (folded,) = tp.get_tie(layer).adjoint(results[1][1])
    by_name = dict(zip((name for name, _ in layer.named_parameters()), results[0][1:], strict=True))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-10, atol=1e-10)
    found = by_name["parametrizations.weight.original0"]
    torch.testing.assert_close(found, folded, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(by_name["bias"], results[1][2], rtol=1e-10, atol=1e-10)


@each_law
def test_an_output_can_be_changed_in_place(given):
    layer, twin = twins(given, dtype=torch.float64)
    x = torch.randn(3, given[1], dtype=torch.float64)
    assert_alike(nn.Sequential(layer, nn.ReLU(inplace=True))[0], twin, x, 1e-12)
    layer.zero_grad()
    nn.Sequential(layer, nn.ReLU(inplace=True))(x).sum().backward()
    assert free_value(layer).grad is not None


@each_law
def test_half_precision_autocast_and_transforms_are_computed_densely(given):
    layer, twin = twins(given)
    x = torch.randn(3, given[1])
    with torch.autocast("cpu", torch.bfloat16):
        assert transforms(lambda: layer(x)) == 0
        assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x), twin(x))
    torch.testing.assert_close(torch.vmap(layer)(x), twin(x))
    half, half_twin = layer.to(torch.bfloat16), twin.to(torch.bfloat16)
    torch.testing.assert_close(half(x.bfloat16()), half_twin(x.bfloat16()))


@each_law
def test_complex_layers_compute_densely(given):
    layer, twin = twins(given, dtype=torch.complex64)
    x = torch.randn(3, given[1], dtype=torch.complex64)
    torch.testing.assert_close(layer(x), twin(x))


@pytest.mark.filterwarnings("error:Dynamo detected a call to a `functools.lru_cache`")
@each_law
def test_compiled_graphs_hold_the_product(given):
    torch._dynamo.reset()
    layer, twin = twins(given, dtype=torch.float64)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    x = torch.randn(3, given[1], dtype=torch.float64)
    torch.compile(layer, backend=backend, fullgraph=True)(x)
    assert "circulant_product" in graphs[0] or "diagonal_product" in graphs[0]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_alike_compiled(compiled, layer, twin, x)


def assert_alike_compiled(compiled: Any, layer: nn.Linear, twin: nn.Linear, x: Tensor) -> None:
    results = []
    for run in (compiled, twin):
        given = x.clone().requires_grad_()
        y = run(given)
        y.square().sum().backward()
        results.append((y.detach(), given.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)
    (folded,) = tp.get_tie(layer).adjoint(twin.weight.grad)
    torch.testing.assert_close(free_value(layer).grad, folded, rtol=1e-11, atol=1e-11)


@each_law
def test_exported_programs_hold_plain_operations(given):
    layer, twin = twins(given)
    x = torch.randn(3, given[1])
    program = torch.export.export(layer, (x,))
    assert not [node for node in program.graph.nodes if "tiedparam" in str(node.target)]
    torch.testing.assert_close(program.module()(x), twin(x))


# Which form is taken ------------------------------------------------------------------------


def chosen(law: str, n: int, rows: int, *, kept: bool = False, **options: Any) -> str:
    """The form of a square layer without gradients."""
    layer = tp.register_tie(nn.Linear(n, n), law, init="rescale", **options)
    order = computing_of(layer).order(tp.get_tie(layer), rows, False, kept)
    return order[0].name if order else "dense"


def test_large_layers_take_it_and_small_ones_do_not():
    for law, small, large in (("circulant", 64, 256), ("toeplitz", 128, 1024)):
        assert chosen(law, small, 1) == "dense"
        assert chosen(law, large, 1) == "fft"
        assert chosen(law, large, 64) == "fft"
        assert chosen(law, small, 1, kept=True) == "dense"
        assert chosen(law, 512, 1, kept=True) == "dense"  # whose weight is at hand
    assert chosen("hankel", 1024, 64) == "fft"
    assert chosen("block_circulant", 1024, 64, block=64) == "fft"
    assert chosen("block_circulant", 64, 64, block=16) == "dense"
    for rows in (1, 8, 64):
        assert chosen("block_circulant", 1024, rows, block=2) == "dense"
    assert chosen("circulant", 1024, 8, kept=True) == "fft"  # which is read for few rows


@pytest.mark.parametrize("law", ["circulant", "toeplitz", "hankel"])
def test_an_embedding_has_no_such_form(law):
    with pytest.raises(
        tp.TieError, match="'fft' is not a form of .* for the weight of a Embedding"
    ):
        tp.register_tie(nn.Embedding(6, 6), law, compute="fft")
    tp.register_tie(nn.Embedding(6, 6), law)
