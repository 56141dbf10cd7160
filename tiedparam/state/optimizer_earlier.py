"""An optimizer's averages of free values that were saved in an earlier order.

``optimizer.load_state_dict`` takes them as they are. They are told as free values are, by their
shape, and are brought into today's order before anything uses them: a step, or a move. Where a free
value now stands for minus what it did, an average of gradients changes its sign, and one of their
squares does not.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from tiedparam.laws.earlier import renewed
from tiedparam.state.optimizer_laws import MAGNITUDES, kind_of_state
from tiedparam.tie.lookup import find_tie
from tiedparam.tie.marks import FREE
from tiedparam.tie.owner import owner


def renew_state(optimizer: Optimizer) -> None:
    """Bring what the optimizer holds of free values of an earlier layout into today's order."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if hasattr(parameter, FREE):
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor) and value.dim() > 0:
                        new = _renewed(parameter, value)
                        if new is not value and _is_magnitude(optimizer, key, value):
                            new = new.abs()
                        optimizer.state[parameter][key] = new


def _is_magnitude(optimizer: Optimizer, key: str, value: Tensor) -> bool:
    """Whether an average has no sign; of an unknown optimizer the numbers tell."""
    kind = kind_of_state(optimizer, key)
    return bool((value >= 0).all()) if kind is None else kind in MAGNITUDES


def _renewed(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """What stands for the free value, in its shape if it has that of an earlier layout."""
    found = owner(parameter) if value.shape != parameter.shape else None
    tie = find_tie(found.layer, found.tensor_name) if found is not None else None
    if tie is None:
        return value
    free = [value if own is parameter else own for own in tie.free]
    order = renewed(tie.rule, free) or ()
    for own, new in zip(tie.free, order, strict=False):
        if own is parameter and new.shape == own.shape:
            return new
    return value
