"""Bytes: what a step holds at its peak, what it keeps for backward, what is stored.

A peak is measured in a process of its own (``python -m benchmarks.memory TARGET CONTENDER
MODE DEVICE``): after a step with one sample that loads kernels, the kernel's high-water mark
is reset (``/proc/self/clear_refs``), the step runs, and the mark's rise over the memory in use
before is the result: what the step needs beyond parameters and input. The allocator gives
blocks of 64 KiB and more back at once (``MALLOC_MMAP_THRESHOLD_``), so that the mark follows
the live tensors. Where the mark cannot be reset, ``ru_maxrss`` is read instead, and its
rise is a lower bound. On CUDA torch's own counter is read.
"""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tiedparam as tp
from benchmarks import contenders as made
from benchmarks import models
from benchmarks.measuring import Contender

ROOT = Path(__file__).resolve().parent.parent


def streams_layer(channels: int, kernel: int, filters: int = 4) -> Any:
    """A grouped convolution whose groups share their filters."""
    layer = nn.Conv1d(channels, filters * channels, kernel, padding=kernel // 2, groups=channels)
    return made.lawful(layer, "channel_shared", over="groups")


def convolution(channels: int) -> nn.Conv2d:
    """The layer on which every rule is measured."""
    return nn.Conv2d(channels, channels, 3, padding=1)


def layer_contenders(
    rule: str, options: dict[str, Any], channels: int, device: str = "cpu"
) -> list[Contender] | None:
    """A dense convolution and a tied one; with their sources if the rule reads one."""
    pair = models.tie_pair(convolution(channels).to(device), rule, options)
    if pair is None:
        return None
    plain = models.untied(pair)

    def both(layers: nn.Module) -> Contender:
        def forward(x: Tensor) -> Tensor:
            for layer in reversed(list(layers.children())):  # the source first
                x = layer(x)
            return x

        return Contender("", forward, (), tuple(layers.parameters()))

    found = []
    for name, layers in (("dense", plain), ("tiedparam", pair)):
        contender = both(layers)
        contender.name = name
        found.append(contender)
    return found


def peak(target: str, contender: str, mode: str, device: torch.device) -> int:
    """Bytes that one call of a contender needs at its peak, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, "-m", "benchmarks.memory", target, contender, mode, str(device)]
    answer = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    return int(answer.stdout.split()[-1])


def count(contender: Contender, x: Tensor) -> dict[str, int]:
    """Bytes of parameters, gradients, Adam's state, a checkpoint, and kept for backward."""
    parameters = [p for p in contender.others if isinstance(p, nn.Parameter)]
    saved: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in parameters}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = contender.forward(x)
    kept = sum(saved.values())
    gradients = torch.autograd.grad(y.sum(), parameters)
    optimizer = torch.optim.Adam(parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    before = [p.detach().clone() for p in parameters]
    optimizer.step()
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    file = io.BytesIO()
    torch.save({str(i): p.detach() for i, p in enumerate(parameters)}, file)
    return {
        "parameters": _bytes(parameters),
        "gradients": _bytes(gradients),
        "Adam state": _bytes(state),
        "checkpoint": file.tell(),
        "kept for backward": kept,
    }


def many_layers(width: int, count: int) -> nn.ModuleList:
    """So many square layers without a tie."""
    return nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))


def tie_all(layers: nn.ModuleList) -> None:
    """Tie them by flip_sym."""
    for layer in layers:
        tp.register_tie(layer, "flip_sym")


def peak_of_tying(width: int, count: int) -> int:
    """Bytes for each layer that tying needs at its peak over the dense model, in a process."""
    return peak(f"many:{width}:{count}", "-", "-", torch.device("cpu")) // count


def _print_peak_of_tying(width: int, count: int) -> None:
    tie_all(many_layers(width, 2))
    layers = many_layers(width, count)
    resettable = _reset_mark()
    before = _in_use() if resettable else _mark_of_rusage()
    tie_all(layers)
    print(max(0, (_mark() if resettable else _mark_of_rusage()) - before))


def _bytes(tensors: Any) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors)


def _target(target: str, device: str) -> tuple[list[Contender], tuple[int, ...]]:
    kind, *rest = target.split(":")
    if kind == "streams":
        channels, kernel, batch = map(int, rest)
        return made.streams(streams_layer(channels, kernel).to(device)), (batch, channels, 1024)
    rule = rest[0]
    channels, size, batch = map(int, rest[1:])
    options = models.variants(rule, convolution(channels))[0]
    found = layer_contenders(rule, options, channels, device)
    assert found is not None
    return found, (batch, channels, size, size)


def _main(target: str, name: str, mode: str, device: str) -> None:
    torch.set_num_threads(1)
    if target.startswith("many:"):
        _print_peak_of_tying(*map(int, target.split(":")[1:]))
        return
    found, shape = _target(target, device)
    (contender,) = (c for c in found if c.name == name)
    x = torch.randn(shape, device=device, requires_grad=True)

    def call(batch: Tensor, cotangent: Tensor | None) -> Tensor:
        if cotangent is None:
            with torch.no_grad():
                return contender.forward(batch)
        contender.step(batch, cotangent)
        return batch

    first = x[:1].detach().requires_grad_()
    output = call(first, None)
    cotangent = None
    if mode == "training":
        cotangent = torch.ones(len(x), *output.shape[1:], device=device)
        call(first, cotangent[:1])
    del output, first
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(x, cotangent)
        print(torch.cuda.max_memory_allocated() - before)
        return
    resettable = _reset_mark()
    before = _in_use() if resettable else _mark_of_rusage()
    kept = call(x, cotangent)
    after = _mark() if resettable else _mark_of_rusage()
    del kept
    print(max(0, after - before))


def _reset_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _in_use() -> int:
    return _status("VmRSS")


def _mark() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def _mark_of_rusage() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    _main(*sys.argv[1:])
