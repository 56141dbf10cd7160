"""The table of sizes: it is that of its result file, whose bytes follow from shapes alone."""

from __future__ import annotations

import importlib
import json

import pytest

import tiedparam as tp
from tests.support import ROOT


@pytest.fixture
def sizes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("make_sizes")


@pytest.fixture
def result(sizes):
    return json.loads(sizes.RESULT.read_text(encoding="utf-8"))


def test_the_table_is_that_of_the_result_file(sizes, result):
    page = sizes.PAGE.read_text(encoding="utf-8")
    assert page == sizes.updated(page, result), f"run '{sizes.COMMAND}' and commit the result"
    result["rows"][1]["file"] += 1
    assert page != sizes.updated(page, result)


def test_the_result_file_has_the_bytes_that_such_networks_take(sizes, result):
    rows = {row["way"]: row for row in result["rows"]}
    dense = sizes.network()
    assert rows["dense"]["checkpoint"] == 4 * sum(p.numel() for p in dense.parameters())
    names = ["dense"]
    for name, plan, options in sizes.ways(dense):
        names.append(name)
        row = rows[name]
        assert row["zipped"] < row["file"]
        assert 0 < row["file"] - row["checkpoint"] < 2500  # the header
        if options:  # which n are chosen depends on the numbers
            share = float(options["target_size"][:-1]) / 100
            assert row["checkpoint"] <= share * rows["dense"]["checkpoint"]
            continue
        if "n=2" in name or "n=16" in name:  # the others take longer, and say the same
            tp.tie_model(model := sizes.network(), plan)
            stored = sum(value.nbytes for value in model.state_dict().values())
            assert row["checkpoint"] == stored
    assert list(rows) == names
