"""A tied tensor's place without its values: for what is planned by shapes and dtypes alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tiedparam.laws.rule import Rule
from tiedparam.tie.lookup import free_values, is_stacked
from tiedparam.util.torch_private import effective


def placeholder(layer: nn.Module, name: str, rule: Rule) -> Tensor:
    """A tensor without memory that has the shape and dtype of the effective one."""
    stored = free_values(layer, name)
    if stored and not is_stacked(layer, name):
        return torch.empty(rule.bound_layout.shape, dtype=stored[0].dtype, device="meta")
    with torch.no_grad():  # what a function or another parametrization makes, it alone knows
        return effective(layer, name).to("meta")
