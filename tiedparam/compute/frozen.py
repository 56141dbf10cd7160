"""`frozen`: a block in which every tied weight of a model is computed once, for inference.

It refuses, until it ends, whatever would make such a weight stale: `refuse_if_frozen` is asked by
all that changes a layer, and `tiedparam.compute.kept` keeps the weights.
"""

from __future__ import annotations

import threading
from contextlib import ContextDecorator
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from tiedparam.compute.kept import (
    FrozenWeight,
    Memory,
    lists_behind,
    sources_behind,
)
from tiedparam.tie.interposed import is_bare
from tiedparam.tie.lookup import named_ties_in
from tiedparam.tie.offloaded import can_be_loaded
from tiedparam.util.errors import TieError
from tiedparam.util.parametrized import parametrization_lists
from tiedparam.util.torch_private import buffers_of, lists_in_tables

_lock = threading.RLock()
_sessions: list[_Session] = []  # what is frozen now, in all threads


class frozen(ContextDecorator):  # noqa: N801 — used like a function, as torch.no_grad is
    """A block in which every tied weight of a model is computed once, for inference.

    Weights that hooks or patches stand before are computed at every call all the same.

    Inside, layers run at the speed of plain dense ones, or of their cheaper form where that
    is faster. Blocks may be nested, shared by threads, and entered again. The state dict is
    the same inside and outside; copies and pickles that are made inside are not frozen.

    Args:
        model: a model, or a part of one, in eval mode.

    Raises:
        TieError: on entering, if a tied layer is in training mode or sharded. Inside, for
            what a fixed weight cannot follow, before anything has changed: ``train()``,
            reading a tied weight while gradients for it are recorded, a backward pass that
            reaches its free values, an optimizer step on them, loading, ``assign_``,
            ``init_``, tying, untying, casting and moving. On leaving, if the free values
            were written all the same in a way that torch does not show (``.data``, NumPy):
            outputs of the block may come from old values.

    Example:
        >>> model = tp.register_tie(nn.Linear(4, 4), "flip_sym").eval()
        >>> with tp.frozen(model), torch.inference_mode():
        ...     outputs = model(torch.ones(2, 4))  # as fast as a dense layer
        ...     try:
        ...         tp.init_(model, nn.init.zeros_)
        ...     except tp.TieError as error:
        ...         print(error.fact, error.remedy)
        'weight' would keep an old weight. Do it outside of the block.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"frozen takes a model, not {type(model).__name__}")
        self._model = model
        self._entered: list[_Session] = []

    def __enter__(self) -> nn.Module:
        with _lock:
            session = _Session(self._model)
            self._entered.append(session)
            _sessions.append(session)
        return self._model

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with _lock:
            session = self._entered.pop()
            _sessions.remove(session)
            changed = session.end()
        if changed and error is None:
            names = ", ".join(changed)
            raise TieError(
                names,
                f"{names} changed inside frozen, in a way that torch does not show. Outputs that "
                "were computed inside may come from the old values.",
                "Write weights outside of the block.",
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> frozen:
        raise TypeError("a frozen block cannot be copied: make one for the copied model")


def refuse_if_frozen(layer: nn.Module, action: str, undo: str = "") -> None:
    """Raise if ``layer`` belongs to a model that is frozen.

    Args:
        layer: the layer that is about to change.
        action: what is about to happen, as the message names it.
        undo: what a call that works its way through the model has changed before it came
            here, and is put back: ``"modes"`` or ``"data"``.

    Raises:
        TieError: if the layer is part of a frozen model.
    """
    if not _sessions:
        return
    with _lock:
        concerned = [session for session in _sessions if session.contains(layer)]
        for session in concerned:
            session.undo(undo)
    if concerned:
        held = [weight.where for session in concerned for _, weight in session.held]
        names = ", ".join(dict.fromkeys(held[:3])) + (", …" if len(held) > 3 else "")
        fact = f"{names} would keep an old weight." if held else "the layer is part of the model."
        raise TieError(f"{action} inside frozen", fact, "Do it outside of the block.")


def refuse_training_forward(layer: nn.Module) -> None:
    """Raise if a frozen layer runs in training mode or while its gradients are recorded."""
    if not _sessions:
        return
    for values in lists_in_tables(layer).values():
        memory: Memory | None = values.__dict__.get("kept")
        held = memory.frozen if memory is not None else None
        if held is None or not held.holds():
            continue
        if layer.training:
            raise TieError(
                held.where,
                f"{held.where} is frozen, and its layer is in training mode.",
                "Call model.eval(), or train outside of the block.",
            )
        held.refuse_gradients()


class _Session:
    """One entered `frozen` block: the weights it holds, and how the model was before."""

    def __init__(self, model: nn.Module) -> None:
        # a copy's source may lie outside of the model: it must not change either
        sources = [source for _, tie in named_ties_in(model) for source in sources_behind(tie.rule)]
        self.members = dict.fromkeys((*model.modules(), *sources))
        self.held = _weights_to_hold(model)
        for memory, weight in self.held:
            if weight.holders == 0:
                memory.frozen = weight
                weight.guard()
            weight.holders += 1
        self.modes = [(module, module.training) for module in self.members]
        parameters = dict.fromkeys(p for module in self.members for p in module.parameters())
        self.data = [
            (p, p.data, p.grad, p.grad.data if p.grad is not None else None) for p in parameters
        ]
        self.buffers = [(module, buffers_of(module).copy()) for module in self.members]
        # a layer is loaded before its parametrizations, whose modules pickles may regroup
        inner = {
            id(part)
            for module in self.members
            if parametrize.is_parametrized(module)
            for part in parametrization_lists(module).modules()
        }
        self.hooks = [
            module.register_load_state_dict_pre_hook(_refuse_loading)
            for module in self.members
            if id(module) not in inner
        ]

    def contains(self, layer: nn.Module) -> bool:
        return layer in self.members

    def undo(self, what: str) -> None:
        """Bring modes, or dtypes and places, back to what they were on entering."""
        if what == "modes":
            for module, training in self.modes:
                module.training = training
        if what != "data":
            return
        for parameter, data, gradient, gradient_data in self.data:
            now = parameter.data
            if now.dtype != data.dtype or now.device != data.device:
                parameter.data = data
                if gradient is not None and gradient_data is not None:
                    gradient.data = gradient_data
        for module, buffers in self.buffers:
            buffers_of(module).update(buffers)

    def end(self) -> list[str]:
        """Let go of the weights. Returns the names of those whose values were changed."""
        for hook in self.hooks:
            hook.remove()
        ended = []
        for memory, weight in self.held:
            weight.holders -= 1
            if weight.holders == 0:
                memory.frozen = None
                weight.release()
                ended.append(weight)
        return [weight.where for weight in ended if weight.changed()]


def _weights_to_hold(model: nn.Module) -> list[tuple[Memory, FrozenWeight]]:
    """The weights that a block for this model holds, computed. Changes nothing.

    Raises:
        TieError: if one of them cannot be frozen.
    """
    held: dict[int, tuple[Memory, FrozenWeight]] = {}
    for prefix, tie in named_ties_in(model):
        memory = tie.kept
        if memory is None or id(memory) in held:  # given to torch directly: computed
            continue
        where = f"'{prefix}{tie.tensor_name}'"
        if tie.layer.training:
            fact = "its layer is in training mode."
            raise TieError(f"cannot freeze {where}", fact, "Call model.eval().")
        lists = lists_behind(tie.layer, tie.tensor_name)
        if not all(is_bare(values, part) for values, part, _ in lists) or any(
            can_be_loaded(source) for source in sources_behind(tie.rule)
        ):
            continue  # hooks may change the weight at every call, as offloading does
        held[id(memory)] = memory, memory.frozen or FrozenWeight(tie, where)
    return list(held.values())


def _refuse_loading(module: nn.Module, *rest: Any) -> None:
    """A load hook of a frozen model; copies of the model that carry it are not frozen."""
    refuse_if_frozen(module, "loading")
