"""``available_rules()``: a dictionary, and a table where it is printed."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import re

import pytest

import tiedparam as tp
from tiedparam.laws.rule_table import FAMILIES


def row_of(text: str, name: str) -> str:
    (row,) = [line for line in text.splitlines() if re.search(rf"  {name}  ", line)]
    return row


def test_printed_it_is_a_table():
    rules = tp.available_rules()
    text = str(rules)
    assert text.splitlines()[0].split() == ["family", "rule", "law", "options", "meaning"]
    assert len(text.splitlines()) == 2 + len(rules)
    for name, kind in rules.items():
        assert kind.law in row_of(text, name)
    assert "over='in', compute='auto'" in row_of(text, "channel_shared")
    assert "source=, source_name=None, fn=identity" in row_of(text, "copy")
    assert repr(rules) == text
    assert "<td" in rules._repr_html_()


def test_the_meaning_is_said_in_words_alone():
    meanings = {row["rule"]: row["meaning"] for row in tp.available_rules().rows()}
    assert meanings["flip_sym"] == "A kernel that is its own flip-transpose, or minus it."
    assert meanings["row_repeat"] == "Equal rows, for any tensor with an output axis."
    assert not any("`" in meaning for meaning in meanings.values())


def test_rows_stand_family_by_family():
    families = [row["family"] for row in tp.available_rules().rows()]
    found = [family for family, _ in itertools.groupby(families)]
    assert len(found) == len(set(found))
    assert [family for family in found if family in FAMILIES] == list(FAMILIES)


@pytest.mark.usefixtures("registry")
def test_a_rule_of_ones_own_has_a_row():
    @tp.register_rule("quiet")
    class Quiet(tp.Rule):
        law = "W = w"

        def __init__(self, period, sign=-1):
            super().__init__()

    (row,) = [row for row in tp.available_rules().rows() if row["rule"] == "quiet"]
    # without a docstring it has no meaning; that of `Rule` is none of its own
    assert row == {
        "family": "of your own",
        "rule": "quiet",
        "law": "W = w",
        "options": "period=, sign=-1",
        "meaning": "",
    }
    assert next(reversed(tp.available_rules().rows())) == row


def test_it_is_a_dictionary():
    rules = tp.available_rules()
    plain = {name: rules[name] for name in rules}
    assert isinstance(rules, dict)
    assert rules == plain
    assert list(rules) == sorted(rules)
    assert {**rules} == rules.copy() == rules | {} == plain
    for other in (copy.copy(rules), copy.deepcopy(rules), pickle.loads(pickle.dumps(rules))):
        assert other == plain
        assert str(other) == str(rules)
    rules.pop("flip_sym")
    assert "flip_sym" not in str(rules)
    assert rules != plain
    assert tp.available_rules() == plain


def test_it_has_the_forms_of_every_table():
    rules = tp.available_rules()
    assert rules.to_markdown().startswith("| family | rule | law | options | meaning |")
    assert json.loads(rules.to_json())["kind"] == "rules"
    assert str(type(rules)()) == ""  # no rules, no table
