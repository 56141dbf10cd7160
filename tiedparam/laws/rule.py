"""The rule contract: what a law must state, and what follows from that alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tiedparam.laws.distance import halved_difference, relative_distance
from tiedparam.laws.example import Example
from tiedparam.laws.forms import refuse_two_of_a_name
from tiedparam.laws.layout import Layout
from tiedparam.laws.times import Making
from tiedparam.util.errors import Reason, TieError
from tiedparam.util.own_members import OwnMembers


class Rule(nn.Module, metaclass=OwnMembers):
    """A law that ties the entries of one tensor: ``weight = forward(*free)``.

    A rule is an ordinary parametrization module. `register_tie` binds it to one tensor
    (`layout`) before it is used; a rule that is registered directly with
    ``torch.nn.utils.parametrize`` binds itself to the shape it first sees.

    To write a rule, give `law`, `check`, `free_shapes`, `forward`, `symmetries` and
    `examples`. For every *linear rule with disjoint orbits* (each entry of the weight is
    one free value, or minus it) projection, multiplicity and orbit labels follow from
    `forward`: with ``B`` the expansion and ``Bᵀ`` its vector-Jacobian product, the nearest
    lawful weight has the free values ``BᵀW / BᵀB1``, the (signed) orbit means
    (Ravanbakhsh, Schneider, Póczos 2017, "Equivariance through parameter-sharing").
    Overriding `right_inverse` can only make it faster.

    Invariants, checked by the contract tests for every rule and example::

        W = rule.forward(*free)
        all(torch.equal(S, W) for S in rule.symmetries(W))
        all(torch.equal(a, b) for a, b in zip(rule.right_inverse(W), free))
        rule.project(rule.project(A)) == rule.project(A)   # and nearest to A

    Example:
        >>> class ConstantRows(tp.Rule):
        ...     law = "W[o, c] = w[o]"
        ...     def free_shapes(self): return (self.bound_layout.shape[:1],)
        ...     def forward(self, w): return w[:, None].expand(self.bound_layout.shape)
        ...     def symmetries(self, weight): yield weight.roll(1, 1)
        >>> tp.get_tie(tp.register_tie(nn.Linear(4, 3), ConstantRows)).extra_repr()
        'ConstantRows: W[o, c] = w[o]; 3 of 12 values'
    """

    name: ClassVar[str] = ""
    """The registered name; set by `register_rule`."""
    family: ClassVar[str] = "of your own"
    """Under which heading tables show it."""
    law: str = ""
    """The equation in one line, as tables and ``repr`` show it."""
    complex_valued: ClassVar[bool] = False
    """Whether the law has a meaning for complex weights."""
    bilinear: ClassVar[bool] = False
    """Whether free values are multiplied by one another. Then many sets of them give one weight,
    and it is the weight that comes back, not the factors."""

    reads_layers: bool = False
    """Whether `forward` takes tensors of other layers, its `sources`, before the free values. Such
    a law has the options ``source`` and ``source_name``: see `tiedparam.laws.Linked`."""
    functions: ClassVar[tuple[str, ...]] = ()
    """The names of options that are functions, which files hold by name."""

    layout: Layout | None
    compute: str = "auto"
    """The name of the form that is to compute the layer, ``"dense"``, or ``"auto"``; see `form`."""

    _inner: ClassVar[tuple[str, ...]] = (
        "bind", "bind_device", "fit_to", "for_layout", "is_plain_copy", "reason_against",
        "reason_against_dtype", "why_not_kept",
    )  # fmt: skip
    """What only the library asks for: `help` leaves it out where it is inherited."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        refuse_two_of_a_name(cls)

    def __init__(self) -> None:
        """Take the options, which the docstring of the class explains."""
        super().__init__()
        self.layout = None

    # The law ------------------------------------------------------------------------

    def check(self, layout: Layout) -> Reason | str | None:
        """Why a tensor of this layout cannot carry the rule, or None. Never raises.

        Returns:
            A `Reason` with fact and remedy, or both as one text.
        """
        return None

    def reason_against(self, layout: Layout) -> Reason | None:
        """What `check` says, as a `Reason`."""
        said: Any = self.check(layout)
        if not (said is None or isinstance(said, (str, Reason))):
            raise TypeError(f"check() of '{self}' returns a text, a Reason or None, not {said!r}")
        return Reason(said) if isinstance(said, str) else said

    def reason_against_dtype(self, dtype: torch.dtype) -> Reason | None:
        """Why numbers of this dtype cannot carry the rule, or None."""
        if dtype.is_floating_point or (dtype.is_complex and self.complex_valued):
            return None
        return Reason(f"the law has no meaning for {dtype}.", "Convert the layer first (.float()).")

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the free values for the bound layout; none may be empty."""
        raise NotImplementedError(f"{type(self).__name__} must say the shapes of its free values")

    # Any: a law may give its free values names of its own, also for type checkers
    def forward(self, *free: Any, **named: Any) -> Tensor:
        """Expand the free values to the weight. Stateless, linear-time."""
        raise NotImplementedError(f"{type(self).__name__} must expand its free values")

    def spread(self, *free: Tensor) -> Tensor:
        """The linear part of `forward`: zeros where it puts fixed numbers."""
        return self.forward(*free)

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """The law stated without `forward`: tensors that must equal ``weight`` to the bit."""
        raise NotImplementedError(f"{type(self).__name__} must state its law as symmetries")

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Layers and options with which tests, docs and benchmarks enrol the rule."""
        return ()

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """The sets of options worth trying on a tensor of this layout, sources aside.

        `scan` and the benchmarks try each of them; what does not fit is left out by `check`.
        """
        return ({},)

    def sizes(self) -> Sequence[dict[str, Any]]:
        """Options by which it stores as much as now or less, from the least on, if it has such."""
        return ()

    @property
    def gains_from_cache(self) -> bool:
        """Whether keeping the weight saves time; if not, ``cache=True`` is ignored.

        A bound rule may go by `bound_layout`: comparing the free values takes some µs whatever
        their number, and a small weight may be computed as fast. A law that is always computed as
        fast as its free values are compared says ``gains_from_cache = False`` in its class.
        """
        return True

    @property
    def making(self) -> Making:
        """How long it takes to make the weight, for predicted gains: here, by a look-up."""
        return Making(entries=0.8, trained=3.2)

    def options(self) -> dict[str, Any]:
        """The options that differ from one use to the next, as ``repr`` shows them."""
        return {}

    def statement(self) -> tuple[Any, dict[str, Any]]:
        """What one writes to have the rule: its name, class or list of laws, and the options."""
        return self.name or type(self), self.options()

    # What follows from it -------------------------------------------------------------

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Free values of the nearest lawful weight, in storage of their own.

        Returned as a sequence, so that torch makes fresh Parameters instead of reshaping
        the dense one under its optimizer. Accumulated in float32 or wider; the mean
        is taken relative to one member of each orbit, so a lawful weight comes back to
        the bit, which the plain mean of equal floats does not do.
        """
        self.bind_shape(weight)
        representatives = self.representatives(weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        exact = [value.to(wide) for value in representatives]
        difference = halved_difference(weight.to(wide), self.forward(*exact))
        sums = self.adjoint(difference)
        counts = self.multiplicities()
        return tuple(
            (value + 2 * (total / count.to(total.device))).to(weight.dtype)
            for value, total, count in zip(exact, sums, counts, strict=True)
        )

    def fit_to(self, weight: Tensor, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`right_inverse`, where the tensors of `sources` are given."""
        return self.right_inverse(weight)

    def project(self, weight: Tensor) -> Tensor:
        """The lawful weight nearest to ``weight`` in the Frobenius norm."""
        return self.forward(*self.read(), *self.right_inverse(weight))

    def residual(self, weight: Tensor) -> float:
        """``‖W − project(W)‖ / ‖W‖``: 0 for a lawful (or zero) weight, at most 1 if linear."""
        with torch.no_grad():
            return relative_distance(weight, self.project(weight))

    def adjoint(self, weight: Tensor) -> tuple[Tensor, ...]:
        """``BᵀW``: the (signed) sum of ``weight`` over each orbit, as free values."""
        with torch.inference_mode(False), torch.enable_grad():
            free = tuple(
                torch.zeros(shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
                for shape in self.free_shapes()
            )
            if not free:
                return ()
            self._refuse_sources()
            cotangent = weight.clone() if weight.is_inference() else weight.detach()
            # contiguous, for the order of a sum may go by the strides
            return torch.autograd.grad(self.forward(*free), free, cotangent.contiguous())

    def multiplicities(self) -> tuple[Tensor, ...]:
        """How many entries share each free value, as float64 tensors shaped like them."""
        if not self.free_shapes():
            return ()
        labels = self.orbit_labels().flatten().abs()
        counts = torch.bincount(labels, minlength=self.free_count + 1)[1:].double()
        return self._shaped_like_free(counts)

    def orbit_labels(self) -> Tensor:
        """The number of each entry's free value, from 1; negative where the entry is minus it.

        Returns:
            An int64 tensor of the weight's shape; 0 where no free value reaches.
        """
        self._refuse_sources()
        # float64 counts exactly up to 2^53, and expansions need not take integers
        numbers = torch.arange(1, self.free_count + 1, dtype=torch.float64, device="cpu")
        with torch.no_grad():
            labels = self.spread(*self._shaped_like_free(numbers))
        self._refuse_mixing(labels)
        return labels.to(torch.int64)

    def _refuse_mixing(self, labels: Tensor) -> None:
        """What is derived here holds if every entry is one free value, minus one, or fixed."""
        generator = torch.Generator().manual_seed(0)
        size, wide = self.free_count, torch.float64
        values = torch.rand(size, dtype=wide, device="cpu", generator=generator)
        with torch.no_grad():
            weight = self.spread(*self._shaped_like_free(values))
        at = (labels.abs() - 1).clamp(0, size - 1).to(torch.int64)
        if not torch.equal(weight, values[at] * labels.sign()):
            raise NotImplementedError(
                f"'{self}' has no orbits: forward scales or mixes its free values; override "
                "right_inverse and representatives"
            )

    @property
    def has_orbits(self) -> bool:
        """Whether every entry is one free value, minus one, or fixed."""
        try:
            return not self.reads_layers and self.orbit_labels() is not None
        except NotImplementedError:
            return False

    def representatives(self, weight: Tensor) -> tuple[Tensor, ...]:
        """One member of each orbit of ``weight``, as free values in storage of their own."""
        labels = self.orbit_labels()
        self._refuse_mixing(labels)  # a subclass may number its values itself
        labels = labels.flatten()
        first = torch.full((self.free_count + 1,), labels.numel(), device=labels.device)
        position = torch.arange(labels.numel(), device=labels.device)
        first = first.scatter_reduce_(0, labels.abs(), position, "amin")[1:]
        if (first == labels.numel()).any():
            raise NotImplementedError("a free value reaches no entry of the weight; leave it out")
        sign = labels[first].sign().to(device=weight.device, dtype=weight.dtype)
        return self._shaped_like_free(weight.detach().reshape(-1)[first.to(weight.device)] * sign)

    def _refuse_sources(self) -> None:
        if self.reads_layers:
            raise NotImplementedError(
                f"'{self}' has no orbits: its weight is computed from tensors of other layers"
            )

    def _shaped_like_free(self, values: Tensor) -> tuple[Tensor, ...]:
        shapes = self.free_shapes()
        parts = values.split([prod(shape) for shape in shapes])
        # clone: a part of a split would keep the storage of all parts alive (S15)
        return tuple(part.clone().reshape(shape) for part, shape in zip(parts, shapes, strict=True))

    @property
    def free_count(self) -> int:
        """How many numbers are stored."""
        return sum(prod(shape) for shape in self.free_shapes())

    # Binding --------------------------------------------------------------------------

    def bind(self, layout: Layout, dtype: torch.dtype) -> Reason | None:
        """Fit the rule to one tensor. Returns the reason why it does not fit, or None."""
        reason = self.reason_against_dtype(dtype)
        if reason is not None:
            return reason
        reason = layout.why_empty() or self.reason_against(layout)
        if reason is None:
            self.layout = layout
        return reason

    def bind_device(self, device: torch.device) -> None:
        """Keep what `forward` computes with, apart from the free values, on this device."""

    def for_layout(self, layout: Layout) -> Self:
        """The rule as if it were bound to another layout, to ask for its symmetries."""
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.layout = layout
        return other

    def part(self, axis: int, parts: int, number: int) -> Rule | None:
        """The law of a slice of the weight, one of ``parts`` along an axis, or None; unbound."""
        return self

    def bind_shape(self, weight: Tensor) -> None:
        """Bind a rule that was given to torch directly, to the canonical layout.

        Raises:
            TieError: if a tensor of this shape cannot carry the rule.
        """
        if self.layout is None:
            reason = self.bind(Layout(tuple(weight.shape)), weight.dtype)
            if reason is not None:
                place = f"cannot tie a tensor {tuple(weight.shape)} by '{self}'"
                raise TieError(place, *reason)
            self.bind_device(weight.device)

    def why_not_kept(self) -> Reason | None:
        """What the rule holds that a file would lose, or None."""
        for name, module in self.named_children():
            if module.state_dict():
                return Reason(
                    f"it holds the layer '{name}', whose keys would be in the model twice.",
                    "For a function of another layer's tensor use 'copy' with source= and fn=.",
                )
        held = [repr(name) for name in self.state_dict()]
        if held:
            return Reason(
                f"it keeps {', '.join(held)} of its own, which is not a free value, so files would "
                "lose it.",
                "Return the numbers from options(), and compute the rest in __init__ or forward; "
                "register buffers with persistent=False.",
            )
        return None

    @property
    def bound_layout(self) -> Layout:
        """The layout of the tensor that the rule is bound to.

        Raises:
            TieError: if the rule is not bound yet.
        """
        if self.layout is None:
            raise TieError(
                f"the rule '{self}'",
                f"the rule '{self}' is bound to no tensor yet.",
                "Call register_tie first.",
            )
        return self.layout

    def sources(self) -> Iterator[tuple[nn.Module, str]]:
        """The tensors of other layers that `forward` takes first; none for most rules."""
        return iter(())

    def read(self) -> tuple[Tensor, ...]:
        """What `sources` hold now."""
        return ()

    @property
    def is_plain_copy(self) -> bool:
        """Whether the weight is to be the very tensor that the one source has."""
        return False

    def __str__(self) -> str:
        """The name and the options, as messages show them."""
        options = ", ".join(f"{key}={value!r}" for key, value in self.options().items())
        return (
            f"{self.name or type(self).__name__}({options})"
            if options
            else (self.name or type(self).__name__)
        )

    def __dir__(self) -> list[str]:
        """All names, those of every layer too; the class lists only what rules add."""
        return sorted({*super().__dir__(), *dir(nn.Module)})

    def extra_repr(self) -> str:
        """What ``repr(layer)`` shows of the tie: the law, and stored of dense values."""
        if self.layout is None:
            return f"{self}: {self.law}"
        return f"{self}: {self.law}; {self.free_count} of {prod(self.layout.shape)} values"
