"""The squared copy of another layer: W = source.W²."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout
from tiedparam.laws.linked import Linked
from tiedparam.laws.registry import register_rule
from tiedparam.util.errors import Reason


@register_rule("squared_copy")
class SquaredCopy(Linked):
    """A tensor that is the elementwise square of another layer's: ``W = source.W²``.

    Args:
        source: the layer to read; with ``register_tie(..., root=model)`` also its path, as for
            `copy`.
        source_name: which of its tensors; by default the one with the tied tensor's name.

    ``free``: none; ``weight``: the source's shape. Raises as `copy` does; for shapes that
    differ use ``copy`` with ``fn=``.

    Source: "conv_2.weight = conv_1.weight ** 2", the PyTorch forum.

    Example:
        >>> conv_1, conv_2 = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        >>> _ = tp.register_tie(conv_2, "squared_copy", source=conv_1)
        >>> torch.equal(conv_2.weight, conv_1.weight.square())
        True
    """

    law = "W = source.W²"

    def check(self, layout: Layout) -> Reason | None:
        """One layer is read."""
        return self.reason_against_several()

    def forward(self, *sources: Tensor) -> Tensor:
        """The square, as a product: `torch.square` has a slower gradient."""
        (weight,) = sources
        return weight * weight

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Two convolutions of one shape, and two Linear layers."""
        return (
            Example(
                lambda: nn.ModuleDict({"a": nn.Conv2d(3, 3, 3), "b": nn.Conv2d(3, 3, 3)}),
                {"source": "a"},
                path="b",
            ),
            Example(
                lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), {"source": "0"}, path="1"
            ),
        )
