"""Automatic differentiation and mixed precision through every rule, against the dense twin."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import tiedparam as tp
from tests.support.cases import FIRST_CASES, Caller, assert_lawful, sample_input

every_rule = pytest.mark.parametrize("case", FIRST_CASES, ids=str)


def tied_linear(n: int = 4) -> nn.Linear:
    return tp.register_tie(nn.Linear(n, n), "flip_sym")


# functional_call -----------------------------------------------------------------------------


@pytest.mark.feature("Automatic differentiation", "`torch.func.functional_call` with free values")
@every_rule
def test_functional_call_with_free_values(case):
    host, other = case.tied(), case.tied(seed=1)
    caller, values = Caller(host), dict(Caller(other).named_parameters())
    inputs = sample_input(host.layer)
    before = host.weight
    torch.testing.assert_close(functional_call(caller, values, inputs), other.layer(*inputs))
    assert torch.equal(host.weight, before)
    gradients = grad(lambda v: functional_call(caller, v, inputs).square().sum())(values)
    other.layer(*inputs).square().sum().backward()
    for name, parameter in values.items():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.feature(
    "Automatic differentiation",
    "`torch.func.functional_call` with the key of a tied weight",
    refused="the value would be written and get no gradient; give the free values by their keys",
)
@pytest.mark.parametrize("how", ["plain", "grad", "vmap", "stateless", "compiled"])
@pytest.mark.parametrize("rule", ["flip_sym", "copy"])
def test_functional_call_with_a_dense_key_raises_and_changes_nothing(rule, how):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tp.register_tie(model[1], rule, **({"source": model[0]} if rule == "copy" else {}))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, value = torch.randn(2, 4), torch.eye(4)

    def call(weight):
        return functional_call(model, {"0.bias": torch.ones(4), "1.weight": weight}, (x,)).sum()

    run = {
        "plain": lambda: call(value),
        "grad": lambda: grad(call)(value),
        "vmap": lambda: vmap(call)(value[None]),
        "stateless": lambda: torch.nn.utils.stateless._functional_call(
            model, {"1.weight": value.requires_grad_()}, (x,)
        ),
        "compiled": lambda: torch.compile(call, backend="eager")(value),
    }[how]
    with pytest.raises(tp.TieError, match=r"functional_call .* tied 'weight' .*named_parameters"):
        run()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model[0].bias, before["0.bias"])


@pytest.mark.feature(
    "Automatic differentiation",
    "assigning a tied weight under `grad`, `vmap`, `jvp`",
    refused="torch refuses to write a captured tensor; use `functional_call` with free values",
)
def test_assigning_under_a_transform_raises_and_changes_nothing():
    layer = tied_linear()
    before = layer.weight.clone()

    def assign(weight):
        layer.weight = weight
        return layer(torch.ones(1, 4)).sum()

    for transform in (grad, vmap, lambda f: lambda w: jvp(f, (w,), (w,))):
        value = torch.eye(4)[None] if transform is vmap else torch.eye(4)
        with pytest.raises(RuntimeError):
            transform(assign)(value)
        assert torch.equal(layer.weight, before)


# Derivatives ---------------------------------------------------------------------------------


def free_and_dense(case, exponent: int):
    """A loss as a function of the free values, and of the effective weight."""
    host = case.tied(torch.float64)
    twin, inputs = case.twin_of(host), sample_input(host.layer)
    caller = Caller(host)
    names = [name for name, _ in caller.named_parameters()]
    values = tuple(p.detach().clone() for p in caller.parameters())

    def of_free(*tensors):
        given = dict(zip(names, tensors, strict=True))
        return functional_call(caller, given, inputs).pow(exponent).sum()

    def of_weight(weight):
        return functional_call(twin, {host.tensor_name: weight}, inputs).pow(exponent).sum()

    return host, values, of_free, of_weight


@pytest.mark.feature("Automatic differentiation", "`grad`, `vjp`, `jacrev`, `jacfwd`, `jvp`")
@every_rule
def test_first_derivatives_agree_with_one_another_and_with_the_dense_layer(case):
    host, values, of_free, of_weight = free_and_dense(case, 3)
    indices = tuple(range(len(values)))
    backward = grad(of_free, indices)(*values)
    _, pull = vjp(of_free, *values)
    tangents = tuple(torch.randn_like(v) for v in values)
    _, along = jvp(of_free, values, tangents)
    inner = sum((g * t).sum() for g, t in zip(backward, tangents, strict=True))
    torch.testing.assert_close(along, inner)
    for other in (
        pull(torch.ones((), dtype=torch.float64)),
        jacrev(of_free, indices)(*values),
        jacfwd(of_free, indices)(*values),
    ):
        torch.testing.assert_close(other, backward)
    if host.free:
        of_dense = grad(of_weight)(host.weight)
        if host.rule.reads_layers:
            _, fold = vjp(lambda *free: host.rule(*host.rule.read(), *free), *host.free)
            expected = fold(of_dense)
        else:
            expected = host.rule.adjoint(of_dense)
        own = {id(value) for value in tp.free_values(host.layer, host.tensor_name).values()}
        stored = Caller(host).parameters()
        found = [g for g, value in zip(backward, stored, strict=True) if id(value) in own]
        torch.testing.assert_close(found, list(expected))


@pytest.mark.feature("Automatic differentiation", "`hessian`, double backward")
@pytest.mark.parametrize("rule", ["row_repeat", "flip_sym", "channel_shared"])
def test_second_derivatives_are_the_folded_ones_of_the_dense_layer(rule):
    layer = nn.Linear(3, 3, bias=False, dtype=torch.float64)
    tp.register_tie(layer, rule)
    x = torch.randn(5, 3, dtype=torch.float64)
    free = layer.parametrizations.weight.original0.detach()
    weight, tie = layer.weight.detach().clone(), tp.get_tie(layer)
    key = "parametrizations.weight.original0"
    of_free = lambda f: functional_call(layer, {key: f}, (x,)).pow(3).sum()  # noqa: E731
    of_weight = lambda w: (x @ w.t()).pow(3).sum()  # noqa: E731
    second = hessian(of_free)(free).reshape(free.numel(), free.numel())
    dense = hessian(of_weight)(weight).reshape(9, 9)
    expansion = jacrev(lambda f: tie(f))(free).reshape(9, free.numel())
    torch.testing.assert_close(second, expansion.t() @ dense @ expansion)
    # and twice backward through the layer itself
    parameter = layer.parametrizations.weight.original0
    (first,) = torch.autograd.grad(layer(x).pow(3).sum(), parameter, create_graph=True)
    (twice,) = torch.autograd.grad(first.square().sum(), parameter)
    flat = first.detach().flatten()
    torch.testing.assert_close(twice.flatten(), 2 * second @ flat)


@pytest.mark.feature("Automatic differentiation", "forward-mode AD with dual tensors")
@every_rule
def test_forward_mode_through_a_dual_input(case):
    host = case.tied(torch.float64)
    twin = case.twin_of(host)
    inputs = sample_input(host.layer)
    if not inputs[0].is_floating_point():
        pytest.skip("indices have no tangent")
    tangent = torch.randn_like(inputs[0])
    results = []
    for layer in (host.layer, twin):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(inputs[0], tangent)
            results.append(forward_ad.unpack_dual(layer(dual, *inputs[1:])).tangent)
    assert results[1].abs().sum() > 0
    torch.testing.assert_close(*results)


@pytest.mark.feature("Automatic differentiation", "`vmap`: per-sample gradients")
@every_rule
def test_per_sample_gradients_add_up(case):
    host = case.tied(torch.float64)
    caller, inputs = Caller(host), sample_input(host.layer, batch=3)
    values = {name: p.detach() for name, p in caller.named_parameters()}

    def loss(v, *one):
        return functional_call(caller, v, tuple(x[None] for x in one)).square().sum()

    each = vmap(grad(loss), (None, *[0] * len(inputs)))(values, *inputs)
    whole = grad(lambda v: functional_call(caller, v, inputs).square().sum())(values)
    for name in values:
        torch.testing.assert_close(each[name].sum(0), whole[name])


@pytest.mark.feature("Automatic differentiation", "activation checkpointing, reentrant and not")
@pytest.mark.parametrize("use_reentrant", [True, False])
@every_rule
def test_checkpointing_gives_the_same_gradients(case, use_reentrant):
    host = case.tied(torch.float64)
    inputs = [x.requires_grad_(x.is_floating_point()) for x in sample_input(host.layer)]
    if use_reentrant and not inputs[0].is_floating_point():
        pytest.skip("the reentrant variant needs an input with a gradient")
    results = []
    for checkpointed in (False, True):
        host.model.zero_grad()
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(host.layer, *inputs, use_reentrant=use_reentrant)
        else:
            y = host.layer(*inputs)
        y.square().sum().backward()
        results.append([p.grad.clone() for p in host.model.parameters() if p.grad is not None])
    assert results[0]
    torch.testing.assert_close(*results)


@pytest.mark.feature("Automatic differentiation", "gradients with respect to the effective weight")
def test_the_gradient_of_a_weight_that_was_read():
    layer = tied_linear()
    weight = layer.weight
    weight.retain_grad()
    (layer.weight.square().sum() + weight.sum()).backward()
    assert torch.equal(weight.grad, torch.ones(4, 4))
    assert layer.parametrizations.weight.original0.grad is not None


# Precision -----------------------------------------------------------------------------------


@pytest.mark.feature("Precision", "autocast to bfloat16 and float16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_rule
def test_autocast_keeps_float32_values_and_gradients(case, dtype):
    host = case.tied()
    twin = case.twin_of(host)
    inputs = sample_input(host.layer)
    with torch.autocast("cpu", dtype):
        output, expected = host.layer(*inputs), twin(*inputs)
    assert output.dtype is expected.dtype
    torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05)
    output.float().square().sum().backward()
    for parameter in host.model.parameters():
        assert parameter.dtype is torch.float32
        if parameter.grad is not None:
            assert parameter.grad.dtype is torch.float32
            assert parameter.grad.isfinite().all()


@pytest.mark.feature("Precision", "`torch.amp.GradScaler`: steps, and steps skipped on overflow")
def test_grad_scaler():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    tp.register_tie(model[0], "row_repeat", groups=2)
    tp.register_tie(model[2], "copy", source=model[0], root=model)
    reference = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.randn(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        plain.zero_grad()
        reference(x).square().mean().backward()
        expected = nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        plain.step()
        torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(model.state_dict(), reference.state_dict())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.zero_grad()
    scaler.scale(model(x).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.feature("Precision", "`model.half()`, `.bfloat16()`, `.double()`")
@every_rule
def test_casting_a_model(case):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        host = case.tied()
        host.model.to(dtype)
        twin = case.twin_of(host)
        inputs = sample_input(host.layer)
        output = host.layer(*inputs)
        assert output.dtype is dtype
        torch.testing.assert_close(output, twin(*inputs), rtol=2e-2, atol=2e-2)
        assert_lawful(host)
