"""repeat: both orders by torch's own repetitions, literal vectors, counts and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tiedparam as tp
from tests.support import form_of
from tests.support.cases import COMPUTE, DTYPES, assert_refused, canonical_entries
from tests.support.tensors import free_value

KINDS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def as_torch_repeats(base: Tensor, times: int, order: str, inputs: int = 1) -> Tensor:
    """The law by functions that are not ours."""
    copies = (times, inputs)[: base.dim()]
    if order == "tile":
        return base.tile((*copies, *(1,) * (base.dim() - 2)))
    for axis, count in enumerate(copies):
        base = base.repeat_interleave(count, axis)
    return base


def same(one: int, other: int, size: int, times: int, order: str) -> bool:
    """Whether two places of an axis hold one value."""
    if order == "block":
        return one // times == other // times
    return one % (size // times) == other % (size // times)


@st.composite
def layers_and_options(draw: st.DrawFn) -> tuple[nn.Module, str, dict[str, Any]]:
    dtype = draw(st.sampled_from(DTYPES))
    torch.manual_seed(draw(st.integers(0, 100)))
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    outputs = groups * per_group
    times = draw(st.sampled_from([n for n in range(1, outputs + 1) if outputs % n == 0]))
    order, name = (
        draw(st.sampled_from(["block", "tile"])),
        draw(st.sampled_from(["weight", "bias"])),
    )
    of_group = draw(st.integers(1, 6))
    inputs = groups * of_group
    divisors = [n for n in range(1, of_group + 1) if of_group % n == 0]
    options: dict[str, Any] = {"outputs": times, "order": order}
    if name == "weight":
        options["inputs"] = draw(st.sampled_from(divisors))
    dims = draw(st.integers(0, 3))
    if dims == 0:
        if name == "weight":  # the groups of this draw are none here
            options["inputs"] = draw(st.sampled_from([inputs, options["inputs"]]))
        return nn.Linear(inputs, outputs, dtype=dtype), name, options
    kernel = tuple(draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims)))
    kind = KINDS[dims - 1 + (3 if draw(st.booleans()) else 0)]
    return kind(inputs, outputs, kernel, groups=groups, dtype=dtype), name, options


@pytest.mark.filterwarnings("ignore:the tie of .* frees nothing")  # some draws do
@given(layers_and_options())
def test_the_weight_is_what_torch_repeats(drawn):
    layer, name, options = drawn
    times, inputs, order = options["outputs"], options.get("inputs", 1), options["order"]
    dense = canonical_entries(layer, name)
    tp.register_tie(layer, "repeat", name, **options)
    rule, base = tp.get_tie(layer, name), free_value(layer, name).detach()
    weight = rule.bound_layout.canonical(getattr(layer, name).detach().clone())
    assert torch.equal(weight, as_torch_repeats(base, times, order, inputs))
    assert base.numel() == len(dense) // (times * inputs)
    (counts,) = rule.multiplicities()
    assert counts.unique().tolist() == [times * inputs]
    # the projection: means by loops
    copies = (times, inputs)[: weight.dim()]
    eps = torch.finfo(weight.dtype).eps
    for place, value in list(canonical_entries(layer, name).items())[::7]:
        channels, position = place[:2], place[2:]
        tied = [
            entry for at, entry in dense.items()
            if at[2:] == position and all(
                same(here, there, size, count, order) for here, there, size, count
                in zip(channels, at[:2], weight.shape, copies, strict=False)
            )
        ]  # fmt: skip
        assert len(tied) == times * inputs
        assert value == pytest.approx(sum(tied) / len(tied), rel=eps, abs=2 * eps)


@pytest.mark.filterwarnings("ignore:the tie of .* frees nothing")  # some draws do
@given(layers_and_options())
def test_lawful_weights_are_accepted_to_the_bit(drawn):
    layer, name, options = drawn
    tp.register_tie(layer, "repeat", name, **options)
    lawful = getattr(layer, name).detach().clone()
    tp.remove_tie(layer, name)
    tp.register_tie(layer, "repeat", name, **options, init="exact")
    assert torch.equal(getattr(layer, name), lawful)


def test_literal_vectors():
    for order, expected in (("block", [2, 2, 20, 20]), ("tile", [5.5, 16.5, 5.5, 16.5])):
        layer = nn.Linear(1, 4)
        with torch.no_grad():
            layer.bias.copy_(torch.tensor([1.0, 3.0, 10.0, 30.0]))
        tp.register_tie(layer, "repeat", "bias", outputs=2, order=order)
        assert layer.bias.tolist() == expected


def test_literal_transposed_convolution_repeats_outputs_not_inputs():
    layer = nn.ConvTranspose1d(2, 4, 1)  # stored as (in, out, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(8.0).reshape(2, 4, 1))
    tp.register_tie(layer, "repeat", outputs=2, order="tile")
    assert layer.weight[..., 0].tolist() == [[1, 2, 1, 2], [5, 6, 5, 6]]


def test_blocks_are_row_repeat_told_how_often():
    weight = torch.randn(12, 5)
    one, other = nn.Linear(5, 12), nn.Linear(5, 12)
    for layer, rule, options in (
        (one, "repeat", {"outputs": 4}),
        (other, "row_repeat", {"groups": 3}),
    ):
        with torch.no_grad():
            layer.weight.copy_(weight)
        tp.register_tie(layer, rule, **options)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(free_value(one), free_value(other))
    assert form_of(one) == form_of(other) == "reduced"


@pytest.mark.parametrize("order", ["block", "tile"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(5, 12), (7, 5)),
        (lambda: nn.Conv1d(2, 12, 3), (2, 2, 9)),
        (lambda: nn.Conv1d(1, 12, 3), (2, 1, 9)),  # one channel, and no groups to be streams
        (lambda: nn.Conv1d(2, 12, 3, groups=2), (2, 2, 9)),  # tiles are finer than the groups
        (lambda: nn.Conv1d(4, 12, 3, groups=4), (2, 4, 9)),  # tiles are the groups: streams
        (lambda: nn.Conv2d(6, 12, 3, groups=6), (2, 6, 5, 5)),  # and a group has a half of one
        (lambda: nn.ConvTranspose1d(4, 12, 3, groups=2), (2, 4, 9)),
    ],
    ids=["Linear", "Conv", "one-channel", "finer", "streams", "coarser", "transposed"],
)
def test_output_and_gradient_are_those_of_the_dense_layer(layer, shape, order):
    layer = layer().double()
    tp.register_tie(layer, "repeat", outputs=4, order=order)
    dense = tp.remove_tie(tp.register_tie(type(layer)(*arguments(layer)).double(), "repeat",
                                          outputs=4, order=order))  # fmt: skip
    with torch.no_grad():
        for mine, theirs in zip(dense.parameters(), (layer.weight, layer.bias), strict=True):
            mine.copy_(theirs)
    x = torch.randn(shape, dtype=torch.float64)
    one, other = layer(x), dense(x)
    torch.testing.assert_close(one, other, **COMPUTE[torch.float64])
    cotangent = torch.randn_like(one)
    one.backward(cotangent)
    other.backward(cotangent)
    rule = tp.get_tie(layer)
    summed = rule.bound_layout.canonical(dense.weight.grad)
    outputs = summed.reshape(-1, 4, *summed.shape[1:]).sum(1) if order == "block" else (
        summed.reshape(4, -1, *summed.shape[1:]).sum(0)
    )  # fmt: skip
    torch.testing.assert_close(
        free_value(layer).grad, outputs.reshape(free_value(layer).shape), **COMPUTE[torch.float64]
    )


def arguments(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    rest = (1, 0, 0, layer.groups) if layer.transposed else (1, 0, 1, layer.groups)
    return layer.in_channels, layer.out_channels, layer.kernel_size, *rest


def test_streams_with_tied_biases_filter_every_channel_alike():
    conv = nn.Conv1d(16, 48, 5, groups=16)
    tp.register_tie(conv, "channel_shared", over="groups", init="rescale")
    tp.register_tie(conv, "repeat", "bias", outputs=16, order="tile", init="rescale")
    signal = torch.randn(2, 1, 20)
    streams = conv(signal.expand(2, 16, 20)).reshape(2, 16, 3, 16)
    once = F.conv1d(signal, free_value(conv), free_value(conv, "bias"))
    torch.testing.assert_close(streams, once[:, None].expand_as(streams))


def test_no_table_is_kept():
    layer = tp.register_tie(nn.Linear(64, 512, bias=False), "repeat", outputs=8, order="tile")
    assert sum(p.numel() for p in layer.parameters()) == 64 * 64
    rule = tp.get_tie(layer)
    assert not list(rule.buffers())
    assert not any(isinstance(value, Tensor) for value in vars(rule).values())


def test_variants_on_a_bias_of_streams_and_elsewhere():
    kind = tp.available_rules()["repeat"]
    conv = nn.Conv1d(4, 8, 3, groups=4)
    bias, weight = (
        tp.Layout.of(conv, name, tuple(getattr(conv, name).shape)) for name in ("bias", "weight")
    )
    assert kind.variants(bias) == ({"outputs": 4, "order": "tile"},)
    assert kind.variants(weight) == ({"outputs": 1},)  # how often is a choice
    assert bias == tp.Layout((8,))  # as in files of before: its axes are those of any vector
    with torch.no_grad():
        conv.bias.copy_(torch.tensor([1.0, 2.0]).tile(4))
    (found,) = tp.scan(conv, ["repeat"]).candidates  # and none that ties nothing
    assert (found.tensor_name, found.residual) == ("bias", 0)


# What does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [4, 7])
def test_refuses_what_does_not_divide(outputs):
    assert_refused(
        nn.Linear(5, 6), "repeat", "cannot tie 'weight' of Linear(",
        f"6 outputs cannot stand outputs={outputs} times each", "Choose a divisor of 6",
        outputs=outputs,
    )  # fmt: skip


@pytest.mark.parametrize("outputs", [0, -2, True, 2.0, "2", None, [2]], ids=repr)
def test_refuses_what_is_no_positive_integer(outputs):
    assert_refused(
        nn.Linear(4, 4), "repeat", f"outputs must be a positive integer, not {outputs!r}",
        outputs=outputs,
    )  # fmt: skip


@pytest.mark.parametrize("order", ["blocks", "TILE", "", None, 3, ["tile"]], ids=repr)
def test_refuses_an_unknown_order(order):
    assert_refused(
        nn.Linear(4, 4), "repeat", f"order={order!r} is unknown. Choose one of 'block', 'tile'",
        outputs=2, order=order,
    )  # fmt: skip


def test_literal_inputs():
    for order, expected in (
        ("block", [[3.5, 3.5, 5.5, 5.5]] * 2),
        ("tile", [[4.0, 5.0, 4.0, 5.0]] * 2),
    ):
        layer = nn.Linear(4, 2)
        with torch.no_grad():
            layer.weight.copy_(torch.arange(1.0, 9.0).reshape(2, 4))
        tp.register_tie(layer, "repeat", outputs=2, inputs=2, order=order)
        assert layer.weight.tolist() == expected
        assert free_value(layer).shape == (1, 2)


def test_inputs_that_are_all_equal_are_summed_first():
    layer = nn.Linear(64, 48)
    tp.register_tie(layer, "repeat", inputs=64)
    assert form_of(layer) == "reduced"
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    some = tp.register_tie(nn.Linear(64, 48), "repeat", inputs=32)
    assert not tp.get_tie(some).reduction().summed
    torch.testing.assert_close(some(x), F.linear(x, some.weight, some.bias))


def test_a_file_holds_both_numbers(tmp_path):
    layer = tp.register_tie(nn.Linear(6, 4), "repeat", outputs=2, inputs=3, order="tile")
    tp.save(layer, tmp_path / "layer.safetensors")
    other = tp.load(tmp_path / "layer.safetensors", nn.Linear(6, 4))
    assert torch.equal(other.weight, layer.weight)
    assert str(tp.get_tie(other)) == "repeat(outputs=2, inputs=3, order='tile')"


@pytest.mark.parametrize("inputs", [4, 7])
def test_refuses_inputs_that_do_not_divide(inputs):
    assert_refused(
        nn.Linear(6, 5), "repeat", f"6 inputs cannot stand inputs={inputs} times each",
        "Choose a divisor of 6", inputs=inputs,
    )  # fmt: skip
    assert_refused(
        nn.Conv1d(12, 4, 3, groups=2), "repeat", "6 inputs of a group cannot stand",
        f"inputs={inputs} times each", inputs=inputs,
    )  # fmt: skip


def test_refuses_inputs_of_a_vector():
    assert_refused(
        nn.Linear(6, 4), "repeat", "the tensor (4,) has no inputs that could stand inputs=2 times",
        tensor_name="bias", outputs=2, inputs=2,
    )  # fmt: skip


@pytest.mark.parametrize("inputs", [0, -2, True, 2.0, "2", None, [2]], ids=repr)
def test_refuses_inputs_that_are_no_positive_integer(inputs):
    assert_refused(
        nn.Linear(4, 4), "repeat", f"inputs must be a positive integer, not {inputs!r}",
        inputs=inputs,
    )  # fmt: skip


def test_without_options_it_ties_nothing_and_says_so():
    with pytest.warns(tp.TieWarning, match="frees nothing"):
        tp.register_tie(nn.Linear(4, 4), "repeat")


def test_refuses_scalars():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

    assert_refused(Scale(), "repeat", "without axes has no outputs", outputs=1)
