"""The same laws in other libraries: each contender is left out where its library is not installed.

What a library does on each call counts, so layers that make their weight anew do so here too, and
those that keep it in evaluation mode (e2cnn) are in that mode for inference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import contenders as made
from benchmarks.cases.enrolled import case, placed
from benchmarks.measuring import Contender, Run

C3A = "PEFT's C3A"
"""Compared in inference only: the gradient that peft 0.21 gives for its input is not that of its
output, as ``torch.autograd.gradcheck`` says."""
Peer = tuple[str, list[Contender], Tensor]


@case(
    "peers",
    "The laws that other libraries have as well: PEFT's C3A, geotorch, einops and e2cnn",
    default_allocator=False,
)
def peers(run: Run) -> None:
    features, rows = (128, 4) if run.quick else (1024, 64)
    channels, size, batch = (8, 8, 2) if run.quick else (64, 28, 8)
    x = torch.randn(rows, features)
    found = [
        *_c3a(run, x),
        *_geotorch(run, x),
        *_repeated(run, x),
        *_blocks(run, x),
        *_sets(run, x),
    ]
    for kernel in (1, 3):
        found += _e2cnn(run, torch.randn(batch, channels, size, size), kernel)
    for shapes, contenders, given in found:
        c3a = any(c.name == C3A for c in contenders)
        modes = ("inference",) if c3a else ("inference", "training")
        run.compare(shapes, contenders, given, modes=modes, tolerance=1e-4)


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _linear(run: Run, x: Tensor) -> nn.Linear:
    layer: nn.Linear = placed(run, nn.Linear(x.shape[1], x.shape[1], bias=False))
    return layer


def _ours(layer: Any, rule: str, **options: Any) -> list[Contender]:
    """The dense layer with a lawful weight, and the tied one."""
    return [made.dense(layer), made.tied(layer, rule, **options)]


def _contender(name: str, forward: Callable[[Tensor], Tensor], *weights: Tensor) -> Contender:
    return Contender(name, forward, weights)


def _leaf(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_()


def _c3a(run: Run, x: Tensor) -> Iterator[Peer]:
    """PEFT's adapter without its base layer."""
    theirs = _installed("peft.tuners.c3a.utils")
    if theirs is None:
        return
    layer, block = _linear(run, x), 64
    blocks = len(layer.weight) // block
    w = torch.randn(blocks, blocks, block, device=run.device, requires_grad=True)
    apply = theirs.BlockCircularConvolution.apply
    with torch.no_grad():
        layer.weight.copy_(apply(torch.eye(x.shape[1], device=run.device), w).T)
    found = _ours(layer, "block_circulant", block=block)
    found.append(_contender(C3A, lambda x: apply(x, w), w))
    yield f"Linear({x.shape[1]}, {x.shape[1]}), block_circulant({block})", found, x


def _geotorch(run: Run, x: Tensor) -> Iterator[Peer]:
    theirs = _installed("geotorch")
    if theirs is None:
        return
    layer = made.lawful(_linear(run, x), "symmetric")
    own = nn.Linear(x.shape[1], x.shape[1], bias=False).to(run.device)
    theirs.symmetric(own, "weight")
    expansion: Any = own.parametrizations["weight"]
    with torch.no_grad():
        expansion.original.copy_(layer.weight)
    found = _ours(layer, "symmetric")
    found.append(_contender("geotorch.symmetric", own, *expansion.parameters()))
    yield f"Linear({x.shape[1]}, {x.shape[1]}), symmetric", found, x


def _repeated(run: Run, x: Tensor) -> Iterator[Peer]:
    einops = _installed("einops")
    if einops is None:
        return
    options = {"heads": 16, "groups": 4}
    layer = made.lawful(_linear(run, x), "head_share", **options)
    w = _leaf(layer.weight.unflatten(0, (4, 4, -1))[:, 0].flatten(0, 1))

    def forward(x: Tensor) -> Tensor:
        return F.linear(x, einops.repeat(w, "(g d) i -> (g r d) i", g=4, r=4))

    found = [*_ours(layer, "head_share", **options), _contender("einops.repeat", forward, w)]
    yield f"Linear({x.shape[1]}, {x.shape[1]}), head_share(16, 4)", found, x


def _blocks(run: Run, x: Tensor) -> Iterator[Peer]:
    theirs = _installed("einops.layers.torch")
    if theirs is None:
        return
    options = {"pattern": "block_diagonal", "blocks": 8}
    layer, side = made.lawful(_linear(run, x), "masked", **options), x.shape[1] // 8
    mix = theirs.EinMix("b (k i) -> b (k o)", weight_shape="k i o", k=8, i=side, o=side)
    with torch.no_grad():
        blocks = layer.weight.unflatten(0, (8, side)).unflatten(2, (8, side))
        mix.weight.copy_(blocks.diagonal(dim1=0, dim2=2).permute(2, 1, 0))
    found = [*_ours(layer, "masked", **options), _mixed("einops' EinMix", mix.to(run.device))]
    yield f"Linear({x.shape[1]}, {x.shape[1]}), block-diagonal, 8 blocks", found, x


def _sets(run: Run, x: Tensor) -> Iterator[Peer]:
    einops, theirs = _installed("einops"), _installed("einops.layers.torch")
    if einops is None:
        return
    items, channels = 64, x.shape[1] // 64
    layer = made.lawful(_linear(run, x), "set_equivariant", items=items)
    same = theirs.EinMix("b (i n) -> b (o n)", weight_shape="i o", n=items, i=channels, o=channels)
    other = theirs.EinMix("b i -> b o", weight_shape="i o", i=channels, o=channels)
    weight = layer.weight.detach().unflatten(0, (channels, items)).unflatten(2, (channels, items))
    with torch.no_grad():
        other.weight.copy_(weight[:, 0, :, 1].T)
        same.weight.copy_((weight[:, 0, :, 0] - weight[:, 0, :, 1]).T)
    both = nn.ModuleList([same, other]).to(run.device)

    def forward(x: Tensor) -> Tensor:
        total = other(einops.reduce(x, "b (i n) -> b i", "sum", n=items))
        mixed: Tensor = same(x) + einops.repeat(total, "b o -> b (o n)", n=items)
        return mixed

    found = _ours(layer, "set_equivariant", items=items)
    found.append(_contender("einops' EinMix and reduce", forward, *both.parameters()))
    yield f"Linear({x.shape[1]}, {x.shape[1]}), set_equivariant({items})", found, x


def _mixed(name: str, layer: nn.Module) -> Contender:
    return _contender(name, layer, *layer.parameters())


def _e2cnn(run: Run, x: Tensor, kernel: int) -> Iterator[Peer]:
    """A convolution of fields of the group of quarter turns, with the filters of e2cnn."""
    spaces, theirs = _installed("e2cnn.gspaces"), _installed("e2cnn.nn")
    if theirs is None:
        return
    space = spaces.Rot2dOnR2(4)
    fields = theirs.FieldType(space, (x.shape[1] // 4) * [space.regular_repr])
    steps = theirs.R2Conv(fields, fields, kernel_size=kernel, padding=kernel // 2, bias=False)
    steps = steps.to(run.device)
    layer = nn.Conv2d(x.shape[1], x.shape[1], kernel, padding=kernel // 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(steps.expand_parameters()[0])
    keeps = theirs.R2Conv(fields, fields, kernel_size=kernel, padding=kernel // 2, bias=False)
    keeps = keeps.to(run.device)
    keeps.load_state_dict(steps.state_dict())
    keeps.eval()

    def forward(x: Tensor) -> Tensor:
        layer = steps if torch.is_grad_enabled() else keeps
        answer: Tensor = layer(theirs.GeometricTensor(x, fields)).tensor
        return answer

    found = _ours(placed(run, layer), "group_conv", group="p4")
    found.append(_contender("e2cnn", forward, *steps.parameters()))
    shapes = f"Conv2d({x.shape[1]}, {x.shape[1]}, {kernel}) on {x.shape[2]}², group_conv('p4')"
    yield shapes, found, x
