"""Fast expansions against the plain formula: look-ups, tiles, and their adjoint."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tiedparam as tp
from tiedparam.laws import look_up, pairs
from tiedparam.rules import flip_sym

LAYERS = [
    lambda: nn.Linear(9, 9),
    lambda: nn.Linear(10, 10),
    lambda: nn.Conv2d(7, 7, 3),
    lambda: nn.Conv1d(12, 12, 4, groups=2),
    lambda: nn.Conv2d(12, 12, (3, 5), groups=3),
    lambda: nn.ConvTranspose2d(8, 8, 3, groups=2),
    lambda: nn.Conv2d(5, 5, 3, groups=5),
    lambda: nn.Conv2d(11, 11, 1),
]


WAYS = {"no look-up": (0, 0, 384), "small tiles": (0, 6, 3), "look-up": (0, 10**6, 384)}
WAYS["take"] = (10**6, 10**6, 384)
KEPT = (pairs._places, pairs._members, pairs.shared_expansion)
"""By sizes, and the tiles are another in a test."""


@pytest.fixture(params=WAYS)
def bounds(request, monkeypatch):
    """Weights of this size are looked up; larger ones are cut into tiles of few channels."""
    small, entries, tile = WAYS[request.param]
    monkeypatch.setattr(look_up, "SMALL", small)
    monkeypatch.setattr(pairs, "TABLE_ENTRIES", entries)
    cut = lambda n: [(start, min(n, start + tile)) for start in range(0, n, tile)]  # noqa: E731
    monkeypatch.setattr(flip_sym, "tiles", cut)
    for kept in KEPT:
        kept.cache_clear()
    yield entries
    for kept in KEPT:
        kept.cache_clear()


def formula(rule, free):
    """The plain formula, recorded operation by operation."""
    expansion = rule._expansion
    return expansion.expand(free).reshape(expansion.shape)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("build", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_way_gives_the_same_bits(build, dtype, sign, bounds):
    layer = build().to(dtype)
    dense = layer.weight.detach().clone()
    rule = tp.get_tie(tp.register_tie(layer, "flip_sym", sign=sign))
    (mirrored,) = rule.symmetries(dense)
    weight = layer.weight.detach().clone()
    assert torch.equal(*rule.symmetries(weight), weight)
    mean = (dense.double() + mirrored.double()) / 2
    torch.testing.assert_close(weight, mean.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)
    free = layer.parametrizations.weight.original0
    assert torch.equal(formula(rule, free), weight)
    with torch.no_grad():
        assert torch.equal(rule(free), weight)
    assert torch.equal(rule.right_inverse(weight)[0], free)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("build", LAYERS)
def test_every_way_has_the_same_derivatives(build, sign, bounds):
    rule = tp.get_tie(tp.register_tie(build(), "flip_sym", sign=sign))
    (shape,) = rule.free_shapes()
    free = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(rule.bound_layout.shape, dtype=torch.float64)
    (found,) = torch.autograd.grad(rule(free), free, cotangent)
    (wanted,) = torch.autograd.grad(formula(rule, free), free, cotangent)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(rule, free, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(rule, free, fast_mode=True)
    # a cotangent that is expanded, and one that is not contiguous
    (summed,) = torch.autograd.grad(rule(free).sum(), free)
    counts = rule.multiplicities()[0]
    assert torch.equal(summed, counts if sign == 1 else 0 * counts)
    if cotangent.dim() == 4:
        last = cotangent.to(memory_format=torch.channels_last)
        assert torch.equal(*torch.autograd.grad(rule(free), free, last), found)


def test_signed_zeros_and_infinities_stay_where_they_are(bounds):
    layer = nn.Conv2d(5, 5, 3)
    tp.register_tie(layer, "flip_sym")
    free = layer.parametrizations.weight.original0
    with torch.no_grad():
        free.zero_().neg_()
        free[3, 2], free[-1, -1], free[0, 0] = torch.inf, torch.nan, -torch.inf
    weight = layer.weight.detach().clone()
    assert weight.isnan().sum() == 1  # the diagonal of the centre
    assert (weight == torch.inf).sum() == (weight == -torch.inf).sum() == 2
    zeros = weight[weight == 0]
    assert len(zeros) == weight.numel() - 5
    assert zeros.signbit().all()


def test_tables_belong_to_no_layer():
    layer = tp.register_tie(nn.Conv2d(24, 24, 3, bias=False), "flip_sym")
    layer(torch.randn(1, 24, 4, 4))
    tensors = [*layer.parameters(), *layer.buffers()]
    assert sum(t.numel() for t in tensors) == tp.get_tie(layer).free_count
    moved = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    moved.load_state_dict(layer.state_dict())
    assert torch.equal(moved.weight, layer.weight)
    other = tp.register_tie(nn.Conv2d(24, 24, 3), "flip_sym")
    made = pairs._places.cache_info().misses
    assert other.weight.shape == layer.weight.shape
    assert pairs._places.cache_info().misses == made  # one table for both
    assert pairs._places.cache_info().maxsize * 4 * pairs.TABLE_ENTRIES < 10e6


def test_a_table_that_was_made_in_inference_mode_serves_training():
    layer = tp.register_tie(nn.Linear(70, 70), "flip_sym")
    pairs._places.cache_clear()
    with torch.inference_mode():
        layer(torch.randn(1, 70))
    layer(torch.randn(1, 70)).sum().backward()
    assert layer.parametrizations.weight.original0.grad is not None


def test_traced_graphs_hold_no_table():
    layer = tp.register_tie(nn.Conv2d(8, 8, 3, bias=False), "flip_sym")
    program = torch.export.export(layer, (torch.randn(1, 8, 5, 5),))
    assert not program.constants
    assert sum(t.numel() for t in program.state_dict.values()) == tp.get_tie(layer).free_count


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("build", [lambda: nn.Conv2d(8, 8, 3), lambda: nn.Linear(400, 400)])
def test_backward_is_deterministic(build, sign):
    layer = tp.register_tie(build(), "flip_sym", sign=sign)
    rule, free = tp.get_tie(layer), layer.parametrizations.weight.original0
    cotangent = torch.randn_like(layer.weight)
    gradients = []
    for deterministic in (False, False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            gradients += torch.autograd.grad(rule(free), free, cotangent)
        finally:
            torch.use_deterministic_algorithms(False)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
