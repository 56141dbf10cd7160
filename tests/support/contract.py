"""The rule contract, over every registered rule and each of its examples.

A rule is enrolled by being registered: nothing here names a rule. Every function marked with
`for_every_rule`, `for_rules_with_free_values` or `for_copies` is one statement of the contract
about one `Case`, and can be called for a rule of one's own (see ``test_user_rule.py``).

The law is judged through ``symmetries`` with ``torch.equal``, compute by the stock layer that
holds the expanded weight, and the mathematics by an explicit expansion matrix.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

import tiedparam as tp
from tiedparam.laws.linked import Linked

pytestmark = pytest.mark.filterwarnings("error::tiedparam.TieWarning")

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


def is_copy(case: Case) -> bool:
    return issubclass(case.rule, Linked)


Statement = Callable[[Case], None]
EVERY: list[Statement] = []
FREE: list[Statement] = []
COPY: list[Statement] = []


def for_every_rule(statement: Statement) -> Statement:
    EVERY.append(statement)
    return statement


def for_rules_with_free_values(statement: Statement) -> Statement:
    FREE.append(statement)
    return statement


def for_copies(statement: Statement) -> Statement:
    COPY.append(statement)
    return statement


def statement_name(statement: Statement) -> str:
    return statement.__name__


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


# The law ---------------------------------------------------------------------------------


@for_every_rule
def law_says_something(case: Case) -> None:
    host = case.dense()
    dense = host.weight
    rule = case.tie(host).rule
    assert any(not torch.equal(image, dense) for image in rule.symmetries(dense))
    assert not torch.equal(host.weight, dense)


@for_every_rule
def law_holds_after_registration(case: Case) -> None:
    for dtype in DTYPES:
        dense = case.dense(dtype)
        shape = dense.weight.shape
        host = case.tie(dense)
        assert host.weight.shape == shape
        assert host.weight.dtype == dtype
        assert_lawful(host)
        if not is_copy(case):
            assert_lawful(case.tied(dtype, init="rescale"))


@for_every_rule
def law_holds_after_100_optimizer_steps(case: Case) -> None:
    # every variant of every optimizer takes its turn with one case of each rule, below
    for kind, variant in (("SGD", "foreach"), ("Adam", "fused"), ("AdamW", "foreach")):
        law_holds_after_100_steps_of(kind, variant, case)


def law_holds_after_100_steps_of(kind: str, variant: str, case: Case) -> None:
    host = case.tied()
    before = host.weight
    options = {
        "SGD": {"lr": 0.01, "momentum": 0.9},
        "Adam": {"lr": 0.01, "amsgrad": True},
        "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    }[kind]
    flags = {"foreach": variant == "foreach", "fused": variant == "fused"}
    optimizer = getattr(torch.optim, kind)(host.model.parameters(), **options, **flags)
    inputs = sample_input(host.layer)
    target = torch.randn_like(host.layer(*inputs))
    for _ in range(100):
        optimizer.zero_grad()
        (host.layer(*inputs) - target).square().mean().backward()
        optimizer.step()
    assert host.weight.isfinite().all()
    assert not torch.equal(host.weight, before)
    assert_lawful(host)


@for_every_rule
def law_holds_after_casts(case: Case) -> None:
    host = case.tied()
    before = host.weight
    for dtype in (torch.float64, torch.bfloat16, torch.float32, torch.float16, torch.float32):
        host.model.to(dtype)
        assert host.weight.dtype == dtype
        assert_lawful(host)
        if dtype == torch.float64 and not is_copy(case):
            assert torch.equal(host.weight, before.double())
    assert not torch.equal(host.weight, before)  # rounded to half precision on the way


@for_every_rule
def law_holds_after_loading(case: Case) -> None:
    other = case.tied(seed=1)
    for entries in (other.model.state_dict(), tp.dense_state_dict(other.model)):
        for assign in (False, True):
            host = case.tied(seed=2)
            assert not torch.equal(host.weight, other.weight)
            loaded = host.model.load_state_dict(copy.deepcopy(entries), assign=assign)
            assert loaded.missing_keys == loaded.unexpected_keys == []
            assert torch.equal(host.weight, other.weight)
            assert_lawful(host)


@for_every_rule
def law_holds_after_loading_on_the_meta_device(case: Case) -> None:
    other = case.tied(seed=1)
    for entries in (other.model.state_dict(), tp.dense_state_dict(other.model)):
        with torch.device("meta"):
            host = case.tied()
        assert host.weight.device.type == "meta"
        host.model.load_state_dict(copy.deepcopy(entries), assign=True)
        assert torch.equal(host.weight, other.weight)
        assert_lawful(host)


@for_rules_with_free_values
def law_holds_after_loading_an_unlawful_checkpoint(case: Case) -> None:
    dense = case.dense(seed=1)
    for assign in (False, True):
        host = case.tied(seed=2)
        with pytest.warns(tp.TieWarning, match=host.tensor_name):
            host.model.load_state_dict(dense.model.state_dict(), assign=assign)
        assert torch.equal(host.weight, host.rule.project(dense.weight))
        assert_lawful(host)


@for_rules_with_free_values
def init_keeps_one_draw_per_orbit(case: Case) -> None:
    host = case.tied()
    tp.init_(host.layer, nn.init.ones_, host.tensor_name)
    assert host.weight.abs().eq(1).all()
    assert_lawful(host)

    drawn: list[Tensor] = []

    def draw(tensor: Tensor) -> None:
        assert tensor.shape == host.weight.shape
        drawn.append(nn.init.normal_(tensor).clone())

    tp.init_(host.layer, draw, host.tensor_name)
    assert len(drawn) == 1
    assert_lawful(host)
    values = host.weight.abs().unique()
    assert values.numel() == host.rule.free_count
    assert torch.isin(values, drawn[0].abs()).all()


@for_rules_with_free_values
def reset_parameters_keeps_one_draw_per_orbit(case: Case) -> None:
    host, stock = case.tied(), case.dense()
    before = host.weight
    torch.manual_seed(5)
    stock.layer.reset_parameters()
    torch.manual_seed(5)
    host.layer.reset_parameters()
    assert not torch.equal(host.weight, before)
    assert_lawful(host)
    values = host.weight.abs().unique()
    assert values.numel() == host.rule.free_count
    assert torch.isin(values, stock.weight.abs()).all()
    for name, parameter in host.layer.named_parameters(recurse=False):
        assert torch.equal(parameter, getattr(stock.layer, name))


@for_copies
def init_and_reset_leave_a_copy_alone(case: Case) -> None:
    host, stock = case.tied(), case.dense()
    before = host.weight
    sources = [getattr(source, name).detach().clone() for source, name in host.rule.sources()]

    def never(tensor: Tensor) -> None:
        raise AssertionError("the copy has nothing to initialise")

    tp.init_(host.layer, never, host.tensor_name)
    torch.manual_seed(5)
    stock.layer.reset_parameters()
    torch.manual_seed(5)
    host.layer.reset_parameters()
    assert torch.equal(host.weight, before)
    assert_lawful(host)
    for (source, name), value in zip(host.rule.sources(), sources, strict=True):
        assert torch.equal(getattr(source, name), value)
    own = dict(host.layer.named_parameters(recurse=False))
    assert own  # each example has an untied bias or weight, which is reset
    for name, parameter in own.items():
        assert torch.equal(parameter, getattr(stock.layer, name))


@for_every_rule
def lawful_weights_come_back_to_the_bit(case: Case) -> None:
    for dtype in DTYPES:
        host = case.tied(dtype)
        lawful = host.weight
        tp.remove_tie(host.layer, host.tensor_name)
        assert same_bits(host.weight, lawful)
        case.tie(host)
        assert same_bits(host.weight, lawful)
        tp.remove_tie(host.layer, host.tensor_name)
        case.tie(host, init="exact")
        assert same_bits(host.weight, lawful)
        assert host.rule.residual(lawful) == 0


# Free values -----------------------------------------------------------------------------


@for_rules_with_free_values
def right_inverse_undoes_forward(case: Case) -> None:
    rule = case.tied().rule
    for dtype in DTYPES:
        info = torch.finfo(dtype)
        special = torch.tensor(
            [math.inf, -math.inf, info.max, info.min, info.tiny, info.smallest_normal / 4, 0.0],
            dtype=dtype,
        )
        pool = torch.cat([special, torch.randn(3 * len(special)).to(dtype)])
        for turn in range(len(pool)):
            chosen = torch.randint(len(pool), (rule.free_count,))
            chosen[turn % rule.free_count] = turn  # each of them at least once
            free = unflatten(rule, pool[chosen])
            weight = rule(*free)
            assert weight.dtype == dtype
            assert_satisfies(rule, weight)
            for inverse in (rule.right_inverse(weight), tp.Rule.right_inverse(rule, weight)):
                assert not isinstance(inverse, Tensor)
                for value, again in zip(free, inverse, strict=True):
                    assert same_bits(value, again)


@for_rules_with_free_values
def projection_is_idempotent(case: Case) -> None:
    rule = case.tied().rule
    for dtype in DTYPES:
        for _ in range(5):
            once = rule.project(torch.randn(rule.bound_layout.shape).to(dtype))
            assert once.dtype == dtype
            assert_satisfies(rule, once)
            assert same_bits(rule.project(once), once)


@for_rules_with_free_values
def registration_is_the_least_squares_projection(case: Case) -> None:
    dense = case.dense(torch.float64)
    weight = dense.weight
    host = case.tie(dense)
    matrix = expansion_matrix(host.rule)
    solved = torch.linalg.lstsq(matrix, weight.reshape(-1, 1)).solution[:, 0]
    torch.testing.assert_close(flat(host.free), solved, rtol=0, atol=1e-14)
    generic = flat(tp.Rule.right_inverse(host.rule, weight))
    torch.testing.assert_close(flat(host.free), generic, rtol=0, atol=1e-15)
    torch.testing.assert_close(host.weight.flatten(), matrix @ solved, rtol=0, atol=1e-14)


@for_rules_with_free_values
def projection_is_the_rounded_one_in_every_dtype(case: Case) -> None:
    rule = case.tied().rule
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(rule.bound_layout.shape).to(dtype)
        exact = rule.project(weight.double())
        # one rounding to the dtype, and in float32 those of the accumulation
        eps = torch.finfo(dtype).eps
        bound = {"rtol": eps, "atol": 4 * torch.finfo(torch.float32).eps}
        torch.testing.assert_close(rule.project(weight).double(), exact, **bound)


@for_rules_with_free_values
def no_lawful_weight_is_nearer_than_the_projection(case: Case) -> None:
    rule = case.tied().rule
    weight = torch.randn(rule.bound_layout.shape, dtype=torch.float64)
    error = weight - rule.project(weight)
    assert error.norm() > 0.1
    for _ in range(10):
        step = rule(*(torch.randn(s, dtype=torch.float64) for s in rule.free_shapes()))
        assert abs(float((error * step).sum())) < 1e-12 * float(error.norm() * step.norm() + 1)
        for length in (1e-3, -1e-3, 1.0, -1.0):
            assert (error - length * step).norm() > error.norm()


@for_rules_with_free_values
def no_value_is_stored_that_is_not_needed(case: Case) -> None:
    host = case.tied(torch.float64)
    rule, shape = host.rule, host.weight.shape
    stored = sum(parameter.numel() for parameter in host.free)
    assert [tuple(p.shape) for p in host.free] == [tuple(s) for s in rule.free_shapes()]
    assert 0 < stored < shape.numel()
    assert stored == rule.free_count
    jacobians = torch.autograd.functional.jacobian(
        lambda *free: rule(*free), tuple(p.detach() for p in host.free)
    )
    jacobian = torch.cat([j.reshape(shape.numel(), -1) for j in jacobians], dim=1)
    assert torch.linalg.matrix_rank(jacobian) == stored
    # every lawful weight can be reached: the law, stated without forward, leaves no more
    assert lawful_dimension(rule, shape) == stored


@for_rules_with_free_values
def free_values_own_their_bytes(case: Case) -> None:
    for dtype in DTYPES:
        host = case.dense(dtype)
        dense = host.weight
        case.tie(host)
        assert host.free
        for parameter in host.free:
            assert parameter.is_contiguous()
            assert parameter.is_leaf
            assert owned_bytes(parameter)
        for values in (
            host.rule.right_inverse(dense),
            tp.Rule.right_inverse(host.rule, dense),
            host.rule.representatives(dense),
            tp.Rule.representatives(host.rule, dense),
        ):
            assert [tuple(v.shape) for v in values] == [tuple(p.shape) for p in host.free]
            for value in values:
                assert value.dtype == dtype
                assert owned_bytes(value)
                assert value.untyped_storage().data_ptr() != dense.untyped_storage().data_ptr()


@for_rules_with_free_values
def optimizer_state_is_as_small_as_the_free_values(case: Case) -> None:
    host = case.tied()
    optimizer = torch.optim.Adam(host.free)
    host.layer(*sample_input(host.layer)).square().mean().backward()
    optimizer.step()
    for parameter in host.free:
        moments = [v for v in optimizer.state[parameter].values() if v.dim()]
        assert len(moments) == 2
        for moment in moments:
            assert moment.shape == parameter.shape
            assert owned_bytes(moment)


@for_rules_with_free_values
def labels_number_the_orbits(case: Case) -> None:
    rule = case.tied().rule
    labels, matrix = rule.orbit_labels(), expansion_matrix(rule)
    assert labels.shape == rule.bound_layout.shape
    expected = torch.zeros_like(matrix)
    entry = torch.arange(len(matrix))
    expected[entry, labels.flatten().abs() - 1] = labels.flatten().sign().double()
    assert torch.equal(matrix, expected)  # disjoint signed orbits, and no entry without one


@for_rules_with_free_values
def multiplicities_count_the_copies(case: Case) -> None:
    rule = case.tied().rule
    counts = torch.bincount(rule.orbit_labels().flatten().abs() - 1, minlength=rule.free_count)
    assert counts.sum() == math.prod(rule.bound_layout.shape)
    assert torch.equal(flat(rule.multiplicities()), counts.double())
    assert torch.equal(flat(tp.Rule.multiplicities(rule)), counts.double())


@for_rules_with_free_values
def representatives_are_members_of_their_orbits(case: Case) -> None:
    rule = case.tied().rule
    labels = rule.orbit_labels().flatten()
    for dtype in DTYPES:
        weight = distinct_values(labels.numel(), dtype).reshape(rule.bound_layout.shape)
        assert weight.unique().numel() == weight.numel()
        for chosen in (rule.representatives(weight), tp.Rule.representatives(rule, weight)):
            values = flat(chosen)
            assert values.numel() == rule.free_count
            for number, value in enumerate(values, start=1):
                members = weight.flatten()[labels.abs() == number]
                signs = labels[labels.abs() == number].sign()
                assert value in members * signs


@for_rules_with_free_values
def rescale_multiplies_by_the_root_of_the_multiplicity(case: Case) -> None:
    dense = case.dense(torch.float64)
    weight = dense.weight.flatten()
    host = case.tie(dense, init="rescale")
    labels = host.rule.orbit_labels().flatten()
    index = labels.abs() - 1
    sums = torch.zeros(host.rule.free_count, dtype=torch.float64)
    sums.scatter_add_(0, index, weight * labels.sign())
    expected = sums / torch.bincount(index).double().sqrt()
    torch.testing.assert_close(flat(host.free), expected, rtol=1e-13, atol=1e-14)


@for_every_rule
def residual_is_zero_for_lawful_and_zero_weights(case: Case) -> None:
    host = case.tied()
    assert host.rule.residual(host.weight) == 0
    if not is_copy(case):
        assert host.rule.residual(torch.zeros_like(host.weight)) == 0
    assert host.rule.residual(torch.randn_like(host.weight)) > 0.1


@for_rules_with_free_values
def residual_of_independent_entries_is_what_the_counts_say(case: Case) -> None:
    rule = case.tied().rule
    shape = rule.bound_layout.shape
    draws = [rule.residual(torch.randn(shape)) for _ in range(400)]
    assert max(draws) <= 1 + 1e-6
    square = sum(r * r for r in draws) / len(draws)
    assert abs(square - (1 - rule.free_count / math.prod(shape))) < 0.02


# Gradients -------------------------------------------------------------------------------


@for_rules_with_free_values
def gradient_is_the_sum_over_each_orbit(case: Case) -> None:
    host = case.tied(torch.float64)
    twin = stock_twin(case, host)
    inputs = sample_input(host.layer)
    host.layer(*inputs).pow(3).sum().backward()
    twin(*inputs).pow(3).sum().backward()
    dense = getattr(twin, host.tensor_name).grad.flatten()
    assert dense.norm() > 0
    labels = host.rule.orbit_labels().flatten()
    sums = torch.zeros(host.rule.free_count, dtype=torch.float64)
    sums.scatter_add_(0, labels.abs() - 1, dense * labels.sign())
    gradient = flat(parameter.grad for parameter in host.free)
    bound = {"rtol": 1e-12, "atol": 1e-12 * float(dense.norm())}
    torch.testing.assert_close(gradient, sums, **bound)
    torch.testing.assert_close(gradient, expansion_matrix(host.rule).T @ dense, **bound)
    adjoint = host.rule.adjoint(dense.reshape(host.weight.shape))
    torch.testing.assert_close(flat(adjoint), sums, **bound)


@for_copies
def gradients_of_a_copy_arrive_in_the_source(case: Case) -> None:
    host = case.tied(torch.float64)
    twin = stock_twin(case, host)
    inputs = sample_input(host.layer)
    host.layer(*inputs).pow(3).sum().backward()
    twin(*inputs).pow(3).sum().backward()
    dense = getattr(twin, host.tensor_name).grad
    assert dense.norm() > 0
    ((source, name),) = host.rule.sources()
    value = getattr(source, name)
    (expected,) = torch.autograd.grad(host.rule.fn(value), value, dense)
    torch.testing.assert_close(value.grad, expected, rtol=1e-12, atol=1e-12)


@for_every_rule
def gradcheck_and_gradgradcheck_pass(case: Case) -> None:
    host = case.tied(torch.float64)
    caller = Caller(host)
    names = [name for name, _ in caller.named_parameters()]
    inputs = sample_input(host.layer, batch=1)
    values = [p.detach().clone().requires_grad_() for p in caller.parameters()]

    def output(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        return torch.func.functional_call(caller, given, inputs)

    assert torch.autograd.gradcheck(output, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(output, values, fast_mode=True)
    if host.free:
        free = [p.detach().clone().requires_grad_() for p in host.free]
        assert torch.autograd.gradcheck(host.rule, free)
        assert torch.autograd.gradgradcheck(host.rule, free)


# The layer -------------------------------------------------------------------------------


@for_every_rule
def layer_computes_what_its_dense_twin_computes(case: Case) -> None:
    for dtype in DTYPES:
        host = case.tied(dtype)
        twin = stock_twin(case, host)
        assert type(twin).__module__.startswith("torch.nn")
        assert not parametrize.is_parametrized(twin)
        ours = [x.clone().requires_grad_(x.is_floating_point()) for x in sample_input(host.layer)]
        theirs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in ours]
        output, expected = host.layer(*ours), twin(*theirs)
        assert output.dtype == dtype
        torch.testing.assert_close(output, expected, **COMPUTE[dtype])
        output.sum().backward()
        expected.sum().backward()
        for x, y in zip(ours, theirs, strict=True):
            if x.is_floating_point():
                torch.testing.assert_close(x.grad, y.grad, **COMPUTE[dtype])


@for_every_rule
def layer_stays_of_its_class_and_shows_the_tie(case: Case) -> None:
    host = case.dense()
    stock = type(host.layer)
    case.tie(host)
    assert isinstance(host.layer, stock)
    assert issubclass(type(host.layer), stock)
    assert parametrize.is_parametrized(host.layer, host.tensor_name)
    assert tp.is_tied(host.layer, host.tensor_name)
    assert isinstance(host.rule, case.rule)
    shown = repr(host.layer)
    assert case.name in shown
    assert host.rule.law in shown
    assert f"{host.rule.free_count} of {host.weight.numel()} values" in shown
    for key, value in host.rule.options().items():
        assert f"{key}={value!r}" in shown


@for_every_rule
def untying_leaves_a_plain_layer(case: Case) -> None:
    host = case.dense()
    stock = type(host.layer)
    order = [name for name, _ in host.model.named_parameters()]
    case.tie(host)
    lawful = host.weight
    assert tp.remove_tie(host.layer, host.tensor_name) is host.layer
    parameter = getattr(host.layer, host.tensor_name)
    assert type(host.layer) is stock
    assert type(parameter) is nn.Parameter
    assert not parametrize.is_parametrized(host.layer)
    assert same_bits(host.weight, lawful)
    assert parameter.is_contiguous()
    assert owned_bytes(parameter)
    assert [name for name, _ in host.model.named_parameters()] == order
    storages = [p.untyped_storage().data_ptr() for p in host.model.parameters()]
    assert len(set(storages)) == len(storages)


@for_every_rule
def deepcopy_is_independent(case: Case) -> None:
    host = case.tied()
    before = host.weight
    model = copy.deepcopy(host.model)
    twin = Host(model, model.get_submodule(case.example.path), host.tensor_name)
    assert type(twin.layer) is type(host.layer)
    assert torch.equal(twin.weight, before)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in host.model.parameters()}
    twin.layer(*sample_input(twin.layer)).square().sum().backward()
    assert any(p.grad is not None for p in twin.model.parameters())
    assert all(p.grad is None for p in host.model.parameters())
    with torch.no_grad():
        for parameter in twin.model.parameters():
            parameter.mul_(3)
    assert not torch.equal(twin.weight, before)
    assert torch.equal(host.weight, before)
    assert_lawful(twin)
    tp.remove_tie(twin.layer, twin.tensor_name)
    assert tp.is_tied(host.layer, host.tensor_name)
    assert torch.equal(host.weight, before)
    assert_lawful(host)


@for_every_rule
def state_dict_has_the_free_values_for_the_weight(case: Case) -> None:
    host = case.dense()
    expected = {key: tuple(value.shape) for key, value in host.model.state_dict().items()}
    case.tie(host)
    prefix = f"{case.example.path}." if case.example.path else ""
    del expected[f"{prefix}{host.tensor_name}"]
    for index, shape in enumerate(host.rule.free_shapes()):
        expected[f"{prefix}parametrizations.{host.tensor_name}.original{index}"] = tuple(shape)
    entries = host.model.state_dict()
    assert {key: tuple(value.shape) for key, value in entries.items()} == expected


@for_every_rule
def saved_files_hold_the_free_values_to_the_byte(case: Case) -> None:
    host = case.dense()
    numbers = sum(p.numel() for p in host.model.parameters())
    dense_count = host.weight.numel()
    case.tie(host)
    numbers += host.rule.free_count - dense_count
    assert sum(p.numel() for p in host.model.parameters()) == numbers
    entries = host.model.state_dict()

    file = io.BytesIO()
    torch.save(entries, file)
    with zipfile.ZipFile(file) as archive:
        sizes = [entry.file_size for entry in archive.infolist() if "/data/" in entry.filename]
    assert len(sizes) == len(entries)
    assert sum(sizes) == 4 * numbers

    saved = safetensors.torch.save(entries)
    header = 8 + int.from_bytes(saved[:8], "little")
    assert len(saved) - header == 4 * numbers
    other = case.tied(seed=1)
    other.model.load_state_dict(safetensors.torch.load(saved))
    assert torch.equal(other.weight, host.weight)


@for_every_rule
def compiled_layer_equals_the_eager_one(case: Case) -> None:
    torch._dynamo.reset()
    host = case.tied()
    inputs = sample_input(host.layer)
    compiled = torch.compile(host.layer, fullgraph=True, backend="aot_eager")
    results = []
    for layer in (host.layer, compiled):
        host.model.zero_grad()
        output = layer(*inputs)
        output.square().sum().backward()
        gradients = [p.grad.clone() for p in host.model.parameters() if p.grad is not None]
        assert gradients
        results.append([output.detach(), *gradients])
    torch.testing.assert_close(results[1], results[0], **COMPUTE[torch.float32])


@for_rules_with_free_values
def memory_format_of_the_weight_does_not_matter(case: Case) -> None:
    expected = case.tied().weight
    stock_entries = tp.dense_state_dict(case.tied().model)
    tried = 0
    for rearrange in (_with_gaps, _with_swapped_channels, _channels_last):
        host = case.dense()
        dense = host.weight
        rearranged = rearrange(dense)
        if rearranged is None:
            continue
        tried += 1
        assert torch.equal(rearranged, dense)
        assert not rearranged.is_contiguous() or 1 in dense.shape
        setattr(host.layer, host.tensor_name, nn.Parameter(rearranged))
        case.tie(host)
        assert torch.equal(host.weight, expected)
        assert all(owned_bytes(parameter) for parameter in host.free)
        safetensors.torch.save(host.model.state_dict())  # takes contiguous tensors only
        host.model.load_state_dict(stock_entries)
        assert torch.equal(host.weight, expected)
    assert tried


def _with_gaps(weight: Tensor) -> Tensor | None:
    gaps = weight.new_zeros(*weight.shape, 2)
    gaps[..., 0] = weight
    return gaps[..., 0]


def _with_swapped_channels(weight: Tensor) -> Tensor | None:
    if weight.dim() < 2:
        return None
    return weight.transpose(0, 1).contiguous().transpose(0, 1)


def _channels_last(weight: Tensor) -> Tensor | None:
    if weight.dim() != 4:
        return None
    return weight.clone(memory_format=torch.channels_last)


@for_rules_with_free_values
def effective_weight_can_be_assigned(case: Case) -> None:
    host, other = case.tied(), case.tied(seed=1)
    before = host.weight
    identities = [id(parameter) for parameter in host.free]
    unlawful = torch.randn_like(before)
    with pytest.raises(tp.TieError, match="project=True"):
        tp.assign_(host.layer, unlawful, host.tensor_name)
    assert torch.equal(host.weight, before)
    setattr(host.layer, host.tensor_name, other.weight)
    assert same_bits(host.weight, other.weight)
    tp.assign_(host.layer, unlawful, host.tensor_name, project=True)
    assert torch.equal(host.weight, host.rule.project(unlawful))
    assert [id(parameter) for parameter in host.free] == identities


@for_copies
def a_copy_stores_nothing(case: Case) -> None:
    host = case.dense()
    count = len(list(host.model.parameters()))
    case.tie(host)
    assert len(list(host.model.parameters())) == count - 1
    assert host.free == []
    assert list(host.rule.parameters()) == list(host.rule.buffers()) == []
    assert list(host.rule.modules()) == [host.rule]  # the source is nobody's submodule
    assert host.rule.free_shapes() == ()
    assert host.rule.free_count == 0
    assert host.rule.right_inverse(host.weight) == ()
    assert host.rule.representatives(host.weight) == ()
    assert host.rule.multiplicities() == ()


# Running it ------------------------------------------------------------------------------

CASES = cases_of(tp.available_rules())
CASES_WITH_FREE_VALUES = [case for case in CASES if not is_copy(case)]
CASES_OF_COPIES = [case for case in CASES if is_copy(case)]


def _is_canonical(case: Case) -> bool:
    layer = case.dense().layer
    return not isinstance(layer, _ConvNd) or (layer.groups == 1 and not layer.transposed)


CANONICAL_CASES = [case for case in CASES_WITH_FREE_VALUES if _is_canonical(case)]


@pytest.mark.parametrize("statement", EVERY, ids=statement_name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_rule(case, statement):
    statement(case)


@pytest.mark.parametrize("statement", FREE, ids=statement_name)
@pytest.mark.parametrize("case", CASES_WITH_FREE_VALUES, ids=str)
def test_rule_with_free_values(case, statement):
    statement(case)


@pytest.mark.parametrize("statement", COPY, ids=statement_name)
@pytest.mark.parametrize("case", CASES_OF_COPIES, ids=str)
def test_copy(case, statement):
    statement(case)


def test_every_rule_is_enrolled():
    rules = tp.available_rules()
    assert rules.keys() >= {"channel_shared", "copy", "flip_sym", "row_repeat", "squared_copy"}
    assert {case.name for case in CASES} == rules.keys()
    for name, rule in rules.items():
        assert rule.name == name
        assert "=" in rule.law
        assert rule.__doc__
    assert {case.name for case in CASES_OF_COPIES} == {"copy", "squared_copy"}
    # a rule with free values must also work for those who use torch's own function
    enrolled = {case.name for case in CASES_WITH_FREE_VALUES}
    assert {case.name for case in CANONICAL_CASES} == enrolled


@pytest.mark.feature(
    "Other parametrizations", "a rule given to `parametrize.register_parametrization`"
)
@pytest.mark.parametrize("case", CANONICAL_CASES, ids=str)
def test_rule_is_an_ordinary_parametrization(case):
    host = case.dense()
    rule = case.rule(**case.example.options)
    parametrize.register_parametrization(host.layer, host.tensor_name, rule)
    assert torch.equal(host.weight, case.tied().weight)
    assert_satisfies(rule, host.weight)
    host.layer(*sample_input(host.layer)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in host.free)


FIRST_CASES = [next(case for case in CASES if case.name == name) for name in tp.available_rules()]


@pytest.mark.feature(
    "Optimizers", "SGD, Adam, AdamW, single-tensor, foreach and fused: the law after 100 steps"
)
@pytest.mark.parametrize("variant", ["single", "foreach", "fused"])
@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_law_holds_under_every_optimizer(case, kind, variant):
    law_holds_after_100_steps_of(kind, variant, case)


@pytest.mark.feature(
    "Compile and export", "`torch.compile` with inductor: a training step of every rule"
)
@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_inductor_compiles_a_training_step(case):
    torch._dynamo.reset()
    host = case.tied()
    inputs = sample_input(host.layer)
    compiled = torch.compile(host.layer, fullgraph=True)
    losses = []
    for layer in (host.layer, compiled):
        host.model.zero_grad()
        output = layer(*inputs)
        output.square().sum().backward()
        losses.append([output.detach()] + [p.grad.clone() for p in host.layer.parameters()])
    torch.testing.assert_close(losses[1], losses[0], **COMPUTE[torch.float32])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "kind", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d], ids=lambda k: k.__name__
)
def test_canonical_entries_are_what_the_layer_computes(kind, groups):
    layer = kind(4, 6, 3, groups=groups, bias=False, dtype=torch.float64)
    entries = canonical_entries(layer)
    dims = len(layer.kernel_size)
    # the answer to one impulse in one channel is the kernel, which a convolution mirrors
    size = 1 if isinstance(layer, _ConvTransposeNd) else 5
    seen = 0
    for channel in range(4):
        impulse = torch.zeros(1, 4, *[size] * dims, dtype=torch.float64)
        impulse[(0, channel, *[size // 2] * dims)] = 1
        answer = layer(impulse)[0]
        if not isinstance(layer, _ConvTransposeNd):
            answer = answer.flip(tuple(range(1, dims + 1)))
        for output, *position in itertools.product(*map(range, answer.shape)):
            own_group = output // (6 // groups) == channel // (4 // groups)
            index = (output, channel % (4 // groups), *position)
            assert answer[(output, *position)] == (entries[index] if own_group else 0)
            seen += own_group
    assert seen == len(entries) == layer.weight.numel()
