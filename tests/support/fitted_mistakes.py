"""Laws with fitted values that break the contract in one point each."""

from __future__ import annotations

import torch

from tests.support.users_laws import Mixed, OneProduct


class HalfAsMuch(Mixed):
    """Half of what would be needed."""

    def fit(self, weight, a, b):
        return tuple(value / 2 for value in super().fit(weight, a, b))


class FirstAlone(Mixed):
    """Leaves the second source out."""

    def fit(self, weight, a, b):
        first = (weight * a).sum() / (a * a).sum()
        return (torch.stack([first, torch.zeros_like(first)]),)


class NoisyMix(Mixed):
    """Finds other values each time."""

    def fit(self, weight, a, b):
        return tuple(value + torch.rand_like(value) for value in super().fit(weight, a, b))


class IdleMix(Mixed):
    """Stores a value that nothing reads."""

    def free_shapes(self):
        return (*super().free_shapes(), (1,))

    def forward(self, a, b, mix, idle):
        return super().forward(a, b, mix)

    def fit(self, weight, a, b):
        return (*super().fit(weight, a, b), weight.new_zeros(1))


class DetachedMix(Mixed):
    """The first source never hears of this use."""

    def forward(self, a, b, mix):
        return super().forward(a.detach() + 0 * a, b, mix)


class DeadProduct(OneProduct):
    """Both factors are zero where the weight is."""

    def right_inverse(self, weight):
        return tuple(value * bool(weight.any()) for value in super().right_inverse(weight))


class ViewOfTheWeight(OneProduct):
    """Keeps the dense weight's storage alive."""

    def right_inverse(self, weight):
        super().right_inverse(weight)
        return weight[:, 0], weight[0]


class UnlikeItsDraw(OneProduct):
    """Initialised with other numbers than were drawn."""

    def representatives(self, weight):
        return tuple(value * 2 for value in super().representatives(weight))


class LockedMix(Mixed):
    """Holds what no pickle can hold."""

    def __init__(self, source, source_name=None):
        super().__init__(source, source_name)
        self.times = lambda number, value: number * value

    def forward(self, a, b, mix):
        return self.times(mix[0], a) + self.times(mix[1], b)


class RealMix(Mixed):
    """Drops one half of complex numbers."""

    def fit(self, weight, a, b):
        return tuple(
            value.real.to(value.dtype) if value.is_complex() else value
            for value in super().fit(weight, a, b)
        )


FITTED_MISTAKES = [
    (HalfAsMuch, "fit_undoes_forward", "the weight that comes back is off"),
    (FirstAlone, "start_is_the_nearest", "a step would come nearer, by a slope of"),
    (NoisyMix, "projection_of_a_projection_is_the_same_weight", "projection is off"),
    (IdleMix, "every_value_that_is_stored_moves_the_weight", "1 of 3 values do not change"),
    (DetachedMix, "gradients_arrive_in_values_and_sources", "Jacobian"),
    (DeadProduct, "no_start_is_dead", "no free value gets a gradient"),
    (ViewOfTheWeight, "fitted_values_own_their_bytes", "gives a part of the weight"),
    (NoisyMix, "unlawful_checkpoint_is_projected", "the loaded weight is off"),
    (UnlikeItsDraw, "init_and_reset_fit_what_was_drawn", "that was initialised is off"),
    (NoisyMix, "lawful_weight_can_be_assigned", "raised TieError: the value breaks the law"),
    (LockedMix, "fitted_rule_is_pickled_and_computes_on_meta", "pickle"),
    (RealMix, "complex_weights_are_fitted_or_refused", "a step would come nearer"),
    (IdleMix, "optimizer_state_is_as_small_as_the_fitted_values", "Adam keeps 0 moments"),
]
"""A law, the statement that tells best what is wrong with it, and what it tells."""
