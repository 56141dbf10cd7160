"""How many multiply-adds a layer needs, dense and tied, and on how many positions it works.

Counted per position: a row of a Linear layer's input, an output position of a convolution, an
input position of a transposed one, a time step of a recurrent layer. A sum of inputs, a
bias and a spread output cost no multiplication and are not counted; torch's
``FlopCounterMode`` counts two for every multiply-add.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tiedparam.compute.forms import computing_of
from tiedparam.laws.rule import Rule
from tiedparam.layer.host import stock_class
from tiedparam.util.torch_private import AnyConvolution, is_read_by_attention

_ONCE_PER_POSITION = (nn.Linear, nn.Bilinear, AnyConvolution, nn.RNNBase, nn.RNNCellBase)


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
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
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


def positions(model: nn.Module, example: Any) -> dict[nn.Module, int]:
    """On how many positions each Linear and convolution works for an input.

    Args:
        model: it runs once, in eval mode and without gradients; its modes are put back.
        example: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.

    Returns:
        Counts by layer, over all calls; layers that were not called are left out.
    """
    if not isinstance(example, (Tensor, tuple, list, Mapping)):
        raise TypeError(
            "example= takes a tensor, a tuple of arguments or a mapping of keyword arguments, not "
            f"{type(example).__name__}"
        )
    counts: dict[nn.Module, int] = {}

    def count(layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(layer, AnyConvolution) and layer.transposed:
            worked = inputs[0].numel() // layer.in_channels
        elif isinstance(layer, AnyConvolution):
            worked = output.numel() // layer.out_channels
        else:
            worked = output.numel() // layer.out_features
        counts[layer] = counts.get(layer, 0) + worked

    counted = (nn.Linear, nn.Bilinear, AnyConvolution)
    hooks = [
        layer.register_forward_hook(count)
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
    return counts


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
