"""Weight tying for stock PyTorch layers: one line puts a law on a weight.

``register_tie(model.conv, "flip_sym")`` stores only the free values, and the law holds bit
for bit through training, loading, copying and compiling. See `register_tie`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tiedparam._version import __version__

if TYPE_CHECKING:
    from tiedparam import laws as laws
    from tiedparam import rules as rules
    from tiedparam import testing as testing
    from tiedparam.compute.frozen import frozen
    from tiedparam.files.export import export_dense
    from tiedparam.files.load import load
    from tiedparam.files.save import save
    from tiedparam.laws.example import Example
    from tiedparam.laws.layout import Layout
    from tiedparam.laws.registry import available_rules, register_rule
    from tiedparam.laws.rule import Rule
    from tiedparam.layer.export_gqa import export_gqa
    from tiedparam.layer.free_values import free_values
    from tiedparam.layer.recluster import recluster
    from tiedparam.layer.register import register_tie
    from tiedparam.layer.remove import remove_tie
    from tiedparam.layer.residual import residual
    from tiedparam.layer.tie_bank import tie_bank
    from tiedparam.layer.values import assign_, init_
    from tiedparam.model.pictures import draw_orbits, draw_weights
    from tiedparam.model.plan import Plan, PlanEntry
    from tiedparam.model.plan_file import read_plan, write_plan
    from tiedparam.model.report import Report, TieReport, report
    from tiedparam.model.scan import scan
    from tiedparam.model.scan_pictures import draw_residuals, draw_scan
    from tiedparam.model.scan_report import ScanReport
    from tiedparam.model.share_heads import share_heads
    from tiedparam.model.tie_block import tie_block
    from tiedparam.model.tie_model import tie_model, untie_model
    from tiedparam.model.tune import tune
    from tiedparam.model.tune_report import TuneReport
    from tiedparam.state.dictionaries import dense_state_dict, tie_state_dict, untie_state_dict
    from tiedparam.state.optimizer_laws import register_optimizer
    from tiedparam.tie.lookup import get_tie, is_tied
    from tiedparam.tie.owner import Owner, owner
    from tiedparam.util.errors import TieError, TieWarning

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
    "TuneReport",
    "__version__",
    "assign_",
    "available_rules",
    "dense_state_dict",
    "draw_orbits",
    "draw_residuals",
    "draw_scan",
    "draw_weights",
    "export_dense",
    "export_gqa",
    "free_values",
    "frozen",
    "get_tie",
    "init_",
    "is_tied",
    "load",
    "owner",
    "read_plan",
    "recluster",
    "register_optimizer",
    "register_rule",
    "register_tie",
    "remove_tie",
    "report",
    "residual",
    "save",
    "scan",
    "share_heads",
    "tie_bank",
    "tie_block",
    "tie_model",
    "tie_state_dict",
    "tune",
    "untie_model",
    "untie_state_dict",
    "write_plan",
]

# Every name is fetched when it is first asked for, so that an import costs next to nothing where
# only a part is used, or none: programs import much that they do not run. Type checkers read the
# imports above instead.
_PLACES = {
    "frozen": "compute.frozen",
    "export_dense": "files.export",
    "load": "files.load",
    "save": "files.save",
    "Layout": "laws.layout",
    "available_rules": "laws.registry",
    "register_rule": "laws.registry",
    "Example": "laws.example",
    "Rule": "laws.rule",
    "export_gqa": "layer.export_gqa",
    "free_values": "layer.free_values",
    "recluster": "layer.recluster",
    "register_tie": "layer.register",
    "remove_tie": "layer.remove",
    "residual": "layer.residual",
    "tie_bank": "layer.tie_bank",
    "assign_": "layer.values",
    "init_": "layer.values",
    "draw_orbits": "model.pictures",
    "draw_residuals": "model.scan_pictures",
    "draw_scan": "model.scan_pictures",
    "draw_weights": "model.pictures",
    "Plan": "model.plan",
    "PlanEntry": "model.plan",
    "read_plan": "model.plan_file",
    "write_plan": "model.plan_file",
    "Report": "model.report",
    "TieReport": "model.report",
    "report": "model.report",
    "scan": "model.scan",
    "ScanReport": "model.scan_report",
    "share_heads": "model.share_heads",
    "tie_block": "model.tie_block",
    "tie_model": "model.tie_model",
    "untie_model": "model.tie_model",
    "tune": "model.tune",
    "TuneReport": "model.tune_report",
    "dense_state_dict": "state.dictionaries",
    "tie_state_dict": "state.dictionaries",
    "untie_state_dict": "state.dictionaries",
    "register_optimizer": "state.optimizer_laws",
    "get_tie": "tie.lookup",
    "is_tied": "tie.lookup",
    "Owner": "tie.owner",
    "owner": "tie.owner",
    "TieError": "util.errors",
    "TieWarning": "util.errors",
}
_ROOMS = ("laws", "rules", "testing")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"tiedparam.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module 'tiedparam' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"tiedparam.{_PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS})  # not the modules that happen to be imported
