"""Functions that torch.compile is kept out of."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

from tiedparam.util.torch_private import keep_out_dynamo

F = TypeVar("F", bound=Callable[..., Any])


def never_compiled(function: F) -> F:
    """Keep torch.compile out of a function, and of all that it calls, at no cost to an import.

    What changes the structure of a model cannot be traced. Inside a compiled function it runs as
    it is, between two graphs.
    """
    disabled: list[Any] = []  # made once, when there is something to keep out

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        dynamo: Any = sys.modules.get("torch._dynamo")  # not imported: nothing is compiled
        if dynamo is None:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(dynamo.disable(function))
        return disabled[0](*args, **kwargs)

    keep_out_dynamo(outside)
    return cast(F, outside)
