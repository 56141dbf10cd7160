"""Products that stay one node in compiled graphs, and plain operations elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiedparam.products.opaque import Opaque
from tiedparam.util.torch_modes import in_compiled_graph

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CALLS: list[str] = []


def _scale(x: Tensor, row: Tensor, bias: Tensor | None, times: int) -> Tensor:
    CALLS.append("forward")
    y = torch.empty_like(x)
    torch.mul(x, row * times, out=y)  # which autograd would refuse
    return y if bias is None else y.add_(bias)


def _gradients(
    needs: Sequence[bool], gradient: Tensor, x: Tensor, row: Tensor, bias: Tensor | None, times: int
) -> Sequence[Tensor | None]:
    CALLS.append("backward, recorded" if torch.is_grad_enabled() else "backward")
    return (
        gradient * row * times if needs[0] else None,
        (gradient * x).sum(0) * times if needs[1] else None,
        gradient.sum(0) if needs[2] else None,
    )


scaled = Opaque(
    "test_scaled(Tensor x, Tensor row, Tensor? bias, int times) -> Tensor",
    _scale,
    _gradients,
    lambda x, row, bias, times: x.new_empty(x.shape),
)


class Layer(nn.Module):
    """Takes the product where it is allowed, plain operations elsewhere."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        row, shift = torch.randn(2, 3, dtype=torch.float64, generator=generator)
        self.row = nn.Parameter(row)
        self.bias = nn.Parameter(shift) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and not in_compiled_graph():
            return self.plain(x)
        return scaled(x, self.row, self.bias, 2)

    def plain(self, x: Tensor) -> Tensor:
        y = x * self.row * 2
        return y if self.bias is None else y + self.bias


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    CALLS.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)


def _gradients_of(function: Any, layer: Layer, x: Tensor) -> tuple[Tensor, ...]:
    given: tuple[Tensor, ...] = torch.autograd.grad(
        function(x).square().sum(), (x, *layer.parameters())
    )
    return given


@pytest.mark.parametrize("bias", [True, False])
def test_eager_gradients(x: Tensor, bias: bool) -> None:
    layer = Layer(bias)
    inputs = (x, *layer.parameters())

    def product(x: Tensor, row: Tensor, bias: Tensor | None = None) -> Tensor:
        return scaled(x, row, bias, 2)

    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("bias", [True, False])
def test_compiled_gradients_by_the_same_functions(x: Tensor, backend: str, bias: bool) -> None:
    layer = Layer(bias)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    expected = _gradients_of(layer.plain, layer, x)
    for _ in range(2):
        given = _gradients_of(compiled, layer, x)
        torch.testing.assert_close(given, expected)
    assert CALLS == ["forward", "backward"] * 2


def test_a_frozen_row_gets_no_gradient(x: Tensor) -> None:
    layer = Layer()
    layer.row.requires_grad_(False)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    y.sum().backward()
    assert layer.row.grad is None
    torch.testing.assert_close(x.grad, (layer.row * 2).expand(4, 3))


def test_second_derivatives_where_graphs_run_by_operations(x: Tensor) -> None:
    compiled = torch.compile(lambda *given: scaled(*given, None, 2), backend="eager")
    assert torch.autograd.gradgradcheck(compiled, (x, Layer().row))


def test_one_graph_for_all_batches(x: Tensor) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    layer = Layer()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for n in (4, 5, 9):
        rows = x.detach().repeat(n, 1)
        torch.testing.assert_close(compiled(rows), layer.plain(rows))
    assert len(graphs) == 1
    assert "tiedparam.test_scaled" in graphs[0].print_readable(print_output=False)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_hold_plain_operations(x: Tensor, strict: bool) -> None:
    layer = Layer()
    torch.compile(layer, backend="aot_eager")(x)  # the operator is there
    program = torch.export.export(layer, (x.detach(),), strict=strict)
    assert not [n for n in program.graph.nodes if "tiedparam" in str(n.target)]


def test_transforms_in_compiled_code_see_plain_operations(x: Tensor) -> None:
    layer = Layer()
    rows = x.detach()
    compiled = torch.compile(lambda x: torch.vmap(layer)(x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(rows), layer.plain(rows))
    slope = torch.compile(
        torch.func.grad(lambda x: layer(x).sum()), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(slope(rows), (layer.row * 2).expand(4, 3))
