"""What ``help`` shows of a class of layers: its own members, and not those of every layer."""

from __future__ import annotations

import abc

from torch import nn

_BOOKKEEPING = {
    "__abstractmethods__",
    "__annotations__",
    "__annotations_cache__",
    "__annotate_func__",
}
"""Python's own notes in a class, which ``help`` would print."""
_PLUMBING = {"__dir__", "__getstate__", "__init_subclass__", "__setstate__", "__str__"}
"""What Python itself calls, which says nothing of a law."""


class OwnMembers(abc.ABCMeta):
    """Metaclass of layers whose ``dir``, and so ``help``, leaves out what `nn.Module` defines.

    And what classes list as ``_inner``, in those that inherit it: it is for the library to ask.

    ``help`` asks ``dir`` of the class, which only a metaclass can answer. It is an ABCMeta, so that
    a class may have an abstract class, too, among its bases; a metaclass of a user's own derives
    from ``type(tiedparam.Rule)``.
    """

    def __dir__(cls) -> list[str]:
        """The names that are not `nn.Module`'s, or are overridden, and are for users."""
        inner = {name for base in cls.__mro__ for name in vars(base).get("_inner", ())}
        return [name for name in super().__dir__() if not cls._is_left_out(name, inner)]

    def _is_left_out(cls, name: str, inner: set[str]) -> bool:
        definer = next((base for base in cls.__mro__ if name in vars(base)), None)
        if name in inner and definer not in (cls, None):
            # a user's class may have a member of that name, which is shown
            return definer.__module__.startswith("tiedparam.")
        return definer is nn.Module or name in _BOOKKEEPING or name in _PLUMBING
