"""Where laws that repeat a base are computed by the smaller layer that is left, at its edges."""

from __future__ import annotations

import pytest
from torch import nn

import tiedparam as tp
from tests.support import computing_of


def forms_in_order(layer, rows, training=False):
    order = computing_of(layer).order(tp.get_tie(layer), rows, training, False)
    return [form.name for form in order]


@pytest.mark.parametrize(
    ("layer", "options", "rows", "few_rows"),
    [
        (nn.Linear(27, 19), {"over": "in"}, 1, None),  # 513 entries
        (nn.Linear(64, 65), {"over": "all"}, 1, None),
        (nn.Conv2d(8, 8, 4), {"over": "in"}, 512, 256),
        (nn.Conv2d(8, 8, 4), {"over": "all"}, 512, 256),
        (nn.ConvTranspose2d(8, 8, 4), {"over": "in"}, 2048, 1024),
    ],
)
def test_the_smaller_layer_computes_where_its_calls_pay(layer, options, rows, few_rows):
    tp.register_tie(layer, "channel_shared", init="rescale", **options)
    assert "reduced" in forms_in_order(layer, rows)
    if few_rows is not None:
        assert "reduced" not in forms_in_order(layer, few_rows)
    assert "reduced" in forms_in_order(layer, None)


def test_trained_convolutions_pay_sooner_and_those_of_volumes_at_once():
    layer = tp.register_tie(nn.Conv2d(8, 8, 4), "channel_shared", init="rescale")
    assert "reduced" in forms_in_order(layer, 32, training=True)
    assert "reduced" not in forms_in_order(layer, 16, training=True)
    volume = tp.register_tie(nn.Conv3d(4, 4, 3), "channel_shared", init="rescale")
    assert "reduced" in forms_in_order(volume, 1)


@pytest.mark.parametrize(
    ("layer", "options"),
    [(nn.Linear(16, 32), {"over": "in"}), (nn.Linear(64, 64), {"over": "all"})],
)
def test_a_small_matrix_is_looked_up_however_many_rows_it_multiplies(layer, options):
    tp.register_tie(layer, "channel_shared", init="rescale", **options)
    for training in (False, True):
        assert not forms_in_order(layer, 1, training)
        assert not forms_in_order(layer, 1 << 20, training)
    assert "reduced" in forms_in_order(layer, None)  # graphs call nothing


def test_windows_are_asked_for_where_the_smaller_layer_does_not_pay():
    layer = tp.register_tie(nn.Conv2d(4, 4, 1), "channel_shared", init="rescale")
    assert forms_in_order(layer, 4096) == ["windows"]
