"""Files of laws whose pattern is data, in the shell."""

from __future__ import annotations

import safetensors.torch
import torch
from torch import nn

import tiedparam as tp
from tests.support import shell
from tiedparam.cli import model_from_file
from tiedparam.cli.model_from_file import StoredCheckpoint, files_header


def test_a_file_is_reported_scanned_and_untied(tmp_path, capsys):
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))
    tp.register_tie(net[0], "masked", mask=torch.arange(24).view(4, 6) % 3 == 0)
    tp.register_tie(net[1], "index", index=torch.arange(24).view(6, 4) % 5)
    path, dense = tmp_path / "net.safetensors", tmp_path / "dense.safetensors"
    tp.save(net, path)
    said = shell.good(capsys, "report", path)
    assert tp.get_tie(net[0]).checksum in said
    assert tp.get_tie(net[1]).checksum in said
    shell.good(capsys, "untie", path, "-o", dense)
    found = safetensors.torch.load_file(dense)
    assert torch.equal(found["0.weight"], net[0].weight)
    assert torch.equal(found["1.weight"], net[1].weight)
    assert len(found) == 4
    shell.good(capsys, "scan", path)


def test_the_data_is_nobodys_tensor(tmp_path):
    layer = tp.register_tie(nn.Linear(6, 4), "masked", mask=torch.arange(24).view(4, 6) % 3 == 0)
    tp.save(layer, tmp_path / "layer.safetensors")
    stored = StoredCheckpoint(tmp_path / "layer.safetensors")
    tensors, _, _ = model_from_file._dense_form(stored, files_header.read(stored.metadata))
    assert tensors.keys() == nn.Linear(6, 4).state_dict().keys()
    model = model_from_file.open_model(tmp_path / "layer.safetensors")
    assert model.state_dict().keys() == layer.state_dict().keys()
