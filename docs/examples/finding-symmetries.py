"""Finds the symmetries that training left in a network for digits, and ties them."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import tiedparam as tp


class Digits(nn.Module):
    """Cleans a picture of a digit, packs it into 16 numbers and unpacks it, and names it."""

    def __init__(self):
        super().__init__()
        self.clean = nn.Linear(64, 64)
        self.pack, self.unpack = nn.Linear(64, 16), nn.Linear(16, 64)
        self.name = nn.Linear(64, 10)

    def forward(self, pictures):
        return self.clean(pictures), self.unpack(self.pack(pictures)), self.name(pictures)


def train(model, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2, weight_decay=1e-3)
    for _ in range(steps):
        noisy = pictures + 0.5 * torch.randn_like(pictures)
        clean, unpacked, names = model(noisy)
        errors = (clean - pictures).square().mean() + (unpacked - pictures).square().mean()
        loss = errors + nn.functional.cross_entropy(names, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return errors.item()


torch.manual_seed(0)
digits = load_digits()
pictures = torch.tensor(digits.data[:1000], dtype=torch.float32) / 16
pictures -= pictures.mean(0)
labels = torch.tensor(digits.target[:1000])
model = Digits()
before = train(model, 150)

seen = tp.scan(model)
print(seen.headline())
for row in seen.found():
    print(f"{row.layer:7} {row.rule:27} {row.residual:.2f}, of a random one {row.expected:.2f}")
tp.draw_scan(seen).savefig("scan.png")
tp.draw_residuals(seen).savefig("residuals.png")

done = tp.tie_model(model, seen.plan())
print(done.notes()[0])
after = train(model, 50)
print(f"error {before:.3f} before, {after:.3f} after")
