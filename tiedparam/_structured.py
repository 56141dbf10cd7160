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
``shift``
    Streams (``groups`` that share one bank of one-channel filters), without gradients: add
    the shifted input once per kernel position, block by block in cache.

`choose_form` says which, from the layer's configuration and never from the batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam._broadcast import Broadcast, Reduction
from tiedparam._errors import TieError
from tiedparam._layout import Layout
from tiedparam._rule import Rule
from tiedparam._stock import effective
from tiedparam._write_guard import guarding_is_off

Compute = Callable[..., Tensor | None]


def choose_form(
    reduction: Reduction, layout: Layout, *, convolution: bool, grad: bool = True
) -> str:
    """Which form computes a layer fastest: "dense", "reduced" or "shift".

    Args:
        reduction: what the law lets the layer save.
        layout: the weight's layout.
        convolution: whether the layer is a convolution or a transposed one, not a Linear.
        grad: whether gradients are being recorded.

    The thresholds come from measurements at batch 1 and 32, which ``python -m benchmarks
    --case forms`` repeats: the cheap form stands where it lost in no measured shape.
    """
    inputs, positions = layout.canonical_shape[1], math.prod(layout.kernel)
    saved = (inputs if reduction.summed else 1) * reduction.run
    if reduction.shared_banks:
        shifts = inputs == 1 and not layout.transposed and positions <= _SHIFT_POSITIONS
        return "shift" if shifts and not grad else "dense"
    if not convolution:
        # spreading outputs takes more operations, forward and back, than a small product
        small = grad and reduction.run > 1 and math.prod(layout.shape) < _SMALL_PRODUCT
        return "reduced" if saved > 1 and not small else "dense"
    return "reduced" if saved >= (_SAVED if layout.groups == 1 else _SAVED_IN_GROUPS) else "dense"


_SAVED = 4  # multiplications per one that is left
_SMALL_PRODUCT = 64 * 64  # entries of a Linear weight
_SAVED_IN_GROUPS = 16  # stock kernels for many groups of one channel are slow
_SHIFT_POSITIONS = 16
_BLOCK_BYTES = 1 << 20  # of output: half of what a core's second-level cache holds today


@dataclass(frozen=True)
class Plan:
    """What is decided once per tie: the form, and the sizes that it needs."""

    form: str
    form_without_grad: str
    reduction: Reduction


def prepare(layer: nn.Module, tensor_name: str, rule: Rule) -> None:
    """Decide how a layer that was just tied is computed, and note it on the rule."""
    if not isinstance(rule, Broadcast) or tensor_name != "weight":
        return
    layout = rule.bound_layout
    stock = parametrize.type_before_parametrizations(layer)
    if len(layout.shape) < 2 or computation(stock) is None:
        if rule.compute not in ("auto", "dense"):
            raise TieError(
                f"compute={rule.compute!r} is no form of '{rule}' on a {stock.__name__}, which "
                "computes densely. Leave it out."
            )
        return
    reduction = rule.reduction()
    convolution = not isinstance(layer, nn.Linear)
    if rule.compute == "auto":
        forms = [
            choose_form(reduction, layout, convolution=convolution, grad=g) for g in (True, False)
        ]
    elif rule.compute in _applicable(reduction, layout, convolution):
        forms = ["dense" if rule.compute == "shift" else rule.compute, rule.compute]
    else:
        raise TieError(
            f"compute={rule.compute!r} is no form of '{rule}' on this layer. Choose 'auto' or one "
            f"of {', '.join(map(repr, _applicable(reduction, layout, convolution)))}."
        )
    rule.plan = Plan(form=forms[0], form_without_grad=forms[1], reduction=reduction)


def _applicable(reduction: Reduction, layout: Layout, convolution: bool) -> list[str]:
    one_channel = convolution and not layout.transposed and layout.canonical_shape[1] == 1
    return ["dense", "reduced", *(["shift"] if one_channel and reduction.shared_banks else [])]


def computation(stock: type[nn.Module]) -> Compute | None:
    """The structured forward for layers of a class, or None if it has a forward of its own."""
    for kind, compute in _COMPUTATIONS.items():
        if issubclass(stock, kind):
            same = stock.forward is kind.forward and getattr(
                stock, "_conv_forward", None
            ) is getattr(kind, "_conv_forward", None)
            return compute if same else None
    return None


def _linear(layer: nn.Linear, input: Tensor) -> Tensor | None:
    found = _planned(layer, input)
    if found is None or not _has_features(layer, input):
        return None
    rule, plan, free = found
    with _Precision(input, plan.reduction.summed) as precision:
        x, weight, bias = precision.enter(input, rule.reduced(free), effective(layer, "bias"))
        if plan.reduction.summed:
            x = x.sum(-1, keepdim=True)
        if plan.reduction.run == 1:
            return precision.leave(F.linear(x, weight, bias))
        # one row is a matrix-vector product, which the general product does not notice
        y = (x @ weight[0]).unsqueeze(-1) if weight.shape[0] == 1 else F.linear(x, weight)
        return precision.leave(_spread(y, plan.reduction.run, bias, 0))


def _conv(layer: Any, input: Tensor) -> Tensor | None:
    found = _planned(layer, input)
    axes = len(layer.kernel_size)
    if found is None or not _has_channels(layer, input, axes):
        return None
    rule, plan, free = found
    if plan.form_without_grad == "shift":
        return _shift(layer, rule, free, input)
    run = plan.reduction.run
    with _Precision(input, plan.reduction.summed) as precision:
        x, weight, bias = precision.enter(input, rule.reduced(free), effective(layer, "bias"))
        if plan.reduction.summed:
            x = _sum_inputs(x, layer.groups, axes)
        y = layer._conv_forward(x, weight, bias if run == 1 else None)
        if run > 1:
            y = _spread(y, run, bias, axes)
        return precision.leave(_formatted(y, input))


def _conv_transpose(
    layer: Any, input: Tensor, output_size: list[int] | None = None
) -> Tensor | None:
    found = _planned(layer, input)
    axes = len(layer.kernel_size)
    if found is None or not _has_channels(layer, input, axes):
        return None
    rule, plan, free = found
    run = plan.reduction.run
    padding = layer._output_padding(
        input, output_size, layer.stride, layer.padding, layer.kernel_size, axes, layer.dilation
    )
    operation = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
    with _Precision(input, plan.reduction.summed) as precision:
        x, weight, bias = precision.enter(input, rule.reduced(free), effective(layer, "bias"))
        if plan.reduction.summed:
            x = _sum_inputs(x, layer.groups, axes)
        y = operation(
            x, weight, bias if run == 1 else None, layer.stride, layer.padding, padding,
            layer.groups, layer.dilation,
        )  # fmt: skip
        if run > 1:
            y = _spread(y, run, bias, axes)
        return precision.leave(_formatted(y, input))


_COMPUTATIONS: dict[type[nn.Module], Compute] = {
    nn.Linear: _linear,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.ConvTranspose1d: _conv_transpose,
    nn.ConvTranspose2d: _conv_transpose,
    nn.ConvTranspose3d: _conv_transpose,
}


def _planned(layer: nn.Module, input: Any) -> tuple[Broadcast, Plan, Tensor] | None:
    """The rule, plan and free values of a layer that a cheap form computes now."""
    weight = layer._modules["parametrizations"]._modules.get("weight")  # type: ignore[union-attr]
    if weight is None or len(weight._modules) > 1 or not isinstance(input, Tensor):
        return None  # not tied, or another parametrization on top
    rule: Any = weight._modules["0"]
    plan: Plan | None = rule.__dict__.get("plan")
    if plan is None or plan.form_without_grad == "dense":
        return None
    free: Any = weight._parameters.get("original0")
    if free is None:
        free = weight.original0  # a replica of nn.DataParallel has no Parameters
    if (
        plan.form == "dense"
        and torch.is_grad_enabled()
        and torch._C._get_tracing_state() is None  # which compares traces with and without
        and (input.requires_grad or free.requires_grad)
    ):
        return None
    return rule, plan, free


# Whether the stock layer would take this input; if not, it shall say so itself. A tracer would
# warn of the comparison, and a traced input was accepted already.


def _has_features(layer: nn.Linear, input: Tensor) -> bool:
    return torch._C._get_tracing_state() is not None or (
        input.dim() > 0 and input.shape[-1] == layer.in_features
    )


def _has_channels(layer: Any, input: Tensor, axes: int) -> bool:
    if torch._C._get_tracing_state() is not None:
        return True
    return input.dim() in (axes + 1, axes + 2) and input.shape[-axes - 1] == layer.in_channels


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
        return y + bias.to(y.dtype).reshape(-1, *(1,) * axes)
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


def _windows(layer: Any, x: Tensor) -> Iterator[Tensor]:
    """What each kernel position sees of a padded input, in the order of the kernel."""
    axes = len(layer.kernel_size)
    slices: list[list[slice]] = []
    for size, k, s, d in zip(
        x.shape[-axes:], layer.kernel_size, layer.stride, layer.dilation, strict=True
    ):
        count = max(0, (size - d * (k - 1) - 1) // s + 1)
        length = (count - 1) * s + 1 if count else 0
        slices.append([slice(o * d, o * d + length, s) for o in range(k)])
    for position in itertools.product(*slices):
        yield x[(..., *position)]  # type: ignore[index]


def _padded(layer: Any, x: Tensor) -> Tensor:
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padding = layer._reversed_padding_repeated_twice
    return F.pad(x, padding, mode=mode) if any(padding) else x


def _shift(layer: Any, rule: Broadcast, base: Tensor, input: Tensor) -> Tensor | None:
    """Streams without gradients: every stream's filters, one kernel position after another.

    The output is several times the input and far larger than the caches, and every kernel
    position passes over it: block by block those passes stay in cache.
    """
    axes, groups = len(layer.kernel_size), layer.groups
    if (
        guarding_is_off()  # somebody traces or transforms: no writing into outputs
        or input.device.type != "cpu"  # a GPU is fastest with the stock kernel
        or input.dtype not in (torch.float32, torch.float64)
        or input.dtype != base.dtype
        or torch.is_autocast_enabled("cpu")
        or input.numel() == 0
    ):
        return None
    x = _padded(layer, input if input.dim() == axes + 2 else input.unsqueeze(0))
    sizes = next(_windows(layer, x)).shape[-axes:]
    if 0 in sizes:
        return None  # smaller than the kernel: the stock layer says so
    filters = base.detach().reshape(base.shape[0], -1, *(1,) * axes)  # (m, positions, 1, …)
    bias = effective(layer, "bias")
    shaped = None if bias is None else bias.detach().reshape(groups, -1, *(1,) * axes)
    y = x.new_empty(x.shape[0], groups, base.shape[0], *sizes)
    stream_bytes = max(1, y[0, 0].numel() * y.element_size())
    streams = max(1, min(groups, _BLOCK_BYTES // stream_bytes))
    samples = max(1, _BLOCK_BYTES // (stream_bytes * groups))
    for n, g in itertools.product(range(0, len(x), samples), range(0, groups, streams)):
        block = y[n : n + samples, g : g + streams]
        windows = _windows(layer, x[n : n + samples, g : g + streams].unsqueeze(2))
        for position, window in enumerate(windows):
            if position == 0:
                torch.mul(window, filters[:, 0], out=block)
            else:
                block.addcmul_(window, filters[:, position])
        if shaped is not None:
            block.add_(shaped[g : g + streams])
    y = y.flatten(1, 2)
    return y if input.dim() == axes + 2 else y.squeeze(0)


def _is_channels_last(x: Tensor) -> bool:
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


class _Precision:
    """float16 sums can overflow where the dense layer does not: compute them in float32."""

    def __init__(self, input: Tensor, summed: bool) -> None:
        kind = input.device.type
        autocast = torch.is_autocast_enabled(kind)
        result = torch.get_autocast_dtype(kind) if autocast else input.dtype
        self.result = result if summed and result is torch.float16 else None
        self.off: Any = None
        if self.result is not None and autocast:
            self.off = torch.autocast(kind, enabled=False)

    def __enter__(self) -> _Precision:
        if self.off is not None:
            self.off.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.off is not None:
            self.off.__exit__(*error)

    def enter(
        self, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.result is None:
            return x, weight, bias
        return x.float(), weight.float(), None if bias is None else bias.float()

    def leave(self, y: Tensor) -> Tensor:
        return y if self.result is None else y.to(self.result)
