"""The forwards of tied layers in their cheaper forms; `tiedparam.compute.forms` says which.

The host's forward asks here first; every other reader of the weight (attention, ``norm``, a
stacked parametrization, a subclass with a forward of its own) sees the ordinary expanded tensor,
and the dense form is the fallback.

Forms run only where nothing stands between the layer and its weight, and for inputs that the dense
layer takes: see `tiedparam.tie.interposed`. Everywhere else the layer computes densely, by torch's
own path. What a form can run in is said by its ``where``.

The dense form runs here too where an ordinary call would only expand the weight and call torch's
operation: the calls in between, which ask again what is known here, cost a small layer as much as
it computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiedparam.compute.forms import TORCHS_OWN, Computing, kind_with_forms, serves
from tiedparam.compute.kept import Memory, is_frozen, is_kept
from tiedparam.laws.forms import Call, Form
from tiedparam.laws.rule import Rule
from tiedparam.tie.interposed import is_bare
from tiedparam.util.torch_modes import (
    CAST_BY_AUTOCAST,
    autocast_dtype,
    in_compiled_graph,
    is_ordinary,
    is_traced,
    is_traced_or_transformed,
)
from tiedparam.util.torch_private import (
    convolution_of,
    effective,
    lists_in_tables,
    output_padding_of,
    parameters_of,
    submodules_of,
)

Forward = Callable[..., "Tensor | None"]
Stock = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def cheap_forward(stock: type[nn.Module]) -> Forward | None:
    """What a tied layer of this class tries first: it gives None where dense compute serves.

    Whether a method was replaced is asked at every call, since it may be at any time.
    """
    kind = kind_with_forms(stock)
    if kind is None:
        return None
    own, (stock_of, fits, names) = TORCHS_OWN[kind], _KINDS[kind]

    def cheap(layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor | None:
        values = lists_in_tables(layer).get("weight")
        if values is None or stock.forward is not own.forward or own.hands_on(layer):
            return None
        computing: Computing | None = values.__dict__.get("computing")
        if computing is None:
            return _dense(layer, values, stock_of, args, kwargs)
        if kwargs or len(args) != 1:
            if len(args) > len(names) or not (args or "input" in kwargs):
                return None  # the stock forward says what is wrong with them
            if not kwargs.keys() <= set(names[len(args) :]):
                return None
        input = args[0] if args else kwargs["input"]
        if not isinstance(input, Tensor) or input.is_nested or not fits(layer, computing, input):
            return None
        y = _computed(layer, values, computing, input, stock_of, args, kwargs)
        return _dense(layer, values, stock_of, args, kwargs) if y is None else y

    return cheap


def _dense(
    layer: nn.Module,
    values: Any,
    stock_of: Callable[..., Stock],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor | None:
    """The output in the dense form, or None where more than expanding the weight is to be done."""
    free: tuple[Any, ...] = tuple(parameters_of(values).values())
    # first, so that a compiled graph is guarded by nothing of the rest
    if kwargs or len(args) != 1 or not free or not is_ordinary(*free) or free[0].is_meta:
        return None
    memory: Memory | None = values.__dict__.get("kept")
    if memory is None or memory.frozen is not None or memory.checked:
        return None  # None: a list of torch's own
    table: dict[str, Any] = parameters_of(layer)
    parametrizations: dict[str, Any] = submodules_of(values)
    rule: Rule = parametrizations["0"]
    if (
        "bias" not in table  # it is tied as well
        or len(parametrizations) > 1
        or rule.reads_layers
        or not is_bare(values, rule)
    ):
        return None
    try:
        weight = rule.forward(*free)
    except AttributeError:
        return None  # the property says what raised it
    return stock_of(layer, *args)(args[0], weight, table["bias"])


def _computed(
    layer: nn.Module,
    values: Any,
    computing: Computing,
    input: Tensor,
    stock_of: Callable[..., Stock],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor | None:
    """The output in the cheapest form that serves, or None."""
    parametrizations: dict[str, Any] = submodules_of(values)
    if len(parametrizations) > 1:
        return None  # another one on top
    rule: Rule = parametrizations["0"]
    if type(rule).forward is not computing.expand:
        return None
    free: Any = tuple(parameters_of(values).values()) or _of_replica(values, rule)
    # what it reads is trained, as a rule, where the law's own values are
    recorded = torch.is_grad_enabled() and _need_gradients(input, *free)
    named = computing.named(recorded)
    if is_traced_or_transformed():  # whose graph serves every batch
        forms = computing.order(rule, None, recorded, False, named)
    else:
        if named != computing.asked and is_frozen(values):
            named = computing.asked  # `tune` measured with the expansion, which is not made here
        rows = input.numel() // computing.channels
        forms = computing.order(rule, rows, recorded, is_kept(values, layer), named)
    if not forms or not is_bare(values, rule):
        return None  # the weight is not what the free values alone say
    bias = effective(layer, "bias")
    if not _agree(input, free, bias):
        return None
    stock: Stock | None = None
    sources: tuple[Tensor, ...] | None = None if rule.reads_layers else ()
    for form in forms:
        asked = form.name == named
        if not _runs_here(form, input, free, bias, asked=asked):
            continue
        if sources is None:  # only then: a source may have to be loaded, or be tied itself
            sources = values.own_reading().read_for_forms(rule)
            if sources is None or not _agree(input, sources, None):
                return None
        if sources and not _runs_here(form, input, sources, None, asked=asked):
            continue
        stock = stock_of(layer, *args, **kwargs) if stock is None else stock
        use = computing.usual(recorded)
        y = form.compute(rule, Call(layer, input, free, bias, stock, use, asked, sources))
        if y is not None:
            if computing.seen is not None:
                computing.seen.append(form.name)
            return y
    return None


def _need_gradients(*tensors: Tensor) -> bool:
    for tensor in tensors:  # noqa: SIM110 — at every call, and faster
        if tensor.requires_grad:
            return True
    return False


def _of_replica(values: Any, rule: Rule) -> tuple[Tensor, ...]:
    """The free values of a replica of nn.DataParallel, which has no Parameters."""
    return tuple(getattr(values, f"original{n}") for n in range(len(rule.free_shapes())))


def _runs_here(
    form: Form, input: Tensor, free: tuple[Tensor, ...], bias: Tensor | None, *, asked: bool
) -> bool:
    """Whether a form can run on these tensors, in what torch is doing now."""
    if form.where == "anywhere":
        return True
    dtype, device = input.dtype, "cpu" if input.is_cpu else input.device.type
    if not serves(form, dtype, device, asked=asked) or autocast_dtype(input.device) is not None:
        return False
    for value in free:
        if value.dtype is not dtype:
            return False
    if in_compiled_graph():
        return form.where == "compiled"
    return is_ordinary(input, *free) if bias is None else is_ordinary(input, *free, bias)


# What the kinds of layer do -----------------------------------------------------------------


def _linear(layer: nn.Module, input: Tensor) -> Stock:
    return F.linear


def _conv(layer: nn.Module, input: Tensor) -> Stock:
    return convolution_of(layer)


def _conv_transpose(layer: Any, input: Tensor, output_size: list[int] | None = None) -> Stock:
    axes = len(layer.kernel_size)
    padding = output_padding_of(layer, input, output_size, axes)
    operation = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]

    def transpose(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return operation(
            x, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation
        )

    return transpose


# Whether the stock layer would take this input; if not, it says so itself. A tracer would warn of
# the comparisons, and a traced input was accepted already.


def _has_features(layer: nn.Module, computing: Computing, input: Tensor) -> bool:
    return is_traced() or (input.dim() > 0 and input.shape[-1] == computing.channels)


def _has_channels(layer: Any, computing: Computing, input: Tensor) -> bool:
    if layer.groups != computing.layout.groups:
        return False
    if is_traced():
        return True
    axes = len(computing.layout.kernel)
    return input.dim() in (axes + 1, axes + 2) and input.shape[-axes - 1] == computing.channels


_CONVOLUTION = (_conv, _has_channels, ("input",))
_TRANSPOSED = (_conv_transpose, _has_channels, ("input", "output_size"))
_KINDS: dict[type[nn.Module], tuple[Callable[..., Stock], Callable[..., bool], tuple[str, ...]]] = {
    nn.Linear: (_linear, _has_features, ("input",)),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONVOLUTION),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _TRANSPOSED),
}
"""For each kind of layer with forms its operation, whether it takes an input, and the names of its
forward's arguments."""


def _agree(input: Tensor, free: tuple[Tensor, ...], bias: Tensor | None) -> bool:
    """Whether the numbers have one device and dtype, or dtypes that autocast makes one."""
    device, dtype = input.device, input.dtype
    if input.layout is not torch.strided:
        return False
    alike = bias is None or bias.dtype is dtype
    for value in free:
        if value.device != device:
            return False
        if value.dtype is not dtype:
            alike = False
    if bias is not None and bias.is_meta is not input.is_meta:
        return False  # on another device the operation says so itself
    if alike:
        return True
    kinds = {dtype, *(value.dtype for value in free), dtype if bias is None else bias.dtype}
    return autocast_dtype(device) is not None and kinds <= CAST_BY_AUTOCAST
