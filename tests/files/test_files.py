"""Whole models in files, with the safetensors package and torch.load as oracles."""

from __future__ import annotations

import base64
import copy
import json
import os
import stat
import subprocess
import sys
import warnings
import zlib
from collections import OrderedDict
from math import prod

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import tiedparam as tp
from tests.support.cases import CASES, first_ones_fast, same_bits
from tests.support.tensors import bits
from tiedparam.formats.atomic import whole_files
from tiedparam.formats.safetensors import DTYPES, Entry, SafetensorsFile, write


class Net(nn.Module):
    """Every kind of tie, a chain of copies, a shared layer, a shared Parameter, odd buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Conv2d(4, 4, 3, padding=1)
        self.later = nn.Conv2d(4, 4, 3, padding=1)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.twin = self.up
        self.head = nn.Linear(4, 6)
        self.encoder, self.decoder = nn.Linear(5, 3), nn.Linear(3, 5)
        self.words, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.words.weight
        self.register_buffer("counts", torch.arange(3))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("scale", torch.tensor(0.5, dtype=torch.float64))
        self.register_buffer("phase", torch.randn(3, dtype=torch.complex64))
        self.register_buffer("brief", torch.randn(4, 3).to(torch.bfloat16).t())
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("scratch", torch.randn(2), persistent=False)


def tie(net: Net) -> Net:
    tp.register_tie(net.stem, "channel_shared", over="in", compute="dense")
    tp.register_tie(net.body[0], "flip_sym")
    tp.register_tie(net.head, "row_repeat", groups=3)
    tp.register_tie(net.head, "repeat", "bias", outputs=net.head.out_features)
    tp.register_tie(net.up, "channel_shared", over="groups")
    tp.register_tie(net.later, "copy", source="late", root=net)
    tp.register_tie(net.late, "squared_copy", source="body.0", root=net)
    tp.register_tie(net.decoder, "copy", source="encoder", fn=torch.t, root=net)
    return net


def fresh() -> Net:
    torch.manual_seed(99)
    return Net()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return tie(Net())


@pytest.fixture
def file(net, tmp_path):
    path = tmp_path / "net.safetensors"
    tp.save(net, path)
    return path


def contents(model: nn.Module) -> dict:
    """Everything that a failed load must leave alone, values to the bit."""
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "classes": [type(module) for module in model.modules()],
        "objects": {name: id(value) for name, value in values.items()},
        "bits": {name: (v.dtype, v.shape, bits(v)) for name, v in values.items()},
        "hooks": [len(m._load_state_dict_post_hooks) for m in model.modules()],
    }


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert list(left) == list(right)
    for key in left:
        assert left[key].dtype == right[key].dtype
        assert bits(left[key]) == bits(right[key]), key


# Save and load -----------------------------------------------------------------------------


def test_a_fresh_dense_model_is_tied_and_filled(net, file):
    model = fresh()
    before = {name: id(p) for name, p in model.named_parameters()}
    assert tp.load(file, model) is model
    assert_same_state(net, model)
    for path, layer in net.named_modules():
        for name in ("weight", "bias"):
            assert tp.is_tied(layer, name) == tp.is_tied(model.get_submodule(path), name)
    assert tp.get_tie(model.stem).compute == "dense"  # options that are not the law's, too
    assert tp.get_tie(model.later).source is model.late
    assert tp.get_tie(model.decoder).fn is torch.t
    assert torch.equal(model.later.weight, model.body[0].weight.square())
    assert model.twin is model.up
    assert model.out.weight is model.words.weight
    assert before["words.weight"] == id(model.words.weight)  # an optimizer keeps its parameters


def test_a_model_that_is_tied_already_is_filled_in_place(net, file):
    model = tie(fresh())
    parameters = dict(model.named_parameters())
    tp.load(file, model)
    assert_same_state(net, model)
    assert all(parameters[name] is p for name, p in model.named_parameters())
    half_tied = fresh()
    tp.register_tie(half_tied.body[0], "flip_sym")
    assert_same_state(net, tp.load(file, half_tied))


def test_the_same_state_gives_the_same_bytes(net, file, tmp_path):
    tp.save(tp.load(file, fresh()), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_bytes_on_disk_are_the_free_values_and_a_header(net, file):
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    stored = {id(v): v for v in [*net.parameters(), *net.buffers()] if v is not net.scratch}
    free_bytes = sum(value.numel() * value.element_size() for value in stored.values())
    assert len(raw) == 8 + length + free_bytes
    dense = sum(v.numel() * v.element_size() for v in tp.dense_state_dict(net).values())
    assert free_bytes < dense / 2
    # and each of these bytes is where the oracle says, once
    with safetensors.safe_open(file, "pt") as opened:
        keys = list(opened.keys())
        assert sorted(bits(opened.get_tensor(key)) for key in keys) == sorted(
            bits(value) for value in stored.values()
        )
    assert len(keys) == len(stored)
    assert not [key for key in keys if key.startswith(("late.weight", "later.weight", "twin"))]


def test_the_oracle_reads_what_is_saved(net, file):
    loaded = safetensors.torch.load_file(file)
    state = net.state_dict()
    assert set(loaded) < set(state)
    for key, value in loaded.items():
        assert value.dtype == state[key].dtype
        assert value.shape == state[key].shape
        assert bits(value) == bits(state[key])
    with safetensors.safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["tiedparam"])
    assert header["layout"] == 3
    assert header["aliases"]["out.weight"] == "words.weight"
    assert {tie["rule"] for tie in header["ties"]} == {
        "channel_shared", "copy", "flip_sym", "repeat", "row_repeat", "squared_copy",
    }  # fmt: skip


@pytest.mark.parametrize("case", first_ones_fast(CASES), ids=str)
def test_a_file_makes_every_law_again(case, tmp_path):
    host = case.tied()
    tp.save(host.model, tmp_path / "model.safetensors")
    again = case.dense(seed=1)
    tp.load(tmp_path / "model.safetensors", again.model)
    assert str(again.rule) == str(host.rule)
    assert same_bits(again.weight, host.weight)
    if not case.reads_layers:
        assert torch.equal(again.rule.orbit_labels(), host.rule.orbit_labels())
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as opened:
        text = opened.metadata()["tiedparam"]
    assert len(text) < 2_000  # names and options, no pattern


BY_AN_EARLIER_VERSION = (  # flip_sym, row_repeat and a squared copy, as of layout version 2
    "c-p;^(Q1P*6o!SpNXfN`NugbPvtI2P236#s$2Lq&mc$iTggwe0WskO#2;J&cVQhkM@}2nS&+&h{i^6keMbV;z3LF##"
    "+n$+|SZOfOCZ#Etf^Av7T5rU<MizfJ37<38z@U1Uv8{+R-?LQiCys{djHMa#E$pnCzzOBy=mIr;gMrnJ)P)_|K$Uh<"
    "bzbQ_($XG5`(1kxi=5U6qk8ST-0K?XtX38)0yQ)i{TB|(=PP2+%BqKkP@3?2u^Qtmll&HwMx6?S8o~XG&2;8b+~ToR"
    "dYHSTlT>d?{P8;`P;}7ZT&nH@amtj(#J==kXv-g5P^^;;AH5JX5-eT@`HIF~20PNxEKNe<&>8s#;abULI8jC(WCu;^"
    "b6dGVBgOKOG8<2J$?Y=cdCWq(Rb5+jmS7rlk&`n2jWYLhm@9LdPMVM7B8nEfD0+XG-VdrjcV8GDA)o"
)


def test_a_file_by_an_earlier_version_loads(tmp_path):
    path = tmp_path / "old"
    path.write_bytes(zlib.decompress(base64.b85decode(BY_AN_EARLIER_VERSION)))
    model = tp.load(path, nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3))))
    assert [str(tp.get_tie(layer)) for layer in model] == [
        "flip_sym", "row_repeat(groups=1)", "copy(fn='square')",
    ]  # fmt: skip
    expected = [[1.0, 2.5], [2.5, 1.0]], [[5.0, 6.0], [5.0, 6.0]], [[1.0, 6.25], [6.25, 1.0]]
    for layer, weight in zip(model, expected, strict=True):
        assert layer.weight.tolist() == weight


def test_s22_a_parameter_of_two_layers_is_stored_once(tmp_path):
    torch.manual_seed(0)
    net = Net()
    tp.save(net, tmp_path / "net.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "net.safetensors")
    assert ("words.weight" in stored, "out.weight" in stored) == (True, False)
    model = tp.load(tmp_path / "net.safetensors", fresh())
    assert model.out.weight is model.words.weight
    assert torch.equal(model.words.weight, net.words.weight)
    apart = fresh()
    apart.out.weight = nn.Parameter(apart.out.weight.detach().clone())
    with pytest.warns(tp.TieWarning, match=r"'out.weight' and 'words.weight'.*will train apart"):
        tp.load(tmp_path / "net.safetensors", apart)
    assert torch.equal(apart.out.weight, net.words.weight)
    assert apart.out.weight is not apart.words.weight


def test_s22_values_that_disagree_for_a_shared_parameter_are_refused(tmp_path):
    apart = fresh()
    apart.out.weight = nn.Parameter(torch.zeros(7, 4))
    tp.save(apart, tmp_path / "apart.safetensors")
    model = fresh()
    before = contents(model)
    with pytest.raises(tp.TieError, match=r"'words.weight' and 'out.weight' are one tensor here"):
        tp.load(tmp_path / "apart.safetensors", model)
    assert contents(model) == before


def test_a_tied_layer_under_two_names_may_be_two_layers_here(net, file):
    model = fresh()
    model.twin = nn.ConvTranspose2d(4, 6, 3, groups=2)
    with pytest.warns(tp.TieWarning, match="will train apart"):
        tp.load(file, model)
    assert tp.is_tied(model.twin)
    assert torch.equal(model.twin.weight, net.up.weight)


@pytest.mark.slow
def test_a_model_on_the_meta_device_gets_memory(net, file):
    with torch.device("meta"):
        model = Net()
    model.scratch = torch.zeros(2)
    tp.load(file, model)
    assert_same_state(net, model)
    assert not [p for p in model.parameters() if p.is_meta]
    assert model.out.weight is model.words.weight
    loss = model.body(model.stem(torch.randn(2, 3, 5, 5))).square().sum()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss.backward()
    optimizer.step()
    assert torch.equal(model.late.weight, model.body[0].weight.square())


def test_a_loaded_model_trains_like_the_saved_one(net, file):
    models = [net, tp.load(file, fresh())]
    for model in models:
        torch.manual_seed(5)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(3):
            loss = model.late(model.body(model.stem(torch.randn(2, 3, 5, 5)))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert_same_state(*models)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_dtypes_and_nan_come_back_to_the_bit(dtype, tmp_path):
    layer = tp.register_tie(nn.Conv2d(3, 3, 3).to(dtype), "flip_sym")
    with torch.no_grad():
        layer.bias[:] = torch.tensor([float("nan"), float("inf"), -0.0])
        layer.parametrizations.weight.original0[0, 0] = float("nan")
    tp.save(layer, tmp_path / "layer")
    other = tp.load(tmp_path / "layer", nn.Conv2d(3, 3, 3).to(dtype))
    assert_same_state(layer, other)


def test_complex_weights(tmp_path):
    layer = tp.register_tie(nn.Linear(3, 4, dtype=torch.complex64), "row_repeat")
    tp.save(layer, tmp_path / "layer")
    assert_same_state(layer, tp.load(tmp_path / "layer", nn.Linear(3, 4, dtype=torch.complex64)))
    wide = nn.Linear(3, 4, dtype=torch.complex128)
    with pytest.raises(tp.TieError, match=r"'weight' is torch.complex128, which a safetensors"):
        tp.save(wide, tmp_path / "wide")
    assert not (tmp_path / "wide").exists()


def test_a_narrow_file_is_widened_and_a_wide_one_never_rounded(tmp_path):
    half = tp.register_tie(nn.Linear(3, 3).half(), "flip_sym")
    tp.save(half, tmp_path / "half")
    model = tp.load(tmp_path / "half", nn.Linear(3, 3))
    assert model.weight.dtype is torch.float32
    assert torch.equal(model.weight.half(), half.weight)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        layer = nn.Linear(3, 3)
        before = contents(layer)
        layer.bias.data = layer.bias.data.to(dtype)
        with pytest.raises(tp.TieError, match=r"'bias' is torch.float16 there and torch"):
            tp.load(tmp_path / "half", layer)
        assert bits(layer.weight) == before["bits"]["weight"][2]
    counter = nn.Module()
    counter.register_buffer("n", torch.tensor(3, dtype=torch.int32))
    tp.save(counter, tmp_path / "counter")
    counter.n = torch.tensor(0)
    assert tp.load(tmp_path / "counter", counter).n.item() == 3
    for dtype in (torch.int16, torch.float64, torch.bool, torch.uint8):
        counter.n = torch.tensor(0, dtype=dtype)
        with pytest.raises(tp.TieError, match="would change its values"):
            tp.load(tmp_path / "counter", counter)


def test_module_versions_travel(tmp_path):
    class Migrating(nn.Linear):
        _version = 3
        seen: int | None = None

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
            Migrating.seen = local_metadata.get("version")
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    tp.save(nn.Sequential(Migrating(2, 2)), tmp_path / "m")
    tp.load(tmp_path / "m", nn.Sequential(Migrating(2, 2)))
    assert Migrating.seen == 3


def test_a_rule_of_ones_own(tmp_path, registry):
    @tp.register_rule("scaled_rows")
    class ScaledRows(tp.Rule):
        law = "W[o] = w / scale"

        def __init__(self, scale, sizes=(1, 2)):
            super().__init__()
            self.scale, self.sizes = scale, sizes

        def options(self):
            return {"scale": self.scale, "sizes": self.sizes}

        def free_shapes(self):
            return ((1, self.bound_layout.shape[1]),)

        def forward(self, *free):
            return (free[0] / self.scale).expand(self.bound_layout.shape)

        def right_inverse(self, weight):
            self.bind_shape(weight)
            return (weight.mean(0, keepdim=True) * self.scale,)

    layer = tp.register_tie(nn.Linear(3, 4), "scaled_rows", scale=2.0)
    tp.save(layer, tmp_path / "layer")
    assert_same_state(layer, tp.load(tmp_path / "layer", nn.Linear(3, 4)))
    assert_same_state(
        layer, tp.load(tmp_path / "layer", tp.register_tie(nn.Linear(3, 4), ScaledRows, scale=2.0))
    )
    ScaledRows.options = lambda self: {}
    del tp.get_tie(layer).scale  # what the rule does not say, nobody can write down
    with pytest.raises(tp.TieError, match=r"cannot save the tie of 'weight'.*options\(\) does not"):
        tp.save(layer, tmp_path / "other")
    tp.get_tie(layer).scale = object()
    with pytest.raises(tp.TieError, match="must be made of numbers, texts, lists"):
        tp.save(layer, tmp_path / "other")


def test_an_option_that_is_not_said_is_noticed(tmp_path, registry):
    @tp.register_rule("silent")
    class Silent(tp.Rule):
        def __init__(self, start=0):
            super().__init__()
            self.hidden = start

        def free_shapes(self):
            return ((1, self.bound_layout.shape[1]),)

        def forward(self, *free):
            return (free[0] - self.hidden).expand(self.bound_layout.shape)

        def right_inverse(self, weight):
            self.bind_shape(weight)
            return (weight[:1] + self.hidden,)

    layer = tp.register_tie(nn.Linear(3, 4), "silent", start=2)
    with pytest.raises(tp.TieError, match=r"options\(\) does not return everything"):
        tp.save(layer, tmp_path / "layer")


def test_what_a_file_cannot_say_is_refused_before_it_is_written(tmp_path, registry):
    path = tmp_path / "file"
    pair = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tp.register_tie(pair[1], "copy", source=pair[0], fn=lambda weight: weight + 1)
    with pytest.raises(tp.TieError, match=r"(?s)'1.weight'.*function '<lambda>'.*export_dense"):
        tp.save(pair, path)
    tp.export_dense(pair, path)  # the way out that the message names
    assert torch.equal(safetensors.torch.load_file(path)["1.weight"], pair[1].weight)
    path.unlink()

    pair = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tp.register_tie(pair[1], "copy", source=pair[0])
    with pytest.raises(tp.TieError, match="its source is not in this model"):
        tp.save(pair[1], path)

    class Nameless(type(tp.get_tie(tp.register_tie(nn.Linear(2, 2), "flip_sym")))):
        pass

    with pytest.raises(tp.TieError, match="no registered name"):
        tp.save(tp.register_tie(nn.Linear(3, 3), Nameless), path)
    with pytest.raises(tp.TieError, match="'weight' is on the meta device"):
        tp.save(nn.Linear(3, 3, device="meta"), path)

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(tp.TieError, match="'_extra_state' is a dict"):
        tp.save(Extra(2, 2), path)
    sparse = nn.Module()
    sparse.register_buffer("s", torch.eye(3).to_sparse())
    with pytest.raises(tp.TieError, match=r"'s' is a Tensor of its own kind \(torch.sparse_coo\)"):
        tp.save(sparse, path)
    assert not path.exists()


def test_a_tie_with_another_parametrization_on_top(tmp_path):
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    def build():
        layer = tp.register_tie(nn.Linear(3, 3), "flip_sym")
        parametrize.register_parametrization(layer, "weight", Double())
        return layer

    layer, path = build(), tmp_path / "layer"
    tp.save(layer, path)
    assert_same_state(layer, tp.load(path, build()))
    for model in (nn.Linear(3, 3), tp.register_tie(nn.Linear(3, 3), "flip_sym")):
        with pytest.raises(tp.TieError, match="another parametrization"):
            tp.load(path, model)
    tp.export_dense(layer, tmp_path / "dense")
    dense = safetensors.torch.load_file(tmp_path / "dense")
    assert torch.equal(dense["weight"], layer.weight)


# What does not fit -------------------------------------------------------------------------


def rewritten(path, change):
    """Change the header of a file by tiedparam, checksum and all, as an attacker could."""
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    header = json.loads(metadata["tiedparam"])
    change(header, tensors)
    entries = [Entry(key, value.dtype, tuple(value.shape)) for key, value in tensors.items()]
    metadata = {"tiedparam": json.dumps(header)}
    with whole_files() as open_file:  # the tensors are views of the old file
        write(open_file(path), entries, lambda e: tensors[e.name], metadata, checksum=True)


def tie_of(header, layer, tensor="weight"):
    (found,) = [t for t in header["ties"] if (t["layer"], t["tensor"]) == (layer, tensor)]
    return found


def change_tie(path, /, **changes):
    return lambda header, tensors: tie_of(header, path).update(changes)


def change_key(key, value):
    def change(header, tensors):
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value

    return change


FAULTS = {
    "unknown rule": (change_tie("stem", rule="chanel_shared"), "Did you mean 'channel_shared'"),
    "unknown option": (change_tie("stem", options={"ovr": "in"}), "'stem.weight'.*ovr"),
    "wrong option": (change_tie("stem", options={"over": "up"}), "over='up' is unknown"),
    "odd option": (change_tie("head", options={"groups": [3]}), "groups must be a positive"),
    "another groups": (
        change_tie("up", groups=1),
        r"it was \(4, 3, 3, 3\), transposed and is .* 2 groups",
    ),
    "another shape": (
        change_tie("stem", shape=[4, 3, 5, 5]),
        r"it was \(4, 3, 5, 5\) and is \(4, 3, 3, 3\) here",
    ),
    "unknown layer": (change_tie("stem", layer="steam"), "'steam.weight'.*no such layer"),
    "unknown tensor": (change_tie("stem", tensor="wait"), "'stem.wait'.*no such Parameter"),
    "unknown function": (
        change_tie("decoder", options={"source": "encoder", "source_name": "weight", "fn": "os.x"}),
        "'os.x'",
    ),
    "no source": (change_tie("late", options={}), "source is not named"),
    "another source": (
        change_tie("late", options={"source": "lost", "source_name": "weight"}),
        "the model has no layer 'lost'",
    ),
    "a cycle": (
        change_tie("late", options={"source": "later", "source_name": "weight"}),
        "would form a cycle",
    ),
    "stacked": (change_tie("stem", stacked=True), "another parametrization was stacked"),
    "newer layout": (lambda h, t: h.update(layout=4), "layout version 4.*Update tiedparam"),
    "no version": (lambda h, t: h.update(layout=None), "malformed"),
    "unknown field": (lambda h, t: h.update(more=1), "malformed"),
    "malformed tie": (lambda h, t: h["ties"].append({"layer": "x"}), "malformed"),
    "a tie twice": (lambda h, t: h["ties"].append(h["ties"][0]), "malformed"),
    "a huge shape": (change_tie("stem", shape=[10**30, 4]), "malformed"),
    "a product that is huge": (change_tie("stem", shape=[2**40, 2**40]), "malformed"),
    "residual of nothing": (change_tie("stem", residual=float("nan")), "malformed"),
    "residual below 0": (change_tie("stem", residual=-1.0), "malformed"),
    "malformed ties": (lambda h, t: h.update(ties=7), "malformed"),
    "malformed aliases": (lambda h, t: h.update(aliases={"x": 1}), "malformed"),
    "alias of nothing": (lambda h, t: h["aliases"].update({"out.weight": "nix"}), "alias"),
    "alias of two": (lambda h, t: h["aliases"].update({"head.bias": "nix"}), "alias"),
    "wrong alias": (lambda h, t: h["aliases"].update({"out.weight": "stem.bias"}), "out.weight"),
    "missing": (change_key("stem.bias", None), "'stem.bias' is missing"),
    "unexpected": (change_key("stem.basis", torch.zeros(4)), "the model has no 'stem.basis'"),
    "misshapen": (change_key("stem.bias", torch.zeros(5)), r"'stem.bias': \(5,\) there, \(4,\)"),
    "other kind": (change_key("stem.bias", torch.zeros(4, dtype=torch.int32)), "int32 there"),
    "free value": (
        change_key("stem.parametrizations.weight.original0", torch.zeros(4, 3, 3, 3)),
        "size mismatch for 'stem.par",
    ),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_changes_nothing(fault, tied, file):
    change, message = FAULTS[fault]
    rewritten(file, change)
    model = tie(fresh()) if tied else fresh()
    before = contents(model)
    with pytest.raises(tp.TieError, match="(?s)" + (message if not tied else "")) as caught:
        tp.load(file, model)
    assert str(caught.value).startswith(f"cannot load '{file}'")
    assert contents(model) == before


def test_all_reasons_are_listed_at_once(file):
    def change(header, tensors):
        tensors["stem.bias"] = torch.zeros(5)
        tensors["head.nix"] = torch.zeros(5)

    rewritten(file, change)
    with pytest.raises(tp.TieError, match=r"(?s)'stem.bias'.*'head.nix'"):
        tp.load(file, fresh())


def test_s28_a_model_tied_by_another_law_is_refused(tmp_path):
    one = tp.register_tie(nn.Conv2d(4, 4, 3, groups=2), "channel_shared", over="groups")
    tp.save(one, tmp_path / "one")
    other = tp.register_tie(nn.Conv2d(4, 4, 3, groups=2), "row_repeat", groups=2)
    before = contents(other)
    with pytest.raises(tp.TieError, match=r"it was 'channel_shared\(over='groups'\)' and is 'row_"):
        tp.load(tmp_path / "one", other)
    assert contents(other) == before
    torch.save(one.state_dict(), tmp_path / "one.pt")
    with pytest.raises(tp.TieError, match=r"saved under the rule 'channel_shared"):
        tp.load(tmp_path / "one.pt", other)
    assert contents(other) == before


def test_a_copy_of_another_source_is_refused(tmp_path):
    def build(source):
        model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)])
        tp.register_tie(model[2], "copy", source=source, root=model)
        return model

    tp.save(build("0"), tmp_path / "file")
    with pytest.raises(tp.TieError, match=r"it reads '0.weight' there and another tensor here"):
        tp.load(tmp_path / "file", build("1"))


def test_a_failure_midway_puts_the_model_back(file):
    class Broken(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *rest):
            super()._load_from_state_dict(state_dict, prefix, *rest)
            raise OSError("the disk is gone")

    for tied in (False, True):
        model = tie(fresh()) if tied else fresh()
        model.encoder.__class__ = Broken
        before = contents(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(OSError, match="the disk is gone"):
            tp.load(file, model)
        assert contents(model) == before
        sum(p.sum().abs() for p in model.parameters()).backward()
        optimizer.step()  # the optimizer guard has forgotten the tie as well


def test_a_registration_that_fails_midway_puts_the_model_back(file):
    model = fresh()
    model.head.weight.register_hook(lambda grad: grad)  # refused by register_tie alone
    before = contents(model)
    with pytest.raises(tp.TieError, match="gradient hooks"):
        tp.load(file, model)
    assert contents(model) == before
    assert tp.is_tied(model.stem) is False


def test_arguments(file, tmp_path):
    with pytest.raises(TypeError, match="takes an nn.Module, not str"):
        tp.load(fresh(), str(file))
    with pytest.raises(FileNotFoundError):
        tp.load(tmp_path / "nothing", fresh())
    with pytest.raises(FileNotFoundError):
        tp.save(fresh(), tmp_path / "no folder" / "file")


# Damage ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound():
    """A small saved file, a model that takes it, and that model's contents."""
    import tempfile
    from pathlib import Path

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Linear(2, 2), nn.Linear(2, 2))
    model[2].weight = model[1].weight
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        tied = copy.deepcopy(model)
        tp.register_tie(tied[0], "flip_sym")
        tp.save(tied, path)
        yield path, path.read_bytes(), model, contents(model)


def refused(sound, damaged: bytes) -> None:
    path, raw, model, before = sound
    assert damaged != raw
    path.write_bytes(damaged)
    with pytest.raises(tp.TieError) as caught:
        tp.load(path, model)
    assert str(path) in str(caught.value)
    assert contents(model) == before


def test_the_sound_file_loads(sound):
    path, raw, model, before = sound
    path.write_bytes(raw)
    assert contents(model) == before
    assert tp.is_tied(tp.load(path, copy.deepcopy(model))[0])


@given(data=st.data())
def test_a_truncated_file_is_always_refused(sound, data):
    raw = sound[1]
    refused(sound, raw[: data.draw(st.integers(0, len(raw) - 1))])


@given(data=st.data())
def test_a_flipped_byte_is_always_refused(sound, data):
    raw = bytearray(sound[1])
    header = 8 + int.from_bytes(raw[:8], "little")
    place = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(raw) - 1)))
    raw[place] ^= data.draw(st.integers(1, 255))
    refused(sound, bytes(raw))


def test_every_byte_counts(sound):
    """The lowest bit of each byte in turn: letters become others, digits too."""
    path, raw, model, before = sound
    for place in range(len(raw)):
        damaged = bytearray(raw)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(tp.TieError):
            tp.load(path, model)
    assert contents(model) == before


@given(junk=st.binary(max_size=200), keep=st.integers(0, 40))
def test_junk_is_always_refused(sound, junk, keep):
    raw = sound[1]
    refused(sound, raw[:keep] + junk)


@given(more=st.binary(min_size=1, max_size=20))
def test_bytes_behind_the_end_are_refused(sound, more):
    refused(sound, sound[1] + more)


def header_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


BAD_HEADERS = {
    "a list": [],
    "not JSON": b"{'a'}",
    "not UTF-8": b'{"\xff"}',
    "deep": b'{"a":' + 100_000 * b"[" + 100_000 * b"]" + b"}",
    "twice": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "a number": {"a": 1},
    "no shape": {"a": {"dtype": "U8", "data_offsets": [0, 1]}},
    "more": {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "x": 1}},
    "overflow": {"a": {"dtype": "U8", "shape": [0, 2**63], "data_offsets": [0, 0]}},
    "product": {"a": {"dtype": "U8", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}},
    "negative": {"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}},
    "truth": {"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}},
    "fraction": {"a": {"dtype": "U8", "shape": [1.0], "data_offsets": [0, 1]}},
    "dtype": {"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}},
    "dtype list": {"a": {"dtype": [], "shape": [1], "data_offsets": [0, 1]}},
    "one offset": {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}},
    "size": {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]}},
    "huge": {"a": {"dtype": "U8", "shape": [1 << 62, 4], "data_offsets": [0, 1]}},
    "gap": {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]},
        "b": {"dtype": "U8", "shape": [0], "data_offsets": [2, 2]},
    },
    "overlap": {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    },
    "too little": {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}},
    "metadata": {"__metadata__": {"a": 1}},
    "metadata list": {"__metadata__": []},
    "checksum": {"__metadata__": {"tiedparam.crc32": "no"}},
}


@pytest.mark.parametrize("bad", BAD_HEADERS)
def test_a_malformed_header_is_refused(bad, tmp_path):
    data = b"\0\0" if bad == "gap" else b"\0"
    path = header_file(tmp_path / "file", BAD_HEADERS[bad], data)
    model = nn.Linear(2, 2)
    before = contents(model)
    message = "does not read" if "dtype" in bad else "is not a valid safetensors file"
    with pytest.raises(tp.TieError, match=message):
        tp.load(path, model)
    assert contents(model) == before


def test_tensors_that_are_not_aligned_are_read(tmp_path):
    data = bytes([7]) + bits(torch.tensor([1.5, 2.5]))
    header = {
        "n": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    file = SafetensorsFile(header_file(tmp_path / "file", header, data))
    assert torch.equal(file["x"], torch.tensor([1.5, 2.5]))
    assert file["x"].data_ptr() % 4 == 0
    assert torch.equal(file["n"], torch.tensor([7], dtype=torch.uint8))


def test_every_dtype_of_the_format_both_ways(tmp_path):
    raw = torch.arange(48, dtype=torch.uint8)
    tensors = {name: (raw % 2 if name == "BOOL" else raw).view(d) for name, d in DTYPES.items()}
    tensors |= {"empty": torch.empty(0, 2), "0-d": torch.tensor(1.5), "ü": torch.ones(1)}
    tensors |= {"turned": torch.randn(3, 5).t(), "same": torch.randn(1, 3).expand(4, 3)}
    tensors |= {"conj": torch.randn(3, dtype=torch.complex64).conj()}
    plain = {key: value.contiguous().resolve_conj().clone() for key, value in tensors.items()}
    entries = [Entry(key, value.dtype, tuple(value.shape)) for key, value in tensors.items()]
    path = tmp_path / "ours"
    with path.open("wb") as file:
        write(file, entries, lambda entry: tensors[entry.name], {"a": "b"})
    theirs = tmp_path / "theirs"
    safetensors.torch.save_file(plain, theirs)
    for read in (safetensors.torch.load_file(path), SafetensorsFile(path), SafetensorsFile(theirs)):
        assert set(read) == set(tensors)
        for key, value in plain.items():
            assert (read[key].dtype, read[key].shape) == (value.dtype, value.shape)
            assert bits(read[key]) == bits(value)


# Dense checkpoints -------------------------------------------------------------------------


@pytest.fixture
def dense(net):
    return tp.dense_state_dict(net)


def write_dense(kind, dense, folder):
    """A checkpoint by somebody else, of each kind that is read."""
    unshared = {key: value.clone().contiguous() for key, value in dense.items()}
    halves = [list(unshared)[::2], list(unshared)[1::2]]
    if kind == "safetensors":
        safetensors.torch.save_file(unshared, folder / "model.safetensors")
        return folder / "model.safetensors"
    if kind in ("pt", "pth", "bin"):
        torch.save(dense, folder / f"model.{kind}")
        return folder / f"model.{kind}"
    if kind == "legacy":
        torch.save(dense, folder / "model.pt", _use_new_zipfile_serialization=False)
        return folder / "model.pt"
    suffix, write_one = {
        "sharded safetensors": ("safetensors", safetensors.torch.save_file),
        "sharded bin": ("bin", torch.save),
    }[kind]
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    for number, half in enumerate(halves, start=1):
        write_one({key: unshared[key] for key in half}, folder / f"{stem}-{number}.{suffix}")
    places = {key: f"{stem}-{n}.{suffix}" for n, half in enumerate(halves, start=1) for key in half}
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


KINDS = ["safetensors", "pt", "pth", "bin", "legacy", "sharded safetensors", "sharded bin"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_checkpoint_loads_into_a_tied_model(kind, net, dense, tmp_path):
    path = write_dense(kind, dense, tmp_path)
    model = tie(fresh())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a lawful weight comes without a warning
        tp.load(path, model)
    assert_same_state(net, model)
    assert_same_state(tp.load(path, fresh()), tp.load(write_dense("pt", dense, tmp_path), fresh()))


@pytest.mark.parametrize("kind", ["safetensors", "pt", "sharded bin"])
def test_an_unlawful_dense_weight_is_projected_with_a_warning(kind, dense, tmp_path):
    dense["stem.weight"] = torch.randn(4, 3, 3, 3)
    model = tie(fresh())
    with pytest.warns(tp.TieWarning, match=r"'stem.weight' \(residual"):
        tp.load(write_dense(kind, dense, tmp_path), model)
    expected = dense["stem.weight"].mean(1, keepdim=True).expand(4, 3, 3, 3)
    torch.testing.assert_close(model.stem.weight, expected)


def test_a_narrow_dense_weight_is_projected_in_the_models_dtype(tmp_path):
    dense = {"weight": torch.tensor([[1.0], [1.0009765625]]).half()}
    torch.save(dense, tmp_path / "half.pt")
    layer = tp.register_tie(nn.Linear(1, 2, bias=False), "row_repeat")
    tp.load(tmp_path / "half.pt", layer)
    assert layer.weight[0].item() == 1.00048828125  # which float16 does not have


def test_a_tied_state_dict_of_torch_loads_as_well(net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "tied.pt")
    assert_same_state(net, tp.load(tmp_path / "tied.pt", tie(fresh())))
    with pytest.raises(tp.TieError, match=r"the model has no 'stem.parametrizations"):
        tp.load(tmp_path / "tied.pt", fresh())


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_checkpoint_that_does_not_fit_changes_nothing(kind, dense, tmp_path):
    dense["stem.weight"] = torch.zeros(4, 4, 3, 3)
    dense["late.weight"] = torch.zeros(4, 4, 3, 3)  # a copy that disagrees with its source
    dense.pop("head.weight")
    path = write_dense(kind, dense, tmp_path)
    for model in (fresh(), tie(fresh())):
        before = contents(model)
        with pytest.raises(tp.TieError, match=r"'stem.weight': \(4, 4, 3, 3\) there"):
            tp.load(path, model)
        assert contents(model) == before
    dense["stem.weight"] = torch.zeros(4, 3, 3, 3)
    path = write_dense(kind, dense, tmp_path)
    model = tie(fresh())
    before = contents(model)
    with pytest.raises(tp.TieError, match=r"'late.weight' is tied by 'squared_copy' and disagrees"):
        tp.load(path, model)
    assert contents(model) == before


def test_a_name_of_a_shared_parameter_may_be_left_out(net, dense, tmp_path):
    for key in list(dense):
        if key.startswith(("twin.", "out.")):
            del dense[key]
    torch.save(dense, tmp_path / "model.pt")
    assert_same_state(net, tp.load(tmp_path / "model.pt", tie(fresh())))
    del dense["words.weight"]
    torch.save(dense, tmp_path / "model.pt")
    with pytest.raises(tp.TieError, match="'words.weight' is missing"):
        tp.load(tmp_path / "model.pt", tie(fresh()))


class Evil:
    """What it would do when it is unpickled is harmless, and visible."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new", [True, False])
def test_no_code_of_a_pickle_is_run(new, tmp_path):
    state = {**nn.Linear(2, 2).state_dict(), "x": Evil(tmp_path / "ran")}
    torch.save(state, tmp_path / "evil.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(tp.TieError, match="code of a file is never run"):
        tp.load(tmp_path / "evil.pt", nn.Linear(2, 2))
    assert not (tmp_path / "ran").exists()


def test_pickles_that_are_no_state_dict(tmp_path):
    path = tmp_path / "file.pt"
    cases = {
        "it holds a list": [torch.zeros(2)],
        r"its entry 'model' is one. Save that alone": {"epoch": 3, "model": {"w": torch.ones(1)}},
        r"its entry 'epoch' is a int": {"epoch": 3},
        r"its entry 3 is a Tensor": {3: torch.zeros(1)},
    }
    for message, content in cases.items():
        torch.save(content, path)
        with pytest.raises(tp.TieError, match=message):
            tp.load(path, nn.Linear(2, 2))
    torch.save(nn.Linear(2, 2).state_dict(), path)
    raw = path.read_bytes()
    for cut in (10, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:cut])
        with pytest.raises(tp.TieError, match="it is damaged or not a torch file"):
            tp.load(path, nn.Linear(2, 2))


def test_indexes_that_are_wrong(dense, tmp_path):
    index = write_dense("sharded safetensors", dense, tmp_path)
    sound = json.loads(index.read_text())
    model = tie(fresh())
    before = contents(model)

    def refuse(content, message):
        index.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(tp.TieError, match=message):
            tp.load(index, model)
        assert contents(model) == before

    places = sound["weight_map"]
    for content in (
        "{",
        "[]",
        {},
        {"weight_map": {}},
        {"weight_map": []},
        {"weight_map": {"a": 1}},
    ):
        refuse(content, "is not an index")
    for name in (
        "../model-1.safetensors",
        "/etc/passwd",
        "..",
        "",
        "a\0b",
        "a\\b",
        "\ud800",
        "x" * 5000,
    ):
        refuse({"weight_map": {**places, "stem.bias": name}}, "is not an index")
    refuse({"weight_map": {**places, "stem.bias": "model-3.safetensors"}}, "not beside it")
    refuse({"weight_map": {**places, "nix": "model-1.safetensors"}}, "disagree on 'nix'")
    missing = {key: place for key, place in places.items() if key != "stem.bias"}
    refuse({"weight_map": missing}, "disagree on 'stem.bias'")
    index.write_text(json.dumps(sound))
    with pytest.raises(tp.TieError, match=r"Name its index, .*index.json'"):
        tp.load(tmp_path / "model.safetensors", model)
    tp.load(index, model)


# Dense exports -----------------------------------------------------------------------------


def test_an_export_is_the_dense_state_dict(net, dense, tmp_path):
    path = tmp_path / "dense.safetensors"
    assert tp.export_dense(net, path) == [path]
    loaded = safetensors.torch.load_file(path)
    assert set(loaded) == set(dense) == set(Net().state_dict())
    for key, value in dense.items():
        assert (loaded[key].dtype, loaded[key].shape) == (value.dtype, value.shape)
        assert bits(loaded[key]) == bits(value)
    plain = fresh()
    plain.load_state_dict(loaded)
    assert_same_state(plain, tp.load(path, fresh()))
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}  # which other libraries ask for


def test_a_sharded_export(net, dense, tmp_path):
    path = tmp_path / "dense.safetensors"
    files = tp.export_dense(net, path, max_shard_size=600)
    assert not path.exists()
    *shards, index = files
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert shards[0].name == f"dense-00001-of-{len(shards):05}.safetensors"
    assert index.name == "dense.safetensors.index.json"
    content = json.loads(index.read_text())
    total = sum(value.numel() * value.element_size() for value in dense.values())
    assert content["metadata"]["total_size"] == total
    seen = {}
    for shard in shards:
        tensors = safetensors.torch.load_file(shard)
        size = sum(value.numel() * value.element_size() for value in tensors.values())
        assert size <= 600 or len(tensors) == 1
        assert all(content["weight_map"][key] == shard.name for key in tensors)
        seen |= tensors
    assert set(seen) == set(dense)
    assert all(bits(seen[key]) == bits(dense[key]) for key in dense)
    assert_same_state(net, tp.load(index, tie(fresh())))
    assert tp.export_dense(net, path, max_shard_size="1 MB") == [path]
    for wrong in (0, -1, "5 apples", "", "0.0001KB", 400 * "9" + "GB"):
        with pytest.raises(tp.TieError, match="is not a size"):
            tp.export_dense(net, path, max_shard_size=wrong)


_MEASURE = """
import sys, torch, tiedparam as tp
from torch import nn

def peak():
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

model = nn.Sequential()
for _ in range(32):
    model.append(tp.register_tie(nn.Linear(1024, 1024, bias=False), "flip_sym"))
tp.export_dense(nn.Sequential(*model[:2]), sys.argv[1])
before = peak()
tp.export_dense(model, sys.argv[1])
streamed = peak() - before
dense = tp.dense_state_dict(model)
print(streamed, peak() - before)
"""


@pytest.mark.slow
def test_an_export_holds_one_dense_tensor_at_a_time(tmp_path):
    """32 layers of 4 MiB: all of them take 128 MiB, the stream no more than two took before."""
    path = tmp_path / "dense"
    command = [sys.executable, "-c", _MEASURE, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    streamed, dictionary = map(float, done.stdout.split())
    assert path.stat().st_size > 32 * 2**22
    assert dictionary > 110  # the measurement sees what is to be seen
    assert streamed < 12


def test_values_that_change_while_they_are_saved_are_noticed(tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as file, pytest.raises(tp.TieError, match="'a' changed while"):
        write(file, [Entry("a", torch.float32, (2,))], lambda entry: torch.zeros(3), {})


# Files are whole or not there ---------------------------------------------------------------


@pytest.mark.parametrize("how", [tp.save, tp.export_dense])
def test_a_failed_write_leaves_the_old_file(how, net, file, monkeypatch, tmp_path):
    before = file.read_bytes()

    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("tiedparam.formats.atomic.os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        how(net, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(OSError, match="disk full"):
        tp.export_dense(net, tmp_path / "new.safetensors", max_shard_size=600)
    assert list(tmp_path.iterdir()) == [file]


def test_an_error_in_the_middle_leaves_the_old_file(net, file, monkeypatch, tmp_path):
    before = file.read_bytes()
    monkeypatch.setattr(tp.get_tie(net.head), "forward", lambda *free: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tp.export_dense(net, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_permissions_and_links_stay(net, file, tmp_path):
    file.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(file)
    tp.export_dense(net, link)
    assert link.is_symlink()
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert "stem.weight" in safetensors.torch.load_file(file)
    tp.save(net, tmp_path / "new")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~mask


def test_only_plain_files_are_replaced(net, tmp_path):
    for target in (tmp_path, "/dev/null"):
        with pytest.raises(tp.TieError, match="is not a plain file"):
            tp.save(net, target)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_was_loaded_may_be_saved_over_its_file(net, file):
    model = tp.load(file, fresh())
    before = file.read_bytes()
    tp.save(model, file)
    assert file.read_bytes() == before
    assert_same_state(net, model)


def test_ordered_metadata_of_torch_is_kept(tmp_path):
    layer = nn.BatchNorm1d(2)
    torch.save(layer.state_dict(), tmp_path / "bn.pt")
    assert isinstance(torch.load(tmp_path / "bn.pt"), OrderedDict)
    assert_same_state(layer, tp.load(tmp_path / "bn.pt", nn.BatchNorm1d(2)))
    assert prod(layer.state_dict()["num_batches_tracked"].shape) == 1


def test_the_state_dict_of_a_tied_model_is_named_as_such(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3))
    torch.save(tp.register_tie(model[0], "flip_sym").state_dict(), tmp_path / "tied.pt")
    with pytest.raises(tp.TieError, match="a free value of a tied model. Tie the model as that"):
        tp.load(tmp_path / "tied.pt", nn.Linear(3, 3))


@pytest.mark.parametrize("name", ["a.pt", "a.PTH", "a.bin", "a.ckpt", "a.safetensors.index.json"])
def test_no_file_is_called_what_it_is_not(tmp_path, name):
    for function in (tp.save, tp.export_dense):
        with pytest.raises(tp.TieError, match="would be a safetensors file"):
            function(nn.Linear(3, 3), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_swapped_arguments_are_told(tmp_path):
    with pytest.raises(TypeError, match="save takes a model and a path, in this order"):
        tp.save(tmp_path / "a", nn.Linear(3, 3))
    with pytest.raises(TypeError, match="export_dense takes a model and a path, in this order"):
        tp.export_dense(tmp_path / "a", nn.Linear(3, 3))


def test_a_size_that_makes_hundreds_of_files_is_refused(tmp_path):
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(51)))
    with pytest.raises(tp.TieError, match="max_shard_size='1' would make 102 files. Give a size"):
        tp.export_dense(model, tmp_path / "many.safetensors", max_shard_size="1")
    assert not list(tmp_path.iterdir())
    assert len(tp.export_dense(model[:50], tmp_path / "a.safetensors", max_shard_size="1")) == 101
