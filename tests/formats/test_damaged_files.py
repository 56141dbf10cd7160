"""Files that are damaged, crafted or merely unusual: never a value that another reader denies.

The second opinions are the safetensors package and `torch.load`. Files are damaged at random,
from fixed seeds; TIEDPARAM_DAMAGED_FILES says how many (2,000 take some minutes).
"""

from __future__ import annotations

import json
import os
import random
import tracemalloc
import zipfile
from collections import Counter

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import tiedparam as tp
from tests.support import older_than
from tests.support.tensors import bits
from tiedparam.cli.model_from_file import open_model
from tiedparam.formats.checkpoint import StoredCheckpoint
from tiedparam.formats.safetensors import Entry, SafetensorsFile, write
from tiedparam.formats.strict_json import read_json
from tiedparam.formats.torch_archive import is_mappable
from tiedparam.util.errors import LONGEST_MESSAGE

HOW_MANY = int(os.environ.get("TIEDPARAM_DAMAGED_FILES", "200"))


def described(tensors) -> dict:
    return {name: (value.dtype, value.shape, bits(value)) for name, value in tensors.items()}


def message_of(call) -> str:
    with pytest.raises(tp.TieError) as caught:
        call()
    return str(caught.value)


def unless_refused(call):
    """What the call gives, or None if it raises a TieError of a bounded length."""
    try:
        return call()
    except tp.TieError as error:
        refusal = str(error)
    assert len(refusal) <= LONGEST_MESSAGE
    return None


def with_header(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def with_ties(path, content, tensors):
    """A file with a header of tiedparam and a right checksum, as an attacker could write it."""
    text = content if isinstance(content, str) else json.dumps(content)
    entries = [Entry(key, value.dtype, tuple(value.shape)) for key, value in tensors.items()]
    with path.open("wb") as file:
        write(file, entries, lambda e: tensors[e.name], {"tiedparam": text}, checksum=True)
    return path


# Damage at random --------------------------------------------------------------------------


class Net(nn.Module):
    """What the damaged files held."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 3, 3), nn.Linear(3, 4).half()
        self.register_buffer("counts", torch.arange(5))
        self.register_buffer("mask", torch.tensor([True, False]))


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Bytes of files by safetensors, by save, and by export_dense."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sound")
    net = Net()
    safetensors.torch.save_file(net.state_dict(), folder / "theirs", {"format": "pt", "é": "\\"})
    tp.export_dense(net, folder / "dense")
    tp.register_tie(net.conv, "flip_sym")
    tp.save(net, folder / "tied")
    return [(folder / name).read_bytes() for name in ("theirs", "dense", "tied")]


def damaged(raw: bytes, dice: random.Random) -> bytes:
    """Another file: bytes that changed, came or went, or a header that was rewritten."""
    length = int.from_bytes(raw[:8], "little")
    how = dice.randrange(8)
    if how == 0:
        return raw[: dice.randrange(len(raw))]
    if how == 1:
        return raw + dice.randbytes(dice.randint(1, 9))
    if how == 2:
        other = dice.choice([0, 1, length - 1, length + 1, len(raw), 2**63, 2**64 - 1])
        return other.to_bytes(8, "little") + raw[8:]
    if how in (3, 4):
        changed = bytearray(raw)
        for _ in range(dice.randint(1, 3)):
            place = dice.randrange(8 + length if how == 3 else len(raw))
            changed[place] ^= dice.randint(1, 255)
        return bytes(changed)
    text = changed_text(raw[8 : 8 + length], dice) if how == 5 else changed_table(raw, dice)
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def changed_text(text: bytes, dice: random.Random) -> bytes:
    """A header in which a piece of text was replaced by one that readers may differ on."""
    old = dice.choice([b"F32", b"F16", b"3", b"4", b"0", b"[", b"]", b"{", b"}", b":", b",", b'"'])
    new = dice.choice(
        [
            *b"-0|NaN|Infinity|1e400|1.0|true|null|[]|F64|I16| |\\ud800|\\u0041|//".split(b"|"),
            *(b"\xff", b"\xef\xbb\xbf", b"\0", b"9" * 5000),
        ]
    )
    places = [n for n in range(len(text)) if text.startswith(old, n)]
    if not places:
        return new + text
    place = dice.choice(places)
    return text[:place] + new + text[place + len(old) * dice.randint(0, 1) :]


def changed_table(raw: bytes, dice: random.Random) -> bytes:
    """A header that is JSON and says something else."""
    table = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    names = [name for name in table if name != "__metadata__"]
    name, other = dice.sample(names, 2)
    entry = table[name]
    how = dice.randrange(9)
    if how == 0:
        entry["dtype"] = dice.choice(["F32", "F16", "I64", "U8", "BOOL", "F4", "f32", "", 3, None])
    elif how == 1:
        size = dice.choice([0, 1, 2, -1, 2**31, 2**62, 2**63, 2**64, 10**40, 1.0, "3", True, None])
        entry["shape"] = [*entry["shape"], size]
    elif how == 2:
        dice.shuffle(entry["shape"])
    elif how == 3:
        offset = dice.choice([0, 1, -1, 4, 8, 2**63, 2**64, 2.0, None])
        entry["data_offsets"][dice.randint(0, 1)] = offset
    elif how == 4:
        table[name], table[other] = table[other], table[name]
    elif how == 5:
        del entry[dice.choice(list(entry))]
    elif how == 6:
        entry[dice.choice(["x", "Shape", "offset"])] = 1
    elif how == 7:
        table["__metadata__"] = dice.choice([{}, {"a": 1}, [], None, "x", {"a": None}])
    text = json.dumps(table, ensure_ascii=dice.random() < 0.5)
    if how == 8:  # a key twice
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(table[other])}}}"
    return text.encode()


def by_safetensors(path):
    try:
        with safetensors.safe_open(path, "pt") as opened:
            return {name: opened.get_tensor(name) for name in list(opened.keys())}
    except Exception:
        return None


def by_torch(path):
    return torch.load(path, map_location="cpu", weights_only=True)


@pytest.mark.feature(
    "Copies and files",
    "damaged and crafted files",
    refused="no value is given that `safetensors` or `torch.load` does not give; fetch it again",
)
def test_a_damaged_file_never_gives_a_value_that_safetensors_does_not(sound, tmp_path):
    path = tmp_path / "file"
    seen = Counter()
    for number in range(HOW_MANY):
        dice = random.Random(number)
        raw = dice.choice(sound)
        path.write_bytes(damaged(raw, dice))
        theirs = by_safetensors(path)
        ours = unless_refused(lambda: SafetensorsFile(path))
        if ours is not None:
            assert theirs is not None, f"seed {number}"
            assert described(ours) == described(theirs), f"seed {number}"
            seen["read by both"] += 1
        else:
            seen["refused by both" if theirs is None else "refused by us"] += 1
        model = unless_refused(lambda: tp.load(path, Net()))
        if model is not None:
            assert theirs is not None, f"seed {number}"
            loaded = model.state_dict()
            widened = {name: value.to(loaded[name].dtype) for name, value in theirs.items()}
            assert described(loaded) == described(widened), f"seed {number}"
    print(HOW_MANY, "damaged files:", dict(seen))
    assert seen["refused by both"] > HOW_MANY // 3
    assert seen["read by both"] > HOW_MANY // 20


def test_a_damaged_archive_never_gives_a_value_that_torch_does_not(tmp_path):
    path = tmp_path / "model.pt"
    torch.manual_seed(0)
    torch.save(Net().state_dict(), path)
    raw = path.read_bytes()
    read = 0
    for number in range(HOW_MANY):
        dice = random.Random(number)
        changed = bytearray(raw)
        for _ in range(dice.randint(1, 3)):
            changed[dice.randrange(len(raw))] ^= dice.randint(1, 255)
        path.write_bytes(changed)
        ours = unless_refused(lambda: StoredCheckpoint(path))
        if ours is not None:
            assert described(ours) == described(by_torch(path)), f"seed {number}"
            read += 1
    print(HOW_MANY, "damaged archives:", read, "were read as torch reads them")
    assert HOW_MANY // 20 < read < HOW_MANY


# Archives by other hands -------------------------------------------------------------------


STATE = {"weight": torch.eye(4), "bias": torch.arange(4.0), "steps": torch.tensor(3)}


def repacked(folder, change=lambda name, data: data, method=zipfile.ZIP_STORED, zip64=False):
    """A checkpoint whose records went through another program."""
    torch.save(STATE, folder / "old.pt")
    with (
        zipfile.ZipFile(folder / "old.pt") as old,
        zipfile.ZipFile(folder / "new.pt", "w", method) as new,
    ):
        for record in old.infolist():
            data = change(record.filename, old.read(record.filename))
            if data is not None:
                with new.open(record.filename, "w", force_zip64=zip64) as file:
                    file.write(data)
    return folder / "new.pt"


def replaced(record, data):
    return lambda name, old: data if name.endswith(record) else old


@pytest.mark.feature(
    "Copies and files", "archives by `torch.save` that another program packed anew, deflated or not"
)
def test_s47_a_deflated_checkpoint_is_read_rightly(tmp_path):
    path = repacked(tmp_path, method=zipfile.ZIP_DEFLATED)
    layer = nn.Linear(4, 4)
    layer.register_buffer("steps", torch.tensor(0))
    tp.load(path, layer)
    assert described(layer.state_dict()) == described(STATE)
    assert described(StoredCheckpoint(path)) == described(STATE)  # what the shell reads
    weight = open_model(path).weight
    assert torch.equal(weight, STATE["weight"])


UNUSUAL = {
    "stored anew": lambda folder: repacked(folder),
    "zip64": lambda folder: repacked(folder, zip64=True),
    "bzip2": lambda folder: repacked(folder, method=zipfile.ZIP_BZIP2),
    "big-endian": lambda folder: repacked(folder, replaced("byteorder", b"big")),
    "big-endian, deflated": lambda folder: repacked(
        folder, replaced("byteorder", b"big"), zipfile.ZIP_DEFLATED
    ),
    "no such endianness": lambda folder: repacked(folder, replaced("byteorder", b"odd")),
    "a short record": lambda folder: repacked(folder, replaced("data/0", bytes(56))),
    "a long record": lambda folder: repacked(folder, replaced("data/0", bytes(72))),
    "a short record, deflated": lambda folder: repacked(
        folder, replaced("data/0", bytes(56)), zipfile.ZIP_DEFLATED
    ),
    "a missing record": lambda folder: repacked(folder, replaced("data/0", None)),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_an_unusual_archive_gives_what_torch_gives(case, tmp_path):
    path = UNUSUAL[case](tmp_path)
    if older_than("2.10") and case.startswith(("a short record", "a long record")):
        # it takes these, and what lies behind a short one in memory
        assert "cannot read" in message_of(lambda: StoredCheckpoint(path))
    else:
        assert_as_torch(path)


def test_a_record_that_calls_itself_a_folder_or_empty_is_refused(tmp_path):
    """torch.load gives memory as it finds it for such a record."""
    path = repacked(tmp_path, method=zipfile.ZIP_DEFLATED)
    raw = path.read_bytes()
    entry = raw.rindex(b"PK\1\2", 0, raw.rindex(b"data/0"))  # in the directory
    for place, value in ((38, 0x10), (20, 0)):  # its attributes; its compressed size
        changed = bytearray(raw)
        changed[entry + place : entry + place + 4] = value.to_bytes(4, "little")
        path.write_bytes(changed)
        assert "it is damaged" in message_of(lambda: StoredCheckpoint(path))


def assert_as_torch(path):
    try:
        expected = described(by_torch(path))
    except Exception:
        expected = None
    if expected is None:
        assert "cannot read" in message_of(lambda: StoredCheckpoint(path))
    else:
        assert described(StoredCheckpoint(path)) == expected


def test_bytes_in_front_of_an_archive(tmp_path):
    torch.save(STATE, tmp_path / "a.pt")
    raw = (tmp_path / "a.pt").read_bytes()
    for front in (b"#!/bin/sh\n", raw[:64], raw):
        (tmp_path / "b.pt").write_bytes(front + raw)
        said = message_of(lambda: StoredCheckpoint(tmp_path / "b.pt"))
        assert str(tmp_path / "b.pt") in said
        assert "is not a checkpoint" in said or "damaged or not a torch file" in said


def test_what_torch_writes_without_checksums_or_before_archives(tmp_path):
    path = tmp_path / "a.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert is_mappable(path)
    assert_as_torch(path)
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    assert_as_torch(path)
    torch.save(STATE, path, _disable_byteorder_record=True)
    assert_as_torch(path)


def test_what_torch_saves_is_mapped_and_not_read(tmp_path):
    kinds = {
        "parameter": nn.Parameter(torch.ones(3)),
        "transposed": torch.randn(2, 3).t(),
        "part": torch.arange(10)[2:4],
        "empty": torch.empty(0, 3),
        "brain": torch.ones(2, dtype=torch.bfloat16),
        "new": torch.ones(2, dtype=torch.uint16),
        "complex": torch.randn(3, dtype=torch.complex64),
        "large": torch.zeros(2**22),
    }
    torch.save(kinds, tmp_path / "a.pt")
    assert is_mappable(tmp_path / "a.pt")
    assert_as_torch(tmp_path / "a.pt")
    assert not is_mappable(repacked(tmp_path, method=zipfile.ZIP_DEFLATED))


def test_a_pickle_is_only_looked_at(tmp_path):
    """Neither what it names is made, nor the memory that it asks for."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"a": torch.ones(2), "b": Evil()}, tmp_path / "evil.pt")
    assert is_mappable(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    greedy = b"\x80\x02}r\xff\xff\xff\x7f."  # puts a dictionary at the memo's place 2³¹ − 1
    path = repacked(tmp_path, replaced("data.pkl", greedy))
    tracemalloc.start()
    with pytest.raises(ValueError, match="more memory"):
        is_mappable(path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


# Headers and indexes -----------------------------------------------------------------------


ENTRY = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
NOT_STRICT = {
    "a key twice": '{"x": 1, "x": 1}',
    "a key twice, deep": '[{"x": [{"y": 1, "y": 2}]}]',
    "NaN": '{"x": NaN}',
    "Infinity": '{"x": [-Infinity]}',
    "beyond floats": '{"x": 1e400}',
    "minus nothing": '{"x": -0}',
    "half a pair": '{"x": "\\ud800"}',
    "half a pair as a key": '{"\\udc00": 1}',
    "two values": "{} {}",
    "a comment": "{} // x",
    "a comma": '{"x": 1,}',
    "cut off": '{"x": ',
}


def not_strict(plain: str) -> dict[str, str]:
    """A table that some reader takes, with each thing in it that JSON does not have."""
    return {case: plain[:-1] + f', "more": {text}}}' for case, text in NOT_STRICT.items()}


@pytest.mark.parametrize("case", NOT_STRICT)
class TestStrictJSON:
    """One function reads the JSON of all files."""

    def test_the_function(self, case):
        with pytest.raises(ValueError, match=r"."):
            read_json(NOT_STRICT[case])
        with pytest.raises(ValueError, match=r"."):
            read_json(NOT_STRICT[case].encode())

    def test_the_header(self, case, tmp_path):
        metadata = '"__metadata__":' + NOT_STRICT[case]
        path = with_header(tmp_path / "file", f"{{{ENTRY},{metadata}}}".encode(), b"\0")
        assert "its header cannot be read" in message_of(lambda: SafetensorsFile(path))

    def test_what_the_header_says_of_ties(self, case, tmp_path):
        plain = '{"layout": 2, "ties": [], "aliases": {}, "versions": {}}'
        tensors = nn.Linear(2, 2).state_dict()
        tp.load(with_ties(tmp_path / "file", plain, tensors), nn.Linear(2, 2))
        path = with_ties(tmp_path / "file", not_strict(plain)[case], tensors)
        for call in (lambda: tp.load(path, nn.Linear(2, 2)), lambda: open_model(path)):
            assert "its header is malformed" in message_of(call)

    def test_the_index(self, case, tmp_path):
        safetensors.torch.save_file(nn.Linear(2, 2).state_dict(), tmp_path / "a.safetensors")
        index = tmp_path / "model.safetensors.index.json"
        plain = '{"weight_map": {"weight": "a.safetensors", "bias": "a.safetensors"}}'
        index.write_text(plain)
        tp.load(index, nn.Linear(2, 2))
        index.write_text(not_strict(plain)[case])
        assert "is not an index" in message_of(lambda: tp.load(index, nn.Linear(2, 2)))

    def test_the_plan(self, case, tmp_path):
        plan = tmp_path / "plan.json"
        plain = '{"tie": [{"layers": "*", "rule": "flip_sym"}]}'
        plan.write_text(plain)
        assert tp.read_plan(plan).entries
        plan.write_text(not_strict(plain)[case])
        assert "is not JSON" in message_of(lambda: tp.read_plan(plan))


def test_text_that_is_whole_is_read():
    assert read_json('{"\\ud83d\\ude00": "\\u00e9"}') == {"😀": "é"}
    assert read_json(b'[1e300, -1, 0, true, null, "NaN"]') == [1e300, -1, 0, True, None, "NaN"]


def test_a_header_of_huge_sizes_is_judged_in_linear_time(tmp_path):
    """Seconds for what took nine minutes: the time limit of the tests is the judge."""
    sizes = b",".join([b"4611686018427387904"] * 200_000)
    header = b'{"a":{"dtype":"F32","shape":[' + sizes + b'],"data_offsets":[0,0]}}'
    path = with_header(tmp_path / "file", header)
    assert by_safetensors(path) is None
    assert "'a' is malformed" in message_of(lambda: tp.load(path, nn.Linear(2, 2)))
    tie = {
        "layer": "", "tensor": "weight", "rule": "flip_sym", "options": {}, "groups": 1,
        "shape": [2**62] * 200_000, "transposed": False, "stacked": False, "residual": None,
    }  # fmt: skip
    content = {"layout": 2, "ties": [tie], "aliases": {}, "versions": {}}
    path = with_ties(tmp_path / "file", content, {"a": torch.ones(1)})
    assert "malformed" in message_of(lambda: tp.load(path, nn.Linear(2, 2)))


def copies(count):
    names = ("rule", "tensor", "options", "shape", "groups", "transposed", "stacked", "residual")
    return [
        dict(
            zip(names, ("copy", "weight", {"source": str(n - 1), "source_name": "weight"}, [1, 1],
                        1, False, False, None), strict=True),
            layer=str(n),
        )
        for n in range(1, count + 1)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("count", "message"), [(150, "too long a chain"), (20_000, "malformed")])
def test_a_chain_of_copies_is_judged_in_linear_time(count, message, tmp_path):
    content = {"layout": 2, "ties": copies(count), "aliases": {}, "versions": {}}
    path = with_ties(tmp_path / "file", content, {"0.weight": torch.ones(1, 1)})
    assert message in message_of(lambda: open_model(path))
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(151)))
    classes = [type(layer) for layer in model]
    assert message in message_of(lambda: tp.load(path, model))
    assert [type(layer) for layer in model] == classes


@pytest.mark.slow
def test_an_index_of_many_files_is_judged_in_linear_time(tmp_path):
    count = 3000
    for number in range(count):
        safetensors.torch.save_file({f"t{number}": torch.ones(1)}, tmp_path / f"{number}.s")
    places = {f"t{number}": f"{number}.s" for number in range(count)}
    index = tmp_path / "many.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert len(StoredCheckpoint(index)) == count
    index.write_text(json.dumps({"weight_map": {**places, "x" * 10**6: "0.s"}}))
    assert len(message_of(lambda: StoredCheckpoint(index))) < LONGEST_MESSAGE


LONG = "n" * 300_000
ONE = torch.ones(1, 1)
LONG_WINDED = {
    "a name": ({LONG: ONE}, {}),
    "many names": ({f"{n}{LONG[:2000]}": ONE for n in range(100)}, {}),
    "a deep name": ({"a." * 100_000 + "weight": ONE}, {}),
    "a shape": ({"weight": torch.ones(1).reshape([1] * 64)}, {}),
    "an alias": ({"weight": ONE}, {"aliases": {LONG: "weight2"}}),
    "a layer": ({"weight": ONE}, {"ties": [{**copies(1)[0], "layer": LONG}]}),
    "a rule": ({"weight": ONE}, {"ties": [{**copies(1)[0], "layer": "", "rule": LONG}]}),
    "an option": (
        {"weight": ONE},
        {"ties": [{**copies(1)[0], "layer": "", "rule": "row_repeat", "options": {LONG: 1}}]},
    ),
    "a value": (
        {"weight": ONE},
        {
            "ties": [
                {**copies(1)[0], "layer": "", "rule": "channel_shared", "options": {"over": LONG}}
            ]
        },
    ),
    "a source": (
        {"weight": ONE},
        {
            "ties": [
                {**copies(1)[0], "layer": "", "options": {"source": LONG, "source_name": "weight"}}
            ]
        },
    ),
    "many ties": ({"weight": ONE}, {"ties": copies(150)}),
}


@pytest.mark.parametrize("case", LONG_WINDED)
def test_a_long_winded_file_gets_a_short_answer(case, tmp_path):
    tensors, more = LONG_WINDED[case]
    content = {"layout": 2, "ties": [], "aliases": {}, "versions": {}, **more}
    path = with_ties(tmp_path / "file", content, tensors)
    said = message_of(lambda: tp.load(path, nn.Linear(1, 1, bias=False).double()))
    assert len(said) <= LONGEST_MESSAGE
    assert said.startswith(f"cannot load '{path}'")
    assert said.endswith((".", "more"))
    if tensors.keys() != {LONG} and "shape" not in case and "many names" not in case:
        assert len(message_of(lambda: open_model(path))) <= LONGEST_MESSAGE
    torch.save(tensors, tmp_path / "file.pt")
    said = message_of(lambda: tp.load(tmp_path / "file.pt", nn.Linear(1, 2, bias=False)))
    assert len(said) <= LONGEST_MESSAGE


def test_long_names_in_what_is_no_tensor_file(tmp_path):
    path = with_header(tmp_path / "ones", {"w": {"dtype": "F32", "shape": [1] * 100_000}})
    assert len(message_of(lambda: tp.load(path, nn.Linear(2, 2)))) < LONGEST_MESSAGE
    path = with_header(
        tmp_path / "dtype", {LONG: {"dtype": LONG, "shape": [], "data_offsets": [0, 0]}}
    )
    assert len(message_of(lambda: tp.load(path, nn.Linear(2, 2)))) < LONGEST_MESSAGE
    for content in ({LONG: 3}, {"a": 3, LONG: {"w": ONE}}, {"m": {LONG: 3}}):
        torch.save(content, tmp_path / "file.pt")
        assert len(message_of(lambda: StoredCheckpoint(tmp_path / "file.pt"))) < LONGEST_MESSAGE
        said = message_of(lambda: StoredCheckpoint(tmp_path / "file.pt", "other"))
        assert len(said) < LONGEST_MESSAGE
    (tmp_path / "plan.json").write_text('{"x": 1, "' + LONG + '": 1, "' + LONG + '": 2}')
    assert len(message_of(lambda: tp.read_plan(tmp_path / "plan.json"))) < LONGEST_MESSAGE


def test_what_a_pickle_notes_of_modules_may_be_anything(tmp_path):
    state = nn.BatchNorm1d(2).state_dict()
    for noted in (3, {"": 3}, {"": {"version": "x"}}, {3: {}}, {"": {"tiedparam": 3}}):
        state._metadata = noted
        torch.save(state, tmp_path / "a.pt")
        layer = tp.load(tmp_path / "a.pt", tp.register_tie(nn.BatchNorm1d(2), "row_repeat"))
        assert torch.equal(layer.weight, torch.ones(2))


# Headers of tiedparam that lie ------------------------------------------------------------


LIES = [
    None, True, 0, 1, -1, 3, 2**62, 2**63, 10**30, 0.5, "", "0", "1", "weight", "bias", "copy",
    "flip_sym", "row_repeat", "channel_shared", "squared_copy", "in", "source", "torch.t", "a:b",
    [], {}, [0], [3, 3], {"over": "in"}, {"source": "0", "source_name": "weight"}, "0.weight",
    "x" * 5000, "parametrizations", "..", "\x1b[2J",
]  # fmt: skip


def lying(content, dice: random.Random):
    """The content with one to three of its leaves or tables replaced."""
    places = []

    def visit(value):
        if isinstance(value, dict | list):
            for key in value if isinstance(value, dict) else range(len(value)):
                places.append((value, key))
                visit(value[key])

    visit(content)
    for table, key in dice.sample(places, dice.randint(1, 3)):
        if isinstance(table, list) or dice.random() < 0.8:
            table[key] = dice.choice(LIES)
        elif dice.random() < 0.5:
            table.pop(key, None)
        else:
            table[str(dice.choice(LIES))] = table.pop(key, 0)
    return content


@pytest.mark.slow
def test_a_header_that_lies_is_refused_or_gives_what_the_file_holds(tmp_path):
    """With a right checksum: only TieError is raised, and then nothing was changed."""

    def build():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(3, 3, 3, groups=3), nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
        )

    model = build()
    tp.register_tie(model[0], "channel_shared", over="groups")
    tp.register_tie(model[1], "flip_sym")
    tp.register_tie(model[2], "copy", source=model[1], fn=torch.t)
    path = tmp_path / "file"
    tp.save(model, path)
    tensors = {key: value.clone() for key, value in SafetensorsFile(path).items()}
    text = SafetensorsFile(path).metadata["tiedparam"]
    seen = Counter()
    for number in range(HOW_MANY):
        dice = random.Random(number)
        with_ties(path, lying(json.loads(text), dice), tensors)
        fresh = build()
        before = described(fresh.state_dict()), [type(module) for module in fresh.modules()]
        if unless_refused(lambda: tp.load(path, fresh)) is None:  # noqa: B023
            now = described(fresh.state_dict()), [type(module) for module in fresh.modules()]
            assert now == before, f"seed {number}"
            seen["refused"] += 1
        else:
            held = described(fresh.state_dict())
            assert all(held[key] == value for key, value in described(tensors).items())
            seen["read"] += 1
        offline = unless_refused(lambda: open_model(path))
        if offline is not None:
            tp.report(offline)
    print(HOW_MANY, "headers that lie:", dict(seen))
    assert seen["refused"] > HOW_MANY // 2
    assert seen["read"] > 0
