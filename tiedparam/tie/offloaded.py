"""Layers whose values a tool keeps elsewhere, and loads as each layer is called (S38).

accelerate's ``cpu_offload``, ``disk_offload`` and ``dispatch_model`` leave a layer's tensors on
the meta device between calls; diffusers' group offloading to disk leaves memory that was never
written. The list of a tied tensor is a module like others, which such a tool loads as it is
called. A copy, though, reads its source while the source is not called.

Known by the attributes that these tools set on a module, since neither need be installed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tiedparam.util.errors import Reason

TO_BRING_BACK = "Call accelerate.hooks.remove_hook_from_module(model, recurse=True) first."


def can_be_loaded(module: nn.Module) -> bool:
    """Whether accelerate would load the module's tensors for a call of it."""
    return module.__dict__.get("_hf_hook") is not None


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """Have accelerate load the module's tensors, as for a call of it, inside the block."""
    hook: Any = module.__dict__["_hf_hook"]
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def why_offloaded(layer: nn.Module, on_disk: Iterable[nn.Module] = ()) -> Reason | None:
    """Why the values of a layer cannot be exchanged or written: a tool keeps them. Or None.

    Args:
        layer: the layer.
        on_disk: the modules of the model that diffusers keeps on disk, where it is known.
    """
    if is_offloaded(layer):
        return Reason(
            "accelerate offloads its values, and would look for the old ones.", TO_BRING_BACK
        )
    holders = [*([layer] if is_on_disk(layer) else []), *on_disk]
    if any(module is layer for holder in holders for module in holder.modules()):
        return Reason(
            "diffusers keeps its values on disk.",
            "Do so before apply_group_offloading, or leave offload_to_disk_path out.",
        )
    return None


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps values of this module, or of one in it, elsewhere between calls."""
    inside = module.modules()  # the lists of parametrizations among them
    return any(getattr(hook, "offload", False) for part in inside for hook in _align_hooks(part))


def _align_hooks(module: nn.Module) -> list[Any]:
    hook: Any = module.__dict__.get("_hf_hook")
    return list(getattr(hook, "hooks", [hook]))  # a SequentialHook has several


def is_on_disk(module: nn.Module) -> bool:
    """Whether diffusers keeps the values of this module on disk between its calls."""
    registry: Any = module.__dict__.get("_diffusers_hook")
    hook = registry.get_hook("group_offloading") if registry is not None else None
    group = getattr(hook, "group", None)
    return getattr(group, "offload_to_disk_path", None) is not None
