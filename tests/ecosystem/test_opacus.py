"""Opacus on tied models: per-sample gradients, and a private step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiedparam as tp
from tiedparam import TieError

pytest.importorskip("opacus")
from opacus import GradSampleModule, PrivacyEngine
from opacus.grad_sample.gsm_exp_weights import GradSampleModuleExpandedWeights

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
RULES = ["flip_sym", "row_repeat", "channel_shared"]


def network(rule: str) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    if "copy" in rule:
        tp.register_tie(net[2], rule, source="0", root=net)
    else:
        tp.register_tie(net[2], rule, init="rescale")
    return net


def one_by_one(net):
    """Each sample's gradient by a backward pass of its own."""
    found = {name: [] for name, _ in net.named_parameters()}
    for x in X:
        net.zero_grad()
        net(x[None]).square().sum().backward()
        for name, parameter in net.named_parameters():
            found[name].append(parameter.grad.clone())
    net.zero_grad()
    return {name: torch.stack(each) for name, each in found.items()}


@pytest.mark.feature("Libraries", "Opacus: per-sample gradients by hooks and by functorch")
@pytest.mark.parametrize("functorch", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_per_sample_gradients(rule, functorch):
    net = network(rule)
    wanted = one_by_one(net)
    sampled = GradSampleModule(net, loss_reduction="sum", force_functorch=functorch)
    sampled(X).square().sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad_sample, wanted[name])


@pytest.mark.parametrize("rule", RULES)
def test_a_private_step_without_noise_is_a_clipped_step(rule):
    net, twin = network(rule), network(rule)
    wanted = one_by_one(twin)
    norms = sum(each.flatten(1).square().sum(1) for each in wanted.values()).sqrt()
    clip = (1.0 / (norms + 1e-6)).clamp(max=1.0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X), batch_size=5)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    private, sgd, _ = PrivacyEngine().make_private(
        module=net, optimizer=sgd, data_loader=loader, noise_multiplier=0.0, max_grad_norm=1.0,
        poisson_sampling=False, loss_reduction="sum",
    )  # fmt: skip
    private(X).square().sum().backward()
    sgd.step()
    for (name, parameter), old in zip(net.named_parameters(), twin.parameters(), strict=True):
        gradient = torch.einsum("b...,b->...", wanted[name], clip)
        torch.testing.assert_close(parameter.detach(), (old - 0.1 * gradient).detach())
    weight = tp.get_tie(net[2]).project(net[2].weight.detach())
    assert torch.equal(net[2].weight.detach(), weight)


@pytest.mark.feature(
    "Libraries",
    "Opacus on a model with a copy",
    refused="it copies layers one by one; untie the copy",
)
@pytest.mark.parametrize("rule", ["copy", "squared_copy"])
def test_copies_are_refused(rule):
    net = network(rule)
    with pytest.raises(TieError, match="cannot copy 'weight' of Linear.*without its source"):
        GradSampleModule(net)
    assert type(net[2].weight).__name__ == "GuardedWeight"


@pytest.mark.feature(
    "Libraries",
    "Opacus with `ExpandedWeights`",
    refused="torch's own error, for laws that reshape; use hooks or functorch",
)
def test_expanded_weights_raise():
    sampled = GradSampleModuleExpandedWeights(network("flip_sym"), loss_reduction="sum")
    with pytest.raises(RuntimeError, match="Expanded Weights"):
        sampled(X)
