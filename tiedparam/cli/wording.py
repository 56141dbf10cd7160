"""What the library says, in the words of the shell: its next steps are commands and options."""

from __future__ import annotations

from tiedparam.laws.rule_table import IMPORT_ITS_MODULE
from tiedparam.layer.checks import REMOVE_THE_TIE
from tiedparam.layer.concerns import CHOOSE_A_NEARER_LAW, LOOK_FIRST, TO_TIE_AGAIN
from tiedparam.layer.initial_values import TAKE_THE_NEAREST
from tiedparam.model.scan_report import PAIRS_SET_THE_BOUND
from tiedparam.model.tie_model import LEAVE_UNFIT
from tiedparam.util.errors import Reason, TieError, TieWarning, visible
from tiedparam.util.table import SEE_ALL_ROWS

_LOOK_FIRST = (
    "For fresh layers pass --init rescale; for trained ones look first, with tiedparam scan, or "
    "set a limit with --max-residual."
)
REMEDIES = {
    CHOOSE_A_NEARER_LAW: (
        "Leave it dense, choose a law that it nearly keeps (tiedparam scan lists them), or raise "
        "the limit."
    ),
    IMPORT_ITS_MODULE: "Rules of your own need --import.",
    LEAVE_UNFIT: "Correct the plan, or pass --skip-unfit to leave these as they are.",
    LOOK_FIRST: _LOOK_FIRST,
    f"{LOOK_FIRST} {TO_TIE_AGAIN}": f"{_LOOK_FIRST} To tie again pass --force.",
    PAIRS_SET_THE_BOUND: "--pairs sets the bound.",
    REMOVE_THE_TIE: "Run tiedparam untie first.",
    SEE_ALL_ROWS: "See the output of --json.",
    TAKE_THE_NEAREST: "Choose 'project' instead of 'exact' to take the nearest lawful weight.",
}
"""The remedies of the library that one types otherwise in the shell."""


def in_shell(reason: Reason) -> str:
    """A reason with the next step that a shell has."""
    return str(Reason(reason.fact, REMEDIES.get(reason.remedy, reason.remedy)))


def message_of(said: object) -> str:
    """An error or a warning as the shell prints it; names from files must not steer a terminal."""
    text = said.worded(in_shell) if isinstance(said, (TieError, TieWarning)) else str(said)
    return visible(text, keep="\n")


def in_one_line(said: object) -> str:
    """`message_of`, its lines one behind the other."""
    lines = [line.strip() for line in message_of(said).splitlines() if line.strip()]
    ended = [line if line.endswith((":", ".")) else f"{line};" for line in lines[:-1]]
    return " ".join([*ended, *lines[-1:]])
