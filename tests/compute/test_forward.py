"""Structured compute against the dense layer that holds the expanded weight."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tiedparam as tp
from tests.support import computing_of, form_of
from tests.support.twins import CONVOLUTIONS, assert_equal_to_dense, twins
from tiedparam.compute import forms


@st.composite
def convolutions(draw):
    axes = draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    inputs = groups * draw(st.integers(1, 3))
    outputs = groups * draw(st.integers(1, 4))
    sizes = st.integers(1, 3)
    options = {
        "kernel_size": draw(st.tuples(*[sizes] * axes)),
        "stride": draw(st.tuples(*[st.integers(1, 2)] * axes)),
        "dilation": draw(st.tuples(*[st.integers(1, 2)] * axes)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if transposed:
        options["padding"] = draw(st.integers(0, 1))
    else:
        options["padding_mode"] = draw(
            st.sampled_from(["zeros", "circular", "reflect", "replicate"])
        )
        options["padding"] = draw(st.sampled_from([0, 1, "valid", "same"]))
        if options["padding"] == "same":
            options["stride"] = 1
    layer = CONVOLUTIONS[axes, transposed](inputs, outputs, **options)
    rules = ["in", "out", "all"] + (["groups"] if groups > 1 else [])
    rule = draw(st.sampled_from([*rules, "rows"]))
    if rule == "rows":
        divisors = [n for n in range(1, outputs + 1) if outputs % n == 0]
        tie = ("row_repeat", {"groups": draw(st.sampled_from(divisors))})
    else:
        tie = ("channel_shared", {"over": rule})
    shape = (inputs, *(draw(st.integers(6, 8)) for _ in range(axes)))
    batch = draw(st.sampled_from([None, 0, 1, 3]))
    x = torch.randn(shape if batch is None else (batch, *shape))
    return layer, tie, x, draw(st.booleans())


@pytest.mark.slow
@pytest.mark.feature(
    "Layers", "`nn.Conv1d/2d/3d`, `nn.ConvTranspose1d/2d/3d`: every option, against the dense layer"
)
@settings(max_examples=300, deadline=None, derandomize=True)
@given(case=convolutions())
def test_convolutions_equal_the_dense_layer(case):
    layer, (rule, options), x, double = case
    if double:
        layer, x = layer.double(), x.double()
    layer, dense = twins(layer, rule, **options, compute="reduced")
    assert form_of(layer) == "reduced"
    assert_equal_to_dense(layer, dense, x)


@pytest.mark.feature("Layers", "`nn.Linear`, any number of leading axes")
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    inputs=st.integers(1, 5),
    blocks=st.integers(1, 3),
    run=st.integers(1, 3),
    lead=st.lists(st.integers(0, 3), max_size=3),
    bias=st.booleans(),
    rule=st.sampled_from(["rows", "in", "out", "all"]),
)
def test_linear_equals_the_dense_layer(inputs, blocks, run, lead, bias, rule):
    layer = nn.Linear(inputs, blocks * run, bias=bias).double()
    tie = (
        ("row_repeat", {"groups": blocks}) if rule == "rows" else ("channel_shared", {"over": rule})
    )
    layer, dense = twins(layer, tie[0], **tie[1], compute="reduced")
    assert_equal_to_dense(layer, dense, torch.randn(*lead, inputs).double())


RULES = [
    (lambda **o: nn.Linear(64, 64, **o), "row_repeat", {}),
    (lambda **o: nn.Linear(64, 64, **o), "row_repeat", {"groups": 4}),
    (lambda **o: nn.Linear(64, 64, **o), "channel_shared", {}),
    (lambda **o: nn.Conv2d(16, 16, 3, padding=1, **o), "channel_shared", {}),
    (lambda **o: nn.Conv2d(16, 16, 3, padding=1, **o), "channel_shared", {"over": "out"}),
    (lambda **o: nn.Conv2d(16, 16, 3, padding=1, **o), "channel_shared", {"over": "all"}),
    (lambda **o: nn.Conv2d(16, 16, 3, padding=1, **o), "row_repeat", {"groups": 2}),
    (lambda **o: nn.Conv1d(16, 32, 3, groups=16, **o), "channel_shared", {"over": "groups"}),
    (lambda **o: nn.ConvTranspose2d(16, 16, 3, **o), "channel_shared", {}),
    (lambda **o: nn.Conv3d(16, 16, 3, **o), "channel_shared", {}),
]
IDS = [f"{build().__class__.__name__}-{rule}-{options}" for build, rule, options in RULES]


def sample(layer, batch=4, size=6) -> torch.Tensor:
    if isinstance(layer, nn.Linear):
        return torch.randn(batch, layer.in_features)
    return torch.randn(batch, layer.in_channels, *[size] * len(layer.kernel_size))


@pytest.mark.parametrize(("build", "rule", "options"), RULES, ids=IDS)
def test_second_derivatives(build, rule, options):
    layer = tp.register_tie(build().double(), rule, **options)
    x = sample(layer, 1, 3).double().requires_grad_()
    free = layer.parametrizations.weight.original0

    def run(x, free, bias):
        return torch.func.functional_call(
            layer, {"parametrizations.weight.original0": free, "bias": bias}, (x,)
        )

    arguments = (x, free, layer.bias)
    assert torch.autograd.gradcheck(run, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, arguments, fast_mode=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("build", "rule", "options"), RULES, ids=IDS)
def test_outputs_own_their_memory(build, rule, options, bias):
    layer, dense = twins(build(bias=bias), rule, **options)
    x = sample(layer)
    torch.testing.assert_close(torch.relu_(layer(x)), torch.relu_(dense(x)), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        y = layer(x)
        assert y.is_contiguous()
        y.add_(1)
        assert y.untyped_storage().nbytes() == y.numel() * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("build", "rule", "options"), RULES, ids=IDS)
def test_half_precision_errs_at_most_twice_as_much_as_dense(build, rule, options, dtype):
    torch.manual_seed(0)
    layer, dense = twins(build(), rule, **options)
    layer, dense = layer.to(dtype), dense.to(dtype)
    reference = copy.deepcopy(dense).double()
    x = sample(layer, 16, 12).to(dtype)
    expected = reference(x.double())

    def error(y):
        return float((y.double() - expected).norm() / expected.norm())

    assert layer(x).dtype is dtype
    assert error(layer(x)) <= 2 * error(dense(x))


@pytest.mark.feature("Precision", "float16 sums that overflow nowhere where dense does not")
@pytest.mark.parametrize("over", ["in", "all"])
def test_float16_sums_do_not_overflow_where_dense_does_not(over):
    layer, dense = twins(nn.Conv2d(256, 16, 1, bias=False).half(), "channel_shared", over=over)
    with torch.no_grad():
        layer.parametrizations.weight.original0.fill_(1e-3)
        dense.weight.fill_(1e-3)
    x = torch.full((2, 256, 4, 4), 1000.0, dtype=torch.float16)
    assert torch.isinf(x.sum(1)).all()
    assert torch.isfinite(dense(x)).all()
    torch.testing.assert_close(layer(x), dense(x), rtol=2e-3, atol=0)
    with torch.autocast("cpu", torch.float16):
        y = layer.float()(x.float())
    assert y.dtype is torch.float16
    torch.testing.assert_close(y, dense(x), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("build", "rule", "options"), RULES, ids=IDS)
def test_autocast(build, rule, options, dtype):
    layer, dense = twins(build(), rule, **options)
    x = sample(layer)
    with torch.autocast("cpu", dtype):
        y, expected = layer(x), dense(x)
    assert y.dtype is expected.dtype is dtype
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert layer.parametrizations.weight.original0.grad.dtype is torch.float32


@pytest.mark.feature("Layers", "`channels_last` inputs and weights")
@pytest.mark.parametrize(("build", "rule", "options"), RULES, ids=IDS)
def test_memory_format_is_that_of_the_dense_layer(build, rule, options):
    layer, dense = twins(build(), rule, **options)
    x = sample(layer)
    if x.dim() < 4:
        pytest.skip("no channels_last below four dimensions")
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    x = x.contiguous(memory_format=last)
    assert layer(x).stride() == dense(x).stride()
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)
    layer.to(memory_format=last)
    dense.to(memory_format=last)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("build", "rule", "options"), RULES, ids=IDS)
def test_wrong_inputs_raise_as_the_dense_layer_does(build, rule, options):
    layer, dense = twins(build(), rule, **options)
    good = sample(layer)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    for bad in (
        good.narrow(axis, 0, good.shape[axis] - 1),
        good.double(),
        torch.zeros(()),
        good[None, None],
    ):
        try:
            expected = dense(bad)
        except Exception as error:
            with pytest.raises(type(error)):
                layer(bad)
        else:
            torch.testing.assert_close(layer(bad), expected)


@pytest.mark.slow
@pytest.mark.feature("Compile and export", "`torch.compile(fullgraph=True)` of structured layers")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("build", "rule", "options"), RULES, ids=IDS)
def test_compiles_to_one_graph(build, rule, options, backend):
    if backend == "inductor" and not isinstance(build(), (nn.Linear, nn.Conv2d)):
        pytest.skip("one kind of convolution through the C++ compiler is enough")
    torch._dynamo.reset()
    layer = tp.register_tie(build(), rule, **options)
    x = sample(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    compiled(x).sum().backward()
    gradient = layer.parametrizations.weight.original0.grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    torch.testing.assert_close(
        gradient, layer.parametrizations.weight.original0.grad, rtol=1e-3, atol=1e-3
    )


def weight_sizes(program) -> set[int]:
    """Element counts of all tensors that a matrix product or convolution of a graph takes."""
    return {
        node.args[1].meta["val"].numel()
        for node in program.graph.nodes
        if any(word in str(node.target) for word in ("conv", "linear", "mm", "matmul", "mv"))
    }


@pytest.mark.slow
@pytest.mark.feature(
    "Compile and export", "`torch.export` of structured layers: the graph has the cheap form"
)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("build", "rule", "options"), RULES, ids=IDS)
def test_exports_the_cheap_form_with_a_dynamic_batch(build, rule, options, strict):
    layer = tp.register_tie(build(), rule, **options).eval()
    x = sample(layer)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (x,), strict=strict, dynamic_shapes=({0: batch},))
    for count in (1, 4, 7):
        x = sample(layer, count)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-4)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    torch.testing.assert_close(
        torch.export.load(buffer).module()(x), layer(x), rtol=1e-4, atol=1e-4
    )
    if form_of(layer, traced=True) == "reduced":
        assert max(weight_sizes(program)) < layer.parametrizations.weight().numel()


def test_transforms():
    for build, rule, options in RULES:
        layer = tp.register_tie(build(), rule, **options)
        dense = build()
        dense.load_state_dict(tp.dense_state_dict(layer))
        x = sample(layer)
        parameters = dict(layer.named_parameters())
        loss = lambda p, x: torch.func.functional_call(layer, p, (x,)).square().sum()  # noqa: B023, E731
        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])
        whole = torch.func.grad(loss)(parameters, x)
        for name in parameters:
            torch.testing.assert_close(per_sample[name].sum(0), whole[name], rtol=1e-3, atol=1e-2)
        tangent = torch.randn_like(x)
        _, moved = torch.func.jvp(layer, (x,), (tangent,))
        torch.testing.assert_close(
            moved, dense(tangent) - dense(torch.zeros_like(x)), rtol=1e-3, atol=1e-3
        )
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)
        checkpointed = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        torch.testing.assert_close(checkpointed, dense(x), rtol=1e-4, atol=1e-4)


def test_vmap_over_stacked_models():
    layers = [tp.register_tie(nn.Linear(64, 64), "row_repeat") for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(5, 64)
    run = lambda p, b: torch.func.functional_call(layers[0], (p, b), (x,))  # noqa: E731
    outputs = torch.func.vmap(run)(parameters, buffers)
    for layer, y in zip(layers, outputs, strict=True):
        torch.testing.assert_close(layer(x), y)


def test_compiled_code_knows_the_memory_format_and_where_none_can_be_asked():
    layer = tp.register_tie(nn.Conv2d(4, 4, 3), "channel_shared", compute="reduced")
    x = torch.randn(2, 4, 6, 5).to(memory_format=torch.channels_last)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert compiled(x).is_contiguous(memory_format=torch.channels_last)
    each = torch.compile(torch.func.vmap(lambda y: layer(y)), backend="eager", fullgraph=True)
    torch.testing.assert_close(each(x[None])[0], layer(x))


def test_other_readers_see_an_ordinary_weight():
    layer, dense = twins(nn.Linear(64, 64), "row_repeat", groups=2)
    weight = layer.weight
    assert torch.equal(weight, dense.weight)
    assert float(weight.detach().norm()) == pytest.approx(float(dense.weight.detach().norm()))
    assert repr(weight.detach()) == repr(dense.weight.detach())
    x = torch.randn(3, 64)
    sliced = nn.functional.linear(x, layer.weight[:5])
    torch.testing.assert_close(sliced, nn.functional.linear(x, dense.weight[:5]))
    sliced.sum().backward()
    assert layer.parametrizations.weight.original0.grad.abs().sum() > 0
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(module.weight.shape))
    layer(x)
    assert seen == [(64, 64)]


def test_a_parametrization_on_top_is_computed_dense():
    layer = tp.register_tie(nn.Linear(64, 64), "row_repeat")
    torch.nn.utils.parametrizations.spectral_norm(layer)
    x = torch.randn(3, 64)
    layer.eval()
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(1, rel=0.05)


def test_a_subclass_with_a_forward_of_its_own_is_left_alone():
    class Negated(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, -self.weight)

    class Standardized(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight - weight.mean(), bias)

    class Plain(nn.Linear):
        pass

    for layer, rule in (
        (Negated(64, 64), "row_repeat"),
        (Standardized(16, 16, 3), "channel_shared"),
        (Plain(64, 64), "row_repeat"),
    ):
        layer, dense = twins(layer, rule)
        x = sample(layer)
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-4)
    assert not forms.has_forms(Negated)
    assert not forms.has_forms(Standardized)
    assert forms.has_forms(Plain)


def test_training_keeps_the_summed_input_only():
    def saved_bytes(layer, x):
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        return sum(kept.values())

    layer, dense = twins(nn.Conv2d(64, 64, 3, padding=1), "channel_shared")
    x = torch.randn(8, 64, 16, 16, requires_grad=True)
    assert saved_bytes(dense, x) >= x.numel() * 4
    assert saved_bytes(layer, x) < x.numel() // 64 * 4 + 20_000


def test_output_size_of_transposed_convolutions():
    layer, dense = twins(nn.ConvTranspose2d(16, 16, 3, stride=2), "channel_shared")
    x = sample(layer)
    for size in ([13, 13], [14, 14]):
        torch.testing.assert_close(
            layer(x, output_size=size), dense(x, output_size=size), rtol=1e-4, atol=1e-4
        )
    with pytest.raises(ValueError, match="requested an output size"):
        layer(x, [40, 40])


def chosen(layer, rule, **options):
    return form_of(tp.register_tie(layer, rule, **options))


def test_the_choice_of_form_at_its_edges():
    conv = lambda c, o, k=3, **options: nn.Conv2d(c, o, k, **options)  # noqa: E731
    shared = "channel_shared"
    assert chosen(conv(3, 3), shared) == "dense"  # too little is saved
    assert chosen(conv(4, 4), shared) == "windows"
    assert chosen(conv(64, 64), shared) == "windows"
    assert chosen(conv(64, 64, 8), shared) == "windows"
    assert chosen(conv(64, 64, 9), shared) == "reduced"  # too many windows
    assert chosen(conv(64, 64, groups=8), shared) == "dense"
    assert chosen(conv(64, 64, groups=4), shared) == "reduced"
    assert chosen(nn.ConvTranspose2d(64, 64, 3), shared) == "reduced"
    assert chosen(nn.Conv1d(64, 64, 3), shared) == "windows"
    assert chosen(conv(64, 64), shared, over="out") == "reduced"
    assert chosen(conv(64, 64), shared, over="all") == "reduced"
    assert chosen(conv(64, 64), "row_repeat", groups=32) == "dense"
    assert chosen(conv(64, 64), "row_repeat", groups=16) == "reduced"
    assert chosen(nn.Linear(8, 8), "row_repeat", groups=8) == "dense"
    assert chosen(nn.Linear(8, 8), "row_repeat", groups=4) == "reduced"
    assert chosen(nn.Linear(8, 8), shared, over="in") == "reduced"
    assert chosen(nn.Conv1d(8, 32, 64, groups=8), shared, over="groups") == "windows"
    assert chosen(nn.Conv1d(8, 32, 65, groups=8), shared, over="groups") == "dense"
    assert chosen(nn.Conv1d(16, 32, 3, groups=8), shared, over="groups") == "dense"
    assert chosen(nn.ConvTranspose1d(8, 32, 3, groups=8), shared, over="groups") == "dense"


def test_a_form_that_does_not_apply_is_refused_and_nothing_changes():
    layer = nn.Linear(8, 8)
    weight = layer.weight
    with pytest.raises(tp.TieError, match="Choose 'auto' or one of 'dense', 'reduced'"):
        tp.register_tie(layer, "row_repeat", compute="windows")
    assert type(layer) is nn.Linear
    assert layer.weight is weight


def test_forced_forms_compute_the_same():
    layers = {
        form: tp.register_tie(nn.Conv2d(64, 64, 3), "channel_shared", compute=form)
        for form in ("dense", "reduced", "windows", "auto")
    }
    x = torch.randn(2, 64, 6, 6)
    for layer in layers.values():
        layer.load_state_dict(layers["dense"].state_dict())
        torch.testing.assert_close(layer(x), layers["dense"](x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("build", "rule", "options", "shape"),
    [
        (lambda bias: nn.Linear(64, 64, bias), "row_repeat", {}, (3, 64)),
        (lambda bias: nn.Linear(64, 64, bias), "row_repeat", {"groups": 2}, (3, 64)),
        (lambda bias: nn.Linear(8, 6, bias), "channel_shared", {"over": "in"}, (3, 8)),
        (lambda bias: nn.Conv2d(8, 8, 3, bias=bias), "row_repeat", {"groups": 2}, (2, 8, 5, 5)),
        (
            lambda bias: nn.Conv2d(8, 8, 3, bias=bias),
            "channel_shared",
            {"over": "all"},
            (2, 8, 5, 5),
        ),
        (
            lambda bias: nn.ConvTranspose2d(8, 8, 3, bias=bias),
            "channel_shared",
            {"over": "out"},
            (2, 8, 5, 5),
        ),
        (
            lambda bias: nn.Conv2d(8, 8, 3, bias=bias),
            "channel_shared",
            {"compute": "windows"},
            (2, 8, 5, 5),
        ),
    ],
)
def test_outputs_are_no_views_for_autograd(build, rule, options, shape, bias):
    # fully_shard hooks into outputs, and an in-place ReLU on a view would drop its hook
    layer, dense = twins(build(bias), rule, **options)
    assert form_of(layer) == options.get("compute", "reduced")
    x = torch.randn(shape)
    y = layer(x)
    assert not dense(x)._is_view()
    assert not y._is_view()
    torch.testing.assert_close(nn.functional.relu_(y), nn.functional.relu(dense(x)))


class Doubled(nn.Linear):
    """A layer with a forward of its own, which knows of no cheap form."""

    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [(nn.Bilinear(3, 3, 4), 2), (Doubled(3, 4), 1)],
    ids=["Bilinear", "Doubled"],
)
def test_a_form_that_a_layer_has_not_is_refused(layer, inputs):
    with pytest.raises(tp.TieError, match="compute='reduced' is not a form.*computes densely"):
        tp.register_tie(layer, "row_repeat", compute="reduced")
    assert not tp.is_tied(layer)
    if layer.bias is not None:
        with pytest.raises(tp.TieError, match="for the bias of a .*, which computes densely"):
            tp.register_tie(layer, "row_repeat", "bias", compute="another")
    layer, dense = twins(layer, "row_repeat")
    assert computing_of(layer) is None
    x = torch.randn(inputs, 5, 3)
    torch.testing.assert_close(layer(*x), dense(*x))


# Dense at once --------------------------------------------------------------------------------

LAYERS_AND_INPUTS = [
    (lambda: nn.Linear(6, 6), (3, 6)),
    (lambda: nn.Linear(6, 6, bias=False), (6,)),
    (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
    (lambda: nn.ConvTranspose1d(4, 4, 3, stride=2), (2, 4, 5)),
]


@pytest.mark.parametrize(("build", "shape"), LAYERS_AND_INPUTS)
def test_nothing_is_called_between_a_bare_layer_and_its_weight(build, shape, monkeypatch):
    layer, x, called = tp.register_tie(build(), "flip_sym"), torch.randn(shape), []
    kind = type(layer.parametrizations.weight)
    compute = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self: called.append(1) or compute(self))
    dense = tp.untie_model(copy.deepcopy(layer))
    called.clear()
    output = layer(x)
    assert torch.equal(output, dense(x))
    assert not called
    output.sum().backward()
    assert layer.parametrizations.weight.original0.grad is not None
    # and where somebody listens, everything is called
    handle = layer.parametrizations.weight[0].register_forward_hook(lambda *_: None)
    assert torch.equal(layer(x), output)
    assert len(called) == 1
    handle.remove()
    layer(input=x)
    assert len(called) == 2
    if layer.bias is not None:
        tp.register_tie(layer, "row_repeat", "bias")
        called.clear()
        layer(x)
        assert len(called) == 2  # both tensors, by torch's own path


def test_an_attribute_error_of_a_law_is_told_as_before():
    class Broken(tp.Rule):
        law = "W = w"

        def free_shapes(self):
            return (self.bound_layout.shape,)

        def forward(self, w):
            return w.nothing if getattr(self, "broken", False) else w + 0

        def symmetries(self, weight):
            return ()

    layer = tp.register_tie(nn.Linear(3, 3), Broken)
    layer.parametrizations.weight[0].broken = True
    with pytest.raises(tp.TieError, match="computing the tied 'weight'.* raised AttributeError"):
        layer(torch.randn(2, 3))
