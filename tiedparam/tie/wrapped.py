"""Models that DDP, FSDP or ``parallelize_module`` has taken over: tying or untying comes too late.

They look at the parameters once, when they wrap a model. A parameter that a tie makes later
is unknown to them: its gradient is not averaged, and the ranks drift apart (S34, S35). And a copy
whose source is sharded on its own would meet one part of it (S31), or keep its gradients from
it (S53).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from tiedparam.laws.rule import Rule
from tiedparam.tie.whereabouts import Whereabouts
from tiedparam.util.errors import Reason, TieError
from tiedparam.util.sharded import is_sharded
from tiedparam.util.torch_private import has_kept_accumulator, is_managed_by_fsdp


def why_wrapped(
    layer: nn.Module, parameters: Iterable[Tensor], verb: str, wrappers: Iterable[nn.Module] = ()
) -> Reason | None:
    """Why a layer cannot be tied or untied because a wrapper holds it, or None.

    Args:
        layer: the layer, whose ``parameters`` are about to be exchanged.
        parameters: what its tensor is stored in.
        verb: "tie" or "untie".
        wrappers: those in the model, where it is known.

    Returns:
        A reason if the layer is part of a live DDP model (S34) or was sharded (S35).
    """
    parameters = list(parameters)
    wrapper: nn.Module | None = None
    if not any(is_sharded(parameter) for parameter in parameters):
        wrapper = _wrapper_of(layer, parameters, wrappers)
        if wrapper is None:
            return None
    verb = verb.capitalize()
    if isinstance(wrapper, _fsdp1()):
        return Reason(
            "a FullyShardedDataParallel has put its values into a flat parameter already.",
            f"{verb} before wrapping.",
        )
    if isinstance(wrapper, DistributedDataParallel):
        return Reason(
            f"it is wrapped in a {type(wrapper).__name__} already, which would not average the "
            "gradients of the new parameters.",
            f"{verb} before wrapping: drop the wrapper, {verb.lower()} its .module, and wrap that "
            "again.",
        )
    engine = "fully_shard" if is_managed_by_fsdp(layer) else "fully_shard or parallelize_module"
    return Reason("it is sharded already.", f"{verb} before {engine}.")


def refuse_other_unit(
    rule: Rule, values: nn.Module | None, source: nn.Module, place: Whereabouts
) -> None:
    """Raise for a tie that lies outside of the FSDP1 unit of its source (S53).

    While the copy computes, that unit may be sharded, and it has finished the source's gradient
    before the copy's is there.
    """
    root = place.common_root
    # units within the smallest module that holds both are enough, where that is known
    for unit in root.modules() if root is not None else _live(_with_subclasses(_fsdp1())):
        inside = list(unit.modules()) if isinstance(unit, _fsdp1()) else []
        if any(m is source for m in inside) and not any(m is values for m in inside):
            named = f" '{place.shown}'" if root is not None else ""
            shares = isinstance(source, parametrize.ParametrizationList)
            kind = "a tied tensor" if shares else f"a {type(source).__name__}"
            raise TieError(
                f"'{rule}' cannot be computed",
                f"its source{named}, {kind}, belongs to a "
                "FullyShardedDataParallel unit that does not hold the copy, and would miss its "
                "gradients.",
                "Put both into one unit: wrap a module that holds both, and neither of them alone.",
            )


def has_fsdp1(model: nn.Module) -> bool:
    """Whether FSDP1 keeps values of the model in flat parameters."""
    return any(isinstance(module, _fsdp1()) for module in model.modules())


# Finding the wrapper ---------------------------------------------------------------------


def _wrapper_of(
    layer: nn.Module, parameters: list[Tensor], wrappers: Iterable[nn.Module]
) -> nn.Module | None:
    """The DDP or FSDP module that holds ``layer``, if any: a layer does not know it."""
    found = [*([layer] if is_wrapper(layer) else []), *wrappers]
    managed = is_managed_by_fsdp(layer)  # also where the process group is gone
    if managed or (distributed.is_available() and distributed.is_initialized()):
        # parts of a flat parameter are views that autograd has no use for
        found += _live_wrappers([] if managed else [*parameters, *layer.parameters()])
    for wrapper in found:
        if any(module is layer for module in wrapper.modules()):
            return wrapper
    return None


def is_wrapper(module: nn.Module) -> bool:
    """Whether it is a DDP or FSDP module."""
    return isinstance(module, _wrapper_classes())


def _wrapper_classes() -> tuple[type[nn.Module], ...]:
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing is sharded
    return (DistributedDataParallel, *([fsdp.FSDPModule] if fsdp is not None else []), *_fsdp1())


def _fsdp1() -> tuple[type[nn.Module], ...]:
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return (fsdp.FullyShardedDataParallel,) if fsdp is not None else ()


def _live_wrappers(parameters: list[Tensor]) -> list[nn.Module]:
    """All wrapped models of this process, or none where none can hold these.

    Looking at every live object takes a tenth of a second, which tying hundreds of layers
    before wrapping should not cost.

    Args:
        parameters: of a layer that FSDP has not marked as its own; empty if it has.
    """
    ddp, *fsdp = _wrapper_classes()
    if not parameters:
        return _live(_with_subclasses([ddp, *fsdp]))
    may_be = any(_may_be_in_ddp(parameter) for parameter in parameters)
    return _live(_with_subclasses([ddp])) if may_be else []


def _live(classes: Sequence[type]) -> list[nn.Module]:
    """All living objects of these very classes, which Python's collector finds by their class."""
    if not classes:
        return []
    return [o for o in gc.get_referrers(*classes) if issubclass(type(o), tuple(classes))]


def _with_subclasses(kinds: Iterable[type]) -> list[type]:
    return [each for kind in kinds for each in (kind, *_with_subclasses(kind.__subclasses__()))]


def _may_be_in_ddp(parameter: Tensor) -> bool:
    """Whether the parameter's gradient accumulator is kept alive, as DDP's reducer does."""
    if not parameter.requires_grad:
        return True  # has none, so nothing can be told
    with torch.inference_mode(False), torch.enable_grad():
        return has_kept_accumulator(parameter)
