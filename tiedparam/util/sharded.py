"""Tensors that are spread over ranks: seen, gathered, cut and written (S35).

``fully_shard`` and ``parallelize_module`` spread them. A sharded tensor is a DTensor: every rank
holds its part. Reading it whole and writing it are collective: every rank must do so, in the same
order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
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


# Tensor parallelism: each rank computes with its own part -------------------------------------


def cut_of(placements: Sequence[Any]) -> tuple[int, int] | None:
    """The axis of the mesh, and of the tensor, along which it is cut; None if it is whole.

    Raises:
        ValueError: if it is cut along several axes.
    """
    cuts = [(number, p.dim) for number, p in enumerate(placements) if p.is_shard()]
    if len(cuts) > 1:
        raise ValueError(f"{tuple(placements)} cuts a tensor more than once")
    return cuts[0] if cuts else None


def cut(tensor: Tensor, mesh: Any, over: int | None, axis: int | None) -> Tensor:
    """Spread a whole tensor, which all ranks hold, over a mesh.

    Args:
        tensor: that tensor; the first rank's counts.
        mesh: the mesh of ranks.
        over: the axis of the mesh that shares a tensor that is cut.
        axis: along which axis of the tensor; None for all of it on every rank.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    cuts = [Replicate() if axis is None or n != over else Shard(axis) for n in range(mesh.ndim)]
    return distribute_tensor(tensor, mesh, cuts)


def own_part(tensor: Any, over: int | None) -> Tensor:
    """What this rank holds of a sharded tensor, an ordinary one.

    Args:
        tensor: the sharded one.
        over: the axis of the mesh whose ranks compute parts of the result. Where all of them hold
            the whole tensor, each has only a part of its gradient, which are added up.
    """
    from torch.distributed.tensor import Partial

    held = gradients = list(tensor.placements)
    if over is not None and held[over].is_replicate():
        gradients = [Partial() if number == over else p for number, p in enumerate(held)]
        tensor = tensor.redistribute(placements=held)  # whose gradient adds up what arrives
    own: Tensor = tensor.to_local(grad_placements=gradients)
    return own


def joined(part: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    """The sharded tensor of which every rank has computed its part."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, mesh, placements, run_check=False)
