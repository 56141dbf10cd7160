"""A rule of one's own: about ten lines, and the same contract as the rules of the library."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.cases import assert_lawful, assert_refused, cases_of
from tests.support.users_laws import Circulant, OddKernel
from tiedparam.laws import Blocks, Broadcast
from tiedparam.laws import registry as _registry
from tiedparam.testing import check_rule

RULES = {"users_circulant": Circulant, "odd_kernel": OddKernel}
CASES = [case for rule in RULES.values() for case in cases_of(rule)]


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """Known in this module only: other modules speak of the library's rules."""
    known = dict(_registry._RULES)
    for name, rule in RULES.items():
        assert tp.register_rule(name)(rule) is rule
    yield
    _registry._RULES.clear()
    _registry._RULES.update(known)
    for rule in RULES.values():
        rule.name = ""


# The contract --------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.__name__)
def test_contract(rule):
    assert len(check_rule(rule).examples) == len(rule.examples())


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("given", ["name", "class", "instance"])
def test_rule_may_be_given_in_three_ways(case, given):
    rule = {"name": case.name, "class": case.rule, "instance": case.rule()}[given]
    host, expected = case.dense(), case.tied()
    tp.register_tie(host.layer, rule)
    assert torch.equal(host.weight, expected.weight)
    assert_lawful(host)
    if given == "instance":
        assert host.rule is rule


def test_literal_circulant():
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 3.0, 6.0], [2.0, 3.0, 0.0], [9.0, 7.0, 3.0]]))
    tp.register_tie(layer, "users_circulant")
    assert layer.weight.tolist() == [[2.0, 4.0, 5.0], [5.0, 2.0, 4.0], [4.0, 5.0, 2.0]]
    assert tp.get_tie(layer).orbit_labels().tolist() == [[1, 2, 3], [3, 1, 2], [2, 3, 1]]


def test_literal_signed_rule():
    layer = nn.Conv1d(1, 1, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[1.0, 5.0, 3.0, 7.0]]]))
    tp.register_tie(layer, "odd_kernel")
    assert layer.weight.tolist() == [[[-3.0, 1.0, -1.0, 3.0]]]
    assert tp.get_tie(layer).orbit_labels().tolist() == [[[-2, -1, 1, 2]]]
    assert tp.get_tie(layer).multiplicities()[0].tolist() == [[[2.0, 2.0]]]
    layer(torch.tensor([[1.0, 10.0, 100.0, 1000.0]])).sum().backward()
    (free,) = layer.parametrizations.weight.parameters()
    assert free.tolist() == [[[-1.0, 3.0]]]
    assert free.grad.tolist() == [[[90.0, 999.0]]]
    tp.init_(layer, nn.init.ones_)
    assert layer.weight.tolist() == [[[1.0, 1.0, -1.0, -1.0]]]


@pytest.mark.parametrize(
    ("outputs", "rest"),
    [((4,), (2, 2)), ((4,), (2,)), ((3,), (4,)), ((2, 2), (4, 1)), ((4,), ((2, 3),))],
)
def test_blocks_that_are_not_those_of_the_weight_are_refused(registry, outputs, rest):
    @tp.register_rule("test_paired_inputs")
    class PairedInputs(Broadcast):
        law = "W[o, 2i] = W[o, 2i+1]"

        def blocks(self):
            return Blocks(outputs, rest, shared=(len(outputs),))

    layer = nn.Linear(4, 4)
    with pytest.raises(tp.TieError, match=r"its blocks\(\) give .* canonical weight is \(4, 4\)"):
        tp.register_tie(layer, "test_paired_inputs")
    assert not tp.is_tied(layer)


def test_blocks_may_split_every_axis(registry):
    @tp.register_rule("test_paired")
    class Paired(Broadcast):
        law = "W[o, 2i + a, 2x + b] = w[o, i, x]"

        def blocks(self):
            outputs, inputs, size = self.bound_layout.canonical_shape
            return Blocks((outputs,), ((inputs // 2, 2), (size // 2, 2)), shared=(2, 4))

    for layer in (nn.Conv1d(8, 3, 4), nn.ConvTranspose1d(8, 6, 4, groups=2)):
        dense = layer.weight.detach().clone()
        tp.register_tie(layer, "test_paired")
        layout, base = tp.get_tie(layer).bound_layout, layer.parametrizations.weight.original0
        weight = layout.canonical(layer.weight.detach())
        assert base.shape == (weight.shape[0], weight.shape[1] // 2, 2)
        assert torch.equal(base.repeat_interleave(2, 1).repeat_interleave(2, 2), weight)
        pairs = layout.canonical(dense).unflatten(2, (2, 2)).unflatten(1, (-1, 2))
        torch.testing.assert_close(base, pairs.mean((2, 4)))


def test_check_gives_the_reason():
    assert_refused(
        nn.Linear(3, 4),
        "users_circulant",
        "cannot tie 'weight' of Linear(in_features=3, out_features=4",
        "by 'users_circulant': a circulant matrix is square, not (4, 3). "
        "Tie a square Linear layer.",
    )
    assert_refused(nn.Conv1d(1, 1, 3), "odd_kernel", "the kernel (3,) has a centre")


def test_pickle_and_remove():
    layer = tp.register_tie(nn.Linear(4, 4), "users_circulant")
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again.weight, layer.weight)
    assert type(tp.get_tie(again)) is Circulant
    tp.remove_tie(again)
    assert type(again) is nn.Linear
    assert torch.equal(again.weight, layer.weight)


# Names ---------------------------------------------------------------------------------------


def test_registered_rules_are_found():
    assert tp.available_rules()["users_circulant"] is Circulant
    assert Circulant.name == "users_circulant"
    assert list(tp.available_rules()) == sorted(tp.available_rules())
    with pytest.raises(KeyError, match=r"no rule 'flip_symm'\. Did you mean 'flip_sym' or "):
        tp.available_rules()["flip_symm"]
    assert tp.available_rules().get("flip_symm") is None
    with pytest.raises(tp.TieError, match="'circulant'"):
        tp.register_tie(nn.Linear(3, 3), "circulent")


def test_available_rules_is_a_copy():
    tp.available_rules().clear()
    assert "users_circulant" in tp.available_rules()


@pytest.mark.parametrize("name", ["users_circulant", "flip_sym"])
def test_duplicate_names_are_refused(registry, name):
    owner = tp.available_rules()[name]

    class Another(tp.Rule):
        pass

    with pytest.raises(tp.TieError, match="Choose another name") as caught:
        tp.register_rule(name)(Another)
    assert owner.__name__ in str(caught.value)
    assert tp.available_rules()[name] is owner
    assert Another.name == ""


def test_a_namesake_from_another_module_is_refused_as_well(registry):
    """A class of the same name is another rule: it must not replace ours in silence."""
    owner = tp.available_rules()["copy"]

    class Namesake(tp.Rule):
        pass

    Namesake.__name__ = Namesake.__qualname__ = owner.__qualname__
    assert Namesake.__module__ != owner.__module__
    with pytest.raises(tp.TieError, match="Choose another name"):
        tp.register_rule("copy")(Namesake)
    assert tp.available_rules()["copy"] is owner


@pytest.mark.parametrize(
    "thing",
    [nn.Linear, int, 3, lambda: None, Circulant()],
    ids=["layer", "type", "number", "function", "instance"],
)
def test_only_rules_can_be_registered(registry, thing):
    before = tp.available_rules()
    with pytest.raises(TypeError, match=r"tiedparam\.Rule"):
        tp.register_rule("thing")(thing)
    assert tp.available_rules() == before


FILE = """
import torch, tiedparam

@tiedparam.register_rule("constant")
class Constant(tiedparam.Rule):
    law = "W[...] = w"
    def free_shapes(self):
        return ((1,),)
    def forward(self, free):
        return free.expand(self.bound_layout.shape)
    def symmetries(self, weight):
        yield weight.flatten()[:1].expand(weight.shape)
"""


def test_a_file_of_ten_lines_can_be_imported_and_reloaded(registry, tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rules", raising=False)
    module = importlib.import_module("my_rules")
    first = tp.available_rules()["constant"]
    assert first is module.Constant
    layer = nn.Linear(3, 4)
    mean = layer.weight.detach().double().mean()
    tp.register_tie(layer, "constant")
    assert layer.weight.unique().numel() == 1
    assert float(layer.weight.detach()[0, 0]) == pytest.approx(float(mean), rel=1e-5)

    importlib.reload(module)
    second = tp.available_rules()["constant"]
    assert second is module.Constant
    assert second is not first
    assert isinstance(tp.get_tie(layer), first)  # what is tied stays tied
    layer(torch.randn(2, 3)).sum().backward()
    tp.register_tie(nn.Linear(3, 4), "constant")
    monkeypatch.delitem(sys.modules, "my_rules")


# Rules that cannot be used are refused before anything is touched ----------------------------


class Faulty(Circulant):
    """Circulant, until a test breaks it."""

    def right_inverse(self, weight):
        self.bind_shape(weight)
        return (weight[0].clone(),)


def returns(value):
    return lambda self, free: value(free)


def raises(error):
    def forward(self, free):
        raise error

    return forward


@pytest.mark.parametrize(
    ("forward", "parts"),
    [
        (returns(lambda w: w), ["forward returns (3,), and the tensor is (3, 3)", "Correct"]),
        (returns(lambda w: w.expand(4, 3)), ["forward returns (4, 3), and the tensor is (3, 3)"]),
        (returns(lambda w: w.expand(3, 3).double()), ["not torch.float32", "Correct the rule"]),
        (returns(lambda w: w.expand(3, 3).half()), ["not torch.float32", "Correct the rule"]),
        (returns(lambda w: w.tolist()), ["forward returns list", "Correct the rule"]),
        (returns(lambda w: None), ["forward returns NoneType", "Correct the rule"]),
        (raises(ValueError("no such thing")), ["the rule raised ValueError: no such thing"]),
        (raises(AttributeError("no 'weight'")), ["the rule raised AttributeError: no 'weight'"]),
        (returns(lambda w: w.missing), ["the rule raised AttributeError", "missing"]),
    ],
    ids=["shape", "rows", "double", "half", "list", "nothing", "value", "attribute", "typo"],
)
@pytest.mark.parametrize("given", ["class", "instance"])
def test_s26_a_rule_with_a_faulty_forward_is_refused(given, forward, parts):
    kind = type("Broken", (Faulty,), {"forward": forward})
    layer = nn.Linear(3, 3)
    rule = kind if given == "class" else kind()
    assert_refused(layer, rule, "cannot tie 'weight' of Linear", *parts)
    tp.register_tie(layer, "users_circulant")  # and nothing is left that would stop another tie


def test_a_rule_without_a_law_is_refused():
    class Empty(tp.Rule):
        pass

    assert_refused(nn.Linear(3, 3), Empty, "must say the shapes of its free values")

    class NoForward(Empty):
        def free_shapes(self):
            return ((1,),)

    assert_refused(nn.Linear(3, 3), NoForward, "must expand its free values")


@pytest.mark.parametrize(
    ("right_inverse", "part"),
    [
        (lambda self, weight: (weight[0].clone(), weight[1].clone()), "free_shapes say (3,)"),
        (lambda self, weight: (), "returns nothing, and its free_shapes say (3,)"),
        (lambda self, weight: weight[0].clone(), "its right_inverse returns a tensor"),  # S17
        (lambda self, weight: (weight[0].double(),), "torch.float32"),
    ],
    ids=["too many", "too few", "no sequence", "dtype"],
)
def test_a_rule_with_a_faulty_right_inverse_is_refused(right_inverse, part):
    kind = type("Broken", (Circulant,), {"right_inverse": right_inverse})
    assert_refused(nn.Linear(3, 3), kind, "cannot tie 'weight' of Linear", part)


def test_a_rule_that_stores_another_dtype_is_refused():
    class Wide(Circulant):
        def forward(self, free):
            return super().forward(free.float())

        def right_inverse(self, weight):
            return (weight[0].double(),)

    assert_refused(nn.Linear(3, 3), Wide, "its free values are not torch.float32")


def test_a_rule_with_an_empty_free_value_is_refused():
    class Padded(Circulant):
        def free_shapes(self):
            return (*super().free_shapes(), (0, 3))

        def forward(self, free, nothing):
            return super().forward(free)

        def right_inverse(self, weight):
            return weight[0].clone(), weight.new_zeros(0, 3)

    # FSDP2 raises on empty parameters
    assert_refused(nn.Linear(3, 3), Padded, "one of its free values is empty", "free_shapes")


def test_a_rule_that_was_refused_may_fit_elsewhere():
    rule = Circulant()
    assert_refused(nn.Linear(3, 3), rule, "breaks the law", init="exact")
    assert_refused(nn.Linear(3, 4), rule, "is square")
    layer = tp.register_tie(nn.Linear(5, 5), rule)
    assert tp.get_tie(layer) is rule
    assert rule.bound_layout.shape == (5, 5)


def test_half_precision_is_a_rules_own_business():
    class Widening(Faulty):
        def forward(self, free):
            return super().forward(free.float())

    layer = nn.Linear(3, 3, dtype=torch.bfloat16)
    assert_refused(layer, Widening, "not torch.bfloat16")
    tp.register_tie(nn.Linear(3, 3), Widening)


# What is derived from forward -----------------------------------------------------------------


class Rounding(Circulant):
    """Lawful up to rounding only."""

    def forward(self, free):
        weight = super().forward(free)
        return torch.cat([weight[:1], weight[1:] * (1 + torch.finfo(weight.dtype).eps)])


class OneSign(OddKernel):
    """Forgets the sign of the mirrored half in its labels."""

    def orbit_labels(self):
        return super().orbit_labels().abs()


class Mixing(Circulant):
    """Every entry is the mean of two free values: no orbits, and no orbit means."""

    def forward(self, free):
        return (super().forward(free) + super().forward(free.roll(1))) / 2


class Doubling(Circulant):
    """Twice the stored value."""

    def forward(self, free):
        return 2 * super().forward(free)


class Squaring(Circulant):
    """Not linear."""

    def forward(self, free):
        return super().forward(free).square()


@pytest.mark.parametrize("rule", [Rounding, OneSign, Mixing, Doubling, Squaring])
def test_what_is_derived_from_forward_is_refused_where_it_would_be_wrong(rule):
    layer = nn.Linear(4, 4)
    if rule is OneSign:
        layer = OddKernel.examples()[0].build()
    with pytest.raises(tp.TieError, match="scales or mixes its free values; override right_inver"):
        tp.register_tie(layer, rule)
    assert not tp.is_tied(layer)


@pytest.mark.parametrize("member", ["examples", "variants"])
def test_what_must_be_a_classmethod_is_checked(registry, member):
    kind = type("Mine", (Circulant,), {member: lambda self, *args: ()})
    with pytest.raises(TypeError, match=f"Mine.{member} must be a classmethod"):
        tp.register_rule("mine")(kind)
    assert "mine" not in tp.available_rules()


def test_register_rule_needs_a_name():
    with pytest.raises(TypeError, match="takes the rule's name"):
        tp.register_rule(Circulant)


@pytest.mark.slow
def test_a_rule_in_a_file_of_the_library_may_import_tiedparam():
    """``import tiedparam as tp`` at its top, as users write it, while the rules are imported."""
    code = (
        "import sys, types, tiedparam.rules as rules\n"
        "import importlib, tiedparam\n"
        "for name in [n for n in sys.modules if n.startswith('tiedparam')]: del sys.modules[name]\n"
        "import importlib.abc, importlib.machinery\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'tiedparam.rules.copy':\n"
        "            import tiedparam as tp\n"
        "            assert tp.register_rule and tp.Rule and tp.Example\n"
        "            print('seen')\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import tiedparam\n"
        "assert 'copy' in tiedparam.available_rules()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "seen\n"
