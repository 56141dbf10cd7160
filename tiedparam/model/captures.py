"""What the wildcards of a plan's pattern matched, and the source that this names.

In ``{"layers.[1-5].*": ("copy", {"source": "layers.0.*"})}`` the source's ``*`` stands for what the
pattern's ``*`` matched. A wildcard of the source stands for the same one of the pattern, sign by
sign: ``*`` for a ``*``, ``?`` for a ``?``, ``[1-5]`` for a ``[1-5]``. Where the pattern has more
of one kind than the source, they are counted from the end.
"""

from __future__ import annotations

import fnmatch
import re
from typing import Any

_WILDCARD = re.compile(r"\*+|\?|\[(?:!.|[^!])[^\]]*\]", re.DOTALL)
"""As `fnmatch` reads them: an open bracket that is never closed stands for itself."""


def wildcards(pattern: str) -> list[str]:
    """The wildcards of a glob, in order."""
    return _WILDCARD.findall(pattern)


def takes_captures(pattern: Any, source: Any) -> bool:
    """Whether a source of a plan, or one of several, stands for what the pattern matched.

    A name may itself hold such signs. So a source with one that the pattern has not is a name.
    """
    several = source if isinstance(source, (list, tuple)) else [source]
    return isinstance(pattern, str) and any(_takes(pattern, each) for each in several)


def _takes(pattern: str, source: Any) -> bool:
    needed = wildcards(source) if isinstance(source, str) else []
    there = wildcards(pattern)
    return bool(needed) and all(needed.count(sign) <= there.count(sign) for sign in needed)


def sources_for(pattern: str, name: str, source: Any) -> Any:
    """The source, or the list of them, where the pattern has matched ``name``."""
    if isinstance(source, (list, tuple)):
        return [sources_for(pattern, name, each) for each in source]
    if not _takes(pattern, source):
        return source
    matched: dict[str, list[str]] = {}
    for sign, text in captures(pattern, name):
        matched.setdefault(sign, []).append(text)
    texts: list[str] = []
    for sign in reversed(wildcards(source)):  # counted from the end
        texts.append(matched[sign].pop())
    return _WILDCARD.sub(lambda sign: texts.pop(), source)


def captures(pattern: str, name: str) -> list[tuple[str, str]]:
    """Each wildcard of a glob with what it matched in ``name``, which the glob fits.

    Of several stars each takes as little as it can; the last takes what is left.
    """
    found, place = [], 0
    for wildcard in _WILDCARD.finditer(pattern):
        literal, following = pattern[place : wildcard.start()], pattern[wildcard.end() :]
        name, place = name[len(literal) :], wildcard.end()
        taken = 1
        if wildcard[0].startswith("*"):
            ends = range(len(name) + 1)
            taken = next(end for end in ends if fnmatch.fnmatchcase(name[end:], following))
        found.append((wildcard[0], name[:taken]))
        name = name[taken:]
    return found
