"""The contract: all statements, those first from which the others follow."""

from __future__ import annotations

from tiedparam.testing import changes, closure, fitted, gradients, labels, law, layer, tools, values
from tiedparam.testing.statement import Statement

STATEMENTS: dict[str, Statement] = {
    value.name: value
    for module in (law, closure, labels, values, fitted, gradients, changes, layer, tools)
    for value in vars(module).values()
    if isinstance(value, Statement)
}
"""All statements by their names, in the order in which they are judged."""
