"""What an export replaces, what shows that its files are one, and exports that are killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import tiedparam as tp
from tests.support import ROOT
from tiedparam.__main__ import main

KILLED = int(os.environ.get("TIEDPARAM_KILLED_EXPORTS", "30"))
"""How many exports are killed at random moments; 200 take half a minute."""

FORMS = {"one file": None, "3 shards": "17KB", "2 shards": "34KB"}


def model(value: float) -> nn.Sequential:
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    for parameter in layers.parameters():
        parameter.data.fill_(value)
    return layers


def value_in(path: Path) -> float:
    loaded = tp.load(path, model(-1.0))
    (value,) = torch.cat([p.detach().flatten() for p in loaded.parameters()]).unique().tolist()
    return value


def export(value: float, path: Path, form: str) -> list[Path]:
    return tp.export_dense(model(value), path, max_shard_size=FORMS[form])


@pytest.mark.feature(
    "Copies and files", "an export over an older one, one file or shards: nothing old stays"
)
@pytest.mark.parametrize("old", FORMS)
@pytest.mark.parametrize("new", FORMS)
def test_an_export_replaces_all_that_an_older_one_of_its_name_left(old, new, tmp_path):
    path = tmp_path / "m.safetensors"
    export(1.0, path, old)
    files = export(2.0, path, new)
    assert sorted(tmp_path.iterdir()) == sorted(files)
    index = tmp_path / "m.safetensors.index.json"
    here, gone = (path, index) if new == "one file" else (index, path)
    assert value_in(here) == 2.0
    with pytest.raises(tp.TieError, match=rf"there is no '{gone}'. Name .*'{here}'"):
        tp.load(gone, model(0.0))


@pytest.mark.parametrize("old", FORMS)
def test_a_saved_file_replaces_an_export_of_its_name(old, tmp_path):
    path = tmp_path / "m.safetensors"
    export(1.0, path, old)
    tied = model(2.0)
    tp.register_tie(tied[0], "flip_sym")
    tp.save(tied, path)
    assert list(tmp_path.iterdir()) == [path]
    assert value_in(path) == 2.0


def test_nothing_of_another_name_is_removed(tmp_path):
    """Whatever looks like a shard of this name, but is neither marked nor in the index."""
    path = tmp_path / "m.safetensors"
    others = [
        "m2-00001-of-00003.safetensors", "m-00001-of-00002.bin", "m-1-of-2.safetensors",
        "m.safetensors.index.json.bak", "xm-00001-of-00003.safetensors", "m.bin.index.json",
        "m-00007-of-00009.safetensors", "m-00008-of-00009.safetensors", "M.safetensors",
        "m-00001-of-00003.safetensors.bak", "mXsafetensors",
    ]  # fmt: skip
    for name in others:
        (tmp_path / name).write_text("of another name")
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / others[7])  # unmarked
    (tmp_path / "m-00001-of-00004.safetensors").mkdir()
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    for value, form in enumerate([*FORMS, *FORMS], start=1):
        export(float(value), path, form)
    export(1.0, path, "one file")
    assert value_in(path) == 1.0
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()} == {
        **kept,
        "m.safetensors": path.read_bytes(),
    }


def test_one_shard_by_itself_names_the_index_that_loads(tmp_path):
    files = export(1.0, tmp_path / "m.safetensors", "3 shards")
    with pytest.raises(tp.TieError, match="one of several. Name their index, '(.*)'") as caught:
        tp.load(files[0], model(2.0))
    index = re.search(r"their index, '(.*)'\.", str(caught.value))[1]
    loaded, wanted = tp.load(index, model(2.0)), model(1.0)
    for key, value in wanted.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    files[-1].unlink()  # a lone shard has no index to name
    with pytest.raises(tp.TieError, match="is missing") as caught:
        tp.load(files[0], model(2.0))
    assert "index" not in str(caught.value)


def test_unmarked_shards_that_the_index_names_are_replaced_too(tmp_path):
    """As save_pretrained of Hugging Face writes them, and earlier versions of tiedparam."""
    hugging_face(tmp_path, 1.0)
    (tmp_path / "elsewhere.safetensors").write_text("named by no pattern")
    index = tmp_path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["x"] = "elsewhere.safetensors"
    index.write_text(json.dumps(table))
    export(2.0, tmp_path / "model.safetensors", "one file")
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "elsewhere.safetensors",
        "model.safetensors",
    ]


def hugging_face(folder: Path, value: float) -> Path:
    """A sharded checkpoint by another hand: no marks."""
    state = model(value).state_dict()
    places = {key: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, key in enumerate(state)}
    for name in set(places.values()):
        shard = {key: state[key] for key in state if places[key] == name}
        safetensors.torch.save_file(shard, folder / name, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def test_shards_without_marks_load(tmp_path):
    index = hugging_face(tmp_path, 3.0)
    assert value_in(index) == 3.0
    table = json.loads(index.read_text())
    for metadata in ({}, None, [], "x"):
        index.write_text(json.dumps({**table, "metadata": metadata}))
        assert value_in(index) == 3.0
    index.write_text(json.dumps({**table, "metadata": {"tiedparam.export": 3}}))
    with pytest.raises(tp.TieError, match="is not an index"):
        value_in(index)


@pytest.mark.slow
def test_transformers_reads_shards_with_marks(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=20, max_position_embeddings=8,
    )  # fmt: skip
    bert = transformers.BertModel(config)
    tp.register_tie(bert.encoder.layer[0].intermediate.dense, "row_repeat")
    config.save_pretrained(tmp_path)
    assert len(tp.export_dense(bert, tmp_path / "model.safetensors", max_shard_size="9KB")) > 2
    loaded = transformers.BertModel.from_pretrained(tmp_path)
    dense = tp.dense_state_dict(bert)
    assert all(torch.equal(value, dense[key]) for key, value in loaded.state_dict().items())


@pytest.mark.feature(
    "Copies and files",
    "shards of two exports, or of one that was killed over an older one",
    refused="their marks differ; export again",
)
def test_s48_files_of_two_exports_are_refused(tmp_path):
    files = {}
    for name, value in (("one", 1.0), ("two", 2.0)):
        (tmp_path / name).mkdir()
        files[name] = export(value, tmp_path / name / "m.safetensors", "3 shards")
    mixed = tmp_path / "mixed"
    for number in range(len(files["one"])):
        shutil.copytree(tmp_path / "one", mixed, dirs_exist_ok=True)
        shutil.copy(files["two"][number], mixed)
        with pytest.raises(tp.TieError, match=r"(?s)its file 'm-0000. are not of one|Export") as e:
            tp.load(mixed / "m.safetensors.index.json", model(0.0))
        named = "m-00001" if number == 3 else f"m-0000{number + 1}"
        assert f"its file '{named}-of-00003.safetensors' are not from the same export" in str(
            e.value
        )
        assert "Export the model again, or fetch all files of one export." in str(e.value)
    for number in range(3):
        shutil.copy(files["two"][number], mixed)
    assert value_in(mixed / "m.safetensors.index.json") == 2.0


def test_marked_and_unmarked_files_are_no_whole_either(tmp_path):
    index = export(1.0, tmp_path / "m.safetensors", "2 shards")[-1]
    table = json.loads(index.read_text())
    mark = table["metadata"].pop("tiedparam.export")
    sound = index.read_bytes()
    index.write_text(json.dumps(table))
    with pytest.raises(tp.TieError, match="are not from the same export"):
        value_in(index)
    index.write_bytes(sound)
    shard = tmp_path / "m-00002-of-00002.safetensors"
    with safetensors.safe_open(shard, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "tiedparam.export": mark}
        tensors = {key: opened.get_tensor(key).clone() for key in list(opened.keys())}
    safetensors.torch.save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(tp.TieError, match="are not from the same export"):
        value_in(index)


def test_shards_without_their_index_tell_of_an_interrupted_export(tmp_path):
    *_, index = export(1.0, tmp_path / "m.safetensors", "3 shards")
    index.unlink()
    with pytest.raises(tp.TieError, match=r"was interrupted. Export the model again"):
        value_in(index)
    with pytest.raises(FileNotFoundError):
        value_in(tmp_path / "other.safetensors.index.json")
    with pytest.raises(FileNotFoundError):
        value_in(tmp_path / "no folder" / "other.safetensors.index.json")
    assert export(2.0, tmp_path / "m.safetensors", "one file") == list(tmp_path.iterdir())


def test_an_export_through_a_link_replaces_what_the_link_points_to(tmp_path):
    (tmp_path / "blobs").mkdir()
    path = tmp_path / "m.safetensors"
    *shards, index = export(1.0, path, "3 shards")
    for number, file in enumerate([*shards, index]):
        blob = file.rename(tmp_path / "blobs" / str(number))
        file.symlink_to(blob)
    assert value_in(index) == 1.0
    export(2.0, path, "3 shards")
    assert value_in(index) == 2.0
    assert all(file.is_symlink() for file in shards)
    export(3.0, path, "one file")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "blobs", path]
    assert value_in(path) == 3.0


def test_the_shell_replaces_nothing_without_force(tmp_path, capsys):
    tied = model(1.0)
    tp.register_tie(tied[0], "flip_sym")
    source, path = tmp_path / "tied.safetensors", tmp_path / "m.safetensors"
    tp.save(tied, source)
    export(2.0, path, "3 shards")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for command in (
        ["untie", str(source), "-o", str(path)],
        ["untie", str(source), "-o", str(path), "--max-shard-size", "34KB"],
        ["tie", str(source), "--tie", "1=flip_sym", "-o", str(path)],
    ):
        assert main(command) == 1
        assert "m.safetensors.index.json' exists already. Pass --force" in capsys.readouterr().err
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
        assert main([*command, "--force"]) == 0
        capsys.readouterr()
        for file in set(tmp_path.iterdir()) - {source}:
            file.unlink()
        for file, content in before.items():
            file.write_bytes(content)


def campaign(how: str, count: int, folder: Path) -> dict[str, int]:
    script = ROOT / "tests" / "support" / "killed_exports.py"
    command = [sys.executable, str(script), how, str(count), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    print(seen)
    return seen


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_s48_an_export_that_is_killed_at_random_moments_is_old_new_or_refused(tmp_path):
    seen = campaign("random", KILLED, tmp_path)
    assert sum(seen.values()) == KILLED
    assert seen["old"] > KILLED // 4


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_s48_an_export_that_is_killed_before_any_step_is_old_new_or_refused(tmp_path):
    """Every step on the file system, for each form over each."""
    seen = campaign("steps", 0, tmp_path)
    assert seen["finished"] == 9
    assert min(seen["old"], seen["new"], seen["refused"]) >= 9


@pytest.mark.parametrize("letter", ["a", "重", "🙂"])
def test_a_name_as_long_as_a_name_can_be(letter, tmp_path):
    """The names of what stands beside it, an index or a temporary file, are longer."""
    suffix = ".safetensors"
    count = (255 - len(suffix)) // len(letter.encode())
    path = tmp_path / (count * letter + suffix)
    layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
    tp.save(layer, path)
    assert tp.export_dense(layer, path) == [path]
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(tp.load(path, nn.Linear(4, 4)).weight, layer.weight)
