"""Every example of every rule as a case to tie, and what tests need to judge it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

import tiedparam as tp
from tiedparam.laws import Linked

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
"""Integers of the same size, to compare bits."""

COMPUTE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}
"""How far a tied layer's output may be from its dense stock layer's."""


# Cases -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Host:
    """A model and the layer in it whose tensor a case ties."""

    model: nn.Module
    layer: nn.Module
    tensor_name: str

    @property
    def rule(self) -> tp.Rule:
        return tp.get_tie(self.layer, self.tensor_name)

    @property
    def weight(self) -> Tensor:
        """The values of the tensor at this moment."""
        return getattr(self.layer, self.tensor_name).detach().clone()

    @property
    def free(self) -> list[nn.Parameter]:
        return list(self.layer.parametrizations[self.tensor_name].parameters())


@dataclass(frozen=True)
class Case:
    """One example of one rule."""

    name: str
    rule: type[tp.Rule]
    example: tp.Example

    def dense(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Host:
        torch.manual_seed(seed)
        model = self.example.build().to(dtype)
        return Host(model, model.get_submodule(self.example.path), self.example.tensor_name)

    def tie(self, host: Host, **arguments: Any) -> Host:
        options = self.example.options
        tp.register_tie(
            host.layer, self.name, host.tensor_name, root=host.model, **options, **arguments
        )
        return host

    def tied(self, dtype: torch.dtype = torch.float32, seed: int = 0, **arguments: Any) -> Host:
        return self.tie(self.dense(dtype, seed), **arguments)

    def __str__(self) -> str:
        host = self.dense()
        shape = "x".join(map(str, getattr(host.layer, host.tensor_name).shape))
        parts = [self.name, type(host.layer).__name__, host.tensor_name, shape]
        for key, value in self.example.options.items():
            parts.append(f"{key}={getattr(value, '__name__', value)}")
        return "-".join(parts)


def cases_of(rules: dict[str, type[tp.Rule]]) -> list[Case]:
    return [
        Case(name, rule, example) for name, rule in rules.items() for example in rule.examples()
    ]


def first_ones_fast(cases: Iterable[Case]) -> list[Any]:
    """The cases as parameters of a test, all but the first one of each rule marked as slow."""
    seen: set[str] = set()
    found = []
    for case in cases:
        found.append(pytest.param(case, marks=[pytest.mark.slow] if case.name in seen else []))
        seen.add(case.name)
    return found


def is_copy(case: Case) -> bool:
    return issubclass(case.rule, Linked)


CASES = cases_of(tp.available_rules())
CASES_WITH_FREE_VALUES = [case for case in CASES if not is_copy(case)]
CASES_OF_COPIES = [case for case in CASES if is_copy(case)]
FIRST_CASES = [next(case for case in CASES if case.name == name) for name in tp.available_rules()]


# Tools -----------------------------------------------------------------------------------


def sample_input(layer: nn.Module, batch: int = 2) -> tuple[Tensor, ...]:
    """Something that the layer can be called with, in the dtype of its parameters."""
    parameter = next(layer.parameters(), None)
    dtype = parameter.dtype if parameter is not None else torch.float32
    if isinstance(layer, nn.Linear):
        return (torch.randn(batch, layer.in_features).to(dtype),)
    if isinstance(layer, nn.Bilinear):
        sizes = (layer.in1_features, layer.in2_features)
        return tuple(torch.randn(batch, size).to(dtype) for size in sizes)
    if isinstance(layer, nn.Embedding):
        return (torch.randint(layer.num_embeddings, (batch, 5)),)
    if isinstance(layer, _ConvNd):
        sizes = [size + 2 for size in layer.kernel_size]
        return (torch.randn(batch, layer.in_channels, *sizes).to(dtype),)
    raise TypeError(f"say here what a {type(layer).__name__} is called with")


def assert_lawful(host: Host) -> None:
    assert_satisfies(host.rule, host.weight)


def assert_satisfies(rule: tp.Rule, weight: Tensor) -> None:
    images = list(rule.symmetries(weight))
    assert images, "without a symmetry the law says nothing"
    for image in images:
        assert image.shape == weight.shape
        assert torch.equal(image, weight)


def distinct_values(count: int, dtype: torch.dtype) -> Tensor:
    """Neighbours of 1 in random order: all different, also in half precision."""
    one = torch.ones(1, dtype=dtype).view(INTEGERS[dtype])
    return (one + torch.randperm(count).to(one.dtype)).view(dtype)


def layer_id(value: Any) -> str | None:
    """How pytest names a parameter that builds a layer."""
    if not callable(value):
        return None
    layer = value()
    return "-".join([type(layer).__name__, "x".join(map(str, layer.weight.shape))])


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal to the bit: the sign of zero counts."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    integer = INTEGERS[left.dtype]
    return torch.equal(left.contiguous().view(integer), right.contiguous().view(integer))


def flat(values: Iterable[Tensor]) -> Tensor:
    return torch.cat([value.detach().reshape(-1) for value in values])


def unflatten(rule: tp.Rule, values: Tensor) -> list[Tensor]:
    """A vector of free values in the shapes that the rule wants."""
    shapes = rule.free_shapes()
    parts = values.split([math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def expansion_matrix(rule: tp.Rule) -> Tensor:
    """``B``: its columns are the expansions of the unit vectors."""
    count = sum(math.prod(shape) for shape in rule.free_shapes())
    units = torch.eye(count, dtype=torch.float64)
    return torch.stack([rule(*unflatten(rule, unit)).flatten() for unit in units], dim=1)


def lawful_dimension(rule: tp.Rule, shape: torch.Size) -> int:
    """The dimension of ``{W : S(W) = W for every symmetry S}``, without ``forward``."""
    units = torch.eye(shape.numel(), dtype=torch.float64).reshape(-1, *shape)
    columns = [
        torch.cat([(image - unit).flatten() for image in rule.symmetries(unit)]) for unit in units
    ]
    return shape.numel() - int(torch.linalg.matrix_rank(torch.stack(columns, dim=1)))


def owned_bytes(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def stock_twin(case: Case, host: Host) -> nn.Module:
    """A fresh stock layer that holds the tied layer's values densely."""
    twin = case.dense(host.weight.dtype).layer
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(getattr(host.layer, name))
    return twin


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


class Caller(nn.Module):
    """Calls one layer of a model, so that the model's parameters can be given to it."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.model = host.model
        self.path = next(path for path, m in host.model.named_modules() if m is host.layer)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model.get_submodule(self.path)(*inputs)
