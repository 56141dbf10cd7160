"""The contract of a law, for laws of the library and of users alike.

`check_rule` judges a law by all of it; `STATEMENTS` has the statements one by one, for a test of
each. Public, and needs nothing that the library itself does not need. May use every other room but
the shell; nothing uses it.
"""

from tiedparam.testing.cases import Case
from tiedparam.testing.check import check_rule
from tiedparam.testing.contract import STATEMENTS
from tiedparam.testing.report import RuleReport
from tiedparam.testing.statement import Statement

__all__ = [
    "STATEMENTS",
    "Case",
    "RuleReport",
    "Statement",
    "check_rule",
]
