#!/usr/bin/env bash
# From a dense checkpoint to a tied file and back, without the code of the model.
set -euo pipefail

# stands for your own checkpoint, in which training found a symmetry
python - <<'END'
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)
)
with torch.no_grad():
    kernel = model[0].weight
    kernel += kernel.transpose(0, 1).flip(2, 3) + 0.01 * torch.randn(8, 8, 3, 3)
torch.save(model.state_dict(), "trained.pt")
END

tiedparam scan trained.pt --rule flip_sym --plan plan.toml
tiedparam tie trained.pt --plan plan.toml -o tied.safetensors
tiedparam untie tied.safetensors -o dense.safetensors
