"""The examples of every registered rule as cases, and what tests of rules share.

What a case is and how it is judged is in `tiedparam.testing`; here is what only tests need.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

import tiedparam as tp
from tiedparam.testing import Case
from tiedparam.testing.cases import (
    COMPUTE,
    DTYPES,
    Caller,
    assert_lawful,
    assert_satisfies,
    cases_of,
    sample_input,
)
from tiedparam.testing.changes import law_holds_after_100_steps_of

__all__ = [
    "CASES",
    "CASES_OF_COPIES",
    "CASES_WITH_FITTED_VALUES",
    "CASES_WITH_FREE_VALUES",
    "COMPUTE",
    "DTYPES",
    "FIRST_CASES",
    "Caller",
    "Case",
    "assert_lawful",
    "assert_refused",
    "assert_satisfies",
    "canonical_entries",
    "cases_of",
    "first_ones_fast",
    "law_holds_after_100_steps_of",
    "layer_id",
    "same_bits",
    "sample_input",
]


def first_ones_fast(cases: Iterable[Case]) -> list[Any]:
    """The cases as parameters of a test, all but the first one of each rule marked as slow."""
    return [pytest.param(case, marks=[] if case.is_first else [pytest.mark.slow]) for case in cases]


CASES = [case for rule in tp.available_rules().values() for case in cases_of(rule)]
CASES_WITH_FREE_VALUES = [case for case in CASES if case.kind == "laws with values"]
CASES_WITH_FITTED_VALUES = [case for case in CASES if case.kind == "laws with fitted values"]
CASES_OF_COPIES = [case for case in CASES if case.kind == "copies"]
FIRST_CASES = [case for case in CASES if case.is_first]


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal to the bit: the sign of zero counts. Not by the library's own comparison."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    one, other = (
        each.detach().clone(memory_format=torch.contiguous_format) for each in (left, right)
    )
    return torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


def layer_id(value: Any) -> str | None:
    """How pytest names a parameter that builds a layer."""
    if not callable(value):
        return None
    layer = value()
    return "-".join([type(layer).__name__, "x".join(map(str, layer.weight.shape))])


def canonical_entries(
    layer: nn.Module, tensor_name: str = "weight"
) -> dict[tuple[int, ...], float]:
    """``V[o, c, x]`` by counting: all outputs, inputs within their group, kernel position."""
    weight = getattr(layer, tensor_name).detach().clone()
    entries = {}
    for index in itertools.product(*map(range, weight.shape)):
        value = weight[index].item()
        if isinstance(layer, _ConvTransposeNd) and tensor_name == "weight":
            channel, output, *position = index
            group, channel = divmod(channel, layer.in_channels // layer.groups)
            index = (group * weight.shape[1] + output, channel, *position)
        entries[index] = value
    return entries


def assert_refused(
    layer: nn.Module,
    rule: Any,
    *parts_of_the_message: str,
    error: type[Exception] = tp.TieError,
    tensor_name: str = "weight",
    **options: Any,
) -> str:
    """Tying raises, says all of this, and leaves the layer as it was."""
    kind, attributes = type(layer), dict(layer.__dict__)
    parameters = dict(layer._parameters)
    values = {name: p.detach().clone() for name, p in parameters.items() if p is not None}
    with pytest.raises(error) as caught:
        tp.register_tie(layer, rule, tensor_name, **options)
    message = str(caught.value)
    for part in parts_of_the_message:
        assert part in message
    assert type(layer) is kind
    assert layer.__dict__.keys() == attributes.keys()
    assert list(layer._parameters) == list(parameters)
    assert all(layer._parameters[name] is p for name, p in parameters.items())
    assert all(torch.equal(parameters[name], value) for name, value in values.items())
    assert not parametrize.is_parametrized(layer)
    return message
