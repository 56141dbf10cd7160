"""copy and squared_copy: a weight that is a function of another layer's weight."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import re

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tiedparam as tp
from tests.support.cases import DTYPES, assert_refused


def values(layer: nn.Module, tensor_name: str = "weight") -> Tensor:
    return getattr(layer, tensor_name).detach().clone()


def two_convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))


def squared_pair(**arguments) -> nn.Sequential:
    """Story 4: the second layer has the squares of the first one's weight and bias."""
    model = two_convolutions()
    tp.register_tie(model[1], "squared_copy", source=model[0], **arguments)
    tp.register_tie(model[1], "squared_copy", "bias", source=model[0], **arguments)
    return model


# The law ------------------------------------------------------------------------------------

FUNCTIONS = {
    "identity": None,
    "square": torch.square,
    "minus": torch.neg,
    "flip": lambda w: w.flip(0),
    "swap": lambda w: w.transpose(0, 1),
    "normed": lambda w: w / w.norm(),
}
KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)


@given(
    kind=st.sampled_from(KINDS),
    size=st.integers(1, 4),
    kernel=st.integers(1, 3),
    name=st.sampled_from(sorted(FUNCTIONS)),
    dtype=st.sampled_from(DTYPES),
    tensor_name=st.sampled_from(["weight", "bias"]),
)
def test_law_in_words(kind, size, kernel, name, dtype, tensor_name):
    fn = FUNCTIONS[name]
    if name == "swap" and tensor_name == "bias":
        fn = FUNCTIONS["flip"]
    options = {} if kind is nn.Linear else {"kernel_size": kernel}
    source, layer = (kind(size, size, **options, dtype=dtype) for _ in range(2))
    tp.register_tie(layer, "copy", tensor_name, source=source, **({"fn": fn} if fn else {}))
    expected = values(source, tensor_name)
    assert torch.equal(values(layer, tensor_name), fn(expected) if fn else expected)
    with torch.no_grad():  # always, not only at registration
        getattr(source, tensor_name).add_(1)
    changed = values(source, tensor_name)
    assert not torch.equal(changed, expected)
    assert torch.equal(values(layer, tensor_name), fn(changed) if fn else changed)
    assert not list(layer.parametrizations.parameters())


def test_the_network_has_only_the_first_layers_parameters():
    model = squared_pair()
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    for name in ("weight", "bias"):
        assert torch.equal(values(model[1], name), values(model[0], name) ** 2)
        assert tp.get_tie(model[1], name).free_count == 0


def test_law_holds_through_training_casts_and_loading():
    model, other = squared_pair(), squared_pair()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    before = values(model[1])
    x = torch.randn(2, 3, 6, 6)
    for _ in range(20):
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()
    assert not torch.equal(values(model[1]), before)
    assert torch.equal(values(model[1]), values(model[0]) ** 2)
    model.double()
    assert torch.equal(values(model[1]), values(model[0]) ** 2)
    model.float().load_state_dict(other.state_dict())
    assert torch.equal(values(model[1]), values(other[0]) ** 2)


def test_stock_options_of_the_layer_keep_working():
    options = {"padding": 2, "padding_mode": "circular", "stride": 2, "dilation": 2}
    source = nn.Conv2d(3, 3, 3, dtype=torch.float64)
    layer = nn.Conv2d(3, 3, 3, **options, dtype=torch.float64)
    tp.register_tie(layer, "squared_copy", source=source)
    plain = nn.Conv2d(3, 3, 3, **options, dtype=torch.float64)
    plain.load_state_dict({"weight": values(source) ** 2, "bias": values(layer, "bias")})
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    assert torch.equal(layer(x), plain(x))


# Gradients of both uses ---------------------------------------------------------------------


def chain_of_scalars(*rules: str) -> nn.Sequential:
    """``Linear(1, 1)`` layers without biases; each is tied to the one before it by a rule."""
    layers = [nn.Linear(1, 1, bias=False) for _ in range(len(rules) + 1)]
    with torch.no_grad():
        layers[0].weight.fill_(3.0)
    for source, layer, rule in zip(layers, layers[1:], rules, strict=False):
        tp.register_tie(layer, rule, source=source)
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("rules", "output", "slope"),
    [
        (["copy"], 9, 6),  # y = a·a·x, y' = 2a·x
        (["squared_copy"], 27, 27),  # y = a²·a·x, y' = 3a²·x
        (["copy", "copy"], 27, 27),  # a³
        (["squared_copy", "copy"], 243, 405),  # a⁵, 5a⁴
        (["copy", "squared_copy"], 81, 108),  # a⁴, 4a³
        (["squared_copy", "squared_copy"], 2187, 5103),  # a⁷, 7a⁶
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_gradients_of_all_uses_arrive_in_the_source(rules, output, slope):
    model = chain_of_scalars(*rules)
    y = model(torch.ones(1, 1))
    assert y.item() == output
    y.backward()
    (parameter,) = model.parameters()
    assert parameter is model[0].weight
    assert parameter.grad.item() == slope


def test_gradients_of_two_copies_of_one_source_add_up():
    source = nn.Linear(2, 2, bias=False)
    copies = [tp.register_tie(nn.Linear(2, 2, bias=False), "copy", source=source) for _ in "ab"]
    x = torch.tensor([1.0, 2.0])
    (source(x) + 10 * copies[0](x) + 100 * copies[1](x)).sum().backward()
    assert source.weight.grad.tolist() == [[111.0, 222.0], [111.0, 222.0]]


def test_a_source_may_be_tied_itself():
    source = tp.register_tie(nn.Linear(3, 4, bias=False), "row_repeat")
    layer = tp.register_tie(nn.Linear(3, 4, bias=False), "squared_copy", source=source)
    assert torch.equal(values(layer), values(source) ** 2)
    (row,) = source.parameters()
    layer(torch.ones(3)).sum().backward()
    torch.testing.assert_close(row.grad, 4 * 2 * row.detach())


def test_a_copy_may_be_computed_from_another_tensor_of_its_layer():
    layer = nn.Linear(3, 4)
    tp.register_tie(
        layer, "copy", "bias", source=layer, source_name="weight", fn=lambda w: w.sum(1)
    )
    assert torch.equal(values(layer, "bias"), values(layer).sum(1))
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    layer(torch.zeros(3)).sum().backward()
    assert layer.weight.grad.tolist() == [[1.0] * 3] * 4


def test_functional_call_reaches_the_copy():
    model = chain_of_scalars("copy")
    x = torch.ones(1, 1)
    assert torch.func.functional_call(model, {"0.weight": torch.tensor([[5.0]])}, x).item() == 25
    slope = torch.func.grad(lambda w: torch.func.functional_call(model, {"0.weight": w}, x).sum())
    assert slope(torch.tensor([[5.0]])).item() == 10
    assert model(x).item() == 9


# Functions ----------------------------------------------------------------------------------


def test_transposed_weight_of_a_tied_autoencoder():
    encoder, decoder = nn.Linear(5, 3), nn.Linear(3, 5)
    model = nn.Sequential(encoder, nn.Tanh(), decoder)
    tp.register_tie(decoder, "copy", source=encoder, fn=torch.t)
    assert torch.equal(values(decoder), values(encoder).T)
    assert sum(p.numel() for p in model.parameters()) == 15 + 3 + 5
    model(torch.randn(4, 5)).square().sum().backward()
    plain = nn.Linear(3, 5)
    plain.load_state_dict({"weight": values(encoder).T, "bias": values(decoder, "bias")})
    hidden = torch.randn(4, 3)
    torch.testing.assert_close(decoder(hidden), plain(hidden))


def test_tile_and_crop_where_the_channels_differ():
    narrow, wide = nn.Conv2d(16, 32, 3), nn.Conv2d(32, 64, 3)
    tp.register_tie(wide, "copy", source=narrow, fn=lambda w: w.repeat(2, 2, 1, 1) ** 2)
    for block in (values(wide)[:32, :16], values(wide)[32:, :16], values(wide)[32:, 16:]):
        assert torch.equal(block, values(narrow) ** 2)
    tp.register_tie(wide, "copy", "bias", source=narrow, fn=lambda b: b.repeat(2) ** 2)
    assert torch.equal(values(wide, "bias"), torch.cat([values(narrow, "bias") ** 2] * 2))
    assert not list(wide.parameters())
    wide(narrow(torch.randn(1, 16, 6, 6))).sum().backward()
    assert narrow.weight.grad.abs().min() > 0

    narrow, wide = nn.Conv2d(16, 32, 3), nn.Conv2d(32, 64, 3)
    tp.register_tie(narrow, "copy", source=wide, fn=lambda w: w[:32, :16])
    assert torch.equal(values(narrow), values(wide)[:32, :16])
    narrow(torch.randn(1, 16, 6, 6)).square().sum().backward()
    assert wide.weight.grad[:32, :16].abs().min() > 0
    assert wide.weight.grad[32:].abs().max() == 0


def test_embedding_and_output_layer_of_a_language_model():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    tp.register_tie(model[1], "copy", source=model[0])
    tokens = torch.tensor([[1, 2, 3]])
    expected = values(model[0])[tokens] @ values(model[0]).T
    torch.testing.assert_close(model(tokens), expected)
    assert sum(p.numel() for p in model.parameters()) == 40


def test_bias_by_a_function():
    source, layer = nn.Linear(3, 4), nn.Linear(3, 4)
    weight = layer.weight
    tp.register_tie(layer, "copy", "bias", source=source, fn=torch.square)
    assert torch.equal(values(layer, "bias"), values(source, "bias") ** 2)
    assert layer.weight is weight
    assert not tp.is_tied(layer, "weight")


def test_options_are_shown():
    source = nn.Linear(3, 3)
    assert "copy: W = fn(source.W); 0 of 9 values" in repr(
        tp.register_tie(nn.Linear(3, 3), "copy", source=source)
    )
    assert "square" in repr(
        tp.register_tie(nn.Linear(3, 3), "copy", source=source, fn=torch.square)
    )
    assert "squared_copy: W = source.W²; 0 of 9 values" in repr(
        tp.register_tie(nn.Linear(3, 3), "squared_copy", source=source)
    )


# Sources ------------------------------------------------------------------------------------


def test_source_as_a_path():
    model = nn.ModuleDict({"encoder": two_convolutions(), "head": nn.Conv2d(3, 3, 3)})
    tp.register_tie(model["head"], "copy", source="encoder.1", root=model)
    assert torch.equal(values(model["head"]), values(model["encoder"][1]))
    assert next(tp.get_tie(model["head"]).sources()) == (model["encoder"][1], "weight")


def test_source_name():
    source = nn.Bilinear(2, 3, 4)
    layer = nn.Linear(2, 4)
    tp.register_tie(
        layer, "copy", source=source, source_name="bias", fn=lambda b: b[:, None].expand(4, 2)
    )
    assert torch.equal(values(layer), values(source, "bias")[:, None].expand(4, 2))


def test_untying_the_middle_of_a_chain():
    a, b, c = (nn.Linear(2, 2) for _ in range(3))
    tp.register_tie(b, "copy", source=a)
    tp.register_tie(c, "squared_copy", source=b)
    before = values(a)
    assert torch.equal(values(c), before**2)
    tp.remove_tie(b)
    with torch.no_grad():
        a.weight.zero_()
        b.weight.add_(1)
    assert torch.equal(values(b), before + 1)
    assert torch.equal(values(c), (before + 1) ** 2)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("tensor_name", ["weight", "bias"])
def test_refuses_cycles(length, tensor_name):
    layers = [nn.Linear(2, 2) for _ in range(length)]
    for source, layer in itertools.pairwise(layers):
        tp.register_tie(layer, "copy", tensor_name, source=source)
    before = [values(layer, tensor_name) for layer in layers]
    assert_refused(
        layers[0],
        "squared_copy",
        f"cannot tie '{tensor_name}' of Linear",
        "the ties would form a cycle",
        "Tie both layers to a third",
        tensor_name=tensor_name,
        source=layers[-1],
    )
    for layer, value in zip(layers, before, strict=True):
        assert torch.equal(values(layer, tensor_name), value)


def test_refuses_a_path_without_a_model():
    assert_refused(
        nn.Linear(2, 2),
        "copy",
        "the source 'encoder' is a path",
        "Pass root=model",
        source="encoder",
    )


def test_refuses_a_path_that_leads_nowhere():
    model = two_convolutions()
    assert_refused(
        model[1], "copy", "cannot tie '1.weight'", "no layer '7'", "source=", source="7", root=model
    )


@pytest.mark.parametrize(
    ("source", "source_name", "missing"),
    [
        (nn.ReLU(), None, "weight"),
        (nn.Linear(2, 2), "kernel", "kernel"),
        (nn.Sequential(nn.Linear(2, 2)), None, "weight"),
    ],
    ids=["no parameters", "no such name", "a container"],
)
def test_refuses_a_source_without_the_tensor(source, source_name, missing):
    assert_refused(
        nn.Linear(2, 2),
        "copy",
        f"the source {type(source).__name__}(",
        f"has no tensor '{missing}'",
        "source_name=",
        source=source,
        source_name=source_name,
    )


def test_refuses_a_source_without_a_bias():
    assert_refused(
        nn.Linear(2, 2),
        "copy",
        "has no tensor 'bias'",
        tensor_name="bias",
        source=nn.Linear(2, 2, bias=False),
    )


def test_refuses_a_lazy_source():
    assert_refused(
        nn.Linear(2, 2), "copy", "the source is lazy", "forward pass first", source=nn.LazyLinear(2)
    )


@pytest.mark.parametrize(
    ("rule", "remedy"),
    [("copy", "Pass fn= to 'copy'"), ("squared_copy", "Use 'copy' with an fn=")],
)
def test_refuses_shapes_that_do_not_fit_and_names_both(rule, remedy):
    assert_refused(
        nn.Conv2d(32, 64, 3),
        rule,
        "cannot tie 'weight' of Conv2d(32, 64",
        "(32, 16, 3, 3)",
        "(64, 32, 3, 3)",
        remedy,
        source=nn.Conv2d(16, 32, 3),
    )


@pytest.mark.parametrize(
    ("fn", "parts"),
    [
        (lambda w: w.view(7), ["fn raised RuntimeError", "(3, 2)", "Correct fn="]),
        (lambda w: w.sum().missing, ["fn raised AttributeError", "missing", "Correct fn="]),
        (lambda w: w.tolist(), ["fn must return a tensor, not list", "Correct fn="]),
        (lambda w: None, ["fn must return a tensor, not NoneType"]),
        (lambda w: w.t(), ["(3, 2)", "gives (2, 3)", "fn="]),
        (lambda w: w.double(), ["torch.float64", "torch.float32"]),
    ],
    ids=["raises", "masked attribute", "no tensor", "nothing", "shape", "dtype"],
)
def test_refuses_functions_that_do_not_fit(fn, parts):
    assert_refused(nn.Linear(2, 3), "copy", *parts, source=nn.Linear(2, 3), fn=fn)


def test_refuses_other_dtypes():
    assert_refused(
        nn.Linear(2, 3),
        "squared_copy",
        "torch.float64",
        "torch.float32",
        "Convert one of the layers first",
        source=nn.Linear(2, 3).double(),
    )


@pytest.mark.parametrize(
    ("rule", "options", "part"),
    [
        ("copy", {}, "source"),
        ("copy", {"source": 3}, "source="),
        ("copy", {"source": None}, "source="),
        ("copy", {"source": torch.zeros(2, 2)}, "source="),
        ("copy", {"source": nn.Linear(2, 2).weight}, "source="),
        ("copy", {"source": nn.Linear(2, 2), "fn": 3}, "fn="),
        ("copy", {"source": nn.Linear(2, 2), "fn": None}, "fn="),
        ("copy", {"source": nn.Linear(2, 2), "over": "in"}, "over"),
        ("squared_copy", {"source": nn.Linear(2, 2), "fn": torch.square}, "fn"),
        ("squared_copy", {}, "source"),
    ],
)
def test_refuses_options_of_a_wrong_type(rule, options, part):
    assert_refused(nn.Linear(2, 2), rule, part, error=TypeError, **options)


def test_refuses_a_source_name_of_a_wrong_type():
    assert_refused(
        nn.Linear(2, 2),
        "copy",
        error=(TypeError, tp.TieError),
        source=nn.Linear(2, 2),
        source_name=3,
    )


# Init modes and writes ----------------------------------------------------------------------


def test_exact_accepts_equal_weights_and_refuses_others():
    source, layer = nn.Linear(3, 3), nn.Linear(3, 3)
    message = assert_refused(layer, "copy", "breaks the law", source=source, init="exact")
    residual = tp.residual(layer, "copy", source=source)
    assert f"residual {residual:.2e}" in message
    layer.load_state_dict(source.state_dict())
    tp.register_tie(layer, "copy", source=source, init="exact")
    assert torch.equal(values(layer), values(source))


def test_rescale_has_no_meaning_for_a_copy():
    assert_refused(
        nn.Linear(3, 3), "copy", "no values of its own", source=nn.Linear(3, 3), init="rescale"
    )


def test_residual_of_independent_layers_is_the_root_of_two():
    source, layer = nn.Linear(300, 300), nn.Linear(300, 300)
    found = tp.residual(layer, "copy", source=source)
    assert found == pytest.approx(math.sqrt(2), rel=0.01)
    difference = (values(layer) - values(source)).norm() / values(layer).norm()
    assert found == pytest.approx(float(difference), rel=1e-5)
    assert not tp.is_tied(layer)
    layer.load_state_dict(source.state_dict())
    assert tp.residual(layer, "copy", source=source) == 0
    tp.register_tie(layer, "copy", source=source)
    assert tp.get_tie(layer).residual(values(layer)) == 0


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: setattr(layer, "weight", torch.zeros(3, 3)),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(3, 3))),
        lambda layer: tp.assign_(layer, torch.zeros(3, 3)),
        lambda layer: tp.assign_(layer, torch.zeros(3, 3), project=True),
        lambda layer: nn.init.zeros_(layer.weight),
    ],
    ids=["attribute", "parameter", "assign_", "project", "init"],
)
def test_assignment_raises(write):
    source, layer = nn.Linear(3, 3), nn.Linear(3, 3)
    tp.register_tie(layer, "copy", source=source)
    before = values(source)
    with pytest.raises(tp.TieError, match="'weight' of Linear"):
        write(layer)
    assert torch.equal(values(source), before)
    assert torch.equal(values(layer), before)


def test_initialisation_leaves_the_copy_alone_and_resets_the_rest():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tp.register_tie(model[1], "copy", source=model[0])
    weight, bias = values(model[0]), values(model[1], "bias")
    model[1].reset_parameters()
    assert torch.equal(values(model[0]), weight)
    assert torch.equal(values(model[1]), weight)
    assert not torch.equal(values(model[1], "bias"), bias)
    tp.init_(model[1], nn.init.zeros_)
    assert torch.equal(values(model[0]), weight)

    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            if tp.is_tied(module, "weight"):
                tp.init_(module, nn.init.zeros_)
            else:
                nn.init.ones_(module.weight)

    model.apply(initialise)
    assert values(model[1]).eq(1).all()


# Copies of the model, checkpoints, exchanged layers -----------------------------------------


def linked_first() -> nn.ModuleDict:
    """The linked layer stands before its source, so deepcopy and loading meet it first."""
    model = nn.ModuleDict({"linked": nn.Linear(3, 3), "source": nn.Linear(3, 3)})
    tp.register_tie(model["linked"], "squared_copy", source="source", root=model)
    return model


@pytest.mark.feature("Copies and files", "deepcopy of a model with a copy in it")
@pytest.mark.parametrize("known_root", [True, False])
@pytest.mark.parametrize("first", ["linked", "source"])
def test_s13_deepcopy_of_the_whole_model_is_independent(first, known_root):
    second = {"linked": "source", "source": "linked"}[first]
    model = nn.ModuleDict({first: nn.Linear(3, 3), second: nn.Linear(3, 3)})
    root = {"root": model} if known_root else {}
    tp.register_tie(model["linked"], "squared_copy", source=model["source"], **root)
    before = values(model["linked"])
    replica = copy.deepcopy(model)
    assert next(tp.get_tie(replica["linked"]).sources())[0] is replica["source"]
    with torch.no_grad():
        model["source"].weight.zero_()
    assert torch.equal(values(replica["linked"]), before)
    with torch.no_grad():
        replica["source"].weight.fill_(2)
    assert values(replica["linked"]).eq(4).all()
    assert values(model["linked"]).eq(0).all()
    assert len(list(replica.parameters())) == 3


def test_s13_a_teacher_follows_its_own_source():
    student = linked_first()
    teacher = copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    student["linked"](torch.ones(3)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
            ours.lerp_(theirs, 0.5)
    for model in (student, teacher):
        assert torch.equal(values(model["linked"]), values(model["source"]) ** 2)
    assert not torch.equal(values(teacher["linked"]), values(student["linked"]))


@pytest.mark.feature(
    "Copies and files",
    "deepcopy of a copy-tied layer without its source",
    refused="it would have a source that nobody trains; copy a module that holds both, or untie",
)
def test_s13_deepcopy_of_the_linked_layer_alone_is_refused():
    for model in (linked_first(), squared_pair()):
        layer = next(m for m in model.modules() if tp.is_tied(m, recurse=False))
        with pytest.raises(tp.TieError, match="without its source") as caught:
            copy.deepcopy(layer)
        assert "remove_tie" in str(caught.value)
        assert tp.is_tied(layer)
        copy.deepcopy(model)  # nothing was left behind that would stop this


def test_s13_deepcopy_of_a_part_without_the_source_is_refused():
    model = nn.ModuleDict(
        {"body": nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "in": nn.Linear(3, 3)}
    )
    tp.register_tie(model["body"][0], "copy", source="in", root=model)
    with pytest.raises(tp.TieError, match="without its source"):
        copy.deepcopy(model["body"])
    replica = copy.deepcopy(model)
    with pytest.raises(tp.TieError, match="without its source"):
        copy.deepcopy(replica["body"])
    outer = copy.deepcopy(nn.Sequential(model))
    assert next(tp.get_tie(outer[0]["body"][0]).sources())[0] is outer[0]["in"]


def test_s13_deepcopy_of_a_part_with_both_ends():
    part = linked_first()
    model = nn.Sequential(part, nn.Linear(3, 3))
    replica = copy.deepcopy(model[0])
    assert next(tp.get_tie(replica["linked"]).sources())[0] is replica["source"]
    assert replica["source"] is not part["source"]


def test_s13_pickle_of_the_whole_model():
    model = linked_first()
    replica = pickle.loads(pickle.dumps(model))
    assert next(tp.get_tie(replica["linked"]).sources())[0] is replica["source"]
    with torch.no_grad():
        replica["source"].weight.fill_(2)
    assert values(replica["linked"]).eq(4).all()
    assert not values(model["linked"]).eq(4).any()


def test_s27_no_key_stands_twice():
    model = squared_pair()
    entries = model.state_dict()
    assert list(entries) == ["0.weight", "0.bias"]
    assert [name for name, _ in model.named_modules() if "parametrizations" in name] == [
        "1.parametrizations",
        "1.parametrizations.weight",
        "1.parametrizations.weight.0",
        "1.parametrizations.bias",
        "1.parametrizations.bias.0",
    ]
    other = squared_pair()
    other.load_state_dict(safetensors.torch.load(safetensors.torch.save(entries)))
    assert torch.equal(values(other[1]), values(model[1]))


def test_s29_assigned_parameters_are_followed():
    model = squared_pair()
    old = model[0].weight
    loaded = {"0.weight": torch.full((3, 3, 3, 3), 2.0), "0.bias": torch.full((3,), 3.0)}
    model.load_state_dict(loaded, assign=True)
    assert model[0].weight is not old
    assert values(model[1]).eq(4).all()
    assert values(model[1], "bias").eq(9).all()
    model(torch.randn(1, 3, 4, 4)).sum().backward()
    assert old.grad is None
    assert model[0].weight.grad.norm() > 0
    model[0].weight = nn.Parameter(torch.ones(3, 3, 3, 3))
    assert values(model[1]).eq(1).all()


def test_s30_an_exchanged_source_is_noticed():
    model = two_convolutions()
    tp.register_tie(model[1], "copy", source="0", root=model)
    x = torch.randn(1, 3, 4, 4)
    model(x)
    original = model[0]
    model[0] = nn.Conv2d(3, 3, 3, padding=1)
    for use in (lambda: model(x), lambda: model[1].weight, lambda: tp.dense_state_dict(model)):
        with pytest.raises(tp.TieError, match=re.escape("the source '0'")) as caught:
            use()
        assert "register_tie again" in str(caught.value)
    model[0] = original
    model(x)


def test_s30_an_exchanged_source_is_noticed_in_nested_models_and_copies():
    model = nn.ModuleDict({"a": two_convolutions(), "b": two_convolutions()})
    tp.register_tie(model["b"][1], "copy", source="a.0", root=model)
    replica = copy.deepcopy(model)
    replica["a"][0] = nn.Conv2d(3, 3, 3)
    with pytest.raises(tp.TieError, match=re.escape("the source 'a.0'")):
        replica["b"][1].weight  # noqa: B018
    assert torch.equal(values(model["b"][1]), values(model["a"][0]))
    model["a"] = two_convolutions()
    with pytest.raises(tp.TieError, match=re.escape("the source 'a.0'")):
        model["b"][1].weight  # noqa: B018


def test_s30_the_way_out_works():
    model = two_convolutions()
    tp.register_tie(model[1], "copy", source="0", root=model)
    model[0] = nn.Conv2d(3, 3, 3, padding=1)
    tp.remove_tie(model[1])
    tp.register_tie(model[1], "copy", source="0", root=model)
    assert torch.equal(values(model[1]), values(model[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda source: setattr(source, "weight", nn.Parameter(torch.ones(5, 3))),
         r"\(5, 3\) now, and 'copy' ties a tensor \(3, 3\)\. Tie again"),
        (lambda source: setattr(source, "weight", None), "has lost its 'weight'"),
    ],
)  # fmt: skip
def test_a_source_that_changed_is_named(change, message):
    source, layer = nn.Linear(3, 3), nn.Linear(3, 3)
    tp.register_tie(layer, "copy", source=source)
    change(source)
    with pytest.raises(tp.TieError, match=message):
        layer(torch.ones(1, 3))


def test_s30_a_wrapped_source_is_still_the_source():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tp.register_tie(model[1], "copy", source="0", root=model)
    model[0] = nn.Sequential(model[0])
    assert torch.equal(model[1].weight, model[0][0].weight)
    model[0] = torch.compile(model[0][0], backend="eager")
    assert torch.equal(model[1].weight, model[0]._orig_mod.weight)
    del model[0]
    with pytest.raises(tp.TieError, match="exchanged for another module, or taken out"):
        model[0](torch.ones(1, 3))


def test_a_source_that_is_the_root_itself():
    model = nn.Linear(3, 3)
    model.child = nn.Linear(3, 3)
    tp.register_tie(model.child, "copy", source="", root=model)
    assert torch.equal(model.child.weight, model.weight)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.equal(twin.child.weight, torch.zeros(3, 3))


@pytest.mark.parametrize("name", [5, ["weight"]])
def test_a_source_name_is_a_string(name):
    layer, source = nn.Linear(3, 3), nn.Linear(3, 3)
    with pytest.raises(TypeError, match="source_name= takes the name of a tensor"):
        tp.register_tie(layer, "copy", source=source, source_name=name)
    assert not tp.is_tied(layer)
