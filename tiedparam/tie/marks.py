"""What is written on Parameters for the optimizer guard: which were replaced, which are free.

Marks are attributes: a weak reference to a Parameter would keep torch from swapping its contents
(`torch.utils.swap_tensors`), as it does when it converts some models.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

RETIRED = "_tiedparam_retired"
"""On a replaced parameter: why no optimizer may hold it."""
FREE = "_tiedparam_free"
"""On a free value: the name of its tensor."""


def carry_attributes(old: nn.Parameter, new: nn.Parameter) -> None:
    """What users have written on a parameter (a learning rate, say) goes to its successor."""
    for name, value in old.__dict__.items():
        if name not in (RETIRED, FREE):
            new.__dict__[name] = value


def carry_marks(
    old: Mapping[str, nn.Parameter | None], new: Mapping[str, nn.Parameter | None]
) -> None:
    """Free values that were copied, or replaced while loading, are watched as before (S17, S19)."""
    for name, parameter in old.items():
        successor = new.get(name)
        if successor is not None and successor is not parameter and hasattr(parameter, FREE):
            setattr(successor, FREE, getattr(parameter, FREE))
