"""The rule contract: statements about one law, each in a function that takes a `Case`.

Nothing here names a rule. Every function marked with `for_every_rule`,
`for_rules_with_free_values` or `for_copies` is one statement. ``tests/laws/test_contract.py`` makes
them of every registered rule and each of its examples; they can be called for a rule of one's own
as well (see ``tests/laws/test_user_rule.py``).

The law is judged through ``symmetries`` with ``torch.equal``, compute by the stock layer that
holds the expanded weight, and the mathematics by an explicit expansion matrix.
"""

from __future__ import annotations

import copy
import io
import math
import zipfile
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import tiedparam as tp
from tests.support.cases import (
    COMPUTE,
    DTYPES,
    Caller,
    Case,
    Host,
    assert_lawful,
    assert_satisfies,
    distinct_values,
    expansion_matrix,
    flat,
    is_copy,
    lawful_dimension,
    owned_bytes,
    same_bits,
    sample_input,
    stock_twin,
    unflatten,
)

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
    function = getattr(host.rule, "fn", torch.square)  # not the law's own forward
    (expected,) = torch.autograd.grad(function(value), value, dense)
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
