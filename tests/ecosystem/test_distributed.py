"""Two ranks on one machine, over gloo: each scenario against one process and the whole batch.

The two processes are asked for one scenario of `distributed_worker` after another.
"""

from __future__ import annotations

import copy
import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

import tiedparam as tp
from tests.support import ROOT, older_than, with_fsdp2
from tests.support import distributed_worker as worker
from tests.support.ranks import torchrun
from tests.support.users_laws import Shifted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.timeout(150),
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
    ),
    pytest.mark.filterwarnings("ignore:.*torch.distributed.*:FutureWarning"),
]

# The oracle: one process, the whole batch -------------------------------------------------


def alone(steps: int = 4, seed: int = 0) -> tuple[nn.Module, list[float]]:
    model = worker.tie(worker.build(seed))
    return model, worker.train(model, steps, alone=True)


def assert_close(got, wanted, **tolerance) -> None:
    torch.testing.assert_close(got, wanted, **(tolerance or {"rtol": 1e-9, "atol": 1e-11}))


def assert_ranks_agree(results: list[dict]) -> None:
    """Both ranks hold the same, to the bit."""
    first, second = results
    for part in ("state", "weights"):
        assert first[part].keys() == second[part].keys()
        assert first[part]
        for key, value in first[part].items():
            assert torch.equal(value, second[part][key]), f"the ranks differ in {key}"


def assert_lawful(result: dict, build=lambda: worker.tie(worker.build(1))) -> None:
    """The weights that a rank computed with satisfy the laws to the bit."""
    model = build()
    model.load_state_dict(result["state"])
    seen = 0
    for name, module in model.named_modules():
        if not tp.is_tied(module, recurse=False):
            continue
        weight = result["weights"][f"{name}.weight"]
        for moved in tp.get_tie(module).symmetries(weight):
            assert torch.equal(moved, weight), f"the law of {name} is broken"
            seen += 1
    assert seen >= len(result["weights"]) > 0


def assert_as_one_process(results: list[dict], model: nn.Module, losses, **tolerance) -> None:
    """Losses, state and weights are those of one process on the whole batch."""
    assert_ranks_agree(results)
    assert_lawful(results[0])
    if losses is not None:
        mean = torch.tensor([r["losses"] for r in results], dtype=torch.float64).mean(0)
        assert_close(mean, torch.tensor(losses, dtype=torch.float64), **tolerance)
    state = model.state_dict()
    assert results[0]["state"].keys() == state.keys()
    for key, value in results[0]["state"].items():
        assert_close(value, state[key], **tolerance)
    for name in worker.TIED:
        weight = getattr(model, name).weight.detach()
        assert_close(results[0]["weights"][f"{name}.weight"], weight, **tolerance)


def assert_small_trained_alike(results: list[dict], model: nn.Module) -> None:
    """After `train_small`: losses and state are those of one process on the whole batch."""
    losses = worker.train_small(model, alone=True)
    assert_ranks_agree(results)
    mean = torch.tensor([r["losses"] for r in results], dtype=torch.float64).mean(0)
    assert_close(mean, torch.tensor(losses, dtype=torch.float64))
    state = model.state_dict()
    assert results[0]["state"].keys() == state.keys()
    for key, value in state.items():
        assert_close(results[0]["state"][key], value)


# Laws that are data -----------------------------------------------------------------------


@pytest.mark.feature("Distributed", "laws that hold a mask or an index, under DDP and FSDP2")
@pytest.mark.parametrize("how", ["ddp", pytest.param("meta", marks=with_fsdp2)])
def test_laws_that_are_data_train_as_in_one_process(ranks, how):
    results = ranks(worker.training_of_data, how=how)
    model = worker.net_of_data()
    losses = worker.train_small(model, alone=True)
    assert_ranks_agree(results)
    assert_lawful(results[0], worker.net_of_data)
    mean = torch.tensor([r["losses"] for r in results], dtype=torch.float64).mean(0)
    assert_close(mean, torch.tensor(losses, dtype=torch.float64))
    state = model.state_dict()
    assert results[0]["state"].keys() == state.keys()
    for key, value in results[0]["state"].items():
        assert value.dtype == state[key].dtype
        assert_close(value, state[key])
    if how == "meta":
        for result in results:
            assert "to_empty" in result["stale"]
            assert "0.weight" in result["refused"]


# DDP --------------------------------------------------------------------------------------


@pytest.mark.feature("Distributed", "`DistributedDataParallel`, tied before wrapping")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bucket_cap_mb": 0.001},
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"find_unused_parameters": True},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_ddp_trains_as_one_process(ranks, options):
    assert_as_one_process(ranks(worker.ddp_training, **options), *alone())


@pytest.mark.feature("Distributed", "DDP with a branch that is not used")
def test_ddp_leaves_an_idle_tied_branch_alone(ranks):
    results = ranks(worker.ddp_with_an_idle_branch)
    assert_as_one_process(results, *alone())
    assert all(idle and all(idle) for idle in (result["idle"] for result in results))


@pytest.mark.feature("Distributed", "DDP with `no_sync`, gradients of several batches added up")
def test_ddp_accumulates_gradients_as_one_process(ranks):
    model = worker.tie(worker.build())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    pair = []
    for x, y in worker.batches(4):
        pair.append((x, y))
        if len(pair) == 2:
            optimizer.zero_grad()
            sum(worker.loss_of(model, x, y) for x, y in pair).backward()
            optimizer.step()
            pair = []
    assert_as_one_process(ranks(worker.ddp_accumulating), model, None)


def dense_twin() -> nn.Module:
    """A stock model that holds the effective weights of the tied one."""
    twin = worker.build(1)
    twin.load_state_dict(tp.dense_state_dict(worker.tie(worker.build())))
    return twin


@pytest.mark.feature("Distributed", "structured compute under DDP and FSDP2")
@pytest.mark.parametrize(
    "how", ["ddp", *(pytest.param(how, marks=with_fsdp2) for how in ("layers", "root"))]
)
def test_forward_compute_under_a_wrapper_equals_the_dense_layer(ranks, how):
    results = ranks(worker.structured_outputs, how=how)
    ((x, y),) = worker.batches(1)
    twin = dense_twin()
    with torch.no_grad():
        for result, half in zip(results, x.chunk(2), strict=True):
            assert result["forms"] == {"stem": "windows", "rows": "reduced"}
            assert_close(result["output"], twin(half))
    # a gradient is that of the dense weight, summed over each orbit
    worker.loss_of(twin, x, y).backward()
    model = worker.tie(worker.build())
    for name in ("stem", "mid", "streams", "rows"):
        wanted = tp.get_tie(getattr(model, name)).adjoint(getattr(twin, name).weight.grad)
        for index, value in enumerate(wanted):
            key = f"{name}.parametrizations.weight.original{index}"
            for result in results:
                assert_close(result["gradients"][key], value)


@pytest.mark.feature("Distributed", "forms of laws (FFT, blocks, panels, …) under DDP and FSDP2")
@pytest.mark.parametrize("which", list(worker.BY_FORMS))
@pytest.mark.parametrize(
    "how", ["ddp", *(pytest.param(how, marks=with_fsdp2) for how in ("layers", "root"))]
)
def test_layers_compute_in_their_forms_under_a_wrapper(ranks, which, how):
    results = ranks(worker.step_by_forms, which=which, how=how)
    net = worker.net_by_forms(which)
    dense = tp.untie_model(copy.deepcopy(net))
    expected = dense(worker.input_of_forms(which))
    expected.square().mean().backward()
    wanted = {}
    for number, (layer, twin) in enumerate(zip(net, dense, strict=True)):
        wanted[f"{number}.bias"] = twin.bias.grad
        for index, value in enumerate(tp.get_tie(layer).adjoint(twin.weight.grad)):
            wanted[f"{number}.parametrizations.weight.original{index}"] = value
    for result, part in zip(results, expected.detach().chunk(2), strict=True):
        assert result["forms"] == [[form] for _, _, form, _ in worker.BY_FORMS[which]]
        assert_close(result["output"], part)
        assert result["gradients"].keys() == wanted.keys()
        for key, value in wanted.items():
            assert_close(result["gradients"][key], value)


def assert_refused(message: str | None, *parts: str) -> None:
    """A scenario's attempt was refused, with a message that says all of this."""
    assert message is not None, "not refused"
    for part in parts:
        assert part in message


def all_refused(results: list[dict]) -> dict[str, str]:
    """The messages, which are the same on both ranks; each attempt was refused."""
    first, second = (result["refusals"] for result in results)
    assert first == second
    missing = [attempt for attempt, message in first.items() if message is None]
    assert not missing, f"not refused: {missing}"
    return first


@pytest.mark.feature(
    "Distributed",
    "tying or untying under DDP",
    refused="DDP would not average the new parameters: tie before wrapping",
)
def test_s34_tying_after_ddp_is_refused(ranks):
    results = ranks(worker.late_ties_under_ddp)
    refusals = all_refused(results)
    assert len(refusals) == 8  # as many as late_ties_under_ddp tries
    assert all(
        "it is wrapped in a DistributedDataParallel already" in text for text in refusals.values()
    )
    assert "cannot tie 'code.weight'" in refusals["tie, root given"]
    assert "Tie before wrapping: drop the wrapper" in refusals["tie"]
    assert "Untie before wrapping" in refusals["untie a copy"]
    assert all(result["unchanged"] for result in results)
    assert_as_one_process(results, *alone())


def test_s34_tying_a_frozen_layer_after_ddp_is_refused(ranks):
    for result in ranks(worker.frozen_layer_under_ddp):
        assert "Tie before wrapping" in result["refusal"]


@pytest.mark.parametrize("holder", ["it is the root", "it lies in the root"])
def test_s34_a_wrapper_is_found_through_root(holder):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    finally:
        dist.destroy_process_group()  # no live object is looked for any more
    root = wrapped if holder == "it is the root" else nn.Sequential(nn.Tanh(), wrapped)
    with pytest.raises(
        tp.TieError, match="module.weight' by 'flip_sym': it is wrapped in a Distributed"
    ):
        tp.register_tie(wrapped.module, "flip_sym", root=root)
    assert type(wrapped.module) is nn.Linear
    beside = nn.Sequential(wrapped, nn.Linear(4, 4))
    assert tp.is_tied(tp.register_tie(beside[1], "flip_sym", root=beside))


@pytest.mark.feature("Distributed", "tying beside a wrapped model, or after dropping the wrapper")
def test_models_beside_ddp_can_be_tied(ranks):
    for result in ranks(worker.ties_beside_ddp):
        assert result["tied"] == [False, True, True]


# FSDP2 -----------------------------------------------------------------------------------


@pytest.mark.feature("Distributed", "FSDP2 (`fully_shard`), a unit for each layer")
@pytest.mark.parametrize("reshard", [True, False])
@with_fsdp2
def test_fsdp2_per_layer_trains_as_one_process(ranks, reshard):
    results = ranks(worker.fsdp_training, how="layers", reshard_after_forward=reshard)
    assert_as_one_process(results, *alone())
    assert all(result["local"] < 0.7 * result["total"] for result in results)


@pytest.mark.feature("Distributed", "FSDP2, the root only")
@with_fsdp2
def test_fsdp2_of_the_root_trains_as_one_process(ranks):
    assert_as_one_process(ranks(worker.fsdp_training, how="root"), *alone())


@pytest.mark.feature("Distributed", "FSDP2 with `MixedPrecisionPolicy`, bfloat16")
@with_fsdp2
def test_fsdp2_mixed_precision_trains_as_one_process(ranks):
    model = worker.tie(worker.build(dtype=torch.float32))
    names, parameters = zip(*model.named_parameters(), strict=True)
    losses = []
    for x, y in worker.batches(3, torch.float32):
        # forward and backward in bfloat16 on each half, the mean and the step in float32
        gradients, loss_of_halves = [], []
        low = {n: p.detach().bfloat16().requires_grad_() for n, p in model.named_parameters()}
        for half, target in zip(x.chunk(2), y.chunk(2), strict=True):
            output = torch.func.functional_call(model, low, (half.bfloat16(),)).float()
            loss = (output - target).square().mean()
            loss_of_halves.append(loss.item())
            gradients.append(torch.autograd.grad(loss, low.values()))
        losses.append(sum(loss_of_halves) / 2)
        with torch.no_grad():
            for parameter, first, second in zip(parameters, *gradients, strict=True):
                parameter.sub_(1e-2 * (first.float() + second.float()) / 2)
    results = ranks(worker.fsdp_mixed_precision)
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    if older_than("2.9"):  # which rounds its gradients once more, those of untied layers too
        tolerance = {"rtol": 1e-3, "atol": 2e-3}
    assert_as_one_process_in_float32(results, model, losses, tolerance)
    for result in results:
        mid = result["seen"]["mid"]
        assert mid.dtype == torch.bfloat16
        assert torch.equal(mid, mid.transpose(0, 1).flip(2, 3))
    assert len(names) == len(parameters) > 5


def assert_as_one_process_in_float32(results, model, losses, tolerance) -> None:
    mean = torch.tensor([result["losses"] for result in results]).mean(0)
    assert_close(mean, torch.tensor(losses), **tolerance)
    assert_ranks_agree(results)
    assert_lawful(results[0], lambda: worker.tie(worker.build(1, torch.float32)))
    for key, value in model.state_dict().items():
        assert_close(results[0]["state"][key], value, **tolerance)


@pytest.mark.feature("Distributed", "FSDP2 from the meta device: `to_empty`, `reset_parameters`")
@with_fsdp2
def test_fsdp2_from_meta_starts_by_resetting(ranks):
    results = ranks(worker.fsdp_from_meta, start="reset")
    assert_ranks_agree(results)
    assert_ranks_agree([result["first"] for result in results])
    first = results[0]["first"]
    assert_lawful(first)
    assert_lawful(results[0])
    assert all(value.isfinite().all() for value in first["state"].values())
    for name in worker.TIED[:4]:  # the stock layers' uniform distribution
        weight = first["weights"][f"{name}.weight"]
        bound = (weight[0].numel()) ** -0.5
        assert 0.5 * bound < weight.abs().max() <= bound


@pytest.mark.feature("Distributed", "`init_` and `assign_` on a sharded layer")
def test_fsdp2_layers_are_initialised_alike_on_all_ranks(ranks):
    firsts = [result["first"] for result in ranks(worker.fsdp_from_meta, start="init")]
    for name in worker.TIED[:4]:
        one, other = (first["weights"][f"{name}.weight"] for first in firsts)
        assert torch.equal(one, other)
        for moved in tp.get_tie(getattr(worker.tie(worker.build()), name)).symmetries(one):
            assert torch.equal(moved, one)
        assert 0.3 < one.std() < 2
        assert one.max() < 6


@pytest.mark.feature("Distributed", "FSDP2 from the meta device, then a dense checkpoint")
@with_fsdp2
def test_fsdp2_from_meta_starts_from_a_dense_checkpoint(ranks):
    results = ranks(worker.fsdp_from_meta, start="checkpoint")
    assert_as_one_process(results, *alone())
    model = worker.tie(worker.build())
    # the dense checkpoint of lawful weights comes back to the bit
    for key, value in results[0]["first"]["state"].items():
        assert torch.equal(value, model.state_dict()[key])


@pytest.mark.parametrize("how", ["layers", "root"])
@with_fsdp2
def test_fsdp2_free_values_lead_back_to_their_layers(ranks, how):
    model = worker.tie(worker.build())
    values = dict(model.named_parameters())
    wanted = [
        (path.removesuffix(".parametrizations.weight.original0"), tp.owner(value).shape)
        for path, value in values.items()
        if "original" in path
    ]
    assert wanted
    for result in ranks(worker.owners_of_sharded_values, how=how):
        assert result["before"] == wanted
        assert result["after"] == wanted


@pytest.mark.feature("Distributed", "reading, exporting and setting the weights of a sharded model")
def test_fsdp2_weights_are_read_and_set_as_in_one_process(ranks):
    results = ranks(worker.values_of_a_sharded_model)
    model = worker.tie(worker.build())
    dense = tp.dense_state_dict(model)
    for result in results:
        for name in worker.TIED:
            assert torch.equal(result["read"][name], dense[f"{name}.weight"])
        for part in ("exported", "untied", "from_parts"):
            assert list(result[part]) == list(dense)
            assert all(torch.equal(result[part][key], dense[key]) for key in dense), part
        assert result["retied_equal"] == result["keys"] == len(model.state_dict())
        assert result["state_keys"] == list(model.state_dict())
        assert result["is_tied"] == [True] * len(worker.TIED)
        for name in ("stem", "mid", "rows"):
            wanted = tp.get_tie(getattr(model, name)).project(
                getattr(worker.build(3), name).weight.detach()
            )
            assert torch.equal(result["assigned"][name], wanted)
        assert "breaks the law" in result["unlawful"]
        assert "W[o, c, x] = w[o, x]; 72 of 288 values" in result["repr"]


@pytest.mark.feature(
    "Distributed",
    "`copy.deepcopy` and `pickle` of a sharded layer",
    refused="FSDP2 knows neither; save a state dict",
)
def test_sharded_layers_are_neither_copied_nor_pickled(ranks):
    for result in ranks(worker.values_of_a_sharded_model):
        assert_refused(result["deepcopy"], "FSDP does not support deepcopy")
        assert_refused(result["pickle"], "cannot pickle this FSDPTiedConv2d: it is sharded")
        assert result["stock"]


@pytest.mark.feature(
    "Distributed",
    "tying or untying under FSDP2",
    refused="the new parameters would not be sharded: tie before `fully_shard`",
)
@pytest.mark.parametrize("how", ["layers", "root"])
@with_fsdp2
def test_s35_tying_after_fully_shard_is_refused(ranks, how):
    results = ranks(worker.late_ties_under_fsdp, how=how)
    refusals = all_refused(results)
    assert len(refusals) == (12 if how == "layers" else 11)
    assert all("sharded already" in text for text in refusals.values())
    assert all("before fully_shard" in text for text in refusals.values())
    assert "cannot tie 'weight' of Linear(in_features=12" in refusals["tie"]
    assert all(result["unchanged"] for result in results)
    assert_as_one_process(results, *alone())


def test_s35_layers_beside_a_sharded_one_can_be_tied(ranks):
    for result in ranks(worker.ties_beside_fsdp):
        assert result["tied"] == [True, False, True]


@pytest.mark.feature("Distributed", "copies in one FSDP2 unit with their source")
@with_fsdp2
def test_s31_copies_in_one_unit_train_as_one_process(ranks):
    # the unit holds code, square and decode; nothing else is asked of `layers` here
    results = ranks(worker.fsdp_training, how="layers")
    model, losses = alone()
    assert_as_one_process(results, model, losses)
    code = results[0]["state"]["code.weight"]
    assert torch.equal(results[0]["weights"]["square.weight"], code**2)
    assert torch.equal(results[0]["weights"]["decode.weight"], code.t())


@pytest.mark.feature(
    "Distributed",
    "copies and their source in different FSDP2 units",
    refused="one of the two is sharded while the other is gathered: `fully_shard([enc, dec])`",
)
@with_fsdp2
def test_s31_copies_in_another_unit_are_refused_before_the_first_step(ranks):
    for result in ranks(worker.copies_apart):
        assert_refused(
            result["named"],
            "cannot compute 'square.weight' by 'squared_copy'",
            "its source 'code.weight' belongs to another fully_shard unit",
            "fully_shard([code, square])",
        )
        assert_refused(result["unnamed"], "fully_shard([source_layer, layer])")
        assert_refused(result["attention"], "fully_shard([first.out_proj, second.out_proj])")


@pytest.mark.feature("Distributed", "a copy in a unit within its source's unit")
@with_fsdp2
def test_s31_a_source_in_the_outer_unit_trains_as_one_process(ranks):
    results = ranks(worker.source_in_the_outer_unit)
    torch.manual_seed(0)
    model = worker.SharedOutside().double()
    assert_small_trained_alike(results, model)


@pytest.mark.feature("Distributed", "laws that read layers and have own values, in one FSDP2 unit")
@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp2", marks=with_fsdp2)])
def test_laws_that_read_layers_train_as_in_one_process(ranks, how):
    results = ranks(worker.training_that_reads, how=how)
    model = worker.net_that_reads()
    assert_small_trained_alike(results, model)


# Banks -------------------------------------------------------------------------------------


@pytest.mark.feature("Distributed", "a bank in one unit: DDP, FSDP2, FSDP1")
@pytest.mark.filterwarnings("ignore:.*FSDP is switching.*:UserWarning")
@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp2", marks=with_fsdp2), "fsdp1"])
def test_a_bank_in_one_unit_trains_as_one_process(ranks, how):
    results = ranks(worker.bank_training, how=how)
    model = worker.net_with_a_bank()
    assert_small_trained_alike(results, model)
    for number, layer in enumerate(model):
        assert_close(results[0]["weights"][f"{number}.weight"], layer.weight.detach())


@pytest.mark.feature(
    "Distributed",
    "layers of a bank in different units of FSDP2 or FSDP1",
    refused="the templates lie in the unit of the first: `fully_shard([layer, ...])`",
)
@pytest.mark.filterwarnings("ignore:.*FSDP is switching.*:UserWarning")
@with_fsdp2
def test_a_bank_apart_is_refused_before_the_first_step(ranks):
    for result in ranks(worker.banks_apart):
        assert_refused(
            result["2"],
            "cannot compute '0.weight' by 'bank(templates=2)'",
            "its source '2.weight' belongs to another fully_shard unit",
            "fully_shard([2, 0])",
        )
        assert_refused(
            result["1"],
            "its source '2.weight', a tied tensor, belongs to a FullyShardedDataParallel unit",
            "wrap a module that holds both",
        )
        assert_refused(result["untie"], "it is sharded already")


# FSDP1 -----------------------------------------------------------------------------------

fsdp1 = pytest.mark.filterwarnings("ignore:.*FSDP is switching.*:UserWarning")
originals = pytest.mark.parametrize("use_orig_params", [True, False])


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:DTensor random operators")
@pytest.mark.parametrize("apart", [False, True], ids=["one unit", "apart"])
@with_fsdp2
def test_s31_own_values_beside_a_sharded_source_are_read_and_set(one_rank, apart):
    alone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tp.register_tie(alone[1], Shifted, source="0", root=alone)
    model = copy.deepcopy(alone)
    for unit in (*model, model) if apart else (model,):
        fully_shard(unit, mesh=one_rank)
    x = torch.randn(2, 4)
    if not apart:
        model(x).sum().backward()
        alone(x).sum().backward()
        for value, wanted in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(value.grad.full_tensor(), wanted.grad)
    torch.testing.assert_close(model[1].weight.full_tensor(), alone[1].weight)
    torch.testing.assert_close(
        tp.dense_state_dict(model)["1.weight"].full_tensor(), tp.dense_state_dict(alone)["1.weight"]
    )
    value = torch.randn(4, 4)
    for each in (model, alone):
        tp.assign_(each[1], value, project=True)
    torch.testing.assert_close(model[1].weight.full_tensor(), alone[1].weight)
    if apart:
        with pytest.raises(tp.TieError, match="belongs to another fully_shard unit"):
            model(x)


@pytest.mark.feature(
    "Distributed",
    "FSDP1 (`FullyShardedDataParallel`), units for layers or the root only, tied before wrapping",
)
@fsdp1
@originals
@pytest.mark.parametrize("how", ["root", "layers"])
def test_s53_fsdp1_trains_and_exports_as_one_process(ranks, how, use_orig_params):
    results = ranks(worker.fsdp1_training, how=how, use_orig_params=use_orig_params)
    model, losses = alone()
    assert_as_one_process(results, model, losses)
    dense = tp.dense_state_dict(model)
    for result in results:
        assert result["dense"].keys() == dense.keys()
        for key, value in dense.items():
            assert_close(result["dense"][key], value)


@fsdp1
@pytest.mark.parametrize("how", ["root", "layers"])
def test_s53_fsdp1_loads_a_tied_checkpoint(ranks, how):
    results = ranks(worker.fsdp1_loading, how=how)
    assert_as_one_process(results, worker.tie(worker.build(5)), None, rtol=0, atol=0)


@pytest.mark.feature(
    "Distributed",
    "tying or untying under FSDP1",
    refused="the values lie in a flat parameter: tie before wrapping",
)
@fsdp1
@originals
def test_s53_tying_and_untying_under_fsdp1_is_refused(ranks, use_orig_params):
    results = ranks(worker.late_ties_under_fsdp1, use_orig_params=use_orig_params)
    refusals = all_refused(results)
    assert len(refusals) == 5
    for text in refusals.values():
        assert_refused(text, "a FullyShardedDataParallel has put its values into a flat parameter")
    assert "Tie before wrapping" in refusals["tie"]
    assert "Untie before wrapping" in refusals["untie a copy"]
    assert all(result["unchanged"] for result in results)
    assert_as_one_process(results, *alone())


@pytest.mark.feature(
    "Distributed",
    "a source in an FSDP1 unit that does not hold its copy",
    refused="the source would miss the copy's gradients: wrap a module that holds both",
)
@fsdp1
@pytest.mark.parametrize("count", [1, 2])
def test_s53_a_source_in_another_fsdp1_unit_is_refused_before_the_first_step(ranks, count):
    for refusals in ranks(worker.fsdp1_copies_apart, ranks=count):
        assert len(refusals) == 6
        for attempt, text in refusals.items():
            if attempt.startswith("copy alone"):
                assert text is None  # the root's unit has the source, and holds the copy's
                continue
            named = "its source '0', a Linear" if "root known" in attempt else "its source, a Lin"
            assert_refused(
                text, "'copy' cannot be computed", named, "wrap a module that holds both"
            )


@pytest.mark.feature("Distributed", "a copy in an FSDP1 unit within its source's unit")
@fsdp1
@pytest.mark.parametrize("count", [1, 2])
def test_s53_a_source_in_the_outer_fsdp1_unit_trains_as_one_process(ranks, count):
    results = ranks(worker.fsdp1_source_in_the_outer_unit, ranks=count)
    torch.manual_seed(0)
    model = worker.SharedOutside().double()
    losses = worker.train_small(model, alone=True)
    mean = torch.tensor([r["losses"] for r in results], dtype=torch.float64).mean(0)
    assert_close(mean, torch.tensor(losses, dtype=torch.float64))
    for result in results:
        assert result["state"].keys() == model.state_dict().keys()
        for key, value in model.state_dict().items():
            assert_close(result["state"][key], value)


# Checkpoints over ranks -------------------------------------------------------------------


@pytest.mark.feature("Distributed", "dense checkpoints into a sharded model, by `tie_state_dict`")
def test_dense_checkpoints_load_into_a_sharded_model(ranks):
    results = ranks(worker.dense_entries_into_a_sharded_model)
    assert_as_one_process(results, worker.tie(worker.build(5)), None, rtol=0, atol=0)
    for result in results:
        assert "'stem.weight' is dense and the layer is sharded" in result["refusal"]
        assert "tiedparam.tie_state_dict(model, dense)" in result["refusal"]
        assert result["tied_kept"]


@pytest.mark.feature("Distributed", "`torch.distributed.checkpoint`: saved on two ranks, one loads")
@pytest.mark.parametrize("how", ["layers", "root"])
@with_fsdp2
def test_a_checkpoint_of_two_ranks_loads_in_one_process(ranks, tmp_path, how):
    results = ranks(worker.save_training, folder=str(tmp_path), how=how)
    model = worker.tie(worker.build(9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    for key, value in model.state_dict().items():
        assert torch.equal(value, results[0]["state"][key])
    kept, wanted = get_optimizer_state_dict(model, optimizer), results[0]["optimizer"]
    assert kept["state"].keys() == wanted["state"].keys()
    for key, moments in kept["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, wanted["state"][key][name])
    # and training goes on as if one process had done all of it
    losses = worker.train(model, 2, alone=True, optimizer=optimizer)
    twin = worker.tie(worker.build())
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    worker.train(twin, 2, alone=True, optimizer=twin_optimizer)
    assert_close(losses, worker.train(twin, 2, alone=True, optimizer=twin_optimizer))
    for key, value in model.state_dict().items():
        assert_close(value, twin.state_dict()[key])


@pytest.mark.feature("Distributed", "`torch.distributed.checkpoint`: saved by one, two ranks load")
@pytest.mark.parametrize("how", ["layers", "root"])
@with_fsdp2
def test_a_checkpoint_of_one_process_loads_on_two_ranks(ranks, tmp_path, how):
    model = worker.tie(worker.build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    worker.train(model, 2, alone=True, optimizer=optimizer)
    state = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    results = ranks(worker.resume_training, folder=str(tmp_path), how=how)
    for key, value in model.state_dict().items():
        assert torch.equal(results[0]["first"]["state"][key], value)
    losses = worker.train(model, 2, alone=True, optimizer=optimizer)
    assert_as_one_process(results, model, losses)


# The example script -----------------------------------------------------------------------

EXAMPLE = ROOT / "docs" / "examples" / "train_distributed.py"


def train_digits(folder: Path, processes: int, wrap: str) -> tuple[list[float], dict]:
    """Run the example as its docs say, in float64. Returns the printed losses and what it saved."""
    script = folder / "in_float64.py"  # where the order of a sum is no excuse
    script.write_text(
        "import runpy, torch\ntorch.set_default_dtype(torch.float64)\n"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n"
    )
    saved = folder / f"{wrap}{processes}.pt"
    printed = torchrun(script, processes, "--wrap", wrap, "--epochs", "2", "--save", str(saved))
    losses = [float(loss) for loss in re.findall(r"^epoch \d+: loss (\S+)$", printed, re.MULTILINE)]
    return losses, torch.load(saved)


@pytest.mark.feature("Distributed", "`torchrun`: one script for one machine or many")
@pytest.mark.timeout(400)  # three launches of 100 s at most
def test_the_torchrun_example_does_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    losses, dense = train_digits(tmp_path, 1, "ddp")
    assert len(losses) == 2
    assert losses[1] < losses[0] < 2.31  # below that of a guess, and falling
    for wrap in ("ddp",) if older_than("2.7") else ("ddp", "fsdp"):
        again, dense_again = train_digits(tmp_path, 2, wrap)
        assert_close(again, losses, rtol=0, atol=1.5e-5)  # five digits are printed
        assert list(dense_again) == list(dense)
        for key, value in dense.items():
            assert_close(dense_again[key], value, rtol=1e-6, atol=1e-8)
        # a dense checkpoint that obeys the laws, for a model that knows nothing of ties
        mix, blur = dense_again["mix.weight"], dense_again["blur.weight"]
        assert torch.equal(mix, mix.transpose(0, 1).flip(2, 3))
        assert torch.equal(dense_again["again.weight"], mix)
        assert torch.equal(blur, blur[:, :1].expand_as(blur))
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    importlib.import_module("train_distributed").Net().load_state_dict(dense)
