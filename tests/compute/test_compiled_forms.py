"""Forms in the graphs of torch.compile: one operator there, plain operations in exports."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import tiedparam as tp

STREAMS = {"rule": "channel_shared", "over": "groups"}
CASES = {
    "one filter": (lambda: nn.Conv1d(8, 8, 7, padding=3, groups=8), (8, 8, 1200), STREAMS),
    "long kernel": (lambda: nn.Conv1d(8, 8, 25, padding="same", groups=8), (4, 8, 1200), STREAMS),
    "dilated": (
        lambda: nn.Conv1d(8, 8, 3, padding=9, dilation=9, groups=8), (4, 8, 8000), STREAMS,
    ),
    "images": (lambda: nn.Conv2d(8, 8, 5, padding=2, groups=8), (2, 8, 40, 40), STREAMS),
    "banks": (lambda: nn.Conv1d(8, 32, 3, groups=8), (4, 8, 1026), STREAMS),
    "sum": (lambda: nn.Conv2d(16, 16, 3), (4, 16, 34, 34), {"rule": "channel_shared"}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def twins(name):
    make, shape, options = CASES[name]
    torch.manual_seed(3)
    layer = make()
    tp.register_tie(layer, **options, init="project")
    dense = make()
    dense.load_state_dict({"weight": layer.weight.detach().clone(), "bias": layer.bias.detach()})
    return layer, dense, torch.randn(shape, requires_grad=True)


def recorder(graphs):
    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    return backend


def holds_product(targets):
    return any(target.startswith("tiedparam.") for target in targets)


@pytest.mark.parametrize("name", CASES)
def test_graphs_hold_the_product_and_equal_the_dense_layer(name):
    layer, dense, x = twins(name)
    graphs = []
    for compiled in (
        torch.compile(layer, backend=recorder(graphs), fullgraph=True),
        torch.compile(layer, backend="aot_eager", fullgraph=True),
    ):
        y, expected = compiled(x), dense(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        probe = torch.randn_like(y)
        free = layer.parametrizations.weight.original0
        found = torch.autograd.grad(y, (x, free, layer.bias), probe)
        wanted = torch.autograd.grad(expected, (x, dense.weight, dense.bias), probe)
        summed = tp.get_tie(layer).adjoint(wanted[1])[0]
        for mine, theirs in zip(found, (wanted[0], summed, wanted[2]), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)
    assert all(map(holds_product, graphs))
    assert graphs


def test_inductor_keeps_the_product():
    layer, dense, x = twins("one filter")
    compiled = torch.compile(layer, fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, dense(x), rtol=1e-5, atol=1e-5)
    y.sum().backward()


@pytest.mark.parametrize("name", ["one filter", "banks", "sum"])
def test_one_graph_for_every_batch(name):
    layer, dense, x = twins(name)
    layer = copy.deepcopy(pickle.loads(pickle.dumps(layer)))
    graphs = []
    compiled = torch.compile(layer, backend=recorder(graphs), fullgraph=True, dynamic=True)
    for n in (12, 13, 17):  # no other size of the layer: those would be taken for the same
        batch = x.detach()[:1].repeat(n, *(1,) * (x.dim() - 1)).requires_grad_()
        torch.testing.assert_close(compiled(batch), dense(batch), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
    assert holds_product(graphs[0])


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["long kernel", "sum"])
def test_exports_hold_plain_operations(name, strict):
    layer, _, x = twins(name)
    program = torch.export.export(layer, (x.detach(),), strict=strict)
    assert not holds_product({str(node.target) for node in program.graph.nodes})


@pytest.mark.parametrize("name", ["long kernel", "banks", "sum"])
def test_bfloat16_and_autocast_take_torchs_operations(name):
    layer, _, x = twins(name)
    graphs = []
    compiled = torch.compile(layer, backend=recorder(graphs), fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(x)
    layer.bfloat16()
    assert compiled(x.bfloat16()).dtype is torch.bfloat16
    assert len(graphs) == 2
    assert not any(map(holds_product, graphs))


@pytest.mark.parametrize("law", ["circulant", "hankel"])
def test_every_size_may_be_a_symbol(law):
    """As the number of features is, once a batch of one row is compiled for all."""
    layer = tp.register_tie(nn.Linear(96, 96), law, init="rescale", compute="fft")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (2, 5, 0, 1):
        x = torch.randn(rows, 96, requires_grad=True)
        torch.testing.assert_close(compiled(x), layer(x))
