"""Classify digits with a tied model whose weights are computed once, not at every call."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import tiedparam as tp

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)

torch.manual_seed(0)
blocks = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128, 10))
tp.register_tie(model[2], "flip_sym", init="rescale", root=model)
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
for _ in range(60):
    loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

model.eval()
with tp.frozen(model), torch.no_grad():  # every tied weight is computed here
    answers = [model(batch).argmax(1) for batch in images.split(100)]  # and not here
right = (torch.cat(answers) == labels).float().mean().item()
print("more than nine of ten are right:", right > 0.9)

model.train()  # after the block everything is as before
model(images).sum().backward()
