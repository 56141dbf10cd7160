"""Files of every layout version, as the version of its time wrote them, load to the bit.

In each folder ``layout_*`` there are, for each case, a file by `save` and one by `export_dense` of
the same model. They are never written again: a change that needs that needs another layout version.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import tiedparam as tp
from tests.support import ROOT
from tiedparam.files.header import LAYOUT_VERSION

FOLDER = Path(__file__).parent
NOW = f"layout_{LAYOUT_VERSION}"

CASES = {
    "channel_shared-all": lambda: [nn.Conv2d(2, 3, 2)],
    "channel_shared-groups": lambda: [nn.Conv1d(4, 6, 2, groups=2)],
    "channel_shared-in": lambda: [nn.Conv2d(2, 3, 2)],
    "channel_shared-out": lambda: [nn.ConvTranspose1d(4, 6, 2, groups=2)],
    "copy": lambda: [nn.Linear(3, 3), nn.Linear(3, 3)],
    "copy-transposed": lambda: [nn.Linear(3, 2), nn.Linear(2, 3)],
    "flip_sym": lambda: [nn.Conv2d(4, 4, (2, 3), groups=2)],
    "flip_sym-depthwise": lambda: [nn.Conv1d(3, 3, 5, groups=3)],
    "flip_sym-even": lambda: [nn.Conv1d(5, 5, 2)],
    "flip_sym-matrix": lambda: [nn.Linear(5, 5)],
    "flip_sym-odd": lambda: [nn.Conv2d(4, 4, 3)],
    "flip_sym-skew": lambda: [nn.Conv1d(3, 3, 3)],
    "flip_sym-transposed": lambda: [nn.ConvTranspose1d(6, 6, 3, groups=2)],
    "repeat-bias": lambda: [nn.Linear(2, 4)],
    "repeat-block": lambda: [nn.Linear(3, 6)],
    "repeat-tile": lambda: [nn.Conv1d(2, 4, 2, groups=2)],
    "row_repeat": lambda: [nn.Linear(3, 6)],
    "squared_copy": lambda: [nn.Linear(3, 2), nn.Linear(3, 2)],
}


FILES = [
    (path.parent.name, path.name.removesuffix(".safetensors"))
    for path in sorted(FOLDER.glob("layout_*/*.safetensors"))
    if not path.name.endswith(".dense.safetensors")
]


def model_of(case: str) -> nn.Module:
    torch.manual_seed(99)
    return nn.Sequential(*CASES[case]())


def loaded(layout: str, case: str) -> nn.Module:
    return tp.load(FOLDER / layout / f"{case}.safetensors", model_of(case))


def dense(layout: str, case: str) -> dict[str, torch.Tensor]:
    path = FOLDER / layout / f"{case}.dense.safetensors"
    return tp.dense_state_dict(tp.load(path, model_of(case)))


def assert_equal(now: dict[str, torch.Tensor], then: dict[str, torch.Tensor]) -> None:
    assert now.keys() == then.keys()
    for key, value in then.items():
        assert torch.equal(now[key], value), key


@pytest.mark.parametrize(("layout", "case"), FILES)
def test_an_older_file_gives_the_dense_values_that_it_gave_then(layout, case):
    model = loaded(layout, case)
    (rule,) = [tp.get_tie(layer, name) for layer in model for name in ("weight", "bias")
               if tp.is_tied(layer, name)]  # fmt: skip
    assert rule.name == case.partition("-")[0]
    assert_equal(tp.dense_state_dict(model), dense(layout, case))
    assert_equal(tp.dense_state_dict(tp.load(FOLDER / layout / f"{case}.safetensors", model)),
                 dense(layout, case))  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_same_bytes_are_written_today(case, tmp_path):
    model = loaded(NOW, case)
    tp.save(model, tmp_path / "again")
    before = (FOLDER / NOW / f"{case}.safetensors").read_bytes()
    assert (tmp_path / "again").read_bytes() == before
    tp.export_dense(model, tmp_path / "dense")
    before = (FOLDER / NOW / f"{case}.dense.safetensors").read_bytes()
    assert (tmp_path / "dense").read_bytes() == before


@pytest.mark.parametrize("case", [case for layout, case in FILES if layout == "layout_1"])
def test_free_values_of_a_file_are_told_without_its_header(case, tmp_path):
    """By their shape: a state dict says of no layout."""
    for layout in ("layout_1", "layout_2"):
        model = loaded(NOW, case)
        with (FOLDER / layout / f"{case}.safetensors").open("rb") as file:
            entries = safetensors.torch.load(file.read())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model.load_state_dict(entries)
        assert_equal(tp.dense_state_dict(model), dense(layout, case))
        assert_equal(tp.untie_state_dict(model, entries), dense(layout, case))
        (again,) = [tp.tie_state_dict(model, entries)]
        assert_equal(again, model.state_dict())


def test_every_layout_has_every_case():
    for layout, known in (("layout_2", set(CASES)), (NOW, set(CASES))):
        names = {path.name.removesuffix(".safetensors") for path in (FOLDER / layout).iterdir()}
        assert names == {name for case in known for name in (case, f"{case}.dense")}


def test_the_changelog_has_every_layout_and_the_last_one_is_written():
    page = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    layouts = re.findall(r"^\| (\d+) \| .* \|$", page, re.MULTILINE)
    assert list(map(int, layouts)) == list(range(1, LAYOUT_VERSION + 1))
