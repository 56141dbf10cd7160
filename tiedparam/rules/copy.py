"""The copy of another layer: W = fn(source.W)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tiedparam.laws.example import Example
from tiedparam.laws.functions import find_function, identity
from tiedparam.laws.layout import Layout
from tiedparam.laws.linked import Linked, Source
from tiedparam.laws.registry import register_rule
from tiedparam.laws.times import Making


@register_rule("copy")
class Copy(Linked):
    """A tensor that is a function of another layer's tensor: ``W = fn(source.W)``.

    Nothing is stored: the layer has no parameter and no key for it, and the gradients of
    both uses arrive in the source.

    Args:
        source: the layer to read; with ``register_tie(..., root=model)`` also its path, that of
            its tensor (``"encoder.weight"``), or the tensor itself (``model.encoder.weight``). A
            list of several for an ``fn`` of several tensors.
        source_name: which of its tensors; by default the one with the tied tensor's name.
        fn: any differentiable function whose result has the tied tensor's shape, such as
            ``torch.square``, ``torch.t`` for a tied autoencoder, or a tile or crop. Those that
            plans can name may be given by name: ``"t"``.

    ``free``: none; ``weight``: the layer's own shape. `register_tie` raises `TieError` if the
    source or its tensor does not exist, if ``fn`` gives another shape, dtype or device, or if
    the ties would form a cycle.

    Source: "weight of a layer as a function of another layer's", the PyTorch forum.

    Example:
        >>> encoder, decoder = nn.Linear(5, 3), nn.Linear(3, 5)
        >>> _ = tp.register_tie(decoder, "copy", source=encoder, fn=torch.t)
        >>> torch.equal(decoder.weight, encoder.weight.t())
        True
        >>> [name for name, _ in decoder.named_parameters()]
        ['bias']
    """

    law = "W = fn(source.W)"
    functions: ClassVar[tuple[str, ...]] = ("fn",)

    def __init__(
        self,
        source: Source | Sequence[Source],
        source_name: str | Sequence[str | None] | None = None,
        fn: Callable[..., Tensor] | str = identity,
    ) -> None:
        super().__init__(source, source_name)
        if isinstance(fn, str):
            fn = find_function(fn, {})
        if not callable(fn):
            raise TypeError(f"fn= takes a function of the source's tensor, not {fn!r}")
        self.fn = fn

    def forward(self, *sources: Tensor) -> Tensor:
        """The function of the source."""
        return self.fn(*sources)

    @property
    def making(self) -> Making:
        """Views take no time of their own; what other functions do is not known."""
        is_view = self.fn in (identity, torch.t)
        return Making(0, 0, call=10, trained_call=25, small=(10, 25)) if is_view else super().making

    @property
    def is_plain_copy(self) -> bool:
        """Whether the function gives back what it takes."""
        return self.fn is identity

    def options(self) -> dict[str, Any]:
        """``fn``, where it is not the identity."""
        if self.fn is identity:
            return {}
        return {"fn": getattr(self.fn, "__name__", type(self.fn).__name__)}

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """The copy itself, and for matrices the transpose (a tied autoencoder)."""
        return ({}, {"fn": torch.t}) if len(layout.shape) == 2 else ({},)

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """A copy, a transposed copy (tied autoencoder), and a copied bias."""
        return (
            Example(
                lambda: nn.ModuleDict({"a": nn.Conv2d(3, 3, 3), "b": nn.Conv2d(3, 3, 3)}),
                {"source": "a"},
                path="b",
            ),
            Example(
                lambda: nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 5)),
                {"source": "0", "fn": torch.t},
                path="1",
            ),
            Example(
                lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
                {"source": "0"},
                path="1",
                tensor_name="bias",
            ),
        )
