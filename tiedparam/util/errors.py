"""What tiedparam raises and warns, and how a message names the place."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from tiedparam.util.callers import caller
from tiedparam.util.torch_private import parameters_of, stand_in, submodules_of


class Reason(NamedTuple):
    """Why something cannot be done: what a check returns instead of None.

    Attributes:
        fact: what is so, as a sentence; it may begin with a small letter, after a colon.
        remedy: what to do about it, as a sentence; empty where nothing can be done.

    Example:
        >>> from tiedparam.laws import Reason
        >>> print(Reason("the weight is not square.", "Tie a square layer."))
        the weight is not square. Tie a square layer.
    """

    fact: str
    remedy: str = ""

    def __str__(self) -> str:
        between = "\n" if "\n" in self.fact else " "  # after a list, what to do has its own line
        return f"{self.fact}{between}{self.remedy}".strip()


class TieError(RuntimeError):
    """A tie cannot be made or kept: ``TieError(where, fact, remedy)``.

    Nothing was changed when it is raised. It is a ``RuntimeError``, as torch's own refusals are,
    so code that already handles those handles this one. The message is ``where: fact remedy``;
    where the fact names the place itself it is not said twice. It loses its middle where it would
    be longer than `LONGEST_MESSAGE`, whatever a model, a plan or a file is called.

    Example:
        >>> try:
        ...     tp.register_tie(nn.Conv2d(4, 8, 3), "flip_sym")
        ... except tp.TieError as error:
        ...     print(error.fact, error.remedy)
        out_channels (8) must equal in_channels (4). Tie a square layer, or use 'channel_shared'.
    """

    # The parts are the arguments, and there is no __init__: in one torch.compile would find no
    # graph break.

    @property
    def where(self) -> str:
        """The place: a tensor, a layer, a file, an argument; or what could not be done to it."""
        return str(self.args[0]) if len(self.args) > 1 else ""

    @property
    def fact(self) -> str:
        """What is so, as a sentence."""
        return str(self.args[min(1, len(self.args) - 1)]) if self.args else ""

    @property
    def remedy(self) -> str:
        """What to do about it, as a sentence; empty where nothing can be done."""
        return str(self.args[2]) if len(self.args) > 2 else ""

    @property
    def reason(self) -> Reason:
        """Fact and remedy, for another place to say."""
        return Reason(self.fact, self.remedy)

    def fact_in(self, word: Callable[[Reason], str]) -> str:
        """The fact, with the reasons that it may list in the words of ``word``."""
        return self.fact

    def worded(self, word: Callable[[Reason], str]) -> str:
        """The message, with the reason in the words of ``word``: the shell has its own remedies."""
        said = word(Reason(self.fact_in(word), self.remedy))
        if self.where and self.where not in self.fact:
            said = f"{self.where}: {said}"
        return shortened(said, LONGEST_MESSAGE)

    def __str__(self) -> str:
        return self.worded(str)


class SeveralReasonsError(TieError):
    """One error for several reasons: ``SeveralReasonsError(where, heading, remedy, reasons)``.

    The message lists them below the heading, a line for each.
    """

    @property
    def heading(self) -> str:
        """What they have in common."""
        return str(self.args[1])

    @property
    def reasons(self) -> Sequence[Reason]:
        """All of them."""
        found: Sequence[Reason] = self.args[3]
        return found

    @property
    def fact(self) -> str:
        """The list, as long as a message has room for."""
        return self.fact_in(str)

    def fact_in(self, word: Callable[[Reason], str]) -> str:
        """The list, with each reason in the words of ``word``."""
        lines = [word(reason) for reason in self.reasons]
        return f"{self.heading}:\n  " + some_of(lines, "\n  ")


class TieWarning(UserWarning):
    """Something was done as asked that was perhaps not intended: ``TieWarning(fact, remedy)``.

    A loaded weight was projected by more than rounding, say; a tie frees nothing, or keeps almost
    nothing of the weight; decay acts otherwise than before.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     layer = tp.register_tie(nn.Conv1d(64, 64, 7, groups=64), "channel_shared")
        >>> print(caught[0].message)
        the tie of 'weight' of Conv1d(...) by ... frees nothing: 448 of 448 values are stored. ...
    """

    @property
    def reason(self) -> Reason:
        """What was done, and what to do about it."""
        return Reason(*map(str, self.args or ("",)))

    def worded(self, word: Callable[[Reason], str]) -> str:
        """The message, with the reason in the words of ``word``."""
        return shortened(word(self.reason), LONGEST_MESSAGE)

    def __str__(self) -> str:
        return self.worded(str)


def raise_if(place: str, reason: Reason | None) -> None:
    """Raise a `TieError` if there is a reason."""
    if reason is not None:
        raise TieError(place, *reason)


def warn(fact: str, remedy: str = "") -> None:
    """Give a `TieWarning` that points at the user's line, however deep in here it is found."""
    level = 1
    frame: FrameType | None = caller(0)
    while frame is not None and _is_machinery(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(TieWarning(fact, remedy), stacklevel=level)


def _is_machinery(frame: FrameType) -> bool:
    # torch's: its decorators, such as that of inference_mode, stand in between
    name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return name in ("tiedparam", "torch")


def describe_layer(layer: nn.Module) -> str:
    """One line for one layer: ``Conv2d(3, 3, kernel_size=(3, 3), …)``, never its children."""
    if isinstance(layer, parametrize.ParametrizationList):
        return f"a tensor tied by '{layer[0]}'"
    kind = type(layer).__name__.removeprefix("FSDP").removeprefix("Tied")
    return f"{kind}({extra_repr(layer)})"


def extra_repr(layer: nn.Module) -> str:
    """What a layer says of itself, without computing the tensors that it asks itself for.

    A Linear asks whether it has a bias. A bias that cannot be computed now is often what the
    message is about.
    """
    lists = submodules_of(layer).get("parametrizations")
    if lists is None:
        return layer.extra_repr()
    names = list(submodules_of(lists))
    stock = next(
        kind
        for kind in type(layer).__mro__
        if issubclass(kind, nn.Module)  # fully_shard puts FSDPModule in between, which is none
        and not any(isinstance(getattr(kind, name, None), property) for name in names)
    )
    nothing = dict.fromkeys(names, torch.empty(0, device="cpu"))
    text: str = stand_in(layer, stock, {**parameters_of(layer), **nothing}, {}).extra_repr()
    return text


def visible(text: str, keep: str = "") -> str:
    """Control characters as escapes: names from files must not steer the reader's terminal."""
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


LONGEST_MESSAGE = 2000
"""Characters of a message."""


def shortened(text: object, longest: int = 120) -> str:
    """``text`` without its middle if it is longer: what a file holds may have any length."""
    text = str(text)
    if len(text) <= longest:
        return text
    kept = (longest - 1) // 2
    return f"{text[:kept]}…{text[-kept:]}"


def quoted(name: object) -> str:
    """A name out of a file, as messages show it."""
    return f"'{shortened(name)}'"


def shown_shape(shape: Iterable[int]) -> str:
    """A shape out of a file, as messages show it."""
    return shortened(tuple(shape))


def some_of(parts: Sequence[str], separator: str = ", ") -> str:
    """As many of ``parts`` as a message has room for, and how many more there are."""
    shown, room = [], LONGEST_MESSAGE * 3 // 4
    for part in parts:
        part = shortened(part, LONGEST_MESSAGE // 4)
        room -= len(part) + len(separator)
        if room < 0:
            break
        shown.append(part)
    more = len(parts) - len(shown)
    return separator.join([*shown, f"and {more} more"] if more else shown)


def within(where: str, error: TieError) -> TieError:
    """The same error about a larger thing ``where``: a file, if one of its tensors is wrong.

    The error's own place is kept in the fact, unless ``where`` or the fact names it already.
    """
    named = error.where in error.fact or error.where in where
    place = "" if named else f"{error.where}: "
    if isinstance(error, SeveralReasonsError):
        heading = f"{place}{error.heading}"
        return SeveralReasonsError(where, heading, error.remedy, error.reasons)
    return TieError(where, f"{place}{error.fact}", error.remedy)


def refuse(where: str, reasons: Sequence[Reason], heading: str) -> None:
    """Raise for one reason, or for several as a list below ``heading``.

    Raises:
        TieError: unless there is no reason.
    """
    if len(reasons) == 1:
        raise TieError(where, *reasons[0])
    if reasons:
        raise SeveralReasonsError(where, heading, "", tuple(reasons))


def describe(layer: nn.Module, tensor_name: str, root: nn.Module | None = None) -> str:
    """Name a tensor: ``'encoder.conv2.weight'`` where the root is known, else by its layer."""
    if root is not None:
        for path, module in root.named_modules():
            if module is layer:
                return f"'{path}.{tensor_name}'" if path else f"'{tensor_name}'"
    return f"'{tensor_name}' of {describe_layer(layer)}"


def key_of(path: str, tensor_name: str) -> str:
    """A layer's tensor as state dicts, files and messages call it: ``encoder.conv2.weight``.

    Args:
        path: of the layer in its model; empty for the model itself.
        tensor_name: in the layer.
    """
    return f"{path}.{tensor_name}".removeprefix(".")


def nearest(name: object, known: Iterable[str]) -> str:
    """``Did you mean 'a' or 'b'?``, if some of the known names look like ``name``; else nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(map(quoted, near))}?" if near else ""
