"""Files of layout version 2, as an earlier version wrote them, load to the bit.

In ``layout_2`` there are, for each case, a file by `save` and one by `export_dense` of the same
model. They are never written again: a change that needs that needs another layout version.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support import ROOT
from tiedparam.files.header import LAYOUT_VERSION

FOLDER = Path(__file__).parent / "layout_2"

CASES = {
    "channel_shared-all": lambda: [nn.Conv2d(2, 3, 2)],
    "channel_shared-groups": lambda: [nn.Conv1d(4, 6, 2, groups=2)],
    "channel_shared-in": lambda: [nn.Conv2d(2, 3, 2)],
    "channel_shared-out": lambda: [nn.ConvTranspose1d(4, 6, 2, groups=2)],
    "copy": lambda: [nn.Linear(3, 3), nn.Linear(3, 3)],
    "copy-transposed": lambda: [nn.Linear(3, 2), nn.Linear(2, 3)],
    "flip_sym": lambda: [nn.Conv2d(4, 4, (2, 3), groups=2)],
    "repeat-bias": lambda: [nn.Linear(2, 4)],
    "repeat-block": lambda: [nn.Linear(3, 6)],
    "repeat-tile": lambda: [nn.Conv1d(2, 4, 2, groups=2)],
    "row_repeat": lambda: [nn.Linear(3, 6)],
    "squared_copy": lambda: [nn.Linear(3, 2), nn.Linear(3, 2)],
}


def loaded(case: str) -> nn.Module:
    torch.manual_seed(99)
    return tp.load(FOLDER / f"{case}.safetensors", nn.Sequential(*CASES[case]()))


def dense(case: str) -> dict[str, torch.Tensor]:
    return tp.dense_state_dict(
        tp.load(FOLDER / f"{case}.dense.safetensors", nn.Sequential(*CASES[case]()))
    )


@pytest.mark.parametrize("case", CASES)
def test_an_older_file_gives_the_dense_values_that_it_gave_then(case):
    model = loaded(case)
    (rule,) = [tp.get_tie(layer, name) for layer in model for name in ("weight", "bias")
               if tp.is_tied(layer, name)]  # fmt: skip
    assert rule.name == case.partition("-")[0]
    now, then = tp.dense_state_dict(model), dense(case)
    assert now.keys() == then.keys()
    for key, value in then.items():
        assert torch.equal(now[key], value), key


@pytest.mark.parametrize("case", CASES)
def test_the_same_bytes_are_written_today(case, tmp_path):
    model = loaded(case)
    tp.save(model, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (FOLDER / f"{case}.safetensors").read_bytes()
    tp.export_dense(model, tmp_path / "dense")
    before = (FOLDER / f"{case}.dense.safetensors").read_bytes()
    assert (tmp_path / "dense").read_bytes() == before


def test_every_file_has_its_case():
    names = {path.name.removesuffix(".safetensors") for path in FOLDER.iterdir()}
    assert names == {name for case in CASES for name in (case, f"{case}.dense")}


def test_the_changelog_has_every_layout_and_the_last_one_is_written():
    page = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    layouts = re.findall(r"^\| (\d+) \| .* \|$", page, re.MULTILINE)
    assert list(map(int, layouts)) == list(range(1, LAYOUT_VERSION + 1))
