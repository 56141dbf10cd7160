"""Weights that laws cannot be fitted to: infinite, not a number, or without any entry."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.unchanged import everything

FITTED = [("shared_delta", {"rank": 1}), ("scaled_copy", {})]


def joined_bank() -> tuple[nn.Module, nn.Module]:
    """A layer that holds templates, and one that may join."""
    first = tp.tie_bank([nn.Linear(4, 4), nn.Linear(4, 4)], templates=1)[0]
    return first, nn.Linear(4, 4)


@pytest.mark.parametrize("number", [torch.inf, torch.nan])
@pytest.mark.parametrize(("law", "options"), [*FITTED, ("bank", {"templates": 1})])
def test_one_number_that_is_not_finite_is_not_spread(law, options, number):
    source, layer = joined_bank() if law == "bank" else (nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        layer.weight[1, 2] = number
    before = repr(everything(layer))
    for act in (tp.register_tie, tp.residual):
        with pytest.raises(tp.TieError, match=r"not all of its entries are .* load them first"):
            act(layer, law, source=source, **options)
    assert repr(everything(layer)) == before


@pytest.mark.parametrize(("law", "options"), FITTED)
def test_a_source_that_is_not_finite_is_named(law, options):
    source, layer = nn.Linear(4, 4), nn.Linear(4, 4)
    nn.init.constant_(source.weight, torch.nan)
    with pytest.raises(tp.TieError, match="not all of the source's entries are finite"):
        tp.register_tie(layer, law, source=source, **options)


def test_values_that_a_file_brings_need_no_finite_weight_before(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tp.tie_model(model, {"1": ("shared_delta", {"source": "0", "rank": 1})})
    tp.save(model, tmp_path / "tied.safetensors")
    blank = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for parameter in blank.parameters():
        nn.init.constant_(parameter, torch.nan)
    loaded = tp.load(tmp_path / "tied.safetensors", blank)
    assert torch.equal(loaded[1].weight, model[1].weight)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(("law", "options"), [("copy", {}), ("shared_delta", {"rank": 0})])
def test_a_tensor_without_entries_has_nothing_to_tie(law, options):
    source, layer = nn.Linear(0, 3), nn.Linear(0, 3)
    with pytest.raises(tp.TieError, match=r"\(3, 0\) is empty"):
        tp.register_tie(layer, law, source=source, **options)
