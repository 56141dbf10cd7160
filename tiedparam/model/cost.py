"""What a tie saves while a layer computes: multiply-adds, and time.

Multiply-adds are counted per position: a row of a Linear layer's input, an output position of a
convolution, an input position of a transposed one, a time step of a recurrent layer. A sum of
inputs, a bias and a spread output cost no multiplication and are not counted; torch's
``FlopCounterMode`` counts two for every multiply-add.

Time is what `tune` measured, or what the law says it takes to make the weight, and what its forms
cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tiedparam.compute.forms import Computing, computing_of, kind_of
from tiedparam.laws.forms import Use
from tiedparam.laws.rule import Rule
from tiedparam.laws.times import untied_time
from tiedparam.layer.host import stock_class
from tiedparam.util.torch_private import AnyConvolution, is_read_by_attention

_ONCE_PER_POSITION = (nn.Linear, nn.Bilinear, AnyConvolution, nn.RNNBase, nn.RNNCellBase)
_LOOKED_UP = (nn.Embedding, nn.EmbeddingBag)


def multiply_adds(
    layer: nn.Module, tensor_name: str, shape: tuple[int, ...], rule: Rule | None
) -> tuple[int, int] | None:
    """Multiply-adds per position that one tensor causes: dense, and under the rule.

    Args:
        layer: the layer.
        tensor_name: which of its tensors.
        shape: the shape of the tensor.
        rule: a rule that is bound to it.

    Returns:
        The two numbers, as the layer computes while it trains; None where it is not known
        how the layer uses the tensor.
    """
    if len(shape) < 2:
        return (0, 0)  # a bias is added
    if isinstance(layer, _LOOKED_UP):
        return (0, 0)  # rows are looked up
    if not isinstance(layer, (*_ONCE_PER_POSITION, nn.MultiheadAttention)):
        return None
    dense = torch.Size(shape).numel()
    return dense, _reduced_count(layer, tensor_name, rule) or dense


def _reduced_count(layer: nn.Module, tensor_name: str, rule: Rule | None) -> int | None:
    if rule is None or rule.layout is None:
        return None
    computing = computing_of(layer, tensor_name, rule)
    if computing is None or is_read_by_attention(stock_class(layer)):
        return None  # attention reads the weight and does the product itself
    for form in computing.order(rule, None, True, False):
        if form.multiply_adds is not None and form.where == "anywhere":
            return form.multiply_adds(rule, computing.use(training=True))
    return None


@dataclass(frozen=True)
class Gains:
    """How many times as fast as an untied layer a tied one computes: below 1 it is slower.

    Attributes:
        inference: without gradients; None if it is not known.
        training: with gradients, forward and backward; None if it is not known.
        measured: whether `tune` measured them, for each of the two.
    """

    inference: float | None = None
    training: float | None = None
    measured: tuple[bool, bool] = (False, False)


def gains(
    layer: nn.Module,
    tensor_name: str,
    rule: Rule,
    like: Tensor,
    *,
    computing: Computing | None,
    rows: int | None = None,
    kept: bool = False,
) -> Gains:
    """What a tie gains over the same layer without it.

    The untied layer takes a time that is known roughly. To that the tied one adds what it takes to
    make the weight (`tiedparam.laws.Making`); where its law has a cheaper form, it takes a part of
    both together.

    Args:
        layer: the layer.
        tensor_name: which of its tensors.
        rule: a rule that is bound to it.
        like: a tensor with the dtype and on the device of the free values.
        computing: how the layer computes under the rule, and what `tune` measured of it; None if
            densely.
        rows: how many vectors of input one call multiplies; None for a usual batch.
        kept: whether the weight is at hand (`frozen`), so that none is made.

    Returns:
        Nothing for biases, and where it is not known how the layer uses the tensor, or how often:
        recurrent layers take any number of steps in a call.
    """
    known = (nn.Linear, nn.Bilinear, AnyConvolution, *_LOOKED_UP)
    if len(rule.bound_layout.shape) < 2 or not isinstance(layer, known):
        return Gains()
    if is_read_by_attention(stock_class(layer)):
        computing = None  # attention reads the weight and does the product itself
    measured = {} if computing is None or kept else computing.measured

    def gain(training: bool) -> float | None:
        if training in measured:
            return measured[training]
        use = Use(kind_of(layer), rule.bound_layout, rows, training, kept)
        untied = untied_time(use, looks_up=isinstance(layer, _LOOKED_UP))
        dense = untied + rule.making.takes(use)
        if computing is None:
            return untied / dense
        share = computing.predicted_cost(rule, like, rows, training, kept)
        return untied / (share * dense) if share else None

    return Gains(gain(False), gain(True), (False in measured, True in measured))


@dataclass(frozen=True)
class Work:
    """On how much a layer works for an example.

    Attributes:
        positions: over all calls; see the top of this file.
        rows: how many vectors of input one call multiplies, on average.
    """

    positions: int
    rows: int


def work(model: nn.Module, example: Any) -> dict[nn.Module, Work]:
    """On how much each Linear and convolution works for an input.

    Args:
        model: it runs once, in eval mode and without gradients; its modes are put back.
        example: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.

    Returns:
        By layer; layers that were not called are left out.
    """
    if not isinstance(example, (Tensor, tuple, list, Mapping)):
        raise TypeError(
            "example= takes a tensor, a tuple of arguments or a mapping of keyword arguments, not "
            f"{type(example).__name__}"
        )
    calls: dict[nn.Module, list[Work]] = {}

    def count(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(layer, AnyConvolution):
            input = args[0] if args else kwargs["input"]
            rows = input.numel() // layer.in_channels
            positions = rows if layer.transposed else output.numel() // layer.out_channels
        else:
            rows = positions = output.numel() // layer.out_features
        calls.setdefault(layer, []).append(Work(positions, rows))

    counted = (nn.Linear, nn.Bilinear, AnyConvolution)
    hooks = [
        layer.register_forward_hook(count, with_kwargs=True)
        for layer in model.modules()
        if isinstance(layer, counted)
    ]
    try:
        with in_eval_mode(model), torch.no_grad():
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*((example,) if isinstance(example, Tensor) else example))
    finally:
        for hook in hooks:
            hook.remove()
    return {
        layer: Work(sum(w.positions for w in made), sum(w.rows for w in made) // len(made))
        for layer, made in calls.items()
    }


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
