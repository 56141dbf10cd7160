"""The functions of laws, such as a copy's ``fn=``, by the names that stand for them in files.

A few have a short name. A user's function is called ``module:name``, and naming it in a file is
never enough to import it: whoever reads the file says which function a name stands for.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tiedparam.util.errors import TieError, quoted, shortened, some_of, warn

Function = Callable[[Tensor], Tensor]
Functions = Mapping[str, Function]


def identity(weight: Tensor) -> Tensor:
    """The tensor itself."""
    return weight


_SCRIPT = "__main__"
FUNCTIONS: dict[str, Function] = {
    "identity": identity,
    "torch.square": torch.square,
    "torch.t": torch.t,
}
"""The names that any plan or file may use, and what they stand for."""


def as_functions(functions: Functions | None) -> Functions:
    """The argument ``functions=`` of what reads a file.

    Raises:
        TypeError: if it is not a mapping of names to functions.
    """
    if functions is None:
        return {}
    if not isinstance(functions, Mapping) or not all(
        isinstance(name, str) and callable(function) for name, function in functions.items()
    ):
        raise TypeError(
            "functions= takes a mapping of the names in the file to functions, such as "
            f"{{'my_module:tile': my_module.tile}}, not {shortened(repr(functions))}"
        )
    return functions


def with_functions(
    options: Mapping[str, Any], names: Iterable[str], allowed: Functions
) -> dict[str, Any]:
    """A rule's options from a file, with functions for those that are names of functions.

    Args:
        options: as the file has them.
        names: which of the rule's options are functions.
        allowed: those that the reader of the file allows.

    Raises:
        TieError: as `find_function`.
    """
    found = {o: find_function(options[o], allowed, option=o) for o in names if o in options}
    return {**options, **found}


def find_function(name: object, allowed: Functions, *, option: str = "fn") -> Function:
    """The function that a file, or a user, means by ``name``. Nothing is imported.

    Args:
        name: the name, one of `FUNCTIONS` or of ``allowed``.
        allowed: the functions that whoever reads the file allows.
        option: the rule's option, as messages name it.

    Raises:
        TieError: if it is none of `FUNCTIONS` or of those that the reader allows; the message
            says how to allow it, or suggests the nearest name.
    """
    bare = {known.__name__: known for known in FUNCTIONS.values()}  # "t" is how repr shows torch.t
    for known in (FUNCTIONS, bare, allowed):
        if isinstance(name, str) and name in known:
            return known[name]
    module, colon, _ = str(name).partition(":")
    if colon:
        raise TieError(
            f"its function {quoted(name)}",
            f"its function {quoted(name)} is code, and a file holds no code.",
            f"If you have it and trust the file, pass functions={{{quoted(name)}: the function}}; "
            f"in the shell, {_in_the_shell(module)}.",
        )
    near = difflib.get_close_matches(str(name), FUNCTIONS, n=1, cutoff=0.4)
    hint = f"Did you mean '{near[0]}'?" if near else f"Known are {', '.join(FUNCTIONS)}."
    place = f"{option}={shortened(repr(name))}"
    raise TieError(
        place,
        f"{place} is not a known function.",
        f"{hint} In Python pass your own function itself; in a file call it 'module:name'.",
    )


def _in_the_shell(module: str) -> str:
    if module == _SCRIPT:  # there it would be the shell itself
        return "a script cannot be imported: save it again with a function from a module"
    return f"--import {shortened(module)}"


def function_name(function: Function) -> str:
    """The name of a function in files.

    Raises:
        TieError: if it has none, since no module has it under its name.
    """
    for name, known in FUNCTIONS.items():
        if known is function:
            return name
    module = str(getattr(function, "__module__", ""))
    for attribute in ("__qualname__", "__name__"):  # torch's own have a wrong one
        path = str(getattr(function, attribute, ""))
        if _look_up(sys.modules.get(module), path) is function:
            return f"{module}:{path}"
    shown = getattr(function, "__name__", type(function).__name__)
    raise TieError(
        f"its function '{shown}'",
        f"a file cannot name its function '{shown}', {_kind(function)}.",
        "Write it with def at the top of a module: a file calls it 'module:name', and whoever "
        "loads the file passes it in functions=.",
    )


def is_of_script(name: str) -> bool:
    """Whether a name in files is that of a function of the script that runs, or of a notebook."""
    return name.startswith(f"{_SCRIPT}:")


def is_made_in_script(kind: type) -> bool:
    """Whether a class is the script's, or the notebook's."""
    return kind.__module__ == _SCRIPT


def warn_of_script(named: Iterable[str]) -> None:
    """Warn of what a file is about to name that no module has.

    Args:
        named: laws and functions, as the message calls them.
    """
    found = sorted(set(named))
    if found:
        warn(
            f"the file will name {some_of(found, ' and ')}, which a script or a notebook defines: "
            "where that is not run, the file cannot be read as it is.",
            "Put the definition into a module, which a reader can import.",
        )


def functions_of(module: ModuleType) -> dict[str, Function]:
    """The functions of a module, by their names in files."""
    found = {}
    for value in vars(module).values():
        if callable(value):
            try:
                found[function_name(value)] = value
            except TieError:
                continue
    return found


def _look_up(module: Any, name: str) -> object:
    found = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _kind(function: object) -> str:
    name = getattr(function, "__qualname__", "")
    if isinstance(function, partial):
        return "a partial"
    if "<lambda>" in name:
        return "a lambda"
    if "<locals>" in name:
        return "which was defined inside another function"
    if getattr(function, "__self__", None) is not None:
        return "a bound method"
    if not name:
        return f"an object of the class {type(function).__name__}"
    return "which its module does not have under that name"
