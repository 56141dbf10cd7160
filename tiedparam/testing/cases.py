"""Every example of a law as a case to tie, and what is needed to judge it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tiedparam.laws.example import Example
from tiedparam.laws.fitted import is_fitted, rounding
from tiedparam.laws.layout import Layout
from tiedparam.laws.rule import Rule
from tiedparam.layer.register import register_tie
from tiedparam.testing.judge import close, equal, hold
from tiedparam.tie.lookup import get_tie
from tiedparam.util.torch_private import AnyConvolution

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

COMPUTE: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}
"""How far a tied layer's output may be from its dense stock layer's."""

Inputs = Callable[[nn.Module, int], tuple[Tensor, ...]]
"""Makes what a layer is called with, for so many samples."""


# Cases -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Host:
    """A model and the layer in it whose tensor a case ties."""

    model: nn.Module
    layer: nn.Module
    tensor_name: str

    @property
    def rule(self) -> Rule:
        """The law of the tie."""
        return get_tie(self.layer, self.tensor_name)

    @property
    def weight(self) -> Tensor:
        """The values of the tensor at this moment."""
        weight: Tensor = getattr(self.layer, self.tensor_name)
        return weight.detach().clone()

    @property
    def free(self) -> list[nn.Parameter]:
        """The Parameters that are stored."""
        lists: Any = self.layer.parametrizations
        return list(lists[self.tensor_name].parameters())

    def output(self, *inputs: Tensor) -> Tensor:
        """What the layer computes; the first of several outputs."""
        return output_of(self.layer, inputs)


@dataclass(frozen=True)
class Case:
    """One example of one law.

    Attributes:
        rule: the class of the law.
        example: the model to build and the options to tie it with.
        is_first: whether it is the first of the law's examples: some statements do more with it.
        inputs: makes the inputs of a layer whose inputs are not known here.

    Example:
        >>> from tiedparam.testing import STATEMENTS, Case
        >>> case = Case(tp.rules.FlipSym, tp.Example(lambda: nn.Linear(4, 4)))
        >>> STATEMENTS["labels_number_the_orbits"](case)  # raises if it does not hold
        >>> print(case)
        flip_sym-Linear-weight-4x4
    """

    rule: type[Rule]
    example: Example
    is_first: bool = True
    inputs: Inputs | None = None

    @property
    def name(self) -> str:
        """That of the law: the registered one, or that of the class."""
        return self.rule.name or self.rule.__name__

    @property
    def reads_layers(self) -> bool:
        """Whether the weight is computed from tensors of other layers, too."""
        return self.rule.reads_layers

    @cached_property
    def kind(self) -> Literal["laws with values", "laws with fitted values", "copies"]:
        """Which statements hold for it, apart from those for every law."""
        if not (self.reads_layers or self.rule.bilinear):
            return "laws with values"
        return "laws with fitted values" if is_fitted(self.tied().rule) else "copies"

    def dense(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Host:
        """A fresh model that is not tied."""
        torch.default_generator.manual_seed(seed)
        model = self.example.build().to(dtype)
        host = Host(model, model.get_submodule(self.example.path), self.example.tensor_name)
        weight: Tensor = getattr(host.layer, host.tensor_name)
        real = weight.is_floating_point() and not weight.is_meta
        if real and weight.numel() > 1 and weight.unique().numel() == 1:
            nn.init.normal_(weight)  # a fresh norm's ones obey most laws
        return host

    def tie(self, host: Host, **arguments: Any) -> Host:
        """Tie the tensor of a host."""
        given: dict[str, Any] = {"root": host.model, **self.example.options, **arguments}
        register_tie(host.layer, self.rule, host.tensor_name, **given)
        return host

    def tied(self, dtype: torch.dtype = torch.float32, seed: int = 0, **arguments: Any) -> Host:
        """A fresh model with the tie."""
        return self.tie(self.dense(dtype, seed), **arguments)

    def sample_input(self, layer: nn.Module, batch: int = 2) -> tuple[Tensor, ...]:
        """Something that the layer can be called with, in the dtype of its parameters."""
        return self.inputs(layer, batch) if self.inputs else sample_input(layer, batch)

    def twin_of(self, host: Host) -> nn.Module:
        """A fresh stock layer that holds the tied layer's values densely."""
        twin = self.dense(host.weight.dtype).layer
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                parameter.copy_(getattr(host.layer, name))
        return twin

    @property
    def shown_example(self) -> str:
        """Layer, tensor, its shape, and the options."""
        host = self.dense()
        shape = "x".join(map(str, getattr(host.layer, host.tensor_name).shape))
        parts = [type(host.layer).__name__, host.tensor_name, shape]
        parts += [f"{key}={_shown(value)}" for key, value in self.example.options.items()]
        return "-".join(parts)

    def __str__(self) -> str:
        return f"{self.name}-{self.shown_example}"


def cases_of(
    rule: type[Rule], examples: Iterable[Example] | None = None, inputs: Inputs | None = None
) -> list[Case]:
    """The examples of a law, its own or those given, as cases."""
    found = list(rule.examples() if examples is None else examples)
    return [Case(rule, example, number == 0, inputs) for number, example in enumerate(found)]


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).rpartition('.')[2]}{'x'.join(map(str, value.shape))}"
    return str(getattr(value, "__name__", value))


# Inputs and outputs ----------------------------------------------------------------------


def sample_input(layer: nn.Module, batch: int = 2) -> tuple[Tensor, ...]:
    """Something that the layer can be called with, in the dtype of its parameters.

    Raises:
        TypeError: if it is not known what such a layer is called with.
    """
    parameter = next(layer.parameters(), None)
    dtype = parameter.dtype if parameter is not None else torch.float32

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    if isinstance(layer, nn.Linear):
        return (drawn(batch, layer.in_features),)
    if isinstance(layer, nn.Bilinear):
        return drawn(batch, layer.in1_features), drawn(batch, layer.in2_features)
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return (torch.randint(layer.num_embeddings, (batch, 5)),)
    if isinstance(layer, AnyConvolution):
        return (drawn(batch, layer.in_channels, *(size + 2 for size in layer.kernel_size)),)
    if isinstance(layer, nn.RNNBase):
        return (drawn(3, batch, layer.input_size),)
    if isinstance(layer, nn.LayerNorm):
        return (drawn(batch, *layer.normalized_shape),)
    weight = getattr(layer, "weight", None)
    if weight is not None and Layout.of(layer, "weight", tuple(weight.shape)).transposed:
        return (drawn(batch, weight.shape[0]),)
    raise TypeError(
        f"it is not known what a {type(layer).__name__} is called with. "
        "Pass check_rule(..., inputs=lambda layer, batch: (tensor, ...))"
    )


def output_of(layer: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """What a layer computes; the first of several outputs."""
    output: Any = layer(*inputs)
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


class Caller(nn.Module):
    """Calls one layer of a model, so that the model's parameters can be given to it."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.model: nn.Module = host.model
        self.path: str = next(path for path, m in host.model.named_modules() if m is host.layer)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The output of the layer."""
        return output_of(self.model.get_submodule(self.path), inputs)


# The law ---------------------------------------------------------------------------------


def assert_satisfies(rule: Rule, weight: Tensor, when: str = "now") -> None:
    """The law, as `symmetries` states it, holds for a weight: to the bit unless it is fitted."""
    images = list(rule.symmetries(weight))
    hold(images, "symmetries yields nothing, so the law says nothing")
    for number, image in enumerate(images):
        same(rule, weight, image, f"{when} symmetry {number} is broken: the weight")


def same(rule: Rule, found: Tensor, expected: Tensor, what: str) -> None:
    """Two weights of a rule are equal; up to rounding where its free values are solved for."""
    if is_fitted(rule):
        hold(found.dtype == expected.dtype, f"{what} is {found.dtype} instead of {expected.dtype}")
        close(found, expected, what, **COMPUTE[expected.dtype])
    else:
        equal(found, expected, what)


def has_no_residual(rule: Rule, weight: Tensor, what: str) -> None:
    """A weight is as near to the law as rounding lets it be."""
    residual = rule.residual(weight)
    bound = rounding(weight.dtype) if is_fitted(rule) else 0
    hold(residual <= bound, f"{what} has the residual {residual:.2e}")


def assert_lawful(host: Host, when: str = "now") -> None:
    """The law holds for the tensor of a host."""
    assert_satisfies(host.rule, host.weight, when)


def flat(values: Iterable[Tensor]) -> Tensor:
    """Free values as one vector."""
    return torch.cat([value.detach().reshape(-1) for value in values])


def unflatten(rule: Rule, values: Tensor) -> list[Tensor]:
    """A vector of free values in the shapes that the rule wants."""
    shapes = rule.free_shapes()
    parts = values.split([math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def drawn_free(rule: Rule, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Random free values."""
    return unflatten(rule, torch.randn(rule.free_count).to(dtype))


@dataclass(frozen=True)
class Expansion:
    """``forward`` written out: ``weight = matrix @ free + constant``, flat.

    Attributes:
        matrix: its columns are the expansions of the unit vectors.
        constant: what zeros are expanded to: 0, but where the law fixes an entry.
    """

    matrix: Tensor
    constant: Tensor

    @property
    def is_linear(self) -> bool:
        """Whether nothing is fixed to another number than 0."""
        return not self.constant.any()


def expansion_of(rule: Rule) -> Expansion:
    """The matrix of a bound rule, by expanding the unit vectors."""
    zeros = torch.zeros(rule.free_count, dtype=torch.float64)
    units = torch.eye(rule.free_count, dtype=torch.float64)
    constant = rule(*unflatten(rule, zeros)).detach().flatten()
    columns = [rule(*unflatten(rule, unit)).detach().flatten() - constant for unit in units]
    return Expansion(torch.stack(columns, dim=1), constant)


def sums_over_orbits(rule: Rule, weight: Tensor) -> Tensor:
    """The signed sum of ``weight`` over each orbit, by the labels."""
    labels = rule.orbit_labels().flatten()
    reached = labels != 0
    sums = torch.zeros(rule.free_count, dtype=weight.dtype)
    index = labels[reached].abs() - 1
    return sums.scatter_add_(0, index, weight.flatten()[reached] * labels[reached].sign())


def counts_of_orbits(rule: Rule) -> Tensor:
    """How many entries each free value has, by the labels."""
    labels = rule.orbit_labels().flatten().abs()
    return torch.bincount(labels, minlength=rule.free_count + 1)[1:]


def generic_holds(rule: Rule) -> bool:
    """Whether `Rule.representatives` applies: every entry has a free value."""
    return bool((rule.orbit_labels() != 0).all())


def owned_bytes(tensor: Tensor) -> bool:
    """Whether a tensor keeps no more bytes alive than it has."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
