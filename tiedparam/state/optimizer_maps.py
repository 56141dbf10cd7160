"""How tensors of each kind follow a tie: the maps of `register_optimizer`.

With ``B`` the expansion and ``m`` the multiplicity of a free value, a free value receives the
gradient ``Bᵀg`` of the dense one: with equal gradients within an orbit, ``m`` times each of them.
Squares and magnitudes have no sign, so ``|B|`` adds where a signed orbit subtracts. This holds
where every entry of the weight is a free value, or minus it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from tiedparam.laws.rule import Rule

Maps = dict[str, Callable[[Sequence[Tensor]], list[Tensor]]]


def maps_to_free(rule: Rule) -> Maps:
    """How a dense tensor of each kind becomes free ones."""

    def counted(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        counts = rule.multiplicities()
        return [(t, m.to(t.device, t.dtype)) for t, m in zip(tensors, counts, strict=True)]

    def summed(value: Tensor, *, unsigned: bool) -> list[Tensor]:
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        return list(rule.adjoint(wide * _signs(rule, wide) if unsigned else wide))

    def narrow(parts: Iterable[Tensor], like: Tensor) -> list[Tensor]:
        return [part.to(like.dtype) for part in parts]

    def gradient(dense: Sequence[Tensor]) -> list[Tensor]:
        return narrow(summed(dense[0], unsigned=False), dense[0])

    def gradient_magnitude(dense: Sequence[Tensor]) -> list[Tensor]:
        return narrow(summed(dense[0], unsigned=True), dense[0])

    def squared_gradient(dense: Sequence[Tensor]) -> list[Tensor]:
        parts = counted(summed(dense[0], unsigned=True))
        return narrow((m * part for part, m in parts), dense[0])

    def weight(dense: Sequence[Tensor]) -> list[Tensor]:
        return list(rule.right_inverse(dense[0]))

    def weight_magnitude(dense: Sequence[Tensor]) -> list[Tensor]:
        parts = counted(summed(dense[0], unsigned=True))
        return narrow((part / m for part, m in parts), dense[0])

    def zeros(dense: Sequence[Tensor]) -> list[Tensor]:
        return [dense[0].new_zeros(shape) for shape in rule.free_shapes()]

    return {
        "gradient": gradient,
        "gradient magnitude": gradient_magnitude,
        "squared gradient": squared_gradient,
        "weight": weight,
        "weight magnitude": weight_magnitude,
        "zeros": zeros,
    }


def maps_to_dense(rule: Rule) -> Maps:
    """How free tensors of each kind become a dense one."""

    def expanded(free: Sequence[Tensor], power: int, *, unsigned: bool) -> list[Tensor]:
        counts = rule.multiplicities()
        parts = [t / m.to(t.device, t.dtype) ** power for t, m in zip(free, counts, strict=True)]
        value = rule.spread(*parts)
        return [_dense(value * _signs(rule, value) if unsigned else value)]

    return {
        "gradient": lambda free: expanded(free, 1, unsigned=False),
        "gradient magnitude": lambda free: expanded(free, 1, unsigned=True),
        "squared gradient": lambda free: expanded(free, 2, unsigned=True),
        "weight": lambda free: [_dense(rule(*free))],
        "weight magnitude": lambda free: expanded(free, 0, unsigned=True),
        "zeros": lambda free: [_dense(torch.zeros_like(rule(*free)))],
    }


def is_linear(rule: Rule) -> bool:
    """Whether the rule is linear up to fixed entries, tried on random values."""
    if rule.reads_layers:
        return False  # nor is that of most laws that have values of their own besides
    left, right = _random_free_values(rule, 2)
    with torch.no_grad():
        both = rule.spread(*(a + 2 * b for a, b in zip(left, right, strict=True)))
        return torch.allclose(both, rule.spread(*left) + 2 * rule.spread(*right))


def _random_free_values(rule: Rule, count: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        [
            torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator)
            for shape in rule.free_shapes()
        ]
        for _ in range(count)
    ]


def _signs(rule: Rule, like: Tensor) -> Tensor:
    """``B1``: 1 for every entry, −1 where a signed orbit subtracts, 0 where one is fixed."""
    return rule.spread(*(like.new_ones(shape) for shape in rule.free_shapes()))


def _dense(value: Tensor) -> Tensor:
    return value.clone(memory_format=torch.contiguous_format)
