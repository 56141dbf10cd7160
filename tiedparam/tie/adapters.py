"""What PEFT puts in the place of a layer, as far as a tie that reads the layer is concerned.

PEFT need not be installed; its classes are looked up only where it is in use.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

PEFT = "peft.tuners.tuners_utils"
"""The module that is there as soon as PEFT can adapt a layer."""


def adapts(wrapper: nn.Module, layer: nn.Module) -> bool:
    """Whether an adapter around ``layer`` may be merged into its weight (LoRA and its kin)."""
    return _wraps(PEFT, "BaseTunerLayer", wrapper, layer)


def trains_another(wrapper: nn.Module, layer: nn.Module) -> bool:
    """Whether ``layer`` lies idle while a copy of it is trained in its place."""
    return _wraps("peft.utils.other", "ModulesToSaveWrapper", wrapper, layer)


def _wraps(module: str, name: str, wrapper: nn.Module, layer: nn.Module) -> bool:
    kind: Any = getattr(sys.modules.get(module), name, None)
    return kind is not None and any(
        isinstance(around, kind) and any(inside is layer for inside in around.modules())
        for around in wrapper.modules()
    )
