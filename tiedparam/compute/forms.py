"""Which form computes a tied layer.

A law offers forms, methods that are marked by `tiedparam.laws.form`, each with what it costs as a
multiple of the dense form's time: the stock operation with the expanded weight. The cheapest form
below `WORTHWHILE` is tried first, then the next; where none of them serves, the layer computes
densely. A form costs what it was measured to cost for this law, layer, number of rows, and with or
without gradients; a traced graph, which must serve any batch, is chosen for a usual one.

``compute=`` on the law names a form, or ``"dense"``, and `tiedparam.tune` measures which one to
take; both are kept here, in a `Computing`. `tiedparam.compute.forward` computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.laws.forms import Form, Kind, Use, forms_of
from tiedparam.laws.layout import Layout
from tiedparam.laws.rule import Rule
from tiedparam.tie.interposed import TorchsOwn
from tiedparam.util.errors import TieError, describe
from tiedparam.util.torch_private import AnyConvolution, steps_of_forward

WORTHWHILE = 0.95
"""Of the dense form's time. Machines differ, and a form that saves less may lose on the next."""


class Computing:
    """How one tied layer is computed, decided when it is tied.

    Attributes:
        rule_class: of the law.
        expand: the ``forward`` of the law, as it was then.
        kind: what the stock layer does.
        layout: of the weight. What a layer says of itself, ``in_channels``, may have been changed
            since; torch goes by the weight.
        channels: how many channels or features of input the weight takes.
        asked: the form that the law's ``compute=`` names; ``"auto"`` or ``"dense"`` if none.
        tuned: the form that was measured to be fastest, without gradients and with.
        measured: how many times as fast as an untied layer it then computed.
        forms: those that the law offers for this layer, by name.
        seen: where the names of the forms that compute are noted, while somebody looks; or None.
    """

    def __init__(
        self, rule_class: type[Rule], kind: Kind, layout: Layout, asked: str, names: list[str]
    ) -> None:
        self.rule_class: type[Rule] = rule_class
        self.expand: Any = rule_class.forward
        self.kind: Kind = kind
        self.layout: Layout = layout
        self.channels: int = layout.groups * layout.canonical_shape[1]
        self.asked: str = asked
        self.tuned: dict[bool, str] = {}
        self.measured: dict[bool, float] = {}
        self.forms: dict[str, Form] = {
            form.name: form for form in forms_of(rule_class) if form.name in names
        }
        self.seen: list[str] | None = None
        self._usual: tuple[Use, Use] = self.use(), self.use(training=True)
        self._ranks: dict[tuple[int | None, bool, bool], tuple[str, ...]] = {}
        self._orders: dict[tuple[int | None, bool, bool, str], tuple[Form, ...]] = {}

    def __reduce__(self) -> Any:
        # pickles name no function, and what was measured here says nothing of another machine
        given = (self.rule_class, self.kind, self.layout, self.asked, [*self.forms])
        return type(self), given, self._ranks

    def __setstate__(self, ranks: dict[tuple[int | None, bool, bool], tuple[str, ...]]) -> None:
        self._ranks.update(ranks)
        self._settle()

    def __deepcopy__(self, memo: dict[int, Any]) -> Computing:
        made = Computing(self.rule_class, self.kind, self.layout, self.asked, [*self.forms])
        made.tuned, made.measured = dict(self.tuned), dict(self.measured)
        made.__setstate__(self._ranks)
        return made

    def use(self, rows: int | None = None, training: bool = False, kept: bool = False) -> Use:
        """How this layer is used."""
        return Use(self.kind, self.layout, rows, training, kept)

    def usual(self, training: bool) -> Use:
        """How this layer is used, without the number of rows; made once."""
        return self._usual[training]

    def named(self, training: bool) -> str:
        """The form that the user or `tune` names, or ``"auto"``."""
        return self.asked if self.asked != "auto" else self.tuned.get(training, "auto")

    def order(
        self, rule: Rule, rows: int | None, training: bool, kept: bool, named: str | None = None
    ) -> tuple[Form, ...]:
        """The forms to try, one after the other, before the dense one.

        Numbers of rows count as the next smaller power of 2, so that costs are worked out a few
        times for a layer and not at every call.

        Args:
            rule: the law.
            rows: how many vectors of input are multiplied; None in traced graphs.
            training: whether gradients are recorded.
            kept: whether the weight is at hand.
            named: the form to try first, ``"auto"`` or ``"dense"``; what `named` says by default.
        """
        if named is None:
            named = self.named(training)
        if rows:
            rows = 1 << (rows.bit_length() - 1)
        found = self._orders.get((rows, training, kept, named))
        if found is None:
            names = self._ranked(rule, rows, training, kept) if named != "dense" else ()
            found = self._orders[rows, training, kept, named] = self._arranged(names, named)
        return found

    def rank(self, rule: Rule) -> None:
        """Order the forms for traced graphs.

        A tracer may take sizes for symbols, which do not compare, and traces anew where it has
        seen something written down.
        """
        for training in (False, True):
            self._ranked(rule, None, training, False)
        self._settle()

    def choose(self, tuned: Mapping[bool, str]) -> None:
        """Take these forms from now on, without gradients and with; where none is named, any."""
        self.tuned = dict(tuned)
        self._settle()

    def keep(self, form: str, training: bool, gain: float) -> None:
        """Take the form that was measured to be fastest, and remember what it gains."""
        self.choose({**self.tuned, training: form})
        self.measured[training] = gain

    def predicted_cost(
        self, rule: Rule, like: Tensor, rows: int | None, training: bool, kept: bool
    ) -> float | None:
        """What the layer's form costs, as a multiple of the dense form's time.

        Args:
            rule: the law.
            like: a tensor with the dtype and on the device of the free values; one on the meta
                device stands for the CPU.
            rows: how many vectors of input are multiplied; None for a usual batch.
            training: whether gradients are recorded.
            kept: whether the weight is at hand.

        Returns:
            1.0 where no form serves; None if its cost for such a use is not known.
        """
        device = "cpu" if like.is_meta else like.device.type
        named = self.asked if kept else self.named(training)
        for form in self.order(rule, rows, training, kept, named):
            if serves(form, like.dtype, device, asked=form.name == named):
                return form.cost(rule, self.use(rows, training, kept))
        return 1.0

    def in_vain(self, like: Tensor) -> str | None:
        """The form that the law's ``compute=`` names, where it cannot serve such numbers."""
        form = self.forms.get(self.asked)
        device = "cpu" if like.is_meta else like.device.type
        if form is None or serves(form, like.dtype, device, asked=True):
            return None
        return form.name

    def _settle(self) -> None:
        for training in (False, True):
            names = self._ranks.get((None, training, False))
            if names is not None:
                named = self.named(training)
                self._orders[None, training, False, named] = self._arranged(names, named)

    def _arranged(self, names: tuple[str, ...], named: str) -> tuple[Form, ...]:
        if named == "dense":
            return ()
        if named != "auto":
            names = (named, *(n for n in names if n != named))
        return tuple([self.forms[name] for name in names])

    def _ranked(self, rule: Rule, rows: int | None, training: bool, kept: bool) -> tuple[str, ...]:
        found = self._ranks.get((rows, training, kept))
        if found is None:
            use = self.use(rows, training, kept)
            costs = {form.name: form.cost(rule, use) for form in self.forms.values()}
            names = [n for n, cost in costs.items() if cost is not None and cost < WORTHWHILE]
            found = tuple(sorted(names, key=lambda name: costs[name] or 0.0))
            self._ranks[rows, training, kept] = found
        return found


def serves(form: Form, dtype: torch.dtype, device: str, *, asked: bool) -> bool:
    """Whether an ordinary call can be computed in a form, with such numbers on such a device."""
    if form.where == "anywhere":
        return True
    # costs are those of a CPU; on other devices whoever asks for a form may have it
    return dtype in _PRECISE and (device == "cpu" or asked)


_PRECISE = (torch.float32, torch.float64)


def computing_of(layer: nn.Module, tensor_name: str, rule: Rule) -> Computing | None:
    """How to compute a layer whose tensor a bound rule ties; None for the dense way alone.

    Raises:
        TieError: if the rule asks for a form that the layer does not have.
    """
    stock = parametrize.type_before_parametrizations(layer)
    computing = None
    if tensor_name == "weight" and len(rule.bound_layout.shape) >= 2 and has_forms(stock):
        kind, layout = kind_of(layer), rule.bound_layout
        use = Use(kind, layout)
        names = [f.name for f in forms_of(type(rule)) if f.cost(rule, use) is not None]
        computing = Computing(type(rule), kind, layout, rule.compute, names)
    offered = [] if computing is None else list(computing.forms)
    if rule.compute not in ("auto", "dense", *offered):
        place = describe(layer, tensor_name)
        fact = f"compute={rule.compute!r} is not a form of '{rule}'"
        if not offered:
            why = f"for the {tensor_name} of a {stock.__name__}, which computes densely."
            raise TieError(place, f"{fact} {why}", "Leave it out.")
        choices = ", ".join(map(repr, ["dense", *offered]))
        raise TieError(place, f"{fact} on this layer.", f"Choose 'auto' or one of {choices}.")
    if computing is None or not offered:
        return None
    computing.rank(rule)
    return computing


def kind_of(layer: nn.Module) -> Kind:
    """What a layer does with its weight; what is no convolution counts as a Linear."""
    if not isinstance(layer, AnyConvolution):
        return "linear"
    return "transposed" if layer.transposed else "convolution"


# The stock layers that have forms, and torch's own methods, which the forms stand for ------------

TORCHS_OWN: dict[type[nn.Module], TorchsOwn] = {
    kind: TorchsOwn.of(kind, *steps_of_forward(kind))
    for kind in (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    )
}
"""By kind of layer."""


def kind_with_forms(stock: type[nn.Module]) -> type[nn.Module] | None:
    """The kind of layer with forms that a class derives from, or None."""
    return next((kind for kind in TORCHS_OWN if issubclass(stock, kind)), None)


def has_forms(stock: type[nn.Module]) -> bool:
    """Whether layers of a class have other forms than dense: not if they compute on their own."""
    kind = kind_with_forms(stock)
    return kind is not None and TORCHS_OWN[kind].computes(stock)


def torchs_own(stock: type[nn.Module]) -> TorchsOwn | None:
    """The methods that compute layers of a stock class, if those are torch's."""
    if not getattr(stock.forward, "__module__", "").startswith("torch.nn."):
        return None
    kind = kind_with_forms(stock)
    return TORCHS_OWN[kind] if kind is not None else TorchsOwn(stock.forward)
