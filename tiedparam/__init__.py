"""Weight tying for stock PyTorch layers: one line puts a law on a weight.

``register_tie(model.conv, "flip_sym")`` stores only the free values, and the law holds bit
for bit through training, loading, copying and compiling. See `register_tie`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tiedparam._version import __version__
from tiedparam.compute.frozen import frozen
from tiedparam.laws.layout import Layout
from tiedparam.laws.registry import available_rules, register_rule
from tiedparam.laws.rule import Example, Rule
from tiedparam.layer.free_values import free_values
from tiedparam.layer.register import register_tie
from tiedparam.layer.remove import remove_tie
from tiedparam.layer.residual import residual
from tiedparam.layer.values import assign_, init_
from tiedparam.state.dictionaries import dense_state_dict, tie_state_dict, untie_state_dict
from tiedparam.state.optimizer_laws import register_optimizer
from tiedparam.tie.lookup import get_tie, is_tied
from tiedparam.tie.owner import Owner, owner
from tiedparam.util.errors import TieError, TieWarning

if TYPE_CHECKING:
    from tiedparam import testing as testing
    from tiedparam.files.export import export_dense
    from tiedparam.files.load import load
    from tiedparam.files.save import save
    from tiedparam.model.pictures import draw_orbits, draw_residuals, draw_scan, draw_weights
    from tiedparam.model.plan import Plan, PlanEntry
    from tiedparam.model.plan_file import read_plan, write_plan
    from tiedparam.model.report import Report, TieReport, report
    from tiedparam.model.scan import scan
    from tiedparam.model.scan_report import ScanReport
    from tiedparam.model.tie_model import tie_model, untie_model

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
    "free_values",
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

# The rooms of whole models and of files are entered when they are first asked for: that halves
# the time of an import.
_LATER = {
    "export_dense": "tiedparam.files.export",
    "load": "tiedparam.files.load",
    "save": "tiedparam.files.save",
    "draw_orbits": "tiedparam.model.pictures",
    "draw_residuals": "tiedparam.model.pictures",
    "draw_scan": "tiedparam.model.pictures",
    "draw_weights": "tiedparam.model.pictures",
    "Plan": "tiedparam.model.plan",
    "PlanEntry": "tiedparam.model.plan",
    "read_plan": "tiedparam.model.plan_file",
    "write_plan": "tiedparam.model.plan_file",
    "Report": "tiedparam.model.report",
    "TieReport": "tiedparam.model.report",
    "report": "tiedparam.model.report",
    "scan": "tiedparam.model.scan",
    "ScanReport": "tiedparam.model.scan_report",
    "tie_model": "tiedparam.model.tie_model",
    "untie_model": "tiedparam.model.tie_model",
}


def __getattr__(name: str) -> Any:
    if name == "testing":
        return import_module("tiedparam.testing")
    if name not in _LATER:
        raise AttributeError(f"module 'tiedparam' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LATER[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "testing"})


import_module("tiedparam.rules")  # last: a rule's file may import tiedparam itself
