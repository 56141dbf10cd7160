"""Structured compute: a layer whose weight is a broadcast runs on its base.

A broadcast weight repeats rows, or columns, or the banks of its groups. Convolution and
matrix product are linear, so where columns repeat the inputs can be summed first, and where
rows repeat one output can be computed and spread. The host's forward asks here first; every
other reader of the weight (attention, ``norm``, a stacked parametrization, a subclass with a
forward of its own) sees the ordinary expanded tensor, and the dense form is the fallback.

The forms are plain differentiable operations, so compile, export, ``vmap``, ``jvp`` and
double backward need nothing special. They equal the dense form up to rounding:

``reduced``
    Sum the inputs that share, run the stock operation with the base as weight, spread the
    outputs that are equal.
``windows``
    Convolutions that are left with one input channel per group and share their filters, by the
    products of `tiedparam.compute.windows`; where those do not serve, the other form.

`choose_form` says which, from the layer's configuration and never from the batch. They run only
where nothing stands between the layer and its weight, and for inputs that the dense layer takes:
see `tiedparam.tie.interposed`. Everywhere else the layer computes densely, by torch's own path.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.compute.windows import (
    Geometry,
    convolve,
    convolves,
    outputs_of,
    pays,
    summed_channels,
)
from tiedparam.laws.layout import Layout
from tiedparam.laws.rule import Reduction, Rule
from tiedparam.tie.interposed import TorchsOwn, is_bare
from tiedparam.util.errors import TieError
from tiedparam.util.torch_private import effective

Compute = Callable[..., Tensor | None]


def choose_form(reduction: Reduction, layout: Layout, *, convolution: bool) -> str:
    """Which form computes a layer fastest: "dense", "reduced" or "windows".

    Args:
        reduction: what the law lets the layer save.
        layout: the weight's layout.
        convolution: whether the layer is a convolution or a transposed one, not a Linear.

    The thresholds come from measurements at batch 1 and 32, which ``python -m benchmarks
    --case forms`` repeats: the cheap form stands where it lost in no measured shape. "windows"
    is a way to compute "reduced" or "dense" in eager mode; traced graphs hold those.
    """
    positions = math.prod(layout.kernel)
    windows = _has_windows(reduction, layout, convolution)
    if reduction.shared_banks:
        return "windows" if windows and positions <= _STREAM_POSITIONS else "dense"
    saved = (layout.canonical_shape[1] if reduction.summed else 1) * reduction.run
    if not convolution:
        return "reduced" if saved > 1 else "dense"
    if saved < (_SAVED if layout.groups == 1 else _SAVED_IN_GROUPS):
        return "dense"
    return "windows" if windows and positions <= _WINDOW_POSITIONS else "reduced"


_SAVED = 4  # multiplications per one that is left
_SAVED_IN_GROUPS = 16  # stock kernels for many groups of one channel are slow
_STREAM_POSITIONS, _WINDOW_POSITIONS = 16, 64


def _has_windows(reduction: Reduction, layout: Layout, convolution: bool) -> bool:
    """Whether a convolution is left with one channel per group, and shared filters."""
    if not convolution or layout.transposed:
        return False
    if reduction.shared_banks:
        return layout.canonical_shape[1] == 1
    return reduction.summed and layout.groups == 1 and reduction.run == 1


@dataclass(frozen=True)
class Computing:
    """How one tied layer is computed, decided when it is tied.

    Attributes:
        form: the form that is tried first.
        otherwise: the form where "windows" does not serve; the same for the others.
        reduction: what the law lets the layer save.
        offered: all forms in which the layer could be computed.
        channels: how many channels or features of input the weight takes. What a layer says of
            itself, ``in_channels``, may have been changed since; torch goes by the weight.
        groups: of the layer, by which it was tied.
        kernel: the sizes of the kernel.
        expand: the ``forward`` of the law, as it was then.
    """

    form: str
    otherwise: str
    reduction: Reduction
    offered: list[str]
    channels: int
    groups: int
    kernel: tuple[int, ...]
    expand: Any


def computing_of(layer: nn.Module, tensor_name: str, rule: Rule) -> Computing | None:
    """How a layer is to be computed whose tensor a bound rule ties; None: densely, as ever.

    Raises:
        TieError: if the rule asks for a form that the layer does not have.
    """
    if tensor_name != "weight":
        return None
    reduction = rule.reduction()
    if reduction is None:
        return None
    layout = rule.bound_layout
    stock = parametrize.type_before_parametrizations(layer)
    if len(layout.shape) < 2 or computation(stock) is None:
        if rule.compute not in ("auto", "dense"):
            raise TieError(
                f"compute={rule.compute!r} is no form of '{rule}' on a {stock.__name__}, which "
                "computes densely. Leave it out."
            )
        return None
    convolution = not isinstance(layer, nn.Linear)
    forms = _applicable(reduction, layout, convolution)
    if rule.compute not in ("auto", *forms):
        raise TieError(
            f"compute={rule.compute!r} is no form of '{rule}' on this layer. Choose 'auto' or one "
            f"of {', '.join(map(repr, forms))}."
        )
    form = rule.compute
    if form == "auto":
        form = choose_form(reduction, layout, convolution=convolution)
    fallback = "dense" if reduction.shared_banks else "reduced"
    return Computing(
        form,
        fallback if form == "windows" else form,
        reduction,
        forms,
        channels=layout.groups * layout.canonical_shape[1],
        groups=layout.groups,
        kernel=layout.kernel,
        expand=type(rule).forward,
    )


def _applicable(reduction: Reduction, layout: Layout, convolution: bool) -> list[str]:
    windows = ["windows"] if _has_windows(reduction, layout, convolution) else []
    return ["dense", "reduced", *windows]


def computation(stock: type[nn.Module]) -> Compute | None:
    """The structured forward for layers of a class, or None if it has a forward of its own."""
    kind = _kind(stock)
    return kind.compute if kind is not None and kind.own.computes(stock) else None


def forward(stock: type[nn.Module]) -> Compute | None:
    """What a tied layer of this class tries first: it gives None where dense compute serves.

    Whether a method was replaced is asked at every call, since it may be at any time.
    """
    kind = _kind(stock)
    if kind is None:
        return None
    compute, own, names = kind.compute, kind.own, kind.arguments

    def cheap(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor | None:
        if not own.computes_layer(layer, stock):
            return None
        if len(args) > len(names) or (not args and "input" not in kwargs):
            return None  # the stock forward says what is wrong with them
        if kwargs and not kwargs.keys() <= set(names[len(args) :]):
            return None
        return compute(layer, *args, **kwargs)

    return cheap


def torchs_own(stock: type[nn.Module]) -> TorchsOwn | None:
    """The methods that compute layers of a stock class, if those are torch's."""
    if not getattr(stock.forward, "__module__", "").startswith("torch.nn."):
        return None
    kind = _kind(stock)
    return kind.own if kind is not None else TorchsOwn(stock.forward)


@dataclass(frozen=True)
class _Kind:
    """How layers of one stock class are computed.

    Attributes:
        compute: the structured forward.
        own: torch's methods, which it stands for.
        arguments: the names of what the stock forward takes, in order.
    """

    compute: Compute
    own: TorchsOwn
    arguments: tuple[str, ...]


def _kind(stock: type[nn.Module]) -> _Kind | None:
    return next((found for kind, found in _KINDS.items() if issubclass(stock, kind)), None)


def _linear(layer: nn.Linear, input: Tensor) -> Tensor | None:
    found = _planned(layer, input)
    if found is None or not _has_features(found[1], input):
        return None
    rule, plan, free, bias = found
    summed, run = plan.reduction.summed, plan.reduction.run

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
    found = _planned(layer, input)
    if found is None or not _has_channels(layer, found[1], input):
        return None
    plan = found[1]
    if plan.form == "windows":
        y = _by_windows(layer, found, input)
        if y is not None or plan.otherwise == "dense":
            return y
    return _by_sums(layer, found, input, layer._conv_forward)


def _by_sums(
    layer: Any,
    found: _Found,
    input: Tensor,
    operation: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """The reduced form of a convolution, whose stock operation takes input, weight and bias."""
    rule, plan, free, bias = found
    axes, summed, run = len(plan.kernel), plan.reduction.summed, plan.reduction.run

    def compute(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if summed:
            x = _sum_inputs(x, plan.groups, axes)
        y = operation(x, weight, bias if run == 1 else None)
        return _formatted(y if run == 1 else _spread(y, run, bias, axes), input)

    return _without_overflow(compute, summed, input, rule.reduced(free), bias)


def _by_windows(layer: Any, found: _Found, input: Tensor) -> Tensor | None:
    rule, plan, free, bias = found
    axes, summed = len(plan.kernel), plan.reduction.summed
    if (
        not convolves(input, free)
        or input.dim() != axes + 2
        or input.shape[1] != plan.channels
        or _is_channels_last(input)
    ):
        return None
    sizes, padding, around = tuple(input.shape[2:]), layer.padding, None
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        around = layer._reversed_padding_repeated_twice  # padded here, by torch
        sizes = tuple(
            size + before + after
            for size, before, after in zip(sizes, around[-2::-2], around[::-2], strict=True)
        )
        padding = (0,) * axes
    geometry = Geometry(plan.kernel, layer.stride, padding, layer.dilation)
    outputs = outputs_of(geometry, sizes)
    if min(outputs) <= 0:
        return None  # smaller than the kernel: the stock layer says so
    filters = rule.reduced(free) if summed else free
    m, positions = filters.shape[0], math.prod(plan.kernel)
    grad = torch.is_grad_enabled() and (input.requires_grad or free.requires_grad)
    groups = 1 if summed else plan.groups
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
    found = _planned(layer, input)
    if found is None or not _has_channels(layer, found[1], input):
        return None
    axes = len(found[1].kernel)
    padding = layer._output_padding(
        input, output_size, layer.stride, layer.padding, layer.kernel_size, axes, layer.dilation
    )
    operation = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]

    def transpose(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return operation(
            x, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation
        )

    return _by_sums(layer, found, input, transpose)


_KINDS: dict[type[nn.Module], _Kind] = {
    nn.Linear: _Kind(_linear, TorchsOwn.of(nn.Linear), ("input",)),
    **{
        kind: _Kind(_conv, TorchsOwn.of(kind, "_conv_forward"), ("input",))
        for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    },
    **{
        kind: _Kind(
            _conv_transpose,
            TorchsOwn.of(kind, "_output_padding"),
            ("input", "output_size"),
        )
        for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    },
}


_Found = tuple[Rule, Computing, Tensor, Tensor | None]
"""What a cheap form computes with: rule, plan, free values, bias."""


def _planned(layer: nn.Module, input: Any) -> _Found | None:
    """What the layer computes with in its cheap form, or None if it computes densely now."""
    lists = layer._modules.get("parametrizations")
    weight = lists._modules.get("weight") if lists is not None else None
    if weight is None or len(weight._modules) > 1 or not isinstance(input, Tensor):
        return None  # not tied (any more), or another parametrization on top
    rule: Any = weight._modules["0"]
    plan: Computing | None = weight.__dict__.get("computing")
    if plan is None or plan.form == "dense":
        return None
    if type(rule).forward is not plan.expand or not is_bare(weight, rule):
        return None  # the weight is not what the base alone says
    free: Any = weight._parameters.get("original0")
    if free is None:
        free = weight.original0  # a replica of nn.DataParallel has no Parameters
    bias = effective(layer, "bias")
    return (rule, plan, free, bias) if _agree(input, free, bias) else None


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


def _has_features(plan: Computing, input: Tensor) -> bool:
    return torch._C._get_tracing_state() is not None or (
        input.dim() > 0 and input.shape[-1] == plan.channels
    )


def _has_channels(layer: Any, plan: Computing, input: Tensor) -> bool:
    if layer.groups != plan.groups:
        return False
    if torch._C._get_tracing_state() is not None:
        return True
    axes = len(plan.kernel)
    return input.dim() in (axes + 1, axes + 2) and input.shape[-axes - 1] == plan.channels


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
    if torch._C._get_tracing_state() is not None:  # which would write the sizes down as constants
        return spread.flatten(channel - 1, channel)
    # no view for autograd, as stock layers return none: under fully_shard the hook on an output
    # that is a view would not survive an in-place ReLU
    shape = (*y.shape[:channel], outputs * run, *y.shape[y.dim() - axes :])
    merged: Tensor = torch.ops.aten._unsafe_view.default(spread.contiguous(), shape)
    return merged


def _is_channels_last(x: Tensor) -> bool:
    if torch._C._functorch.peek_interpreter_stack() is not None:
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
