"""The forwards of tied layers in their cheaper forms; `tiedparam.compute.forms` says which.

The host's forward asks here first; every other reader of the weight (attention, ``norm``, a
stacked parametrization, a subclass with a forward of its own) sees the ordinary expanded tensor,
and the dense form is the fallback. The forms are plain differentiable operations, so compile,
export, ``vmap``, ``jvp`` and double backward need nothing special.

They run only where nothing stands between the layer and its weight, and for inputs that the dense
layer takes: see `tiedparam.tie.interposed`. Everywhere else the layer computes densely, by torch's
own path.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiedparam.compute.forms import TORCHS_OWN, Computing, kind_with_forms
from tiedparam.laws.rule import Rule
from tiedparam.products.windows import (
    Geometry,
    convolve,
    convolves,
    outputs_of,
    pays,
    summed_channels,
)
from tiedparam.tie.interposed import is_bare
from tiedparam.util.torch_modes import is_traced, is_transformed
from tiedparam.util.torch_private import (
    convolution_of,
    effective,
    lists_in_tables,
    output_padding_of,
    padding_of,
    parameters_of,
    reshaped_in_place,
    submodules_of,
)

Forward = Callable[..., Tensor | None]


def cheap_forward(stock: type[nn.Module]) -> Forward | None:
    """What a tied layer of this class tries first: it gives None where dense compute serves.

    Whether a method was replaced is asked at every call, since it may be at any time.
    """
    kind = kind_with_forms(stock)
    if kind is None:
        return None
    own, (compute, names) = TORCHS_OWN[kind], _FORWARDS[kind]

    def cheap(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor | None:
        if stock.forward is not own.forward or own.hands_on(layer):
            return None
        if len(args) > len(names) or (not args and "input" not in kwargs):
            return None  # the stock forward says what is wrong with them
        if kwargs and not kwargs.keys() <= set(names[len(args) :]):
            return None
        return compute(layer, *args, **kwargs)

    return cheap


def _linear(layer: nn.Linear, input: Tensor) -> Tensor | None:
    values = _values_for_cheap_form(layer, input)
    if values is None or not _has_features(values[1], input):
        return None
    rule, computing, free, bias = values
    summed, run = computing.reduction.summed, computing.reduction.run

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if summed:
            x = x.sum(-1, keepdim=True)
        if run == 1:
            return F.linear(x, weight, bias)
        # one row is a matrix-vector product, which the general product does not notice
        one = weight.shape[0] == 1
        y = (x @ weight.squeeze(0)).unsqueeze(-1) if one else F.linear(x, weight)
        return _spread(y, run, bias, 0)

    return _without_overflow(compute, summed, input, rule.reduced(free), bias)


def _conv(layer: Any, input: Tensor) -> Tensor | None:
    values = _values_for_cheap_form(layer, input)
    if values is None or not _has_channels(layer, values[1], input):
        return None
    computing = values[1]
    if computing.form == "windows":
        y = _by_windows(layer, values, input)
        if y is not None or computing.otherwise == "dense":
            return y
    return _by_sums(values, input, convolution_of(layer))


def _by_sums(
    values: _Values,
    input: Tensor,
    operation: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """The reduced form of a convolution, whose stock operation takes input, weight and bias."""
    rule, computing, free, bias = values
    axes, summed, run = len(computing.kernel), computing.reduction.summed, computing.reduction.run

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if summed:
            x = _sum_inputs(x, computing.groups, axes)
        y = operation(x, weight, bias if run == 1 else None)
        return _formatted(y if run == 1 else _spread(y, run, bias, axes), input)

    return _without_overflow(compute, summed, input, rule.reduced(free), bias)


def _by_windows(layer: Any, values: _Values, input: Tensor) -> Tensor | None:
    rule, computing, free, bias = values
    axes, summed = len(computing.kernel), computing.reduction.summed
    if (
        not convolves(input, free)
        or input.dim() != axes + 2
        or input.shape[1] != computing.channels
        or _is_channels_last(input)
    ):
        return None
    sizes, padding, around = tuple(input.shape[2:]), layer.padding, None
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        around = padding_of(layer)  # padded here, by torch
        sizes = tuple(
            size + before + after
            for size, before, after in zip(sizes, around[-2::-2], around[::-2], strict=True)
        )
        padding = (0,) * axes
    geometry = Geometry(computing.kernel, layer.stride, padding, layer.dilation)
    outputs = outputs_of(geometry, sizes)
    if min(outputs) <= 0:
        return None  # smaller than the kernel: the stock layer says so
    filters = rule.reduced(free) if summed else free
    m, positions = filters.shape[0], math.prod(computing.kernel)
    grad = torch.is_grad_enabled() and (input.requires_grad or free.requires_grad)
    groups = 1 if summed else computing.groups
    if rule.compute == "auto" and not pays(len(input), groups, m, positions, outputs, grad=grad):
        return None
    if summed:
        input = summed_channels(input)
    if around is not None:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        input = F.pad(input, around, mode=mode)
    return convolve(input, filters.reshape(m, positions), bias, geometry)


def _conv_transpose(
    layer: Any, input: Tensor, output_size: list[int] | None = None
) -> Tensor | None:
    values = _values_for_cheap_form(layer, input)
    if values is None or not _has_channels(layer, values[1], input):
        return None
    axes = len(values[1].kernel)
    padding = output_padding_of(layer, input, output_size, axes)
    operation = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]

    def transpose(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return operation(
            x, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation
        )

    return _by_sums(values, input, transpose)


_FORWARDS: dict[type[nn.Module], tuple[Forward, tuple[str, ...]]] = {
    nn.Linear: (_linear, ("input",)),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), (_conv, ("input",))),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        (_conv_transpose, ("input", "output_size")),
    ),
}
"""For each kind of layer with forms the cheap forward, and what the stock one's arguments are."""


_Values = tuple[Rule, Computing, Tensor, Tensor | None]
"""What a cheap form computes with: rule, way of computing, free values, bias."""


def _values_for_cheap_form(layer: nn.Module, input: Any) -> _Values | None:
    """What the layer computes with in its cheap form, or None if it computes densely now."""
    values = lists_in_tables(layer).get("weight")
    if values is None or not isinstance(input, Tensor):
        return None  # not tied (any more)
    computing: Computing | None = values.__dict__.get("computing")
    if computing is None or computing.form == "dense":
        return None
    parametrizations: dict[str, Any] = submodules_of(values)
    if len(parametrizations) > 1:
        return None  # another one on top
    rule = parametrizations["0"]
    if type(rule).forward is not computing.expand or not is_bare(values, rule):
        return None  # the weight is not what the base alone says
    free: Any = parameters_of(values).get("original0")
    if free is None:
        free = values.original0  # a replica of nn.DataParallel has no Parameters
    bias = effective(layer, "bias")
    return (rule, computing, free, bias) if _agree(input, free, bias) else None


# Whether the stock layer would take this input; if not, it says so itself.


def _agree(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the numbers have one device and dtype, or dtypes that autocast makes one."""
    device, dtype = input.device, input.dtype
    if weight.device != device or input.layout is not torch.strided or input.is_nested:
        return False
    if bias is None:
        if weight.dtype is dtype:
            return True
    elif bias.is_meta is not input.is_meta:  # on another device the operation says so itself
        return False
    elif weight.dtype is dtype is bias.dtype:
        return True
    if _autocast_dtype(device.type) is None:
        return False
    kinds = {dtype, weight.dtype, weight.dtype if bias is None else bias.dtype}
    return kinds <= _CAST_BY_AUTOCAST


_CAST_BY_AUTOCAST = {torch.float32, torch.float16, torch.bfloat16}

# A tracer would warn of the comparisons, and a traced input was accepted already.


def _has_features(computing: Computing, input: Tensor) -> bool:
    return is_traced() or (input.dim() > 0 and input.shape[-1] == computing.channels)


def _has_channels(layer: Any, computing: Computing, input: Tensor) -> bool:
    if layer.groups != computing.groups:
        return False
    if is_traced():
        return True
    axes = len(computing.kernel)
    return input.dim() in (axes + 1, axes + 2) and input.shape[-axes - 1] == computing.channels


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
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    summed: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """float16 sums can overflow where the dense layer does not: compute them in float32."""
    if not summed:
        return run(x, weight, bias)
    # autocast leaves float64 as it is
    precision = _autocast_dtype(x.device.type) if x.dtype in _CAST_BY_AUTOCAST else None
    if (precision or x.dtype) is not torch.float16:
        return run(x, weight, bias)
    wide = x.float(), weight.float(), None if bias is None else bias.float()
    if precision is None:
        return run(*wide).half()
    with torch.autocast(x.device.type, enabled=False):
        return run(*wide).half()


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype to which autocast converts here, or None where it is off."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None  # (asking for meta raises)
    return torch.get_autocast_dtype(device_type)
