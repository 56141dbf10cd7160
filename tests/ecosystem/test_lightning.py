"""Lightning: its Trainer fits, saves and resumes a tied model."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import tiedparam as tp

lightning = pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Tied(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
        tp.register_tie(self.net[0], "flip_sym", root=self.net)
        tp.register_tie(self.net[2], "copy", source=self.net[0], root=self.net)
        tp.register_tie(self.net[3], "row_repeat", root=self.net)

    def training_step(self, batch, index):
        inputs, target = batch
        return (self.net(inputs) - target).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def loader():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(32, 4, generator=generator)
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, inputs[:, :2].sin()), batch_size=8
    )


def trainer(path, epochs: int):
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, default_root_dir=path,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip


@pytest.mark.feature(
    "Libraries",
    "Lightning: `Trainer.fit`, checkpoint and resume equal an uninterrupted run",
    needs="lightning",
)
def test_resumed_training_equals_an_uninterrupted_run(tmp_path):
    whole = Tied()
    before = whole.net[0].weight.clone()
    trainer(tmp_path, 2).fit(whole, loader())
    assert not torch.equal(whole.net[0].weight, before)

    first = Tied()
    run = trainer(tmp_path, 1)
    run.fit(first, loader())
    run.save_checkpoint(tmp_path / "epoch.ckpt")
    assert not torch.equal(first.net[0].weight, whole.net[0].weight)
    resumed = Tied()
    trainer(tmp_path, 2).fit(resumed, loader(), ckpt_path=tmp_path / "epoch.ckpt")

    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    weight = resumed.net[0].weight
    assert torch.equal(weight, weight.t())
    assert torch.equal(resumed.net[2].weight, weight)
    loaded = Tied.load_from_checkpoint(tmp_path / "epoch.ckpt")
    assert torch.equal(loaded.net[0].weight, first.net[0].weight)
