"""Ties in a LightningModule: trained, saved, loaded, resumed, and handed on as dense weights."""

import copy
import logging
import tempfile
import warnings

import lightning
import torch
from torch import nn

import tiedparam as tp

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
folder = tempfile.mkdtemp()  # in your project: where your checkpoints lie
inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
data = torch.utils.data.TensorDataset(inputs, inputs.sin())
loader = torch.utils.data.DataLoader(data, batch_size=16)


class Coder(lightning.LightningModule):
    """The middle layer is symmetric, and the last one is the transpose of the first."""

    def __init__(self, width=4, lr=0.05):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential()
        self.net.enc, self.net.mid = nn.Linear(8, width), nn.Linear(width, width)
        self.net.dec = nn.Linear(width, 8)
        # after the layers, before any optimizer
        plan = {"mid": "symmetric", "dec": ("copy", {"source": "enc", "fn": torch.t})}
        tp.tie_model(self.net, plan, init="rescale")

    def training_step(self, batch, index):
        """The loss, as without ties."""
        x, wanted = batch
        loss = (self.net(x) - wanted).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        """Called after ``__init__``, so it sees the free values."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def trainer(epochs, **options):
    """A quiet one, on one CPU."""
    for category in (FutureWarning, DeprecationWarning):  # of lightning's own code
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", "Checkpoint directory .* is not empty")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder} | quiet | options
    return lightning.Trainer(max_epochs=epochs, **options)


def same(one, other):
    """Whether two modules hold the same values."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


torch.manual_seed(0)
model = Coder()
first = copy.deepcopy(model.state_dict())
run = trainer(epochs=4)
run.fit(model, loader)
enc, mid, dec = (layer.weight for layer in model.net)
print("the laws hold:", torch.equal(mid, mid.t()), torch.equal(dec, enc.t()))

# ModelCheckpoint, which a Trainer has by itself, wrote the free values
path = run.checkpoint_callback.best_model_path
print([name for name in torch.load(path, weights_only=True)["state_dict"] if "bias" not in name])
print("loaded:", same(Coder.load_from_checkpoint(path), model))

# a run that goes on is the run that was never interrupted
resumed, whole = Coder(), Coder()
whole.load_state_dict(first)
trainer(epochs=6).fit(resumed, loader, ckpt_path=path)
trainer(epochs=6).fit(whole, loader)
print("resumed:", same(resumed, whole))

# for people who do not have tiedparam
print(list(tp.dense_state_dict(model)))
