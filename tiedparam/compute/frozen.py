"""Weights that need not be computed at every call: `frozen`, and ``cache=True``.

Both serve inference. `frozen` computes every tied weight of a model once and refuses, until
it ends, whatever would make that weight stale. ``register_tie(..., cache=True)`` keeps the
last weight of one layer and compares the free values, bit for bit, before it is used again:
no metadata tells whether a tensor was written (fused optimizers, ``.data``, NumPy and other
processes leave no trace).

What is kept hangs on the tie, in a `Memory`: it goes with the tie, is in no state dict, and
copies and pickles start with an empty one (S1). While somebody compiles, exports, traces or
transforms (S7, S33), and for tensors put in by ``functional_call``, weights are computed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ContextDecorator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from tiedparam.laws.rule import Rule
from tiedparam.state import optimizer_guard as _optimizer_guard
from tiedparam.tie.interposed import is_bare
from tiedparam.tie.lookup import is_stacked, is_tied, named_ties, ties_of
from tiedparam.tie.offloaded import can_be_loaded
from tiedparam.util.bits import same_bits
from tiedparam.util.errors import TieError
from tiedparam.util.sharded import is_sharded
from tiedparam.util.torch_private import (
    effective,
    has_values,
    parametrization_list,
    parametrization_lists,
)

_lock = threading.RLock()
_sessions: list[_Session] = []  # what is frozen now, in all threads


class Memory:
    """What is kept of one tied weight. Belongs to one tie; copies start empty.

    Attributes:
        checked: whether ``cache=True`` was asked for.
        kept: free values and the weight computed from them, always replaced together, so
            that no thread can see the one without the other.
        frozen: the weight that a `frozen` block holds.
    """

    __slots__ = ("checked", "frozen", "kept")

    def __init__(self, checked: bool) -> None:
        self.checked = checked
        self.kept: tuple[tuple[Any, ...], Tensor] | None = None
        self.frozen: _Frozen | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        return Memory(self.checked)

    def __reduce__(self) -> Any:
        return Memory, (self.checked,)


def memory_for(rule: Rule, cache: bool) -> Memory:
    """What a fresh tie keeps of its weight; a rule that gains nothing ignores ``cache``."""
    return Memory(cache and rule.gains_from_cache)


def recall(layer: nn.Module, tensor_name: str, *, own_forward: bool) -> Tensor | None:
    """The kept weight if it may be used now; None if the weight must be computed.

    Args:
        layer: a tied layer.
        tensor_name: which tensor.
        own_forward: whether the layer itself reads, in its forward. A cached weight is
            handed to nobody else, since a write that torch does not see would stay in it.

    Raises:
        TieError: if the weight is frozen and gradients for it are being recorded.
    """
    values = layer._modules["parametrizations"]._modules[tensor_name]  # type: ignore[union-attr]
    memory = _memory(values)
    if memory is None or not (memory.checked or memory.frozen is not None):
        return None
    frozen = memory.frozen
    if frozen is not None:
        if frozen.layer is not layer or not frozen.holds():
            return None  # a shallow clone's, or functional_call has put other tensors in
        frozen.refuse_gradients()
        return frozen.weight if frozen.is_bare() else None  # a hook came later
    if layer.training or torch.is_grad_enabled():
        memory.kept = None
        return None
    if forward_ad._current_level >= 0:
        return None  # tangents are no part of a value's bits
    if not own_forward or is_stacked(layer, tensor_name):
        return None
    if not is_bare(values, values._modules["0"]):  # type: ignore[arg-type, union-attr]
        return None  # a hook may change the weight at every call
    return _checked(memory, parametrization_list(layer, tensor_name))


def _memory(values: nn.Module | None) -> Memory | None:
    # by the table: this runs at every call
    return values.__dict__.get("kept")


# The checked cache ------------------------------------------------------------------------


def _checked(memory: Memory, values: parametrize.ParametrizationList) -> Tensor | None:
    rule = values[0]
    present = (*values._parameters.values(), *rule.parameters(), *rule.buffers())
    if any(type(t) is not nn.Parameter and type(t) is not Tensor for t in present):
        return None  # sharded or fake tensors, whose values cannot be compared
    first = present[0]
    if first is None or not has_values(first):
        return None
    autocast = torch.is_autocast_enabled(first.device.type)
    precision = torch.get_autocast_dtype(first.device.type) if autocast else None
    by = (precision, type(rule).forward)
    kept = memory.kept
    if kept is not None:
        (snapshot, by_then), weight = kept
        if by == by_then and _all_the_same(snapshot, present):
            return weight
    with torch.inference_mode(False), torch.no_grad():
        # computed from the snapshot, not from values that another thread may be writing
        snapshot = tuple(t.detach().clone() for t in present if t is not None)
        weight = rule(*snapshot[: len(values._parameters)])
    memory.kept = ((snapshot, by), weight)
    return weight  # type: ignore[no-any-return]


def _all_the_same(kept: tuple[Tensor, ...], present: tuple[Tensor | None, ...]) -> bool:
    return len(kept) == len(present) and all(
        now is not None and same_bits(then, now) for then, now in zip(kept, present, strict=True)
    )


# frozen -----------------------------------------------------------------------------------


class frozen(ContextDecorator):  # noqa: N801 — used like a function, as torch.no_grad is
    """A block in which every tied weight of a model is computed once, for inference.

    Weights that hooks or patches stand before are computed at every call all the same.

    Inside, layers run at the speed of plain dense ones, or of their structured form where that
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

    Example::

        model.eval()
        with tiedparam.frozen(model), torch.inference_mode():
            for images in loader:
                model(images)
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
            raise TieError(
                f"{', '.join(changed)} changed inside frozen, in a way that torch does not "
                "show. Outputs that were computed inside may come from the old values. Write "
                "weights outside of the block."
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
        raise TieError(
            f"{action} inside frozen: {names} would keep an old weight. Do it outside of the block."
        )


def refuse_training_forward(layer: nn.Module) -> None:
    """Raise if a frozen layer runs in training mode or while its gradients are recorded."""
    if not _sessions:
        return
    for values in layer._modules["parametrizations"]._modules.values():  # type: ignore[union-attr]
        memory = _memory(values)
        held = memory.frozen if memory is not None else None
        if held is None or not held.holds():
            continue
        if layer.training:
            raise TieError(
                f"{held.where} is frozen, and its layer is in training mode. Call model.eval(), "
                "or train outside of the block."
            )
        held.refuse_gradients()


class _Frozen:
    """One weight, computed once for all blocks that hold it."""

    def __init__(self, layer: nn.Module, tensor_name: str, where: str) -> None:
        self.where = where
        self.holders = 0
        self.layer, self.tensor_name = layer, tensor_name
        self.origins = list(_origins(layer, tensor_name))
        self.lists = _lists(layer, tensor_name)
        for _, _, tensor in self.origins:
            if is_sharded(tensor):
                raise TieError(
                    f"cannot freeze {where}: it is sharded. Freeze the model before fully_shard."
                )
        self.weight = self._compute()
        self.hooks: list[Any] = []

    def _compute(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            weight = effective(self.layer, self.tensor_name).detach()
        plan = parametrization_list(self.layer, self.tensor_name).__dict__.get("computing")
        if plan is not None and plan.form != "dense":
            return weight  # an expanded view: nobody reads it where the structured form runs
        return weight.contiguous()

    def holds(self) -> bool:
        """Whether the layer still has the tensors that the weight was computed from."""
        for table, name, tensor in self.origins:  # noqa: SIM110 — at every call, and faster
            if table.get(name) is not tensor:
                return False
        return True

    def is_bare(self) -> bool:
        """Whether computing the weight anew would call nothing but rules."""
        for values, rule, compute in self.lists:
            if type(rule).forward is not compute or not is_bare(values, rule):
                return False
        return True

    def refuse_gradients(self) -> None:
        """Raise if a read of the weight would have to carry gradients."""
        if not torch.is_grad_enabled():
            return
        if any(tensor.requires_grad for _, _, tensor in self.origins):
            raise TieError(
                f"{self.where} is frozen and carries no gradients. Run inference under "
                "torch.no_grad() or torch.inference_mode(), and train outside of the block."
            )

    def guard(self) -> None:
        """Make backward passes and optimizer steps raise."""
        leaves = [t for _, _, t in self.origins if t.requires_grad and t.is_leaf]
        self.hooks = [t.register_hook(self._refuse_backward) for t in leaves]
        _optimizer_guard.forbid_steps(
            self, [t for _, _, t in self.origins],
            f"{self.where}, which is frozen.", "Step outside of the block.",
        )  # fmt: skip

    def release(self) -> None:
        """Take the guards off again."""
        for hook in self.hooks:
            hook.remove()
        _optimizer_guard.allow_steps(self)

    def changed(self) -> bool:
        """Whether the free values give another weight now."""
        if not is_tied(self.layer, self.tensor_name) or not self.holds():
            return True
        if not has_values(self.weight):
            return False
        try:
            now = self._compute()
        except Exception:  # its source was exchanged, say
            return True
        return not same_bits(self.weight, now)

    def _refuse_backward(self, gradient: Tensor) -> None:
        raise TieError(
            f"a backward pass reached {self.where}, which is frozen. Train outside of the block."
        )


def _origins(layer: nn.Module, tensor_name: str) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """The tensors that a weight is computed from, and where the modules hold them."""
    if not parametrize.is_parametrized(layer, tensor_name):
        table = layer._parameters if tensor_name in layer._parameters else layer._buffers
        tensor = table.get(tensor_name)
        if tensor is not None:
            yield table, tensor_name, tensor
        return
    for module in parametrization_list(layer, tensor_name).modules():
        for table in (module._parameters, module._buffers):
            yield from (
                (table, name, tensor) for name, tensor in table.items() if tensor is not None
            )
        if isinstance(module, Rule):
            for source, source_name in module.sources():
                yield from _origins(source, source_name)


def _lists(layer: nn.Module, tensor_name: str) -> list[tuple[nn.Module, nn.Module, Any]]:
    """The lists that compute a weight, with each module in them and its class's ``forward``."""
    if not parametrize.is_parametrized(layer, tensor_name):
        return []
    values = parametrization_list(layer, tensor_name)
    found: list[tuple[nn.Module, nn.Module, Any]] = []
    found += ((values, module, type(module).forward) for module in values)
    for module in values:
        if isinstance(module, Rule):
            for source, source_name in module.sources():
                found += _lists(source, source_name)
    return found


def _sources(rule: Rule) -> Iterator[nn.Module]:
    """The layers that a rule reads, and those that they read."""
    for source, source_name in rule.sources():
        yield source
        found = ties_of(source).get(source_name)
        if found is not None:
            yield from _sources(found)


class _Session:
    """One entered `frozen` block: the weights it holds, and how the model was before."""

    def __init__(self, model: nn.Module) -> None:
        # a copy's source may lie outside of the model: it must not change either
        sources = [module for _, _, _, rule in named_ties(model) for module in _sources(rule)]
        self.members = dict.fromkeys((*model.modules(), *sources))
        held: list[tuple[Memory, _Frozen]] = []
        seen: set[int] = set()
        for prefix, layer, name, rule in named_ties(model):
            memory = _memory(parametrization_list(layer, name))
            if id(memory) in seen or memory is None:  # given to torch directly: computed
                continue
            seen.add(id(memory))
            where = f"'{prefix}{name}'"
            if layer.training:
                raise TieError(
                    f"cannot freeze {where}: its layer is in training mode. Call model.eval()."
                )
            if not all(is_bare(values, part) for values, part, _ in _lists(layer, name)) or any(
                can_be_loaded(source) for source in _sources(rule)
            ):
                continue  # hooks may change the weight at every call, as offloading does
            held.append((memory, memory.frozen or _Frozen(layer, name, where)))
        # nothing was changed so far
        self.held = held
        for memory, weight in held:
            if weight.holders == 0:
                memory.frozen = weight
                weight.guard()
            weight.holders += 1
        self.modes = [(module, module.training) for module in self.members]
        self.data = [(p, p.data, p.grad, p.grad.data if p.grad is not None else None)
                     for p in dict.fromkeys(p for m in self.members for p in m.parameters())
                     ]  # fmt: skip
        self.buffers = [(module, dict(module._buffers)) for module in self.members]
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
            module._buffers.update(buffers)

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


def _refuse_loading(module: nn.Module, *rest: Any) -> None:
    """A load hook of a frozen model; copies of the model that carry it are not frozen."""
    refuse_if_frozen(module, "loading")
