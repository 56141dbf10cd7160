"""Weight tying for stock PyTorch layers: one line puts a law on a weight.

``register_tie(model.conv, "flip_sym")`` stores only the free values, and the law holds bit
for bit through training, loading, copying and compiling. See `register_tie`.
"""

from tiedparam._cache import frozen
from tiedparam._checkpoint import dense_state_dict, tie_state_dict, untie_state_dict
from tiedparam._errors import TieError, TieWarning
from tiedparam._files import export_dense, load, save
from tiedparam._layout import Layout
from tiedparam._model import tie_model, untie_model
from tiedparam._optimizer_laws import register_optimizer
from tiedparam._owner import Owner, owner
from tiedparam._pictures import draw_orbits, draw_residuals, draw_scan, draw_weights
from tiedparam._plan import Plan, PlanEntry, read_plan, write_plan
from tiedparam._register import register_tie, remove_tie, residual
from tiedparam._registry import available_rules, register_rule
from tiedparam._report import Report, TieReport, report
from tiedparam._rule import Example, Rule
from tiedparam._scan import scan
from tiedparam._scan_report import ScanReport
from tiedparam._ties import get_tie, is_tied
from tiedparam._values import assign_, init_
from tiedparam._version import __version__

__all__ = [
    "Example",
    "Layout",
    "Owner",
    "Plan",
    "PlanEntry",
    "Report",
    "Rule",
    "ScanReport",
    "TieError",
    "TieReport",
    "TieWarning",
    "__version__",
    "assign_",
    "available_rules",
    "dense_state_dict",
    "draw_orbits",
    "draw_residuals",
    "draw_scan",
    "draw_weights",
    "export_dense",
    "frozen",
    "get_tie",
    "init_",
    "is_tied",
    "load",
    "owner",
    "read_plan",
    "register_optimizer",
    "register_rule",
    "register_tie",
    "remove_tie",
    "report",
    "residual",
    "save",
    "scan",
    "tie_model",
    "tie_state_dict",
    "untie_model",
    "untie_state_dict",
    "write_plan",
]

# last: a rule's file may import tiedparam itself
from tiedparam import rules as _rules

del _rules
