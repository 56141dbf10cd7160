"""The shell's words for laws together, ``a+b``, and for a part, ``rows=0:64``."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.shell import good, usage


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A checkpoint: a layer whose first block is symmetric, and a square one."""
    monkeypatch.chdir(tmp_path)
    torch.save(network().state_dict(), "model.pt")
    return tmp_path


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.Linear(24, 24))
    with torch.no_grad():
        model[0].weight[:24] += model[0].weight[:24].clone().t()
    return model


def test_tie_takes_parts_and_laws_together(files, capsys):
    ties = ["--tie", "0=flip_sym:rows=0:24", "--tie", "1=flip_sym+repeat:outputs=2,init=project"]
    shown = good(capsys, "tie", "model.pt", *ties, "-o", "tied.safetensors")
    assert "within(inner='flip_sym', rows=[0, 24])" in shown
    model = network()
    tp.tie_model(model, {"0": ("flip_sym", {"rows": slice(0, 24)}),
                         "1": ["flip_sym", ("repeat", {"outputs": 2})]})  # fmt: skip
    loaded = tp.load("tied.safetensors", network())
    for one, other in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert "joint(laws=" in good(capsys, "report", "tied.safetensors")
    good(capsys, "untie", "tied.safetensors", "-o", "dense.safetensors")


def test_ranges_may_be_open(files, capsys):
    shown = good(capsys, "tie", "model.pt", "--tie", "0=flip_sym:rows=-24:", "--dry-run")
    assert "rows=[24, 48]" in shown
    shown = good(
        capsys, "tie", "model.pt", "--tie", "0=row_repeat:rows=:9,columns=4:6", "--dry-run"
    )
    assert "rows=[0, 9], columns=[4, 6]" in shown


def test_scan_spells_out_what_it_found(files, capsys):
    rules = ["--rule", "flip_sym:rows=-48:-24", "--rule", "flip_sym+row_repeat:groups=2"]
    shown = good(capsys, "scan", "model.pt", *rules, "--plan", "plan.toml")
    assert "1 of 2 tensors looks tied: 0.weight" in shown
    assert (files / "plan.toml").read_text() == (
        '[[tie]]\nlayers = "0"\nrule = "flip_sym"\noptions = { rows = [0, 24] }\n'
    )
    shown = good(capsys, "scan", "model.pt", *rules)
    assert "tie model.pt --tie 0=flip_sym:rows=0:24 -o model-tied.safetensors" in shown
    good(capsys, "tie", "model.pt", "--tie", "0=flip_sym:rows=0:24", "-o", "tied.safetensors")


def test_scan_spells_out_laws_together(files, capsys):
    model = network()
    with torch.no_grad():
        half = model[1].weight[::2, ::2].clone()
        half += half.clone().t()
        model[1].weight.copy_(half.repeat_interleave(2, 0).repeat_interleave(2, 1))
    torch.save(model.state_dict(), "model.pt")
    shown = good(capsys, "scan", "model.pt", "--rule", "flip_sym+repeat:outputs=2")
    assert "--tie 1=flip_sym+repeat:outputs=2 -o" in shown
    shown = good(capsys, "tie", "model.pt", "--tie", "1=flip_sym+repeat:outputs=2", "--dry-run")
    assert "joint(laws=['flip_sym', ('repeat', {'outputs': 2})])" in shown


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("0=flip_sym:rows=4", "rows must be a list of two numbers, not 4"),
        ("0=flip_sym:rows=a:b", "rows must be a list of two numbers, not 'a:b'"),
        ("0=flip_sym+", "there is no rule ''"),
        ("0=flip_sym+rpeat:outputs=2", "no rule 'rpeat'"),
        ("0=flip_sym+repeat:output=2", "the key 'output' is unknown"),
    ],
)
def test_wrong_words_are_told(option, said, files, capsys):
    assert said in usage(capsys, "tie", "model.pt", "--tie", option, "-o", "tied.safetensors")


def test_a_rule_without_such_an_option_is_told(files, capsys):
    said = usage(capsys, "scan", "model.pt", "--rule", "flip_sym+row_repeat:group=2")
    assert "'row_repeat' has no option 'group'" in said
