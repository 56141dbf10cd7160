"""A layer and options with which a rule is tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Example:
    """A layer and options with which tests, docs and benchmarks enrol a rule.

    Attributes:
        build: makes a fresh model.
        options: the rule's options; a source may be named by its path in the model.
        path: where the layer to tie lies in the model; ``""`` is the model itself.
        tensor_name: which tensor of that layer to tie.

    Example:
        >>> example = tp.Example(lambda: nn.Linear(8, 6), {"groups": 3})
        >>> layer = tp.register_tie(example.build(), "row_repeat", **example.options)
        >>> print(tp.get_tie(layer))
        row_repeat(groups=3)
    """

    build: Callable[[], nn.Module]
    options: dict[str, Any] = field(default_factory=dict)
    path: str = ""
    tensor_name: str = "weight"
