"""The smaller layer that is left where inputs share, or outputs are equal.

Convolution and matrix product are linear, so where the columns of a weight repeat the inputs can be
summed first, and where rows repeat one output can be computed and spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiedparam.products.one_filter import gains, one_filter
from tiedparam.products.summed_rows import are_many, summed_product
from tiedparam.products.windows import Geometry, convolve, outputs_of, pays, summed_channels
from tiedparam.util.torch_modes import CAST_BY_AUTOCAST, autocast_dtype, is_traced, is_transformed
from tiedparam.util.torch_private import padding_of, reshaped_in_place

Operation = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""The stock operation: input, weight and bias to output."""


@dataclass(frozen=True)
class Parts:
    """An axis in parts, along some of which everything is equal.

    Attributes:
        sizes: of the parts; the product is the size of the axis.
        shared: along which parts.
        whole: the size of the axis.
        kept: the sizes with 1 where everything is equal.
        copies: how many stand for one.

    As in:
        >>> from tiedparam.products.reduced import Parts
        >>> heads = Parts((4, 2, 64), shared=(1,))  # pairs of equal heads
        >>> heads.kept, heads.copies
        ((4, 1, 64), 2)
    """

    sizes: tuple[int, ...]
    shared: tuple[int, ...] = ()
    whole: int = field(init=False, repr=False, compare=False)
    kept: tuple[int, ...] = field(init=False, repr=False, compare=False)
    copies: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # once, and not at every call, which torch.compile would have to read
        kept = tuple(1 if part in self.shared else n for part, n in enumerate(self.sizes))
        object.__setattr__(self, "kept", kept)
        object.__setattr__(self, "whole", math.prod(self.sizes))
        object.__setattr__(self, "copies", self.whole // math.prod(kept))


def linear_by_sums(
    x: Tensor, weight: Tensor, bias: Tensor | None, inputs: Parts, outputs: Parts
) -> Tensor:
    """A Linear layer with equal columns or equal rows.

    Args:
        x: ``(*, inputs)``.
        weight: of the smaller layer.
        bias: ``(outputs,)`` or None.
        inputs: along which parts inputs are summed first.
        outputs: along which parts outputs are equal.
    """
    return _without_overflow(_linear, inputs.copies > 1, x, weight, bias, inputs, outputs)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, inputs: Parts, outputs: Parts
) -> Tensor:
    if are_many(x, weight, inputs.whole, outputs.whole):
        sizes = inputs.sizes, inputs.kept, outputs.sizes, outputs.kept
        return summed_product(x, weight, bias, *map(list, sizes))
    x = _sum_inputs(x, inputs, 0)
    if outputs.copies == 1:
        return F.linear(x, weight, bias)
    # one row is a matrix-vector product, which the general product does not notice
    one = weight.shape[0] == 1
    y = (x @ weight.squeeze(0)).unsqueeze(-1) if one else F.linear(x, weight)
    return _spread(y, outputs, bias, 0)


def convolution_by_sums(
    operation: Operation,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inputs: Parts,
    outputs: Parts,
) -> Tensor:
    """The same of a convolution or a transposed one, which ``operation`` computes.

    Args:
        operation: the stock operation, with the layer's geometry.
        x: with or without an axis of samples.
        weight: of the smaller layer, as the operation takes it.
        bias: ``(outputs,)`` or None.
        inputs: along which parts channels are summed first, those of each group by themselves.
        outputs: along which parts channels are equal; a group of the layer has them whole.
    """
    return _without_overflow(
        _convolution, inputs.copies > 1, x, weight, bias, operation, inputs, outputs
    )


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operation: Operation,
    inputs: Parts,
    outputs: Parts,
) -> Tensor:
    axes, equal = weight.dim() - 2, outputs.copies > 1
    y = operation(_sum_inputs(x, inputs, axes), weight, None if equal else bias)
    return _formatted(_spread(y, outputs, bias, axes) if equal else y, x)


def convolution_by_windows(
    layer: Any,
    x: Tensor,
    filters: Tensor,
    bias: Tensor | None,
    *,
    summed: bool,
    where_it_pays: bool,
) -> Tensor | None:
    """A convolution by the products of `tiedparam.products.windows`; None where they do not serve.

    Args:
        layer: the convolution, whose geometry counts.
        x: ``(n, channels, *sizes)``.
        filters: ``(m, 1, *kernel)``, the same for all groups.
        bias: or None.
        summed: whether the channels are summed first; otherwise each is convolved with all filters.
        where_it_pays: give None as well where torch's own convolution is faster.
    """
    kernel = filters.shape[2:]
    axes = len(kernel)
    if x.dim() != axes + 2 or 0 in x.shape or _is_channels_last(x):
        return None
    sizes, padding, around = tuple(x.shape[2:]), layer.padding, None
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        around = padding_of(layer)
        before, after = tuple(around[-2::-2]), tuple(around[::-2])
        if layer.padding_mode == "zeros" and before == after:
            padding, around = before, None
        else:  # padded here, by torch
            sizes = tuple(sum(three) for three in zip(sizes, before, after, strict=True))
            padding = (0,) * axes
    geometry = Geometry(tuple(kernel), layer.stride, padding, layer.dilation)
    outputs = outputs_of(geometry, sizes)
    if min(outputs) <= 0:
        return None  # smaller than the kernel: the stock layer says so
    m, positions = filters.shape[0], math.prod(kernel)
    grad = torch.is_grad_enabled() and (x.requires_grad or filters.requires_grad)
    groups = 1 if summed else x.shape[1]
    alone = m == 1 and not summed and max(geometry.stride) == 1
    if where_it_pays:
        entries = len(x) * groups * math.prod(outputs)
        if alone:
            faster = x.dtype is torch.float32 and gains(kernel, padding, entries, training=grad)
        else:
            faster = pays(len(x), groups, m, positions, outputs, grad=grad)
        if not faster:
            return None
    if summed:
        x = summed_channels(x)
    if around is not None:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, around, mode=mode)
    if alone:
        return one_filter(x, filters.reshape(kernel), bias, padding, geometry.dilation)
    return convolve(x, filters.reshape(m, positions), bias, geometry)


# The pieces ------------------------------------------------------------------------------


def _sum_inputs(x: Tensor, parts: Parts, axes: int) -> Tensor:
    """The sum over the parts that share, before ``axes`` spatial axes."""
    if parts.copies == 1:
        return x
    count = len(parts.sizes)
    if count == 1:
        return x.sum(-axes - 1, keepdim=True)
    first = -axes - count
    kept = count - len(parts.shared)
    over = [first + part for part in parts.shared]
    summed = torch.unflatten(x, -axes - 1, parts.sizes).sum(over)
    if kept == 0:
        return summed.unsqueeze(-axes - 1)
    return summed if kept == 1 else summed.flatten(-axes - kept, -axes - 1)


def _spread(y: Tensor, parts: Parts, bias: Tensor | None, axes: int) -> Tensor:
    """Repeat the outputs that are equal, in memory of their own, and add the bias."""
    channel = -axes - 1
    if y.shape[channel] == 1 and bias is not None:
        bias = bias if bias.dtype == y.dtype else bias.to(y.dtype)
        return y + (bias.reshape(-1, *(1,) * axes) if axes else bias)
    apart = torch.unflatten(y, channel, parts.kept)
    if bias is None:
        before, after = (-1,) * (y.dim() - axes - 1), (-1,) * axes
        spread = apart.expand(*before, *parts.sizes, *after).clone(
            memory_format=torch.contiguous_format
        )
    else:
        spread = apart + bias.to(y.dtype).reshape(*parts.sizes, *(1,) * axes)
    if is_traced():  # which would write the sizes down as constants
        return spread.flatten(-axes - len(parts.sizes), channel)
    # no view for autograd, as stock layers return none: under fully_shard the hook on an output
    # that is a view would not survive an in-place ReLU
    shape = (*y.shape[:channel], parts.whole, *y.shape[y.dim() - axes :])
    return reshaped_in_place(spread.contiguous(), shape)


def _is_channels_last(x: Tensor) -> bool:
    if is_transformed():
        return False  # vmap cannot say; the format is then nobody's promise
    if x.dim() == 4:
        return _strided_as(x, torch.channels_last)
    return x.dim() == 5 and _strided_as(x, torch.channels_last_3d)


def _strided_as(x: Tensor, memory_format: torch.memory_format) -> bool:
    return x.is_contiguous(memory_format=memory_format) and not x.is_contiguous()


def _formatted(y: Tensor, input: Tensor) -> Tensor:
    """The memory format that the dense layer gives its output."""
    if not _is_channels_last(input):
        return y.contiguous()
    last = torch.channels_last if input.dim() == 4 else torch.channels_last_3d
    return y.contiguous(memory_format=last)


def _without_overflow(
    run: Callable[..., Tensor],
    summed: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> Tensor:
    """float16 sums can overflow where the dense layer does not: compute them in float32."""
    if not summed:
        return run(x, weight, bias, *rest)
    precision = autocast_dtype(x.device)
    if precision is not None and x.dtype not in CAST_BY_AUTOCAST:
        precision = None  # autocast leaves float64 as it is
    if (precision or x.dtype) is not torch.float16:
        return run(x, weight, bias, *rest)
    wide = x.float(), weight.float(), None if bias is None else bias.float()
    if precision is None:
        return run(*wide, *rest).half()
    with torch.autocast(x.device.type, enabled=False):
        return run(*wide, *rest).half()
