"""Tensors that ``fully_shard`` has spread over ranks: seen, gathered and written (S35).

A sharded tensor is a DTensor: every rank holds its part. Reading it whole and writing it are
collective: every rank must do so, in the same order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether this is a DTensor; tells without importing what is not in use."""
    kind = type(tensor)  # a missing attribute would cost most of the time
    return kind is not nn.Parameter and kind is not Tensor and hasattr(tensor, "device_mesh")


_within = threading.local()
""".computed: whether this thread is inside of `computed`, where all tensors are ordinary ones."""


def gathered(tensor: Any) -> Any:
    """A sharded tensor with all of its values on every rank, still a DTensor; others as is.

    What a law reads while it is `computed` is an ordinary tensor, as its free values are.
    """
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    everywhere = tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)
    return everywhere.to_local() if getattr(_within, "computed", False) else everywhere


def computed(compute: Callable[..., Tensor], values: Iterable[Any]) -> Tensor:
    """What ``compute`` makes of the gathered values, as a DTensor where one of them is one.

    It works on ordinary tensors, so that no law has to know what DTensor can do.
    """
    gathered_values = [gathered(value) for value in values]
    sharded = next((value for value in gathered_values if is_sharded(value)), None)
    if sharded is None:
        return compute(*gathered_values)
    from torch.distributed.tensor import DTensor

    _within.computed = True
    try:
        result = compute(*(v.to_local() if is_sharded(v) else v for v in gathered_values))
    finally:
        _within.computed = False
    return DTensor.from_local(result, sharded.device_mesh, sharded.placements, run_check=False)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor as an ordinary one; any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    gathered: Tensor = sharded.full_tensor()
    return gathered


def write(parameter: Tensor, value: Tensor) -> None:
    """Copy ``value``, a whole tensor, into a parameter that may be sharded.

    Of a sharded parameter every rank receives its part of the first rank's value, so that
    ranks that drew different random numbers agree.
    """
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        value = value.to(parameter.device, parameter.dtype)
        value = distribute_tensor(value, sharded.device_mesh, sharded.placements)
    parameter.copy_(value)
