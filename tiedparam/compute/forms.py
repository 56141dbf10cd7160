"""Which form computes a tied layer: decided once, when it is tied.

A broadcast weight repeats rows, or columns, or the banks of its groups. Convolution and
matrix product are linear, so where columns repeat the inputs can be summed first, and where
rows repeat one output can be computed and spread. The forms equal the dense layer up to rounding:

``dense``
    The stock operation, with the expanded weight.
``reduced``
    Sum the inputs that share, run the stock operation with the base as weight, spread the
    outputs that are equal.
``windows``
    Convolutions that are left with one input channel per group and share their filters, by the
    products of `tiedparam.products.windows`; where those do not serve, the other form.

`choose_form` says which, from what the law lets the layer save and from the layer's configuration,
never from the batch. `tiedparam.compute.forward` computes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from tiedparam.laws.layout import Layout
from tiedparam.laws.reduction import Reduction
from tiedparam.laws.rule import Rule
from tiedparam.tie.interposed import TorchsOwn
from tiedparam.util.errors import TieError, describe
from tiedparam.util.torch_private import steps_of_forward


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
    """How to compute a layer whose tensor a bound rule ties; None for the dense way.

    Raises:
        TieError: if the rule asks for a form that the layer does not have.
    """
    reduction = rule.reduction() if tensor_name == "weight" else None
    stock = parametrize.type_before_parametrizations(layer)
    if reduction is None or len(rule.bound_layout.shape) < 2 or not has_forms(stock):
        if rule.compute not in ("auto", "dense"):
            why = f"for the {tensor_name} of a {stock.__name__}, which computes densely."
            raise _no_such_form(layer, tensor_name, rule, why, "Leave it out.")
        return None
    layout = rule.bound_layout
    convolution = not issubclass(stock, nn.Linear)
    offered = ["dense", "reduced"]
    if _has_windows(reduction, layout, convolution):
        offered.append("windows")
    if rule.compute not in ("auto", *offered):
        names = ", ".join(map(repr, offered))
        remedy = f"Choose 'auto' or one of {names}."
        raise _no_such_form(layer, tensor_name, rule, "on this layer.", remedy)
    form = rule.compute
    if form == "auto":
        form = choose_form(reduction, layout, convolution=convolution)
    fallback = "dense" if reduction.shared_banks else "reduced"
    return Computing(
        form,
        fallback if form == "windows" else form,
        reduction,
        offered,
        channels=layout.groups * layout.canonical_shape[1],
        groups=layout.groups,
        kernel=layout.kernel,
        expand=type(rule).forward,
    )


def _no_such_form(
    layer: nn.Module, tensor_name: str, rule: Rule, why: str, remedy: str
) -> TieError:
    fact = f"compute={rule.compute!r} is not a form of '{rule}' {why}"
    return TieError(describe(layer, tensor_name), fact, remedy)


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
    windows = _has_windows(reduction, layout, convolution)
    if math.prod(layout.kernel) > _POSITIONS:
        windows = False
    if reduction.shared_banks:
        return "windows" if windows else "dense"
    saved = (layout.canonical_shape[1] if reduction.summed else 1) * reduction.run
    if not convolution:
        return "reduced" if saved > 1 else "dense"
    if saved < (_SAVED if layout.groups == 1 else _SAVED_IN_GROUPS):
        return "dense"
    return "windows" if windows else "reduced"


_SAVED = 4  # multiplications per one that is left
_SAVED_IN_GROUPS = 16  # stock kernels for many groups of one channel are slow
_POSITIONS = 64  # of a kernel; windows of more take much memory


def _has_windows(reduction: Reduction, layout: Layout, convolution: bool) -> bool:
    """Whether a convolution is left with one channel per group, and shared filters."""
    if not convolution or layout.transposed:
        return False
    if reduction.shared_banks:
        return layout.canonical_shape[1] == 1
    return reduction.summed and layout.groups == 1 and reduction.run == 1


# The stock layers that have forms, and torch's own methods, which the forms stand for ------------

TORCHS_OWN: dict[type[nn.Module], TorchsOwn] = {
    kind: TorchsOwn.of(kind, *steps_of_forward(kind))
    for kind in (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    )
}
"""By kind of layer."""


def kind_with_forms(stock: type[nn.Module]) -> type[nn.Module] | None:
    """The kind of layer with forms that a class derives from, or None."""
    return next((kind for kind in TORCHS_OWN if issubclass(stock, kind)), None)


def has_forms(stock: type[nn.Module]) -> bool:
    """Whether layers of a class have other forms than dense: not if they compute on their own."""
    kind = kind_with_forms(stock)
    return kind is not None and TORCHS_OWN[kind].computes(stock)


def torchs_own(stock: type[nn.Module]) -> TorchsOwn | None:
    """The methods that compute layers of a stock class, if those are torch's."""
    if not getattr(stock.forward, "__module__", "").startswith("torch.nn."):
        return None
    kind = kind_with_forms(stock)
    return TORCHS_OWN[kind] if kind is not None else TorchsOwn(stock.forward)
