"""The state of a model as a file can hold it: plain tensors, each once, under its names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from tiedparam.formats.safetensors import Entry
from tiedparam.tie.offloaded import TO_BRING_BACK, is_offloaded
from tiedparam.util.errors import Reason, TieError
from tiedparam.util.progress import progress


def plain_state(model: nn.Module) -> OrderedDict[str, Tensor]:
    """The state dict, once it is known to consist of tensors that a file can hold.

    Raises:
        TieError: naming the first entry that is something else.
    """
    state = OrderedDict(model.state_dict())
    for key, value in state.items():
        reason = _why_not_plain(value, model)
        if reason is not None:
            raise TieError("cannot save the model", f"'{key}' {reason.fact}", reason.remedy)
    return state


def _why_not_plain(value: object, model: nn.Module) -> Reason | None:
    if not isinstance(value, Tensor):
        return Reason(
            f"is a {type(value).__name__}, and a safetensors file holds tensors only.",
            "Use torch.save(model.state_dict(), path).",
        )
    if type(value) is not Tensor or value.layout is not torch.strided or value.is_quantized:
        return Reason(
            f"is a {type(value).__name__} of its own kind ({value.layout}).",
            "Make it a plain tensor first: gather what is sharded, dequantize, densify.",
        )
    if value.is_meta and is_offloaded(model):
        return Reason("is offloaded by accelerate.", TO_BRING_BACK)
    if value.is_meta:
        return Reason(
            "is on the meta device and has no values.", "Load or initialise the model first."
        )
    return None


def aliases_of(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that stand under an earlier name already: theirs → the earlier."""
    first: dict[tuple[object, ...], str] = {}
    aliases = {}
    for key, value in state.items():
        if value.numel() == 0:
            continue  # no memory that could be shared
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        earlier = first.setdefault((*place, value.is_conj(), value.is_neg()), key)
        if earlier != key:
            aliases[key] = earlier
    return aliases


def entry_of(key: str, value: Tensor) -> Entry:
    """What a file says of a tensor."""
    return Entry(key, value.dtype, tuple(value.shape))


def writing_bar(entries: Iterable[Entry]) -> AbstractContextManager[Callable[[int], None]]:
    """A progress bar for what is written, if that takes long and stderr is a terminal."""
    return progress(sum(entry.nbytes for entry in entries), "writing")
