"""Ties a model by one plan in the middle of training, says what that saved, and goes back."""

import torch
from torch import nn

import tiedparam as tp

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(16, 16, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(16, 16, 3, padding=1),
    nn.AdaptiveAvgPool2d(4),
    nn.Flatten(),
    nn.Linear(256, 64),
    nn.ReLU(),
    nn.Linear(64, 10),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
images, labels = torch.randn(32, 3, 16, 16), torch.randint(10, (32,))


def train(steps):
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


train(5)
plan = {
    "2": "flip_sym",  # a layer by its name
    "4": ("copy", {"source": "2"}),  # with the options of the rule
    # layers of a type, but for one
    nn.Linear: ("masked", {"pattern": "block_diagonal", "blocks": 4, "exclude": ["9"]}),
}
done = tp.tie_model(model, plan, optimizer=optimizer)
print(done)
train(5)

tp.untie_model(model, optimizer=optimizer)
assert type(model[2]) is nn.Conv2d
assert torch.equal(model[4].weight, model[2].weight)  # the values stay
train(5)
