"""Names → rules: how a law is found, ours and the user's own alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary

from tiedparam.laws.rule import Rule
from tiedparam.laws.rule_table import RuleTable, why_unknown
from tiedparam.util.errors import TieError

_RULES: dict[str, type[Rule]] = {}
"""Those that were imported so far."""

_SIGNATURES: WeakKeyDictionary[type[Rule], inspect.Signature] = WeakKeyDictionary()
"""Of classes that were asked for: `scan` makes thousands of rules, of the same few classes."""


def _shipped() -> Mapping[str, str]:
    """The names of the library's own laws, which is what their files in ``rules`` are called."""
    # by name: ``rules`` imports this room, so that it cannot be done above
    names: Mapping[str, str] = import_module("tiedparam.rules").CLASSES
    return names


def _named(name: str) -> type[Rule] | None:
    """The rule of this name, or None; one of the library's own is imported now."""
    if name not in _RULES and name in _shipped():
        import_module(f"tiedparam.rules.{name}")
    return _RULES.get(name)


def _known() -> dict[str, type[Rule]]:
    """All rules by name."""
    for name in _shipped():
        _named(name)
    return _RULES


R = TypeVar("R", bound=type[Rule])


def register_rule(name: str) -> Callable[[R], R]:
    """Class decorator: make a `Rule` known under ``name``.

    Args:
        name: what users pass to `register_tie`.

    Raises:
        TypeError: if the decorated object is not a `Rule` subclass, if no name was given, or if
            `Rule.examples` or `Rule.variants` was overridden without ``@classmethod``.
        TieError: if another rule has that name already.

    Example:
        >>> @tp.register_rule("one_number")
        ... class OneNumber(tp.Rule):
        ...     law = "W[i] = w"
        ...     def free_shapes(self): return ((1,),)
        ...     def forward(self, w): return w.expand(self.bound_layout.shape)
        ...     def symmetries(self, weight): yield weight.roll(1)
        >>> layer = tp.register_tie(nn.Linear(4, 3), "one_number", "bias")
        >>> layer.parametrizations.bias.original0.shape
        torch.Size([1])
    """
    if not isinstance(name, str):
        raise TypeError("register_rule takes the rule's name: @tiedparam.register_rule('my_rule')")

    def enrol(rule: R) -> R:
        if not (isinstance(rule, type) and issubclass(rule, Rule)):
            raise TypeError(f"register_rule('{name}') decorates a subclass of tiedparam.Rule")
        for member in ("examples", "variants"):
            if not inspect.ismethod(getattr(rule, member)):
                raise TypeError(f"{rule.__qualname__}.{member} must be a classmethod")
        known = _named(name)
        # a reloaded module defines the same rule once more: that is a replacement
        if known is not None and _place(known) != _place(rule):
            raise TieError(
                f"'{name}'",
                f"the name '{name}' belongs to {known.__module__}.{known.__qualname__}.",
                "Choose another name for your rule.",
            )
        rule.name = name
        _RULES[name] = rule
        return rule

    return enrol


def _place(rule: type[Rule]) -> tuple[str, str]:
    return rule.__module__, rule.__qualname__


def available_rules() -> RuleTable:
    """All registered rules by name, in the order of their names; printed, a table of them.

    Returns:
        A new dictionary, with `rows`, `to_markdown` and `to_json` besides. For a name that it
        does not have, the ``KeyError`` says which are near.

    Example:
        >>> print(tp.available_rules())
        family ... rule ... law ... options ... meaning
        ---...
        repetition ... channel_shared ... W[o, c, x] = w[o, x] ... over='in', compute='auto' ...
        ...
        >>> tp.available_rules()["flip_sym"].law
        'W[i, j, x] = ±W[j, i, flip(x)]'
    """
    return RuleTable(sorted(_known().items()))


def find_rule(name: str) -> type[Rule]:
    """The rule registered as ``name``.

    Raises:
        TieError: if there is none; the message suggests the nearest names.
    """
    rule = _named(name)
    if rule is None:
        raise TieError(f"'{name}'", *why_unknown(name, _known()))
    return rule


# What a user states of a law ----------------------------------------------------------------------

Law = str | type[Rule] | Rule | tuple[str | type[Rule], Mapping[str, Any]]
"""A law in a list of laws. A pair is a name or class and its options."""


class Laws(Protocol):
    """A list of laws that hold together, as type checkers see it.

    A list of strings alone is none of ``list[Law]``, and a string is a sequence of strings.
    """

    def __iter__(self) -> Iterator[Law]:
        """The laws."""

    def copy(self) -> object:
        """What lists have, and strings have not."""


PART = ("rows", "columns")
"""The options by which any law takes a part of a tensor."""


def make_rule(rule: Any, options: Mapping[str, Any]) -> Rule:
    """A fresh rule from all that a user may state; an instance is given back.

    Args:
        rule: a name, a class, an instance, a pair of one and its options, or a list of such laws,
            which hold together.
        options: the rule's own, and ``rows`` and ``columns`` for a part of the tensor.

    Raises:
        TieError: if a name is not known, or an instance is bound already.
        TypeError: for anything else.
    """
    if is_pair(rule):
        rule, own = rule
        return make_rule(rule, {**own, **options})
    asked = [key for key in PART if key in options and not _takes(rule, key)]
    part = {key: options[key] for key in asked if options[key] is not None}
    options = {key: value for key, value in options.items() if key not in asked}
    if part:
        within: Any = find_rule("within")
        return cast(Rule, within(make_rule(rule, options), **part))
    if isinstance(rule, list):
        return _make_joint(rule, options)
    if isinstance(rule, Rule):
        if options:
            raise TypeError(
                f"options {sorted(options)} go with a rule's name or class, not with an instance"
            )
        if rule.layout is not None:
            raise TieError(
                f"this '{rule}'",
                f"this '{rule}' is bound to a tensor already.",
                "Make a new instance for every tensor.",
            )
        return rule
    if isinstance(rule, str):
        rule = find_rule(rule)
    if not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise TypeError(
            f"rule takes a name, a Rule subclass or a Rule, or a list of these, not {rule!r}"
        )
    name = rule.name or rule.__name__
    signature = signature_of(rule)
    try:
        signature.bind(**options)
    except TypeError as error:
        known = ", ".join(f"{option}=" for option in signature.parameters) or "none"
        raise TypeError(f"rule '{name}': {error}. Its options are: {known}.") from error
    return rule(**options)


def with_part(options: Mapping[str, Any], rows: Any, columns: Any) -> dict[str, Any]:
    """A rule's options, and the part of the tensor that it is for, where one was given."""
    part = {"rows": rows, "columns": columns}
    return {**options, **{key: given for key, given in part.items() if given is not None}}


def rule_class(rule: Any) -> type[Rule]:
    """The class of the rule that `make_rule` makes, without options for a part of a tensor.

    Raises:
        TieError: if a name is not known.
    """
    if isinstance(rule, list):
        return rule_class(rule[0]) if len(rule) == 1 else find_rule("joint")
    if is_pair(rule):
        return rule_class(rule[0])
    if isinstance(rule, Rule):
        return type(rule)
    kind: type[Rule] = find_rule(rule) if isinstance(rule, str) else rule
    return kind


def stated(rule: Rule) -> Any:
    """What makes a rule like this one: a law, or the pair of a law and its options."""
    law, options = rule.statement()
    return (law, options) if options else law


def law_text(law: Any) -> str:
    """A law as one writes it in a call."""
    if isinstance(law, list):
        return f"[{', '.join(map(law_text, law))}]"
    if isinstance(law, tuple):
        return f"({law_text(law[0])}, {law[1]!r})"
    return law.__name__ if isinstance(law, type) else repr(law)


def _make_joint(laws: list[Any], options: Mapping[str, Any]) -> Rule:
    if options:
        raise TypeError(
            f"options {sorted(options)} of a list of laws belong to one of them: write it as a "
            "pair, such as ('row_repeat', {'groups': 2})"
        )
    if not laws:
        raise TypeError("rule is an empty list. Give at least one law")
    joint: Any = find_rule("joint")
    return make_rule(laws[0], {}) if len(laws) == 1 else cast(Rule, joint(laws))


def is_pair(rule: Any) -> bool:
    """Whether it is a law and its options. In a file, a pair is a list."""
    return isinstance(rule, (tuple, list)) and len(rule) == 2 and isinstance(rule[1], Mapping)


def _takes(rule: Any, option: str) -> bool:
    """Whether it is the law's own option."""
    if isinstance(rule, str):
        rule = _named(rule)
    return isinstance(rule, type) and option in signature_of(rule).parameters


def signature_of(rule: type[Rule]) -> inspect.Signature:
    """The options of a law."""
    if rule not in _SIGNATURES:
        _SIGNATURES[rule] = inspect.signature(rule)
    return _SIGNATURES[rule]
