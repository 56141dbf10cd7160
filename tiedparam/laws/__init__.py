"""What a law is, and the kinds of law to derive from.

Knows tensors, layouts and what a layer holds; no ties, files or optimizers.
Public: `Rule` is the contract; `Orbits`, `Broadcast`, `Coded` and `Linked` are kinds of law to
derive from.
"""

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
