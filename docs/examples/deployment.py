"""Export a tied model to ONNX in two ways: with its law, and untied; run both by onnxruntime."""

import copy
from pathlib import Path

import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import nn

import tiedparam as tp

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)

torch.manual_seed(0)
blocks = nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(2)
model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(256, 10))
tp.register_tie(model[2], "flip_sym", init="rescale", root=model)
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
for start in range(0, len(images), 100):
    batch = slice(start, start + 100)
    loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval()


def export(model, path):
    """Write a file that takes any number of images; return what it answers."""
    batch = {0: torch.export.Dim("batch")}
    program = torch.onnx.export(
        model, (images[:2],), dynamo=True, dynamic_shapes=(batch,), verbose=False
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # notes on where each node comes from
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    (answers,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(answers)


untied = tp.untie_model(copy.deepcopy(model))  # the same weights, as plain Parameters
for kind, candidate in (("tied", model), ("untied", untied)):
    answers = export(candidate, f"{kind}.onnx")
    assert torch.allclose(answers, model(images), atol=1e-4)
smaller = Path("tied.onnx").stat().st_size < Path("untied.onnx").stat().st_size
print("the tied file is smaller:", smaller)
