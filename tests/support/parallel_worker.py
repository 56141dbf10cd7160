"""What two ranks do with tied layers under tensor parallelism and in pipelines.

As in `distributed_worker`, every function runs on both ranks and returns plain tensors.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, SplitPoint, pipeline
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import tiedparam as tp
from tests.support.distributed_worker import FULL, message_of, my_half
from tests.support.parts import CUTS, MIXED, SIZE


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded, as an ordinary one."""
    tensor = tensor.detach()
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.clone()  # a tensor that each rank has whole is its own


# Tensor parallelism -----------------------------------------------------------------------


def tied_net(law, options, seed: int = 0) -> nn.Sequential:
    """Two layers, of which the second is tied."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE)).double()
    tp.register_tie(net[2], law, root=net, init="rescale", **options)
    return net


def style(name: str):
    """A style that takes a whole input and gives a whole output."""
    if name == "columns":
        return RowwiseParallel(input_layouts=Replicate())
    return ColwiseParallel(output_layouts=Replicate())


def train(model: nn.Module, data: Callable[[int], torch.Tensor], steps: int = 3) -> dict:
    """Outputs, first gradients, and the state in the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    outputs, gradients = [], {}
    for step in range(steps):
        y = model(data(step))
        optimizer.zero_grad()
        y.square().mean().backward()
        for name, parameter in model.named_parameters() if step == 0 else ():
            gradients[name] = plain(parameter.grad)
        optimizer.step()
        outputs.append(plain(y))
    state = {key: plain(value) for key, value in model.state_dict().items()}
    return {"outputs": torch.stack(outputs), "gradients": gradients, "state": state}


def numbers(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(5, SIZE, dtype=torch.float64, generator=generator)


def words(step: int) -> torch.Tensor:
    return torch.randint(8, (2, 4), generator=torch.Generator().manual_seed(step))


def cut_laws() -> dict:
    """Each law, its weight cut by rows and by columns."""
    mesh, results = dist.init_device_mesh("cpu", (2,)), {}
    for name, (law, options) in CUTS.items():
        for how in ("rows", "columns"):
            net = tied_net(law, options)
            parallelize_module(net, mesh, {"2": style(how)})
            own = sum(p.to_local().numel() for p in net[2].parametrizations.parameters())
            weight = net[2].weight
            result = {"own": own, "axis": weight.placements[0].dim, "weight": plain(weight)}
            results[f"{name}, {how}"] = {**result, **train(net, numbers)}
    return results


def refused_laws() -> dict:
    """The message of each law and axis; and whether the layer was left as it was."""
    mesh, refusals, unchanged = dist.init_device_mesh("cpu", (2,)), {}, True
    cases = [(law, options, how) for law, options in MIXED.items() for how in ("rows", "columns")]
    cases.append(("set_equivariant", {"items": 3}, "rows"))
    cases.append(("row_repeat", {"groups": 3}, "rows"))  # blocks of four rows, and six for each
    for law, options, how in cases:
        net = tied_net(law, options)
        before = dict(net.named_parameters())
        cut = {"2": style(how)}
        text = message_of(lambda net=net, cut=cut: parallelize_module(net, mesh, cut))
        refusals[f"{law}, {how}"] = text
        after = dict(net.named_parameters())
        unchanged &= before.keys() == after.keys() and all(before[k] is after[k] for k in before)
        net(numbers(0))  # no hook was left
    odd = nn.Linear(SIZE, 9)
    tp.register_tie(odd, "row_repeat", groups=3)
    refusals["odd"] = message_of(lambda: parallelize_module(odd, mesh, style("rows")))
    stacked = tp.register_tie(nn.Linear(SIZE, SIZE), "row_repeat", groups=4)
    nn.utils.parametrize.register_parametrization(stacked, "weight", nn.Tanh())
    refusals["stacked"] = message_of(lambda: parallelize_module(stacked, mesh, style("rows")))
    return {"refusals": refusals, "unchanged": unchanged}


class Words(nn.Module):
    """A small language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, SIZE)
        self.up = nn.Linear(SIZE, SIZE)
        self.down = nn.Linear(SIZE, SIZE)
        self.head = nn.Linear(SIZE, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        return self.head(x + self.down(torch.tanh(self.up(x))))


BY_ROWS = {"up": ColwiseParallel, "down": RowwiseParallel}
IN = {"embed": lambda: RowwiseParallel(input_layouts=Replicate())}
OUT = {"head": lambda: ColwiseParallel(output_layouts=Replicate())}
ALIKE = dict.fromkeys(("up", "down"), lambda: ColwiseParallel(output_layouts=Replicate()))
HEADS = {"heads": 6, "groups": 2}
PLANS = {
    "head and embedding": ([("head", "copy", {"source": "embed"})], {**IN, **OUT}),
    "head before embedding": ([("head", "copy", {"source": "embed"})], {**OUT, **IN}),
    "transposed": ([("down", "copy", {"source": "up", "fn": torch.t})], BY_ROWS),
    "of a tied layer": (
        [("up", "row_repeat", {"groups": 4}), ("down", "copy", {"source": "up", "fn": torch.t})],
        BY_ROWS,
    ),
    "bias": (
        [
            ("up", "head_share", HEADS),
            ("up/bias", "head_share", HEADS),
            ("down/bias", "repeat", {"outputs": 2}),
        ],
        BY_ROWS,
    ),
    "tied embedding": ([("embed", "row_repeat", {"groups": 4})], IN),
    "adjoint": ([("down", "transposed_copy", {"source": "up"})], BY_ROWS),
    "scaled": ([("down", "scaled_copy", {"source": "up", "per": "output"})], ALIKE),
    "difference": ([("down", "shared_delta", {"source": "up", "rank": 2})], ALIKE),
    "bank": ([("up+down", "bank", {"templates": 1})], ALIKE),
}
"""Ties and plans that train."""
WRONG_PLANS = {
    "cut along another axis": (
        [("head", "copy", {"source": "embed"})],
        {"embed": lambda: ColwiseParallel(output_layouts=Replicate()), **OUT},
    ),
    "copy along the other axis": ([("down", "copy", {"source": "up"})], BY_ROWS),
    "the copy alone": ([("head", "copy", {"source": "embed"})], OUT),
    "the source alone": ([("head", "copy", {"source": "embed"})], IN),
}


def tied_words(ties) -> Words:
    torch.manual_seed(0)
    model = Words().double()
    for place, law, options in ties:
        path, _, name = place.partition("/")
        if law == "bank":
            tp.tie_bank(path.split("+"), root=model, **options)
            continue
        init = "project" if "source" in options else "rescale"
        layer = model.get_submodule(path)
        tp.register_tie(layer, law, name or "weight", root=model, init=init, **options)
    return model


def cut_words(ties, plan, mesh=None) -> Words:
    model = tied_words(ties)
    mesh = mesh or dist.init_device_mesh("cpu", (2,))
    return parallelize_module(model, mesh, {path: make() for path, make in plan.items()})


def cut_models() -> dict:
    results = {name: train(cut_words(*case), words) for name, case in PLANS.items()}
    # and an axis of data beside that of the tensors, as FSDP2 shares them
    ties, plan = PLANS["of a tied layer"]
    mesh = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    model = cut_words(ties, plan, mesh["tensor"])
    for unit in ([model.up, model.down], model):
        fully_shard(unit, mesh=mesh["data"])
    results["with fully_shard"] = train(model, words)
    return results


def wrong_plans() -> dict:
    refusals = {}
    for name, case in WRONG_PLANS.items():
        model = cut_words(*case)
        refusals[name] = message_of(lambda model=model: model(words(0)))
    return {"refusals": refusals}


def sequence_parallel() -> dict:
    """A tied norm, whole on each rank, of which each has a part of the sequence."""
    norm = tp.register_tie(nn.LayerNorm(SIZE).double(), "row_repeat", groups=3)
    tp.assign_(norm, torch.linspace(0, 1, SIZE).double(), project=True)
    parallelize_module(norm, dist.init_device_mesh("cpu", (2,)), SequenceParallel())
    y = norm(numbers(0)[None, :4].chunk(2, 1)[dist.get_rank()])
    y.full_tensor().square().sum().backward()
    return {
        "output": plain(y),
        "gradients": {name: plain(p.grad) for name, p in norm.named_parameters()},
    }


def values_in_parts(folder: str) -> dict:
    """Reading, writing, loading and saving; tying and untying, which come too late."""
    ties, plan = PLANS["of a tied layer"]
    model = cut_words(ties, plan)
    result = {"dense": {k: plain(v) for k, v in tp.dense_state_dict(model).items()}}
    copied = copy.deepcopy(model)
    result["copy"] = plain(copied(words(0)))
    beside = nn.Linear(SIZE, SIZE).double()
    result["refusals"] = {
        "untie": message_of(lambda: tp.remove_tie(model.up)),
        "untie a copy": message_of(lambda: tp.remove_tie(model.down)),
        "tie": message_of(lambda: tp.register_tie(model.up, "row_repeat", "bias")),
        "a copy of it": message_of(lambda: tp.register_tie(beside, "copy", source=model.up)),
        "freeze": message_of(lambda: tp.frozen(model.eval()).__enter__()),
    }
    model.train()
    tp.assign_(model.up, torch.ones(SIZE, SIZE).double().cumsum(1), project=True)
    result["assigned"] = plain(model.up.weight)
    torch.manual_seed(dist.get_rank())
    tp.init_(model.up, nn.init.normal_)
    result["drawn"] = plain(model.up.weight)
    set_model_state_dict(model, tied_words(ties).state_dict(), options=FULL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        model(words(step)).square().mean().backward()
        optimizer.step()
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.save(state, checkpoint_id=folder)
    result["state"] = {k: plain(v) for k, v in get_model_state_dict(model, options=FULL).items()}
    return result


def resumed_in_parts(folder: str) -> dict:
    """Load what one process saved, and go on."""
    model = cut_words(*PLANS["of a tied layer"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    moments = get_optimizer_state_dict(model, optimizer, options=FULL)
    model(words(2)).square().mean().backward()
    optimizer.step()
    after = {k: plain(v) for k, v in get_model_state_dict(model, options=FULL).items()}
    return {"moments": moments, "after": after}


# Pipelines --------------------------------------------------------------------------------


class Four(nn.Module):
    """Four layers, for two stages; what is not there is passed over."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.a, self.b, self.c, self.d):
            if layer is not None:
                x = torch.tanh(layer(x))
        return x


def four(*, apart: bool) -> Four:
    """The ties lie in one stage, or one lies in another than its source."""
    torch.manual_seed(0)
    model = Four().double()
    tp.register_tie(model.b, "row_repeat", groups=3, init="rescale")
    source = "a" if apart else "c"
    tp.register_tie(model.d, "copy", source=source, fn=torch.t, root=model)
    return model


def whole_batch() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return x, x.flip(0)


def loss(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (y - target).square().mean()


def stage_of(model: Four, how: str):
    """This rank's stage: two layers."""
    rank, cpu = dist.get_rank(), torch.device("cpu")
    if how == "traced":
        x, _ = whole_batch()
        cut = pipeline(model, mb_args=(x[:4],), split_spec={"c": SplitPoint.BEGINNING})
        return cut.build_stage(rank, cpu)
    if how == "cut by hand":
        for name in "cd" if rank == 0 else "ab":
            setattr(model, name, None)
        return PipelineStage(model, rank, 2, cpu)
    first, second = (model.a, model.b) if rank == 0 else (model.c, model.d)
    return PipelineStage(nn.Sequential(first, nn.Tanh(), second, nn.Tanh()), rank, 2, cpu)


def pipelined(how: str) -> dict:
    stage = stage_of(four(apart=False), how)
    # torch 2.6 adds the gradients of the parts up, and later ones take their mean by default
    scaled = "scale_grads" in inspect.signature(ScheduleGPipe).parameters
    options = {"scale_grads": False} if scaled else {}
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda y, t: loss(y, t) / 2, **options)
    optimizer = torch.optim.SGD(stage.submod.parameters(), lr=0.5, momentum=0.9)
    x, target = whole_batch()
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        parts: list[torch.Tensor] = []
        if stage.is_first:
            schedule.step(x)
        else:
            schedule.step(target=target, losses=parts)
            losses.append(sum(part.item() for part in parts))
        optimizer.step()
    return {"losses": losses}


def cut_apart(how: str) -> dict:
    """A copy of a layer in another stage: the second rank's, which would wait for the first."""

    def attempt() -> None:
        stage = stage_of(four(apart=True), how)
        if dist.get_rank() == 1:
            stage.forward_maybe_with_nosync(whole_batch()[0])

    return {"refusal": message_of(attempt)}


# Shared models under DDP and FSDP2 ----------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [p(x).unflatten(-1, (4, 2)).transpose(1, 2) for p in (self.q_proj, self.k_proj)]
        v = self.v_proj(x).unflatten(-1, (4, 2)).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(*heads, v)
        return self.out(y.transpose(1, 2).flatten(2))


def shared_model() -> nn.Sequential:
    """Heads that share keys and values, and a hashed layer."""
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), nn.Linear(8, 8)).double()
    tp.share_heads(model, groups=2)
    tp.register_tie(model[1], "hashed", n=16, seed=1, init="rescale")
    return model


def sentences(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 8, dtype=torch.float64, generator=generator)


def shared_training(how: str) -> dict:
    model = shared_model()
    if how == "ddp":
        return train(DistributedDataParallel(model), lambda step: my_half(sentences(step)))
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in (*model[0].children(), model[1]) if how == "layers" else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train(model, lambda step: my_half(sentences(step)))


# The example script -----------------------------------------------------------------------


def example(script: str | Path):
    """The script as a module."""
    found = importlib.util.spec_from_file_location("share_blocks", script)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def example_training(script: str, how: str) -> dict:
    module, cpu = example(script), torch.device("cpu")
    model = module.shared_model()
    block = sum(p.numel() for p in model.blocks[0].parameters())
    rest = (model.letters, model.places, model.norm)
    return {
        "losses": module.train(how, 10, cpu),
        "values": sum(p.numel() for p in module.wrap(model, how, cpu).parameters()),
        "of one block": block + sum(p.numel() for layer in rest for p in layer.parameters()),
    }
