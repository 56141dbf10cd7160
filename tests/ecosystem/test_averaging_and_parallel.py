"""Weight averaging, nn.DataParallel, and models that are stacked for vmap."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import tiedparam as tp

replicating = importlib.import_module("torch.nn.parallel.replicate")


def tied_model(copies: bool = True) -> nn.Sequential:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2)
    )
    tp.register_tie(model[0], "flip_sym", root=model)
    tp.register_tie(model[4], "row_repeat", root=model)
    if copies:
        tp.register_tie(model[3], "copy", source=model[0], fn=torch.square, root=model)
    return model


def train(model, average, steps=4):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)


@pytest.mark.feature(
    "Model averaging and parallelism",
    "`torch.optim.swa_utils.AveragedModel`, EMA and SWA, with copies inside of the model",
)
@pytest.mark.parametrize("decay", [None, 0.7], ids=["SWA", "EMA"])
def test_s13_averages_are_those_of_the_free_values(decay):
    model = tied_model()
    function = get_ema_multi_avg_fn(decay) if decay else None
    average = AveragedModel(model, multi_avg_fn=function)
    seen: list[list[torch.Tensor]] = []
    update = average.update_parameters
    average.update_parameters = lambda m: (
        seen.append([p.detach().clone() for p in m.parameters()]), update(m)
    )  # fmt: skip
    train(model, average)
    expected = seen[0]
    for count, values in enumerate(seen[1:], start=1):
        weight = 1 - decay if decay else 1 / (count + 1)
        expected = [torch.lerp(e, v, weight) for e, v in zip(expected, values, strict=True)]
    torch.testing.assert_close([p.detach() for p in average.parameters()], expected)
    ours = average.module
    weight = ours[0].weight
    assert torch.equal(weight, weight.t())
    # the copy in the average follows the average's own source, not the model's
    torch.testing.assert_close(ours[3].weight, ours[0].weight.square())
    assert not torch.allclose(ours[3].weight, model[3].weight)
    update_bn([torch.randn(8, 4)], average)
    loaded = AveragedModel(tied_model(), multi_avg_fn=function)
    loaded.load_state_dict(average.state_dict())
    x = torch.randn(3, 4)
    average.eval(), loaded.eval()
    torch.testing.assert_close(loaded(x), average(x))


def test_swa_learning_rate_schedules():
    model = tied_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = SWALR(optimizer, swa_lr=0.05, anneal_epochs=1)
    model(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.feature(
    "Model averaging and parallelism", "`nn.DataParallel` of rules with free values"
)
def test_data_parallel_replicas(monkeypatch):
    """The replicas that DataParallel makes, without its devices."""
    model = tied_model(copies=False).eval()
    x = torch.randn(4, 4)
    assert torch.equal(nn.DataParallel(model)(x), model(x))  # on the CPU it passes through
    # replicate() itself, with the CPU standing for every device
    monkeypatch.setattr(replicating, "_get_device_index", lambda device, _: device)
    monkeypatch.setattr(
        replicating,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[t * 1 for t in tensors] for _ in devices],
    )
    replicas = replicating.replicate(model, [0, 1])
    for replica in replicas:
        torch.testing.assert_close(replica(x), model(x))
    sum(replica(x).square().sum() for replica in replicas).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (2 * model(x).square().sum()).backward()
    torch.testing.assert_close(ours, {name: p.grad for name, p in model.named_parameters()})


@pytest.mark.feature(
    "Model averaging and parallelism",
    "`nn.DataParallel` of copies, on several devices",
    refused="a replica would read the source of the first device; use DistributedDataParallel",
)
def test_data_parallel_refuses_to_replicate_a_copy(monkeypatch):
    model = tied_model()
    monkeypatch.setattr(replicating, "_get_device_index", lambda device, _: device)
    monkeypatch.setattr(
        replicating,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[t * 1 for t in tensors] for _ in devices],
    )
    with pytest.raises(
        tp.TieError, match=r"DataParallel cannot replicate .*DistributedDataParallel"
    ):
        replicating.replicate(model, [0, 1])
    x = torch.randn(4, 4)
    model.eval()
    assert torch.equal(nn.DataParallel(model)(x), model(x))


@pytest.mark.feature(
    "Model averaging and parallelism", "`torch.func.stack_module_state` and `vmap`: ensembles"
)
def test_ensembles():
    models = [tied_model().eval() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0])
    x = torch.randn(5, 4)

    def run(p, b):
        return torch.func.functional_call(base, (p, b), (x,))

    outputs = torch.func.vmap(run)(parameters, buffers)
    for model, output in zip(models, outputs, strict=True):
        torch.testing.assert_close(output, model(x))
