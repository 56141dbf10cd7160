"""The same promises on a GPU; skipped where there is none."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

import tiedparam as tp
from tests.support.optimizer_cases import MULTIPLICITY, VARIANTS, check_trajectory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

CASES = [
    pytest.param(name, example, id=f"{name}-{index}")
    for name, rule in tp.available_rules().items()
    for index, example in enumerate(rule.examples())
]


@pytest.mark.parametrize(("name", "example"), CASES)
def test_law_holds_through_fused_steps_and_moves(name, example):
    model = example.build().cuda()
    layer = model.get_submodule(example.path)
    tp.register_tie(layer, name, example.tensor_name, root=model, **example.options)
    rule = tp.get_tie(layer, example.tensor_name)

    def lawful() -> bool:
        weight = getattr(layer, example.tensor_name)
        symmetries = list(rule.symmetries(weight))
        return bool(symmetries) and all(torch.equal(s, weight) for s in symmetries)

    assert lawful()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        getattr(layer, example.tensor_name).square().sum().backward()
        optimizer.step()
        assert lawful()
    twin = copy.deepcopy(model).cpu()
    weight = getattr(twin.get_submodule(example.path), example.tensor_name)
    torch.testing.assert_close(weight, getattr(layer, example.tensor_name).cpu())
    tp.remove_tie(layer, example.tensor_name, optimizer=optimizer)
    assert getattr(layer, example.tensor_name).is_cuda


@pytest.mark.parametrize("over", ["in", "out", "all"])
def test_forward_compute_equals_the_dense_layer(over):
    layer = torch.nn.Conv2d(16, 16, 3, padding=1).cuda().double()
    dense = copy.deepcopy(layer)
    tp.register_tie(layer, "channel_shared", over=over)
    dense.load_state_dict(tp.dense_state_dict(layer))
    x = torch.randn(4, 16, 9, 9, device="cuda", dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x))


@pytest.mark.parametrize("case", MULTIPLICITY)
@pytest.mark.parametrize("name", VARIANTS)
def test_an_optimizer_that_is_moved_goes_on_as_the_dense_run(case, name):
    check_trajectory(case, VARIANTS[name], "cuda")
    if "capturable" in inspect.signature(VARIANTS[name].kind).parameters:
        check_trajectory(case, VARIANTS[name], "cuda", capturable=True)


def test_the_data_of_a_law_lies_where_the_layer_does():
    mask = torch.arange(36).view(6, 6) % 3 > 0
    layer = tp.register_tie(torch.nn.Linear(6, 6).cuda(), "masked", mask=mask)
    rule = tp.get_tie(layer)
    assert all(value.is_cuda for value in rule.data().values())
    before, entries = layer.weight.detach().clone(), copy.deepcopy(layer.state_dict())
    for value in rule.buffers():  # what DistributedDataParallel does before every forward
        value.copy_(value.clone())
    assert torch.equal(layer.weight, before)
    layer.to_empty(device="cuda")
    for value in rule.buffers():
        value.fill_(0x5A)
    with pytest.raises(tp.TieError, match="to_empty"):
        layer.weight  # noqa: B018
    layer.load_state_dict(entries)
    assert torch.equal(layer.weight, before)
    layer.cpu()
    assert not any(value.is_cuda for value in rule.data().values())
    assert torch.equal(layer.weight, before.cpu())
