"""What a saved file says of a model's ties: names, options and shapes as JSON, never code.

`of_model` writes it, `read` checks its form. `StoredTie.make` makes the rule of a tie by its name
in the registry, and finds a function by its name among those that the reader allows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from tiedparam.files.law_options import sources_in
from tiedparam.files.stored_tie import StoredTie
from tiedparam.formats.safetensors import CHECKSUM
from tiedparam.formats.strict_json import read_json
from tiedparam.tie.lookup import ties_in
from tiedparam.util.errors import TieError, key_of
from tiedparam.util.torch_private import state_version_of

LAYOUT_VERSION = 3
"""The version of the header and of how rules lay out their free values.

Earlier ones are read: a law tells its own free values of before by their shapes (`earlier`).
"""

_MOST_COPIES = 200
"""Copies that read each other in turn; Python's recursion ends before that."""

KEY = "tiedparam"
"""The metadata's key for the header."""


@dataclass(frozen=True)
class Header:
    """What the header says.

    Attributes:
        ties: the tied tensors, in the order in which they can be tied.
        aliases: tensors that are the same tensor as one that is stored: theirs → the stored.
        versions: torch's versions of the modules that have another than 1, by path.
    """

    ties: list[StoredTie]
    aliases: dict[str, str]
    versions: dict[str, int]

    def to_json(self) -> str:
        """As the file holds it."""
        content = {"layout": LAYOUT_VERSION, **asdict(self)}
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def of_model(model: nn.Module, aliases: dict[str, str]) -> Header:
    """The header for a tied model.

    Raises:
        TieError: if one of its ties cannot be made again from names and options.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    ties = [
        StoredTie.of(tie, path, paths)
        for path, layer in model.named_modules(remove_duplicate=False)
        for tie in ties_in(layer)
    ]
    versions = {
        path: version
        for path, module in model.named_modules(remove_duplicate=False)
        if (version := state_version_of(module)) != 1
    }
    return Header(ties, aliases, versions)


def read(metadata: Mapping[str, str]) -> Header | None:
    """The header in a file's metadata, or None if tiedparam did not write the file.

    Raises:
        TieError: if it is malformed, of a newer version, or without the file's checksum.
    """
    if KEY not in metadata:
        return None
    if CHECKSUM not in metadata:
        raise TieError("its checksum", "its checksum is missing.", "Fetch or save it again.")
    try:
        content = read_json(metadata[KEY])
        version = content.pop("layout")
        if type(version) is not int or version < 1:
            raise ValueError("no version")
        if version > LAYOUT_VERSION:
            place = f"layout version {version}"
            fact = f"it has {place}, and this tiedparam reads up to {LAYOUT_VERSION}."
            raise TieError(place, fact, "Update tiedparam.")
        header = Header(
            [StoredTie.read(tie) for tie in content.pop("ties")],
            _read_table(content.pop("aliases"), str),
            _read_table(content.pop("versions"), int),
        )
        if content:
            raise ValueError("more than that")
        if len({(tie.layer, tie.tensor) for tie in header.ties}) < len(header.ties):
            raise ValueError("a tensor is tied twice")
        if _longest_chain(header.ties) > _MOST_COPIES:
            raise ValueError("copies of copies of copies")
    except TieError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fact = "its header is malformed."
        raise TieError("its header", fact, "Fetch or save it again.") from error
    return header


def _longest_chain(ties: list[StoredTie]) -> int:
    """How many copies read each other in turn, at most; cycles are judged when they are tied."""
    reads = {
        tie.key: [key_of(*source) for source in sources]
        for tie in ties
        if (sources := sources_in(tie.options))
    }
    lengths: dict[str, int] = {}
    visited: set[str] = set()
    for start in reads:
        chain = [start]
        while chain:
            key = chain[-1]
            if key not in visited:
                visited.add(key)
                chain += [k for k in reads[key] if k in reads and k not in visited]
                continue
            chain.pop()
            if key not in lengths:
                lengths[key] = 1 + max(lengths.get(k, 0) for k in reads[key])
    return max(lengths.values(), default=0)


def _read_table(value: dict[str, Any], kind: type) -> dict[str, Any]:
    if not all(type(content) is kind for content in value.values()):
        raise ValueError(f"not a table of {kind}")
    return value
