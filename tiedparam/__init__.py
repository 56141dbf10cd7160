"""Weight tying for stock PyTorch layers: one line puts a law on a weight.

``register_tie(model.conv, "flip_sym")`` stores only the free values, and the law holds bit
for bit through training, loading, copying and compiling. See `register_tie`.
"""

from tiedparam import rules as _rules
from tiedparam._cache import frozen
from tiedparam._checkpoint import dense_state_dict, tie_state_dict, untie_state_dict
from tiedparam._errors import TieError, TieWarning
from tiedparam._layout import Layout
from tiedparam._register import register_tie, remove_tie, residual
from tiedparam._registry import available_rules, register_rule
from tiedparam._rule import Example, Rule
from tiedparam._ties import get_tie, is_tied
from tiedparam._values import assign_, init_
from tiedparam._version import __version__

del _rules

__all__ = [
    "Example",
    "Layout",
    "Rule",
    "TieError",
    "TieWarning",
    "__version__",
    "assign_",
    "available_rules",
    "dense_state_dict",
    "frozen",
    "get_tie",
    "init_",
    "is_tied",
    "register_rule",
    "register_tie",
    "remove_tie",
    "residual",
    "tie_state_dict",
    "untie_state_dict",
]
