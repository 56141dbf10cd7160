"""A folder of a Hugging Face checkpoint is taken wherever a file is: written by transformers."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.shell import call, good, refused

transformers = pytest.importorskip("transformers")

NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertModel(config)
    with torch.no_grad():
        weight = model.pooler.dense.weight
        weight += weight.t().clone()
    return model


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model; the working folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    return bert()


def as_pickles(folder: Path) -> None:
    """What older releases of transformers wrote: the same names, with ``.bin``."""
    state = tp.load(folder, bert()).state_dict()
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(state, folder / "pytorch_model.bin")


@pytest.mark.slow
@pytest.mark.feature("Copies and files", "a folder that `save_pretrained` wrote")
@pytest.mark.parametrize("kind", ["one file", "shards", "a pickle"])
def test_a_folder_by_save_pretrained_is_taken_wherever_a_file_is(kind, model, capsys):
    model.save_pretrained("bert", max_shard_size="5KB" if kind == "shards" else "1GB")
    if kind == "a pickle":
        as_pickles(Path("bert"))
    assert Path("bert/config.json").exists()
    assert (len(list(Path("bert").glob("*-of-*"))) > 2) == (kind == "shards")
    other = bert()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    tp.load("bert", other)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)

    out = good(capsys, "scan", "bert")
    assert out.startswith("1 of ")
    said = r"^(\d+) more rows are not shown\. See the output of --json\.$"
    (hidden,) = re.findall(said, out, re.MULTILINE)
    assert len(json.loads(good(capsys, "scan", "bert", "--json"))["rows"]) == 40 + int(hidden)
    assert "looks tied: pooler.dense.weight (flip_sym)." in out.splitlines()[0]
    assert "tie bert --tie pooler.dense=flip_sym -o bert-tied.safetensors" in out.splitlines()[-1]
    _, *command = out.splitlines()[-1].split("tiedparam ")
    written = json.loads(good(capsys, *command[0].split(), "--json"))
    assert written["bytes_before"] == sum(
        file.stat().st_size for file in Path("bert").iterdir() if "model" in file.name
    )
    good(capsys, "untie", "bert-tied.safetensors", "-o", "dense.safetensors")
    assert "Nothing is tied" in good(capsys, "report", "bert")
    assert "holds no ties" in refused(capsys, "untie", "bert", "-o", "x.safetensors")


def test_a_folder_with_several_checkpoints_is_refused_with_their_names(model, capsys):
    model.save_pretrained("bert")
    shutil.copy("bert/model.safetensors", "bert/pytorch_model.bin")
    told = refused(capsys, "scan", "bert")
    assert told.endswith(
        "the folder 'bert' holds several checkpoints: 'model.safetensors', 'pytorch_model.bin'. "
        "Name the one that you mean, such as 'bert/model.safetensors'.\n"
    )
    with pytest.raises(tp.TieError, match="holds several checkpoints"):
        tp.load("bert", bert())
    assert call(capsys, "scan", "bert/model.safetensors")[0] == 0
    # a file beside the index of an older, sharded one
    Path("bert/pytorch_model.bin").rename("bert/model.safetensors.index.json")
    assert "holds several checkpoints" in refused(capsys, "report", "bert")


def gpt2(**options) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8, **options
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():  # each output of this Conv1D, which stores W[in, out], sums its inputs
        weight = model.transformer.h[0].attn.c_attn.weight
        weight.copy_(weight[:1].expand_as(weight) + 1e-3 * weight)
    return model


@pytest.mark.feature(
    "Copies and files",
    "a checkpoint file of GPT-2, whose matrices have their inputs first",
    needs="`--transposed` where it is tied in the shell",
)
def test_the_last_line_of_a_scan_of_gpt2_ties_what_its_model_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    gpt2().save_pretrained("gpt2")
    place, law = "transformer.h.0.attn.c_attn", "channel_shared:over=in"
    # without a hint the axes are taken for those of a Linear, and what loads the file says so
    good(capsys, "tie", "gpt2", "--tie", f"{place}=channel_shared:over=out", "-o", "w.safetensors")
    with pytest.raises(tp.TieError, match=r"\(16, 48\) and is \(16, 48\), transposed.*--transp"):
        tp.load("w.safetensors", gpt2())
    out = good(capsys, "scan", "gpt2", "--rule", law, "--transposed", "*.c_*")
    _, command = out.splitlines()[-1].split("tiedparam ")
    good(capsys, *shlex.split(command))
    loaded = tp.load("gpt2-tied.safetensors", gpt2())
    same = tp.tie_model(gpt2(), {place: ("channel_shared", {"over": "in"})})
    assert tp.get_tie(loaded.get_submodule(place)).free_count == same.ties[0].free_values == 48
    # and back, from a file that says itself how it is tied
    tp.save(loaded, "saved.safetensors")
    assert "channel_shared(over='in')" in good(capsys, "report", "saved.safetensors")
    good(capsys, "untie", "saved.safetensors", "-o", "dense.safetensors")
    plain = tp.load("dense.safetensors", gpt2())
    weight = plain.get_submodule(place).weight
    assert torch.equal(weight, loaded.get_submodule(place).weight)
    assert torch.equal(weight, weight[:1].expand_as(weight))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "holds no checkpoint: none of 'model.safetensors', 'model.safetensors.index.json', "),
        (("config.json", "readme.md"), "Name another folder, or a file."),
        (
            ("config.json", "b.pt", "a.safetensors"),
            "It holds 'a.safetensors', 'b.pt'. Name the file that you mean, such as 'f/a.safeten",
        ),
        (
            ("model-00001-of-00002.safetensors", "config.json"),
            "parts of a checkpoint without their index: 'model-00001-of-00002.safetensors'. Fetch "
            "'model.safetensors.index.json' as well.",
        ),
        (
            tuple(f"{n:03}.pt" for n in range(400)),
            "'004.pt', '005.pt', '006.pt', '007.pt', '008.pt'",
        ),
        (
            ("dense-00001-of-00001.safetensors", "dense.safetensors.index.json"),
            "It holds 'dense.safetensors.index.json'. Name the file that you mean, such as "
            "'f/dense.safetensors.index.json'.",
        ),
        (
            ("a-00001-of-00001.bin", "a.bin.index.json", "b-00001-of-00001.bin"),
            "without their index: 'b-00001-of-00001.bin'. Fetch 'b.bin.index.json' as well.",
        ),
    ],
)
def test_a_folder_without_a_checkpoint_says_what_it_holds(files, message, model, capsys):
    Path("f").mkdir()
    for name in files:
        Path("f", name).write_bytes(b"")
    for command in (["scan"], ["report"], ["tie", "--tie", "a=flip_sym", "-o", "x.safetensors"]):
        told = refused(capsys, *command, "f")
        assert "the folder 'f' holds" in told
        assert message in told
        assert len(told) < 2000
    with pytest.raises(tp.TieError, match="the folder 'f' holds"):
        tp.load("f", model)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_alone_is_the_checkpoint(name, tmp_path):
    model = nn.Linear(3, 2)
    if name.endswith(".index.json"):
        part = name.removesuffix(".index.json")
        tp.export_dense(model, tmp_path / "w.safetensors")
        (tmp_path / f"{part}.part").write_bytes((tmp_path / "w.safetensors").read_bytes())
        (tmp_path / "w.safetensors").unlink()
        places = dict.fromkeys(model.state_dict(), f"{part}.part")
        (tmp_path / name).write_text(json.dumps({"weight_map": places}))
    else:
        tp.save(model, tmp_path / "w.safetensors")
        (tmp_path / "w.safetensors").rename(tmp_path / name)
    (tmp_path / "optimizer.pt").write_bytes(b"what a Trainer leaves")
    loaded = tp.load(tmp_path, nn.Linear(3, 2))
    assert torch.equal(loaded.weight, model.weight)
