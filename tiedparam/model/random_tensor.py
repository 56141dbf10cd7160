"""How far a random tensor of the same mean and spread lies from a law.

Write a weight of ``n`` entries as ``W = m·u + s·v``: ``u`` the unit tensor of equal entries, ``v``
a unit tensor at right angles to it. For normal i.i.d. entries of any mean and spread ``v`` is
uniform on its sphere, whatever ``m`` and ``s`` are. So ``m`` and ``s`` are kept, and only the
direction ``v`` is judged: scales of a norm layer, which lie around 1, are not near to "all equal"
for being so. With ``d = n − 1``, and ``β = 1`` for real and ``2`` for complex entries:

A law on one tensor, with ``f`` free values and the orthogonal projection ``P``
    ``q = ‖u − Pu‖²`` says how the law takes equal entries: 0 where they are lawful (every law
    that only shares), 1 where nothing is left of them (an antisymmetry). ::

        E(‖W‖² residual²)   = m² q + s² t,      t = (n − f − q) / d
        Var(‖W‖² residual²) = 4 m² s² (q − q²) / (β d)
                            + 2 s⁴ ((n − f − 2q + q²) − d t²) / (d (β d + 2))

    For ``q = 0`` this is ``s² · Beta(β(n − f)/2, β(f − 1)/2)``, exactly. With ``f = 1``, "all
    entries are equal", it is not a distribution any more: every tensor of that mean and spread is
    as far away.

A copy of ``S = m'·u + s'·v'``
    ``‖W‖² residual² = |m − m'|² + s² + s'² − 2 s s' cos``, the cosine of mean 0 and variance
    ``1/(β d)``: ``(1 − cos)/2`` is ``Beta((β d − 1)/2, (β d − 1)/2)``, exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean and spread of a tensor.

    Attributes:
        mean: of its entries, complex for a complex tensor.
        spread: the root mean square distance of its entries from the mean.
        constant: whether all entries are equal to the bit.
    """

    mean: complex
    spread: float
    constant: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Moments:
        """The moments of a tensor with entries, in float32 or wider; NaN if an entry is not finite.

        ``spread`` is taken from the differences and not from squares: a mean that is large beside
        it must not eat it up.
        """
        values = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        parts = (values.real, values.imag) if values.is_complex() else (values,)
        ends = [[float(end) for end in part.aminmax()] for part in parts]
        scale = max(abs(end) for pair in ends for end in pair)
        if not 1e-15 < scale < 1e15:  # squares may leave the range
            scale = scale or 1.0
            values = values / scale
        else:
            scale = 1.0
        mean = values.mean()
        spread = float(torch.linalg.vector_norm(values - mean)) / math.sqrt(values.numel())
        constant = all(low == high for low, high in ends)
        return cls(scale * mean.item(), 0.0 if constant else scale * spread, constant)

    @property
    def size(self) -> float:
        """The root mean square of the entries."""
        return math.hypot(abs(self.mean), self.spread)


@dataclass(frozen=True)
class RandomResidual:
    """The distribution of ``residual²`` over random tensors of one mean and spread.

    Attributes:
        mean: its expectation.
        variance: its variance.
        low: the least that it can be.
        high: the most that it can be.
    """

    mean: float
    variance: float
    low: float
    high: float

    @classmethod
    def from_law(
        cls, moments: Moments, entries: int, free: int, unlawful: float, *, is_complex: bool
    ) -> RandomResidual:
        """For a linear law; ``unlawful`` is the residual² of a tensor of equal entries."""
        size = moments.size or 1.0
        m, s = abs(moments.mean) / size, moments.spread / size
        n, f, q, d, beta = entries, free, unlawful, entries - 1, 1 + is_complex
        trace = (n - f - q) / d
        squares = (n - f - 2 * q + q * q) - d * trace**2
        lawful, breaking = math.sqrt(1 - q), math.sqrt(q)
        return cls(
            mean=m * m * q + s * s * trace,
            variance=4 * m * m * s * s * (q - q * q) / (beta * d)
            + 2 * s**4 * squares / (d * (beta * d + 2)),
            low=max(0.0, m * breaking - s * lawful) ** 2,
            high=1 - max(0.0, m * lawful - s * breaking) ** 2,
        )

    @classmethod
    def from_copy(
        cls, moments: Moments, source: Moments, entries: int, *, is_complex: bool
    ) -> RandomResidual:
        """For a copy of a tensor with the moments ``source``."""
        apart = abs(moments.mean - source.mean) / moments.size
        s, other = moments.spread / moments.size, source.spread / moments.size
        return cls(
            mean=apart * apart + s * s + other * other,
            variance=4 * s * s * other * other / ((1 + is_complex) * (entries - 1)),
            low=apart * apart + (s - other) * (s - other),
            high=apart * apart + (s + other) * (s + other),
        )

    def beside(self, fixed: Moments, moments: Moments) -> RandomResidual:
        """For a law that fixes entries to numbers; ``fixed`` has their moments, zeros elsewhere.

        ``|w − v|² = |w|² − 2 Re(w̄·v) + |v|²`` at such an entry. How it is spread is not known.
        """
        size = moments.size or 1.0
        product = (complex(moments.mean).conjugate() * complex(fixed.mean)).real
        mean = self.mean + ((fixed.size / size) ** 2 - 2 * product / size / size)
        return RandomResidual(mean, 0.0, 0.0, math.inf)

    @property
    def expected(self) -> float:
        """The root mean square residual."""
        return math.sqrt(self.mean)

    def z_score(self, residual: float) -> float | None:
        """How many standard deviations ``residual²`` lies from its mean; None if it has none."""
        deviation = math.sqrt(max(0.0, self.variance))
        return (residual * residual - self.mean) / deviation if deviation else None

    def p_value(self, residual: float, rounding: float = 0.0) -> float:
        """How likely a random tensor lies as near: at most this.

        Chernoff's bound for the Beta distribution ``B(a, b)`` between ``low`` and ``high`` with
        this mean and variance: with ``μ = a/(a + b)`` and ``y < μ``, ::

            P(B ≤ y) ≤ exp(−(a + b) · (μ log(μ/y) + (1 − μ) log((1 − μ)/(1 − y))))

        Args:
            residual: of the weight.
            rounding: entries are known to such a part of them, so that a residual below it says
                no more than one as large: in few digits, two numbers are equal by luck.
        """
        width = self.high - self.low
        if not (self.variance > 0 and width > 0):
            return 1.0
        y = (max(residual, rounding) ** 2 - self.low) / width
        mu = (self.mean - self.low) / width
        if not y < mu < 1:
            return 1.0
        if y <= 0:
            return 0.0
        both = mu * (1 - mu) * width**2 / self.variance - 1
        divergence = mu * math.log(mu / y) + (1 - mu) * math.log((1 - mu) / (1 - y))
        return math.exp(-both * divergence)
