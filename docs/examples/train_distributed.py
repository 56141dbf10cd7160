"""Train a tied model on handwritten digits, on any number of processes and machines.

With scikit-learn, which brings the digits along, and with torchrun, which says who is who.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tiedparam as tp

BATCH = 72  # over all processes; 1, 2, 3, 4, 6, 8, 9 or 12 of them share it equally
# so the losses do not depend on how many there are


class Net(nn.Module):
    """Three convolutions and a classifier; two convolutions share one flip-symmetric kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.mix = nn.Conv2d(16, 16, 3, padding=1)
        self.again = nn.Conv2d(16, 16, 3, padding=1)
        self.blur = nn.Conv2d(16, 16, 3, stride=2)
        self.head = nn.Linear(16 * 9, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores of the ten digits for images of shape (batch, 1, 8, 8)."""
        x = torch.relu(self.stem(images))
        x = torch.relu(self.again(torch.relu(self.mix(x))))
        return self.head(torch.relu(self.blur(x)).flatten(1))


def tied_net() -> Net:
    """The model with its ties: always before it is wrapped."""
    torch.manual_seed(0)  # every process starts with the same weights
    net = Net()
    tp.register_tie(net.mix, "flip_sym", init="rescale", root=net)
    tp.register_tie(net.again, "copy", source="mix", root=net)
    tp.register_tie(net.blur, "channel_shared", over="in", init="rescale", root=net)
    return net


def wrap(net: Net, how: str, device: torch.device) -> nn.Module:
    """Hand the model to DDP, or to FSDP2 with a copy and its source in one unit."""
    if how == "ddp":
        return DistributedDataParallel(net, device_ids=[device] if device.type == "cuda" else None)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in ([net.stem], [net.mix, net.again], [net.blur], [net.head]):
        fully_shard(unit, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def main() -> None:
    """Train, print the loss of every epoch, save one dense checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wrap", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--save", metavar="FILE", help="where the first process saves the model")
    options = parser.parse_args()

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if BATCH % world:
        parser.error(f"{world} processes cannot share batches of {BATCH} equally")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    digits = load_digits()
    images = (
        torch.tensor(digits.images, dtype=torch.get_default_dtype()).unsqueeze(1).div(16).to(device)
    )
    labels = torch.tensor(digits.target).to(device)
    net = tied_net().to(device)
    model = wrap(net, options.wrap, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # after tying and wrapping

    shuffle = torch.Generator().manual_seed(0)  # the same order in every process
    for epoch in range(1, options.epochs + 1):
        order = torch.randperm(len(images), generator=shuffle)
        batches = order[: len(order) // BATCH * BATCH].to(device).split(BATCH)
        total = torch.zeros((), device=device)
        for batch in batches:
            mine = batch[rank::world]
            loss = nn.functional.cross_entropy(model(images[mine]), labels[mine])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        if rank == 0:
            print(f"epoch {epoch}: loss {total.item() / len(batches) / world:.5f}", flush=True)

    # every process takes part in gathering, one writes: tied, or dense for a plain model
    whole = get_model_state_dict(
        net, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if rank == 0 and options.save:
        torch.save(tp.untie_state_dict(net, whole), options.save)
        print(f"saved {options.save}", flush=True)
    # gloo's threads drop the last tensors, for which they need the interpreter's lock; destroying
    # the group would wait for them while it holds that lock. Sleeping gives it away.
    dist.barrier()
    time.sleep(0.5)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
