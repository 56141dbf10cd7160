"""The rule contract, over every registered rule and each of its examples.

A rule is enrolled by being registered. The statements stand in ``tiedparam/testing``. To
run those of one law: ``pytest -k "contract and [flip_sym-"``.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

import tiedparam as tp
from tests.support.cases import (
    CASES,
    CASES_OF_COPIES,
    CASES_WITH_FITTED_VALUES,
    CASES_WITH_FREE_VALUES,
    COMPUTE,
    FIRST_CASES,
    Case,
    assert_satisfies,
    canonical_entries,
    first_ones_fast,
    law_holds_after_100_steps_of,
    sample_input,
)
from tiedparam.testing import STATEMENTS, Statement

pytestmark = [
    pytest.mark.filterwarnings("error::tiedparam.TieWarning"),
    # small examples of laws with few values
    pytest.mark.filterwarnings("ignore:the tie of .* keeps :tiedparam.TieWarning"),
]


def _is_canonical(case: Case) -> bool:
    layer = case.dense().layer
    return not isinstance(layer, _ConvNd) or (layer.groups == 1 and not layer.transposed)


CANONICAL_CASES = [case for case in CASES_WITH_FREE_VALUES if _is_canonical(case)]


def statements_of(kind: str) -> list[Statement]:
    return [statement for statement in STATEMENTS.values() if statement.kind == kind]


def name_of(statement: Statement) -> str:
    return statement.name


@pytest.mark.parametrize("statement", statements_of("every law"), ids=name_of)
@pytest.mark.parametrize("case", first_ones_fast(CASES), ids=str)
def test_every_rule(case, statement):
    statement(case)


@pytest.mark.parametrize("statement", statements_of("laws with values"), ids=name_of)
@pytest.mark.parametrize("case", first_ones_fast(CASES_WITH_FREE_VALUES), ids=str)
def test_rule_with_free_values(case, statement):
    statement(case)


@pytest.mark.parametrize("statement", statements_of("laws with fitted values"), ids=name_of)
@pytest.mark.parametrize("case", first_ones_fast(CASES_WITH_FITTED_VALUES), ids=str)
def test_rule_with_fitted_values(case, statement):
    statement(case)


@pytest.mark.parametrize("statement", statements_of("copies"), ids=name_of)
@pytest.mark.parametrize("case", first_ones_fast(CASES_OF_COPIES), ids=str)
def test_copy(case, statement):
    statement(case)


def test_every_rule_is_enrolled():
    rules = tp.available_rules()
    assert rules.keys() >= {"channel_shared", "copy", "flip_sym", "row_repeat", "squared_copy"}
    assert {case.name for case in CASES} == rules.keys()
    # what `pytest -k "contract and [flip_sym-"` goes by
    assert all(str(case).startswith(f"{case.name}-") for case in CASES)
    assert len(set(map(str, CASES))) == len(CASES)
    kinds = {statement.kind for statement in STATEMENTS.values()}
    # each has its test above
    assert kinds == {"every law", "laws with values", "laws with fitted values", "copies"}
    for name, rule in rules.items():
        assert rule.name == name
        assert "=" in rule.law
        assert rule.__doc__
    copies = {"copy", "squared_copy", "transposed_copy"}
    assert {case.name for case in CASES_OF_COPIES} == copies
    # a rule with free values must also work for those who use torch's own function
    enrolled = {case.name for case in CASES_WITH_FREE_VALUES}
    assert {case.name for case in CANONICAL_CASES} == enrolled


@pytest.mark.feature(
    "Other parametrizations", "a rule given to `parametrize.register_parametrization`"
)
@pytest.mark.parametrize("case", CANONICAL_CASES, ids=str)
def test_rule_is_an_ordinary_parametrization(case):
    host = case.dense()
    rule = case.rule(**case.example.options)
    parametrize.register_parametrization(host.layer, host.tensor_name, rule)
    assert torch.equal(host.weight, case.tied().weight)
    assert_satisfies(rule, host.weight)
    host.layer(*sample_input(host.layer)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in host.free)


@pytest.mark.slow
@pytest.mark.feature(
    "Optimizers", "SGD, Adam, AdamW, single-tensor, foreach and fused: the law after 100 steps"
)
@pytest.mark.parametrize("variant", ["single", "foreach", "fused"])
@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_law_holds_under_every_optimizer(case, kind, variant):
    law_holds_after_100_steps_of(kind, variant, case)


@pytest.mark.slow
@pytest.mark.feature(
    "Compile and export", "`torch.compile` with inductor: a training step of every rule"
)
@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_inductor_compiles_a_training_step(case):
    torch._dynamo.reset()
    host = case.tied()
    inputs = sample_input(host.layer)
    compiled = torch.compile(host.layer, fullgraph=True)
    losses = []
    for layer in (host.layer, compiled):
        host.model.zero_grad()
        output = layer(*inputs)
        output.square().sum().backward()
        losses.append([output.detach()] + [p.grad.clone() for p in host.layer.parameters()])
    torch.testing.assert_close(losses[1], losses[0], **COMPUTE[torch.float32])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "kind", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d], ids=lambda k: k.__name__
)
def test_canonical_entries_are_what_the_layer_computes(kind, groups):
    layer = kind(4, 6, 3, groups=groups, bias=False, dtype=torch.float64)
    entries = canonical_entries(layer)
    dims = len(layer.kernel_size)
    # the answer to one impulse in one channel is the kernel, which a convolution mirrors
    size = 1 if isinstance(layer, _ConvTransposeNd) else 5
    seen = 0
    for channel in range(4):
        impulse = torch.zeros(1, 4, *[size] * dims, dtype=torch.float64)
        impulse[(0, channel, *[size // 2] * dims)] = 1
        answer = layer(impulse)[0]
        if not isinstance(layer, _ConvTransposeNd):
            answer = answer.flip(tuple(range(1, dims + 1)))
        for output, *position in itertools.product(*map(range, answer.shape)):
            own_group = output // (6 // groups) == channel // (4 // groups)
            index = (output, channel % (4 // groups), *position)
            assert answer[(output, *position)] == (entries[index] if own_group else 0)
            seen += own_group
    assert seen == len(entries) == layer.weight.numel()
