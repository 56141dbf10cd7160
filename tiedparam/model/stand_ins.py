"""What stands for a tied layer, or for its Parameters, while `tune` measures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from tiedparam.layer.host import stock_class
from tiedparam.util.parametrized import parametrization_lists
from tiedparam.util.torch_private import buffers_of, parameters_of, submodules_of


def untied_like(layer: nn.Module) -> nn.Module:
    """A layer of the stock class with Parameters of its own, equal to what the tied one has.

    It shares the buffers and the submodules, and has no hooks.
    """
    stock = stock_class(layer)
    made = stock.__new__(stock)
    nn.Module.__init__(made)
    vars(made).update({name: x for name, x in vars(layer).items() if name not in vars(made)})
    lists = parametrization_lists(layer)
    buffers_of(made).update(buffers_of(layer))
    for name, module in submodules_of(layer).items():
        if name != "parametrizations":
            submodules_of(made)[name] = module
    for name, parameter in parameters_of(layer).items():
        parameters_of(made)[name] = None if parameter is None else _equal(layer, name, [parameter])
    for name, values in lists.items():
        parameters_of(made)[name] = _equal(layer, name, values.parameters())
    return made


def _equal(layer: nn.Module, name: str, stored: Iterable[nn.Parameter]) -> nn.Parameter:
    value = getattr(layer, name).detach().clone()
    return nn.Parameter(value, any(parameter.requires_grad for parameter in stored))


@contextmanager
def without_hooks(layer: nn.Module) -> Iterator[None]:
    """The layer computes with Parameters on the same storage, on which there are no hooks."""
    tables = [parameters_of(module) for module in layer.modules()]
    before = [dict(table) for table in tables]
    alone: dict[nn.Parameter, nn.Parameter] = {}
    for table in tables:
        for name, parameter in table.items():
            if parameter is not None:
                if parameter not in alone:
                    alone[parameter] = nn.Parameter(parameter.detach(), parameter.requires_grad)
                table[name] = alone[parameter]
    try:
        yield
    finally:
        for table, held in zip(tables, before, strict=True):
            table.update(held)
