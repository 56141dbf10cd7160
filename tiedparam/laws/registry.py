"""Names → rules: how a law is found, ours and the user's own alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from tiedparam.laws.rule import Rule
from tiedparam.laws.rule_table import RuleTable, why_unknown
from tiedparam.util.errors import TieError

_RULES: dict[str, type[Rule]] = {}

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
        known = _RULES.get(name)
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
        rule ... law ... options ... meaning
        ---...
        channel_shared ... W[o, c, x] = w[o, x] ... over='in', compute='auto' ... The same filter...
        ...
        >>> tp.available_rules()["flip_sym"].law
        'W[i, j, x] = W[j, i, flip(x)]'
    """
    return RuleTable(sorted(_RULES.items()))


def find_rule(name: str) -> type[Rule]:
    """The rule registered as ``name``.

    Raises:
        TieError: if there is none; the message suggests the nearest names.
    """
    if name in _RULES:
        return _RULES[name]
    raise TieError(f"'{name}'", *why_unknown(name, _RULES))


def make_rule(rule: str | type[Rule] | Rule, options: dict[str, Any]) -> Rule:
    """A fresh rule from a name or a class, or the given one."""
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
        raise TypeError(f"rule takes a name, a Rule subclass or a Rule, not {rule!r}")
    name = rule.name or rule.__name__
    signature = inspect.signature(rule)
    try:
        signature.bind(**options)
    except TypeError as error:
        known = ", ".join(f"{option}=" for option in signature.parameters) or "none"
        raise TypeError(f"rule '{name}': {error}. Its options are: {known}.") from error
    return rule(**options)
