"""`frozen` and ``cache=True``: never a stale weight, never a lost gradient."""

import contextlib
import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize

import tiedparam as tp
from tiedparam.laws import Broadcast, Linked
from tiedparam.rules.row_repeat import RowRepeat
from tiedparam.tie.lookup import tie_of


@pytest.fixture(autouse=True)
def kept_whatever_its_size(request, monkeypatch):
    """Small layers are enough to see that nothing goes stale; only one test is about sizes."""
    if "sizes_as_they_are" not in request.fixturenames:
        monkeypatch.setattr(tp.available_rules()["flip_sym"], "gains_from_cache", True)


@pytest.fixture
def sizes_as_they_are():
    """Let `flip_sym` decide by its size whether it obeys ``cache=True``."""


def cached_conv(**settings):
    torch.manual_seed(0)
    conv = tp.register_tie(nn.Conv2d(6, 6, 3, padding=1), "flip_sym", cache=True, **settings)
    return conv.eval()


def frozen_model():
    """Three laws, a source and its copy, a norm and a layer without a tie."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Conv2d(8, 2, 1),
    )
    tp.register_tie(model[0], "flip_sym")
    tp.register_tie(model[2], "squared_copy", source=model[0], root=model)
    tp.register_tie(model[3], "copy", source=model[5], fn=tile, root=model)
    tp.register_tie(model[4], "channel_shared", over="in")
    return model.eval()


def tile(weight):
    return weight.reshape(4, 4, 1, 1).expand(4, 4, 3, 3)


IMAGE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
FEATURES = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(2))


def before_expanding(layer, note, name="weight"):
    """Call ``note`` whenever the rule expands; a hook would keep the weight from being cached."""
    rule = tp.get_tie(layer, name)

    class Noted(type(rule)):
        def forward(self, *free):
            note()
            return super().forward(*free)

    rule.__class__ = Noted


class Calls:
    """Counts the expansions of one rule."""

    def __init__(self, layer, name="weight"):
        self.count = 0
        before_expanding(layer, self.note, name)

    def note(self):
        self.count += 1


def stock_output(layer, x=FEATURES):
    """What a plain convolution with the weight of the free values gives."""
    rule = tp.get_tie(layer)
    weight = rule.forward(*(v.detach() for v in layer.parametrizations.weight.parameters()))
    return F.conv2d(x.to(weight.dtype), weight, layer.bias.detach(), padding=1)


def free(layer):
    return layer.parametrizations.weight._parameters["original0"]


# cache=True ---------------------------------------------------------------------------------


def test_the_cached_weight_is_used_in_eval_mode_without_gradients():
    conv = cached_conv()
    calls = Calls(conv)
    with torch.no_grad():
        first = conv(FEATURES)
        assert calls.count == 1
        for _ in range(3):
            assert torch.equal(conv(FEATURES), first)
        assert calls.count == 1
    with torch.inference_mode():
        assert torch.equal(conv(FEATURES), first)
    assert calls.count == 1
    assert torch.equal(first, stock_output(conv))


def test_s02_the_cache_carries_no_weight_into_a_forward_with_gradients():
    conv = cached_conv()
    with torch.no_grad():
        conv(FEATURES)
    conv(FEATURES).sum().backward()
    assert free(conv).grad is not None
    assert free(conv).grad.abs().sum() > 0


def test_s03_a_first_read_under_inference_mode_does_not_stop_training():
    conv = cached_conv()
    with torch.inference_mode():
        conv(FEATURES)
    conv.train()
    conv(FEATURES).sum().backward()
    with torch.no_grad():
        conv.eval()(FEATURES)
    conv(FEATURES).sum().backward()
    assert free(conv).grad.abs().sum() > 0


def test_training_mode_computes_every_time():
    conv = cached_conv().train()
    calls = Calls(conv)
    with torch.no_grad():
        conv(FEATURES)
        conv(FEATURES)
    assert calls.count == 2


def optimizer_step(kind, **settings):
    def mutate(conv):
        optimizer = kind(conv.parameters(), lr=0.1, **settings)
        for parameter in conv.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    return mutate


def in_place(conv):
    with torch.no_grad():
        free(conv).mul_(2)


def through_data(conv):
    free(conv).data.mul_(2)


def copied_into_data(conv):
    free(conv).data.copy_(torch.randn_like(free(conv)))


def new_data(conv):
    free(conv).data = torch.randn_like(free(conv))


def one_entry(conv):
    free(conv).data.view(-1)[-1] += 1


def through_numpy(conv):
    free(conv).detach().numpy()[...] *= 2


def through_dlpack(conv):
    torch.from_dlpack(free(conv).detach()).mul_(2)


def through_the_storage(conv):
    other = torch.randn_like(free(conv))
    free(conv).untyped_storage().copy_(other.untyped_storage())


def set_storage(conv):
    with torch.no_grad():
        free(conv).set_(torch.randn_like(free(conv)))


def swapped(conv):
    torch.utils.swap_tensors(free(conv), nn.Parameter(torch.randn_like(free(conv))))


def new_parameter(conv):
    conv.parametrizations.weight.original0 = nn.Parameter(torch.randn_like(free(conv)))


def recycled_parameter(conv):
    """S8: a new Parameter at the address and with the version of the old one, if it so falls."""
    shape = free(conv).shape
    del conv.parametrizations.weight._parameters["original0"]
    gc.collect()
    values = nn.Parameter(torch.randn(shape))
    others = conv.parametrizations.weight._parameters
    rest = dict(others)
    others.clear()
    others["original0"] = values
    others.update(rest)


def tied_checkpoint(conv):
    state = {key: torch.randn_like(value) for key, value in conv.state_dict().items()}
    conv.load_state_dict(state)


def assigned_checkpoint(conv):
    state = {key: torch.randn_like(value) for key, value in conv.state_dict().items()}
    conv.load_state_dict(state, assign=True)


@pytest.mark.filterwarnings("ignore::tiedparam.TieWarning")
def dense_checkpoint(conv):
    state = tp.dense_state_dict(conv)
    conv.load_state_dict({key: 2 * value for key, value in state.items()})


def assigned(conv):
    tp.assign_(conv, torch.randn(6, 6, 3, 3), project=True)


def initialised(conv):
    tp.init_(conv, nn.init.kaiming_normal_)


def reset(conv):
    conv.reset_parameters()


def vector(conv):
    parameters = list(conv.parametrizations.parameters())
    values = nn.utils.parameters_to_vector(parameters)
    nn.utils.vector_to_parameters(torch.randn_like(values), parameters)


def moving_average(conv):
    torch._foreach_lerp_([free(conv).data], [torch.ones_like(free(conv))], 0.5)


def inference_tensor(conv):
    with torch.inference_mode():
        free(conv).data.mul_(3)


def negated_zero(conv):
    """+0.0 and −0.0 are equal and yet not the same weight: 1/w tells them apart."""
    free(conv).data.neg_()


def cast(conv):
    conv.double()


def cast_and_back(conv):
    conv.to(torch.bfloat16).float()


CHANNELS = [
    in_place, through_data, copied_into_data, new_data, one_entry, through_numpy, through_dlpack,
    through_the_storage, set_storage, swapped, new_parameter, recycled_parameter,
    tied_checkpoint, assigned_checkpoint, dense_checkpoint, assigned, initialised, reset, vector,
    moving_average, inference_tensor, negated_zero, cast, cast_and_back,
]  # fmt: skip
OPTIMIZERS = [
    pytest.param(optimizer_step(kind, **{how: True} if how else {}), id=f"{kind.__name__}-{how}")
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
    for how in ("", "foreach", "fused")
]


@pytest.mark.feature("Inference caches", "`cache=True`: never stale, whatever writes")
@pytest.mark.parametrize("mutate", [*CHANNELS, *OPTIMIZERS])
def test_s04_s05_no_way_of_writing_leaves_the_cache_stale(mutate):
    conv = cached_conv()
    calls = Calls(conv)
    with torch.no_grad():
        before = conv(FEATURES)
        assert torch.equal(conv(FEATURES), before)
        assert calls.count == 1  # primed
    mutate(conv)
    x = FEATURES.to(free(conv).dtype)
    with torch.no_grad():
        after = conv(x)
        assert not torch.equal(after.float(), before)
        assert torch.equal(after, stock_output(conv, x))
        assert torch.equal(conv(x), after)


def test_s04_a_compiled_optimizer_leaves_no_stale_weight():
    conv = cached_conv()
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)

    @torch.compile(backend="aot_eager")
    def step():
        optimizer.step()

    for _ in range(2):
        with torch.no_grad():
            before = conv(FEATURES)
        for parameter in conv.parameters():
            parameter.grad = torch.ones_like(parameter)
        step()
        with torch.no_grad():
            after = conv(FEATURES)
        assert not torch.equal(before, after)
        assert torch.equal(after, stock_output(conv))


def test_a_write_by_another_process_is_seen():
    conv = cached_conv().share_memory()
    with torch.no_grad():
        before = conv(FEATURES)
    process = torch.multiprocessing.get_context("spawn").Process(
        target=_double_in_place, args=(free(conv),)
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0
    with torch.no_grad():
        after = conv(FEATURES)
    assert not torch.equal(before, after)
    assert torch.equal(after, stock_output(conv))


def _double_in_place(parameter):
    parameter.data.mul_(2)


def test_zeros_of_either_sign_and_nans_are_told_apart_by_bits():
    conv = nn.Conv2d(1, 1, (1, 2), bias=False)
    tp.register_tie(conv, "flip_sym", cache=True)
    conv.eval()
    calls = Calls(conv)
    x = torch.ones(1, 1, 1, 2)
    with torch.no_grad():
        free(conv).fill_(0.0)
        conv(x)
        free(conv).fill_(-0.0)
        conv(x)
        assert calls.count == 2
        free(conv).fill_(float("nan"))
        conv(x)
        conv(x)
        assert calls.count == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_and_memory_format_is_compared(dtype):
    conv = cached_conv().to(dtype=dtype, memory_format=torch.channels_last)
    x = FEATURES.to(dtype)
    calls = Calls(conv)
    with torch.no_grad():
        conv(x)
        conv(x)
        assert calls.count == 1
        free(conv)[-1, -1] += 1
        assert torch.equal(conv(x), F.conv2d(x, conv.weight.clone(), conv.bias, padding=1))


def test_complex_weights_are_compared(registry):
    @tp.register_rule("test_complex_rows")
    class Rows(tp.Rule):
        complex_valued = True
        law = "W[o] = w"

        def free_shapes(self):
            return ((1, self.bound_layout.shape[1]),)

        def forward(self, w):
            return w.expand(self.bound_layout.shape)

        def symmetries(self, weight):
            yield weight.roll(1, 0)

    linear = nn.Linear(3, 4, dtype=torch.complex64)
    tp.register_tie(linear, "test_complex_rows", cache=True).eval()
    x = torch.randn(2, 3, dtype=torch.complex64)
    calls = Calls(linear)
    with torch.no_grad():
        linear(x)
        before = linear(x)
        assert calls.count == 1
        free(linear).imag.add_(1)
        assert not torch.equal(linear(x), before)


def expansions_of_two_calls(layer, x):
    calls = Calls(layer.eval())
    with torch.no_grad():
        layer(x)
        layer(x)
    return calls.count


def test_laws_that_gain_nothing_ignore_the_cache():
    linear = tp.register_tie(nn.Linear(3, 4), "row_repeat", cache=True, compute="dense")
    assert expansions_of_two_calls(linear, torch.ones(1, 3)) == 2
    for name, rule in tp.available_rules().items():
        example = rule.examples()[0]
        model = example.build()
        layer = model.get_submodule(example.path) if example.path else model
        tp.register_tie(layer, name, example.tensor_name, root=model, **example.options)
        gains = tp.get_tie(layer, example.tensor_name).gains_from_cache
        if issubclass(rule, (Broadcast, Linked)):
            assert not gains, name


@pytest.mark.parametrize(("features", "expansions"), [(255, 2), (256, 1)])
def test_a_small_weight_is_computed_since_comparing_takes_as_long(
    sizes_as_they_are, features, expansions
):
    linear = tp.register_tie(nn.Linear(features, features), "flip_sym", cache=True, init="rescale")
    assert expansions_of_two_calls(linear, torch.ones(1, features)) == expansions


def test_a_weight_that_is_looked_up_is_kept_from_the_same_size_on():
    for features, gains in ((255, False), (256, True)):
        layer = tp.register_tie(nn.Linear(features, features), "masked", pattern="lower")
        assert tp.get_tie(layer).gains_from_cache is gains


def test_a_law_that_reads_other_layers_is_not_kept():
    """Comparing its free values would not show that a source has changed."""

    class Scaled(tp.available_rules()["squared_copy"]):
        gains_from_cache = True

    pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    tp.register_tie(pair[1], Scaled(source="0", source_name="weight"), root=pair, cache=True)
    x = torch.randn(2, 4)
    with torch.no_grad():
        before = pair[1](x)
        pair[0].weight.data.mul_(2)
        assert not torch.equal(pair[1](x), before)


def test_the_cache_is_in_no_state_dict_and_in_no_pickle():
    conv = cached_conv()
    plain = tp.register_tie(nn.Conv2d(6, 6, 3), "flip_sym").eval()
    size = len(pickle.dumps(conv))
    with torch.no_grad():
        conv(FEATURES)
    assert list(conv.state_dict()) == list(plain.state_dict())
    assert len(pickle.dumps(conv)) == size
    revived = pickle.loads(pickle.dumps(conv))
    calls = Calls(revived)
    with torch.no_grad():
        revived(FEATURES)
        assert torch.equal(revived(FEATURES), conv(FEATURES))
    assert calls.count == 1  # it came empty, and caches as it did


def test_s01_a_copy_has_a_cache_of_its_own():
    conv = cached_conv()
    with torch.no_grad():
        conv(FEATURES)
        twin = copy.deepcopy(conv)
        free(twin).mul_(2)
        assert torch.equal(twin(FEATURES), stock_output(twin))
        assert torch.equal(conv(FEATURES), stock_output(conv))
        assert not torch.equal(conv(FEATURES), twin(FEATURES))
        assert tie_of(twin).kept is not tie_of(conv).kept


def test_the_cached_weight_is_handed_to_nobody_else():
    conv = cached_conv()
    with torch.no_grad():
        before = conv(FEATURES)
        conv.weight.numpy()[...] = 0  # a write that torch does not see
        assert torch.equal(conv(FEATURES), before)


def test_a_cached_layer_is_freed_with_its_weight():
    conv = cached_conv()
    with torch.no_grad():
        conv(FEATURES)
    kept = weakref.ref(tie_of(conv).kept.kept[1])
    gc.disable()
    try:
        del conv
        assert kept() is None
    finally:
        gc.enable()


def test_s07_functional_call_and_transforms_see_the_values_that_they_are_given():
    conv = cached_conv()
    with torch.no_grad():
        conv(FEATURES)
        given = {k: 2 * v for k, v in conv.named_parameters()}
        output = torch.func.functional_call(conv, given, (FEATURES,))
        twin = copy.deepcopy(conv)
        twin.load_state_dict({k: v.detach() for k, v in given.items()})
        assert torch.equal(output, stock_output(twin))
        stacked = {k: torch.stack([v, 2 * v]) for k, v in conv.named_parameters()}
        mapped = torch.vmap(
            lambda values: torch.func.functional_call(conv, values, (FEATURES,))
        )(stacked)  # fmt: skip
        torch.testing.assert_close(mapped[1], output)
        assert torch.equal(conv(FEATURES), stock_output(conv))


@pytest.mark.parametrize("on", ["list", "rule", "source"])
@pytest.mark.parametrize("when", ["before", "inside"])
def test_s39_hooks_are_obeyed_in_a_frozen_block(on, when):
    model = frozen_model()
    tp.register_tie(model[5], "row_repeat", root=model)
    plain = [model[index].weight.detach().clone() for index in (2, 3, 5)]

    def hook():
        parts = {
            "list": (2, 3, 5),
            "rule": (2, 3, 5),
            "source": (0, 5),  # of the copies, and a layer of its own
        }[on]
        for index in parts:
            values = model[index].parametrizations.weight
            part = values[0] if on == "rule" else values
            handles.append(part.register_forward_hook(lambda module, args, weight: weight * 2))

    handles: list = []
    if when == "before":
        hook()
    with torch.no_grad(), tp.frozen(model):
        model(IMAGE)
        if when == "inside":
            hook()
        for index, was in zip((2, 3, 5), plain, strict=True):
            layer = model[index]
            x = torch.randn(1, layer.in_channels, 4, 4)
            factor = 4 if on == "source" and index == 2 else 2  # the square of the source
            if on != "source" and index == 3:
                factor = 4  # it copies model[5], which is hooked as well
            pad = layer.padding
            torch.testing.assert_close(layer.weight, factor * was)
            wanted = F.conv2d(x, factor * was, layer.bias, padding=pad)
            torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)
        if when == "inside":
            for handle in handles:
                handle.remove()


class RowsThroughAModule(tp.Rule):
    """A law of the user's that leaves part of the work to a module of torch's."""

    law = "W[o, c] = f[c]"

    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def free_shapes(self):
        return (self.bound_layout.shape[1:],)

    def forward(self, *free):
        return self.inner(free[0]).expand(self.bound_layout.shape)

    def right_inverse(self, weight):
        self.bind_shape(weight)
        return (weight.mean(0),)

    def symmetries(self, weight):
        yield weight.roll(1, 0)


@pytest.mark.parametrize("keep", ["cache", "frozen"])
@pytest.mark.parametrize("change", ["hook inside the rule", "the rule's class"])
def test_s39_a_kept_weight_is_not_used_past_what_changes_its_rule(monkeypatch, keep, change):
    layer = nn.Linear(4, 4)
    tp.register_tie(layer, RowsThroughAModule, init="rescale", cache=keep == "cache").eval()
    values = layer.parametrizations.weight
    x, was = torch.ones(1, 4), layer.weight.detach().clone()
    block = tp.frozen(layer) if keep == "frozen" else contextlib.nullcontext()
    with torch.no_grad(), block:
        layer(x)
        if change == "hook inside the rule":
            handle = values[0].inner.register_forward_hook(lambda module, args, out: out * 2)
        else:
            kind = type(values[0])
            plain = kind.forward
            monkeypatch.setattr(kind, "forward", lambda self, *free: plain(self, *free) * 2)
        torch.testing.assert_close(layer(x), F.linear(x, 2 * was, layer.bias))
        if change == "hook inside the rule":
            handle.remove()
        monkeypatch.undo()
        torch.testing.assert_close(layer(x), F.linear(x, was, layer.bias))


@pytest.mark.parametrize("rule", ["flip_sym", "row_repeat"])
def test_s39_a_hook_that_a_frozen_block_found_is_called_at_every_forward(rule):
    layer = tp.register_tie(nn.Linear(4, 4), rule).eval()
    called = []
    layer.parametrizations.weight.register_forward_hook(lambda *_: called.append(1))
    with torch.no_grad(), tp.frozen(layer):
        called.clear()
        layer(torch.ones(1, 4)), layer(torch.ones(1, 4))
    assert len(called) == 2


@pytest.mark.feature("Inference caches", "`cache=True` with compile, export and trace: off there")
def test_s33_compiled_and_exported_models_do_not_hold_the_cached_weight():
    conv = cached_conv()
    with torch.no_grad():
        conv(FEATURES)
        exported = torch.export.export(conv, (FEATURES,)).module()
        compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
        traced = torch.jit.trace(conv, (FEATURES,), check_trace=False)
        compiled(FEATURES)
        for module in (exported, conv):
            free_of = dict(module.named_parameters())["parametrizations.weight.original0"]
            free_of.mul_(2)
        if free(conv) is dict(exported.named_parameters())["parametrizations.weight.original0"]:
            free(conv).div_(2)
        expected = stock_output(conv)
        torch.testing.assert_close(exported(FEATURES), expected)
        torch.testing.assert_close(compiled(FEATURES), expected)
        torch.testing.assert_close(traced(FEATURES), expected)


def test_autocast_is_part_of_what_is_compared():
    class Scaled(type(tp.get_tie(cached_conv()))):
        """Gives its weight in the precision that autocast asks for."""

        def forward(self, *values):
            weight = super().forward(*values)
            wanted = torch.is_autocast_enabled("cpu")
            return weight.to(torch.get_autocast_dtype("cpu")) if wanted else weight

    conv = tp.register_tie(nn.Conv2d(6, 6, 3), Scaled(), cache=True).eval()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(FEATURES).dtype is torch.bfloat16
        weight = tp.get_tie(conv).forward(*conv.parametrizations.weight.parameters())
        assert torch.equal(conv(FEATURES), F.conv2d(FEATURES, weight, conv.bias))


def test_another_parametrization_on_top_turns_the_cache_off():
    conv = cached_conv()
    parametrizations.spectral_norm(conv, "weight")
    conv.eval()
    calls = Calls(conv)
    with torch.no_grad():
        conv(FEATURES)
        conv(FEATURES)
    assert calls.count == 2


# frozen -------------------------------------------------------------------------------------


@pytest.mark.feature("Inference caches", "`tiedparam.frozen(model)`")
def test_frozen_computes_every_weight_once():
    model = frozen_model()
    calls = [Calls(model[index]) for index in (0, 2, 3)]
    with torch.no_grad():
        expected = model(IMAGE)
        for call in calls:
            call.count = 0
        with tp.frozen(model) as entered:
            assert entered is model
            entered_with = [call.count for call in calls]
            for _ in range(3):
                assert torch.equal(model(IMAGE), expected)
            assert [call.count for call in calls] == entered_with
        for call in calls:
            call.count = 0
        assert torch.equal(model(IMAGE), expected)
        assert [call.count for call in calls] == [2, 1, 1]  # the copy reads the first as well


def test_frozen_is_a_decorator_and_can_be_entered_again():
    model = frozen_model()
    block = tp.frozen(model)

    @tp.frozen(model)
    @torch.no_grad()
    def infer():
        return model(IMAGE)

    with torch.no_grad():
        expected = model(IMAGE)
        with block, block:
            with tp.frozen(model[0]):
                assert torch.equal(model(IMAGE), expected)
            assert torch.equal(infer(), expected)
            assert tie_of(model[0]).kept.frozen is not None
        assert tie_of(model[0]).kept.frozen is None
        with block:
            assert torch.equal(model(IMAGE), expected)
    model.train()(IMAGE).sum().backward()


def test_s08_an_exception_inside_ends_the_block():
    model = frozen_model()
    with pytest.raises(ZeroDivisionError), tp.frozen(model):
        raise ZeroDivisionError
    model.train()
    model(IMAGE).sum().backward()
    assert free(model[0]).grad is not None
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_frozen_refuses_a_model_in_training_mode_and_changes_nothing():
    model = frozen_model()
    model[2].train()
    with pytest.raises(TieError, match=r"'2\.weight'.*training mode.*eval"), tp.frozen(model):
        raise AssertionError
    assert tie_of(model[0]).kept.frozen is None
    with pytest.raises(TypeError, match="takes a model"):
        tp.frozen("model")


TieError = tp.TieError


def train(model):
    model.train()


def train_and_run(model):
    for module in model.modules():
        module.training = True
    with torch.no_grad():
        model(IMAGE)


def recorded_forward(model):
    model(IMAGE)


def recorded_read(model):
    model[0].weight.norm()


def recorded_structured_forward(model):
    model[4](IMAGE)


def recorded_forward_of_a_copy(model):
    model[2](IMAGE)


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def step_of_a_source(model):
    model[5].weight.grad = torch.ones_like(model[5].weight)
    torch.optim.Adam([model[5].weight], fused=True).step()


def load(model):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})


def load_a_part(model):
    model[0].load_state_dict(tp.dense_state_dict(model[0]))


def load_assigning(model):
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)


def double(model):
    model.double()


def half(model):
    model.half()


def move(model):
    model.to("meta")


def empty(model):
    model.to_empty(device="cpu")


def assign(model):
    tp.assign_(model[0], torch.zeros(4, 4, 3, 3))


def assign_attribute(model):
    model[0].weight = torch.zeros(4, 4, 3, 3)


def initialise(model):
    tp.init_(model[0], nn.init.zeros_)


def reset_all(model):
    model[0].reset_parameters()


def untie(model):
    tp.remove_tie(model[0])


def tie(model):
    tp.register_tie(model[5], "row_repeat")


REFUSED = [
    (train, r"train\(\) inside frozen"), (train_and_run, "training mode"),
    (recorded_forward, "carries no gradients.*no_grad"), (recorded_read, "carries no gradients"),
    (recorded_structured_forward, "carries no gradients"),
    (recorded_forward_of_a_copy, "carries no gradients"),
    (step, "SGD would step '.*', which is frozen"),
    (step_of_a_source, "Adam would step '3.weight'"),
    (load, "loading inside frozen"), (load_a_part, "loading inside frozen"),
    (load_assigning, "loading inside frozen"), (double, "casting or moving inside frozen"),
    (half, "casting or moving"), (move, "casting or moving"), (empty, "casting or moving"),
    (assign, "assigning inside frozen"), (assign_attribute, "assigning inside frozen"),
    (initialise, "initialising inside frozen"), (reset_all, "reset_parameters"),
    (untie, "remove_tie inside frozen"), (tie, "register_tie inside frozen"),
]  # fmt: skip


@pytest.mark.feature(
    "Inference caches",
    "training, loading, casting inside of `frozen`",
    refused="the weights are fixed there; leave the block first",
)
@pytest.mark.parametrize(("action", "message"), REFUSED, ids=[a.__name__ for a, _ in REFUSED])
def test_s04_s05_what_a_fixed_weight_cannot_follow_is_refused(action, message):
    model = frozen_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    identities = [id(p) for p in model.parameters()]
    with torch.no_grad():
        expected = model(IMAGE)
    with tp.frozen(model):
        with pytest.raises(TieError, match=message):
            action(model)
        if action is not train_and_run:
            assert not any(module.training for module in model.modules())
        after = model.state_dict()
        for key, value in before.items():
            assert after[key].dtype is value.dtype
            assert torch.equal(after[key], value), key
        assert [id(p) for p in model.parameters()] == identities
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(IMAGE), expected)
    with torch.no_grad():
        assert torch.equal(model(IMAGE), expected)
    if action is not move:
        action(model)  # the same is allowed outside


def test_a_cast_that_is_refused_takes_pending_gradients_back_too():
    model = frozen_model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), model).eval()  # is cast first
    model[0].weight.grad = torch.full_like(model[0].weight, 3)
    with tp.frozen(model):
        with pytest.raises(TieError):
            model.double()
        for parameter in model.parameters():
            assert parameter.dtype is torch.float32
            assert parameter.grad is None or parameter.grad.dtype is torch.float32
        assert torch.equal(model[0].weight.grad, torch.full_like(model[0].weight, 3))


def test_a_backward_pass_that_reaches_a_frozen_weight_raises():
    model = frozen_model()
    loss = model(IMAGE).sum()  # recorded before
    with tp.frozen(model), pytest.raises(TieError, match="backward pass reached.*frozen"):
        loss.backward()
    model.zero_grad()
    model(IMAGE).sum().backward()
    assert free(model[0]).grad is not None


def test_gradients_of_the_input_pass_through_frozen_parameters():
    model = frozen_model().requires_grad_(False)
    x = IMAGE.clone().requires_grad_()
    model(x).sum().backward()
    expected = x.grad.clone()
    x.grad = None
    with tp.frozen(model):
        model(x).sum().backward()
    assert torch.equal(x.grad, expected)


def test_s02_s03_training_goes_on_after_frozen():
    model = frozen_model()
    twin = copy.deepcopy(model)
    with tp.frozen(model), torch.inference_mode():
        model(IMAGE)
    for m in (model, twin):
        m.train()(IMAGE).square().sum().backward()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("write", ["data", "numpy", "new data"])
def test_a_write_that_torch_does_not_show_raises_at_the_end(write):
    model = frozen_model()
    block = tp.frozen(model)
    block.__enter__()
    if write == "data":
        free(model[0]).data.mul_(2)
    elif write == "numpy":
        free(model[0]).detach().numpy()[...] = 1
    else:
        free(model[0]).data = torch.zeros_like(free(model[0]))
    with pytest.raises(TieError, match=r"'0\.weight', '2\.weight' changed inside frozen"):
        block.__exit__(None, None, None)
    with torch.no_grad():
        twin = copy.deepcopy(model)
        assert torch.equal(model(IMAGE), twin(IMAGE))  # the block has ended all the same


def test_the_state_dict_is_the_same_inside_and_outside():
    model = frozen_model()
    before, dense = model.state_dict(), tp.dense_state_dict(model)
    with tp.frozen(model):
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(torch.equal(v, dense[k]) for k, v in tp.dense_state_dict(model).items())
        assert [n for n, _ in model.named_parameters()] == list(dict(model.named_parameters()))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_s01_copies_made_inside_are_not_frozen(how):
    model = frozen_model()
    with tp.frozen(model), torch.no_grad():
        expected = model(IMAGE)
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        elif how == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            twin = torch.load(buffer, weights_only=False)
        free(twin[0]).mul_(2)
        assert not torch.equal(twin(IMAGE), expected)
        twin.double().float()
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(IMAGE), expected)
        assert torch.equal(model(IMAGE), expected)
    twin.train()(IMAGE).sum().backward()


def test_s07_functional_call_inside_uses_what_it_is_given():
    model = frozen_model()
    given = {k: 2 * v.detach() for k, v in model.named_parameters()}
    twin = copy.deepcopy(model)
    twin.load_state_dict(given, strict=False)
    with torch.no_grad():
        expected = twin(IMAGE)
        with tp.frozen(model):
            assert torch.equal(torch.func.functional_call(model, given, (IMAGE,)), expected)
    wanted = {k: v.requires_grad_() for k, v in given.items()}
    with tp.frozen(model):
        output = torch.func.functional_call(model, wanted, (IMAGE,))
        gradients = torch.autograd.grad(output.sum(), list(wanted.values()))
    assert all(g.abs().sum() > 0 for g in gradients[:1])


@pytest.mark.feature("Inference caches", "compile and export inside of `frozen`: no constant")
def test_s33_compile_and_export_inside_hold_no_constant():
    model = nn.Sequential(nn.Conv2d(4, 4, 3)).eval()
    tp.register_tie(model[0], "flip_sym")
    with tp.frozen(model), torch.no_grad():
        exported = torch.export.export(model, (IMAGE,))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected = compiled(IMAGE)
        torch.testing.assert_close(expected, model(IMAGE))
        traced = torch.jit.trace(model, (IMAGE,), check_trace=False)
    names = {name for name, _ in exported.named_parameters()}
    assert any(name.endswith("original0") for name in names)
    assert not exported.constants
    with torch.no_grad():
        free(model[0]).mul_(2)
        torch.testing.assert_close(compiled(IMAGE), model(IMAGE))
        torch.testing.assert_close(traced(IMAGE), model(IMAGE))


def test_frozen_with_a_parametrization_on_top():
    conv = tp.register_tie(nn.Conv2d(4, 4, 3), "flip_sym")
    parametrizations.spectral_norm(conv, "weight")
    conv.eval()
    with torch.no_grad():
        expected = conv(IMAGE)
        calls = Calls(conv)
        with tp.frozen(conv):
            for _ in range(3):
                assert torch.equal(conv(IMAGE), expected)
            assert calls.count == 1


def test_frozen_reads_from_outside_are_guarded():
    conv = tp.register_tie(nn.Conv2d(4, 4, 3), "flip_sym").eval()
    with tp.frozen(conv), torch.no_grad(), pytest.raises(TieError, match="would be lost"):
        conv.weight.zero_()


def test_a_tie_that_was_given_to_torch_directly_is_computed_as_ever():
    conv = nn.Conv2d(4, 4, 3)
    kind = tp.available_rules()["flip_sym"]
    parametrize.register_parametrization(conv, "weight", kind())
    conv.eval()
    with tp.frozen(conv), torch.no_grad():
        first = conv(IMAGE)
        for value in conv.parametrizations.weight.parameters():
            value.mul_(2)
        assert not torch.equal(conv(IMAGE), first)


def test_an_exchanged_source_ends_the_block_whole():
    """The comparison at the end fails for the copy; all the same, nothing stays frozen."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))).eval()
    tp.register_tie(model[1], "copy", source="0", root=model)
    tp.register_tie(model[2], "flip_sym")
    block = tp.frozen(model)
    block.__enter__()
    model[0] = nn.Linear(4, 4)
    with pytest.raises(TieError, match=r"'1\.weight' changed inside frozen"):
        block.__exit__(None, None, None)
    assert tie_of(model[2]).kept.frozen is None
    tp.assign_(model[2], torch.eye(4))
    with torch.no_grad():
        assert torch.equal(model[2](torch.ones(1, 4)), 1 + model[2].bias.expand(1, 4))


def test_a_refusal_leaves_what_was_done_on_purpose():
    model = frozen_model()
    with tp.frozen(model):
        model[5].double()  # a plain source: torch does not tell, and the end of the block would
        model[1].train()
        with pytest.raises(TieError, match="assigning"):
            tp.assign_(model[0], torch.zeros(4, 4, 3, 3))
        assert model[1].training
        assert model[5].weight.dtype is torch.float64
        model[5].float()


@pytest.mark.parametrize("action", [
    lambda source: source.load_state_dict(source.state_dict()),
    lambda source: tp.assign_(source, torch.eye(4)), lambda source: source.double(),
    lambda source: tp.remove_tie(source), lambda source: source.reset_parameters(),
])  # fmt: skip
def test_a_source_outside_of_the_frozen_part_is_protected(action):
    source, layer = tp.register_tie(nn.Linear(4, 4), "flip_sym"), nn.Linear(4, 4)
    tp.register_tie(layer, "squared_copy", source=source)
    before = {k: v.clone() for k, v in source.state_dict().items()}
    with tp.frozen(layer.eval()):
        with pytest.raises(TieError, match="inside frozen"):
            action(source)
        assert all(torch.equal(v, before[k]) for k, v in source.state_dict().items())


def test_forward_mode_gradients_are_not_dropped():
    layer = tp.register_tie(nn.Linear(4, 4), "flip_sym", cache=True).eval()
    x = torch.ones(1, 4)
    with torch.no_grad():
        layer(x)
        with forward_ad.dual_level():
            values = {
                name: forward_ad.make_dual(value.detach(), torch.ones_like(value))
                for name, value in layer.named_parameters()
            }
            output = torch.func.functional_call(layer, values, (x,))
            tangent = forward_ad.unpack_dual(output).tangent
    assert torch.equal(tangent, torch.full((1, 4), 5.0))


def test_a_rules_own_buffer_is_compared_too():
    class Scaled(type(tp.get_tie(cached_conv()))):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(()), persistent=False)

        def forward(self, *values):
            return self.scale * super().forward(*values)

        def right_inverse(self, weight):
            return super().right_inverse(weight / self.scale)

    conv = tp.register_tie(nn.Conv2d(6, 6, 3), Scaled(), cache=True).eval()
    with torch.no_grad():
        before = conv(FEATURES)
        tp.get_tie(conv).scale.data.mul_(3)
        assert not torch.allclose(conv(FEATURES), before)


# Threads ------------------------------------------------------------------------------------


def in_threads(count, work):
    errors = []

    def run(index):
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=200)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


@pytest.mark.slow
@pytest.mark.feature("Inference caches", "eight threads on one model")
@pytest.mark.parametrize("how", ["cold cache", "warm cache", "frozen"])
def test_s06_eight_threads_never_see_a_wrong_output(how):
    """8 threads × 1,000 calls: weights are loaded between the rounds."""
    torch.manual_seed(0)
    conv = tp.register_tie(nn.Conv2d(3, 3, 3), "flip_sym", cache=how != "frozen").eval()
    x = torch.randn(1, 3, 4, 4)
    rounds, calls = 10, 100
    for _ in range(rounds):
        state = {k: torch.randn_like(v) for k, v in conv.state_dict().items()}
        conv.load_state_dict(state)
        with torch.no_grad():
            expected = stock_output(conv, x)[:, :, 1:-1, 1:-1]
            if how == "warm cache":
                conv(x)

            def infer(_, expected=expected):
                with torch.no_grad():  # grad mode belongs to each thread
                    for _ in range(calls):
                        if how == "frozen":
                            with tp.frozen(conv):
                                assert torch.equal(conv(x), expected)
                        else:
                            assert torch.equal(conv(x), expected)

            in_threads(8, infer)
    assert tie_of(conv).kept.frozen is None


def test_s06_a_write_during_the_expansion_is_not_kept():
    """What another thread writes while the weight is computed cannot come between the two."""
    conv = cached_conv()
    rule = tp.get_tie(conv)
    written = []

    def write():
        if not written:
            written.append(free(conv).data.mul_(2))

    before_expanding(conv, write)
    with torch.no_grad():
        conv(FEATURES)
        (snapshot, _), weight = tie_of(conv).kept.kept
        assert torch.equal(weight, rule.forward(*snapshot))
        assert torch.equal(conv(FEATURES), stock_output(conv))


def test_a_thread_cannot_train_what_another_has_frozen():
    model = frozen_model()
    inside, done = threading.Event(), threading.Event()

    def work(index):
        if index == 0:
            with tp.frozen(model):
                inside.set()
                assert done.wait(60)
        else:
            assert inside.wait(60)
            try:
                with pytest.raises(TieError, match="frozen"):
                    step(model)
            finally:
                done.set()

    in_threads(2, work)
    step(model)


def test_importing_does_not_start_threads_or_processes():
    code = "import threading, tiedparam; print(threading.active_count())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "1"


def test_a_rule_that_was_given_to_torch_is_refused_with_a_fact():
    layer = nn.Linear(3, 3).eval()
    parametrize.register_parametrization(layer, "weight", RowRepeat())
    with tp.frozen(layer), pytest.raises(tp.TieError) as caught:
        tp.assign_(layer, torch.ones(3, 3))
    assert caught.value.fact == "the layer is part of the model."
