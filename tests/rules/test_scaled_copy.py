"""scaled_copy: factors by least squares for each slice, against loops over the slices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.cases import assert_refused, canonical_entries
from tests.support.tensors import free_value

LAYERS = {
    "Linear": lambda: nn.Linear(4, 3),
    "Embedding": lambda: nn.Embedding(4, 3),
    "Conv2d": lambda: nn.Conv2d(4, 6, (3, 2), groups=2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=2),
}


def slice_of(layer: nn.Module, per: str, index: tuple[int, ...]) -> int:
    """By the channels alone: which factor an entry ``V[o, c, x]`` has."""
    output, inner = index[:2]
    if per == "tensor":
        return 0
    if per == "output":
        return output
    groups = getattr(layer, "groups", 1)
    if groups == 1:
        return inner
    return output // (layer.out_channels // groups) * (layer.in_channels // groups) + inner


@pytest.mark.parametrize("per", ["tensor", "output", "input"])
@pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
def test_each_slice_is_fitted_by_least_squares(build, per):
    source, layer = build().double(), build().double()
    theirs, ours = canonical_entries(source), canonical_entries(layer)
    slices: dict[int, list[tuple[float, float]]] = {}
    for index in theirs:
        pair = theirs[index], ours[index]
        slices.setdefault(slice_of(layer, per, index), []).append(pair)
    expected = [
        np.linalg.lstsq(np.array(pairs)[:, :1], np.array(pairs)[:, 1], rcond=None)[0][0]
        for _, pairs in sorted(slices.items())
    ]
    tp.register_tie(layer, "scaled_copy", source=source, per=per)
    factors = free_value(layer)
    torch.testing.assert_close(factors.detach(), torch.tensor(expected, dtype=torch.float64))
    made = canonical_entries(layer)
    for index, value in theirs.items():
        factor = factors[slice_of(layer, per, index)].item()
        assert made[index] == factor * value


def test_a_slice_of_zeros_has_the_factor_zero():
    source, layer = nn.Linear(3, 3), nn.Linear(3, 3)
    with torch.no_grad():
        source.weight[1] = 0
    tp.register_tie(layer, "scaled_copy", source=source, per="output")
    assert free_value(layer)[1] == 0
    assert layer.weight.isfinite().all()
    assert layer.weight[1].eq(0).all()


def test_a_bias_is_scaled():
    source, layer = nn.Linear(3, 4), nn.Linear(2, 4)
    tp.register_tie(layer, "scaled_copy", "bias", source=source)
    assert torch.equal(layer.bias, free_value(layer, "bias") * source.bias)
    assert_refused(
        nn.Linear(2, 4), "scaled_copy", "has no inputs", tensor_name="bias", source=source,
        per="input",
    )  # fmt: skip


def test_options_are_checked():
    source = nn.Linear(3, 3)
    assert_refused(nn.Linear(3, 3), "scaled_copy", "per='row'", source=source, per="row")
    assert_refused(nn.Linear(3, 3), "scaled_copy", "reads one layer", source=[source, source])
    assert_refused(
        nn.Linear(3, 4),
        "scaled_copy",
        "source's tensor is (3, 3), and the layer's (4, 3)",
        source=source,
    )
