"""Which part of torch reads or writes a tied tensor, where that decides what is right.

Some of torch's tools reach a layer by its attributes only, and would break it, or lose what
they were given, without an error that says why. The module of the calling frame tells them
from a user's code. So this file knows the names of torch's and accelerate's modules and
functions, as `tiedparam.util.torch_private` knows torch's private parts; each has a test with
the tool itself.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from functools import lru_cache
from types import FrameType
from typing import Any

from torch import nn

from tiedparam.util.callers import module_of
from tiedparam.util.errors import TieError, describe, describe_layer


def is_stock_forward(reader: FrameType) -> bool:
    """Whether a stock layer's forward reads the weight of another layer, to compute with it.

    So do attention and Transformer encoders. They never write into it, and their fast paths
    take no tensor subclass.
    """
    return reader.f_code.co_name == "forward" and module_of(reader).startswith("torch.nn.modules.")


def is_removal(reader: FrameType) -> bool:
    """Whether ``parametrize.remove_parametrizations`` reads the value that the tensor will keep."""
    return reader.f_code.co_name == "remove_parametrizations" and (
        module_of(reader) == "torch.nn.utils.parametrize"
    )


def is_swap(reader: FrameType) -> bool:
    """Whether ``torch.utils.swap_tensors`` asks a tensor for its uses, before it swaps anything."""
    return reader.f_code.co_name == "check_use_count" and module_of(reader) == "torch.utils"


def is_distribution(asker: FrameType) -> bool:
    """Whether ``distribute_module``, by which torch's parallel styles cut layers, asks for modules.

    It may be given a model that holds the layer, which then asks for the layer's.
    """
    frame: FrameType | None = asker
    while frame is not None and frame.f_code.co_name in ("named_modules", "parts_to_cut"):
        frame = frame.f_back
    return (
        frame is not None
        and frame.f_code.co_name == "distribute_module"
        and module_of(frame).startswith("torch.distributed.tensor")
    )


def refuse_old_reparametrization(layer: nn.Module, tensor_name: str, reader: FrameType) -> None:
    """Raise for ``torch.nn.utils.weight_norm`` and ``prune``, which read before they change."""
    tools = ("torch.nn.utils.weight_norm", "torch.nn.utils.prune")
    # their hooks may read a tied tensor: that of the Parameter which they made, tied later
    hooks = ("compute_weight", "apply_mask")
    if module_of(reader) in tools and reader.f_code.co_name not in hooks:
        raise TieError(
            f"cannot use {module_of(reader)} on the tied {describe(layer, tensor_name)}",
            "it replaces the Parameter, and the tensor is computed.",
            "Call remove_tie first, or stack a parametrization on the tie "
            "(torch.nn.utils.parametrizations.spectral_norm works).",
        )


def refuse_functional_call(layer: nn.Module, tensor_name: str, writer: FrameType) -> None:
    """Raise if ``torch.func.functional_call`` was given a tied tensor under its dense key."""
    if module_of(writer) == "torch.nn.utils._named_member_accessor":
        where = describe(layer, tensor_name)
        raise TieError(
            where,
            f"functional_call was given a value for the tied {where}, which is computed: the value "
            "would be written into the stored ones and get no gradient.",
            "Give it the free values by their keys, as dict(model.named_parameters()) has them.",
        )


def refuse_quantization(layer: nn.Module, writer: FrameType) -> None:
    """Raise if ``torch.ao.quantization`` marks a tied layer for conversion.

    It would convert by the stock class's recipe, which takes that very class only.
    """
    if module_of(writer).startswith("torch.ao.quantization"):
        where = describe_layer(layer)
        raise TieError(
            where,
            f"torch.ao.quantization cannot convert the tied {where}.",
            "Call remove_tie first; quantized numbers are then as many as dense ones.",
        )


def load_call(frame: FrameType | None) -> tuple[nn.Module, dict[str, Any]] | None:
    """The model that ``load_state_dict`` is loading, and the dictionary that torch made for that.

    Args:
        frame: that of a function which the call has called.
    """
    while frame is not None and frame.f_code is not nn.Module.load_state_dict.__code__:
        frame = frame.f_back
    return (frame.f_locals["self"], frame.f_locals["state_dict"]) if frame is not None else None


def beyond_modules(reader: FrameType) -> FrameType | None:
    """Who asked a model for its state, which then asked the layers within for theirs."""
    caller: FrameType | None = reader
    while caller is not None and module_of(caller) in (
        "torch.nn.modules.module",
        "tiedparam.layer.host",
    ):
        caller = caller.f_back
    return caller


def refuse_loading_by_key(layer: nn.Module, keys: list[str], asker: FrameType) -> None:
    """Raise if accelerate is about to pass over the dense entries of a tied layer (S46).

    With ``device_map=`` its ``load_checkpoint_in_model`` asks for the model's keys, and then
    sets each tensor of its files under its key. A tied tensor has no dense key in the model.
    """
    if asker.f_code.co_name != "load_checkpoint_in_model":
        return
    given = asker.f_locals
    if not module_of(asker).startswith("accelerate.") or given.get("device_map") is None:
        return
    for file in given.get("checkpoint_files") or ():
        passed_over = [key for key in keys if key in _keys_of(file)]
        if passed_over:
            where = f"'{passed_over[0]}' of '{file}'"
            raise TieError(
                where,
                f"accelerate would pass over {where}, which is dense, because "
                f"{describe_layer(layer)} is tied: with device_map= it sets each tensor under its "
                "own key.",
                "Save tiedparam.tie_state_dict(model, dense) and load that, or call "
                "tiedparam.load(path, model) before dispatch_model.",
            )


def _keys_of(file: str) -> Collection[str]:
    """The names of the tensors in a checkpoint, as far as it can be read."""
    status = os.stat(file)
    return _keys_at(file, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=16)  # every tied layer asks
def _keys_at(file: str, *version: int) -> Collection[str]:
    # here: whoever only ties should not wait for all kinds of files to be imported
    from tiedparam.formats.checkpoint import StoredCheckpoint

    try:
        return frozenset(StoredCheckpoint(file))
    except TieError:  # accelerate will say what is wrong with it
        return ()
