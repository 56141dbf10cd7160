"""Flip-transpose symmetry: W[i, j, x] = W[j, i, flip(x)]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiedparam._layout import Layout
from tiedparam._registry import register_rule
from tiedparam._rule import Example, Rule


@register_rule("flip_sym")
class FlipSym(Rule):
    """A kernel that is its own flip-transpose: ``W[i, j, x] = W[j, i, flip(x)]``.

    ``flip`` mirrors a kernel position along every spatial axis; ``i, j`` are channels of
    one group. A Linear weight is the case without spatial axes: a symmetric matrix. With
    an odd kernel, stride 1 and padding ``dilation·(k//2)`` (zeros or circular) the
    convolution, bias aside, is self-adjoint: ``⟨Ax, y⟩ = ⟨x, Ay⟩``.

    Shapes, with ``c`` channels per group, ``g`` groups and ``P`` kernel positions:

    * ``pairs``: ``(g·c, c, P // 2)``, the slices at the first half of the positions;
    * ``centre``: ``(g, c(c+1)/2)``, if ``P`` is odd: the free half of the symmetric slice
      at the centre, in rectangular full packed format (Gustavson et al. 2010, LAPACK
      working note 199);
    * ``weight``: the layer's own, ``O == C`` in every group.

    Only non-empty ones are stored: ``g·(c²P + f)/2`` values, ``f = c`` if every kernel size
    is odd, else 0. Multiplicity 2, and 1 on the centre's diagonal.
    """

    law = "W[i, j, x] = W[j, i, flip(x)]"

    def check(self, layout: Layout) -> str | None:
        """Inputs and outputs of a group must be the same channels."""
        if len(layout.shape) < 2:
            return "the tensor has no input channels to swap with its outputs. Tie a weight."
        outputs, inputs = layout.canonical_shape[:2]
        if outputs != inputs * layout.groups:
            return (
                f"out_channels ({outputs}) must equal in_channels ({inputs * layout.groups}). "
                "Tie a square layer, or use 'channel_shared'."
            )
        return None

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        """``pairs`` and ``centre``, as far as they are not empty."""
        groups, c, positions = self._sizes()
        pairs = [(groups * c, c, positions // 2)] if positions > 1 else []
        centre = [(groups, c * (c + 1) // 2)] if positions % 2 else []
        return (*pairs, *centre)

    def forward(self, *free: Tensor) -> Tensor:
        """Mirror the first half of the positions to the second; unpack the centre."""
        groups, c, positions = self._sizes()
        parts = []
        if positions > 1:
            half = free[0].reshape(groups, c, c, positions // 2)
            parts = [half, half.transpose(1, 2).flip(-1)]
        if positions % 2:
            # torch transposes by tiles in two dimensions only
            packed = free[-1] if groups > 1 else free[-1].squeeze(0)
            parts.insert(1, _unpack_symmetric(packed, c).reshape(groups, c, c, 1))
        layout = self.bound_layout
        kernels = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        return layout.native(kernels.reshape(layout.canonical_shape))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The mean of the weight and its flip-transpose, cut to the free half."""
        self.bind_shape(weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        blocks = self._blocks(weight).to(wide)
        mirror = blocks.transpose(1, 2).flip(-1)
        # relative to one member, so that equal members stay what they are to the bit;
        # halves before the difference, so that it cannot overflow
        mean = torch.where(blocks == mirror, blocks, blocks + (mirror / 2 - blocks / 2))
        return self._free_half(mean.to(weight.dtype))

    def representatives(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The members in the first half of the positions."""
        return self._free_half(self._blocks(weight.detach()))

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """The flip-transpose, group by group."""
        layout = self.bound_layout
        axes = tuple(range(2, len(layout.shape)))
        groups = layout.canonical(weight).chunk(layout.groups)
        yield layout.native(torch.cat([group.transpose(0, 1).flip(axes) for group in groups]))

    def _sizes(self) -> tuple[int, int, int]:
        """Groups, channels per group, kernel positions."""
        layout = self.bound_layout
        return layout.groups, layout.canonical_shape[1], prod(layout.kernel)

    def _blocks(self, weight: Tensor) -> Tensor:
        """The weight as ``(groups, c, c, positions)``."""
        groups, c, positions = self._sizes()
        return self.bound_layout.canonical(weight).reshape(groups, c, c, positions)

    def _free_half(self, blocks: Tensor) -> tuple[Tensor, ...]:
        groups, c, positions = self._sizes()
        half = positions // 2
        free = []
        if half:
            # clone: a slice would keep the full weight's storage alive (S15)
            pairs = blocks[..., :half].clone(memory_format=torch.contiguous_format)
            free.append(pairs.reshape(groups * c, c, half))
        if positions % 2:
            free.append(_pack_symmetric(blocks[..., half]))
        return tuple(free)

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Odd, even and mixed kernels of 0 to 3 dimensions, grouped and transposed."""
        return (
            Example(lambda: nn.Conv2d(3, 3, 3, padding=1)),
            Example(lambda: nn.Conv2d(4, 4, 2)),
            Example(lambda: nn.Conv2d(2, 2, (3, 2))),
            Example(lambda: nn.Conv2d(3, 3, 1)),
            Example(lambda: nn.Conv2d(6, 6, 3, groups=2)),
            Example(lambda: nn.Conv2d(4, 4, 3, groups=4)),
            Example(lambda: nn.Conv1d(4, 4, 5)),
            Example(lambda: nn.Conv3d(2, 2, (3, 1, 3))),
            Example(lambda: nn.ConvTranspose2d(6, 6, 3, groups=2)),
            Example(lambda: nn.Linear(5, 5)),
            Example(lambda: nn.Linear(4, 4)),
        )


def _unpack_symmetric(packed: Tensor, n: int) -> Tensor:
    """Symmetric ``(…, n, n)`` matrices from ``(…, n(n+1)/2)`` values, by slices alone.

    Rectangular full packed format: the lower triangle ``[[A, 0], [B, D]]`` is stored as one
    rectangle that holds ``A`` and ``B`` and, in the corner that ``A`` leaves free, ``Dᵀ``.
    """
    first, second = (n + 1) // 2, n // 2
    even = 1 - n % 2  # an even order needs one more row, an odd one shifts Dᵀ by a column
    rectangle = packed.reshape(*packed.shape[:-1], n + even, first)
    corner = rectangle[..., :second, 1 - even :]
    if n < _LARGE:
        right = F.pad(corner.transpose(-1, -2), (0, 0, first, 0))
        # above its diagonal this holds what the format has put there, and tril takes it away
        lower = torch.cat([rectangle[..., even:, :], right], -1)
        return lower.tril() + _transposed(lower.tril(-1))
    # transposing long rows misses the cache at every entry: by blocks it is twice as fast
    block, below = rectangle[..., even : even + first, :], rectangle[..., even + first :, :]
    top = torch.cat([block.tril() + _transposed(block.tril(-1)), _transposed(below)], -1)
    bottom = torch.cat([below, corner.triu() + _transposed(corner.triu(1))], -1)
    return torch.cat([top, bottom], -2)


_LARGE = 128  # below, more operations cost more than they save


def _transposed(matrices: Tensor) -> Tensor:
    return matrices.transpose(-1, -2).contiguous()


def _pack_symmetric(matrices: Tensor) -> Tensor:
    """The inverse of `_unpack_symmetric`, reading the lower triangle."""
    n = matrices.shape[-1]
    first, second = (n + 1) // 2, n // 2
    even = 1 - n % 2
    rectangle = matrices.new_zeros(*matrices.shape[:-2], n + even, first)
    rectangle[..., even : even + first, :] += matrices[..., :first, :first].tril()
    rectangle[..., :second, 1 - even :] += matrices[..., first:, first:].tril().transpose(-1, -2)
    rectangle[..., even + first :, :] = matrices[..., first:, :first]
    return rectangle.flatten(-2)
