"""What type checkers know of the rules is what the rules say of themselves."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import typing

import pytest
from torch import nn

import tiedparam as tp
from tests.support import ROOT, tomllib
from tiedparam import laws, rules
from tiedparam.laws.forms import forms_of

SHIPPED = {
    name: rule
    for name, rule in tp.available_rules().items()
    if rule.__module__.startswith("tiedparam.rules.")
}
FILES = ["tiedparam/rules/__init__.py", "tiedparam/layer/rule_options.py"]
FILES += ["tiedparam/layer/tie_options.py", "tiedparam/layer/register.py"]
FILES += ["tiedparam/layer/residual.py"]


@pytest.fixture
def signatures(monkeypatch):
    """The script that writes them."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("make_signatures")


# As generated ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_what_is_generated_is_up_to_date(name, signatures):
    assert set(signatures.CONTENTS) == set(FILES)
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text == signatures.updated(name, text), (
        f"{name} is not what the rules say; run '{signatures.COMMAND}' and commit the result"
    )


@pytest.mark.parametrize("name", FILES)
def test_a_new_law_is_noticed(name, signatures, monkeypatch):
    class Forgotten(laws.Broadcast):
        def __init__(self, turns: int, *, way: typing.Literal["left", 1] = "left") -> None:
            super().__init__()

    monkeypatch.setattr("tiedparam.laws.registry._RULES", tp.available_rules())
    Forgotten.__module__ = "tiedparam.rules.forgotten"
    tp.register_rule("forgotten")(Forgotten)
    with pytest.raises(AssertionError, match=r"run 'python docs/make_signatures\.py'"):
        test_what_is_generated_is_up_to_date(name, signatures)
    written = signatures.updated(name, (ROOT / name).read_text(encoding="utf-8"))
    ast.parse(written)
    assert "orgotten" in written
    if name.endswith("rule_options.py"):
        assert '    turns: Required[int]\n    way: Literal["left", 1]\n' in written


def test_however_many_laws_there_are_no_line_is_too_long(signatures, monkeypatch):
    many = {f"{name}_{number}": rule for name, rule in SHIPPED.items() for number in range(9)}
    monkeypatch.setattr(signatures, "shipped_rules", lambda: many)
    limit = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["line-length"]
    for write in signatures.CONTENTS.values():
        assert max(map(len, write().splitlines())) <= limit


def test_a_type_that_cannot_be_written_is_told(signatures):
    assert signatures.annotation(tuple) == "tuple"
    with pytest.raises(TypeError, match=r"does not know how to write the type <class '.*Conv2d'>"):
        signatures.annotation(nn.Conv2d)


# Complete --------------------------------------------------------------------------------------


def test_the_rules_are_public_under_the_names_of_their_classes():
    assert {getattr(rules, name) for name in rules.__all__} == set(SHIPPED.values())
    assert len(rules.__all__) == len(set(rules.__all__)) == len(SHIPPED) >= 6
    files = (ROOT / "tiedparam" / "rules").glob("[!_]*.py")
    assert {file.stem for file in files} == {
        rule.__module__.rpartition(".")[2] for rule in SHIPPED.values()
    }


def overloads_of(name: str, file: str) -> list[ast.FunctionDef]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return found[:-1]


@pytest.mark.parametrize(
    ("name", "file", "others"),
    [
        ("register_tie", "tiedparam/layer/register.py", ["Rule", "type[Rule]", "Laws"]),
        ("residual", "tiedparam/layer/residual.py", ["Rule | Laws", "type[Rule]"]),
    ],
)
def test_there_is_an_overload_for_each_name_and_none_for_any_string(name, file, others):
    kinds = [ast.unparse(node.args.args[1].annotation) for node in overloads_of(name, file)]
    assert kinds == [*(f"Literal['{name}']" for name in SHIPPED), *others]


def test_help_shows_the_signature_and_the_text():
    text = inspect.getdoc(tp.register_tie)
    assert text.startswith("Tie a tensor of a stock layer")
    assert str(inspect.signature(tp.register_tie)).startswith(
        "(layer: 'Layer', rule: 'str | type[Rule] | Rule | Laws', tensor_name: 'str' = 'weight', *"
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_help_explains_every_option(name):
    *_, arguments = inspect.getdoc(SHIPPED[name]).partition("\nArgs:\n")
    explained = re.findall(r"^    (\w+): \S", arguments, re.MULTILINE)
    assert explained == list(inspect.signature(SHIPPED[name]).parameters)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("users_script.py", "(3, 3) parametrizations.weight.original0 torch.Size([2, 8])"),
        ("users_rules.py", "True"),
    ],
)
def test_the_scripts_that_type_checkers_read_do_what_they_say(script, said):
    done = subprocess.run(
        [sys.executable, f"tests/house/{script}"], cwd=ROOT, check=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert said in done.stdout


# Closed sets -----------------------------------------------------------------------------------


def literals_of(function) -> dict[str, tuple]:
    """The arguments of which only some values are allowed, with these."""
    hints = typing.get_type_hints(function)
    return {
        name: typing.get_args(hint)
        for name, hint in hints.items()
        if typing.get_origin(hint) is typing.Literal
    }


OPTIONS = [
    (rule, option, values)
    for rule in SHIPPED.values()
    for option, values in literals_of(rule.__init__).items()
]


def test_the_options_with_closed_sets_are_found():
    assert {option for _, option, _ in OPTIONS} >= {"compute", "over", "order"}
    assert literals_of(laws.Broadcast.__init__) == {"compute": typing.get_args(laws.Compute)}


@pytest.mark.parametrize("rule", SHIPPED.values(), ids=list(SHIPPED))
def test_compute_names_the_forms_of_a_law(rule):
    names = literals_of(rule.__init__).get("compute", ("auto", "dense"))
    assert set(names) == {"auto", "dense", *(form.name for form in forms_of(rule))}


def required_options(rule) -> set[str]:
    """Those without a default."""
    options = inspect.signature(rule).parameters.values()
    return {option.name for option in options if option.default is option.empty}


def refusal(rule, example, **option) -> tp.TieError | None:
    """What is said against an example with this option."""
    model = example.build()
    layer = model.get_submodule(example.path)
    try:
        tp.register_tie(layer, rule, example.tensor_name, root=model, **example.options | option)
    except tp.TieError as error:
        return error
    return None


WITH_FORMS = (
    lambda: nn.Conv1d(6, 12, 3, groups=6),
    lambda: nn.Conv2d(8, 8, 1),
    lambda: nn.Linear(400, 400),
)
"""Layers that have whatever forms their law offers: some are for large ones."""


@pytest.mark.parametrize(
    ("rule", "option", "values"), OPTIONS, ids=[f"{rule.name}-{name}" for rule, name, _ in OPTIONS]
)
def test_the_values_that_are_typed_are_those_that_are_taken(rule, option, values):
    examples = [*rule.examples()]
    if option == "compute":  # a layer that has every form, with the least and with other options
        least = {k: v for k, v in examples[0].options.items() if k in required_options(rule)}
        every = [least, *(example.options for example in examples)]
        examples += [tp.Example(build, each) for build in WITH_FORMS for each in every]
    taken, told = set(), set()
    for example in examples:
        taken |= {value for value in values if refusal(rule, example, **{option: value}) is None}
        against = refusal(rule, example, **{option: "another"})
        if f"{option}='another' is" in against.fact:
            told |= {ast.literal_eval(word) for word in re.findall(r"'\w+'|-?\d+", against.remedy)}
    assert taken == told <= set(values)
    if option != "compute" or rule.name not in ("row_repeat", "head_share"):  # have no windows
        assert taken == set(values)


def test_the_values_of_init_and_on_unfit_are_those_that_are_taken():
    inits, kinds = ("project", "rescale", "exact"), ("error", "skip")
    assert literals_of(tp.register_tie) == {"init": inits}
    assert literals_of(tp.tie_model) == {"init": inits, "on_unfit": kinds}
    for init in inits:
        layer = nn.Linear(3, 4)
        nn.init.ones_(layer.weight)
        tp.register_tie(layer, "row_repeat", init=init)
    for on_unfit in kinds:
        tp.tie_model(nn.Sequential(nn.Linear(3, 4)), {"0": "row_repeat"}, on_unfit=on_unfit)
    with pytest.raises(tp.TieError, match="Choose one of 'project', 'rescale', 'exact'"):
        tp.register_tie(nn.Linear(3, 4), "row_repeat", init="another")
    with pytest.raises(tp.TieError, match="Choose 'error' or 'skip'"):
        tp.tie_model(nn.Sequential(nn.Linear(3, 4)), {"0": "row_repeat"}, on_unfit="another")
