"""A script as users write them. `test_type_checkers.py` reads it, also with mistakes in it."""

from __future__ import annotations

import torch
from torch import nn

import tiedparam as tp
from tiedparam.rules import ChannelShared


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.third(self.second(self.first(images)))
        return torch.as_tensor(self.head(features.mean((2, 3))))


model = Network()
nn.init.zeros_(model.head.bias)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
print(tp.residual(model.second, "flip_sym"), tp.residual(model.head, "row_repeat", groups=2))

first: nn.Conv2d = tp.register_tie(model.first, ChannelShared(over="in"), optimizer=optimizer)
tp.register_tie(model.second, "channel_shared", over="out", compute="dense", optimizer=optimizer)
tp.register_tie(model.third, "copy", source=model.second, root=model, optimizer=optimizer)
tp.register_tie(model.head, "row_repeat", groups=2, optimizer=optimizer)
tp.register_tie(model.head, "repeat", "bias", outputs=2, init="exact", optimizer=optimizer)

for name, parameter in tp.free_values(model.head).items():
    tp.assign_(model.head, free=torch.zeros_like(parameter))
    print(first.kernel_size, name, parameter.shape)

model(torch.ones(1, 3, 5, 5)).sum().backward()
optimizer.step()
tp.untie_model(model, optimizer=optimizer)
plan = {"second": "flip_sym"}
print(tp.tie_model(model, plan, on_unfit="skip", dry_run=True))
laws = ["flip_sym", "row_repeat"]
print(tp.residual(model.second, laws), tp.residual(model.second, "flip_sym", rows=slice(0, 8)))
tp.register_tie(model.third, ["flip_sym", ("row_repeat", {"groups": 2}), ChannelShared(over="in")])
tp.register_tie(model.head, ["row_repeat", (ChannelShared, {"over": "in"})], rows=slice(0, 2))
tp.untie_model(model)
print(tp.tie_model(model, {"second": laws, "head": ("row_repeat", {"rows": slice(0, 2)})}))
tp.untie_model(model)
print(tp.tie_model(model, {nn.Linear: ChannelShared, "third": ("copy", {"source": "second"})}))
