"""A tied tensor's place without its values: for what is planned by shapes and dtypes alone."""

from __future__ import annotations

import torch
from torch import Tensor

from tiedparam.tie.record import Tie


def placeholder(tie: Tie) -> Tensor:
    """A tensor without memory that has the shape and dtype of the effective one."""
    stored = tie.free
    if stored and not tie.is_stacked:
        return torch.empty(tie.rule.bound_layout.shape, dtype=stored[0].dtype, device="meta")
    with torch.no_grad():  # what a function or another parametrization makes, it alone knows
        return tie.weight().to("meta")
