"""`tune` measures the forms of tied layers and keeps the fastest, and changes nothing else."""

from __future__ import annotations

import copy
import io
import time

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support import form_of
from tiedparam.laws import form
from tiedparam.model.stand_ins import untied_like
from tiedparam.rules import Circulant, RowRepeat
from tiedparam.tie.lookup import tie_of


class Clock:
    """Time that passes only where a function says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1e-6
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock.perf_counter)
    return clock


def circulant(clock, *, hurried=0.1, dense=1.0, wrong=False, serves=True, cost=2.0):
    """A law with one form more, which takes the given times."""

    class Timed(Circulant):
        def forward(self, *free):
            clock.now += dense
            return super().forward(*free)

        @form("hurried", cost=lambda rule, use: cost)
        def hurriedly(self, call):
            if not serves:
                return None
            clock.now += hurried
            weight = Circulant.forward(self, *call.free)
            return call.stock(call.input, weight + 1 if wrong else weight, call.bias)

    return Timed


def tied(law, features=4):
    return tp.register_tie(nn.Linear(features, features), law)


def test_the_fastest_form_is_kept(clock):
    layer = tied(circulant(clock))
    model, x = nn.Sequential(layer, nn.ReLU()), torch.randn(3, 4)
    assert form_of(layer) == "dense"
    report = tp.tune(model, x)
    (row,) = report.tuned
    assert (row.layer, row.automatic, row.form) == ("0", "dense", "hurried")
    assert set(row.times) == {"dense", "hurried"}
    assert row.gain_by_tuning == pytest.approx(10, rel=1e-3)
    assert report.rows()[0]["gain"] == row.gain
    assert "hurried, ms" in str(report)
    computing = tie_of(layer).computing
    assert computing.tuned == {False: "hurried"}
    assert computing.named(training=True) == "auto"
    before = clock.now
    with torch.no_grad():
        model(x)
    assert clock.now - before == pytest.approx(0.1, abs=1e-3)
    tp.tune(model, x, training=True)
    assert computing.tuned == {False: "hurried", True: "hurried"}


@pytest.mark.parametrize("training", [False, True])
def test_a_gain_is_one_over_the_layer_without_the_tie(clock, monkeypatch, training):
    linear = nn.functional.linear

    def slowly(*args, **kwargs):
        clock.now += 0.5
        return linear(*args, **kwargs)

    layer = tied(circulant(clock, hurried=1.0, dense=2.0))
    monkeypatch.setattr(nn.functional, "linear", slowly)
    (row,) = tp.tune(nn.Sequential(layer, layer), torch.randn(3, 4), training=training).tuned
    assert row.form == "hurried"
    assert row.untied.seconds == pytest.approx(2 * 0.5, rel=1e-3)
    assert row.times["dense"].seconds == pytest.approx(2 * 2.5, rel=1e-3)
    assert row.gain == row.untied.seconds / row.times["hurried"].seconds < 1
    assert tie_of(layer).computing.measured == {training: row.gain}
    (asked,) = tp.tune(tp.register_tie(nn.Linear(8, 8), "row_repeat", compute="dense"),
                       torch.randn(2, 8)).tuned  # fmt: skip
    assert asked.untied is asked.gain is None


def test_the_layer_without_the_tie_is_the_stock_layer():
    layer = tp.register_tie(nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular"), RowRepeat)
    tp.register_tie(layer, "row_repeat", "bias")
    layer.bias_scale = nn.Linear(1, 1)
    layer.register_buffer("counter", torch.zeros(1))
    layer.register_forward_hook(lambda *given: pytest.fail("a hook ran"))
    layer.parametrizations.weight.requires_grad_(False)
    made = untied_like(layer)
    assert type(made) is nn.Conv2d
    assert not tp.is_tied(made)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(made.weight, layer.weight)
    assert torch.equal(made.bias, layer.bias)
    # the stock operation, to the bit; the tied layer's form adds the bias on its own
    assert torch.equal(made(x), made._conv_forward(x, layer.weight, layer.bias))
    torch.testing.assert_close(made(x), layer.forward(x))
    assert {n: p.requires_grad for n, p in made.named_parameters(recurse=False)} == {
        "bias": True, "weight": False,
    }  # fmt: skip
    assert made.weight.data_ptr() != layer.weight.data_ptr()
    assert made.bias_scale is layer.bias_scale
    assert made.counter is layer.counter


def test_hooks_on_parameters_do_not_run():
    layer = tp.register_tie(nn.Linear(8, 8), "row_repeat")
    free, calls = layer.parametrizations.weight.original0, []
    for parameter in (free, layer.bias):
        parameter.register_hook(lambda grad: calls.append("hook"))
        parameter.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    held, x = dict(layer.named_parameters()), torch.randn(2, 8)
    (row,) = tp.tune(layer, x, training=True).tuned
    assert set(row.times) == {"dense", "reduced"}
    assert calls == []
    assert all(p is held[name] for name, p in layer.named_parameters())
    layer(x).sum().backward()
    assert sorted(calls) == ["accumulated"] * 2 + ["hook"] * 2


def test_a_form_that_is_slower_here_is_left_out(clock):
    layer = tied(circulant(clock, hurried=3.0, cost=0.1))
    assert form_of(layer) == "hurried"
    (row,) = tp.tune(layer, torch.randn(3, 4)).tuned
    assert (row.automatic, row.form) == ("hurried", "dense")
    assert row.gain_by_tuning == pytest.approx(3, rel=1e-3)
    x = torch.randn(2, 4)
    before = clock.now
    with torch.no_grad():
        layer(x)
    assert clock.now - before == pytest.approx(1, abs=1e-3)


def test_a_form_that_does_not_serve_is_not_measured(clock):
    layer = tied(circulant(clock, serves=False))
    (row,) = tp.tune(layer, torch.randn(3, 4)).tuned
    assert set(row.times) == {"dense"}
    assert row.form == row.automatic == "dense"


def test_times_of_all_calls_count(clock):
    layer = tied(circulant(clock))
    (row,) = tp.tune(nn.Sequential(layer, layer, layer), torch.randn(3, 4)).tuned
    assert row.times["dense"].seconds == pytest.approx(3, rel=1e-3)


def test_other_numbers_are_refused_and_nothing_changes(clock):
    good, bad = tied(circulant(clock)), tied(circulant(clock, wrong=True))
    model = nn.Sequential(good, bad)
    with pytest.raises(tp.TieError, match="'hurried' of .*on 1.weight gives other numbers"):
        tp.tune(model, torch.randn(3, 4))
    assert tie_of(good).computing.tuned == tie_of(bad).computing.tuned == {}
    assert not good._forward_pre_hooks
    with pytest.raises(tp.TieError, match="infinities or NaN for these inputs"):
        tp.tune(good, torch.full((3, 4), torch.nan))


class Raises(nn.Module):
    def forward(self, x):
        raise ValueError("broken")


def test_nothing_changes_if_the_model_raises(clock):
    model = nn.Sequential(nn.Dropout(), tied(circulant(clock)), Raises()).train()
    generator = torch.get_rng_state()
    with pytest.raises(ValueError, match="broken"):
        tp.tune(model, torch.randn(3, 4, generator=torch.Generator()))
    assert all(module.training for module in model.modules())
    assert tie_of(model[1]).computing.tuned == {}
    assert not model[1]._forward_pre_hooks
    assert torch.equal(generator, torch.get_rng_state())


@pytest.mark.parametrize("training", [False, True])
def test_model_and_input_are_as_before(clock, training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), tied(circulant(clock)), nn.Dropout())
    calls = []
    model[1].register_forward_hook(lambda *a: calls.append(1))
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    kept = x.clone()
    tp.tune(model, x, training=training)
    assert torch.equal(x, kept)
    assert model.training
    assert torch.equal(generator, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True)
    )
    assert calls == [1]


def test_the_choice_is_in_copies_but_in_no_state_dict_and_no_pickle():
    layer = tp.register_tie(nn.Linear(8, 8), "row_repeat")
    keys = list(layer.state_dict())
    tie_of(layer).computing.choose({False: "dense"})
    assert list(layer.state_dict()) == keys
    assert tie_of(copy.deepcopy(layer)).computing.tuned == {False: "dense"}
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert tie_of(loaded).computing.tuned == {}
    assert form_of(loaded) == "reduced"


def test_what_a_user_asked_for_stays():
    layer = tp.register_tie(nn.Linear(8, 8), "row_repeat", compute="dense")
    report = tp.tune(layer, torch.randn(2, 8))
    assert report.tuned[0].times == {}
    assert report.notes()[-1] == "Not measured: the model itself. compute= names the form."
    assert report.tuned[0].form == "dense"
    assert form_of(layer) == "dense"


def test_refused_while_compiling_and_inside_of_frozen():
    layer = tp.register_tie(nn.Linear(8, 8), "row_repeat").eval()
    x = torch.randn(2, 8)
    with tp.frozen(layer), pytest.raises(tp.TieError, match="tune inside frozen"):
        tp.tune(layer, x)
    with pytest.raises(tp.TieError, match="torch is tracing, or the model is a compiled one"):
        torch.func.vmap(lambda one: tp.tune(layer, one) and one)(x)
    with pytest.raises(TypeError, match="tune takes an nn.Module, not Tensor"):
        tp.tune(x)


def test_a_compiled_model_is_refused():
    layer = tp.register_tie(nn.Linear(8, 8), "row_repeat")
    with pytest.raises(tp.TieError, match="Tune the plain model, and compile it then"):
        tp.tune(torch.compile(layer), torch.randn(2, 8))


def test_what_was_measured_with_the_expansion_does_not_count_inside_of_frozen(clock):
    layer = tied(circulant(clock)).eval()
    x = torch.randn(3, 4)
    tp.tune(layer, x)
    with tp.frozen(layer), torch.no_grad():
        before = clock.now
        layer(x)
        assert clock.now - before < 0.05  # neither the form nor the expansion
    with torch.no_grad():
        before = clock.now
        layer(x)
    assert clock.now - before == pytest.approx(0.1, abs=1e-3)


def test_a_form_of_another_shape_is_told():
    class Wrong(Circulant):
        @form("wrong", cost=lambda rule, use: 2.0)
        def wrong(self, call):
            return call.input[..., :2]

    with pytest.raises(tp.TieError, match="'wrong' of .* gives an output or gradients of other"):
        tp.tune(tied(Wrong), torch.randn(3, 4))


def test_gradients_that_cancel_are_not_taken_for_wrong_ones():
    layer = tp.register_tie(nn.Linear(512, 512, bias=False), "skew", init="rescale")
    report = tp.tune(layer, torch.full((63, 512), 0.1), training=True)
    assert "panels" in report.tuned[0].times


def test_training_is_true_or_false():
    with pytest.raises(TypeError, match="training= takes True or False, not 'yes'"):
        tp.tune(nn.Linear(2, 2), torch.ones(1, 2), training="yes")


def test_a_model_without_forms_says_so():
    report = tp.tune(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    assert str(report) == "No tied layer has another form than the dense one."
    assert report.to_data()["kind"] == "tune"


@pytest.mark.parametrize("training", [False, True])
def test_real_forms_are_measured(training):
    layer = tp.register_tie(nn.Conv2d(64, 64, 3), "channel_shared")
    (row,) = tp.tune(layer, torch.randn(2, 64, 9, 9), training=training).tuned
    assert set(row.times) >= {"dense", "reduced"}
    assert all(time.seconds > 0 for time in row.times.values())


def test_a_layer_that_is_not_called_is_told():
    model = nn.Module()
    model.used, model.unused = (tp.register_tie(nn.Linear(4, 4), RowRepeat) for _ in range(2))
    model.forward = lambda x: model.used(x)
    report = tp.tune(model, torch.randn(2, 4))
    assert {row.layer: bool(row.times) for row in report.tuned} == {"used": True, "unused": False}
    assert report.notes()[-1].startswith("Not measured: unused. The model called")
    assert tie_of(model.unused).computing.tuned == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda():
    layer = tp.register_tie(nn.Linear(512, 512), "row_repeat").cuda()
    (row,) = tp.tune(layer, torch.randn(64, 512, device="cuda")).tuned
    assert set(row.times) == {"dense", "reduced"}
