"""What may stand between a layer and its tied weight, where a shortcut would not see it.

A cheap form reads the free values where the modules keep them, and a kept weight is not
computed at all. Both skip calls that the ordinary path makes, of the list of parametrizations
and of the rule, and methods of the layer that somebody may have replaced. They may only be
taken where those calls would do nothing else: no hook on them (S39), no replaced method on the
instance or the class (S40), and values that are there. Tools that load weights as a module is
called (accelerate's offloading) keep them on the meta device until then, where torch computes
with them without an error (S38).

The questions run at every call, so they go by the tables of the modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tiedparam.laws.rule import Rule
from tiedparam.util.errors import TieError, describe
from tiedparam.util.parametrized import parametrization_list
from tiedparam.util.torch_private import (
    has_hooks_on_all_modules,
    hooks_on_all_modules,
    is_watched,
    submodules_of,
)


def is_bare(values: nn.Module, rule: nn.Module) -> bool:
    """Whether calling a list of parametrizations gives what its rule computes, and no more."""
    if is_watched(values) or is_watched(rule):
        return False
    if submodules_of(rule) and any(map(is_watched, rule.modules())):
        return False
    return not has_hooks_on_all_modules() or all(
        getattr(hook, "__module__", "") in _OBSERVERS for hook in hooks_on_all_modules()
    )


_OBSERVERS = ("torch.utils.module_tracker", "torch.distributed._tools.mod_tracker")
"""The modules whose hooks on all modules only note which layer is running.

`torch.utils.flop_counter.FlopCounterMode` has such trackers, and is to count what really runs.
"""


@dataclass(frozen=True)
class TorchsOwn:
    """The methods by which torch computes a kind of layer, as they are without a patch.

    Attributes:
        forward: the kind's ``forward``.
        parts: the methods that it calls, by name.
    """

    forward: Any
    parts: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, kind: type[nn.Module], *parts: str) -> TorchsOwn:
        """The methods of a kind of layer, as they are now.

        A method that is patched already counts as none: layers then compute as they do with it.
        """

        def own(name: str) -> Any:
            method = getattr(kind, name)
            written_in = getattr(method, "__globals__", {}).get("__name__")
            return method if written_in == kind.__module__ else None

        return cls(own("forward"), tuple((name, own(name)) for name in parts))

    def computes(self, stock: type[nn.Module]) -> bool:
        """Whether layers of this class compute by these very methods."""
        if stock.forward is not self.forward:
            return False
        for name, method in self.parts:  # noqa: SIM110 — at every call, and faster
            if getattr(stock, name) is not method:
                return False
        return True

    def computes_layer(self, layer: nn.Module, stock: type[nn.Module]) -> bool:
        """Whether this tied layer of a stock class computes by these very methods.

        A part may have been replaced on the layer, on the class that tied layers have, or on one
        that was derived from it. (A ``forward`` there is called instead of the tied one.)
        """
        return stock.forward is self.forward and not self.hands_on(layer)

    def hands_on(self, layer: nn.Module) -> bool:
        """Whether torch's ``forward`` would call another method than torch's for this layer."""
        kind, own = type(layer), layer.__dict__
        for name, method in self.parts:  # noqa: SIM110
            if name in own or getattr(kind, name) is not method:
                return True
        return False


def refuse_absent(layer: nn.Module, tensor_name: str, others: Iterable[Any]) -> None:
    """Raise if a tied tensor on the meta device is about to meet real numbers.

    Args:
        layer: the layer whose tensor is on the meta device.
        tensor_name: which tensor.
        others: what it is computed with: arguments of a forward, or the reader's variables.

    Raises:
        TieError: if a tensor among them is not on the meta device.
    """
    if all(tensor.is_meta for tensor in _tensors(others)):
        return  # shapes are being worked out
    fact = "has no values yet: it is on the meta device, and its input is not"
    remedy = "Load them first: to_empty, then load_state_dict."
    rule = parametrization_list(layer, tensor_name)[0]
    for source, name in rule.sources() if isinstance(rule, Rule) else ():
        fact = f"is computed from {describe(source, name)}, whose values are on the meta device"
        remedy = (
            "Load them first. Where a tool loads the values of a layer as that layer is called "
            "(accelerate's offloading does), keep the source out of it, or call remove_tie before."
        )
    where = f"the tied {describe(layer, tensor_name)}"
    raise TieError(where, f"{where} {fact}.", remedy)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())
