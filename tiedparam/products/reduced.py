"""The smaller layer that is left where inputs share, or outputs are equal.

Convolution and matrix product are linear, so where the columns of a weight repeat the inputs can be
summed first, and where rows repeat one output can be computed and spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiedparam.products.one_filter import gains, one_filter
from tiedparam.products.windows import Geometry, convolve, outputs_of, pays, summed_channels
from tiedparam.util.torch_modes import CAST_BY_AUTOCAST, autocast_dtype, is_traced, is_transformed
from tiedparam.util.torch_private import padding_of, reshaped_in_place

Operation = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""The stock operation: input, weight and bias to output."""


def linear_by_sums(
    x: Tensor, weight: Tensor, bias: Tensor | None, summed: bool, run: int
) -> Tensor:
    """A Linear layer with equal columns, if ``summed``, and rows that are equal ``run`` by run.

    Args:
        x: ``(*, inputs)``.
        weight: of the smaller layer, ``(outputs / run, 1 or inputs)``.
        bias: ``(outputs,)`` or None.
        summed: whether the inputs are summed first.
        run: how many outputs are equal.
    """

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if summed:
            x = x.sum(-1, keepdim=True)
        if run == 1:
            return F.linear(x, weight, bias)
        # one row is a matrix-vector product, which the general product does not notice
        one = weight.shape[0] == 1
        y = (x @ weight.squeeze(0)).unsqueeze(-1) if one else F.linear(x, weight)
        return _spread(y, run, bias, 0)

    return _without_overflow(compute, summed, x, weight, bias)


def convolution_by_sums(
    operation: Operation,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    summed: bool,
    run: int,
    groups: int,
) -> Tensor:
    """The same of a convolution or a transposed one, which ``operation`` computes.

    Args:
        operation: the stock operation, with the layer's geometry.
        x: with or without an axis of samples.
        weight: of the smaller layer, as the operation takes it.
        bias: ``(outputs,)`` or None.
        summed: whether the inputs of each group are summed first.
        run: how many consecutive outputs are equal.
        groups: of the layer.
    """
    axes = weight.dim() - 2

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = operation(
            _sum_inputs(x, groups, axes) if summed else x, weight, bias if run == 1 else None
        )
        return _formatted(y if run == 1 else _spread(y, run, bias, axes), x)

    return _without_overflow(compute, summed, x, weight, bias)


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


def _sum_inputs(x: Tensor, groups: int, axes: int) -> Tensor:
    """The sum over the input channels of each group: ``(…, groups, *positions)``."""
    if groups == 1:
        return x.sum(-axes - 1, keepdim=True)
    split = (groups, x.shape[-axes - 1] // groups)
    return torch.unflatten(x, -axes - 1, split).sum(-axes - 1)


def _spread(y: Tensor, run: int, bias: Tensor | None, axes: int) -> Tensor:
    """Repeat every output ``run`` times, in memory of its own, and add the bias."""
    channel = -axes - 1
    outputs = y.shape[channel]
    if outputs == 1 and bias is not None:
        bias = bias if bias.dtype == y.dtype else bias.to(y.dtype)
        return y + (bias.reshape(-1, *(1,) * axes) if axes else bias)
    if bias is None:
        spread = y.unsqueeze(channel).repeat_interleave(run, channel)
    else:
        spread = y.unsqueeze(channel) + bias.to(y.dtype).reshape(outputs, run, *(1,) * axes)
    if is_traced():  # which would write the sizes down as constants
        return spread.flatten(channel - 1, channel)
    # no view for autograd, as stock layers return none: under fully_shard the hook on an output
    # that is a view would not survive an in-place ReLU
    shape = (*y.shape[:channel], outputs * run, *y.shape[y.dim() - axes :])
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
    run: Operation,
    summed: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """float16 sums can overflow where the dense layer does not: compute them in float32."""
    if not summed:
        return run(x, weight, bias)
    # autocast leaves float64 as it is
    precision = autocast_dtype(x.device.type) if x.dtype in CAST_BY_AUTOCAST else None
    if (precision or x.dtype) is not torch.float16:
        return run(x, weight, bias)
    wide = x.float(), weight.float(), None if bias is None else bias.float()
    if precision is None:
        return run(*wide).half()
    with torch.autocast(x.device.type, enabled=False):
        return run(*wide).half()
