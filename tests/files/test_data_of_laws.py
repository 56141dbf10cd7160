"""Laws whose pattern is data, in files: what the header says, what the tensors must be."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from torch import nn

import tiedparam as tp
from tests.support.unchanged import everything
from tiedparam.files import header
from tiedparam.formats.safetensors import Entry, SafetensorsFile, write
from tiedparam.laws import Coded

MASK = torch.arange(24).view(4, 6) % 3 == 0
INDEX = torch.arange(24).view(6, 4) % 5
LAWS = {"first": ("masked", {"mask": MASK}), "last": ("index", {"index": INDEX})}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.last = nn.Linear(4, 6)
        self.twin = self.last


def tied(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = Net()
    for name, (rule, options) in LAWS.items():
        tp.register_tie(getattr(net, name), rule, root=net, **options)
    return net


def rewritten(path, new, change, say=lambda text: text) -> None:
    """The same file with other tensors, perhaps another header, and a checksum that is right."""
    file = SafetensorsFile(path)
    entries, said = {name: file[name].clone() for name in file}, file.metadata
    change(entries)
    places = [Entry(name, value.dtype, tuple(value.shape)) for name, value in entries.items()]
    with open(new, "wb") as out:
        write(
            out,
            places,
            lambda entry: entries[entry.name],
            {header.KEY: say(said[header.KEY])},
            checksum=True,
            advance=lambda _: None,
        )


def test_the_header_names_the_data_which_is_an_entry_of_the_file(tmp_path):
    net = tied()
    tp.save(net, tmp_path / "net.safetensors")
    with safetensors.safe_open(tmp_path / "net.safetensors", "pt") as file:
        said = json.loads(file.metadata()[header.KEY])
        mask = file.get_tensor("first.parametrizations.weight.0.mask_bits")
    assert mask.dtype == torch.uint8
    assert mask.numel() == 3
    options = {tie["layer"]: tie["options"] for tie in said["ties"]}
    assert options["first"] == {"mask": tp.get_tie(net.first).tag}
    assert options["last"] == options["twin"] == {"index": tp.get_tie(net.last).tag}


@pytest.mark.parametrize("where", ["fresh", "tied", "meta", "half tied"])
def test_a_file_fills_models_that_are_tied_or_not(tmp_path, where):
    net = tied()
    tp.save(net, tmp_path / "net.safetensors")
    with torch.device("meta" if where == "meta" else "cpu"):
        other = tied(1) if where == "tied" else Net()
    if where == "half tied":
        tp.register_tie(other.last, "index", index=INDEX)
    tp.load(tmp_path / "net.safetensors", other)
    for name in LAWS:
        assert torch.equal(getattr(other, name).weight, getattr(net, name).weight)
        assert str(tp.get_tie(getattr(other, name))) == str(tp.get_tie(getattr(net, name)))
    again = other.state_dict()
    assert all(torch.equal(again[key], value) for key, value in net.state_dict().items())


def test_a_wider_model_takes_the_fixed_numbers(tmp_path):
    layer = nn.Linear(6, 4, dtype=torch.bfloat16)
    tp.register_tie(layer, "fixed", mask=MASK, value=torch.full((4, 6), 1 / 3))
    tp.save(layer, tmp_path / "fixed.safetensors")
    wide = tp.load(tmp_path / "fixed.safetensors", nn.Linear(6, 4))
    assert torch.equal(wide.weight, layer.weight.float())
    with pytest.raises(tp.TieError, match="change its values"):
        tp.load(tmp_path / "fixed.safetensors", nn.Linear(6, 4, dtype=torch.float16))


KEY = "first.parametrizations.weight.0.mask_bits"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: entries.update({KEY: entries[KEY].flip(0)}), "another"),
        (lambda entries: entries.update({KEY: entries[KEY][:2]}), "another"),
        (lambda entries: entries.pop(KEY), "not at hand"),
        (lambda entries: entries.update({KEY: entries[KEY].float()}), "missing"),
    ],
    ids=["other bits", "fewer bits", "no data", "no codes"],
)
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_file_whose_data_is_not_what_its_header_names_is_refused(
    tmp_path, change, message, is_tied
):
    path, forged = tmp_path / "net.safetensors", tmp_path / "forged.safetensors"
    tp.save(tied(), path)
    rewritten(path, forged, change)
    other = tied(1) if is_tied else Net()
    before = everything(other)
    with pytest.raises(tp.TieError) as caught:
        tp.load(forged, other)
    assert everything(other) == before
    assert message in str(caught.value) or "missing" in str(caught.value)


@pytest.mark.parametrize(
    ("law", "code", "change"),
    [
        ("first", "mask_bits", lambda bits: bits[:2]),
        ("first", "mask_bits", lambda bits: bits[0]),
        ("first", "mask", lambda bits: bits),
        ("last", "index_bits", lambda bits: bits[:, :1]),
    ],
    ids=["fewer bits", "no axis", "another name", "fewer numbers"],
)
def test_codes_of_a_wrong_size_are_refused_even_if_the_header_names_them(
    tmp_path, law, code, change
):
    path, forged = tmp_path / "net.safetensors", tmp_path / "forged.safetensors"
    net = tied()
    tp.save(net, path)
    rule = tp.get_tie(getattr(net, law))
    ((name, bits),) = rule.data().items()
    codes, named = {code: change(bits).clone()}, Coded()
    named.keep((), codes)

    def forge(entries):
        start = f"{law}.parametrizations.weight.0."
        del entries[start + name]
        entries[start + code] = codes[code]

    rewritten(path, forged, forge, lambda text: text.replace(rule.checksum, named.checksum))
    other = Net()
    before = everything(other)
    with pytest.raises(tp.TieError, match="was saved tied by .*the rule raised"):
        tp.load(forged, other)
    assert everything(other) == before


def test_a_model_that_is_tied_by_another_mask_refuses_the_file(tmp_path):
    tp.save(tied(), tmp_path / "net.safetensors")
    other = Net()
    tp.register_tie(other.first, "masked", mask=~MASK)
    before = everything(other)
    with pytest.raises(tp.TieError, match="is 'masked"):
        tp.load(tmp_path / "net.safetensors", other)
    assert everything(other) == before


def test_a_layer_that_lost_its_data_is_not_saved(tmp_path):
    net = tied()
    net.to_empty(device="cpu")
    for value in tp.get_tie(net.first).buffers():
        value.fill_(0x5A)
    with pytest.raises(tp.TieError, match="to_empty"):
        tp.save(net, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_torchs_own_files_are_loaded_too(tmp_path):
    net = tied()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other = tp.load(tmp_path / "net.pt", tied(1))
    assert torch.equal(other.first.weight, net.first.weight)
    with pytest.raises(tp.TieError, match="free value of a tied model"):
        tp.load(tmp_path / "net.pt", Net())


def test_an_exported_file_is_dense(tmp_path):
    net = tied()
    tp.export_dense(net, tmp_path / "dense.safetensors")
    plain = Net()
    plain.load_state_dict(safetensors.torch.load_file(tmp_path / "dense.safetensors"))
    assert torch.equal(plain.first.weight, net.first.weight)
    tp.load(tmp_path / "dense.safetensors", other := tied(1))
    assert torch.equal(other.last.weight, net.last.weight)


def test_a_plan_in_python_takes_tensors_and_a_file_names_alone(tmp_path):
    net = Net()
    plan = {"first": ("masked", {"mask": MASK}), "last": ("masked", {"pattern": "lower"})}
    with pytest.raises(tp.TieError, match="mask=Tensor cannot be written"):
        tp.write_plan(plan, tmp_path / "plan.toml")
    tp.tie_model(net, plan)
    assert torch.equal(tp.get_tie(net.first).free_entries, MASK)
    tp.write_plan({"last": plan["last"]}, tmp_path / "plan.toml")
    tp.tie_model(other := Net(), tp.read_plan(tmp_path / "plan.toml"))
    assert tp.get_tie(other.last).options() == {"pattern": "lower"}
    banded = {"first": ("masked", {"pattern": "banded", "width": (1, 2)})}
    tp.write_plan(banded, tmp_path / "plan.json")
    tp.tie_model(other, tp.read_plan(tmp_path / "plan.json"))
    assert tp.get_tie(other.first).options() == {"pattern": "banded", "width": [1, 2]}
