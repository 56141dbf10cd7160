"""Load a dense checkpoint, tie, save, resume as if nothing had happened, and give it back dense."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import tiedparam as tp

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)


def make_model():
    blocks = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128, 10))
    return model, torch.optim.AdamW(model.parameters(), lr=5e-3)


def train(model, optimizer, steps):
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def save(model, optimizer, path):
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)


def load(model, optimizer, path):
    saved = torch.load(path)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])


model, optimizer = make_model()  # a plain training, before tiedparam
train(model, optimizer, steps=20)
save(model, optimizer, "dense.pt")

model, optimizer = make_model()  # a dense checkpoint: load it, then tie with the optimizer
load(model, optimizer, "dense.pt")
tp.register_tie(model[2], "flip_sym", optimizer=optimizer, root=model)
train(model, optimizer, steps=20)
save(model, optimizer, "tied.pt")

again, its_optimizer = make_model()  # a tied checkpoint: tie in the same way, then load it
tp.register_tie(again[2], "flip_sym", optimizer=its_optimizer, root=again)
load(again, its_optimizer, "tied.pt")
train(model, optimizer, steps=5)
train(again, its_optimizer, steps=5)
print("the same after resuming:", torch.allclose(model(images), again(images), atol=1e-5))

plain, _ = make_model()  # and for whoever does not have tiedparam
plain.load_state_dict(tp.dense_state_dict(again))
print("the same without ties:", torch.equal(plain(images), again(images)))
