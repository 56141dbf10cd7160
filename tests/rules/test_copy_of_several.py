"""copy of several sources: W3 = f(W1, W2), tied ones among them and any importable function."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import tiedparam as tp
from tests.support.cases import assert_refused


def blend(first: Tensor, second: Tensor) -> Tensor:
    return 0.25 * first + 0.75 * second


def three(seed: int = 0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    return nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})


def tied(seed: int = 0, fn=blend) -> nn.ModuleDict:
    """The second source is tied itself, and so computed from the first."""
    model = three(seed)
    tp.register_tie(model["b"], "squared_copy", source="a", root=model)
    tp.register_tie(model["c"], "copy", source=["a", "b"], fn=fn, root=model)
    return model


def assert_law(model: nn.ModuleDict, fn=blend) -> None:
    weight = model["a"].weight
    assert torch.equal(model["c"].weight, fn(weight, weight * weight))


def test_nothing_is_stored_and_gradients_of_all_uses_arrive():
    model = tied()
    assert_law(model)
    assert list(model.state_dict()) == ["a.weight", "a.bias", "b.bias", "c.bias"]
    model["c"](torch.ones(1, 4)).sum().backward()
    weight = model["a"].weight
    torch.testing.assert_close(weight.grad, 0.25 + 0.75 * 2 * weight.detach())


@pytest.mark.parametrize("fn", [torch.add, torch.maximum, torch.kron], ids=lambda fn: fn.__name__)
def test_any_function_of_two_tensors(fn):
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    c = nn.Linear(16, 16) if fn is torch.kron else nn.Linear(4, 4)
    tp.register_tie(c, "copy", source=[a, b], fn=fn)
    assert torch.equal(c.weight, fn(a.weight, b.weight))


def test_other_tensors_of_the_sources():
    a, b = nn.Linear(3, 4), nn.Linear(4, 3)
    c = nn.Linear(3, 4)
    tp.register_tie(c, "copy", source=[a, b], source_name=["bias", "bias"], fn=torch.outer)
    assert torch.equal(c.weight, torch.outer(a.bias, b.bias))


@pytest.mark.parametrize(
    "replica", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_replicas_read_their_own_layers(replica):
    model = tied()
    twin = replica(model)
    with torch.no_grad():
        twin["a"].weight.mul_(2)
    assert_law(twin)
    assert_law(model)
    assert not torch.equal(twin["c"].weight, model["c"].weight)


def test_files_plans_and_dense_dictionaries(tmp_path):
    model = tied()
    tp.save(model, tmp_path / "tied.safetensors")
    functions = {f"{blend.__module__}:blend": blend}
    again = tp.load(tmp_path / "tied.safetensors", three(1), functions=functions)
    assert_law(again)
    assert torch.equal(again["c"].weight, model["c"].weight)
    tp.export_dense(model, tmp_path / "dense.safetensors")
    dense = tp.load(tmp_path / "dense.safetensors", three(1))
    assert torch.equal(dense["c"].weight, model["c"].weight)
    other = tied(2)
    other.load_state_dict(tp.dense_state_dict(model))
    assert torch.equal(other["c"].weight, model["c"].weight)
    wrong = tp.dense_state_dict(model)
    wrong["c.weight"] = wrong["c.weight"] + 1
    with pytest.raises(RuntimeError, match="disagrees with its source"):
        other.load_state_dict(wrong)
    planned = three()
    tp.tie_model(planned, {
        "b": ("squared_copy", {"source": "a"}), "c": ("copy", {"source": ["a", "b"], "fn": blend}),
    })  # fmt: skip
    assert_law(planned)
    report = str(tp.report(planned))
    assert "of a.weight and b.weight" in report


def test_an_optimizer_drops_the_state_of_the_copy_and_keeps_that_of_its_sources():
    model = three()
    optimizer = torch.optim.Adam(model.parameters())
    sum(layer(torch.ones(1, 4)).sum() for layer in model.values()).backward()
    optimizer.step()
    optimizer.zero_grad()
    kept, gone = optimizer.state[model["a"].weight], model["c"].weight
    tp.register_tie(
        model["c"], "copy", source=["a", "b"], fn=blend, root=model, optimizer=optimizer
    )
    assert gone not in optimizer.state
    assert optimizer.state[model["a"].weight] is kept
    model["c"](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    tp.remove_tie(model["c"], optimizer=optimizer)  # joins the group of its sources
    assert any(p is model["c"].weight for p in optimizer.param_groups[0]["params"])


def test_a_pending_gradient_is_shared_by_the_sources():
    model, before = three(), tied()
    tp.remove_tie(before["b"])
    with torch.no_grad():
        model["b"].weight.copy_(before["b"].weight)
        model["c"].weight.copy_(before["c"].weight)
    x = torch.randn(2, 4)
    for each in (model, before):
        each["c"](x).square().sum().backward()
    tp.register_tie(model["c"], "copy", source=["a", "b"], fn=blend, root=model)
    for name in "ab":
        torch.testing.assert_close(model[name].weight.grad, before[name].weight.grad)


def test_one_graph_for_all_that_is_read():
    torch._dynamo.reset()
    model = tied()
    x = torch.randn(2, 4)
    compiled = torch.compile(model["c"], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model["c"](x))


def test_what_becomes_of_one_source_is_told():
    model = tied()
    model["b"] = nn.Linear(4, 4)
    with pytest.raises(tp.TieError, match="the source 'b' .* was exchanged"):
        model["c"](torch.ones(1, 4))
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    refuse = {"source": [a, b]}
    assert_refused(nn.Linear(4, 4), "copy", "fn raised TypeError", fn=torch.t, **refuse)
    assert_refused(nn.Linear(4, 4), "copy", "takes", "fn=", **refuse)
    assert_refused(nn.Linear(4, 4), "squared_copy", "reads one layer", **refuse)
    c = tp.register_tie(nn.Linear(4, 4), "copy", source=[a, b], fn=blend)
    assert_refused(a, "copy", "would form a cycle", source=[b, c], fn=blend)
