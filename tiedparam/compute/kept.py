"""What is kept of one tied weight for inference, and when it may be used.

A `tiedparam.compute.frozen` block keeps a weight and refuses, until it ends, whatever would make
it stale. ``register_tie(..., cache=True)`` keeps the last weight of one layer and compares the free
values, bit for bit, before it is used again: no metadata tells whether a tensor was written (fused
optimizers, ``.data``, NumPy and other processes leave no trace).

What is kept hangs on the tie, in a `Memory`: it goes with the tie, is in no state dict, and
copies and pickles start with an empty one (S1). In compiled, exported, traced or transformed
code (S7, S33), and for tensors put in by ``functional_call``, weights are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.laws.rule import Rule
from tiedparam.state.optimizer_guard import allow_steps, forbid_steps
from tiedparam.tie.interposed import is_bare
from tiedparam.tie.lookup import find_tie
from tiedparam.tie.record import Tie
from tiedparam.util.bits import same_bits
from tiedparam.util.errors import TieError
from tiedparam.util.parametrized import parametrization_list
from tiedparam.util.sharded import is_sharded
from tiedparam.util.torch_modes import autocast_dtype, may_carry_tangents
from tiedparam.util.torch_private import (
    buffers_of,
    has_values,
    lists_in_tables,
    parameters_of,
    submodules_of,
)


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
        self.checked: bool = checked
        self.kept: tuple[tuple[Any, ...], Tensor] | None = None
        self.frozen: FrozenWeight | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Memory:
        return Memory(self.checked)

    def __reduce__(self) -> Any:
        return Memory, (self.checked,)


def memory_for(rule: Rule, cache: bool) -> Memory:
    """What a fresh tie keeps of its weight; a rule that gains nothing ignores ``cache``.

    So does one that reads other layers, whose numbers a check of the free values would not see.
    """
    return Memory(cache and not rule.reads_layers and rule.gains_from_cache)


def recall(layer: nn.Module, tensor_name: str, *, own_forward: bool) -> Tensor | None:
    """The kept weight if it may be used now; None if the weight must be computed.

    Args:
        layer: a tied layer.
        tensor_name: which tensor.
        own_forward: whether the layer itself reads, in its forward. A cached weight is
            handed to no other reader, since a write that torch does not see would stay in it.

    Raises:
        TieError: if the weight is frozen and gradients for it are being recorded.
    """
    values = lists_in_tables(layer)[tensor_name]
    memory: Memory | None = values.__dict__.get("kept")  # None: given to torch directly
    if memory is None:
        return None
    frozen = memory.frozen
    if frozen is not None:
        if frozen.tie.layer is not layer or not frozen.holds():
            return None  # a shallow clone's, or functional_call has put other tensors in
        frozen.refuse_gradients()
        return frozen.weight if frozen.is_bare() else None  # a hook came later
    if not memory.checked:
        return None
    if layer.training or torch.is_grad_enabled():
        memory.kept = None
        return None
    if not own_forward or may_carry_tangents():
        return None  # tangents are not part of a value's bits
    parametrizations: dict[str, Any] = submodules_of(values)
    if len(parametrizations) > 1 or not is_bare(values, parametrizations["0"]):
        return None  # what is stacked on the tie, or a hook, may change the weight at every call
    return _checked(memory, values, parametrizations["0"])


def is_frozen(values: nn.Module) -> bool:
    """Whether a `frozen` block may hold the weight."""
    memory: Memory | None = values.__dict__.get("kept")
    return memory is not None and memory.frozen is not None


def is_kept(values: nn.Module, layer: nn.Module) -> bool:
    """Whether a dense form would find the weight at hand."""
    memory: Memory | None = values.__dict__.get("kept")
    if memory is None:
        return False
    if memory.frozen is not None:
        return True
    return memory.checked and not layer.training and not torch.is_grad_enabled()


# The checked cache ------------------------------------------------------------------------


def _checked(memory: Memory, values: nn.Module, rule: Rule) -> Tensor | None:
    free = parameters_of(values).values()
    present = (*free, *_numbers_of(rule))
    if any(type(t) is not nn.Parameter and type(t) is not Tensor for t in present):
        return None  # sharded or fake tensors, whose values cannot be compared
    first = present[0]
    if first is None or not has_values(first):
        return None
    by = (autocast_dtype(first.device), type(rule).forward)
    kept = memory.kept
    if kept is not None:
        (snapshot, by_then), weight = kept
        if by == by_then and _all_the_same(snapshot, present):
            return weight
    with torch.inference_mode(False), torch.no_grad():
        # computed from the snapshot, not from values that another thread may be writing
        snapshot = tuple(t.detach().clone() for t in present if t is not None)
        weight = rule(*snapshot[: len(free)])
    memory.kept = ((snapshot, by), weight)
    return weight  # type: ignore[no-any-return]


def _numbers_of(rule: Rule) -> tuple[Tensor, ...]:
    """What a rule holds itself, besides its free values; most hold nothing, which is seen fast."""
    if submodules_of(rule) or parameters_of(rule) or buffers_of(rule):
        return (*rule.parameters(), *rule.buffers())
    return ()


def _all_the_same(kept: tuple[Tensor, ...], present: tuple[Tensor | None, ...]) -> bool:
    return len(kept) == len(present) and all(
        now is not None and same_bits(then, now) for then, now in zip(kept, present, strict=True)
    )


# The weight that a block holds --------------------------------------------------------------


class FrozenWeight:
    """One weight, computed once for all blocks that hold it.

    Attributes:
        where: the tensor, as messages name it.
        holders: how many blocks hold it.
        tie: whose weight it is.
        weight: the weight.
    """

    def __init__(self, tie: Tie, where: str) -> None:
        self.where = where
        self.holders = 0
        self.tie = tie
        self.origins: list[tuple[dict[str, Any], str, Tensor]] = list(
            tensors_behind(tie.layer, tie.tensor_name)
        )
        self.lists: list[tuple[nn.Module, nn.Module, Any]] = lists_behind(
            tie.layer, tie.tensor_name
        )
        for _, _, tensor in self.origins:
            if is_sharded(tensor):
                raise TieError(
                    f"cannot freeze {where}",
                    "it is sharded.",
                    "Freeze the model before fully_shard or parallelize_module.",
                )
        self.weight: Tensor = self._compute()
        self.hooks: list[Any] = []

    def _compute(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            weight = self.tie.weight().detach()
        computing = self.tie.computing
        if computing is not None and computing.order(
            self.tie.rule, None, False, True, computing.asked
        ):
            return weight  # perhaps an expanded view: forms do not read it
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
                self.where,
                f"{self.where} is frozen and carries no gradients.",
                "Run inference under torch.no_grad() or torch.inference_mode(), and train outside "
                "of the block.",
            )

    def guard(self) -> None:
        """Make backward passes and optimizer steps raise."""
        leaves = [t for _, _, t in self.origins if t.requires_grad and t.is_leaf]
        self.hooks = [t.register_hook(self._refuse_backward) for t in leaves]
        forbid_steps(
            self,
            [t for _, _, t in self.origins],
            f"{self.where}, which is frozen.",
            "Step outside of the block.",
        )

    def release(self) -> None:
        """Take the guards off again."""
        for hook in self.hooks:
            hook.remove()
        allow_steps(self)

    def changed(self) -> bool:
        """Whether the free values give another weight now."""
        if find_tie(self.tie.layer, self.tie.tensor_name) is None or not self.holds():
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
            self.where,
            f"a backward pass reached {self.where}, which is frozen.",
            "Train outside of the block.",
        )


# What a weight is computed from --------------------------------------------------------------


def tensors_behind(
    layer: nn.Module, tensor_name: str
) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """The tensors that a weight is computed from, and where the modules hold them."""
    if not parametrize.is_parametrized(layer, tensor_name):
        own: dict[str, Any] = parameters_of(layer)
        table = own if tensor_name in own else buffers_of(layer)
        tensor = table.get(tensor_name)
        if tensor is not None:
            yield table, tensor_name, tensor
        return
    for module in parametrization_list(layer, tensor_name).modules():
        for table in (parameters_of(module), buffers_of(module)):
            yield from (
                (table, name, tensor) for name, tensor in table.items() if tensor is not None
            )
        if isinstance(module, Rule):
            for source, source_name in module.sources():
                yield from tensors_behind(source, source_name)


def lists_behind(layer: nn.Module, tensor_name: str) -> list[tuple[nn.Module, nn.Module, Any]]:
    """The lists that compute a weight, with each module in them and its class's ``forward``."""
    if not parametrize.is_parametrized(layer, tensor_name):
        return []
    values = parametrization_list(layer, tensor_name)
    found: list[tuple[nn.Module, nn.Module, Any]] = []
    found += ((values, module, type(module).forward) for module in values)
    for module in values:
        if isinstance(module, Rule):
            for source, source_name in module.sources():
                found += lists_behind(source, source_name)
    return found


def sources_behind(rule: Rule) -> Iterator[nn.Module]:
    """The layers that a rule reads, and those that they read."""
    for source, source_name in rule.sources():
        yield source
        tie = find_tie(source, source_name)
        if tie is not None:
            yield from sources_behind(tie.rule)
