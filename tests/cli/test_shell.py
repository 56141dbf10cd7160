"""The shell on checkpoint files, judged by the library in code and by the safetensors package."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiedparam as tp
from tests.support import ROOT, tomllib
from tests.support.shell import call, good, refused, run, usage
from tiedparam.cli import arguments as _arguments
from tiedparam.cli import commands as _commands
from tiedparam.cli import model_from_file, next_steps
from tiedparam.cli.main import main, parser
from tiedparam.tie.lookup import tie_of

PLAN = """
[[tie]]
layers = "body.0"
rule = "flip_sym"

[[tie]]
layers = "body.2"
rule = "squared_copy"
options = { source = "body.0" }

[[tie]]
layers = "up"
rule = "channel_shared"
options = { over = "groups" }

[[tie]]
layers = "decoder"
rule = "copy"
options = { source = "encoder", fn = "torch.t" }

[[tie]]
type = "Linear"
rule = "row_repeat"
tensor_name = "bias"

[[layer]]
layers = "up"
groups = 2
transposed = true
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, 6, 3, groups=2)
        self.body = nn.Sequential(
            nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.LayerNorm(4)
        )
        self.up = nn.ConvTranspose3d(4, 6, (1, 2, 3), groups=2)
        self.encoder, self.decoder = nn.Linear(5, 3), nn.Linear(3, 5)
        self.words, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.words.weight
        self.attention = nn.MultiheadAttention(4, 2)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("steps", torch.tensor(3))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        weight = net.body[0].weight
        weight += weight.transpose(0, 1).flip(2, 3)  # what a training may have found
    return net


@pytest.fixture
def files(net, tmp_path, monkeypatch):
    """A folder with a checkpoint and a plan; the working folder."""
    monkeypatch.chdir(tmp_path)
    torch.save(net.state_dict(), "model.pt")
    Path("plan.toml").write_text(PLAN)
    return tmp_path


def bits(tensor):
    return tensor.dtype, tensor.shape, bytes(tensor.detach().clone().reshape(-1).view(torch.uint8))


def assert_same(one, other):
    assert set(one) == set(other)
    for key in one:
        assert bits(one[key]) == bits(other[key]), key


# The way through: scan, tie, report, untie -------------------------------------------------


def test_the_result_of_tie_is_what_the_same_plan_makes_in_code(net, files, capsys):
    out = good(capsys, "tie", "model.pt", "--plan", "plan.toml", "-o", "tied.safetensors")
    assert "body.0.weight" in out
    assert f"Wrote tied.safetensors: {Path('tied.safetensors').stat().st_size:,} B" in out
    in_code = Net()
    in_code.load_state_dict(net.state_dict())
    tp.tie_model(in_code, tp.read_plan("plan.toml"))
    assert_same(tp.load("tied.safetensors", Net()).state_dict(), in_code.state_dict())
    other = Net()
    tp.tie_model(other, tp.read_plan("plan.toml"))
    loaded = tp.load("tied.safetensors", other)
    assert_same(loaded.state_dict(), in_code.state_dict())
    assert loaded.out.weight is loaded.words.weight
    assert tie_of(loaded.body[0]).residual_at_tying < 0.01
    # free values, once each, and a header
    raw = Path("tied.safetensors").read_bytes()
    values = [*in_code.parameters(), *in_code.buffers()]
    free = sum(value.numel() * value.element_size() for value in values)
    assert len(raw) == 8 + int.from_bytes(raw[:8], "little") + free


def test_untie_is_the_dense_export_to_the_bit(net, files, capsys):
    good(capsys, "tie", "model.pt", "--plan", "plan.toml", "-o", "tied.safetensors")
    good(capsys, "untie", "tied.safetensors", "-o", "dense.safetensors")
    model = tp.load("tied.safetensors", Net())
    tp.export_dense(model, "code.safetensors")
    dense = safetensors.torch.load_file("dense.safetensors")
    assert_same(dense, safetensors.torch.load_file("code.safetensors"))
    plain = Net()
    plain.load_state_dict(dense)
    assert torch.equal(plain.body[2].weight, plain.body[0].weight.square())
    assert torch.equal(plain.decoder.weight, plain.encoder.weight.t())
    assert plain.steps.item() == 3
    assert torch.equal(plain.stem.weight, net.stem.weight)  # what was not tied is as it was


def test_untie_in_shards(files, capsys):
    good(capsys, "tie", "model.pt", "--plan", "plan.toml", "-o", "tied.safetensors")
    out = good(
        capsys, "untie", "tied.safetensors", "-o", "d.safetensors", "--max-shard-size", "600",
        "--json",
    )  # fmt: skip
    written = json.loads(out)["files"]
    assert len(written) > 2
    assert json.loads(out)["bytes"] == sum(Path(name).stat().st_size for name in written)
    model = tp.load("tied.safetensors", Net())
    assert_same(tp.dense_state_dict(model), tp.load("d.safetensors.index.json", Net()).state_dict())
    # the shards are a checkpoint like any other
    again = json.loads(good(
        capsys, "tie", "d.safetensors.index.json", "--plan", "plan.toml", "-o", "t2.safetensors",
        "--json",
    ))  # fmt: skip
    assert again["bytes_before"] == sum(Path(name).stat().st_size for name in written)


def test_the_kind_of_the_file_makes_no_difference(net, files, capsys):
    state = {key: value.clone() for key, value in net.state_dict().items()}
    safetensors.torch.save_file(state, "model.safetensors")
    torch.save(state, "unshared.pt")
    torch.save(state, "legacy.pt", _use_new_zipfile_serialization=False)
    tp.export_dense(net, "sharded.safetensors", max_shard_size=500)
    results = set()
    for name in ("model.safetensors", "unshared.pt", "legacy.pt", "sharded.safetensors.index.json"):
        good(capsys, "tie", name, "--plan", "plan.toml", "-o", "t.safetensors", "--force")
        results.add(json.dumps(sorted(safetensors.torch.load_file("t.safetensors"))))
        assert_same(
            tp.load("t.safetensors", Net()).state_dict(),
            tp.load("t.safetensors", tp.load(name, Net())).state_dict(),
        )
    assert len(results) == 1


def test_scan_sees_what_scan_sees_in_code(net, files, capsys):
    data = json.loads(
        good(capsys, "scan", "model.pt", "--json", "--groups", "up=2", "--transposed", "up",
             "--groups", "stem=2")
    )  # fmt: skip
    in_code = {(row["tensor"], row["rule"]): row for row in tp.scan(net).to_data()["rows"]}
    seen = {(row["tensor"], row["rule"]): row for row in data["rows"]}
    shared = {key for key in in_code if not key[0].startswith(("words", "out"))}
    assert len(shared) > 30
    assert shared <= set(seen)
    for key in shared:
        assert seen[key]["residual"] == in_code[key]["residual"]
        assert seen[key]["free_values"] == in_code[key]["free_values"]
    assert data["kind"] == "scan"


def test_a_scan_writes_the_plan_that_tie_reads(net, files, capsys):
    good(capsys, "scan", "model.pt", "--plan", "found.toml")
    assert tp.read_plan("found.toml").entries == (tp.PlanEntry("body.0", "flip_sym"),)
    good(capsys, "tie", "model.pt", "--plan", "found.toml", "-o", "tied.safetensors")
    model = tp.load("tied.safetensors", Net())
    assert tp.is_tied(model.body[0])
    assert "exists already" in refused(capsys, "scan", "model.pt", "--plan", "found.toml")
    good(capsys, "scan", "model.pt", "--plan", "found.toml", "--force")
    assert "nothing was found" in refused(
        capsys, "scan", "model.pt", "--plan", "none.toml", "--rule", "row_repeat",
        out="row_repeat(groups=1)",
    )  # fmt: skip


def test_scan_by_some_rules(files, capsys):
    data = json.loads(good(
        capsys, "scan", "model.pt", "--json", "--rule", "row_repeat:groups=2", "--rule",
        "copy:fn=torch.t", "--pairs", "3",
    ))  # fmt: skip
    rules = {row["rule"] for row in data["rows"]}
    assert "row_repeat(groups=2)" in rules
    assert all(rule.startswith(("row_repeat(groups=2)", "copy(fn='t')")) for rule in rules)
    assert data["pairs"]["per_tensor"] == 3


def test_report_of_tied_and_of_dense_files(files, capsys):
    good(capsys, "tie", "model.pt", "--plan", "plan.toml", "-o", "tied.safetensors")
    data = json.loads(good(capsys, "report", "tied.safetensors", "--json"))
    in_code = tp.report(tp.load("tied.safetensors", Net())).to_data()
    assert {row["tensor"]: row for row in data["rows"]} == {
        row["tensor"]: row for row in in_code["rows"]
    }
    assert data["totals"] == in_code["totals"]
    assert data["rows"][0]["residual"] is not None  # kept in the header
    assert "| tensor |" in good(capsys, "report", "tied.safetensors", "--markdown")
    assert "Nothing is tied." in good(capsys, "report", "model.pt")


def test_a_tied_file_can_be_tied_further(files, capsys):
    good(capsys, "tie", "model.pt", "--tie", "body.0=flip_sym", "-o", "one.safetensors")
    good(
        capsys, "tie", "one.safetensors", "--tie", "body.2=copy:source=body.0", "--tie",
        "encoder=row_repeat:tensor_name=bias", "-o", "two.safetensors",
    )  # fmt: skip
    model = tp.load("two.safetensors", Net())
    assert torch.equal(model.body[2].weight, model.body[0].weight)
    assert tp.is_tied(model.body[0])
    assert tp.is_tied(model.encoder, "bias")


def test_laws_that_read_layers_are_tied_and_untied(files, capsys):
    convolutions = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ConvTranspose2d(8, 3, 3, stride=2)
    )
    linear = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    torch.save(nn.ModuleList([convolutions, linear]).state_dict(), "model.pt")
    good(
        capsys, "tie", "model.pt", "--tie", "0.1=transposed_copy:source=0.0", "--transposed", "0.1",
        "--tie", "1.1=shared_delta:source=1.0,rank=2", "--tie",
        "1.2=scaled_copy:source=1.1,per=output", "-o", "tied.safetensors",
    )  # fmt: skip
    good(capsys, "untie", "tied.safetensors", "-o", "dense.safetensors")
    tied = tp.load("tied.safetensors", nn.ModuleList([convolutions, linear]))
    dense = safetensors.torch.load_file("dense.safetensors")
    assert torch.equal(tied[0][1].weight, tied[0][0].weight)
    assert [tp.get_tie(layer).free_count for layer in linear[1:]] == [24, 6]
    for index in (1, 2):
        assert torch.equal(dense[f"1.{index}.weight"], tied[1][index].weight)


def test_groups_and_transposition_as_options(files, capsys):
    hints = ("--groups", "up=2", "--transposed", "up", "--groups", "st?m=2")
    good(
        capsys, "tie", "model.pt", "--tie", "up=channel_shared:over=in", "--tie",
        "stem=channel_shared:over=groups", *hints, "-o", "t.safetensors",
    )  # fmt: skip
    model = tp.load("t.safetensors", Net())
    tied = Net()
    tied.load_state_dict(torch.load("model.pt"))
    tp.register_tie(tied.up, "channel_shared", over="in")
    tp.register_tie(tied.stem, "channel_shared", over="groups")
    assert_same(model.state_dict(), tied.state_dict())
    # what was not said, and matters, is noticed when the file is loaded
    good(capsys, "tie", "model.pt", "--tie", "up=channel_shared:over=in", "-o", "w.safetensors")
    lost = r"'up.weight' was saved tied.*, transposed here\. .* again with --groups or --transposed"
    with pytest.raises(tp.TieError, match=lost):
        tp.load("w.safetensors", Net())
    assert "over='groups' shares" in refused(
        capsys, "tie", "model.pt", "--tie", "stem=channel_shared:over=groups", "-o", "x"
    )
    assert "no convolution is called 'encoder'" in refused(
        capsys, "scan", "model.pt", "--groups", "encoder=2"
    )
    assert "no convolution or matrix is called 'encodr'" in refused(
        capsys, "scan", "model.pt", "--transposed", "encodr"
    )
    assert "cannot have 4 groups" in refused(capsys, "scan", "model.pt", "--groups", "stem=4")


def test_s22_a_shared_parameter_of_a_pickle_stays_shared(files, capsys):
    good(capsys, "tie", "model.pt", "--tie", "body.0=flip_sym", "-o", "t.safetensors")
    stored = safetensors.torch.load_file("t.safetensors")
    assert ("words.weight" in stored, "out.weight" in stored) == (True, False)
    assert "shares its Parameter" in refused(
        capsys, "tie", "model.pt", "--tie", "out=row_repeat", "-o", "x.safetensors"
    )
    good(capsys, "untie", "t.safetensors", "-o", "d.safetensors")
    assert set(safetensors.torch.load_file("d.safetensors")) == set(Net().state_dict())


def test_shared_layers_of_a_tied_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = nn.ModuleDict({"a": nn.Conv2d(4, 4, 3, groups=2), "c": nn.Linear(2, 2)})
    model["b"] = model["a"]
    model["c"].bias = nn.Parameter(torch.ones(2))
    tp.register_tie(model["a"], "channel_shared", over="groups")
    tp.save(model, "t.safetensors")
    opened = model_from_file.open_model("t.safetensors")
    assert opened.a is opened.b
    tp.save(opened, "again.safetensors")
    assert Path("again.safetensors").read_bytes() == Path("t.safetensors").read_bytes()
    good(capsys, "untie", "t.safetensors", "-o", "d.safetensors")
    dense = safetensors.torch.load_file("d.safetensors")
    assert torch.equal(dense["b.weight"], model["b"].weight)


def test_a_single_layer_has_names_without_a_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    layer = nn.Linear(3, 4)
    torch.save(layer.state_dict(), "layer.pt")
    good(capsys, "tie", "layer.pt", "--tie", "*=row_repeat", "-o", "t")
    tied = tp.load("t", nn.Linear(3, 4))
    assert torch.equal(tied.weight[0], tied.weight[3])
    good(capsys, "untie", "t", "-o", "d")
    assert_same(safetensors.torch.load_file("d"), tp.dense_state_dict(tied))


def test_module_versions_of_a_pickle_travel(files, capsys):
    good(capsys, "tie", "model.pt", "--tie", "body.0=flip_sym", "-o", "t.safetensors")
    with safetensors.safe_open("t.safetensors", "pt") as opened:
        header = json.loads(opened.metadata()["tiedparam"])
    assert header["versions"] == {"body.1": 2}  # batch norm's


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_dtypes(dtype, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, dtype=dtype), nn.Linear(2, 2, dtype=dtype))
    torch.save({**model.state_dict(), "n": torch.tensor([1, 2], dtype=torch.int32)}, "m.pt")
    plan = ("--tie", "0=channel_shared", "--tie", "1=row_repeat")
    good(capsys, "tie", "m.pt", *plan, "-o", "t.safetensors")
    good(capsys, "untie", "t.safetensors", "-o", "d.safetensors")
    for layer, rule in zip(model, ("channel_shared", "row_repeat"), strict=True):
        tp.register_tie(layer, rule)
    dense = safetensors.torch.load_file("d.safetensors")
    assert dense.pop("n").tolist() == [1, 2]
    assert_same(dense, tp.dense_state_dict(model))


# Files are safe ----------------------------------------------------------------------------


def test_nothing_is_replaced_without_force(files, capsys):
    tie = ("tie", "model.pt", "--tie", "body.0=flip_sym", "-o")
    good(capsys, *tie, "tied.safetensors")
    assert "'tied.safetensors' exists already. Pass --force" in refused(
        capsys, *tie, "tied.safetensors"
    )
    assert "'model.pt' exists already" in refused(capsys, *tie, "model.pt")
    refused(capsys, "untie", "tied.safetensors", "-o", "tied.safetensors")
    good(capsys, *tie, "tied.safetensors", "--force")
    # over its own input, because that was asked for
    expected = tp.load("tied.safetensors", Net())
    good(capsys, "untie", "tied.safetensors", "-o", "tied.safetensors", "--force")
    assert_same(safetensors.torch.load_file("tied.safetensors"), tp.dense_state_dict(expected))


def test_shards_are_not_replaced_without_force(files, capsys):
    good(capsys, "tie", "model.pt", "--tie", "body.0=flip_sym", "-o", "t.safetensors")
    untie = ("untie", "t.safetensors", "-o", "d.safetensors", "--max-shard-size", "600")
    good(capsys, *untie)
    Path("d.safetensors.index.json").unlink()
    assert "exists already" in refused(capsys, *untie)
    good(capsys, *untie, "--force")


def test_a_failed_write_leaves_the_old_file(files, capsys, monkeypatch):
    good(capsys, "tie", "model.pt", "--tie", "body.0=flip_sym", "-o", "t.safetensors")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tiedparam.formats.atomic.os.fsync", full)
    for command in (
        ("tie", "model.pt", "--tie", "body.0=flip_sym", "-o", "t.safetensors", "--force"),
        ("untie", "t.safetensors", "-o", "t.safetensors", "--force"),
    ):
        assert "No space left" in refused(capsys, *command)


def test_a_dry_run_writes_nothing(files, capsys):
    before = sorted(files.iterdir())
    out = good(capsys, "tie", "model.pt", "--plan", "plan.toml", "--dry-run")
    assert "A dry run: nothing was changed." in out
    data = json.loads(good(capsys, "tie", "model.pt", "--plan", "plan.toml", "--dry-run", "--json"))
    assert data["dry_run"] is True
    assert len(data["rows"]) >= 5
    assert sorted(files.iterdir()) == before


# What goes wrong ---------------------------------------------------------------------------

BAD_FILES = {
    "nothing": b"",
    "text": b"hello, this is no checkpoint at all",
    "pickle": b"\x80\x04K\x01.",
    "zip": b"PK\x03\x04" + 60 * b"\0",
    "header": (10**9).to_bytes(8, "little") + b"{}",
    "list": (2).to_bytes(8, "little") + b"[]",
}


@pytest.mark.parametrize("command", ["scan", "report", "tie", "untie"])
@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_bad_file_gets_one_line(bad, command, files, capsys):
    Path("bad.bin").write_bytes(BAD_FILES[bad])
    more = {"tie": ["--plan", "plan.toml", "-o", "out"], "untie": ["-o", "out"]}.get(command, [])
    assert "bad.bin" in refused(capsys, command, "bad.bin", *more)
    assert "nowhere.pt" in refused(capsys, command, "nowhere.pt", *more)
    Path("empty").mkdir()
    assert "the folder 'empty' holds no checkpoint" in refused(capsys, command, "empty", *more)


@given(content=st.binary(max_size=300))
def test_no_bytes_make_a_traceback(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "random"
    path.write_bytes(content)
    stderr, sys.stderr = sys.stderr, io.StringIO()
    try:
        assert main(["report", str(path)]) == 1
        assert len(sys.stderr.getvalue().splitlines()) == 1
    finally:
        sys.stderr = stderr


BAD_PLANS = {
    "nonsense": ("= =", "is not TOML"),
    "empty": ("", "holds no list 'tie'"),
    "rule": ('[[tie]]\nlayers="*"\nrule="flip_sim"', "Did you mean 'flip_sym'"),
    "option": ('[[tie]]\nlayers="*"\nrule="row_repeat"\noptions={group=2}', "'group' is unknown"),
    "value": ('[[tie]]\nlayers="encoder"\nrule="row_repeat"\noptions={groups="x"}', "positive int"),
    "source": ('[[tie]]\nlayers="decoder"\nrule="copy"\noptions={source=3}', "source= takes"),
    "function": ('[[tie]]\nlayers="a"\nrule="copy"\noptions={source="b",fn="os.x"}', "'os.x'"),
    "pattern": ('[[tie]]\nlayers="encodr"\nrule="row_repeat"', "Did you mean 'encoder'"),
    "unfit": ('[[tie]]\nlayers="encoder"\nrule="flip_sym"', r"must equal in_channels"),
    "hint": ('[[layer]]\nlayers="up"\ngroup=2\n[[tie]]\nlayers="*"\nrule="row_repeat"', "entry 1"),
    "hints": ('layer=3\n[[tie]]\nlayers="*"\nrule="row_repeat"', "malformed"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_PLANS)
def test_a_bad_plan_gets_one_line(bad, files, capsys):
    text, message = BAD_PLANS[bad]
    Path("bad.toml").write_text(text)
    assert re.search(message, refused(capsys, "tie", "model.pt", "--plan", "bad.toml", "-o", "out"))


def test_other_things_that_cannot_be_done(files, net, capsys):
    assert "has no known format" in refused(
        capsys, "tie", "model.pt", "--plan", "model.pt", "-o", "x"
    )
    assert "holds no ties" in refused(capsys, "untie", "model.pt", "-o", "x")
    assert "is not a size" in refused(
        capsys, *("untie", _tied(net), "-o", "x", "--max-shard-size", "big")
    )
    message = refused(capsys, "tie", "model.pt", "--tie", "body.0=flip_sym", "-o", "no/where")
    folder = Path("no").resolve()
    assert message.endswith(f"tie: the folder '{folder}' does not exist. Make it first.\n")
    assert ".tmp" not in message
    for suffix in (".pt", ".bin", ".index.json"):
        assert f"'{suffix}' says otherwise" in refused(
            capsys, "tie", "model.pt", "--tie", "body.0=flip_sym", "-o", f"tied{suffix}"
        )
    tp.register_tie(net.body[0], "flip_sym")
    torch.save(net.state_dict(), "tied.pt")
    assert "'body.0.weight' is parametrized in it" in refused(capsys, "scan", "tied.pt")
    torch.save({"a": torch.ones(1), "a.b": torch.ones(1)}, "clash.pt")
    assert "no tensor of a model can have the name" in refused(capsys, "scan", "clash.pt")
    torch.save({"forward.weight": torch.ones(2, 2)}, "clash.pt")
    assert "no tensor of a model can have the name 'forward'" in refused(capsys, "scan", "clash.pt")
    torch.save({"a..b": torch.ones(1)}, "clash.pt")
    assert "no tensor of a model can have the name" in refused(capsys, "scan", "clash.pt")


def _tied(net):
    tp.save(tp.tie_model(net, {"body.0": "flip_sym"}) and net, "tied.safetensors")
    tp.untie_model(net)
    return "tied.safetensors"


def test_skipping_what_does_not_fit(files, capsys):
    out = good(
        capsys, "tie", "model.pt", "--tie", "body.*=flip_sym", "--tie", "encoder=flip_sym",
        "--skip-unfit", "-o", "t.safetensors",
    )  # fmt: skip
    assert "Skipped: 'encoder.weight'" in out
    model = tp.load("t.safetensors", Net())
    assert tp.is_tied(model.body[0])
    assert not tp.is_tied(model.encoder)


def test_inits(net, files, capsys):
    def loaded(*more):
        good(capsys, "tie", "model.pt", "--tie", "encoder=row_repeat", *more, "-o", "t", "--force")
        return tp.load("t", Net()).encoder.weight

    assert torch.allclose(loaded("--init", "rescale"), loaded() * 3**0.5)
    assert "breaks the law" in refused(
        capsys, "tie", "model.pt", "--tie", "encoder=row_repeat:init=exact", "-o", "x"
    )


def test_a_limit_for_residuals(files, capsys):
    def tie(*more):
        return "tie", "model.pt", "--tie", "body.2=flip_sym", *more, "-o", "t.safetensors"

    error = refused(capsys, *tie("--max-residual", "0.1"))
    assert "'body.2.weight' by 'flip_sym': its residual 0." in error
    assert "is above the limit of 0.1. Leave it dense" in error
    assert "(tiedparam scan lists them)" in error
    assert not Path("t.safetensors").exists()
    assert "Skipped: 'body.2.weight'" in good(
        capsys, *tie("--max-residual", "0.1", "--skip-unfit", "--dry-run")
    )
    good(capsys, *tie("--max-residual", "1"))
    for limit in ("-0.1", "nan", "much", ""):
        with pytest.raises(SystemExit) as caught:
            main([*tie(), f"--max-residual={limit}"])
        assert caught.value.code == 2
        assert "is not a number from 0 up" in capsys.readouterr().err


def test_ties_that_are_hardly_meant_are_one_line_on_stderr(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 1))
    torch.save(model.state_dict(), "fresh.pt")
    command = ("tie", "fresh.pt", "--tie", "*=row_repeat", "-o", "t.safetensors", "--json")
    code, out, err = call(capsys, *command)
    assert code == 0
    assert len(json.loads(out)["rows"]) == 2
    (line,) = err.splitlines()
    assert line.startswith(
        "warning: 2 of 2 ties were probably not intended: the tie of '0.weight' by "
    )
    assert "'1.weight' by 'row_repeat(groups=1)' frees nothing: 256 of 256" in line
    assert ".; " not in line
    assert "pass --init rescale" in line
    assert line.endswith("set a limit with --max-residual. To tie again pass --force.")
    assert "with tiedparam scan, or set" in line
    assert call(capsys, *command, "--init", "rescale", "--force")[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["--fly"],
        ["scan"],
        ["scan", "model.pt", "--fly"],
        ["scan", "model.pt", "--rule", "flip_sim"],
        ["scan", "model.pt", "--rule", "row_repeat:group=2"],
        ["scan", "model.pt", "--rule", "row_repeat:2"],
        ["scan", "model.pt", "--rule", "copy:fn=os.system"],
        ["scan", "model.pt", "--groups", "stem"],
        ["scan", "model.pt", "--groups", "stem=0"],
        ["scan", "model.pt", "--pairs", "-1"],
        ["tie", "model.pt", "-o", "x"],
        ["tie", "model.pt", "--plan", "plan.toml"],
        ["tie", "model.pt", "--tie", "flip_sym", "-o", "x"],
        ["tie", "model.pt", "--tie", "*=flip_sim", "-o", "x"],
        ["tie", "model.pt", "--tie", "*=copy", "-o", "x"],
        ["tie", "model.pt", "--plan", "plan.toml", "-o", "x", "--init", "best"],
        ["untie", "model.pt"],
        ["report", "model.pt", "model.pt"],
        ["demo", "--epochs", "0"],
    ],
)
def test_wrong_usage(arguments, files, capsys):
    before = sorted(files.iterdir())
    assert "error: " in usage(capsys, *arguments)
    assert sorted(files.iterdir()) == before


def test_without_a_command_the_help_is_shown(capsys):
    code, out, err = call(capsys)
    assert (code, out) == (2, "")
    assert "examples:" in err


COMMANDS = ["rules", "scan", "tie", "untie", "report", "demo"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    if command != "demo":
        assert "exit codes: 0 fine, 1" in shown
    examples = re.findall(rf"tiedparam ({command}\b[^\n]*)", shown.partition("example")[2])
    assert examples
    for example in examples:
        arguments, rest = parser().parse_known_args(shlex.split(example))
        assert arguments.command == command
        assert not rest


def test_the_commands_are_these(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    listed = re.findall(r"^    (\w+) {2,}", shown, re.MULTILINE)
    assert [name for name in listed if name in COMMANDS] == COMMANDS


def test_rules_are_the_registry(capsys):
    data = json.loads(good(capsys, "rules", "--json"))
    assert {row["rule"]: row["law"] for row in data["rows"]} == {
        name: rule.law for name, rule in tp.available_rules().items()
    }
    table = good(capsys, "rules")
    for name in tp.available_rules():
        assert re.search(rf"^\S.*  {name}  ", table, re.MULTILINE)
    assert "`" not in table


def test_warnings_are_one_line(files, capsys, monkeypatch):
    def warn(arguments):
        warnings.warn("first\nsecond", tp.TieWarning, stacklevel=1)
        warnings.warn("torch will drop something", FutureWarning, stacklevel=1)

    monkeypatch.setattr(_commands, "_run_report", warn)
    code, out, err = call(capsys, "report", "model.pt")
    assert (code, out, err) == (0, "", "warning: first; second\n")


def test_an_interrupt_is_one_line(files, capsys, monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(_commands, "_run_report", interrupt)
    code, out, err = call(capsys, "report", "model.pt")
    assert (code, out) == (130, "")
    assert err.endswith("report: interrupted\n")


def test_the_benchmarks_are_no_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench"])
    assert caught.value.code == 2
    assert "invalid choice: 'bench'" in capsys.readouterr().err


# The process -------------------------------------------------------------------------------


@pytest.mark.slow
def test_json_is_alone_on_stdout(files):
    done = run("scan", "model.pt", "--json", "--rule", "flip_sym")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["rows"]
    failed = run("report", "nowhere.pt")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == (
        "python -m tiedparam report: [Errno 2] No such file or directory: 'nowhere.pt'\n"
    )
    assert run("tie", "model.pt").returncode == 2


@pytest.mark.slow
def test_a_reader_that_has_seen_enough(files):
    quoted = shlex.join([sys.executable, "-m", "tiedparam", "scan", "model.pt"])
    done = subprocess.run(
        ["bash", "-c", f"{quoted} | head -1"], capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_the_console_script_is_this_shell():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["scripts"]["tiedparam"].partition(":")
    assert getattr(import_module(module), name) is main
    assert import_module("tiedparam.__main__").main is main


def test_layers_are_named_by_numbers_too(files, capsys):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    torch.save(model.state_dict(), "numbers.pt")
    good(capsys, "tie", "numbers.pt", "--tie", "1=copy:source=0", "-o", "numbers.safetensors")
    tp.load("numbers.safetensors", model)
    assert torch.equal(model[1].weight, model[0].weight)


@pytest.mark.slow
def test_a_terminal_of_another_encoding_and_a_closed_one(files):
    ascii_only = dict(os.environ, PYTHONIOENCODING="ascii")
    command = [sys.executable, "-m", "tiedparam", "scan", "model.pt"]
    done = subprocess.run(command, capture_output=True, env=ascii_only)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"flip_sym" in done.stdout
    closed = subprocess.run(f"{shlex.join(command)} >&-", shell=True, capture_output=True)
    assert b"Traceback" not in closed.stderr


def test_a_line_for_each_reason(files, capsys):
    code, out, err = call(
        capsys, "tie", "model.pt", "--tie", "encoder=flip_sym", "--tie", "decoder=flip_sym",
        "-o", "tied.safetensors",
    )  # fmt: skip
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert lines[0].endswith("2 of 2 ties cannot be made, and nothing was changed:")
    assert lines[1].startswith("'encoder.weight' by 'flip_sym'")
    assert lines[2].startswith("'decoder.weight' by 'flip_sym'")
    assert lines[3] == "Correct the plan, or pass --skip-unfit to leave these as they are."


def test_the_next_steps_are_those_of_the_shell(net, files, capsys):
    tied = _tied(net)
    code, _, err = call(capsys, "tie", tied, "--tie", "body.0=row_repeat", "-o", "x.safetensors")
    assert code == 1
    assert "tied by 'flip_sym' already. Run tiedparam untie first." in err
    out = good(capsys, "tie", tied, "--tie", "body.[02]=row_repeat", "--skip-unfit", "--dry-run")
    assert "already. Run tiedparam untie first." in out
    assert "remove_tie" not in out


def test_what_a_file_is_not_is_said(net, files, capsys):
    assert "'plan.toml' is not a checkpoint. Name a safetensors file, what torch.save" in (
        refused(capsys, "scan", "plan.toml")
    )
    torch.save(net.state_dict(), "wrong.safetensors")
    assert "it was written by torch.save. Call it '.pt'" in (
        refused(capsys, "scan", "wrong.safetensors")
    )
    torch.save({"w": torch.eye(3).to_sparse()}, "sparse.pt")
    assert "its entry 'w' is of the layout torch.sparse_coo" in refused(capsys, "scan", "sparse.pt")


def test_an_entry_of_a_checkpoint_by_its_key(net, files, capsys):
    torch.save({"model": net.state_dict(), "epoch": 3}, "epoch3.pt")
    assert "(in the shell: --key model)" in refused(capsys, "scan", "epoch3.pt")
    for command in (["scan"], ["report"], ["tie", "--plan", "plan.toml", "--dry-run"]):
        whole = good(capsys, *command, "model.pt").partition("\nNext:")[0]
        part = good(capsys, *command, "epoch3.pt", "--key", "model").partition("\nNext:")[0]
        assert part == whole
    assert "no entry 'net'. It has 'model', 'epoch'." in (
        refused(capsys, "scan", "epoch3.pt", "--key", "net")
    )
    assert "the entry 'epoch' of 'epoch3.pt' holds no state dict: it holds a int" in (
        refused(capsys, "scan", "epoch3.pt", "--key", "epoch")
    )
    assert "has no entries such as 'model'" in (
        refused(capsys, "untie", _tied(net), "--key", "model", "-o", "x.safetensors")
    )


OWN_RULE = """
import tiedparam as tp
from tests.support import ROOT

@tp.register_rule("test_even_rows")
class EvenRows(tp.Rule):
    "All rows are equal."
    law = "W[o, c] = w[c]"

    def check(self, layout):
        return None if len(layout.shape) == 2 else "it is no matrix. Tie a matrix."

    def free_shapes(self):
        return (self.bound_layout.shape[1:],)

    def forward(self, row):
        return row.expand(self.bound_layout.shape).clone()

    def symmetries(self, weight):
        return [weight.flip(0)]
"""


@pytest.mark.slow
def test_rules_of_ones_own_are_imported(files):
    Path("my_rules.py").write_text(OWN_RULE)
    tie = ["tie", "model.pt", "--tie", "encoder=test_even_rows", "-o", "own.safetensors"]
    without = run(*tie)
    assert without.returncode == 2
    assert "no rule 'test_even_rows'" in without.stderr
    assert "Rules of your own need --import." in without.stderr
    script = [sys.executable, "-c", "import sys; sys.path.pop(0)\n"
              "from tiedparam.__main__ import main; sys.exit(main())"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # as the console script: not from here
    done = subprocess.run(
        [*script, *tie, "--import", "my_rules"], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    shown = run("report", "own.safetensors", "--import", "my_rules")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "test_even_rows" in shown.stdout
    missing = run("report", "own.safetensors")
    assert missing.returncode == 1
    assert "Rules of your own need --import." in missing.stderr
    broken = run("rules", "--import", "no_such_module")
    assert broken.returncode == 1
    assert broken.stderr.endswith(
        "--import no_such_module: ModuleNotFoundError: No module named 'no_such_module'. Give the "
        "dotted name of a module in this folder, or of one that is installed.\n"
    )


def test_an_empty_name_is_wrong_usage(files, capsys):
    assert "the name of a file is empty" in usage(capsys, "untie", "model.pt", "-o", "")


def test_the_demo_replaces_no_picture_of_the_users(files, capsys):
    Path("mine.png").write_bytes(b"mine")
    assert "'mine.png' exists already" in refused(capsys, "demo", "--out", "mine.png")


# What to type next ---------------------------------------------------------------------------


def suggested(out: str) -> list[str]:
    """The commands that a scan ends with."""
    lines = out.rstrip("\n").splitlines()
    lines = lines[lines.index("Next:") + 1 :]
    assert lines
    return [line.removeprefix("  python -m tiedparam ") for line in lines]


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ((), "tie model.pt --tie body.0=flip_sym -o model-tied.safetensors"),
        (("--plan", "the plan.toml"), "tie model.pt --plan 'the plan.toml' -o model-tied.safe"),
        (
            ("--groups", "up=2", "--groups", "stem=2", "--transposed", "up"),
            "tie model.pt --groups up=2 --groups stem=2 --transposed up --tie body.0=flip_sym",
        ),
    ],
)
def test_a_scan_ends_with_the_command_that_ties_what_was_found(options, step, files, capsys):
    out = good(capsys, "scan", "model.pt", *options)
    assert re.match(r"1 of \d+ tensors looks tied: body\.0\.weight \(flip_sym\)\.\n\ntensor", out)
    (command,) = suggested(out)
    assert command.startswith(step)
    good(capsys, *shlex.split(command))
    assert tp.is_tied(tp.load("model-tied.safetensors", Net()).body[0])
    again = json.loads(good(capsys, "scan", "model.pt", *options, "--force", "--json"))
    assert [step.removeprefix("python -m tiedparam ") for step in again["next_steps"]] == [command]
    assert again["headline"] == out.splitlines()[0]


def test_names_that_begin_with_a_dash_are_no_options_of_the_command(files, capsys):
    model = nn.Module()
    model.add_module("--all", tp.remove_tie(tp.register_tie(nn.Linear(16, 16), "flip_sym")))
    tp.save(model, "-x.safetensors")
    (command,) = suggested(good(capsys, "scan", "--", "-x.safetensors"))
    good(capsys, *shlex.split(command))
    assert tp.is_tied(tp.load("-x-tied.safetensors", model))


@pytest.mark.usefixtures("registry")
def test_the_commands_repeat_how_the_file_is_read(net, files, capsys, monkeypatch):
    monkeypatch.syspath_prepend(files)
    Path("my file").mkdir()
    torch.save({"my model": net.state_dict()}, "my file/it's.pt")
    Path("own_rules.py").write_text(OWN_RULE)
    out = good(capsys, "scan", "my file/it's.pt", "--key", "my model", "--import", "own_rules")
    (command,) = suggested(out)
    good(capsys, *shlex.split(command))
    assert "--import own_rules" in command
    assert tp.is_tied(tp.load("it's-tied.safetensors", Net()).body[0])
    del sys.modules["own_rules"]


def test_many_finds_go_by_a_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(4)))
    with torch.no_grad():
        for layer in model:
            layer.weight += layer.weight.t().clone()
    torch.save(model.state_dict(), "m.pt")
    out = good(capsys, "scan", "m.pt", "--rule", "flip_sym", "--pairs", "0")
    assert suggested(out) == [
        "scan m.pt --rule flip_sym --pairs 0 --plan plan.toml",
        "tie m.pt --plan plan.toml -o m-tied.safetensors",
    ]
    for command in suggested(out):
        good(capsys, *shlex.split(command))
    assert all(map(tp.is_tied, tp.load("m-tied.safetensors", model)))


def test_a_scan_without_finds_says_what_that_means(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)).state_dict(), "m.pt")
    out = good(capsys, "scan", "m.pt")
    assert out.startswith("None of 4 tensors looks tied: their residuals are about those of ")
    assert suggested(out) == ["tie m.pt --tie 'LAYERS=RULE' --init rescale -o m-tied.safetensors"]


@pytest.mark.parametrize(
    "entry",
    [
        tp.PlanEntry("a.b", "flip_sym"),
        tp.PlanEntry("0", "row_repeat", {"groups": 4}),
        tp.PlanEntry("0", "copy", {"source": "1", "fn": torch.t}),
        tp.PlanEntry("a", "copy", {"source": "b", "source_name": "w"}, "in_proj_weight"),
        tp.PlanEntry("[[]x]", "channel_shared", {"over": "in"}),
    ],
)
def test_an_entry_as_an_option_is_read_as_the_same_entry(entry):
    _, option = shlex.split(next_steps.as_options(tp.Plan((entry,))))
    assert _arguments.plan_entry(option, {}) == entry


def test_what_an_option_cannot_say_is_left_to_a_plan():
    for entry in (
        tp.PlanEntry("a=b", "flip_sym"),
        tp.PlanEntry("a", "copy", {"source": "b,c"}),
        tp.PlanEntry("a", "copy", {"source": "b", "fn": lambda weight: weight}),
    ):
        assert next_steps.as_options(tp.Plan((entry,))) is None
    assert next_steps.as_options(tp.Plan(4 * (tp.PlanEntry("a", "flip_sym"),))) is None
