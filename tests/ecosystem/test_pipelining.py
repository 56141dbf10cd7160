"""torch's pipelining: a model cut into stages, each with Parameters of its own (S52)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import SplitPoint, pipeline

import tiedparam as tp
from tests.support import older_than

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def stages(model):
    """The two stages of a model that is cut before its second layer."""
    cut = pipeline(model, mb_args=(X,), split_spec={"second": SplitPoint.BEGINNING})
    return cut.get_stage_module(0), cut.get_stage_module(1)


@pytest.mark.slow
@pytest.mark.feature("Distributed", "torch's pipelining, with ties inside of a stage")
@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(
            "flip_sym",
            marks=pytest.mark.skipif(
                older_than("2.7"),
                reason="pipelining of torch 2.6 cannot cut this graph, and says so",
            ),
        ),
        "row_repeat",
        "channel_shared",
    ],
)
def test_s52_a_tie_inside_of_a_stage(rule):
    model = Pair()
    tp.register_tie(model.second, rule, init="rescale")
    head, tail = stages(model)
    y = tail(head(X))
    torch.testing.assert_close(y, model(X))
    y.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in tail.named_parameters()}
    model.zero_grad()
    model(X).square().sum().backward()
    key = "parametrizations.weight.original0"
    torch.testing.assert_close(grads[f"second.{key}"], model.second.get_parameter(key).grad)


@pytest.mark.feature(
    "Distributed",
    "torch's pipelining, a `copy` across two stages",
    limit="each stage trains a Parameter of its own, as with plain sharing; keep both in one stage",
)
@pytest.mark.parametrize("tie", [True, False])
def test_s52_a_copy_across_stages_is_two_parameters(tie):
    model = Pair()
    if tie:
        tp.register_tie(model.second, "copy", source="first", root=model)
    else:
        model.second.weight = model.first.weight
    head, tail = stages(model)
    torch.testing.assert_close(tail(head(X)), model(X))
    ours = {p.untyped_storage().data_ptr() for p in head.parameters()}
    assert any(p.shape == (4, 4) for p in tail.parameters())
    assert not ours & {p.untyped_storage().data_ptr() for p in tail.parameters()}
