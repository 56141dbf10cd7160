"""Sources whose tensors are not of the size or kind any more that they had when they were tied."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from tiedparam.util.errors import Reason

Shapes = tuple[tuple[int, ...], ...]


def shapes_of(tensors: Iterable[Tensor]) -> Shapes:
    """Their shapes."""
    return tuple(tuple(tensor.shape) for tensor in tensors)


def is_misread(
    read: Sequence[Tensor], before: Shapes, tied: tuple[int, ...], has_values: bool
) -> bool:
    """Whether a law has computed a tensor of the tied shape by chance, from another source.

    A source that had the tied shape itself is combined with it entry by entry. Of another size it
    is repeated by broadcasting, or reshaped where the law has values of its own.

    Args:
        read: the tensors of the sources.
        before: their shapes when they were tied.
        tied: the shape of the tied tensor.
        has_values: whether the law has values of its own.
    """
    for tensor, shape in zip(read, before, strict=True):  # plainly: this runs at every call
        if (
            tensor.shape != shape
            and shape == tied
            and (has_values or _stretches(tensor.shape, shape))
        ):
            return True
    return False


def _stretches(shape: Sequence[int], goal: Sequence[int]) -> bool:
    ends = zip(reversed(shape), reversed(goal), strict=False)
    return len(shape) <= len(goal) and all(size in (1, wanted) for size, wanted in ends)


def is_real_or_complex(tensor: Tensor) -> bool:
    """Whether it can be computed with as it is; integers are for the law to convert."""
    return tensor.is_floating_point() or tensor.is_complex()


def why_unlike(read: Sequence[Tensor], free: Sequence[Tensor]) -> Reason | None:
    """Why sources cannot be computed with beside a layer's own values, or None: cast, or moved."""
    for source in filter(is_real_or_complex, read):
        for value in free:
            if source.dtype != value.dtype:
                return Reason(
                    f"it is {source.dtype} now, and the tied layer's own values are {value.dtype}.",
                    "Convert both, as model.to(dtype) does for all layers; remove_tie leaves the "
                    "layer in its own.",
                )
            if source.device != value.device:
                return Reason(
                    f"it is on {source.device} now, and the tied layer's own values are on "
                    f"{value.device}.",
                    "Move both, as model.to(device) does for all layers; remove_tie leaves the "
                    "layer on its own.",
                )
    return None


def fitted_sources(read: Sequence[Tensor], before: Shapes, free: Sequence[Tensor]) -> list[Tensor]:
    """The sources in their shapes of before, and of the kind of a layer's own values.

    What a source has no entry for is zero.
    """
    fitted = []
    for tensor, shape in zip(read, before, strict=True):
        if tensor.shape != shape and tensor.dim() == len(shape):
            common = tuple(slice(min(pair)) for pair in zip(tensor.shape, shape, strict=True))
            whole = tensor.new_zeros(shape)
            whole[common] = tensor[common]
            tensor = whole
        fitted.append(tensor.to(free[0]) if free and is_real_or_complex(tensor) else tensor)
    return fitted
