"""PEFT asks for tied layers before it merges: the first layer is not changed if another refuses.

A merge goes from layer to layer, and a tied one refuses the write. By then adapters of layers
before it are in their weights. So PEFT's own question, whether a merge is allowed, is extended.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn

from tiedparam.tie.adapters import PEFT
from tiedparam.tie.lookup import find_tie
from tiedparam.util.callers import caller, module_of
from tiedparam.util.errors import TieError, describe

_QUESTION = "_check_merge_allowed"


def watch_merges() -> None:
    """Let PEFT's check before a merge refuse for tied layers, from now on."""
    tuner: Any = getattr(sys.modules[PEFT], "BaseTuner", None)
    asked: Any = getattr(tuner, _QUESTION, None)
    if asked is None or hasattr(asked, "refuses_ties"):
        return

    @functools.wraps(asked)
    def ask(self: Any) -> Any:
        result = asked(self)
        refuse_merge(self.model, _names_to_merge(caller()))
        return result

    ask.refuses_ties = True  # type: ignore[attr-defined]
    setattr(tuner, _QUESTION, ask)


def refuse_merge(model: nn.Module, names: list[str] | None) -> None:
    """Raise if merging adapters would write into a tied tensor.

    Args:
        model: what holds the adapters.
        names: which adapters; those that are active if None.

    Raises:
        TieError: if it would.
    """
    kind: Any = sys.modules[PEFT].BaseTunerLayer
    for wrapper in model.modules():
        if not isinstance(wrapper, kind) or not _is_merged_by(wrapper, names):
            continue
        layer = wrapper.get_base_layer()
        for name in _written(wrapper):
            if find_tie(layer, name) is not None:
                where = describe(layer, name, model)
                raise TieError(
                    "cannot merge the adapters of this model",
                    f"{where} is tied: what is merged into it would be lost.",
                    "Merge adapters of other layers by adapter_names=, or call remove_tie first.",
                )


def _names_to_merge(frame: FrameType | None) -> list[str] | None:
    """The ``adapter_names`` of PEFT's call that asks whether it may merge."""
    while frame is not None and module_of(frame).startswith("peft."):
        if "adapter_names" in frame.f_locals:
            names: list[str] | None = frame.f_locals["adapter_names"]
            return names
        frame = frame.f_back
    return None


def _is_merged_by(wrapper: Any, names: list[str] | None) -> bool:
    """Whether a merge of these adapters changes the layer in this wrapper."""
    held = {name for part in _parts(wrapper) for name in part}
    chosen = wrapper.active_adapters if names is None else names
    return any(name in held and name not in wrapper.merged_adapters for name in chosen)


def _parts(wrapper: Any) -> Iterator[Any]:
    for name in wrapper.adapter_layer_names:
        part = getattr(wrapper, name, None)
        # LN tuning exchanges whole layers, and writes into none
        if isinstance(part, (nn.ModuleDict, nn.ParameterDict)) and name != "ln_tuning_layers":
            yield part


def _written(wrapper: Any) -> Iterator[str]:
    """The tensors of its layer that a merge writes into."""
    target = getattr(wrapper, "parameter_name", None)
    yield from ("weight", "in_proj_weight") if target is None else (target,)
    if any(getattr(wrapper, "lora_bias", {}).values()):
        yield "bias"
