"""Which weights a load has projected: one warning for all layers of a model.

A layer sees only its own entries while torch loads it. The call of ``load_state_dict`` is looked up
among the callers, and a hook on its model runs when the last layer has been loaded.
"""

from __future__ import annotations

import math
import weakref
from types import FrameType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from tiedparam.tie.torch_callers import load_call
from tiedparam.util.callers import caller
from tiedparam.util.errors import some_of, warn


def warn_projected(projected: list[tuple[str, float]]) -> None:
    """Say which loaded weights were not lawful, by key and residual, the worst first."""
    if not projected:
        return
    worst = sorted(projected, key=lambda each: -math.inf if math.isnan(each[1]) else -each[1])
    names = some_of([f"'{key}' (residual {residual:.2e})" for key, residual in worst])
    weights = "these weights" if len(worst) == 1 else f"{len(worst)} weights"
    warn(
        f"{weights} were not lawful and were projected while loading: {names}.",
        "Fine-tune, or look at tiedparam.residual before you tie.",
    )


class _Projected:
    """The hook on a model that is being loaded, which warns at the end.

    Attributes:
        found: keys and residuals so far.
    """

    def __init__(self) -> None:
        self.found: list[tuple[str, float]] = []

    def __call__(self, model: nn.Module, incompatible: object) -> None:
        found, self.found = self.found, []
        if _hook_in(load_call(caller())) is self:  # not of a load that an error has ended
            warn_projected(found)

    def __reduce__(self) -> Any:
        return type(self), ()


_loads: dict[int, _Projected] = {}
"""By the ``id`` of the dictionary that `load_state_dict` loads from, as long as it lives."""


def start_load(frame: FrameType) -> None:
    """Prepare for projected weights in the load whose call is above this frame, if there is one.

    Before any is found: by then torch may be running the hooks of the model itself.
    """
    call = load_call(frame)
    if call is not None and _hook_in(call) is None:
        model, entries = call
        hook = _loads[id(entries)] = _Projected()
        handle = model.register_load_state_dict_post_hook(hook)
        # torch has made this dictionary for the one call
        weakref.finalize(entries, _end_load, id(entries), handle).atexit = False


def note_projected(key: str, residual: float, frame: FrameType) -> None:
    """Warn of a weight when the load ends whose call is above this frame; else now."""
    hook = _hook_in(load_call(frame))
    if hook is None:
        warn_projected([(key, residual)])
    else:
        hook.found.append((key, residual))


def _hook_in(call: tuple[nn.Module, dict[str, Any]] | None) -> _Projected | None:
    return _loads.get(id(call[1])) if call is not None else None


def _end_load(entries: int, handle: RemovableHandle) -> None:
    del _loads[entries]
    handle.remove()
