"""What the two ranks of test_distributed.py do. Every function runs on both ranks.

A function is a scenario: it takes plain arguments and returns a dictionary of plain tensors
and numbers, which the test compares with one process that does the same on the whole batch.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import io
import os
import pickle
import traceback
import warnings
from collections import OrderedDict
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import tiedparam as tp
from tests.support import computing_of, form_of
from tiedparam.layer import host
from tiedparam.tie.lookup import named_ties_in
from tiedparam.util.torch_private import effective

TIED = ("stem", "mid", "streams", "rows", "square", "decode")
FULL = StateDictOptions(full_state_dict=True)


# The model and its training, the same alone and on two ranks ------------------------------


class Net(nn.Sequential):
    """One layer under each law, small enough for fractions of a second."""

    def __init__(self) -> None:
        super().__init__(
            OrderedDict(
                stem=nn.Conv2d(4, 8, 3, padding=1),
                relu=nn.ReLU(),
                mid=nn.Conv2d(8, 8, 3, padding=1),
                tanh=nn.Tanh(),
                streams=nn.Conv2d(8, 16, 3, groups=8),
                flatten=nn.Flatten(),
                rows=nn.Linear(256, 12),
                in_place=nn.ReLU(inplace=True),
                code=nn.Linear(12, 12),
                square=nn.Linear(12, 12),
                decode=nn.Linear(12, 12, bias=False),
            )
        )


def build(seed: int = 0, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def tie(net: Net) -> Net:
    tp.register_tie(net.stem, "channel_shared", over="in", root=net)
    tp.register_tie(net.mid, "flip_sym", root=net)
    tp.register_tie(net.streams, "channel_shared", over="groups", root=net)
    tp.register_tie(net.rows, "row_repeat", groups=3, compute="reduced", root=net)
    tp.register_tie(net.square, "squared_copy", source="code", root=net)
    tp.register_tie(net.decode, "copy", source="code", fn=torch.t, root=net)
    return net


def batches(steps: int, dtype: torch.dtype = torch.float64):
    """The whole batches; each rank takes its half."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        x = torch.randn(8, 4, 6, 6, generator=generator, dtype=torch.float64)
        y = torch.randn(8, 12, generator=generator, dtype=torch.float64)
        yield x.to(dtype), y.to(dtype)


def my_half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.chunk(2)[dist.get_rank()]


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (model(x) - y).square().mean()


def train(model: nn.Module, steps: int = 4, *, alone: bool, optimizer=None) -> list[float]:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for x, y in batches(steps):
        loss = loss_of(model, x, y) if alone else loss_of(model, my_half(x), my_half(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def shard(net: Net, how: str = "layers", **options) -> Net:
    """``layers``: a unit for every layer, a copy with its source; ``root``: one unit."""
    mesh = dist.init_device_mesh("cpu", (2,))
    if how == "layers":
        for layer in (net.stem, net.mid, net.streams, net.rows):
            fully_shard(layer, mesh=mesh, **options)
        fully_shard([net.code, net.square, net.decode], mesh=mesh, **options)
    elif how == "apart":
        for layer in (net.stem, net.mid, net.streams, net.rows, net.code, net.square, net.decode):
            fully_shard(layer, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)
    return net


def outcome(model: nn.Module, losses: list[float] | None = None) -> dict:
    """What a rank reports: its losses, the whole state, and the whole tied weights."""
    plain = getattr(model, "module", model)
    state = get_model_state_dict(plain, options=FULL)
    weights = {}
    with torch.no_grad():
        for prefix, tie in named_ties_in(plain):
            weight = tie.weight()
            weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            weights[prefix + tie.tensor_name] = weight.clone()
    # clones: torch.save would write a view's whole storage
    return {"losses": losses, "state": {k: v.clone() for k, v in state.items()}, "weights": weights}


def message_of(action, kind: type[Exception] = tp.TieError) -> str | None:
    """The text of the refusal; None if nothing was refused."""
    try:
        action()
    except kind as error:
        return str(error)
    return None


# DDP --------------------------------------------------------------------------------------


def ddp_training(**options) -> dict:
    model = DistributedDataParallel(tie(build()), **options)
    return outcome(model, train(model, alone=False))


class Branching(nn.Module):
    """One branch is not used: DDP must be told to look for what is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tie(build())
        self.idle = tp.register_tie(nn.Linear(4, 4).double(), "flip_sym")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def ddp_with_an_idle_branch() -> dict:
    model = DistributedDataParallel(Branching(), find_unused_parameters=True)
    losses = train(model, alone=False)
    result = outcome(model.module.net, losses)
    result["idle"] = [p.grad is None for p in model.module.idle.parameters()]
    return result


def ddp_accumulating() -> dict:
    model = DistributedDataParallel(tie(build()))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    optimizer.zero_grad()
    for index, (x, y) in enumerate(batches(4)):
        last = index % 2 == 1
        with contextlib.nullcontext() if last else model.no_sync():
            loss_of(model, my_half(x), my_half(y)).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return outcome(model)


def structured_outputs(how: str) -> dict:
    """One forward and one backward of the cheap forms, under a wrapper."""
    net = tie(build())
    forms = {name: form_of(getattr(net, name)) for name in ("stem", "rows")}
    model = DistributedDataParallel(net) if how == "ddp" else shard(net, how)
    ((x, y),) = batches(1)
    loss_of(model, my_half(x), my_half(y)).backward()
    gradients = whole_gradients(net)
    with torch.no_grad():
        output = model(my_half(x))
    return {"forms": forms, "output": output, "gradients": gradients}


def whole_gradients(net: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in net.named_parameters():
        gradient = parameter.grad
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        found[name] = whole.clone()
    return found


BY_FORMS = {
    "rows": [
        (lambda: nn.Linear(12, 12), "circulant", "fft", {}),
        (lambda: nn.Linear(12, 24), "toeplitz", "fft", {}),
        (lambda: nn.Linear(24, 24), "block_circulant", "fft", {"block": 4}),
        (lambda: nn.Linear(24, 12), "masked", "blocks", {"pattern": "block_diagonal", "blocks": 3}),
        (lambda: nn.Linear(12, 24), "set_equivariant", "items", {"items": 6}),
        (lambda: nn.Linear(24, 12), "hypercomplex", "three", {}),
        (lambda: nn.Linear(12, 8), "centrosymmetric", "halves", {}),
    ],
    "images": [
        (lambda: nn.Conv2d(8, 392, 1), "group_conv", "fourier", {}),
        (lambda: nn.Conv2d(392, 392, 1), "flip_sym", "panels", {}),
    ],
}
"""Layers, one after the other, with their law and the form that computes them."""


def net_by_forms(which: str) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(*(build() for build, *_ in BY_FORMS[which])).double()
    for layer, (_, rule, form, options) in zip(net, BY_FORMS[which], strict=True):
        tp.register_tie(layer, rule, compute=form, init="rescale", **options)
    return net


def input_of_forms(which: str) -> torch.Tensor:
    """The whole batch."""
    shape = (6, 12) if which == "rows" else (4, 8, 2, 3)
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def step_by_forms(which: str, how: str) -> dict:
    """One forward and one backward of layers that each have a form of their own."""
    net = net_by_forms(which)
    if how == "ddp":
        model = DistributedDataParallel(net)
    else:
        mesh = dist.init_device_mesh("cpu", (2,))
        for layer in net if how == "layers" else ():
            fully_shard(layer, mesh=mesh)
        model = fully_shard(net, mesh=mesh)
    for layer in net:
        computing_of(layer).seen = []
    output = model(my_half(input_of_forms(which)))
    forms = [computing_of(layer).seen for layer in net]
    output.square().mean().backward()
    return {"forms": forms, "output": output.detach(), "gradients": whole_gradients(net)}


def late_ties_under_ddp() -> dict:
    net = tie(build())
    model = DistributedDataParallel(net)
    holder = nn.ModuleDict({"inner": model})
    for parameter in net.mid.parameters():
        parameter.requires_grad_(False)  # DDP holds it in no bucket that could be noticed
    before = {name: id(parameter) for name, parameter in net.named_parameters()}
    classes = [type(module) for module in net.modules()]
    for parameter in net.mid.parameters():
        parameter.requires_grad_(True)
    refusals = {
        "tie": message_of(lambda: tp.register_tie(net.code, "flip_sym")),
        "tie, root given": message_of(lambda: tp.register_tie(net.code, "flip_sym", root=net)),
        "tie, root is DDP": message_of(lambda: tp.register_tie(net.code, "flip_sym", root=model)),
        "tie, root holds DDP": message_of(
            lambda: tp.register_tie(net.code, "flip_sym", root=holder)
        ),
        "tie a bias": message_of(lambda: tp.register_tie(net.stem, "row_repeat", "bias")),
        "untie": message_of(lambda: tp.remove_tie(net.mid)),
        "untie a copy": message_of(lambda: tp.remove_tie(net.square)),
        "untie a copy without a bias": message_of(lambda: tp.remove_tie(net.decode)),
    }
    unchanged = before == {name: id(parameter) for name, parameter in net.named_parameters()}
    unchanged &= classes == [type(module) for module in net.modules()]
    return {
        "refusals": refusals,
        "unchanged": unchanged,
        **outcome(model, train(model, alone=False)),
    }


def frozen_layer_under_ddp() -> dict:
    net = build()
    net.mid.requires_grad_(False)
    model = DistributedDataParallel(net)
    refusal = message_of(lambda: tp.register_tie(net.mid, "flip_sym"))
    return {"refusal": refusal, "wrapped": isinstance(model, nn.Module)}


def ties_beside_ddp() -> dict:
    """What must not be refused while a DDP model lives, and after it is gone."""
    wrapped = DistributedDataParallel(tie(build()))
    other = tie(build())
    loss = loss_of(other, *next(batches(1)))  # a graph that lives, but no DDP
    tp.remove_tie(other.mid)
    tp.register_tie(other.mid, "flip_sym")
    del loss
    net = wrapped.module
    del wrapped
    gc.collect()
    tp.remove_tie(net.mid)
    tp.register_tie(net.code, "flip_sym")
    return {"tied": [tp.is_tied(net.mid), tp.is_tied(net.code), tp.is_tied(other.mid)]}


# FSDP2 -----------------------------------------------------------------------------------


def fsdp_training(how: str = "layers", **options) -> dict:
    model = shard(tie(build()), how, **options)
    with warnings.catch_warnings():
        # an output that is a view loses fully_shard's hook in an in-place operation
        warnings.filterwarnings("error", message=".*FSDPTied.*returned a view tensor")
        losses = train(model, alone=False)
    local = sum(p.to_local().numel() for p in model.parameters())
    total = sum(p.numel() for p in model.parameters())
    return {**outcome(model, losses), "local": local, "total": total}


def fsdp_mixed_precision() -> dict:
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
    )
    model = shard(tie(build(dtype=torch.float32)), mp_policy=policy)
    seen = {}
    for name in ("mid", "decode"):
        layer = getattr(model, name)
        layer.register_forward_hook(
            lambda layer, *_, name=name: seen.update({name: effective(layer, "weight").clone()}),
            prepend=True,  # before fully_shard's hook, which shards the layer again
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for x, y in batches(3, torch.float32):
        loss = loss_of(model, my_half(x), my_half(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {**outcome(model, losses), "seen": {k: v.detach() for k, v in seen.items()}}


def fsdp_from_meta(start: str) -> dict:
    with torch.device("meta"):
        model = Net().double()
        tie(model)
    shard(model)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter.to_local(), torch.nan)  # what memory holds by chance
    torch.manual_seed(dist.get_rank())  # ranks that draw different numbers must still agree
    if start == "reset":
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    elif start == "init":
        for module in model.modules():
            if tp.is_tied(module, recurse=False):
                # ranks that would fill with different values take the first one's
                tp.init_(module, lambda weight: nn.init.normal_(weight).add_(10 * dist.get_rank()))
    else:
        dense = tp.dense_state_dict(tie(build()))
        set_model_state_dict(model, tp.tie_state_dict(model, dense), options=FULL)
    first = outcome(model)
    if start == "init":
        return {"first": first}
    return {**outcome(model, train(model, alone=False)), "first": first}


def owners_of_sharded_values(how: str) -> dict:
    """Whether the free values lead back to their layers before and after a step."""
    model = shard(tie(build()), how)

    def found() -> list[tuple[str, tuple[int, ...]]]:
        names = {id(layer): name for name, layer in model.named_modules()}
        owners = map(tp.owner, model.parameters())
        return [(names[id(o.layer)], tuple(o.shape)) for o in owners if o is not None]

    before = found()
    train(model, 1, alone=False)
    return {"before": before, "after": found()}


def values_of_a_sharded_model() -> dict:
    """Reading, assigning and exporting under fully_shard."""
    model = shard(tie(build()))
    read = {name: getattr(model, name).weight.full_tensor() for name in TIED}
    exported = {key: value.full_tensor() for key, value in tp.dense_state_dict(model).items()}
    full = get_model_state_dict(model, options=FULL)
    untied = tp.untie_state_dict(model, full)
    retied = tp.tie_state_dict(model, untied)
    from_parts = tp.untie_state_dict(model, get_model_state_dict(model))
    from_parts = {
        key: value.full_tensor() if hasattr(value, "full_tensor") else value
        for key, value in from_parts.items()
    }
    lawful = {name: getattr(build(3), name).weight.detach() for name in ("stem", "mid", "rows")}
    for name, value in lawful.items():
        tp.assign_(getattr(model, name), value, project=True)
    assigned = {name: getattr(model, name).weight.full_tensor() for name in lawful}
    unlawful = message_of(lambda: tp.assign_(model.mid, lawful["mid"]))
    return {
        "read": {k: v.detach() for k, v in read.items()},
        "exported": exported,
        "untied": untied,
        "retied_equal": all(torch.equal(retied[k], full[k]) for k in full) and len(retied),
        "keys": len(full),
        "from_parts": from_parts,
        "assigned": {k: v.detach() for k, v in assigned.items()},
        "unlawful": unlawful,
        "state_keys": list(model.state_dict()),
        "repr": repr(model.stem),
        "deepcopy": message_of(lambda: copy.deepcopy(model.stem), AssertionError),
        "pickle": message_of(lambda: pickle.dumps(model.stem)),
        "stock": host.stock_class(model.stem) is nn.Conv2d,
        "is_tied": [tp.is_tied(getattr(model, name)) for name in TIED],
    }


def late_ties_under_fsdp(how: str) -> dict:
    model = shard(tie(build()), how)
    plain = nn.Linear(12, 12).double()  # outside of the sharded model

    def attempts() -> dict:
        return {
            "tie": message_of(lambda: tp.register_tie(model.code, "flip_sym")),
            "tie a bias": message_of(lambda: tp.register_tie(model.stem, "row_repeat", "bias")),
            "untie": message_of(lambda: tp.remove_tie(model.mid)),
            "untie a copy": message_of(lambda: tp.remove_tie(model.square)),
            "untie a copy without a bias": message_of(lambda: tp.remove_tie(model.decode)),
        }

    classes = [type(module) for module in model.modules()]
    names = [name for name, _ in model.named_parameters()]
    refusals = attempts()
    refusals["a copy of a sharded source"] = message_of(
        lambda: tp.register_tie(plain, "copy", source=model.code)
    )
    with torch.no_grad():  # the root's parameters stay gathered, and look ordinary
        model(next(batches(1))[0])
    refusals |= {f"{key}, after a forward": text for key, text in attempts().items()}
    if how == "layers":
        refusals["torch's own untie"] = message_of(
            lambda: parametrize.remove_parametrizations(model.mid, "weight")
        )
    unchanged = classes == [type(module) for module in model.modules()]
    unchanged &= names == [name for name, _ in model.named_parameters()]
    unchanged &= type(plain) is nn.Linear
    model.reshard()  # the optimizer takes the sharded parameters, not the gathered ones
    return {
        "refusals": refusals,
        "unchanged": unchanged,
        **outcome(model, train(model, alone=False)),
    }


def ties_beside_fsdp() -> dict:
    model = shard(tie(build()))
    other = tie(build())
    tp.remove_tie(other.mid)
    half = build()
    fully_shard(half.stem, mesh=dist.init_device_mesh("cpu", (2,)))
    tp.register_tie(half.mid, "flip_sym", root=half)  # a layer beside the unit
    return {"tied": [tp.is_tied(layer) for layer in (model.mid, other.mid, half.mid)]}


def dense_entries_into_a_sharded_model() -> dict:
    model = shard(tie(build()))
    dense = tp.dense_state_dict(tie(build(5)))
    before = outcome(model)
    entries = dict(dense)  # torch writes into the dictionary that it is given
    refusal = message_of(lambda: set_model_state_dict(model, entries, options=FULL), RuntimeError)
    after = outcome(model)
    own = [f"{name}.weight" for name in TIED[:4]]  # torch has filled the source of the copies
    same = all(torch.equal(before["weights"][k], after["weights"][k]) for k in own)
    tied = tp.tie_state_dict(model, dense) if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, tied, options=options)
    return {"refusal": refusal, "tied_kept": same, **outcome(model)}


class Attentions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.second = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x, x, x)[0]
        return self.second(x, x, x)[0]


def copies_apart() -> dict:
    model = shard(tie(build()), "apart")
    x, _ = next(batches(1))
    named = message_of(lambda: model(my_half(x)))
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tp.register_tie(net[1], "copy", source=net[0])  # without root= the paths are not known
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in net:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    unnamed = message_of(lambda: net(torch.randn(2, 4)))
    # attention reads the weight of its out_proj as an attribute, not by calling it
    blocks = Attentions()
    tp.register_tie(blocks.second.out_proj, "copy", source="first.out_proj", root=blocks)
    for block in blocks.children():
        fully_shard(block, mesh=mesh)
    fully_shard(blocks, mesh=mesh)
    attention = message_of(lambda: blocks(torch.randn(2, 3, 8)))
    return {"named": named, "unnamed": unnamed, "attention": attention}


class SharedOutside(nn.Module):
    """A source in the root's own unit, its copy in a unit within."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Linear(6, 6)
        self.inner = nn.Sequential(nn.Tanh(), nn.Linear(6, 6))
        tp.register_tie(self.inner[1], "copy", source=self.source, fn=torch.t, root=self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.source(x))


def source_in_the_outer_unit() -> dict:
    torch.manual_seed(0)
    model = SharedOutside().double()
    mesh = dist.init_device_mesh("cpu", (2,))
    fully_shard(model.inner, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return outcome(model, train_small(model, alone=False))


def train_small(model: nn.Module, *, alone: bool) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(7)
    losses = []
    for _ in range(4):
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        mine = x if alone else my_half(x)
        loss = (model(mine) - mine).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Laws that are data ------------------------------------------------------------------------


def net_of_data(seed: int = 0, *, device: str = "cpu") -> nn.Sequential:
    """One layer under each law that holds data."""
    torch.manual_seed(seed)
    with torch.device(device):
        layers = (nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        net = nn.Sequential(*layers).double()
    entries = torch.arange(36).view(6, 6)
    numbers = torch.linspace(-1, 1, 36).view(6, 6)
    tp.register_tie(net[0], "masked", mask=entries % 3 > 0)
    tp.register_tie(net[2], "fixed", mask=entries % 5 == 0, value=numbers)
    tp.register_tie(net[4], "index", index=entries % 7)
    return net


def training_of_data(how: str) -> dict:
    if how == "ddp":
        model = DistributedDataParallel(net_of_data())
        return outcome(model, train_small(model, alone=False))
    net = net_of_data(1, device="meta")
    mesh = dist.init_device_mesh("cpu", (2,))
    for unit in (net[0], net[2], net[4], net):
        fully_shard(unit, mesh=mesh)
    net.to_empty(device="cpu")
    for tensor in net.buffers():
        tensor.fill_(0x5A)  # what memory holds by chance
    stale = message_of(lambda: net[0].weight)
    set_model_state_dict(net, net_of_data().state_dict(), options=FULL)
    other = net_of_data().state_dict()
    other["0.parametrizations.weight.0.mask_bits"].bitwise_not_()
    refused = message_of(lambda: set_model_state_dict(net, other, options=FULL), RuntimeError)
    result = outcome(net, train_small(net, alone=False))
    return {**result, "stale": stale, "refused": refused}


# Laws that read layers and have values of their own ------------------------------------------


def net_that_reads(seed: int = 0) -> nn.Sequential:
    """The first layer is read by the next three, one behind the other; the last has clusters."""
    torch.manual_seed(seed)
    net = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5))).double()
    tp.register_tie(net[4], "cluster", n=5)
    tp.register_tie(net[1], "shared_delta", source="0", rank=2, root=net)
    tp.register_tie(net[2], "scaled_copy", source="1", per="output", root=net)
    tp.register_tie(net[3], "transposed_copy", source="0", sign=-1, root=net)
    return net


def training_that_reads(how: str) -> dict:
    net = net_that_reads()
    if how == "ddp":
        model = DistributedDataParallel(net)
        return outcome(model, train_small(model, alone=False))
    fully_shard(net, mesh=dist.init_device_mesh("cpu", (2,)))  # one unit for all that is read
    return outcome(net, train_small(net, alone=False))


# Banks -------------------------------------------------------------------------------------


def net_with_a_bank() -> nn.Sequential:
    """Layers that share two templates, which the last of them has; and one that joined later."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))).double()
    tp.tie_bank(["2", "0", "1"], 2, root=net)
    tp.register_tie(net[3], "bank", source="0", root=net)
    return net


def bank_training(how: str) -> dict:
    """In one unit, or averaged by DDP."""
    net = net_with_a_bank()
    if how == "fsdp1":
        model = fsdp1(net)
        return outcome_of_fsdp1(model, train_small(model, alone=False))
    if how == "ddp":
        model = DistributedDataParallel(net)
        return outcome(model, train_small(model, alone=False))
    for unit in ([*net], net):
        fully_shard(unit, mesh=dist.init_device_mesh("cpu", (2,)))
    return outcome(net, train_small(net, alone=False))


def banks_apart() -> dict:
    """A unit for every layer, whose templates are in that of the first."""
    net, x = net_with_a_bank(), torch.ones(2, 6, dtype=torch.float64)
    mesh = dist.init_device_mesh("cpu", (2,))
    for unit in (*net, net):
        fully_shard(unit, mesh=mesh)
    other = net_with_a_bank()
    other[2] = fsdp1(other[2])
    other = fsdp1(other)
    untie = message_of(lambda: tp.remove_tie(net[2]))
    return {"2": message_of(lambda: net(x)), "1": message_of(lambda: other(x)), "untie": untie}


# FSDP1 -----------------------------------------------------------------------------------


def fsdp1(module: nn.Module, ranks: int = 2, **options) -> nn.Module:
    """The module as a unit over both ranks, or on each of them alone."""
    groups = [dist.new_group([rank]) for rank in range(2)] if ranks == 1 else [None, None]
    options = {"use_orig_params": True, **options}
    return FullyShardedDataParallel(
        module, process_group=groups[dist.get_rank()], device_id=torch.device("cpu"), **options
    )


def wrapped_by_fsdp1(net: Net, how: str, **options) -> nn.Module:
    """``layers``: units within the root's, which has the copies and their source."""
    if how == "layers":
        for name in TIED[:4]:
            setattr(net, name, fsdp1(getattr(net, name), **options))
    return fsdp1(net, **options)


def outcome_of_fsdp1(model: nn.Module, losses: list[float] | None) -> dict:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with FullyShardedDataParallel.summon_full_params(model), torch.no_grad():
        weights = {
            prefix + tie.tensor_name: tie.weight().clone() for prefix, tie in named_ties_in(model)
        }
    return {"losses": losses, "state": state, "weights": weights}


def fsdp1_training(how: str, use_orig_params: bool) -> dict:
    model = wrapped_by_fsdp1(tie(build()), how, use_orig_params=use_orig_params)
    losses = train(model, alone=False)
    dense = {key: value.clone() for key, value in tp.dense_state_dict(model).items()}
    return {**outcome_of_fsdp1(model, losses), "dense": dense}


def fsdp1_loading(how: str) -> dict:
    model = wrapped_by_fsdp1(tie(build(1)), how)
    model.load_state_dict(tie(build(5)).state_dict())
    return outcome_of_fsdp1(model, None)


def late_ties_under_fsdp1(use_orig_params: bool) -> dict:
    net = tie(build())
    model = fsdp1(net, use_orig_params=use_orig_params)
    classes = [type(module) for module in net.modules()]
    refusals = {
        "tie": message_of(lambda: tp.register_tie(net.code, "flip_sym")),
        "tie, root given": message_of(lambda: tp.register_tie(net.code, "flip_sym", root=net)),
        "untie": message_of(lambda: tp.remove_tie(net.mid)),
        "untie a copy": message_of(lambda: tp.remove_tie(net.square)),
        "untie the model": message_of(lambda: tp.untie_model(model)),
    }
    unchanged = classes == [type(module) for module in net.modules()]
    losses = train(model, alone=False)
    return {"refusals": refusals, "unchanged": unchanged, **outcome_of_fsdp1(model, losses)}


def fsdp1_copies_apart(ranks: int) -> dict:
    """A unit for the source alone, in the root's; what is computed before the refusal."""
    refusals = {}
    for known_root in (True, False):
        for alone in ("source", "copy", "both"):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
            root = {"root": net} if known_root else {}
            tp.register_tie(net[2], "copy", source=net[0], **root)
            for number in {"source": (0,), "copy": (2,), "both": (0, 2)}[alone]:
                net[number] = fsdp1(net[number], ranks)
            model = fsdp1(net, ranks)
            x = torch.linspace(-1, 1, 24).reshape(4, 6)
            text = message_of(lambda model=model, x=x: model(x).sum().backward())
            refusals[f"{alone} alone, root {'known' if known_root else 'unknown'}"] = text
    return refusals


def fsdp1_source_in_the_outer_unit(ranks: int) -> dict:
    torch.manual_seed(0)
    model = SharedOutside().double()
    model.inner = fsdp1(model.inner, ranks)
    model = fsdp1(model, ranks)
    losses = train_small(model, alone=ranks == 1)
    return {"losses": losses, "state": {k: v.clone() for k, v in model.state_dict().items()}}


# Checkpoints over ranks -------------------------------------------------------------------


def save_training(folder: str, how: str) -> dict:
    """Train two steps, save model and optimizer by torch.distributed.checkpoint."""
    model = shard(tie(build()), how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = train(model, 2, alone=False, optimizer=optimizer)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.save(state, checkpoint_id=folder)
    moments = get_optimizer_state_dict(model, optimizer, options=FULL)
    return {**outcome(model, losses), "optimizer": moments}


def resume_training(folder: str, how: str) -> dict:
    """Load what one process saved, and go on."""
    model = shard(tie(build(9)), how)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    first = outcome(model)
    return {"first": first, **outcome(model, train(model, 2, alone=False, optimizer=optimizer))}


# The process itself -----------------------------------------------------------------------


def serve(rank: int, meeting: str, connection) -> None:
    """Run the scenarios that the connection names, until it says None."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=40),
    )
    while (request := connection.recv()) is not None:
        module, name, arguments = request
        try:
            scenario = getattr(importlib.import_module(module), name)
            answer = {"result": scenario(**arguments)}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        content = io.BytesIO()
        torch.save(answer, content)
        connection.send_bytes(content.getvalue())
        gc.collect()
    dist.destroy_process_group()
