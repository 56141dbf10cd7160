"""Saves a tied model, loads it into a plain one, and writes a dense checkpoint for everybody."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import tiedparam as tp


def make_model():
    return nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)
    )


torch.manual_seed(0)
model = make_model()
plan = {"0": "flip_sym", "2": ("copy", {"source": "0"}), "4": ("row_repeat", {"groups": 5})}
tp.tie_model(model, plan, init="rescale")

tp.save(model, "tied.safetensors")  # the free values, and how the model is tied
same = tp.load("tied.safetensors", make_model())  # ties the plain model, and fills it
images = torch.randn(4, 8, 8, 8)
assert torch.equal(same(images), model(images))

tp.export_dense(model, "dense.safetensors")  # what the plain model would save
plain = make_model()
plain.load_state_dict(load_file("dense.safetensors"))  # here nobody needs tiedparam
assert torch.allclose(plain(images), model(images), atol=1e-5)

for path in ("tied.safetensors", "dense.safetensors"):
    print(path, Path(path).stat().st_size, "bytes")
