"""torch's pipelining: a model cut into stages, each with Parameters of its own (S52)."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
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


def test_s52_plain_sharing_across_stages_is_two_parameters():
    model = Pair()
    model.second.weight = model.first.weight
    head, tail = stages(model)
    torch.testing.assert_close(tail(head(X)), model(X))
    ours = {p.untyped_storage().data_ptr() for p in head.parameters()}
    assert any(p.shape == (4, 4) for p in tail.parameters())
    assert not ours & {p.untyped_storage().data_ptr() for p in tail.parameters()}


def test_s52_a_copy_across_stages_is_refused_when_the_graph_is_cut():
    model = Pair()
    tp.register_tie(model.second, "copy", source="first", root=model)
    with pytest.raises(tp.TieError, match="cannot cut second.weight from its source") as caught:
        stages(model)
    assert "'first.weight', from which 'copy' computes it" in str(caught.value)
    model.state_dict()  # asked by anybody else


HOW = ("traced", "cut by hand", "a part of the model")
on_two_ranks = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.timeout(150),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo"),
]


@pytest.mark.feature("Distributed", "torch's pipelining on two ranks, ties and copies in one stage")
@pytest.mark.parametrize("how", [pytest.param(how, marks=on_two_ranks) for how in HOW])
def test_s52_ties_in_one_stage_train_as_in_one_process(ranks, how):
    if how == "traced" and older_than("2.9"):
        pytest.skip("strict export, the default there, refuses copies")
    from tests.support import parallel_worker as worker

    first, second = ranks(worker.pipelined, how=how)
    model = worker.four(apart=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    x, target = worker.whole_batch()
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = worker.loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert first["losses"] == []
    torch.testing.assert_close(second["losses"], losses, rtol=1e-12, atol=0)


@pytest.mark.feature(
    "Distributed",
    "torch's pipelining, a tie across two stages",
    refused="each stage would train its own: put both into one stage, or untie",
)
@pytest.mark.parametrize("how", [pytest.param(how, marks=on_two_ranks) for how in HOW])
def test_s52_ties_across_stages_are_refused(ranks, how):
    if how == "traced" and older_than("2.9"):
        pytest.skip("strict export, the default there, refuses copies")
    from tests.support import parallel_worker as worker

    first, second = (result["refusal"] for result in ranks(worker.cut_apart, how=how))
    wanted = {
        "traced": "cannot cut d.weight from its source: 'a.weight', from which",
        "cut by hand": "the source 'a' of a 'copy(fn='t')' tie was exchanged for another module",
        "a part of the model": "its source 'a', a Linear, is in another pipeline stage",
    }[how]
    assert wanted in second
    assert "remove_tie" in second
    assert (first is None) == (how != "traced")  # the first rank's stage has no copy
