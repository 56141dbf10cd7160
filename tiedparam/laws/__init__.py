"""What a law is, and the kinds of law to derive from.

Knows tensors, layouts and what a layer holds; no ties, files or optimizers.
Public: `Rule` is the contract; `Orbits`, `Broadcast`, `Coded` and `Linked` are kinds of law to
derive from.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiedparam.laws.broadcast import Blocks, Broadcast, Compute
    from tiedparam.laws.coded import Coded
    from tiedparam.laws.example import Example
    from tiedparam.laws.forms import Call, Use, form
    from tiedparam.laws.layout import Layout
    from tiedparam.laws.linked import Linked
    from tiedparam.laws.orbits import Orbits
    from tiedparam.laws.reduction import Reduction
    from tiedparam.laws.registry import available_rules, register_rule
    from tiedparam.laws.rule import Rule
    from tiedparam.laws.times import Making
    from tiedparam.util.errors import Reason

__all__ = [
    "Blocks",
    "Broadcast",
    "Call",
    "Coded",
    "Compute",
    "Example",
    "Layout",
    "Linked",
    "Making",
    "Orbits",
    "Reason",
    "Reduction",
    "Rule",
    "Use",
    "available_rules",
    "form",
    "register_rule",
]

_PLACES = {
    "Blocks": "laws.broadcast",
    "Broadcast": "laws.broadcast",
    "Compute": "laws.broadcast",
    "Coded": "laws.coded",
    "Example": "laws.example",
    "Call": "laws.forms",
    "Use": "laws.forms",
    "form": "laws.forms",
    "Layout": "laws.layout",
    "Linked": "laws.linked",
    "Orbits": "laws.orbits",
    "Reduction": "laws.reduction",
    "available_rules": "laws.registry",
    "register_rule": "laws.registry",
    "Rule": "laws.rule",
    "Making": "laws.times",
    "Reason": "util.errors",
}


# Modules are imported when their names are first asked for: a tie needs few of them.
def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'tiedparam.laws' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"tiedparam.{_PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
