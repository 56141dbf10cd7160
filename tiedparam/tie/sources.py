"""Ties that read ties: what has become of the sources, all along a chain of copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.tie.record import Tie, TiedList
from tiedparam.tie.split import ALIKE
from tiedparam.tie.write_guard import is_read_from
from tiedparam.util.errors import TieError, describe
from tiedparam.util.parametrized import parametrization_list
from tiedparam.util.torch_private import is_managed_by_fsdp, parameters_of


def chain(values: nn.Module) -> Iterator[TiedList]:
    """A tie that reads layers, and those of its sources that do, one behind the other."""
    if not isinstance(values, TiedList) or values.reading is None:
        return
    yield values
    for source, name in values.law.sources():
        if parametrize.is_parametrized(source, name):
            yield from chain(parametrization_list(source, name))


def depth(values: nn.Module) -> int:
    """How many ties stand one behind the other, from this one to the layers that have numbers."""
    if not isinstance(values, TiedList) or values.reading is None:
        return 0
    behind = (
        depth(parametrization_list(source, name))
        for source, name in values.law.sources()
        if parametrize.is_parametrized(source, name)
    )
    return 1 + max(behind, default=0)


@contextmanager
def overlooking_sources(values: nn.Module) -> Iterator[None]:
    """Compute with what there is, whatever has become of the sources, to leave the tie."""
    with ExitStack() as stack:
        for each in chain(values):
            stack.enter_context(each.own_reading().overlooking(each.law))
        yield


def refuse_exchanged(values: nn.Module) -> None:
    """Raise if this tie, or one that it reads, has lost its source to another module."""
    for each in chain(values):
        each.own_reading().refuse_exchanged(each.law)


def is_what_it_copies(values: nn.Module, value: Tensor) -> bool:
    """Whether ``value`` is the source's own tensor, and the law is to be equal to that."""
    if not isinstance(values, TiedList) or values.reading is None or not values.law.is_plain_copy:
        return False
    ((source, name),) = values.law.sources()
    if value is parameters_of(source).get(name) or is_read_from(value, source, name):
        return True
    if not parametrize.is_parametrized(source, name):
        return False
    behind = parametrization_list(source, name)
    return len(behind) == 1 and is_what_it_copies(behind, value)


def refuse_separate_source(tie: Tie) -> None:
    """Raise for a tie that is to be computed while a source is sharded and it is not (S31)."""
    (source, source_name), *_ = tie.rule.sources()
    root = tie.record.own_reading().places[0].common_root
    copy, original = tie.describe(root), describe(source, source_name, root)
    if not is_managed_by_fsdp(source):
        fact = f"its source {original} is parallelized, and the layer is not."
        raise TieError(f"cannot compute {copy} by '{tie.rule}'", fact, ALIKE)
    pair = "source_layer, layer"
    if root is not None:
        paths = {id(module): path for path, module in root.named_modules()}
        pair = f"{paths[id(source)]}, {paths[id(tie.layer)]}"
    raise TieError(
        f"cannot compute {copy} by '{tie.rule}'",
        f"its source {original} belongs to another fully_shard unit, and only a part of it is "
        "here.",
        f"Put both into one unit, with fully_shard([{pair}]) or by sharding only a module that "
        "holds both.",
    )
