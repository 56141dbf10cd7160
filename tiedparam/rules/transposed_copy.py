"""The adjoint of another layer: W[i, j, x] = ±source.W[j, i, flip(x)]."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout
from tiedparam.laws.linked import Linked, Source
from tiedparam.laws.registry import register_rule
from tiedparam.util.errors import Reason, describe_layer
from tiedparam.util.torch_private import AnyConvolution

Sign = Literal[1, -1]


@register_rule("transposed_copy")
class TransposedCopy(Linked):
    """The weight of the adjoint layer: ``W[i, j, x] = ±source.W[j, i, flip(x)]``.

    With ``A`` what the source computes without its bias and ``B`` what the tied layer does,
    ``⟨Ax, y⟩ = ±⟨x, By⟩``: a decoder that runs its encoder backwards. ``i, j`` are channels of one
    group, and ``flip`` mirrors a kernel position along every axis. A Linear weight is transposed. A
    transposed convolution runs a convolution of the same stride, padding and dilation backwards
    with the very numbers of that, since it stores inputs first, and so does GPT-2's ``Conv1D`` with
    a Linear layer. Between two convolutions the kernel is flipped, and the padding of one is
    ``dilation·(k − 1) − p`` for that of the other; with a stride no convolution is the adjoint of
    another. Complex weights are transposed and not conjugated, so the products are those without
    conjugation.

    Args:
        source: the layer to read; with ``register_tie(..., root=model)`` also its path, as for
            `copy`.
        source_name: which of its tensors; by default the one with the tied tensor's name.
        sign: 1 or −1.

    ``free``: none; ``weight``: the source's with the channels exchanged. `register_tie` raises
    `TieError` if the layers differ in groups, kernel, stride or dilation; if both are convolutions
    with a stride; and if the source is an embedding, whose adjoint is a plain `copy`.

    Source: tied autoencoders (Vincent et al. 2010, "Stacked denoising autoencoders").

    Example:
        >>> encoder, decoder = nn.Conv2d(3, 8, 3, stride=2), nn.ConvTranspose2d(8, 3, 3, stride=2)
        >>> _ = tp.register_tie(decoder, "transposed_copy", source=encoder)
        >>> x, y = torch.randn(1, 3, 9, 9), torch.randn(1, 8, 4, 4)
        >>> bias, other = encoder.bias[:, None, None], decoder.bias[:, None, None]
        >>> left, right = ((encoder(x) - bias) * y).sum(), (x * (decoder(y) - other)).sum()
        >>> torch.allclose(left, right, atol=1e-4)
        True
    """

    law: str = "W[i, j, x] = ±source.W[j, i, flip(x)]"
    _as_it_is: bool = False
    """Whether the two layers store channels in opposite orders, so that nothing moves."""

    def __init__(
        self,
        source: Source | Sequence[Source],
        source_name: str | Sequence[str | None] | None = None,
        sign: Sign = 1,
    ) -> None:
        super().__init__(source, source_name)
        self.sign: Sign = sign
        if _is_sign(sign):
            self.law = f"W[i, j, x] = {'' if sign == 1 else '−'}source.W[j, i, flip(x)]"

    def options(self) -> dict[str, Any]:
        """``sign``, where it is not 1."""
        return {} if self.sign == 1 else {"sign": self.sign}

    @property
    def is_plain_copy(self) -> bool:
        """Whether the weight is the very tensor of the source."""
        return self._as_it_is and self.sign == 1

    def forward(self, *sources: Tensor) -> Tensor:
        """The source with its channels exchanged in every group, mirrored."""
        (weight,) = sources
        if not self._as_it_is:
            groups = (
                self._source_layout(weight).groups if self.layout is None else self.layout.groups
            )
            first, second, *kernel = weight.shape
            blocks = weight.reshape(groups, first // groups, second, *kernel).transpose(1, 2)
            weight = blocks.reshape(groups * second, first // groups, *kernel)
            if kernel:
                weight = weight.flip([-n for n in range(1, len(kernel) + 1)])
        return weight if self.sign == 1 else -weight

    def _source_layout(self, weight: Tensor) -> Layout:
        ((source, name),) = self.sources()
        return Layout.of(source, name, tuple(weight.shape))

    def bind(self, layout: Layout, dtype: torch.dtype) -> Reason | None:
        """Fit the rule to one tensor, and see whether the layers store it the same way."""
        reason = super().bind(layout, dtype)
        if reason is None:
            self._as_it_is = self._source_layout(*self.read()).transposed != layout.transposed
        return reason

    def check(self, layout: Layout) -> Reason | None:
        """What keeps the tied layer from being the adjoint of the source."""
        if not _is_sign(self.sign):
            return Reason(f"sign={self.sign!r} is unknown.", "Choose 1 or -1.")
        several = self.reason_against_several()
        if several is not None:
            return several
        if len(layout.shape) < 2:
            return Reason(
                "the tensor has no input channels to swap with its outputs.", "Tie a weight."
            )
        ((source, name),) = self.sources()
        (weight,) = self.read()
        if isinstance(source, (nn.Embedding, nn.EmbeddingBag)):
            return Reason(
                f"the source {describe_layer(source)} looks rows up, and a layer with these very "
                "rows is its adjoint.",
                "Use 'copy'.",
            )
        if weight.dim() > 2 and not (isinstance(source, AnyConvolution) and name == "weight"):
            return Reason(
                f"the '{name}' of the source {describe_layer(source)} is neither a matrix nor made "
                "of kernels.",
                "Use 'copy' with an fn= that exchanges the axes.",
            )
        theirs = Layout.of(source, name, tuple(weight.shape))
        return _why_other_geometry(theirs, layout) or _why_other_shape(theirs, layout)

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """For kernels; of matrices `copy` tries the transpose."""
        return ({},) if prod(layout.kernel) > 1 else ()

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Two Linear layers, a strided autoencoder, and two convolutions in groups."""
        return (
            Example(
                lambda: nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 5)), {"source": "0"}, path="1"
            ),
            Example(
                lambda: nn.Sequential(
                    nn.Conv2d(4, 6, 3, stride=2, groups=2),
                    nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2),
                ),
                {"source": "0", "sign": -1},
                path="1",
            ),
            Example(
                lambda: nn.Sequential(
                    nn.Conv1d(4, 6, 3, groups=2), nn.Conv1d(6, 4, 3, padding=2, groups=2)
                ),
                {"source": "0"},
                path="1",
            ),
        )


def _is_sign(sign: object) -> bool:
    return sign in (1, -1) and not isinstance(sign, bool)


def _why_other_geometry(theirs: Layout, ours: Layout) -> Reason | None:
    """Why two layers are not each other's adjoint, whatever their channels are."""
    if theirs.groups != ours.groups:
        return Reason(
            f"the source has {theirs.groups} groups, and the layer {ours.groups}.",
            "Give both the same groups=.",
        )
    if theirs.dilation != ours.dilation:
        return Reason(
            f"the source has the dilation {theirs.dilation}, and the layer {ours.dilation}.",
            "Give both the same dilation=.",
        )
    if theirs.transposed != ours.transposed and theirs.stride != ours.stride:
        return Reason(
            f"the source has the stride {theirs.stride}, and the layer {ours.stride}.",
            "Give both the same stride=.",
        )
    strided = max((*theirs.stride, *ours.stride), default=1) > 1
    if theirs.transposed == ours.transposed and strided:
        other = "convolution" if ours.transposed else "transposed convolution"
        return Reason(
            f"the strides are {theirs.stride} and {ours.stride}, and with a stride no layer of one "
            "kind is the adjoint of another.",
            f"Tie a {other} of the source's stride and padding.",
        )
    return None


def _why_other_shape(theirs: Layout, ours: Layout) -> Reason | None:
    outputs, inputs, *kernel = theirs.canonical_shape
    wanted = (inputs * theirs.groups, outputs // theirs.groups, *kernel)
    if ours.canonical_shape == wanted:
        return None
    return Reason(
        f"the adjoint of the source's {theirs.canonical_shape} is {wanted}, outputs first, and the "
        f"tensor is {ours.canonical_shape}.",
        "Tie a layer with the source's kernel that takes its outputs and gives its inputs.",
    )
