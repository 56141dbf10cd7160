"""Laws that read other layers: what they share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tiedparam.laws.fitted import fitted_to
from tiedparam.laws.layout import Layout
from tiedparam.laws.rule import Rule
from tiedparam.laws.times import Making
from tiedparam.util.errors import Reason, TieError, describe_layer
from tiedparam.util.sharded import whole
from tiedparam.util.torch_private import effective

Source = nn.Module | str | Tensor
"""A layer; the path of one, or of one of its tensors, in the model; or such a tensor itself."""


class Linked(Rule):
    """``W = forward(*sources, *free)``: a function of other layers' tensors, and of its own values.

    A subclass states `law` and `forward`. `forward` takes the tensors of the sources, in the order
    in which they were given, and then the free values, of which most such laws have none: all
    numbers are then the sources', and the gradients of both uses arrive there. A law that has
    some states `free_shapes` and `fit` as well.

    The sources are held as module and tensor name, not as Parameters, so that
    ``load_state_dict(assign=True)`` does not cut the tie, and not as submodules, so that no
    key is duplicated. Such a law is tied by `register_tie`, which knows the layer and finds
    the sources; ``torch.nn.utils.parametrize`` alone cannot do that.

    Args:
        source: the layer to read, its path or one of its tensors (with ``root=``); or a list of
            several.
        source_name: which of its tensors; by default the one with the tied tensor's name. A list
            for several sources, or one name for all.

    Example:
        >>> from tiedparam.laws import Linked
        >>> class SumOfTwo(Linked):
        ...     law = "W = A.W + B.W"
        ...     def forward(self, a, b):
        ...         return a + b
        >>> a, b, c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        >>> torch.equal(tp.register_tie(c, SumOfTwo, source=[a, b]).weight, a.weight + b.weight)
        True
    """

    family = "copies"
    complex_valued = True
    gains_from_cache = False  # comparing the source's numbers takes as long as computing with them
    reads_layers = True
    _inner: ClassVar[tuple[str, ...]] = (
        "read_from",
        "reason_against_several",
        "reason_against_shape",
    )

    def __init__(
        self,
        source: Source | Sequence[Source],
        source_name: str | Sequence[str | None] | None = None,
    ) -> None:
        super().__init__()
        self._several = isinstance(source, (list, tuple))
        given: Any = source if self._several else (source,)
        if not given:
            raise TypeError("source= is an empty list. Give at least one layer to read")
        for each in given:
            if not isinstance(each, (nn.Module, str, Tensor)):
                raise TypeError(
                    "source= takes the layer to read (or, with root=, its path), not "
                    f"{type(each).__name__}"
                )
        listed = self._several and isinstance(source_name, (list, tuple))
        names: Any = source_name if listed else (source_name,) * len(given)
        for name in names:
            if name is not None and not isinstance(name, str):
                raise TypeError(f"source_name= takes the name of a tensor, not {name!r}")
        if len(names) != len(given):
            raise TypeError(
                f"source_name= has {len(names)} names for {len(given)} sources. Give one for each"
            )
        # tuples: a module in an attribute would become a submodule of this one
        self._given: tuple[tuple[Source, str | None], ...] = tuple(zip(given, names, strict=True))

    # What it reads ----------------------------------------------------------------------

    @property
    def given(self) -> tuple[tuple[Source, str | None], ...]:
        """The sources and the names of their tensors: as the user gave them, then as found."""
        return self._given

    def read_from(self, found: Sequence[tuple[nn.Module, str]]) -> None:
        """From now on read these tensors, which were found for what was given."""
        self._given = tuple(found)

    def sources(self) -> Iterator[tuple[nn.Module, str]]:
        """The layers and the names of their tensors, in the order in which `forward` takes them.

        Raises:
            TieError: if a source was given as a path or a tensor and was not found yet.
        """
        for source, name in self._given:
            if not isinstance(source, nn.Module):
                given = f"'{source}' is a path" if isinstance(source, str) else "is a tensor"
                raise TieError(
                    f"the source of '{self}'",
                    f"the source {given}; it was not looked up.",
                    "Register the tie with root=model.",
                )
            yield source, name or "weight"

    @property
    def source(self) -> Any:
        """The layer that is read; a tuple of them for several.

        Raises:
            TieError: as `sources` does.
        """
        layers = tuple(layer for layer, _ in self.sources())
        return layers if self._several else layers[0]

    @property
    def source_name(self) -> Any:
        """The name of the tensor that is read; a tuple for several sources."""
        names = tuple(name for _, name in self._given)
        return names if self._several else names[0]

    def read(self) -> tuple[Tensor, ...]:
        """The tensors of the sources, as they are now; whole where a source is sharded."""
        return tuple(whole(effective(layer, name)) for layer, name in self.sources())

    # The law ----------------------------------------------------------------------------

    @property
    def making(self) -> Making:
        """That of an elementwise function."""
        return Making(0.2, 1.6, call=11, trained_call=35, small=(11, 35))

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        """None: every number is the sources'."""
        return ()

    def fit(self, weight: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        """The free values with which `forward` comes nearest to ``weight``.

        Args:
            weight: a tensor of the tied shape.
            *sources: the tensors of the sources.
        """
        if self.free_shapes():
            raise NotImplementedError(f"{type(self).__name__} must fit its free values to a weight")
        return ()

    def fit_to(self, weight: Tensor, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`fit`."""
        return self.fit(weight, *sources)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """`fit`, with what the sources hold now."""
        if self.layout is None:
            raise TieError(
                f"cannot tie a tensor {tuple(weight.shape)} by '{self}'",
                "the law reads other layers, which parametrize.register_parametrization does not "
                "know.",
                "Use tiedparam.register_tie.",
            )
        free = fitted_to(self, weight, self.read())
        return tuple(value.detach().clone() for value in free)  # in storage of their own (S15)

    def representatives(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The nearest free values: no entry is one of them."""
        return self.right_inverse(weight)

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """The function of the sources, read where their layers show them."""
        sources = tuple(getattr(layer, name) for layer, name in self.sources())
        yield self.forward(*sources, *self.fit(weight, *sources))

    def reason_against_several(self) -> Reason | None:
        """Why a law that reads one tensor cannot read what was given, or None."""
        if len(self.given) == 1:
            return None
        return Reason(f"'{self.name}' reads one layer.", "Give source= one layer.")

    def reason_against_shape(self, layout: Layout) -> Reason | None:
        """Why a law that reads one tensor of the tied one's shape does not fit, or None."""
        several = self.reason_against_several()
        if several is not None:
            return several
        (read,) = (tuple(tensor.shape) for tensor in self.read())
        if read == layout.shape:
            return None
        return Reason(
            f"the source's tensor is {read}, and the layer's {layout.shape}.",
            "Tie a layer of the source's shape, or use 'copy' with an fn= that fits the shapes.",
        )

    def bind(self, layout: Layout, dtype: torch.dtype) -> Reason | None:
        """Fit the rule to one tensor; of any dtype, since nothing is averaged."""
        reason = layout.why_empty() or self.reason_against(layout)
        if reason is None:
            self.layout: Layout | None = layout
        return reason

    def extra_repr(self) -> str:
        """The law; and, until it is tied, which source was given."""
        said = super().extra_repr()
        return said if self.layout is not None else f"{said}; reads {self._shown()}"

    def _shown(self) -> str:
        shown = []
        for source, name in self._given:
            if isinstance(source, nn.Module):
                shown.append(f"{name or 'weight'} of {describe_layer(source)}")
            else:
                path = isinstance(source, str)
                shown.append(f"source {source!r}" if path else "a source that is not found yet")
        return ", ".join(shown)
