"""The tables of deployment: they are those of their result file, whose bytes follow from shapes."""

from __future__ import annotations

import importlib
import json

import pytest

from tests.support import ROOT


@pytest.fixture
def deployment(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("make_deployment")


@pytest.fixture
def result(deployment):
    return json.loads(deployment.RESULT.read_text(encoding="utf-8"))


def test_the_tables_are_those_of_the_result_file(deployment, result):
    page = deployment.PAGE.read_text(encoding="utf-8")
    assert page == deployment.updated(page, result), (
        f"run '{deployment.COMMAND}' and commit the result"
    )
    result["rows"][0]["bytes"]["tied"] += 10_000
    assert page != deployment.updated(page, result)


def test_the_result_file_has_every_case_and_the_bytes_of_its_values(deployment, result):
    found = {(row["way"], row["layer"]): row for row in result["rows"]}
    cases = list(deployment.cases())
    packaged = [name for name, *_ in cases if name.startswith(deployment.PACKAGED)]
    assert [layer for way, layer in found if way == "onnx"] == [name for name, *_ in cases]
    assert [layer for way, layer in found if way == "package"] == packaged
    for name, model, _ in cases:
        sizes = found["onnx", name]["bytes"]
        stored = sum(value.nbytes for value in model.parameters())
        dense = sum(value.nbytes for key, value in deployment.tp.dense_state_dict(model).items())
        assert sizes["tied"] >= stored
        assert 0 < sizes["untied"] - dense < 5000  # the graph


def test_the_ratios_are_those_of_turns(deployment, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(deployment.time, "process_time", lambda: float(next(clock)))
    monkeypatch.setattr(deployment, "TURNS", 4)
    calls = []

    def slow():
        calls.append("slow")
        next(clock)  # a call of twice the time

    found = deployment.in_turns({"tied": slow, "untied": lambda: calls.append("fast")}, 1)
    assert calls == ["slow", "fast"] * 5  # the first turn warms up
    assert found == {"tied": 2.0, "untied": 1.0, "ratio": 2.0, "spread": [2.0, 2.0]}
