"""What ``help`` and editors show of a rule: the rule, and not what every layer has."""

from __future__ import annotations

import abc
import inspect
import pydoc
import re

import pytest
from torch import nn

import tiedparam as tp
from tiedparam.laws import Blocks, Broadcast, Orbits

LONGEST = 340
"""Lines of ``help(rule)``. Of a layer it has more than a thousand."""

RULES = {
    name: kind
    for name, kind in tp.available_rules().items()
    if kind.__module__.startswith("tiedparam.rules.")
}


def help_of(thing) -> str:
    """What ``help`` prints, without the strokes that make bold letters."""
    return pydoc.plain(pydoc.render_doc(thing))


def listed(text: str) -> set[str]:
    """The members that a text of ``help`` lists: names at the first level of its bar."""
    return set(re.findall(r"^ \|  (\w+)(?:\(| = |$)", text, re.MULTILINE))


def of_every_layer(kind: type) -> set[str]:
    """The members that a class has from `nn.Module` alone."""
    own = {name for base in kind.__mro__[: kind.__mro__.index(nn.Module)] for name in vars(base)}
    return vars(nn.Module).keys() - own


def made(name: str) -> tp.Rule:
    """A rule that is tied to nothing yet."""
    return RULES[name](**RULES[name].examples()[0].options)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("of", ["the class", "an object", "its path"])
def test_help_shows_the_rule(name, of):
    kind = RULES[name]
    path = f"{kind.__module__}.{kind.__qualname__}"
    text = help_of({"the class": kind, "an object": made(name), "its path": path}[of])
    docstring = inspect.getdoc(kind)
    call, explained, _ = text.partition(docstring.splitlines()[0])
    assert explained
    for option in inspect.signature(kind).parameters:
        assert re.search(rf"\b{option}: ", call)
        said = re.search(rf"^    {option}: \S", docstring, re.MULTILINE)
        assert said or option == "compute", "the docstring says in 'Args:' what it is"
    assert f"law = {kind.law!r}"[:60] in text  # pydoc cuts long values
    assert "``free``" in text or "free values" in text.split("Method resolution")[0]
    assert ">>> " in text
    own = {n for n, value in vars(kind).items() if callable(value) and n[0] != "_"}
    assert own | {"project", "free_count", "free_shapes", "options", "symmetries"} <= listed(text)
    assert "Initialize internal Module state" not in text
    assert len(text.splitlines()) < LONGEST


@pytest.mark.parametrize("name", RULES)
def test_help_shows_nothing_that_every_layer_has(name):
    hidden = of_every_layer(RULES[name])
    assert {"register_forward_hook", "cuda", "state_dict", "__call__", "dump_patches"} <= hidden
    for thing in (RULES[name], made(name)):
        assert not listed(help_of(thing)) & hidden
        assert "inherited from torch" not in help_of(thing)
    assert not hidden & {*dir(RULES[name])}


class Abstract(abc.ABC):
    @abc.abstractmethod
    def period(self): ...


class Named(type(tp.Rule)):
    """A metaclass of a user's own."""


class Smooth(nn.Module):
    def smoothness(self):
        """How smooth it is."""


def of_a_user(**more):
    class Mine(tp.Rule, *more.pop("bases", ()), **more):
        """My law."""

        law = "W = w"

        def period(self):
            """How often it repeats."""

        def extra_repr(self):
            """What nn.Module has as well."""

    return Mine


@pytest.mark.parametrize(
    "more",
    [{}, {"bases": (Abstract,)}, {"metaclass": Named}, {"bases": (Smooth,)}],
    ids=["plain", "abstract base", "own metaclass", "another layer as base"],
)
def test_help_of_a_users_rule(more):
    smooth = Smooth in more.get("bases", ())
    text = help_of(of_a_user(**more))
    assert {"law", "period", "extra_repr", "project"} <= listed(text)
    assert ("smoothness" in listed(text)) is smooth
    assert not listed(text) & {"cuda", "register_forward_hook", "__abstractmethods__"}


ASKED_BY_THE_LIBRARY = {"bind", "find_pattern", "law_key", "numbers_of_law", "why_no_such_cells"}
STATED_OR_GIVEN = {
    "law", "family", "check", "symmetries", "free_shapes", "forward", "variants", "examples",
    "cell", "project", "residual", "right_inverse", "free_count", "multiplicities",
    "orbit_labels", "adjoint",
}  # fmt: skip


def test_help_of_a_users_law_has_what_it_may_state_and_not_what_the_library_asks():
    class Mirrored(Orbits):
        """Rows read the same backwards."""

        law = "W = flip(W)"

        def symmetries(self, weight):
            yield weight.flip(1)

    shown = listed(help_of(Mirrored))
    assert shown >= STATED_OR_GIVEN
    assert not shown & ASKED_BY_THE_LIBRARY
    assert {*dir(Mirrored()), *dir(Orbits)} >= ASKED_BY_THE_LIBRARY  # they are there, and its own


def test_help_shows_what_a_users_law_defines_whatever_it_is_called():
    class Named(tp.Rule):
        """A law with a method of its own that has the name of one of the library's."""

        law = "W = w"

        def law_key(self):
            """What it depends on."""

        def read_from(self):
            """Where it comes from."""

    class Derived(Named):
        """The same."""

    for kind in (Named, Derived):
        assert {"law_key", "read_from"} <= listed(help_of(kind))


def test_an_abstract_rule_is_not_made():
    class Part(tp.Rule, Abstract):
        pass

    with pytest.raises(TypeError, match="period"):
        Part()


@pytest.mark.parametrize("name", RULES)
def test_of_an_object_every_name_is_listed(name):
    rule = made(name)
    rule.register_buffer("table", None, persistent=False)
    assert {*dir(nn.Module())} | {"table", "law", "project"} <= {*dir(rule)}


def test_editors_see_the_options():
    over, compute = inspect.signature(RULES["channel_shared"]).parameters.values()
    assert (over.name, over.default, compute.name) == ("over", "in", "compute")
    assert list(inspect.signature(RULES["copy"]).parameters) == ["source", "source_name", "fn"]
    assert not inspect.signature(RULES["persymmetric"]).parameters
    assert inspect.getdoc(RULES["flip_sym"]).startswith("A kernel that is its own flip-transpose")


def test_help_of_a_law_that_repeats_a_base_has_no_forms():
    class EqualInputs(Broadcast):
        """Every input counts the same."""

        law = "W[o, c] = w[o]"

        def blocks(self):
            return Blocks(self.bound_layout.shape[:1], self.bound_layout.shape[1:], shared=(1,))

    shown = listed(help_of(EqualInputs))
    assert {"blocks", "reduction"} <= shown
    assert not shown & {"by_sums", "by_windows"}
