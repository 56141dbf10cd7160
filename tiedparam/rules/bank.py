"""A bank of templates for several layers: W = α·T."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from tiedparam.laws import Reason
from tiedparam.laws.best_rank import best_templates
from tiedparam.laws.choices import why_no_count
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout
from tiedparam.laws.linked import Source
from tiedparam.laws.registry import register_rule
from tiedparam.laws.sharing import Sharing


@register_rule("bank")
class Bank(Sharing):
    """Sums of templates that several layers have in common: ``W_l = Σᵢ α_lᵢ·Tᵢ``.

    `tiedparam.tie_bank` ties the layers, all at once, and starts from the best approximation of
    their weights. The templates ``T`` are stored once, by the first of the layers, and every layer
    has ``templates`` coefficients ``α_l`` of its own. Another layer of the same shape joins by
    ``register_tie(layer, "bank", source=one_of_them)``, with its nearest coefficients.

    The factors are not unique, so what comes back to the same weight need not have the same
    factors. Assigning or initialising the weight of one layer changes its coefficients alone.

    Args:
        templates: how many; taken from the bank where a layer joins one.
        source: a layer of the bank that this one joins; or its path, as for ``copy``.
        source_name: the name of its tensor; by default that of the tied one.

    Shapes: ``free``: of the first layer ``(templates, *shape)`` and ``(templates,)``, of the others
    ``(templates,)``; ``weight``: one canonical shape for all layers, one dtype and device.

    Source: "Share your attention: transformer weight sharing via matrix-based dictionary learning"
    (arXiv 2508.04581); the start is the truncated singular value decomposition (Eckart and Young).

    Example:
        >>> layers = [nn.Linear(4, 4) for _ in range(6)]
        >>> _ = tp.tie_bank(layers, templates=2)
        >>> templates, coefficients = tp.free_values(layers[0]).values()
        >>> torch.allclose(layers[0].weight, (coefficients @ templates.flatten(1)).view(4, 4))
        True
        >>> print(tp.get_tie(layers[5]).extra_repr())
        bank(templates=2): W = Σᵢ αᵢ·Tᵢ; 2 of 16 values
    """

    law = "W = Σᵢ αᵢ·Tᵢ"

    def __init__(
        self,
        templates: int | None = None,
        source: Source | None = None,
        source_name: str | None = None,
    ) -> None:
        if templates is None and source is None:
            raise TypeError("templates= takes the number of templates of a new bank")
        super().__init__(source, source_name)
        self.templates: int | None = templates

    def options(self) -> dict[str, Any]:
        """``templates``, as far as it is known."""
        return {} if self.templates is None else {"templates": self.templates}

    def check(self, layout: Layout) -> Reason | None:
        """There must be as many entries as templates."""
        reason = why_no_count("templates", self.templates)
        if reason is None and self.count > prod(layout.shape):
            return Reason(
                f"templates={self.count} is more than the {prod(layout.shape)} entries of the "
                "tensor.",
                "Choose fewer: as many as entries can be any tensor.",
            )
        return reason

    @property
    def count(self) -> int:
        """How many templates there are."""
        return self.templates or 0

    def join(self, shared: Tensor) -> None:
        """Have as many templates as the bank, unless a number was given."""
        if self.templates is None:
            self.templates = len(shared)

    def shared_shape(self) -> tuple[int, ...]:
        """The templates, in the canonical layout."""
        return (self.count, *self.bound_layout.canonical_shape)

    def own_shapes(self) -> tuple[tuple[int, ...], ...]:
        """A coefficient for each template."""
        return ((self.count,),)

    def forward(self, templates: Tensor, coefficients: Tensor) -> Tensor:
        """The sum of the templates, each times its coefficient."""
        return self.bound_layout.native(torch.tensordot(coefficients, templates, dims=1))

    def fit(self, weight: Tensor, *sources: Tensor) -> tuple[Tensor, ...]:
        """The coefficients of the nearest sum: least squares, the smallest where many do."""
        rows = sources[0].detach().flatten(1).double()
        goal = self.bound_layout.canonical(weight.detach()).flatten().double()
        inverse = torch.linalg.pinv(rows @ rows.T, hermitian=True)
        found = inverse @ (rows @ goal)
        found = found + inverse @ (rows @ (goal - found @ rows))  # once more, for the rounding
        return (found.to(weight.dtype),)

    def fit_together(self, weights: Sequence[Tensor]) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """The truncated singular value decomposition of the weights as rows."""
        rows = torch.stack([weight.detach().flatten() for weight in weights])
        templates, coefficients = best_templates(rows, self.count)
        shape, dtype = weights[0].shape, weights[0].dtype
        # each in memory of its own, in the usual order, which sharding asks for
        shared = torch.empty((self.count, *shape), dtype=dtype, device=rows.device)
        shared.flatten(1).copy_(templates)
        return shared, [(own.to(dtype, copy=True),) for own in coefficients]

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """None: one tensor alone has no bank."""
        return ()

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """A layer that joins a bank of two."""
        return (
            Example(lambda: _with_a_bank(lambda: nn.Linear(4, 4)), {"source": "0"}, path="2"),
            Example(
                lambda: _with_a_bank(lambda: nn.Conv2d(2, 2, 3, padding=1)),
                {"source": "1"},
                path="2",
            ),
        )


def _with_a_bank(build: Callable[[], nn.Module]) -> nn.Sequential:
    """Three layers, of which two share a bank."""
    layers = nn.Sequential(*(build() for _ in range(3)))
    # by name: the rooms above know the laws, so that it cannot be done above
    import_module("tiedparam.layer.tie_bank").tie_bank(["0", "1"], templates=2, root=layers)
    return layers
