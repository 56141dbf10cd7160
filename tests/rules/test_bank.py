"""Layers that share templates: the start, who owns them, and what may become of the layers."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import tiedparam as tp
from tests.support.unchanged import everything

pytestmark = pytest.mark.filterwarnings("error::tiedparam.TieWarning")


def dense(count: int = 5, size: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(size, size) for _ in range(count)))


def banked(order=range(5), templates: int = 2, known: bool = True) -> nn.Sequential:
    """A model with a bank, of which the first in this order owns the templates."""
    model = dense()
    tp.tie_bank([model[i] for i in order], templates, root=model if known else None)
    return model


def weights(model: nn.Module) -> torch.Tensor:
    """The weights of all layers, one a row."""
    return torch.stack([layer.weight.detach().flatten() for layer in model])


def nearest(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """The truncated singular value decomposition, by numpy."""
    left, sizes, right = np.linalg.svd(rows.double().numpy(), full_matrices=False)
    return torch.from_numpy(left[:, :rank] * sizes[:rank] @ right[:rank])


def owners(model: nn.Module) -> list[int]:
    """Which layers have templates."""
    named = enumerate(model)
    return [i for i, layer in named if tp.is_tied(layer) and not tp.get_tie(layer).reads_layers]


@contextlib.contextmanager
def unchanged(model: nn.Module, *optimizers: torch.optim.Optimizer):
    before = everything(model, *optimizers)
    yield
    assert everything(model, *optimizers) == before


X = torch.linspace(-1, 1, 12).view(3, 4)


# The start ----------------------------------------------------------------------------------


@pytest.mark.parametrize("templates", [1, 2, 5])
def test_the_weights_are_the_nearest_of_that_rank(templates):
    model = dense()
    wanted = nearest(weights(model), templates)
    found = tp.tie_bank(iter(model), templates)
    assert found == list(model)
    torch.testing.assert_close(weights(model).double(), wanted, rtol=0, atol=1e-6)
    for layer, rule in zip(model, map(tp.get_tie, model), strict=True):
        assert str(rule) == f"bank(templates={templates})"
        assert rule.free_count == templates * (17 if layer is model[0] else 1)
    rows = tp.report(model).rows()
    distances = (weights(model) - weights(dense())).norm(dim=1) / weights(dense()).norm(dim=1)
    torch.testing.assert_close(torch.tensor([row["residual"] for row in rows]), distances)


def test_templates_are_stored_once():
    model = banked()
    keys = [key for key in model.state_dict() if "weight" in key]
    assert keys[:2] == [f"0.parametrizations.weight.original{i}" for i in range(2)]
    assert keys[2:] == [f"{i}.parametrizations.weight.original0" for i in range(1, 5)]
    totals = tp.report(model).totals
    assert all(p.is_contiguous() for p in model.parameters())  # which sharding asks for
    assert totals.values_stored == 2 * 16 + 5 * 2 + 5 * 4
    assert totals.values_dense == 5 * 20
    assert "1.weight of" not in tp.report(model).to_markdown()
    assert tp.report(model).rows()[1]["rule"] == "bank(templates=2) of 0.weight"
    assert "reads 0.weight in this Sequential" in repr(model[3])
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_layers_that_store_their_weights_otherwise_share_in_the_canonical_layout():
    ordinary, turned = nn.Conv1d(4, 6, 3, groups=2), nn.ConvTranspose1d(4, 6, 3, groups=2)
    layout = tp.Layout((4, 3, 3), 2, True)
    rows = torch.stack([ordinary.weight.detach(), layout.canonical(turned.weight.detach())])
    tp.tie_bank([ordinary, turned], 1)
    found = torch.stack([ordinary.weight.detach(), layout.canonical(turned.weight.detach())])
    wanted = nearest(rows.flatten(1), 1)
    torch.testing.assert_close(found.flatten(1).double(), wanted, rtol=0, atol=1e-6)


def test_equal_layers_leave_no_dead_direction():
    model = dense()
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(model[0].weight)
    before = weights(model)
    tp.tie_bank(model, 3)
    torch.testing.assert_close(weights(model), before)
    sum(layer(X).pow(3).sum() for layer in model).backward()
    templates, own = tp.free_values(model[0]).values()
    assert (own.grad != 0).all()
    assert templates.grad[0].any()


def steps(parameters, output) -> list[float]:
    """The losses of four steps of Adam."""
    optimizer, losses = torch.optim.Adam(parameters, lr=0.01), []
    for _ in range(4):
        loss = output().square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_it_trains_as_the_sums_written_out():
    model = banked()
    values = [[v.detach().clone() for v in tp.free_values(layer).values()] for layer in model]
    templates = values[0].pop(0)
    plain = [templates, *(own for (own,) in values), *(m.bias.detach().clone() for m in model)]
    templates, *rest = (value.requires_grad_() for value in plain)

    def written_out():
        x = X
        for coefficients, bias in zip(rest[:5], rest[5:], strict=True):
            x = nn.functional.linear(x, (coefficients[:, None, None] * templates).sum(0), bias)
        return x

    found = steps(list(model.parameters()), lambda: model(X))
    np.testing.assert_allclose(found, steps(plain, written_out), rtol=1e-5)


# What is refused ----------------------------------------------------------------------------


def wider(model):
    model[2] = nn.Linear(4, 5)


def tied(model):
    tp.register_tie(model[3], "flip_sym")


def shared(model):
    model[3].weight = model[1].weight


def infinite(model):
    model[2].weight.data[0, 0] = torch.inf


def frozen(model):
    model[2].weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        (None, {"templates": 0}, "templates=0 is not a number from 1 to 5"),
        (None, {"templates": 6}, "templates=6 is not a number from 1 to 5"),
        (None, {"templates": True}, "templates=True is not a number"),
        (None, {"layers": ["0", "1", "0"]}, "a layer is listed twice"),
        (None, {"layers": ["0"]}, "at least two layers"),
        (None, {"layers": ["0", "7"]}, "the model has no layer '7'"),
        (None, {"layers": ["0", "1"], "root": None}, "'0' is a path.*Pass root=model"),
        (None, {"tensor_name": "scale"}, "'0.scale': the layer has no such tensor"),
        (wider, {}, r"different shapes: \(4, 4\) of '0.weight', \(5, 4\) of '2.weight'"),
        (tied, {}, "'3.weight': it is tied by 'flip_sym' already"),
        (shared, {}, "'1.weight': it shares its Parameter with '3.weight'"),
        (infinite, {}, "not all of their entries are finite"),
        (frozen, {}, "different requires_grad"),
        (lambda model: model[2].double(), {}, "different dtypes"),
        (lambda model: model.to(torch.complex64), {}, "no meaning for torch.complex64"),
    ],
)
def test_what_does_not_fit_changes_nothing(change, arguments, said):
    model = dense()
    if change is not None:
        change(model)
    with unchanged(model), pytest.raises(tp.TieError, match=said):
        tp.tie_bank(**{"layers": list("01234"), "templates": 2, "root": model, **arguments})


def test_biases_have_fewer_entries_than_layers():
    model = dense(6)
    with pytest.raises(tp.TieError, match="templates=5 is more than the 4 entries"):
        tp.tie_bank(model, 5, "bias")
    tp.tie_bank(model, 4, "bias")


def test_arguments_of_a_wrong_type():
    with pytest.raises(TypeError, match="layers= takes several layers or paths"):
        tp.tie_bank("01", 1)
    with pytest.raises(TypeError, match="registered on an nn.Module, not on int"):
        tp.tie_bank([1, 2], 1)
    with pytest.raises(TypeError, match="templates= takes the number"):
        tp.register_tie(nn.Linear(2, 2), "bank")


def test_a_failure_midway_is_rolled_back():
    model = dense()
    optimizer = torch.optim.SGD(model[:3].parameters(), lr=0.1)  # holds three of five
    refused = pytest.raises(tp.TieError, match="none of the optimizers holds it")
    with unchanged(model, optimizer), refused:
        tp.tie_bank(model, 2, optimizer=optimizer, root=model)
    tp.tie_bank(model, 2, root=model)


def test_one_layer_alone_begins_no_bank():
    model = dense()
    for attempt in (
        lambda: tp.register_tie(model[0], "bank", templates=1),
        lambda: tp.residual(model[0], "bank", templates=1),
        lambda: tp.tie_model(model, {"*": ("bank", {"templates": 2})}),
    ):
        with unchanged(model), pytest.raises(tp.TieError, match="by tiedparam.tie_bank"):
            attempt()
    with torch.device("meta"):
        empty = nn.Linear(4, 4)
    with pytest.raises(tp.TieError, match="by tiedparam.tie_bank"):
        tp.register_tie(empty, "bank", templates=1)
    with pytest.raises(tp.TieError, match="by tiedparam.tie_bank"):
        parametrize.register_parametrization(model[0], "weight", tp.rules.Bank(1))


def test_a_layer_joins_by_its_nearest_coefficients():
    model = banked([1, 0, 2])
    templates = tp.free_values(model[1])["parametrizations.weight.original0"].detach().flatten(1)
    for number, member in ((3, "1"), (4, "2")):  # by the owner, or by another one
        goal = model[number].weight.detach().flatten()
        before = weights(model[:3])
        tp.tie_model(model, {str(number): ("bank", {"source": member})})
        solved = np.linalg.lstsq(templates.T.double().numpy(), goal.double().numpy(), rcond=None)[0]
        found = next(iter(tp.free_values(model[number]).values())).detach()
        torch.testing.assert_close(found.double(), torch.from_numpy(solved), rtol=1e-5, atol=1e-6)
        assert torch.equal(weights(model[:3]), before)
    with pytest.raises(tp.TieError, match=r"\(2, 4, 4\) in common, and this one needs \(2, 3, 3\)"):
        tp.register_tie(nn.Linear(3, 3), "bank", source=model[0])
    with pytest.raises(tp.TieError, match=r"in common, and this one needs \(3, 4, 4\)"):
        tp.register_tie(nn.Linear(4, 4), "bank", source=model[0], templates=3)
    with pytest.raises(tp.TieError, match="is not tied by 'bank'"):
        tp.register_tie(nn.Linear(4, 4), "bank", source=nn.Linear(4, 4))


# Untying ------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False], ids=["root", "no root"])
@pytest.mark.parametrize("order", [range(5), [3, 1, 0, 4, 2]], ids=["in order", "mixed"])
def test_untying_one_leaves_the_others_whole(order, known):
    model = banked(order, known=known)
    templates = model[order[0]].parametrizations.weight.original0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    before, output = weights(model), model(X)
    for position, number in enumerate(order):  # the owner each time
        assert owners(model) == [number]
        tp.remove_tie(model[number], optimizer=optimizer)
        assert type(model[number]) is nn.Linear
        assert torch.equal(weights(model), before)
        held = {id(p) for p in optimizer.param_groups[0]["params"]}
        assert held == {id(p) for p in model.parameters()}
        left = order[position + 1 :]
        assert owners(model) == list(left[:1])
        if left:
            assert model[left[0]].parametrizations.weight.original0 is templates
            assert tp.owner(templates).layer is model[left[0]]
            assert templates._tiedparam_free.startswith("'weight' of Linear")  # for the guard
        for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(each(X), output)
        model(X).sum().backward()
        optimizer.step()
        assert not left or templates.grad.any()
        optimizer.zero_grad()
        optimizer.state.clear()


def test_untying_a_reader_leaves_the_owner():
    model = banked()
    before = weights(model)
    tp.remove_tie(model[2])
    assert torch.equal(weights(model), before)
    assert owners(model) == [0]
    model[2].weight.data.zero_()
    assert torch.equal(weights(model)[3:], before[3:])


@pytest.mark.parametrize("cast", [0, 1], ids=["owner", "reader"])
def test_a_layer_that_was_cast_alone_is_untied_in_its_own_dtype(cast):
    model = banked()
    before = weights(model)
    model[cast].half()
    kept = torch.float16 if cast == 1 else torch.float32
    for use in (lambda: model[1].weight, lambda: model[1](X.to(kept))):
        with pytest.raises(tp.TieError, match=r"now, and the tied layer's own .* Convert both"):
            use()
    with unchanged(model), pytest.raises(tp.TieError, match="Convert all layers that share them"):
        tp.remove_tie(model[0])
    tp.remove_tie(model[1])
    assert model[1].weight.dtype == kept
    torch.testing.assert_close(
        model[1].weight.detach().flatten().float(), before[1], atol=1e-2, rtol=0
    )
    tp.untie_model(model)
    assert [layer.weight.dtype for layer in model] == [layer.bias.dtype for layer in model]


def test_layers_that_are_cast_together_go_on():
    model = banked()
    model[0].half()
    model.float()
    tp.remove_tie(model[0])
    assert owners(model) == [1]


def test_untying_is_rolled_back():
    model = banked()
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(X).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    model.zero_grad()
    keys = list(model.state_dict())
    with pytest.raises(tp.TieError, match="LBFGS holds one history"):
        tp.remove_tie(model[0], optimizer=optimizer)
    assert list(model.state_dict()) == keys
    assert owners(model) == [0]
    output = model(X)
    assert torch.equal(copy.deepcopy(model)(X), output)
    tp.untie_model(model)
    assert torch.equal(model(X), output)
    assert list(model.state_dict()) == list(dense().state_dict())


def test_paths_of_nested_layers_follow_the_templates():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    net = nn.ModuleDict({"enc": nn.Sequential(Block(), Block()), "dec": Block()})
    tp.tie_bank(["enc.0.a", "enc.0.b", "dec.a", "enc.1.b", "dec.b"], 2, root=net)
    shown = {"enc.0.b": "a.weight in this Block", "enc.1.b": "0.a.weight in this Sequential"}
    shown |= {"dec.a": "enc.0.a.weight in this ModuleDict"}
    for path, text in shown.items():
        assert f"reads {text}" in repr(net.get_submodule(path))
    tp.remove_tie(net["enc"][0].a)
    tp.remove_tie(net["enc"][0].b)
    shown = {"enc.1.b": "dec.a.weight in this ModuleDict", "dec.b": "a.weight in this Block"}
    for path, text in shown.items():
        assert f"reads {text}" in repr(net.get_submodule(path))
        assert net.get_submodule(path).weight.isfinite().all()
        values = net.get_submodule(path).parametrizations.weight
        (place,) = values.reading.places  # a shallow clone is told by it
        assert place.common_root.get_submodule(".".join(place.to_values)) is values
    net["dec"].a = nn.Linear(4, 4)
    with pytest.raises(tp.TieError, match="source 'a.weight' .* remove_tie hands on what it shar"):
        net["dec"].b(X)


def test_templates_that_torch_removed_are_missed():
    model = banked()
    before = weights(model)
    parametrize.remove_parametrizations(model[0], "weight")
    with pytest.raises(tp.TieError, match="the source '0.weight' of a 'bank.*was exchanged"):
        model(X)
    for layer in model[1:]:
        tp.remove_tie(layer)
    assert torch.equal(weights(model), before)


def test_a_copy_of_a_bank_keeps_its_own_templates():
    model = banked([3, 1, 0, 4, 2])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (place,) = tp.get_tie(other[0]).sources()
        assert place[0] is other[3].parametrizations.weight
        tp.remove_tie(other[3])
        assert (len(owners(other)), owners(model)) == (1, [3])
        assert torch.equal(weights(other), weights(model))
    with pytest.raises(tp.TieError, match="without its source"):
        copy.deepcopy(model[0])


def test_several_banks_and_copies_beside_each_other():
    model = nn.ModuleList(nn.LSTM(4, 4) for _ in range(3))
    for name in ("weight_hh_l0", "weight_ih_l0"):
        tp.tie_bank(model, 1, name, root=model)
    tail = tp.register_tie(nn.Linear(4, 16), "copy", source=model[0], source_name="weight_ih_l0")
    before = [model[1](X)[0], model[2](X)[0], tail(X)]
    tp.remove_tie(model[0], "weight_ih_l0")
    assert all(map(torch.equal, before, [model[1](X)[0], model[2](X)[0], tail(X)]))
    assert not tp.get_tie(model[1], "weight_ih_l0").reads_layers
    assert tp.get_tie(model[1], "weight_hh_l0").reads_layers


# Optimizers ---------------------------------------------------------------------------------


def test_state_begins_anew_with_one_warning():
    model = dense()
    optimizer = torch.optim.AdamW(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tp.tie_bank(model, 2, optimizer=optimizer)
    (warning,) = [w for w in caught if issubclass(w.category, tp.TieWarning)]
    assert "tying 5 tensors by 'bank(templates=2)': the AdamW starts the state of its new" in str(
        warning.message
    )
    free = [p for layer in model for p in tp.free_values(layer).values()]
    assert all(not optimizer.state.get(p) for p in free)
    assert all(optimizer.state.get(layer.bias) for layer in model)
    assert {id(p) for p in model.parameters()} == {
        id(p) for p in optimizer.param_groups[0]["params"]
    }
    model(X).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    templates = free[0]
    state = optimizer.state[templates]
    with pytest.warns(tp.TieWarning, match="untying .*the AdamW starts the state of its new"):
        tp.remove_tie(model[0], optimizer=optimizer)
    assert optimizer.state[templates] is state  # the templates go on
    model(X).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("apart", [False, True], ids=["one optimizer", "two"])
def test_the_names_that_an_optimizer_has_follow_the_templates(apart):
    model = dense(3)

    def names() -> dict[str, int]:
        return {name: id(value) for name, value in model.named_parameters()}

    def held() -> list[tuple[str, int]]:
        groups = [group for each in optimizers for group in each.param_groups]
        return sorted(
            (name, id(value))
            for group in groups
            for name, value in zip(group["param_names"], group["params"], strict=True)
        )

    if apart:  # the templates are held where the coefficients are not
        tp.tie_bank(model, 2, root=model)
        (first, *others) = (
            (name, value) for name, value in model.named_parameters() if "original" in name
        )
        biases = [(f"{i}.bias", layer.bias) for i, layer in enumerate(model)]
        optimizers = [torch.optim.SGD(each) for each in ([first, *biases], others)]
    else:
        optimizers = [torch.optim.AdamW(model.named_parameters())]
        tp.tie_bank(model, 2, root=model, optimizer=optimizers)
    assert held() == sorted(names().items())
    tp.remove_tie(model[0], optimizer=optimizers)
    assert held() == sorted(names().items())
    tp.register_tie(model[0], "bank", source=model[1], root=model, optimizer=optimizers)
    assert held() == sorted(names().items())
    if not apart:  # a dense weight cannot come of values in two
        tp.untie_model(model, optimizer=optimizers)
        assert held() == sorted(names().items())


def test_a_pending_gradient_goes_to_templates_and_coefficients():
    model = dense()
    model(X).square().sum().backward()
    gradients = [layer.weight.grad.clone() for layer in model]
    tp.tie_bank(model, 2, root=model)
    values = [list(tp.free_values(layer).values()) for layer in model]
    templates = values[0].pop(0)
    total = sum(own[:, None, None] * g for (own,), g in zip(values, gradients, strict=True))
    torch.testing.assert_close(templates.grad, total.detach())
    for (own,), gradient in zip(values, gradients, strict=True):
        torch.testing.assert_close(own.grad, (templates.detach() * gradient).sum((1, 2)))
    with pytest.raises(tp.TieError, match="Call zero_grad first"):
        tp.remove_tie(model[0])
    assert owners(model) == [0]


def test_a_warning_that_is_an_error_changes_nothing():
    model = dense()
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    with unchanged(model, optimizer), pytest.raises(tp.TieWarning, match="adds its decay"):
        tp.tie_bank(model, 2, optimizer=optimizer, root=model)


# Writing one weight ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 2], ids=["owner", "reader"])
def test_writing_one_weight_leaves_the_others(number):
    model = banked()
    layer, before = model[number], weights(model)
    templates = model[0].parametrizations.weight.original0.detach().flatten(1).double()
    goal = torch.randn(4, 4)

    def wanted(value):
        solved = np.linalg.lstsq(templates.T.numpy(), value.flatten().double().numpy(), rcond=None)
        return (torch.from_numpy(solved[0]) @ templates).view(4, 4).float()

    with pytest.raises(tp.TieError, match="the value breaks the law"):
        tp.assign_(layer, goal)
    tp.assign_(layer, goal, project=True)
    torch.testing.assert_close(layer.weight.detach(), wanted(goal))
    layer.weight = layer.weight.detach().clone()
    tp.init_(layer, nn.init.ones_)
    torch.testing.assert_close(layer.weight.detach(), wanted(torch.ones(4, 4)))
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    torch.testing.assert_close(layer.weight.detach(), wanted(nn.Linear(4, 4).weight.detach()))
    others = [i for i in range(5) if i != number]
    assert torch.equal(weights(model)[others], before[others])


# Dictionaries and files -----------------------------------------------------------------------


@pytest.mark.parametrize("order", [range(5), [3, 1, 0, 4, 2]], ids=["in order", "mixed"])
def test_dense_entries_are_fitted_together(order, tmp_path):
    goal = dense()
    with torch.no_grad():
        for layer in goal:
            layer.weight.normal_()
    entries = goal.state_dict()
    wanted = nearest(weights(goal), 2)
    tp.export_dense(goal, tmp_path / "dense.safetensors")

    def loaded(how, model):
        if how == "file":
            tp.load(tmp_path / "dense.safetensors", model)
        elif how == "function":
            model.load_state_dict(tp.tie_state_dict(model, entries))
        else:
            model.load_state_dict(entries, assign=how == "assign")

    for how in ("load", "assign", "function", "file"):
        model = banked(order)
        with pytest.warns(tp.TieWarning, match="were not lawful and were projected"):
            loaded(how, model)
        torch.testing.assert_close(weights(model).double(), wanted, rtol=0, atol=1e-5)
        again = banked(order)  # lawful now, without a warning
        again.load_state_dict(tp.dense_state_dict(model))
        torch.testing.assert_close(weights(again), weights(model), rtol=0, atol=1e-5)
    with torch.device("meta"):
        empty = dense()
    tp.tie_bank([empty[i] for i in order], 2, root=empty)
    empty.load_state_dict(tp.dense_state_dict(model), assign=True)
    torch.testing.assert_close(weights(empty), weights(model), rtol=0, atol=1e-5)


def test_some_dense_entries_leave_the_templates():
    model, entries = banked(), dense().state_dict()
    templates = model[0].parametrizations.weight.original0.detach().clone()
    before = weights(model)
    for number in (0, 2):
        part = {f"{number}.weight": entries[f"{number}.weight"] + 1}
        with pytest.warns(tp.TieWarning, match=f"'{number}.weight'"):
            model.load_state_dict(part, strict=False)
        with pytest.raises(tp.TieError, match="follows from the entries of all|has no '0.param"):
            tp.tie_state_dict(model, part)
    assert torch.equal(model[0].parametrizations.weight.original0, templates)
    assert torch.equal(weights(model)[[1, 3, 4]], before[[1, 3, 4]])
    with torch.device("meta"):
        empty = dense()
    tp.tie_bank(empty, 2)
    with pytest.raises(RuntimeError, match="follows from the entries of all layers"):
        empty.load_state_dict({"0.weight": entries["0.weight"]}, strict=False, assign=True)


@pytest.mark.parametrize("order", [range(5), [3, 1, 0, 4, 2]], ids=["in order", "mixed"])
def test_a_file_ties_a_fresh_model(order, tmp_path):
    model, path = banked(order), tmp_path / "bank.safetensors"
    tp.save(model, path)
    with torch.device("meta"):
        empty = dense()
    for fresh in (dense(), banked(order), empty):
        tp.load(path, fresh)
        assert torch.equal(weights(fresh), weights(model))
        assert owners(fresh) == [order[0]]
        assert [row.residual for row in tp.report(fresh).ties] == pytest.approx(
            [row.residual for row in tp.report(model).ties], rel=1e-3
        )
    tp.remove_tie(fresh[order[0]])
    tp.save(fresh, path)
    others = [number for number in range(5) if number != order[0]]
    assert owners(fresh) == owners(tp.load(path, dense())) == others[:1]
    other = banked(order)
    with unchanged(other), pytest.raises(tp.TieError, match="it stores what layers share there"):
        tp.load(path, other)
    untied = tp.untie_state_dict(model, model.state_dict())
    assert list(untied) == list(dense().state_dict())
    assert all(torch.equal(untied[f"{i}.weight"], layer.weight) for i, layer in enumerate(model))


def test_a_file_whose_layers_differ_is_refused(tmp_path):
    tp.save(banked(), tmp_path / "bank.safetensors")
    model = dense()
    model[3] = nn.Linear(2, 8)
    with unchanged(model), pytest.raises(tp.TieError, match=r"this one needs \(2, 8, 2\)"):
        tp.load(tmp_path / "bank.safetensors", model)


def test_compiled_exported_and_frozen():
    model = banked([3, 1, 0, 4, 2]).eval()
    wanted = model(X)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), wanted)
    torch.testing.assert_close(torch.export.export(model, (X,)).module()(X), wanted)
    with tp.frozen(model), torch.inference_mode():
        torch.testing.assert_close(model(X), wanted)
        with pytest.raises(tp.TieError, match="remove_tie inside frozen"):
            tp.remove_tie(model[3])
    refused = pytest.raises(tp.TieError, match="remove_tie inside frozen")
    with tp.frozen(model[:2]), torch.inference_mode(), refused:
        tp.remove_tie(model[3])  # which would hand the templates to a layer in there


def test_untying_a_layer_that_shares_nothing_looks_at_no_others(monkeypatch):
    """Of a thousand layers each would look at all: untying a model would take seconds."""

    def looked_at():
        raise AssertionError("all tied layers were looked at")

    layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
    monkeypatch.setattr("tiedparam.tie.sharing.tied_layers", looked_at)
    tp.remove_tie(layer)
