"""Complex and quaternion layers: [[A, −B], [B, A]], and the Hamilton product."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tiedparam.laws import Call, Reason, Use, form
from tiedparam.laws.choices import why_not_one_of
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout
from tiedparam.laws.linear_map import LinearMap
from tiedparam.laws.orbits import Orbits
from tiedparam.laws.registry import register_rule
from tiedparam.laws.times import Making, Time, relative_time
from tiedparam.products.hypercomplex_matrices import SIGNS, complex_product, component_product

Algebra = Literal["complex", "quaternion"]
Compute = Literal["auto", "dense", "components", "three"]
_COMPONENTS: dict[Algebra, int] = {"complex": 2, "quaternion": 4}
_LAWS: dict[Algebra, str] = {
    "complex": "W = [[A, −B], [B, A]]",
    "quaternion": "W = [[A, −B, −C, −D], [B, A, −D, C], [C, D, A, −B], [D, −C, B, A]]",
}


def _cost_of_components(rule: Hypercomplex, use: Use) -> float | None:
    if use.kind != "linear":
        return None
    blocks = Time(68, values=0.3) if rule.algebra == "complex" else Time(112, values=0.6)
    return relative_time(use, blocks, rule.making)


def _cost_of_three(rule: Hypercomplex, use: Use) -> float | None:
    if use.kind != "linear" or rule.algebra != "complex":
        return None
    sums = 0.35 if use.training else 0.15
    return relative_time(use, Time(65, 0.75, values=0.3, entries=sums), rule.making)


@register_rule("hypercomplex")
class Hypercomplex(Orbits):
    """A real layer that multiplies by complex numbers or quaternions.

    Channels are (component, number), the component slowest: first all real parts, then all
    imaginary ones, as ``torch.cat([z.real, z.imag])``. A quaternion ``a + bi + cj + dk`` has four
    blocks, and the weight multiplies from the left, by the Hamilton product.

    ================  =======================================  ===========================
    ``algebra``       law                                      computes
    ================  =======================================  ===========================
    ``"complex"``     ``[[A, −B], [B, A]]``                    ``(A + Bi)z``
    ``"quaternion"``  ``[[A, −B, −C, −D], [B, A, −D, C],       ``(A + Bi + Cj + Dk)q``
                      [C, D, A, −B], [D, −C, B, A]]``
    ================  =======================================  ===========================

    These are the real layers that commute with multiplying the input by ``i`` (from the right by
    ``i`` and ``j``). A bias is any number, so it needs no law.

    Args:
        algebra: ``"complex"`` or ``"quaternion"``.
        compute: how a Linear layer computes: ``"auto"``, the fastest way; ``"components"``, every
            component by every other without the whole matrix, ``"three"``, a complex product as
            three real ones, or ``"dense"`` force one, for measuring.

    Shapes: with ``n`` components, ``free``: ``(O, C/(g·n), *kernel)`` in the canonical layout, the
    first block column, which is A, B, …, one below the other in each group; ``weight``: the
    layer's own, with outputs and inputs that ``n`` divides. In a grouped convolution the
    components are blocks within each group.

    Multiplicity ``n``, everywhere.

    Source: Trabelsi et al. 2018, "Deep complex networks"; Parcollet et al. 2019, "Quaternion
    recurrent neural networks".

    Example:
        >>> layer = tp.register_tie(nn.Linear(6, 4, bias=False), "hypercomplex")
        >>> A, B = tp.free_values(layer)["parametrizations.weight.original0"].detach().chunk(2)
        >>> z = torch.randn(3, dtype=torch.complex64)
        >>> real, imaginary = layer(torch.cat([z.real, z.imag])).chunk(2)
        >>> torch.allclose(torch.complex(real, imaginary), torch.complex(A, B) @ z, atol=1e-6)
        True
    """

    family = "equivariance"
    law: str = _LAWS["complex"]
    making: Making = Making(0.4, 1.3, call=50, trained_call=135)
    states_whole_group = True

    def __init__(self, algebra: Algebra = "complex", compute: Compute = "auto") -> None:
        super().__init__()
        self.compute = compute
        self.algebra: Algebra = algebra
        self.law = _LAWS.get(algebra, self.law) if isinstance(algebra, str) else self.law

    def options(self) -> dict[str, Any]:
        """``algebra``."""
        return {"algebra": self.algebra}

    def check(self, layout: Layout) -> Reason | None:
        """Every component must have as many channels, on both sides."""
        reason = why_not_one_of("algebra", self.algebra, Algebra)
        if reason is not None:
            return reason
        if len(layout.shape) < 2:
            return Reason(f"the tensor {layout.shape} has no inputs.", "Tie a weight.")
        outputs, inputs = layout.canonical_shape[0] // layout.groups, layout.canonical_shape[1]
        of_group, n = " of a group" if layout.groups > 1 else "", _COMPONENTS[self.algebra]
        for side, channels in (("outputs", outputs), ("inputs", inputs)):
            if channels % n:
                return Reason(
                    f"the {channels} {side}{of_group} have no {n} components of equal size "
                    f"('{self.algebra}').",
                    f"Choose a multiple of {n}.",
                )
        return None

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The first block column."""
        outputs, inputs, *kernel = self.bound_layout.canonical_shape
        return ((outputs, inputs // _COMPONENTS[self.algebra], *kernel),)

    def forward(self, *free: Tensor) -> Tensor:
        """Lay the components, with their signs, side by side and below one another."""
        (column,) = free
        return _components(self.bound_layout, _COMPONENTS[self.algebra]).made(column)

    @form("components", cost=_cost_of_components, where="compiled")
    def by_components(self, call: Call) -> Tensor:
        """Multiply every component by ``A, B, …``, and add up what belongs together."""
        return component_product(call.input, call.free[0], call.bias, _COMPONENTS[self.algebra])

    @form(
        "three",
        cost=_cost_of_three,
        where="compiled",
        multiply_adds=lambda rule, use: 3 * rule.free_count // 2,
    )
    def by_three_products(self, call: Call) -> Tensor:
        """Multiply complex numbers by three real products and not four."""
        return complex_product(call.input, call.free[0], call.bias)

    def adjoint(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The sum over the blocks of each component, with their signs."""
        with torch.inference_mode(False), torch.no_grad():
            laid = _components(self.bound_layout, _COMPONENTS[self.algebra])
            return (laid.fold(weight.detach()),)

    def representatives(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The first block column."""
        ((_, inputs, *_),) = self.free_shapes()
        # clone: a slice would keep the whole weight's storage alive (S15)
        column = self.bound_layout.canonical(weight.detach())[:, :inputs]
        return (column.clone(memory_format=torch.contiguous_format),)

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """What commutes with multiplying by each unit from the right."""
        layout, n = self.bound_layout, _COMPONENTS[self.algebra]
        outputs, inputs, *kernel = layout.canonical_shape
        blocks = layout.canonical(weight).reshape(
            layout.groups, n, outputs // layout.groups // n, n, inputs // n, *kernel
        )
        for unit in range(1, n):
            image = torch.empty_like(blocks)
            for p, q in product(range(n), repeat=2):
                sign = SIGNS[p][unit] * SIGNS[q][unit]
                image[:, p, :, q] = sign * blocks[:, p ^ unit, :, q ^ unit]
            yield layout.native(image.reshape(layout.canonical_shape))

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """Both algebras."""
        return tuple({"algebra": algebra} for algebra in get_args(Algebra))

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Both algebras on Linear layers and convolutions, grouped and transposed."""
        return (
            Example(lambda: nn.Linear(4, 6), {"algebra": "complex"}),
            Example(lambda: nn.Linear(8, 4), {"algebra": "quaternion"}),
            Example(lambda: nn.Conv2d(4, 2, 3), {"algebra": "complex"}),
            Example(lambda: nn.Conv1d(4, 8, 2), {"algebra": "quaternion"}),
            Example(lambda: nn.Conv1d(8, 4, 3, groups=2), {"algebra": "complex"}),
            Example(lambda: nn.ConvTranspose2d(8, 4, 2, groups=2), {"algebra": "complex"}),
            Example(lambda: nn.ConvTranspose1d(4, 4, 3), {"algebra": "quaternion"}),
        )


class _Components(LinearMap):
    """From the first block column to the whole weight; ``n`` components."""

    def __init__(self, layout: Layout, n: int) -> None:
        self.layout, self.n, self.shape = layout, n, layout.shape

    def expand(self, free: Tensor) -> Tensor:
        layout, n = self.layout, self.n
        blocks = free.reshape(layout.groups, n, -1, *free.shape[1:]).unbind(1)
        signed = {1: blocks, -1: [-block for block in blocks]}
        rows = [
            torch.cat([signed[SIGNS[p ^ q][q]][p ^ q] for q in range(n)], 2)  # along the inputs
            for p in range(n)
        ]
        return layout.native(torch.cat(rows, 1).view(layout.canonical_shape)).contiguous()

    def in_plain_operations(self, free: Tensor, *constants: Tensor) -> Tensor:
        """`expand` by five operations, for each one is a node of an exported graph."""
        layout, n = self.layout, self.n
        outputs, inputs, *kernel = layout.canonical_shape
        ones = (1,) * (free.dim() - 1)
        blocks = free.reshape(layout.groups, n, -1, *free.shape[1:])
        which = torch.tensor([p ^ q for p, q in product(range(n), repeat=2)], device=free.device)
        signs = [SIGNS[p ^ q][q] for p, q in product(range(n), repeat=2)]
        signed = torch.tensor(signs, dtype=free.dtype, device=free.device).view(-1, 1, *ones)
        chosen = blocks.index_select(1, which) * signed
        shape = (layout.groups, n, n, outputs // layout.groups // n, inputs // n, *kernel)
        weight = chosen.reshape(shape).transpose(2, 3).reshape(layout.canonical_shape)
        return layout.native(weight)

    def fold(self, weight: Tensor) -> Tensor:
        layout, n = self.layout, self.n
        outputs, inputs, *kernel = layout.canonical_shape
        blocks = layout.canonical(weight).reshape(
            layout.groups, n, outputs // layout.groups // n, n, inputs // n, *kernel
        )
        column = blocks[:, :, :, 0].clone(memory_format=torch.contiguous_format)
        for part, q in product(range(n), range(1, n)):
            column[:, part].add_(blocks[:, part ^ q, :, q], alpha=SIGNS[part][q])
        return column.view(outputs, inputs // n, *kernel)


@functools.lru_cache(64)
def _components(layout: Layout, n: int) -> _Components:
    """One for all layers of a shape: torch 2.6 compiles them anew for another object."""
    return _Components(layout, n)
