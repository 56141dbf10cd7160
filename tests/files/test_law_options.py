"""How laws of users stand in files: such as read several layers, or have values of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiedparam as tp
from tiedparam.files import header
from tiedparam.files.stored_tie import StoredTie
from tiedparam.formats.safetensors import SafetensorsFile
from tiedparam.laws import Linked


class Sum(Linked):
    law = "W = A.W + B.W"

    def forward(self, *sources):
        return sources[0] + sources[1]


class Offset(Linked):
    """A source's tensor, times a number, and a row of its own."""

    law = "W = factor · A.W + w"

    def __init__(self, source, source_name=None, factor=1.0):
        super().__init__(source, source_name)
        self.factor = factor

    def options(self):
        return {"factor": self.factor}

    def free_shapes(self):
        return ((1, self.bound_layout.shape[1]),)

    def forward(self, *tensors):
        source, row = tensors
        return self.factor * source + row

    def fit(self, weight, *sources):
        return ((weight - self.factor * sources[0]).mean(0, keepdim=True),)


class Forgetful(Offset):
    """Like `Offset`, and does not say its factor."""

    def __init__(self, source, source_name=None, **options):
        super().__init__(source, source_name, **options)

    def options(self):
        return {}


@pytest.fixture(autouse=True)
def laws(registry):
    for name, law in {"sum": Sum, "offset": Offset, "forgetful": Forgetful}.items():
        tp.register_rule(name)(law)


def dense() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))


def loaded_from(model: nn.Module, path, fresh: nn.Module) -> nn.Module:
    tp.save(model, path)
    tp.load(path, fresh)
    now, then = tp.dense_state_dict(fresh), tp.dense_state_dict(model)
    assert all(torch.equal(now[key], then[key]) for key in then)
    return fresh


def test_a_law_that_reads_two_layers(tmp_path):
    model = dense()
    tp.register_tie(model[3], "sum", source=[model[0], model[1]], root=model)
    fresh = loaded_from(model, tmp_path / "file", dense())
    assert list(tp.get_tie(fresh[3]).sources()) == [(fresh[0], "weight"), (fresh[1], "weight")]
    (tie,) = header.read(SafetensorsFile(tmp_path / "file").metadata).ties
    assert tie.options == {"source": ["0", "1"], "source_name": ["weight", "weight"]}


def test_a_list_of_one_layer_stays_a_list(tmp_path):
    model = dense()
    tp.register_tie(model[1], "offset", source=[model[0]], root=model)
    fresh = loaded_from(model, tmp_path / "file", dense())
    assert tp.get_tie(fresh[1]).source == (fresh[0],)


def test_a_law_with_a_source_and_values_of_its_own(tmp_path):
    model = dense()
    tp.register_tie(model[1], "offset", source=model[0], root=model, factor=2.0)
    fresh = loaded_from(model, tmp_path / "file", dense())
    assert tp.get_tie(fresh[1]).factor == 2.0
    loaded_from(model, tmp_path / "file", fresh)  # which is tied already


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64])
def test_values_of_other_dtypes(dtype, tmp_path):
    model = dense().to(dtype)
    tp.register_tie(model[1], "offset", source=model[0], root=model)
    loaded_from(model, tmp_path / "file", dense().to(dtype))


def test_an_option_that_is_not_said_is_noticed(tmp_path):
    model = dense()
    tp.register_tie(model[1], "forgetful", source=model[0], root=model, factor=2.0)
    with pytest.raises(tp.TieError, match=r"options\(\) does not return everything"):
        tp.save(model, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_model_that_reads_other_layers_is_refused(tmp_path):
    model, other = dense(), dense()
    tp.register_tie(model[3], "sum", source=[model[0], model[1]], root=model)
    tp.register_tie(other[3], "sum", source=[other[1], other[0]], root=other)
    tp.save(model, tmp_path / "file")
    with pytest.raises(tp.TieError, match="it reads '0.weight' and '1.weight' there and another"):
        tp.load(tmp_path / "file", other)


@pytest.mark.parametrize(
    "sources",
    [
        {"source": ["0", 1], "source_name": ["weight", "weight"]},
        {"source": ["0", "1"], "source_name": "weight"},
        {"source": ["0", "1"], "source_name": ["weight"]},
        {"source": [], "source_name": []},
        {"source": "0"},
    ],
)
def test_sources_that_are_malformed_are_refused(sources):
    tie = StoredTie("3", "weight", "sum", sources, [3, 3], 1, False, False, None)
    with pytest.raises(tp.TieError, match="rule 'sum': its source is not named"):
        tie.make({}, {})


def test_a_chain_of_laws_that_read_two_layers_may_be_long_but_not_too_long():
    def chained(length):
        names = [f"{number}.weight" for number in range(length)]
        ties = [
            {
                "layer": str(number), "tensor": "weight", "rule": "sum", "shape": [3, 3],
                "options": {"source": [str(number + 1), str(number + 2)],
                            "source_name": ["weight", "weight"]},
                "groups": 1, "transposed": False, "stacked": False, "residual": None,
            }
            for number in range(len(names))
        ]  # fmt: skip
        said = header.Header([StoredTie.read(tie) for tie in ties], {}, {})
        return header.read({"tiedparam": said.to_json(), "tiedparam.crc32": "0"})

    assert len(chained(200).ties) == 200
    with pytest.raises(tp.TieError, match="malformed"):
        chained(201)
