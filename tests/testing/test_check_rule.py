"""`check_rule`: the whole contract in one call."""

from __future__ import annotations

import random
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support import ROOT
from tests.support.users_laws import (
    Centred,
    Lower,
    Mirrored,
    Mixed,
    OneProduct,
    Skew,
    SquaredTotal,
)
from tiedparam.testing import STATEMENTS, RuleReport, check_rule


class Typo(Mirrored):
    """A name that there is not."""

    def forward(self, half):
        return torch.cat([half, half.fliped(-1)], -1)


@pytest.mark.parametrize(
    "rule",
    [Mirrored, Skew, Lower, Centred, SquaredTotal, Mixed, OneProduct],
    ids=lambda rule: rule.__name__,
)
def test_laws_that_are_right_pass(rule):
    before = tp.available_rules()
    report = check_rule(rule)
    assert isinstance(report, RuleReport)
    assert report.passed
    lines = str(report).splitlines()
    assert lines[0] == f"{rule.__name__}: {rule.law}"
    count, examples = len(report.outcomes), len(rule.examples())
    assert lines[1].startswith(f"All {count} statements hold for {examples} example")
    assert len(lines) == 2 + count
    assert all(line.startswith("  holds  ") for line in lines[2:])
    own = {SquaredTotal: "copies", Mixed: "laws with fitted values"}
    own[OneProduct] = "laws with fitted values"
    kinds = {"every law", own.get(rule, "laws with values")}
    meant = {name for name, statement in STATEMENTS.items() if statement.kind in kinds}
    assert {outcome.statement.name for outcome in report.outcomes} == meant
    assert all(outcome.judged == examples for outcome in report.outcomes)
    assert tp.available_rules() == before


def test_every_statement_says_what_it_means_and_what_to_correct():
    assert len(STATEMENTS) > 45
    for name, statement in STATEMENTS.items():
        assert statement.name == name
        assert statement.meaning.endswith(".")
        assert statement.correct.endswith(".")


def test_an_example_that_cannot_be_tied_is_told_once_and_the_others_are_judged():
    class Picky(Mirrored):
        def check(self, layout):
            return None if len(layout.shape) == 2 else "it is no matrix. Choose a Linear layer."

    with pytest.raises(AssertionError) as caught:
        check_rule(Picky, quick=True)
    text = str(caught.value)
    assert text.count("FAILS") == 1
    assert "Conv1d-weight-3x2x2: raised TieError: cannot tie 'weight' by 'Picky': it is no" in text
    assert text.count("  holds  ") > 30


# How it is called ------------------------------------------------------------------------------


def test_examples_may_be_given():
    class Bare(Mirrored):
        @classmethod
        def examples(cls):
            return []

    with pytest.raises(TypeError, match=r"Bare has no examples\. Pass examples=\["):
        check_rule(Bare)
    report = check_rule(Bare, examples=[tp.Example(lambda: nn.Linear(2, 2))], quick=True)
    assert report.examples == ("Linear-weight-2x2",)


def test_some_statements_may_be_chosen_and_slow_ones_left_out():
    names = {"labels_number_the_orbits", "gradcheck_and_gradgradcheck_pass"}
    report = check_rule(Mirrored, statements=names)
    found = {outcome.statement.name for outcome in report.outcomes}
    assert found == {"every_example_can_be_tied", *names}
    report = check_rule(Mirrored, statements=names, quick=True)
    assert {outcome.statement.name for outcome in report.outcomes} == found - {
        "gradcheck_and_gradgradcheck_pass"
    }
    with pytest.raises(ValueError, match=r"no statement 'label_numbers'.* 'labels_number_the_orb"):
        check_rule(Mirrored, statements=["label_numbers"])


@pytest.mark.parametrize("thing", [nn.Linear, Mirrored(), "flip_sym", None])
def test_only_classes_of_laws_are_judged(thing):
    with pytest.raises(TypeError, match="takes the class of a law"):
        check_rule(thing)


def test_examples_must_be_a_classmethod():
    class Mine(Mirrored):
        def examples(self):
            return []

    with pytest.raises(TypeError, match=r"Mine\.examples must be a classmethod"):
        check_rule(Mine)


class Scaled(nn.Module):
    """A layer that the library does not know."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        return x * self.weight


def test_inputs_of_an_unknown_layer_are_asked_for_and_may_be_given():
    example = tp.Example(Scaled)
    with pytest.raises(AssertionError, match=r"what a TiedScaled is called with\. Pass check_rule"):
        check_rule(Mirrored, examples=[example], quick=True)

    def inputs(layer, batch):
        return (torch.randn(batch, 1, 4).to(layer.parametrizations.weight.original0.dtype),)

    assert check_rule(Mirrored, examples=[example], inputs=inputs, quick=True).passed


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.LSTM(4, 2),
        lambda: nn.Embedding(6, 4),
        lambda: nn.EmbeddingBag(6, 4),
        lambda: nn.LayerNorm(4),
        lambda: nn.Bilinear(2, 4, 3),
    ],
    ids=["LSTM", "Embedding", "EmbeddingBag", "LayerNorm", "Bilinear"],
)
def test_layers_of_many_kinds_serve_as_examples(build):
    name = "weight_ih_l0" if isinstance(build(), nn.LSTM) else "weight"
    assert check_rule(Mirrored, examples=[tp.Example(build, tensor_name=name)], quick=True).passed


def test_nothing_is_left_behind():
    torch.manual_seed(7)
    random.seed(7)
    expected, number = torch.randn(3), random.random()
    torch.manual_seed(7)
    random.seed(7)
    filters = list(warnings.filters)
    with torch.no_grad(), torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            check_rule(Mirrored, quick=True)
            with pytest.raises(AssertionError):
                check_rule(Typo, quick=True)
            assert torch.get_default_dtype() is torch.float64
            assert torch.empty(0).is_meta
            assert not torch.is_grad_enabled()
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.randn(3), expected)
    assert random.random() == number
    assert warnings.filters == filters


def test_it_judges_where_assertions_are_left_out():
    code = (
        "import torch, tiedparam as tp\n"
        "from torch import nn\n"
        "class Wrong(tp.rules.FlipSym):\n"
        "    def symmetries(self, weight): yield weight.roll(1, 0)\n"
        "try: tp.testing.check_rule(Wrong, quick=True)\n"
        "except AssertionError as error: print(str(error).count('FAILS') > 2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-O", "-c", code],
        cwd=ROOT, check=True, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.stdout == "True\n"
