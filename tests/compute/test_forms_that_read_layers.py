"""Forms of laws that read other layers: without the weight, and each source read once."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import tiedparam as tp
from tiedparam.tie.lookup import tie_of


@pytest.mark.parametrize("per", ["tensor", "output", "input"])
def test_few_rows_are_computed_without_the_weight(per):
    source, layer = nn.Linear(2048, 2048), nn.Linear(2048, 2048)
    tp.register_tie(layer, "scaled_copy", source=source, per=per)
    computing = tie_of(layer).computing
    computing.seen = []
    x = torch.randn(2, 2048)
    with torch.no_grad():
        found = layer(x)
    assert computing.seen == ["scaled"]
    torch.testing.assert_close(found, nn.functional.linear(x, layer.weight, layer.bias))


def test_the_form_reads_a_tied_source_once(monkeypatch):
    source = tp.register_tie(nn.Linear(6, 6), "circulant")
    layer = tp.register_tie(nn.Linear(6, 6), "scaled_copy", source=source, compute="scaled")
    expand, calls = tp.rules.Circulant.forward, itertools.count()

    def counted(self, *free):
        next(calls)
        return expand(self, *free)

    monkeypatch.setattr(tp.rules.Circulant, "forward", counted)
    layer(torch.randn(2, 6)).sum().backward()
    assert next(calls) == 1


def test_a_form_says_of_a_resized_source_what_the_dense_layer_says():
    source = nn.Linear(6, 6)
    layer = tp.register_tie(nn.Linear(6, 6), "scaled_copy", source=source, compute="scaled")
    source.weight = nn.Parameter(torch.randn(7, 6))
    with pytest.raises(tp.TieError, match=r"is \(7, 6\) now"):
        layer(torch.randn(2, 6))


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("unbatched", [False, True])
def test_the_sum_is_not_formed(unbatched, padding_mode, monkeypatch):
    options = {"padding": 1, "groups": 2, "stride": 2, "padding_mode": padding_mode}
    source, layer = (nn.Conv2d(4, 6, 3, **options).double() for _ in range(2))
    tp.register_tie(layer, "shared_delta", source=source, rank=1, compute="delta")
    twin = nn.Conv2d(4, 6, 3, **options).double()
    twin.load_state_dict(tp.dense_state_dict(nn.ModuleList([source, layer])), strict=False)
    with torch.no_grad():
        twin.weight.copy_(layer.weight)
        twin.bias.copy_(layer.bias)
    x = torch.randn(*() if unbatched else (2,), 4, 7, 7, dtype=torch.float64)
    expected = twin(x)

    def never(*tensors):
        raise AssertionError("the sum was formed")

    monkeypatch.setattr("tiedparam.rules.shared_delta.plus_product", never)
    torch.testing.assert_close(layer(x), expected)


def test_few_rows_are_computed_without_the_sum_and_many_with_it():
    source, layer = nn.Linear(1024, 1024), nn.Linear(1024, 1024)
    law = tp.rules.SharedDelta(source, rank=2)
    law.fit = lambda weight, source: (torch.zeros(1024, 2), torch.zeros(2, 1024))
    tp.register_tie(layer, law)
    computing = tie_of(layer).computing
    computing.seen = []
    with torch.no_grad():
        layer(torch.randn(2, 1024))
        layer(torch.randn(4096, 1024))
    assert computing.seen == ["delta"]


def test_forms_compile_whole():
    torch._dynamo.reset()
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(3)))
    tp.register_tie(model[1], "shared_delta", source=model[0], rank=2, compute="delta")
    tp.register_tie(model[2], "scaled_copy", source=model[1], per="input", compute="scaled")
    x = torch.randn(3, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
