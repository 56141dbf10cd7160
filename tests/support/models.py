"""Small models, and what is done to them in several files."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.norm1(self.conv1(x)))) + x)


class ResNet(nn.Module):
    """A small one: stem, two blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = Block(4)
        self.layer2 = Block(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(F.relu(self.stem(x)))).mean((2, 3)))


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 6, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def noisy(value: Tensor, noise: float = 0.05) -> Tensor:
    return value + noise * value.std() * torch.randn_like(value)


@torch.no_grad()
def plant(model: nn.Module) -> dict[tuple[str, str], str]:
    """Put near-symmetries into an encoder of three layers."""
    one, two, three = model.layers
    w = one.self_attn.out_proj.weight
    w.copy_(noisy((w + w.t()) / 2))
    one.linear1.weight.copy_(noisy(one.linear1.weight[:1].expand_as(one.linear1.weight)))
    three.linear1.weight.copy_(noisy(two.linear1.weight))
    three.linear2.weight.copy_(noisy(two.linear1.weight.t()))
    three.self_attn.in_proj_weight.copy_(noisy(two.self_attn.in_proj_weight.square()))
    return {
        ("layers.0.self_attn.out_proj", "flip_sym"): "",
        ("layers.0.linear1", "row_repeat(groups=1)"): "",
        ("layers.0.linear1", "channel_shared(over='out')"): "",
        ("layers.2.linear1", "copy of layers.1.linear1.weight"): "",
        ("layers.2.linear2", "copy(fn='t') of layers.1.linear1.weight"): "",
        ("layers.2.self_attn", "squared_copy of layers.1.self_attn.in_proj_weight"): "",
    }


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return model


def train_on_tokens(model: nn.Module, tokens: Tensor, steps: int) -> list[float]:
    """The losses of some steps of a Hugging Face model that is to say its input again."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
