"""Files hold laws within laws by names and options, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import tiedparam as tp
from tiedparam.formats.safetensors import SafetensorsFile
from tiedparam.laws import Orbits

REPEAT = ("repeat", {"outputs": 2})
LAWS = {
    "together": (["flip_sym", REPEAT], {}),
    "a part": ("flip_sym", {"rows": slice(4, None)}),
    "parts": (
        [("flip_sym", {"rows": slice(0, 4)}), ("repeat", {"outputs": 2, "rows": [4, 8]})],
        {},
    ),
    "together in a part": (["flip_sym", REPEAT], {"rows": slice(0, 4), "columns": slice(0, 4)}),
}  # fmt: skip


def model(which: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4 if which == "together" else 8), nn.ReLU())


def header_of(path) -> dict:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(json.loads(file.read(size))["__metadata__"]["tiedparam"])


@pytest.mark.parametrize("which", LAWS)
def test_a_model_comes_back(which, tmp_path):
    rule, options = LAWS[which]
    tied = model(which)
    tp.register_tie(tied[0], rule, **options)
    tp.save(tied, tmp_path / "tied.safetensors")
    loaded = tp.load(tmp_path / "tied.safetensors", model(which))
    assert str(tp.get_tie(loaded[0])) == str(tp.get_tie(tied[0]))
    assert torch.equal(loaded[0].weight, tied[0].weight)
    again = tmp_path / "again.safetensors"
    tp.save(loaded, again)
    assert again.read_bytes() == (tmp_path / "tied.safetensors").read_bytes()
    stored = SafetensorsFile(tmp_path / "tied.safetensors")
    assert sum(stored[key].numel() for key in stored) < tied[0].weight.numel() + 8


def test_names_and_options_are_all_that_is_held(tmp_path):
    tied = model("parts")
    tp.register_tie(tied[0], LAWS["parts"][0])
    tp.save(tied, tmp_path / "tied.safetensors")
    (tie,) = header_of(tmp_path / "tied.safetensors")["ties"]
    assert (tie["rule"], tie["options"]) == ("joint", {"laws": [
        ["within", {"inner": "flip_sym", "rows": [0, 4]}],
        ["within", {"inner": ["repeat", {"outputs": 2}], "rows": [4, 8]}],
    ]})  # fmt: skip


def test_what_exports_hold_is_dense(tmp_path):
    tied = model("parts")
    tp.register_tie(tied[0], LAWS["parts"][0])
    tp.export_dense(tied, tmp_path / "dense.safetensors")
    dense = SafetensorsFile(tmp_path / "dense.safetensors")
    assert torch.equal(dense["0.weight"], tied[0].weight)
    other = tp.register_tie(nn.Linear(4, 8), LAWS["parts"][0])
    state = {key.removeprefix("0."): dense[key] for key in dense}
    other.load_state_dict(state)
    assert torch.equal(other.weight, tied[0].weight)


def test_another_law_of_the_same_size_is_told(tmp_path):
    tied = model("together")
    tp.register_tie(tied[0], ["flip_sym", REPEAT])
    tp.save(tied, tmp_path / "tied.safetensors")
    other = model("together")
    tp.register_tie(other[0], [REPEAT, "flip_sym"])
    with pytest.raises(tp.TieError, match="joint"):
        tp.load(tmp_path / "tied.safetensors", other)
    with pytest.raises(RuntimeError, match="joint"):
        other.load_state_dict(tied.state_dict())


def test_a_part_without_a_name_cannot_be_saved(tmp_path):
    class Mirrored(Orbits):
        law = "W[o, c] = W[o, n − 1 − c]"

        def symmetries(self, weight):
            yield weight.flip(-1)

    tied = model("together")
    tp.register_tie(tied[0], ["flip_sym", Mirrored])
    with pytest.raises(tp.TieError, match="class Mirrored|no registered name"):
        tp.save(tied, tmp_path / "tied.safetensors")
    assert not list(tmp_path.iterdir())


class Alike(Orbits):
    """The weight is what a function makes of it."""

    law = "W = fn(W)"
    functions = ("fn",)

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def symmetries(self, weight):
        yield self.fn(weight)


def test_functions_of_laws_are_held_by_name(tmp_path, registry):
    tp.register_rule("alike")(Alike)
    tied = model("together")
    tp.register_tie(tied[0], [(Alike, {"fn": torch.t}), REPEAT])
    tp.save(tied, tmp_path / "tied.safetensors")
    (tie,) = header_of(tmp_path / "tied.safetensors")["ties"]
    assert tie["options"]["laws"][0] == ["alike", {"fn": "torch.t"}]
    loaded = tp.load(tmp_path / "tied.safetensors", model("together"))
    assert torch.equal(loaded[0].weight, loaded[0].weight.t())
    assert torch.equal(loaded[0].weight, tied[0].weight)


@pytest.mark.parametrize(
    "laws",
    [
        3, "flip_sym", [], ["flip_sym"], ["flip_sym", 3], ["flip_sym", ["flip_sym", {"no": 1}]],
        ["flip_sym", "unknown"], ["flip_sym", {"rule": "flip_sym"}], [["flip_sym"], None],
    ],
)  # fmt: skip
def test_a_damaged_header_is_told(laws, tmp_path):
    path = tmp_path / "tied.safetensors"
    tied = model("together")
    tp.register_tie(tied[0], ["flip_sym", REPEAT])
    tp.save(tied, path)
    wanted = json.dumps({"laws": ["flip_sym", ["repeat", {"outputs": 2}]]}, separators=(",", ":"))
    raw, given = path.read_bytes(), json.dumps({"laws": laws}, separators=(",", ":"))
    size = int.from_bytes(raw[:8], "little")
    quoted = [json.dumps(text)[1:-1] for text in (wanted, given)]
    text = raw[8 : 8 + size].decode()
    assert quoted[0] in text
    header = text.replace(*quoted).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    with pytest.raises(tp.TieError):
        tp.load(path, model("together"))
