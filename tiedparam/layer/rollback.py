"""All or nothing: put modules and optimizers back as they were, to the object.

One tie goes through this, and so does a whole plan of them. What is noted is everything that
tying and untying touch: classes, attributes, the contents of tables and lists (parameters,
hooks, a recurrent layer's flat weights), what is written on the Parameters (the optimizer
guard's marks, ``.grad``), and the optimizers' groups and state. Values are not noted: tying
writes into no Parameter that exists.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer

from tiedparam.util.torch_private import parameters_of


@contextmanager
def rolled_back_on_error(
    modules: Iterable[nn.Module], optimizers: Sequence[Optimizer]
) -> Iterator[None]:
    """If the block raises, undo what it has changed, then let the exception pass.

    Args:
        modules: all modules that may be touched, parametrizations included.
        optimizers: all optimizers that may be touched.
    """
    modules = list(modules)
    parameters = [p for m in modules for p in parameters_of(m).values() if p is not None]
    undo = [
        *(_note_module(module) for module in modules),
        *(_note_optimizer(optimizer) for optimizer in optimizers),
        *(_note_parameter(parameter) for parameter in parameters),
    ]
    try:
        yield
    except BaseException:
        for put_back in undo:
            put_back()
        raise


def _note_module(module: nn.Module) -> Callable[[], None]:
    kind, attributes = type(module), dict(module.__dict__)
    tables = [(v, list(v.items())) for v in attributes.values() if type(v) in (dict, OrderedDict)]
    lists = [(v, list(v)) for v in attributes.values() if type(v) is list]
    sets = [(v, set(v)) for v in attributes.values() if type(v) is set]

    def put_back() -> None:
        module.__class__ = kind
        module.__dict__.clear()
        module.__dict__.update(attributes)
        for table, items in tables:
            table.clear()
            table.update(items)
        for values, listed in lists:
            values[:] = listed
        for members, held in sets:
            members.clear()
            members.update(held)

    return put_back


def _note_parameter(parameter: nn.Parameter) -> Callable[[], None]:
    attributes, gradient = dict(parameter.__dict__), parameter.grad

    def put_back() -> None:
        parameter.__dict__.clear()
        parameter.__dict__.update(attributes)
        parameter.grad = gradient

    return put_back


def _note_optimizer(optimizer: Optimizer) -> Callable[[], None]:
    groups = [(group, dict(group)) for group in optimizer.param_groups]
    lists = [
        (value, list(value))
        for value in (
            optimizer.param_groups,
            *(v for group, _ in groups for v in (group["params"], group.get("param_names"))),
        )
        if value is not None
    ]
    state = dict(optimizer.state)

    def put_back() -> None:
        for value, content in lists:
            value[:] = content
        for group, options in groups:
            group.clear()
            group.update(options)
        optimizer.state.clear()
        optimizer.state.update(state)

    return put_back
