"""Tying and untying: what is refused, that refusals change nothing, and the init modes."""
# ruff: noqa: E501

from __future__ import annotations

import copy
import inspect
import math
import re
import typing

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import tiedparam as tp
from tests.support.unchanged import snapshot, unchanged
from tiedparam.layer import tie_options


class WrongShape(tp.Rule):
    def free_shapes(self):
        return ((1,),)

    def forward(self, free):
        return free


class WrongType(WrongShape):
    def right_inverse(self, weight):
        return (weight.new_zeros(1),)

    def forward(self, free):
        return "a weight"


class WrongDtype(WrongType):
    def forward(self, free):
        return free.double().expand(self.bound_layout.shape).clone()


class Raising(WrongType):
    def forward(self, free):
        raise ZeroDivisionError("inside the rule")


class EmptyFree(WrongType):
    def free_shapes(self):
        return (self.bound_layout.shape, (0,))

    def right_inverse(self, weight):
        return (weight.clone(), weight.new_zeros(0))

    def forward(self, free, empty):
        return free.clone()


def with_hook():
    layer = nn.Linear(4, 4)
    layer.weight.register_hook(lambda g: g)
    return layer


def with_weight_norm():
    return torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


def integer_layer():
    layer = nn.Linear(4, 4, bias=False)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int64), requires_grad=False)
    return layer


SELF = object()
REFUSALS = [
    # layer, arguments, error, text
    (
        lambda: nn.Linear(4, 4),
        ("flip_symm",),
        {},
        tp.TieError,
        "no rule 'flip_symm'. Did you mean 'flip_sym'",
    ),
    (lambda: nn.Linear(4, 4), ("zzz",), {}, tp.TieError, "Known rules: bank, block_circulant"),
    (
        lambda: nn.Linear(4, 4),
        ("flip_sym", "wieght"),
        {},
        tp.TieError,
        "no such tensor. Its Parameters are 'weight', 'bias'",
    ),
    (
        lambda: nn.Linear(4, 4, bias=False),
        ("row_repeat", "bias"),
        {},
        tp.TieError,
        "built without bias",
    ),
    (
        lambda: nn.BatchNorm1d(4),
        ("row_repeat", "running_mean"),
        {},
        tp.TieError,
        "only Parameters can be tied",
    ),
    (
        lambda: nn.Sequential(nn.Linear(4, 4)),
        ("flip_sym",),
        {},
        tp.TieError,
        r"Pass one of its layers \('0'\), as layer.get_submodule\('0'\), or tie by names with",
    ),
    (lambda: nn.ReLU(), ("flip_sym",), {}, tp.TieError, "has no Parameters. Tie another one"),
    (
        lambda: nn.Linear(4, 6),
        ("flip_sym",),
        {},
        tp.TieError,
        r"out_channels \(6\) must equal in_channels \(4\). Tie a square layer, or use 'channel_shared'",
    ),
    (lambda: nn.Linear(4, 6), ("row_repeat",), {"groups": 4}, tp.TieError, "Choose a divisor of 6"),
    (lambda: nn.Linear(4, 6), ("row_repeat",), {"groups": 0}, tp.TieError, "positive integer"),
    (lambda: nn.Linear(4, 6), ("row_repeat",), {"groups": 2.0}, tp.TieError, "positive integer"),
    (
        lambda: nn.Linear(4, 6),
        ("row_repeat",),
        {"over": "in"},
        TypeError,
        "unexpected keyword argument 'over'",
    ),
    (
        lambda: nn.Conv2d(4, 6, 3),
        ("channel_shared",),
        {"over": "both"},
        tp.TieError,
        "Choose one of 'in', 'out'",
    ),
    (
        lambda: nn.Conv2d(4, 6, 3),
        ("channel_shared",),
        {"over": ["in"]},
        tp.TieError,
        "Choose one of 'in', 'out'",
    ),
    (lambda: nn.Conv2d(4, 6, 3), ("channel_shared",), {"over": "groups"}, tp.TieError, "groups=1"),
    (lambda: nn.Linear(4, 6), ("channel_shared", "bias"), {}, tp.TieError, "no input channels"),
    (
        lambda: nn.Linear(4, 4),
        ("flip_sym",),
        {"init": "best"},
        tp.TieError,
        "init='best' is unknown",
    ),
    (
        lambda: nn.Linear(4, 4),
        ("flip_sym",),
        {"init": "exact"},
        tp.TieError,
        "breaks the law .*residual",
    ),
    (lambda: nn.Linear(4, 4), ("copy",), {}, TypeError, "source"),
    (lambda: nn.Linear(4, 4), ("copy",), {"source": 3}, TypeError, "takes the layer to read"),
    (lambda: nn.Linear(4, 4), ("copy",), {"source": "0"}, tp.TieError, "Pass root=model"),
    (
        lambda: nn.Linear(4, 4),
        ("copy",),
        {"source": nn.Linear(4, 4), "fn": 3},
        TypeError,
        "takes a function",
    ),
    (
        lambda: nn.Linear(4, 4),
        ("copy",),
        {"source": nn.Linear(5, 4)},
        tp.TieError,
        r"\(4, 5\) gives \(4, 5\), and the tensor is \(4, 4\). Pass fn=",
    ),
    (
        lambda: nn.Linear(4, 4),
        ("copy",),
        {"source": nn.ReLU()},
        tp.TieError,
        "has no tensor 'weight'",
    ),
    (
        lambda: nn.Linear(4, 4),
        ("copy",),
        {"source": nn.Linear(4, 4).double()},
        tp.TieError,
        "Convert one of the layers",
    ),
    (lambda: nn.Linear(4, 4), ("copy",), {"source": SELF}, tp.TieError, "cycle"),
    (
        lambda: nn.Linear(4, 4),
        ("copy",),
        {"source": nn.Linear(4, 4), "init": "rescale"},
        tp.TieError,
        "no values of its own to rescale",
    ),
    (
        lambda: nn.Linear(4, 4),
        ("copy",),
        {"source": nn.Linear(4, 4), "init": "exact"},
        tp.TieError,
        "breaks the law",
    ),
    (
        lambda: nn.Linear(4, 4),
        ("copy",),
        {"source": nn.LazyLinear(4)},
        tp.TieError,
        "source is lazy",
    ),
    (
        lambda: nn.LazyLinear(4),
        ("row_repeat",),
        {},
        tp.TieError,
        "lazy and has no shape yet. Run one forward",
    ),
    (
        lambda: nn.Linear(4, 4).to(torch.complex64),
        ("flip_sym",),
        {},
        tp.TieError,
        "no meaning for torch.complex64",
    ),
    (integer_layer, ("row_repeat",), {}, tp.TieError, "no meaning for torch.int64"),
    (lambda: nn.Linear(0, 4), ("row_repeat",), {}, tp.TieError, "is empty"),
    (with_hook, ("flip_sym",), {}, tp.TieError, "gradient hooks"),
    (with_weight_norm, ("flip_sym",), {}, tp.TieError, "has another parametrization"),
    (
        lambda: nn.Linear(4, 4),
        (WrongShape,),
        {},
        tp.TieError,
        r"forward returns \(1,\), and the tensor is \(4, 4\)",
    ),
    (
        lambda: nn.Linear(4, 4),
        (WrongType(),),
        {},
        tp.TieError,
        r"forward returns str, and the tensor is \(4, 4\)",
    ),
    (
        lambda: nn.Linear(4, 4),
        (WrongDtype,),
        {},
        tp.TieError,
        "returns torch.float64, not torch.float32",
    ),
    (
        lambda: nn.Linear(4, 4),
        (Raising,),
        {},
        tp.TieError,
        "raised ZeroDivisionError: inside the rule",
    ),
    (lambda: nn.Linear(4, 4), (EmptyFree,), {}, tp.TieError, "free values is empty"),
    (lambda: nn.Linear(4, 4), (nn.ReLU,), {}, TypeError, "takes a name, a Rule subclass or a Rule"),
    (lambda: nn.Linear(4, 4), (3,), {}, TypeError, "takes a name, a Rule subclass or a Rule"),
    (lambda: nn.Linear(4, 4), ("flip_sym", 3), {}, TypeError, "tensor_name takes a string"),
    (lambda: nn.Linear(4, 4), ("flip_sym",), {"root": 3}, TypeError, "root= takes the model"),
    (lambda: nn.Linear(4, 4), ("flip_sym",), {"optimizer": 3}, TypeError, "takes torch optimizers"),
]


@pytest.mark.parametrize(
    ("make", "args", "kwargs", "error", "text"), REFUSALS, ids=[r[4][:30] for r in REFUSALS]
)
def test_a_refused_tie_names_the_reason_and_changes_nothing(make, args, kwargs, error, text):
    layer = make()
    kwargs = {k: layer if v is SELF else v for k, v in kwargs.items()}
    source = kwargs.get("source")
    lazy = isinstance(layer, nn.LazyLinear)
    before = (type(layer), dict(layer.__dict__)) if lazy else snapshot(layer)
    with pytest.raises(error, match=text) as caught:
        tp.register_tie(layer, *args, **kwargs)
    if lazy:
        assert (type(layer), dict(layer.__dict__)) == before
    else:
        assert unchanged(before, snapshot(layer))
    if isinstance(source, nn.Module):
        assert not source._load_state_dict_post_hooks
    if error is tp.TieError and "init" not in str(caught.value)[:5]:
        assert len(str(caught.value)) < 500  # never a whole model


def test_a_module_is_needed():
    with pytest.raises(TypeError, match="on an nn.Module, not on Tensor"):
        tp.register_tie(torch.zeros(2, 2), "flip_sym")


def test_already_tied_names_the_tie():
    layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
    before = snapshot(layer)
    with pytest.raises(tp.TieError, match=r"tied by 'flip_sym' already. Call remove_tie first"):
        tp.register_tie(layer, "row_repeat")
    assert unchanged(before, snapshot(layer))


def test_messages_name_the_path_where_the_root_is_known():
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Conv2d(3, 64, 3))})
    with pytest.raises(tp.TieError, match=r"cannot tie 'encoder\.0\.weight' by 'flip_sym': out_"):
        tp.register_tie(model["encoder"][0], "flip_sym", root=model)
    with pytest.raises(tp.TieError, match=r"cannot tie 'weight' of Conv2d\(3, 64, kernel_size"):
        tp.register_tie(model["encoder"][0], "flip_sym")


@pytest.mark.parametrize("where", ["register_parametrization", "move_gradient", "share_gradient"])
@pytest.mark.parametrize("tied_before", [True, False])
def test_a_failure_midway_is_rolled_back(monkeypatch, where, tied_before):
    from tiedparam.layer import host
    from tiedparam.state import optimizer_moves

    source, layer = nn.Linear(4, 4), nn.Linear(4, 4)
    layer(torch.ones(1, 4)).sum().backward()
    if tied_before:
        tp.register_tie(layer, "row_repeat", "bias", groups=2)
    optimizer = torch.optim.Adam([*layer.parameters(), *source.parameters()])
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    before, params = snapshot(layer), list(optimizer.param_groups[0]["params"])
    state = dict(optimizer.state)
    weight = layer.weight

    def fail(*args, **kwargs):
        if where == "register_parametrization":
            register(*args, **kwargs)  # torch has done its work, then something breaks
        raise MemoryError("midway")

    register = parametrize.register_parametrization
    module = {
        "register_parametrization": parametrize,
        "move_gradient": optimizer_moves,
        "share_gradient": optimizer_moves,
    }[where]
    monkeypatch.setattr(module, where, fail)
    with pytest.raises(MemoryError, match="midway"):
        tp.register_tie(layer, "copy", source=source, optimizer=optimizer)
    monkeypatch.undo()
    assert unchanged(before, snapshot(layer))
    assert layer.weight is weight
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in params]
    assert {id(p) for p in optimizer.state} == {id(p) for p in state}
    optimizer.step()
    tp.register_tie(layer, "copy", source=source, optimizer=optimizer)
    assert torch.equal(layer.weight, source.weight)
    assert host.stock_class(layer) is nn.Linear


def test_an_instance_serves_one_tensor():
    from tiedparam.rules.flip_sym import FlipSym

    rule = FlipSym()
    with pytest.raises(tp.TieError):
        tp.register_tie(nn.Linear(4, 6), rule)
    layer = tp.register_tie(nn.Linear(4, 4), rule)  # the refusal left it free
    assert tp.get_tie(layer) is rule
    with pytest.raises(tp.TieError, match="Make a new instance for every tensor"):
        tp.register_tie(nn.Linear(4, 4), rule)
    with pytest.raises(TypeError, match="go with a rule's name or class"):
        tp.register_tie(nn.Linear(4, 4), FlipSym(), groups=2)


@pytest.mark.parametrize("init", ["project", "rescale", "exact"])
def test_init_modes_on_a_lawful_weight(init):
    layer = tp.remove_tie(tp.register_tie(nn.Linear(4, 6), "row_repeat", groups=2))
    weight = layer.weight.detach().clone()
    tp.register_tie(layer, "row_repeat", groups=2, init=init)
    expected = weight * math.sqrt(3) if init == "rescale" else weight
    torch.testing.assert_close(layer.weight, expected, rtol=1e-6, atol=0)
    if init != "rescale":
        assert torch.equal(layer.weight, weight)


def test_exact_copies():
    source, layer = nn.Linear(3, 3), nn.Linear(3, 3)
    before = snapshot(layer)
    with pytest.raises(tp.TieError, match=r"breaks the law W = source\.W²"):
        tp.register_tie(layer, "squared_copy", source=source, init="exact")
    assert unchanged(before, snapshot(layer))
    with torch.no_grad():
        layer.weight.copy_(source.weight.square())
    lawful = layer.weight.detach().clone()
    tp.register_tie(layer, "squared_copy", source=source, init="exact")
    assert tp.is_tied(layer)
    assert torch.equal(layer.weight, lawful)


def test_remove_tie_gives_back_class_values_and_requires_grad():
    layer = nn.Conv2d(3, 3, 3)
    tp.register_tie(layer, "flip_sym")
    weight, x = layer.weight.clone(), torch.randn(1, 3, 8, 8)
    output = layer(x)
    assert tp.remove_tie(layer) is layer
    assert type(layer) is nn.Conv2d
    assert torch.equal(layer.weight, weight)
    torch.testing.assert_close(layer(x), output)
    assert list(layer.__dict__) == list(nn.Conv2d(3, 3, 3).__dict__)
    with pytest.raises(tp.TieError, match="is not tied, so there is no tie to remove") as caught:
        tp.remove_tie(layer)
    assert "untie_model" not in str(caught.value)


def test_remove_tie_of_a_model_names_what_unties_models():
    model = nn.Sequential(tp.register_tie(nn.Linear(4, 4), "flip_sym", init="rescale"))
    with pytest.raises(tp.TieError, match=r"Name what is tied in it, or call untie_model\."):
        tp.remove_tie(model)
    assert tp.is_tied(model)


def test_remove_tie_under_another_parametrization_is_refused():
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
    parametrize.register_parametrization(layer, "weight", Doubled())
    before = layer.weight.clone()
    with pytest.raises(tp.TieError, match="another parametrization is stacked on 'flip_sym'"):
        tp.remove_tie(layer)
    with pytest.raises(tp.TieError, match="another parametrization is stacked"):
        layer.weight = before
    alone = copy.deepcopy(layer)
    with pytest.raises(tp.TieError, match=r"\(del layer.*\)") as caught:
        tp.remove_tie(alone)
    exec(re.search(r"\((del .*?\])\)", str(caught.value))[1], {"layer": alone})
    assert torch.equal(2 * alone.weight, before)
    assert type(tp.remove_tie(alone)) is nn.Linear
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, before)
    assert type(layer) is nn.Linear


def test_is_tied_and_get_tie():
    model = nn.Sequential(nn.Linear(4, 4))
    assert not tp.is_tied(model[0])
    tp.register_tie(model[0], "flip_sym")
    assert tp.is_tied(model[0])
    assert tp.is_tied(model[0], "weight")
    assert not tp.is_tied(model[0], "bias")
    assert not tp.is_tied(model, recurse=False)
    assert str(tp.get_tie(model[0])) == "flip_sym"
    with pytest.raises(tp.TieError, match="'bias' of Linear.* is not tied"):
        tp.get_tie(model[0], "bias")


def test_residual_looks_and_leaves():
    layer = nn.Linear(4, 4)
    before = snapshot(layer)
    value = tp.residual(layer, "flip_sym")
    weight = layer.weight.detach()
    expected = (weight - weight.t()).norm() / 2 / weight.norm()
    assert value == pytest.approx(float(expected), rel=1e-6)
    assert unchanged(before, snapshot(layer))
    model = nn.Sequential(layer, nn.Linear(4, 4))
    assert tp.residual(layer, "copy", source="1", root=model) > 0
    with pytest.raises(tp.TieError, match="cannot compare .* with 'row_repeat"):
        tp.residual(layer, "row_repeat", groups=3)
    with pytest.raises(tp.TieError, match="no such tensor. Its Parameters are 'weight', 'bias'"):
        tp.residual(layer, "row_repeat", "no")
    with pytest.raises(tp.TieError, match="Pass one of its layers"):
        tp.residual(model, "row_repeat")
    tp.register_tie(layer, "flip_sym")
    assert tp.residual(layer, "flip_sym") == 0
    assert tp.residual(layer, "row_repeat") > 0


def test_attributes_of_the_parameter_travel():
    layer = nn.Conv2d(3, 3, 3)
    layer.weight.no_weight_decay = True
    tp.register_tie(layer, "flip_sym")
    assert all(p.no_weight_decay for p in layer.parametrizations.weight.parameters())
    tp.remove_tie(layer)
    assert layer.weight.no_weight_decay


def test_a_pending_gradient_travels_without_an_optimizer():
    layer = nn.Linear(3, 4)
    layer(torch.ones(1, 3)).sum().backward()
    tp.register_tie(layer, "row_repeat")
    (free,) = layer.parametrizations.weight.parameters()
    assert torch.equal(free.grad, torch.full((1, 3), 4.0))
    tp.remove_tie(layer)
    assert torch.equal(layer.weight.grad, torch.ones(4, 3))


def test_training_mode_and_frozen_state_are_kept():
    layer = nn.Linear(4, 4).eval()
    layer.weight.requires_grad_(False)
    tp.register_tie(layer, "flip_sym")
    assert not layer.parametrizations.training
    assert not layer.parametrizations.weight.original0.requires_grad
    assert layer.bias.requires_grad


def test_init_keeps_the_distribution_and_constants():
    layer = tp.register_tie(nn.Linear(400, 300), "row_repeat")
    assert tp.init_(layer, lambda w: nn.init.normal_(w, 0.0, 0.5)) is layer
    assert float(layer.weight.std()) == pytest.approx(0.5, rel=0.1)
    tp.init_(layer, nn.init.ones_)
    assert torch.equal(layer.weight, torch.ones(300, 400))
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(0)
    dense = nn.Linear(400, 300)
    assert float(layer.weight.std()) == pytest.approx(float(dense.weight.std()), rel=0.1)
    assert torch.equal(layer.bias, dense.bias)


def test_model_apply_initialises_with_copies_in_it():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tp.register_tie(model[1], "copy", source=model[0])
    weight = model[0].weight.clone()
    tp.init_(model[1], nn.init.zeros_)
    assert torch.equal(model[0].weight, weight)
    model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    assert torch.equal(model[0].weight, model[1].weight)
    assert not torch.equal(model[0].weight, weight)


def test_reset_parameters_after_to_empty():
    with torch.device("meta"):
        layer = tp.register_tie(nn.Linear(64, 32), "row_repeat", groups=4)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert 0 < float(layer.weight.std()) < 1
    assert torch.equal(layer.weight[0], layer.weight[7])


def test_reset_of_statistics_reaches_the_layer():
    layer = nn.BatchNorm1d(4)
    tp.register_tie(layer, "row_repeat")
    layer(torch.randn(8, 4) + 5)
    assert layer.num_batches_tracked == 1
    layer.reset_parameters()
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(4))
    assert torch.equal(layer.weight, torch.ones(4))


def test_a_deep_copied_rule_is_independent():
    layer = tp.register_tie(nn.Linear(4, 4), "row_repeat", groups=2)
    twin = copy.deepcopy(layer)
    assert tp.get_tie(twin) is not tp.get_tie(layer)
    with torch.no_grad():
        twin.parametrizations.weight.original0.zero_()
    assert layer.weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"padding_idx": 0}, "padding_idx keeps one row at zero"),
        ({"max_norm": 1.0}, "max_norm writes into single rows"),
        ({"sparse": True}, "its gradients are sparse"),
    ],
)
def test_embedding_options_that_a_law_cannot_keep_are_refused(options, text):
    layer = nn.Embedding(6, 4, **options)
    with pytest.raises(tp.TieError, match=text):
        tp.register_tie(layer, "row_repeat", groups=3)
    assert type(layer) is nn.Embedding


def test_a_function_that_works_in_place_is_refused_and_spares_the_source():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    before = model[0].weight.detach().clone()
    for call in (tp.register_tie, tp.residual):
        with pytest.raises(tp.TieError, match="fn changes the source's tensor in place"):
            call(model[1], "copy", source=model[0], fn=lambda w: w.mul_(2))
    assert torch.equal(model[0].weight, before)


def test_a_failed_untying_keeps_a_copy_guarded():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    tp.register_tie(model[1], "copy", source=model[0], root=model)
    optimizer = torch.optim.SGD([{"params": model[2].weight}, {"params": model[2].bias}], lr=0.1)
    with pytest.raises(tp.TieError, match="none holds its source"):
        tp.remove_tie(model[1], optimizer=optimizer)
    with pytest.raises(tp.TieError, match="cannot copy"):
        copy.deepcopy(nn.Sequential(model[1]))
    model[0] = nn.Linear(4, 4)
    with pytest.raises(tp.TieError, match="was exchanged"):
        model(torch.ones(1, 4))


def test_an_instance_survives_a_look_and_every_refusal():
    from tiedparam.rules.flip_sym import FlipSym

    rule, layer = FlipSym(), nn.Linear(4, 4)
    tp.residual(layer, rule)
    with pytest.raises(TypeError):
        tp.register_tie(layer, rule, optimizer="adam")
    optimizer = torch.optim.Adafactor(layer.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    with pytest.raises(tp.TieError, match="Adafactor keeps the second moments of rows"):
        tp.register_tie(layer, rule, optimizer=optimizer)
    tp.register_tie(layer, rule)


@pytest.mark.parametrize("rule", ["flip_sym", "copy"])
def test_tying_and_untying_in_inference_mode_leave_parameters_that_train(rule):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    options = {"source": model[1]} if rule == "copy" else {}
    with torch.inference_mode():
        tp.register_tie(model[0], rule, **options)
    model(torch.ones(1, 3)).sum().backward()
    assert all(p.grad is not None and not p.is_inference() for p in model.parameters())
    with torch.inference_mode():
        tp.remove_tie(model[0])
    assert not model[0].weight.is_inference()
    model(torch.ones(1, 3)).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_untying_refuses_to_lose_gradient_hooks(kind):
    layer = tp.register_tie(nn.Linear(3, 3), "flip_sym")
    handle = getattr(layer.parametrizations.weight.original0, kind)(lambda value: None)
    with pytest.raises(tp.TieError, match=r"gradient hooks.*Remove them first"):
        tp.remove_tie(layer)
    assert tp.is_tied(layer)
    handle.remove()
    tp.remove_tie(layer)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-23, 1e-16, 1.0, 1e17, 1e19, 1e37])
@pytest.mark.parametrize("rule", ["flip_sym", "row_repeat"])
def test_residuals_of_tiny_and_huge_weights(scale, rule):
    torch.manual_seed(0)
    values = torch.randn(32, 32)
    layer, scaled = nn.Linear(32, 32), nn.Linear(32, 32)
    with torch.no_grad():
        layer.weight.copy_(values)
        scaled.weight.copy_(values * scale)
    expected = tp.residual(layer, rule)
    assert expected > 0.5
    tolerance = 1e-3 if scale > 1e-37 else 0.1  # subnormal numbers have few digits
    assert tp.residual(scaled, rule) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(
    "init_fn", [torch.ones_like, lambda w: w.mul_(2), lambda w: w[0].zero_(), lambda w: None]
)
def test_an_init_function_must_fill_its_tensor(init_fn):
    layer = tp.register_tie(nn.Linear(3, 3), "flip_sym")
    before = layer.weight.clone()
    with pytest.raises(tp.TieError, match="init_fn left entries of 'weight'.*unfilled"):
        tp.init_(layer, init_fn)
    assert torch.equal(layer.weight, before)


def test_a_reset_of_the_bias_alone_leaves_the_weight():
    class Own(nn.Linear):
        def reset_parameters(self):
            nn.init.ones_(self.bias)

    layer = Own(3, 3)
    nn.init.eye_(layer.weight)
    tp.register_tie(layer, "flip_sym").reset_parameters()
    assert torch.equal(layer.weight, torch.eye(3))
    assert torch.equal(layer.bias, torch.ones(3))


def test_unknown_options_are_listed_with_the_known_ones():
    for options in ({"group": 2}, {"groups": 2, "over": "in"}):
        with pytest.raises(TypeError, match="'row_repeat'.*Its options are: groups=, compute="):
            tp.register_tie(nn.Linear(4, 4), "row_repeat", **options)
    with pytest.raises(TypeError, match="'copy'.*'source'.*Its options are: source=, source_name"):
        tp.register_tie(nn.Linear(4, 4), "copy")


def test_is_tied_asks_a_layer_or_all_of_a_model():
    layer = tp.register_tie(nn.Linear(3, 4), "row_repeat", init="rescale")
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), layer), nn.ReLU())
    assert tp.is_tied(model)
    assert tp.is_tied(model[0])
    assert tp.is_tied(layer)
    assert not tp.is_tied(model[0][0])
    assert not tp.is_tied(nn.Sequential(nn.Linear(3, 3)))
    # a name asks this very layer
    assert tp.is_tied(layer, "weight")
    assert not tp.is_tied(layer, "bias")
    assert not tp.is_tied(model, "weight")
    assert [part for part in model.modules() if tp.is_tied(part, recurse=False)] == [layer]
    tp.untie_model(model)
    assert not tp.is_tied(model)


def test_is_tied_of_parametrizations_that_are_no_ties():
    normed = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    assert not tp.is_tied(normed)
    assert not tp.is_tied(normed[0], "weight")


def test_a_layer_that_holds_tied_layers_is_not_tied_itself_for_the_library():
    attention = nn.MultiheadAttention(4, 2)
    tp.register_tie(attention.out_proj, "flip_sym")
    assert tp.is_tied(attention)
    tp.register_tie(attention, "row_repeat", "in_proj_weight", groups=3)  # and can be tied
    assert [row.layer for row in tp.report(attention).ties] == ["", "out_proj"]
    tp.untie_model(attention)


def test_register_tie_takes_by_name_what_it_declares():
    parameters = inspect.signature(tp.register_tie).parameters.values()
    own = [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    assert list(tie_options.TieArguments.__annotations__) == own
    hints = typing.get_type_hints(tp.register_tie)
    fields = typing.get_type_hints(tie_options.TieArguments)
    assert {name: hints[name] for name in own} == fields
