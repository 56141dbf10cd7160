"""Tie a layer in the middle of training, and choose the learning rate of a tied layer."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import tiedparam as tp

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)


def make_model():
    torch.manual_seed(0)
    blocks = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128, 10))


def train(model, optimizer, steps):
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (model(images).argmax(1) == labels).float().mean().item()


# In mid-training: the optimizer gets the free values, and its state follows.
model = make_model()
adam = torch.optim.Adam(model.parameters(), lr=5e-3)
train(model, adam, steps=40)
tp.register_tie(model[2], "flip_sym", optimizer=adam, root=model)
(free,) = tp.free_values(model[2]).values()
print("values:", tuple(free.shape), "their average:", tuple(adam.state[free]["exp_avg"].shape))
assert train(model, adam, steps=60) > 0.9

# A fresh model: tie first, build the optimizer afterwards. With SGD divide the rate of a free
# value by its multiplicity, here 8 inputs that share one kernel. With Adam leave it as it is.
model = make_model()
tp.register_tie(model[2], "channel_shared", over="in", init="rescale", root=model)
rates = {}
for parameter in model.parameters():
    owner = tp.owner(parameter)  # None for what is not tied
    shared = 1 if owner is None else int(owner.rule.multiplicities()[owner.index].max())
    rates.setdefault(0.08 / shared, []).append(parameter)
groups = [{"params": parameters, "lr": rate} for rate, parameters in rates.items()]
sgd = torch.optim.SGD(groups, momentum=0.9)
for group in sgd.param_groups:
    print("rate", group["lr"], [tuple(parameter.shape) for parameter in group["params"]])
assert train(model, sgd, steps=100) > 0.9
