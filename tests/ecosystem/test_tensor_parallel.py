"""Tensor parallelism: two ranks that each compute a part of a layer, against one process."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

import tiedparam as tp
from tests.support import ROOT, older_than, with_fsdp2

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch without gloo", allow_module_level=True)

from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from tests.support import parallel_worker as worker
from tests.support.ranks import torchrun

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(150)]


def assert_close(got, wanted) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def assert_trained_alike(results: list[dict], alone: dict) -> None:
    """Outputs, gradients and states of both ranks are those of one process."""
    for result in results:
        assert_close(result["outputs"], alone["outputs"])
        for part in ("gradients", "state"):
            assert result[part].keys() == alone[part].keys()
            for key, value in alone[part].items():
                assert_close(result[part][key], value)


def refusals_of(results: list[dict]) -> dict[str, str]:
    """The messages, which both ranks give alike, and none of which is missing."""
    first, second = (result["refusals"] for result in results)
    assert first == second
    assert first
    assert all(first.values()), [attempt for attempt, text in first.items() if text is None]
    return first


@pytest.mark.feature(
    "Distributed",
    "`parallelize_module`, laws that leave the cut axis alone: rows, heads, blocks",
)
def test_each_rank_computes_its_part(ranks):
    results = ranks(worker.cut_laws)
    assert len(results[0]) == 2 * len(worker.CUTS) == 20
    for name, (law, options) in worker.CUTS.items():
        net = worker.tied_net(law, options)
        weight, count = net[2].weight.detach(), tp.get_tie(net[2]).free_count
        alone = worker.train(net, worker.numbers)
        for how in ("rows", "columns"):
            both = [result[f"{name}, {how}"] for result in results]
            assert_trained_alike(both, alone)
            for result in both:
                assert result["axis"] == (how == "columns")
                assert torch.equal(result["weight"], weight)
                one_for_all = (name, how) in {
                    ("one row", "rows"),
                    ("one head", "rows"),
                    ("two laws", "rows"),
                    ("equal inputs", "columns"),
                }
                assert result["own"] == (count if one_for_all else count // 2)


@pytest.mark.feature(
    "Distributed",
    "`parallelize_module`, laws that mix rows or columns of different ranks",
    refused="no rank could compute its part alone: leave the layer out, or cut the other axis",
)
def test_laws_that_mix_the_parts_are_refused_before_the_first_step(ranks):
    results = ranks(worker.refused_laws)
    assert all(result["unchanged"] for result in results)
    refusals = refusals_of(results)
    assert len(refusals) == 2 * len(worker.MIXED) + 4
    assert "9 is no multiple of 2" in refusals.pop("odd")
    assert "another parametrization is stacked" in refusals.pop("stacked")
    for attempt, text in refusals.items():
        law, how = attempt.split(", ")
        assert f"2 ranks would share its axis {int(how == 'columns')}, and '{law}" in text
        other_serves = law in ("set_equivariant", "row_repeat")
        assert ("Cut it along axis 1 (RowwiseParallel), leave" in text) == other_serves
        assert "eave the layer out of the plan of parallelize_module" in text


@pytest.mark.feature(
    "Distributed", "`parallelize_module`, copies whose source is cut alike; beside `fully_shard`"
)
@with_fsdp2
def test_models_are_trained_as_by_one_process(ranks):
    results = ranks(worker.cut_models)
    assert set(results[0]) == {*worker.PLANS, "with fully_shard"}
    plans = {**worker.PLANS, "with fully_shard": worker.PLANS["of a tied layer"]}
    for name, (ties, _) in plans.items():
        alone = worker.train(worker.tied_words(ties), worker.words)
        assert_trained_alike([result[name] for result in results], alone)


@pytest.mark.feature(
    "Distributed",
    "`parallelize_module`, copies whose source is cut otherwise, or not at all",
    refused="name both in the plan, with styles that cut both alike",
)
def test_copies_that_are_cut_otherwise_than_their_source_are_refused(ranks):
    refusals = refusals_of(ranks(worker.wrong_plans))
    assert len(refusals) == len(worker.WRONG_PLANS) == 4
    assert "source 'embed.weight' is parallelized, and the layer" in refusals["the source alone"]
    assert "source is not parallelized on the same mesh" in refusals["the copy alone"]
    for name in ("cut along another axis", "copy along the other axis"):
        assert "its source is cut otherwise than its law needs" in refusals[name]
    for text in refusals.values():
        assert "Name both layers in the plan of parallelize_module, or neither" in text


def test_a_tied_norm_is_whole_on_each_rank_of_a_sequence(ranks):
    norm = tp.register_tie(nn.LayerNorm(worker.SIZE).double(), "row_repeat", groups=3)
    tp.assign_(norm, torch.linspace(0, 1, worker.SIZE).double(), project=True)
    y = norm(worker.numbers(0)[None, :4])
    y.square().sum().backward()
    for result in ranks(worker.sequence_parallel):
        assert_close(result["output"], y.detach())
        for name, parameter in norm.named_parameters():
            assert_close(result["gradients"][name], parameter.grad)


@pytest.mark.feature(
    "Distributed",
    "`torch.distributed.checkpoint` between two ranks of `parallelize_module` and one process",
)
def test_values_in_parts_are_read_written_and_saved(ranks, tmp_path):
    results = ranks(worker.values_in_parts, folder=str(tmp_path / "two"))
    ties, _ = worker.PLANS["of a tied layer"]
    alone = worker.tied_words(ties)
    with torch.no_grad():
        output = alone(worker.words(0))
    for result in results:
        for key, value in tp.dense_state_dict(alone).items():
            assert torch.equal(result["dense"][key], value)
        assert_close(result["copy"], output)
        columns = torch.arange(1.0, worker.SIZE + 1).double()
        assert torch.equal(result["assigned"], columns.expand(worker.SIZE, -1))
        assert torch.equal(result["drawn"], results[0]["drawn"])
        assert result["drawn"].unique(dim=0).shape == (4, worker.SIZE)
    for text in refusals_of(results).values():
        assert "sharded already" in text or "it is sharded. Freeze" in text
        assert "before fully_shard or parallelize_module" in text
    optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        alone(worker.words(step)).square().mean().backward()
        optimizer.step()

    # two ranks to one
    other = worker.tied_words(ties)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    state = {
        "model": other.state_dict(),
        "optimizer": get_optimizer_state_dict(other, other_optimizer),
    }
    dcp.load(state, checkpoint_id=tmp_path / "two")
    moments = get_optimizer_state_dict(alone, optimizer)
    for key, value in alone.state_dict().items():
        assert torch.equal(state["model"][key], results[0]["state"][key])
        assert_close(state["model"][key], value)
    assert state["optimizer"]["state"].keys() == moments["state"].keys()
    for key, values in moments["state"].items():
        for name, value in values.items():
            assert_close(state["optimizer"]["state"][key][name], value)
    other.load_state_dict(state["model"])
    set_optimizer_state_dict(other, other_optimizer, state["optimizer"])

    # and one to two
    state["optimizer"] = get_optimizer_state_dict(other, other_optimizer)
    dcp.save(state, checkpoint_id=tmp_path / "one")
    other(worker.words(2)).square().mean().backward()
    other_optimizer.step()
    for result in ranks(worker.resumed_in_parts, folder=str(tmp_path / "one")):
        for key, values in state["optimizer"]["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                assert result["moments"]["state"][key][name].shape == values[name].shape
        for key, value in other.state_dict().items():
            assert_close(result["after"][key], value)


@pytest.mark.feature("Distributed", "`share_heads` and `hashed`, under DDP and FSDP2")
@pytest.mark.parametrize(
    "how", ["ddp", *(pytest.param(how, marks=with_fsdp2) for how in ("layers", "root"))]
)
def test_shared_heads_and_hashed_values_train_as_in_one_process(ranks, how):
    results = ranks(worker.shared_training, how=how)
    alone = worker.train(worker.shared_model(), worker.sentences)
    halves = [result["outputs"] for result in results]
    assert_close(torch.cat(halves, 1), alone["outputs"])
    for result in results:
        for part in ("gradients", "state"):
            named = {key.removeprefix("module."): value for key, value in result[part].items()}
            assert named.keys() == alone[part].keys()
            for key, value in alone[part].items():
                assert_close(named[key], value)


EXAMPLE = ROOT / "docs" / "examples" / "share_blocks.py"


@pytest.mark.feature(
    "Distributed",
    "a language model whose blocks share: DDP, FSDP2 in one unit, tensor parallelism, `torchrun`",
)
def test_a_model_of_shared_blocks_does_not_depend_on_the_number_of_processes(ranks):
    losses = worker.example(EXAMPLE).train(None, 10, torch.device("cpu"))
    assert losses[-1] < 2.9 < 3.33 < losses[0]  # that of a guess is log(28), 3.33
    printed = torchrun(EXAMPLE, 2, "--wrap", "ddp", "--steps", "10")
    said = [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", printed, re.MULTILINE)]
    assert said == pytest.approx([losses[0], losses[9]], abs=1e-5)
    for how in ("tensor",) if older_than("2.7") else ("fsdp", "tensor"):
        for result in ranks(worker.example_training, script=str(EXAMPLE), how=how):
            assert result["losses"] == pytest.approx(losses, abs=1e-5)
            assert result["values"] == result["of one block"]  # one block and the letters
