"""What stands between a layer and its weight: hooks, patches, and values that are not there.

The oracle is everywhere the dense stock layer that holds ``layer.weight``.
"""

from __future__ import annotations

import abc
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import tiedparam as tp
from tests.support import form_of, with_fsdp2
from tiedparam import TieError
from tiedparam.tie.lookup import tie_of

X = torch.randn(2, 16, 12, 12, generator=torch.Generator().manual_seed(0))
LAYERS = {
    "rows of a Linear": (lambda: nn.Linear(16, 8), "row_repeat", {}, X.flatten(2).mT[0]),
    "inputs of a Linear": (lambda: nn.Linear(16, 8), "channel_shared", {}, X.flatten(2).mT),
    "inputs of a Conv2d": (lambda: nn.Conv2d(16, 16, 3, padding=1), "channel_shared", {}, X),
    "windows": (lambda: nn.Conv2d(16, 16, 3), "channel_shared", {"compute": "windows"}, X),
    "streams": (lambda: nn.Conv2d(16, 64, 3, groups=16), "channel_shared",
                {"over": "groups", "compute": "windows"}, X),
    "rows of a ConvTranspose2d": (lambda: nn.ConvTranspose2d(16, 8, 3), "row_repeat", {}, X),
    "flip_sym": (lambda: nn.Conv2d(16, 16, 3, padding=1), "flip_sym", {}, X),
}  # fmt: skip


@pytest.fixture(params=LAYERS)
def case(request):
    """A tied layer and an input for it."""
    build, rule, options, x = LAYERS[request.param]
    torch.manual_seed(1)
    return tp.register_tie(build(), rule, init="rescale", **options), x


def dense(layer: nn.Module) -> nn.Module:
    """The stock layer that holds what ``layer.weight`` shows, with the same replaced methods."""
    stock_class = parametrize.type_before_parametrizations(layer)
    stock = stock_class.__new__(stock_class)
    stock.__dict__.update(layer.__dict__)
    stock._parameters = {**layer._parameters, "weight": nn.Parameter(layer.weight.detach().clone())}
    stock._modules = {}
    for name, value in layer.__dict__.items():  # a method that was bound to the layer
        if isinstance(value, types.MethodType) and value.__self__ is layer:
            stock.__dict__[name] = types.MethodType(value.__func__, stock)
    return stock


def assert_computes_with_its_weight(layer, x):
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            torch.testing.assert_close(layer(x), dense(layer)(x), rtol=2e-4, atol=2e-4)


# Hooks -----------------------------------------------------------------------------------


def watched(layer, where: str) -> nn.Module:
    values = layer.parametrizations.weight
    return values if where == "list" else values[0]


@pytest.mark.feature(
    "Hooks and patches", "module hooks on a tie's list, rule or source change the output too"
)
@pytest.mark.parametrize("where", ["list", "rule"])
@pytest.mark.parametrize("kind", ["forward", "pre", "replaced"])
def test_s39_hooks_on_the_list_and_on_the_rule_change_what_the_layer_computes(case, where, kind):
    layer, x = case
    before = layer(x).detach()
    module = watched(layer, where)
    if kind == "forward":
        module.register_forward_hook(lambda module, args, weight: weight * 3)
    elif kind == "pre":
        if where == "list":
            pytest.skip("the list is called without arguments")
        module.register_forward_pre_hook(lambda module, args: tuple(3 * a for a in args))
    else:
        plain = module.forward
        module.forward = lambda *args: plain(*args) * 3
    assert_computes_with_its_weight(layer, x)
    assert not torch.allclose(layer(x), before, atol=1e-2)


def test_s39_backward_hooks_on_the_list_see_the_gradient(case):
    layer, x = case
    seen = []
    layer.parametrizations.weight.register_full_backward_hook(
        lambda module, inputs, outputs: seen.append(outputs[0])
    )
    layer(x).square().sum().backward()
    twin = dense(layer)
    twin(x).square().sum().backward()
    (gradient,) = seen
    torch.testing.assert_close(gradient, twin.weight.grad, rtol=1e-3, atol=1e-2)


def test_s39_global_hooks_are_obeyed(case):
    layer, x = case

    def triple(module, args, output):
        return output * 3 if isinstance(module, tp.Rule) else None

    handle = nn.modules.module.register_module_forward_hook(triple)
    try:
        assert_computes_with_its_weight(layer, x)
    finally:
        handle.remove()
    assert_computes_with_its_weight(layer, x)


def test_torchs_counter_of_operations_counts_what_runs():
    x = torch.randn(4, 16)
    counts = []
    for layer in (
        nn.Linear(16, 8),
        tp.register_tie(nn.Linear(16, 8), "row_repeat", groups=2, init="rescale"),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 4 * 16 * 8, 2 * 4 * 16 * 2]


def test_s39_hooks_are_obeyed_in_compiled_code(case):
    layer, x = case
    layer.parametrizations.weight.register_forward_hook(lambda module, args, weight: weight * 3)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), dense(layer)(x), rtol=2e-4, atol=2e-4)


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("rule", ["flip_sym", "row_repeat"])
@with_fsdp2
def test_s39_hooks_are_obeyed_on_sharded_layers(one_rank, rule):
    layer = tp.register_tie(nn.Linear(4, 4), rule, init="rescale")
    wanted, bias = layer.weight.detach() * 3, layer.bias.detach().clone()
    fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    layer.parametrizations.weight.register_forward_hook(lambda module, args, weight: weight * 3)
    torch.testing.assert_close(layer.weight.full_tensor().detach(), wanted)
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer(x), F.linear(x, wanted, bias))


def test_s39_a_cached_weight_is_not_kept_past_a_hook():
    layer = tp.register_tie(nn.Linear(256, 256), "flip_sym", cache=True, init="rescale").eval()
    x = torch.eye(256)
    with torch.no_grad():
        layer(x)
        assert tie_of(layer).kept.kept is not None  # smaller ones would be computed anyway
        scale = [2.0]
        watched(layer, "list").register_forward_hook(lambda module, args, w: w * scale[0])
        for scale[0] in (2.0, 5.0):
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_s39_a_hook_on_a_tied_source_reaches_its_copy():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tp.register_tie(model[0], "row_repeat", init="rescale")
    tp.register_tie(model[1], "copy", source="0", root=model)
    model[0].parametrizations.weight.register_forward_hook(lambda module, args, w: w * 3)
    assert torch.equal(model[1].weight, model[0].weight)
    assert_computes_with_its_weight(model[1], torch.randn(2, 4))


def test_a_rule_that_overrides_the_expansion_is_computed_by_it():
    class Negated(type(tp.get_tie(tp.register_tie(nn.Linear(2, 2), "row_repeat", init="rescale")))):
        def forward(self, *free):
            return -super().forward(*free)

    layer = tp.register_tie(nn.Linear(16, 8), Negated(), init="rescale")
    assert_computes_with_its_weight(layer, torch.randn(2, 16))


def test_where_nothing_stands_in_between_the_cheap_form_runs(case):
    layer, x = case
    if tp.get_tie(layer).name == "flip_sym":
        pytest.skip("it has no cheap form")
    expanded = []

    class Noted(type(layer.parametrizations.weight)):
        def forward(self):
            expanded.append(1)
            return super().forward()

    layer.parametrizations.weight.__class__ = Noted
    layer(x)
    assert not expanded
    with torch.autocast("cpu"):
        layer(x.bfloat16())
    assert not expanded or form_of(layer, traced=True) == "dense"
    expanded.clear()
    handle = layer.parametrizations.weight[0].register_forward_hook(lambda *_: None)
    layer(x)
    assert expanded
    handle.remove()
    expanded.clear()
    layer(x)
    assert not expanded


# Patches ---------------------------------------------------------------------------------


def circular(self, x, weight, bias):
    """The "seamless tiling" patch of image generators."""
    x = F.pad(x, (1, 1, 1, 1), mode="circular")
    return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)


@pytest.mark.feature(
    "Hooks and patches", "a replaced `forward` or `_conv_forward`, on the layer or its class"
)
@pytest.mark.parametrize("when", ["before tying", "after tying"])
@pytest.mark.parametrize("on", ["instance", "class"])
@pytest.mark.parametrize("compute", ["auto", "reduced", "windows", "dense"])
def test_s40_a_replaced_conv_forward_is_the_one_that_runs(monkeypatch, compute, on, when):
    conv = nn.Conv2d(16, 16, 3, padding=1)

    def patch():
        if on == "class":
            monkeypatch.setattr(nn.Conv2d, "_conv_forward", circular)
        else:
            conv._conv_forward = types.MethodType(circular, conv)

    if when == "before tying":
        if compute not in ("auto", "dense") and on == "class":
            pytest.skip("a class with a forward of its own has one form")
        patch()
        tp.register_tie(conv, "channel_shared", init="rescale", compute=compute)
    else:
        tp.register_tie(conv, "channel_shared", init="rescale", compute=compute)
        patch()
    assert_computes_with_its_weight(conv, X)
    wanted = circular(conv, X, conv.weight, conv.bias)
    torch.testing.assert_close(conv(X), wanted, rtol=2e-4, atol=2e-4)
    monkeypatch.undo()
    conv.__dict__.pop("_conv_forward", None)
    assert_computes_with_its_weight(conv, X)


@pytest.mark.parametrize("when", ["before tying", "after tying"])
@pytest.mark.parametrize(
    ("rule", "tensor_name"),
    [
        ("flip_sym", "weight"),
        ("row_repeat", "weight"),
        ("channel_shared", "weight"),
        ("row_repeat", "bias"),
    ],
)
def test_s40_a_replaced_class_forward_is_the_one_that_runs(monkeypatch, rule, tensor_name, when):
    layer, x = nn.Linear(4, 4), torch.ones(1, 4)
    plain = nn.Linear.forward

    def adapted(self, x, shift=7):
        return plain(self, x) * 0 + shift

    if when == "before tying":
        monkeypatch.setattr(nn.Linear, "forward", adapted)
    tp.register_tie(layer, rule, tensor_name, init="rescale")
    monkeypatch.setattr(nn.Linear, "forward", adapted)
    assert layer(x).tolist() == [[7.0] * 4]
    assert layer(x, shift=3).tolist() == [[3.0] * 4]  # as adapters hand a scale through
    monkeypatch.undo()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("compute", ["auto", "reduced", "windows", "dense"])
@pytest.mark.parametrize("on", ["the class of tied layers", "a class derived from it"])
def test_s40_a_conv_forward_replaced_where_tied_layers_have_it_runs(monkeypatch, on, compute):
    conv = tp.register_tie(
        nn.Conv2d(16, 16, 3, padding=1), "channel_shared", init="rescale", compute=compute
    )
    if on == "the class of tied layers":
        monkeypatch.setattr(type(conv), "_conv_forward", circular, raising=False)
    else:
        conv.__class__ = type("Seamless", (type(conv),), {"_conv_forward": circular})
    wanted = circular(conv, X, conv.weight, conv.bias)
    for mode in (conv.train(), conv.eval()):
        torch.testing.assert_close(mode(X), wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("rule", ["flip_sym", "channel_shared"])
def test_s40_a_replaced_conv_forward_cannot_write_into_the_weight(rule):
    """torch's own methods never do, and are handed the weight as a plain tensor."""
    conv = tp.register_tie(nn.Conv2d(16, 16, 3, padding=1), rule)

    def clamped(self, x, weight, bias):
        weight.data.clamp_(-1, 1)
        return F.conv2d(x, weight, bias)

    conv._conv_forward = types.MethodType(clamped, conv)
    with pytest.raises(TieError, match="'clamp_' on the tied 'weight' .* would be lost"):
        conv(X)


def test_s40_a_patch_that_was_there_at_import_is_no_part_of_torch():
    from tiedparam.tie.interposed import TorchsOwn

    class Patched(nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    Patched.__module__ = nn.Linear.__module__
    own = TorchsOwn.of(Patched)
    assert not own.computes(Patched)
    assert TorchsOwn.of(nn.Linear).computes(nn.Linear)


def test_s40_a_forward_replaced_on_the_instance_runs(case):
    layer, x = case
    plain = layer.forward
    wanted = layer(x).detach() + 1
    layer.forward = lambda x: plain(x) + 1
    torch.testing.assert_close(layer(x), wanted)


# Inputs that the dense layer refuses ------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "options", "changed", "x"),
    [
        (lambda: nn.Linear(16, 8), {}, {"in_features": 5}, torch.ones(2, 5)),
        (lambda: nn.Conv2d(16, 16, 3), {}, {"in_channels": 5}, X[:, :5]),
        (lambda: nn.Conv2d(16, 16, 3), {"compute": "windows"}, {"in_channels": 5}, X[:, :5]),
        (lambda: nn.Conv2d(16, 16, 3), {}, {"groups": 2}, X),
        (lambda: nn.ConvTranspose2d(16, 8, 3), {}, {"in_channels": 5}, X[:, :5]),
    ],
)
def test_what_a_layer_says_of_its_size_does_not_make_an_input_fit(build, options, changed, x):
    """Sums over channels would take any number of them; the dense layer goes by its weight."""
    layer = tp.register_tie(build(), "channel_shared", init="rescale", **options)
    for name, value in changed.items():
        setattr(layer, name, value)
    with pytest.raises(RuntimeError):
        dense(layer)(x)
    with pytest.raises(RuntimeError):
        layer(x)


@pytest.mark.parametrize("compute", ["reduced", "windows"])
def test_other_groups_than_those_of_the_tie_compute_as_in_the_dense_layer(compute):
    layer = tp.register_tie(nn.Conv2d(8, 16, 3), "channel_shared", init="rescale", compute=compute)
    layer.groups, layer.in_channels = 2, 16  # the same weight serves 16 channels in two groups
    assert_computes_with_its_weight(layer, X)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.half(), lambda x: x.double(), lambda x: x.bfloat16(), lambda x: x.long(),
        lambda x: x.to(torch.complex64), lambda x: x[..., :3], lambda x: x.sum(),
        lambda x: x.flatten(), lambda x: x[None, None], lambda x: None,
    ],
)  # fmt: skip
@pytest.mark.parametrize("autocast", [False, True])
def test_inputs_that_the_dense_layer_refuses_are_refused(case, spoil, autocast):
    layer, x = case
    x, twin = spoil(x), dense(layer)

    def outcome(layer):
        with torch.autocast("cpu", enabled=autocast):
            try:
                return layer(x).dtype
            except Exception as error:
                return type(error)

    wanted = outcome(twin)
    assert outcome(layer) == wanted


def test_a_bias_of_another_dtype_is_refused_as_by_the_dense_layer(case):
    layer, x = case
    x = x.flatten(0, -2) if isinstance(layer, nn.Linear) else x  # (with a batch of rows it is not)
    layer.bias.data = layer.bias.data.half()
    with pytest.raises(RuntimeError):
        dense(layer)(x)
    with pytest.raises(RuntimeError):
        layer(x)
    layer.bias.data = layer.bias.data.double()
    with torch.autocast("cpu"):  # which leaves float64 alone
        try:
            wanted = dense(layer)(x)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                layer(x)
        else:  # processors without bfloat16 have another kernel, which takes it
            torch.testing.assert_close(layer(x), wanted, check_dtype=True)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
def test_autocast_leaves_double_precision_alone_as_in_the_dense_layer(case, low):
    layer, x = case[0].double(), case[1].double()
    with torch.autocast("cpu", dtype=low):
        wanted = dense(layer)(x)
        assert wanted.dtype is torch.float64
        torch.testing.assert_close(layer(x), wanted, rtol=1e-10, atol=1e-10)


def test_nested_inputs_are_computed_as_by_the_dense_layer():
    layer = tp.register_tie(nn.Linear(16, 8), "channel_shared", init="rescale")
    rows = torch.nested.nested_tensor([torch.randn(2, 16), torch.randn(5, 16)])
    for got, wanted in zip(layer(rows).unbind(), dense(layer)(rows).unbind(), strict=True):
        torch.testing.assert_close(got, wanted)


def test_wrong_numbers_of_arguments_raise_as_by_the_dense_layer(case):
    layer, x = case
    for args, kwargs in ((), {}), ((x, x, x), {}), ((), {"inputs": x}), ((x,), {"input": x}):
        with pytest.raises(TypeError):
            dense(layer)(*args, **kwargs)
        with pytest.raises(TypeError, match=r"\.forward\(\) "):
            layer(*args, **kwargs)
    torch.testing.assert_close(layer(input=x), layer(x))


# Values that are not there ----------------------------------------------------------------


def on_meta(layer: nn.Module) -> nn.Module:
    """The layer with its free values on the meta device, and its bias in memory."""
    for values in layer.parametrizations.children():
        for name, value in values._parameters.items():
            values._parameters[name] = nn.Parameter(value.to("meta"))
    return layer


def test_s38_torch_computes_with_what_is_not_there():
    """The fact behind the refusals; where torch mends it they cost nothing."""
    x = torch.randn(2, 4)
    for function in (F.linear, lambda x, w: x @ w):
        assert not function(x, torch.empty(4, 4, device="meta")).is_meta


def test_s38_a_weight_without_values_is_refused_in_the_layers_forward(case):
    layer, x = case
    on_meta(layer)
    for mode in (torch.enable_grad, torch.no_grad):
        with mode(), pytest.raises(TieError, match=r"'weight' of .* has no values yet.*to_empty"):
            layer(x)


def test_s38_shapes_are_worked_out_on_meta(case):
    layer, x = case
    shape = layer(x).shape
    assert layer.to("meta")(x.to("meta")).shape == shape


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, w: F.linear(x, w), lambda x, w: x @ w, lambda x, w: torch.mm(x, w),
        lambda x, w: F.conv1d(x[None], w[:, :, None]),
    ],
)  # fmt: skip
def test_s38_a_weight_without_values_is_refused_where_users_compute_with_it(compute):
    layer = on_meta(tp.register_tie(nn.Linear(4, 4), "flip_sym", init="rescale"))
    with pytest.raises(TieError, match="has no values yet"):
        compute(torch.randn(4, 4), layer.weight)
    assert compute(torch.randn(4, 4, device="meta"), layer.weight).is_meta
    assert torch.ones(16).view_as(layer.weight).shape == (4, 4)  # by its shape only


def test_s38_a_weight_without_values_is_refused_inside_attention():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    on_meta(tp.register_tie(attention.out_proj, "flip_sym", init="rescale"))
    x = torch.randn(1, 3, 4)
    with pytest.raises(TieError, match="has no values yet"):
        attention(x, x, x)


def test_s38_transforms_refuse_it_too():
    layer = on_meta(tp.register_tie(nn.Linear(4, 4), "flip_sym", init="rescale"))
    with pytest.raises(TieError, match="has no values yet"):
        torch.func.vmap(layer)(torch.randn(3, 4))


def test_s38_a_copy_whose_source_has_no_values_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tp.register_tie(model[1], "copy", source="0", root=model)
    tp.register_tie(model[1], "copy", "bias", source="0", root=model)
    model[0].to("meta")
    with pytest.raises(TieError, match="computed from 'weight' of Linear.*on the meta device"):
        model[1](torch.randn(2, 4))
    assert "in_features=4" in repr(model)


def test_a_layer_that_describes_itself_computes_nothing():
    layer = tp.register_tie(nn.Linear(3, 3), "row_repeat", "bias", init="rescale")
    layer.parametrizations.bias.register_forward_hook(lambda *_: pytest.fail("computed"))
    assert repr(layer).splitlines()[1] == "  in_features=3, out_features=3, bias=True"


def test_assigning_numbers_to_a_layer_on_meta_is_refused():
    layer = tp.register_tie(nn.Linear(4, 4, device="meta"), "flip_sym")
    with pytest.raises(TieError, match=r"meta device.*to_empty"):
        tp.assign_(layer, torch.eye(4))
    with pytest.raises(TieError, match="no values yet to compare"):
        tp.register_tie(nn.Linear(4, 4, device="meta"), "flip_sym", init="exact")
    with pytest.raises(TieError, match="has no values to compare"):
        tp.residual(nn.Linear(4, 4, device="meta"), "flip_sym")


@pytest.mark.parametrize("project", [True, False])
def test_assigning_what_has_no_numbers_is_refused_or_no_change(project):
    layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
    before = layer.weight.detach().clone()
    with pytest.raises(TieError, match="the value is on the meta device and has no numbers"):
        tp.assign_(layer, torch.empty(4, 4, device="meta"), project=project)
    assert torch.equal(layer.weight, before)
    absent = tp.register_tie(nn.Linear(4, 4, device="meta"), "flip_sym")
    assert tp.assign_(absent, torch.empty(4, 4, device="meta"), project=project) is absent


# Fake mode, compiled functions, metaclasses -----------------------------------------------


@pytest.mark.feature("Compile and export", "tying and computing in `FakeTensorMode`")
@pytest.mark.parametrize("rule", ["flip_sym", "row_repeat", "channel_shared"])
@pytest.mark.parametrize("init", ["project", "rescale"])
def test_s50_tying_in_fake_mode(rule, init):
    with FakeTensorMode():
        layer = tp.register_tie(nn.Linear(4, 4), rule, init=init)
        assert isinstance(layer(torch.empty(2, 4)), FakeTensor)
        assert all(isinstance(value, FakeTensor) for value in layer.parameters())
        with pytest.raises(TieError, match="no values yet to compare"):
            tp.register_tie(nn.Linear(4, 4), rule, init="exact")
    real = tp.register_tie(nn.Linear(4, 4), rule, init="rescale")
    assert_computes_with_its_weight(real, torch.randn(2, 4))  # no table was left from fake mode


@pytest.mark.parametrize("allow", [False, True])
def test_s50_a_real_layer_is_not_tied_in_fake_mode(allow):
    layer = nn.Linear(4, 4)
    weight = layer.weight
    with (
        FakeTensorMode(allow_non_fake_inputs=allow),
        pytest.raises(TieError, match="FakeTensorMode"),
    ):
        tp.register_tie(layer, "row_repeat")
    assert layer.weight is weight


def test_s50_a_real_layer_computes_in_fake_mode():
    layer = tp.register_tie(nn.Linear(6, 6), "flip_sym", init="rescale")
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(layer(torch.empty(2, 6)), FakeTensor)
    assert_computes_with_its_weight(layer, torch.randn(2, 6))


@pytest.mark.feature(
    "Compile and export",
    "tying inside a compiled function, between two graphs",
)
def test_s50_ties_made_inside_a_compiled_function():
    made = []

    def function(x):
        layer = nn.Linear(4, 4)
        tp.register_tie(layer, "flip_sym", init="rescale")
        made.append(layer)
        y = layer(x)
        tp.remove_tie(layer)
        return y, layer(x)

    torch._dynamo.reset()
    x = torch.randn(2, 4)
    tied, untied = torch.compile(function, backend="eager")(x)
    torch.testing.assert_close(tied, untied)
    assert torch.equal(made[0].weight, made[0].weight.t())
    assert type(made[0]) is nn.Linear


def test_s50_models_tied_inside_a_compiled_function():
    model = nn.Sequential(nn.Linear(4, 4))

    def function(x):
        tp.tie_model(model, {"0": "flip_sym"})
        y = model(x)
        tp.untie_model(model)
        return y

    torch._dynamo.reset()
    y = torch.compile(function, backend="eager")(torch.eye(4))
    torch.testing.assert_close(y, model(torch.eye(4)))
    assert torch.equal(model[0].weight, model[0].weight.t())


@pytest.mark.feature("Libraries", "`higher`'s stateless copies of a tied model")
def test_s50_higher_adapts_a_tied_model():
    higher = pytest.importorskip("higher")

    def adapted(tie):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4))
        if tie:
            tp.register_tie(net[0], "row_repeat")
        else:  # the same law by hand

            class Repeat(nn.Module):
                def forward(self, row):
                    return row.expand(4, 4)

                def right_inverse(self, weight):
                    return weight.mean(0, keepdim=True)

            parametrize.register_parametrization(net[0], "weight", Repeat())
        sgd = torch.optim.SGD(net.parameters(), 0.1)
        with higher.innerloop_ctx(net, sgd) as (fast, step):
            step.step(fast(torch.eye(4)).square().mean())
            return fast(torch.eye(4)).detach()

    torch.testing.assert_close(adapted(True), adapted(False))


def test_the_class_of_a_tied_layer_mixes_with_abstract_ones():
    layer = tp.register_tie(nn.Linear(3, 2), "row_repeat", init="rescale")

    class Mixed(type(layer), abc.ABC):
        @abc.abstractmethod
        def extra(self): ...

    class Concrete(Mixed):
        def __init__(self):
            nn.Module.__init__(self)

        def extra(self):
            return 1

    with pytest.raises(TypeError, match="abstract"):
        Mixed(3, 2)
    assert Concrete().extra() == 1
    assert type(type(layer)(3, 2)) is nn.Linear


# Writes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["flip_sym", "row_repeat", "channel_shared"])
@pytest.mark.parametrize("gradients", [True, False])
def test_s49_set_and_swap_tensors_raise(rule, gradients):
    layer = tp.register_tie(nn.Linear(4, 4), rule, init="rescale")
    before = layer.weight.detach().clone()
    other = torch.zeros(4, 4)
    with torch.set_grad_enabled(gradients):
        for write in (
            lambda: layer.weight.set_(other),
            lambda: layer.weight.data.set_(other),
            lambda: torch.utils.swap_tensors(layer.weight, other),
            lambda: torch.utils.swap_tensors(other, layer.weight),
            lambda: torch.utils.swap_tensors(layer.weight.data, other),
        ):
            with pytest.raises(TieError, match="would be lost"):
                write()
    assert torch.equal(layer.weight, before)
    assert type(other) is torch.Tensor
    assert torch.equal(other, torch.zeros(4, 4))


def test_s49_a_parameter_of_the_weights_values_can_be_swapped():
    layer = tp.register_tie(nn.Linear(4, 4), "flip_sym", init="rescale")
    own, other = nn.Parameter(layer.weight), nn.Parameter(torch.ones(4, 4))
    torch.utils.swap_tensors(own, other)
    assert torch.equal(own, torch.ones(4, 4))
