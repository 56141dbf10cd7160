"""The forms in which a layer can compute with a tied weight, apart from the dense one.

A form is a method of its law, marked by `form` with what it costs. `tiedparam.compute` asks for
them and chooses; to add one, write the method and nothing else.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import Tensor

from tiedparam.laws.choices import why_not_one_of
from tiedparam.laws.layout import Layout
from tiedparam.util.errors import Reason, TieError

if TYPE_CHECKING:
    from tiedparam.laws.rule import Rule

Kind = Literal["linear", "convolution", "transposed"]
"""What the stock layer does: a Linear, a convolution, or a transposed one."""
Where = Literal["eager", "compiled", "anywhere"]
"""Where a form can run.

``"eager"``
    On ordinary CPU tensors of float32 or float64, outside of autocast, transforms and traces.
``"compiled"``
    There, and in the graphs of ``torch.compile``.
``"anywhere"``
    Wherever the stock operation runs: by plain operations that take care of precision themselves.
"""


@dataclass(frozen=True)
class Use:
    """How a layer is used, as far as the choice of a form may depend on it.

    Attributes:
        kind: what the stock layer does.
        layout: of the weight.
        rows: how many vectors of input are multiplied: rows of a Linear layer's input, samples ×
            positions of a convolution's; None in a traced graph, where a choice must not depend
            on the batch.
        training: whether gradients are recorded.
        kept: whether the weight is at hand (`frozen`), so that the dense form expands nothing.

    Example:
        >>> from tiedparam.laws import Layout, Use
        >>> Use("linear", Layout((64, 64)), rows=32).training
        False
    """

    kind: Kind
    layout: Layout
    rows: int | None = None
    training: bool = False
    kept: bool = False


@dataclass(slots=True)  # made at every call, and frozen ones take longer
class Call:
    """One call of a layer, which a form computes.

    Attributes:
        layer: the layer, for its geometry; its weight is not to be read.
        input: as the stock layer would take it.
        free: the free values.
        bias: the bias, or None.
        stock: the stock operation, ``(input, weight, bias) → output``, with the layer's geometry
            and groups.
        use: of the layer.
        asked: whether the form was asked for by name, so that it computes even where it loses.
        sources: the tensors of the layers that the law reads, each read once for this call.

    Example:
        >>> from tiedparam.laws import Call, Layout, Use
        >>> row, x = torch.ones(1, 4), torch.ones(2, 4)
        >>> call = Call(None, x, (row,), None, nn.functional.linear, Use("linear", Layout((8, 4))))
        >>> call.stock(call.input, *call.free, call.bias)  # one of the eight equal outputs
        tensor([[4.],
                [4.]])
    """

    layer: Any
    input: Tensor
    free: tuple[Tensor, ...]
    bias: Tensor | None
    stock: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    use: Use
    asked: bool = False
    sources: tuple[Tensor, ...] = ()


Cost = Callable[[Any, Use], "float | None"]
"""``(rule, use)`` → the time of a form as a multiple of the dense form's, or None where the
layer has no such form."""


@dataclass(frozen=True)
class Form:
    """A way to compute a layer.

    Attributes:
        name: as ``compute=`` takes it.
        cost: what it takes.
        compute: ``(rule, call)`` → the output as the dense layer gives it, up to rounding; or None
            where the form does not serve this call.
        where: where it can run.
        multiply_adds: ``(rule, use)`` → how many it takes per row of input; None where it takes as
            many as the dense form.
    """

    name: str
    cost: Cost
    compute: Callable[[Any, Call], Tensor | None]
    where: Where
    multiply_adds: Callable[[Any, Use], int] | None = None


Method = TypeVar("Method", bound=Callable[..., "Tensor | None"])


def form(
    name: str,
    *,
    cost: Cost,
    where: Where = "eager",
    multiply_adds: Callable[[Any, Use], int] | None = None,
) -> Callable[[Method], Method]:
    """Mark a method of a law, ``(self, call: Call) → Tensor | None``, as a form.

    Args:
        name: as ``compute=`` takes it.
        cost: ``(rule, use)`` → its time as a multiple of the dense form's time, which contains
            the expansion unless ``use.kept``; None where the layer has no such form.
        where: where it can run: ``"eager"``, ordinary CPU tensors of float32 or float64;
            ``"compiled"``, these and the graphs of ``torch.compile``; ``"anywhere"``, all that the
            stock layer takes.
        multiply_adds: ``(rule, use)`` → how many it takes per row of input, if not as many as the
            dense form.

    Raises:
        TieError: where the class is defined: for a name that ``compute=`` could not mean, for
            what is not to be called, or for a method that does not take one call.

    Example:
        >>> from tiedparam.laws import form
        >>> class OneRow(tp.rules.RowRepeat):
        ...     @form("summed", cost=lambda rule, use: 0.1 if use.kind == "linear" else None)
        ...     def by_one_product(self, call):
        ...         (row,) = call.free
        ...         return (call.input @ row.T).expand(-1, 8) + call.bias
        >>> layer = tp.register_tie(nn.Linear(4, 8), OneRow, init="rescale")
        >>> layer(torch.ones(2, 4)).shape
        torch.Size([2, 8])
    """
    place = f"the form {name!r}"
    for reason in (
        _why_no_name(name),
        _why_not_called("cost", cost),
        None if multiply_adds is None else _why_not_called("multiply_adds", multiply_adds),
        why_not_one_of("where", where, Where),
    ):
        if reason is not None:
            raise TieError(place, *reason)

    def mark(method: Method) -> Method:
        reason = _why_no_method(method)
        if reason is not None:
            raise TieError(place, *reason)
        method.__form__ = Form(name, cost, method, where, multiply_adds)  # type: ignore[attr-defined]
        return method

    return mark


def _why_no_name(name: object) -> Reason | None:
    if not isinstance(name, str) or name.split() != [name]:
        return Reason(
            f"{name!r} is not a name that compute= can take.", "Give one word, such as 'blocks'."
        )
    if name in ("auto", "dense"):
        return Reason(
            f"compute={name!r} has a meaning of its own.", "Name the form for how it computes."
        )
    return None


def _why_not_called(what: str, given: object) -> Reason | None:
    """Why this is not a function of a rule and a use, or None."""
    if callable(given) and _takes(given, 2):
        return None
    return Reason(
        f"{what} is {_shown(given)}, and not a function of a rule and a use.",
        f"Give {what}=lambda rule, use: …",
    )


def _why_no_method(method: object) -> Reason | None:
    if inspect.isfunction(method) and _takes(method, 2):
        return None
    return Reason(
        f"it marks {_shown(method)}, and not a method of one call.",
        "Mark a method (self, call), nearest to it: other decorators stand above @form.",
    )


def _shown(given: object) -> str:
    name = getattr(given, "__qualname__", None)
    return f"{name}{inspect.signature(given)}" if inspect.isfunction(given) else repr(name or given)


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many positional arguments."""
    try:
        inspect.signature(function).bind(*range(count))
    except ValueError:
        return True  # one that says nothing of itself
    except TypeError:
        return False
    return True


def refuse_two_of_a_name(kind: type[Any]) -> None:
    """See that no two methods of a class, its bases apart, are forms of one name.

    Raises:
        TieError: if two are.
    """
    seen: dict[str, str] = {}
    for attribute, method in vars(kind).items():
        made: Form | None = getattr(method, "__form__", None)
        if made is None:
            continue
        if made.name in seen:
            raise TieError(
                f"the form '{made.name}'",
                f"{kind.__name__} has two of it: {seen[made.name]} and {attribute}.",
                "Give one of them another name.",
            )
        seen[made.name] = attribute


@functools.lru_cache(256)
def forms_of(kind: type[Rule]) -> tuple[Form, ...]:
    """The forms of a law; those of a base do not count if ``forward`` was replaced since."""
    order = kind.__mro__
    expands = next(n for n, base in enumerate(order) if "forward" in vars(base))
    found: dict[str, Form] = {}
    seen: set[str] = set()
    for number, base in enumerate(order):
        for attribute, method in vars(base).items():
            made: Form | None = getattr(method, "__form__", None)
            if attribute in seen:
                continue
            seen.add(attribute)
            if made is not None and number <= expands:
                found.setdefault(made.name, made)
    return tuple(found.values())
