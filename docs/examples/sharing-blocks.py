"""Twelve blocks that store one: tied, trained, saved and loaded; then blocks that differ a bit."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import tiedparam as tp


def make_model(number=12):
    """Stock blocks, each with weights of its own."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, number, enable_nested_tensor=False)
    for p in model.parameters():  # torch copies one layer: here they are all different
        p.data += 0.1 * torch.randn_like(p)
    return model


def values(model):
    """How many numbers the model stores."""
    return sum(parameter.numel() for parameter in model.parameters())


def train(model, steps=15):
    """Learn to say what it is told. Returns the last loss as a part of the first."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)  # after tying
    losses = []
    for _ in range(steps):
        x = torch.randn(16, 6, 16)
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[-1] / losses[0]


model = make_model()
print("dense:", values(model))

# every module of every block from its namesake in the first block
tp.tie_model(model, {"layers.*.*": ("copy", {"source": "layers.0.*"})})
print("tied:", values(model))
print("it learns:", train(model) < 0.9)
first, last = model.layers[0], model.layers[11]
print("still one block:", torch.equal(last.linear1.weight, first.linear1.weight))

file = Path(tempfile.mkdtemp()) / "shared.safetensors"
tp.save(model, file)
loaded = tp.load(file, make_model())  # the file says how it is tied
same = torch.equal(loaded.layers[7].linear2.weight, first.linear2.weight)
print("loaded:", values(loaded), same)

# or: each block's matrices are those of the first, plus a matrix of rank 1 of its own
model = make_model()
tp.tie_model(model, {"layers.*.*": ("shared_delta", {"source": "layers.0.*", "rank": 1})})
print("with differences:", values(model))
