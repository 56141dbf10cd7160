"""Train a language model whose blocks share their weights, on one process or on many.

Six transformer blocks are one: five are copies of the first, and the output layer is a copy of the
embedding. So the model, its gradients, its optimizer and its checkpoint hold one block. The text is
made up here, by a small grammar, and the model learns it letter by letter.

One process, two that share each batch (DDP, or FSDP2 with all blocks in one unit), and two that
share each layer (tensor parallelism)::

    python docs/examples/share_blocks.py
    torchrun --nproc-per-node 2 docs/examples/share_blocks.py --wrap ddp
    torchrun --nproc-per-node 2 docs/examples/share_blocks.py --wrap fsdp
    torchrun --nproc-per-node 2 docs/examples/share_blocks.py --wrap tensor

The losses are the same, up to rounding.
"""

from __future__ import annotations

import argparse
import os
import random
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import tiedparam as tp

LETTERS = " .abcdefghijklmnopqrstuvwxyz"  # 28
WIDTH, HEADS, BLOCKS = 32, 4, 6
BATCH, LENGTH = 24, 48  # over all processes; 1, 2, 3, 4, 6, 8, 12 or 24 of them share it equally


def text(sentences: int = 400) -> Tensor:
    """Sentences of a small grammar, as numbers of letters."""
    draw = random.Random(0)
    adjectives = ["small", "old", "green", "quiet", "clever", "lazy"]
    nouns = ["cat", "dog", "bird", "child", "teacher", "farmer", "river", "tree"]
    verbs = ["sees", "follows", "likes", "hears", "paints", "finds"]

    def noun() -> str:
        adjective = draw.choice(adjectives) + " " if draw.random() < 0.5 else ""
        return f"the {adjective}{draw.choice(nouns)}"

    said = (f"{noun()} {draw.choice(verbs)} {noun()}. " for _ in range(sentences))
    return torch.tensor([LETTERS.index(letter) for letter in "".join(said)])


class Block(nn.Module):
    """Attention to what came before, then two layers at each place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, length, width) to the same."""
        y = self.norm1(x)
        # -1 heads: under tensor parallelism a process has some of them
        q, k, v = (
            layer(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """Letters in, scores of the next letter out."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(LETTERS), WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.scores = nn.Linear(WIDTH, len(LETTERS), bias=False)

    def forward(self, letters: Tensor) -> Tensor:
        """From (batch, length) to (batch, length, 28)."""
        x = self.letters(letters) + self.places.weight[: letters.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.scores(self.norm(x))


def shared_model() -> Model:
    """The model with its ties: always before it is wrapped."""
    torch.manual_seed(0)  # every process starts with the same weights
    model = Model()
    nn.init.normal_(model.letters.weight, std=0.1)
    tp.tie_model(
        model,
        {
            "blocks.*.*": ("copy", {"source": "blocks.0.*"}),
            "scores": ("copy", {"source": "letters"}),
        },
    )
    return model


def wrap(model: Model, how: str, device: torch.device) -> nn.Module:
    """Hand the model to one of torch's engines."""
    if how == "ddp":
        return DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None
        )
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    if how == "fsdp":
        fully_shard(list(model.blocks), mesh=mesh)  # copies and their source in one unit
        return fully_shard(model, mesh=mesh)  # so are the embedding and its copy
    # every block is cut as the first one is: its copies copy what is there of it
    plan = {f"blocks.*.{name}": ColwiseParallel() for name in ("query", "key", "value", "up")}
    plan |= {f"blocks.*.{name}": RowwiseParallel() for name in ("out", "down")}
    plan["letters"] = RowwiseParallel(input_layouts=Replicate())
    plan["scores"] = ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(model, mesh, plan)


def train(how: str | None, steps: int, device: torch.device) -> list[float]:
    """The losses of so many steps."""
    model = shared_model().to(device)
    wrapped = model if how is None else wrap(model, how, device)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=3e-3)  # after tying and wrapping
    rank, world = (dist.get_rank(), dist.get_world_size()) if how in ("ddp", "fsdp") else (0, 1)
    letters, draw = text().to(device), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(letters) - LENGTH - 1, (BATCH,), generator=draw)
        batch = torch.stack([letters[start : start + LENGTH + 1] for start in starts[rank::world]])
        scores = wrapped(batch[:, :-1])
        loss = F.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    return losses


def main() -> None:
    """Train, and print the losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wrap", choices=["ddp", "fsdp", "tensor"], help="with torchrun")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    many = "RANK" in os.environ  # which torchrun sets
    if many is (options.wrap is None):
        parser.error("--wrap goes with torchrun, and torchrun with --wrap")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if many:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        world = dist.get_world_size()
        if BATCH % world or HEADS % world:
            parser.error(f"{world} processes cannot share {BATCH} texts and {HEADS} heads equally")
    losses = train(options.wrap, options.steps, device)
    if not many or dist.get_rank() == 0:
        for step, loss in enumerate(losses, 1):
            if step % 10 == 0 or step == 1:
                print(f"step {step}: loss {loss:.6f}", flush=True)
    if many:
        # gloo's threads drop the last tensors, for which they need the interpreter's lock;
        # destroying the group would wait for them while it holds that lock. Sleeping gives it away.
        dist.barrier()
        time.sleep(0.5)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
