"""`check_rule`: laws that break the contract in one point each are caught, with a readable line."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.support.users_laws import Circulant, OddKernel
from tiedparam.rules.copy import Copy
from tiedparam.testing import check_rule

# Laws that are wrong in one point -------------------------------------------------------------


class FirstMember(Circulant):
    """Not the nearest lawful weight."""

    def right_inverse(self, weight):
        self.bind_shape(weight)
        return self.representatives(weight)


class PlainMean(Circulant):
    """Nearest, but seven equal floats do not have that float as their mean."""

    def right_inverse(self, weight):
        self.bind_shape(weight)
        totals, counts = self.adjoint(weight), self.multiplicities()
        return tuple((t / n).to(weight.dtype) for t, n in zip(totals, counts, strict=True))


class Slices(Circulant):
    """Keeps the dense weight's storage alive (S15)."""

    def representatives(self, weight):
        return (weight.detach()[0],)


class Redundant(Circulant):
    """Stores twice as many values as are needed."""

    def free_shapes(self):
        return (*super().free_shapes(), *super().free_shapes())

    def forward(self, free, more):
        return super().forward(free + more)

    def right_inverse(self, weight):
        self.bind_shape(weight)
        first = Circulant()
        first.bind_shape(weight)
        (free,) = first.right_inverse(weight)
        return free, torch.zeros_like(free)


class LooseLaw(Circulant):
    """Says less than forward does."""

    def symmetries(self, weight):
        yield weight.roll((2, 2), (0, 1)) if len(weight) == 4 else weight.clone()


class NoLaw(Circulant):
    """Says nothing."""

    def symmetries(self, weight):
        return iter(())


class WrongLaw(Circulant):
    """Says something else."""

    def symmetries(self, weight):
        yield weight.t()


class WrongCount(Circulant):
    """Counts one copy too few."""

    def multiplicities(self):
        return tuple(count - 1 for count in super().multiplicities())


class MeanForInit(Circulant):
    """Initialises with means, which have another distribution (S37)."""

    def representatives(self, weight):
        return tuple(total / len(weight) for total in self.adjoint(weight.detach()))


class DoubleGradient(Circulant):
    """The right values with the wrong derivative."""

    def forward(self, free):
        return super().forward(2 * free - free.detach())

    def right_inverse(self, weight):
        return Circulant().right_inverse(weight)

    def multiplicities(self):
        return tuple(count / 2 for count in super().multiplicities())


class NoGradient(Circulant):
    """Cut off from the optimizer."""

    def forward(self, free):
        return super().forward(free.detach()) + 0 * free.sum()

    def right_inverse(self, weight):
        self.bind_shape(weight)
        return Circulant().right_inverse(weight)


class Shrinking(Circulant):
    """Not a projection."""

    def right_inverse(self, weight):
        return tuple(free * 0.5 for free in super().right_inverse(weight))


class IndexBuffer(Circulant):
    """Stores an index in every checkpoint, unseen by the check at registration."""

    def train(self, mode=True):  # torch calls it when it takes the rule
        self.register_buffer("index", torch.zeros(3))
        return super().train(mode)


class Restless(Circulant):
    """Keeps the law with another weight every time."""

    def forward(self, free):
        self.reads = getattr(self, "reads", 0) + 1
        return super().forward(free) * self.reads

    def right_inverse(self, weight):
        self.bind_shape(weight)
        return Circulant().right_inverse(weight)


class OtherWhenCompiled(Circulant):
    """Not the same rule under torch.compile."""

    def forward(self, free):
        return super().forward(2 * free if torch.compiler.is_compiling() else free)


class Nameless(Circulant):
    """Does not say what it is."""

    def extra_repr(self):
        return ""


class Narrow(Circulant):
    """Sums in half precision."""

    def right_inverse(self, weight):
        self.bind_shape(weight)
        members = [row.roll(-number) for number, row in enumerate(weight)]
        total = members[0]
        for member in members[1:]:
            total = total + member
        return (total / len(members),)


class Widened(Circulant):
    """float32 whatever it was given."""

    def project(self, weight):
        return super().project(weight.float())


class UnsignedInit(OddKernel):
    """Takes the mean of both halves where one is minus the other."""

    def right_inverse(self, weight):
        self.bind_shape(weight)
        half = weight.flatten(2).chunk(2, -1)
        return ((half[1] + half[0].flip(-1)) / 2,)


class Snapshot(Copy):
    """Right at registration, and never again."""

    def forward(self, *free: Tensor) -> Tensor:
        if not hasattr(self, "taken"):
            self.taken = super().forward(*free).detach().clone()
        return self.taken


class Detached(Copy):
    """The source never hears of this use."""

    def forward(self, *free: Tensor) -> Tensor:
        return super().forward(*free).detach() + 0 * super().forward(*free)


class OwnSource(Copy):
    """Registers the source below the linked layer, with keys of its own (S27)."""

    def train(self, mode=True):  # unseen by the check at registration
        self.registered = copy.deepcopy(self.source)
        return super().train(mode)


CAUGHT = [
    (FirstMember, "registration_is_the_least_squares_projection"),
    (FirstMember, "no_lawful_weight_is_nearer_than_the_projection"),
    (PlainMean, "lawful_weights_come_back_to_the_bit"),
    (PlainMean, "right_inverse_undoes_forward"),
    (PlainMean, "projection_is_idempotent"),
    (Slices, "free_values_own_their_bytes"),
    (Redundant, "no_value_is_stored_that_is_not_needed"),
    (LooseLaw, "no_value_is_stored_that_is_not_needed"),
    (NoLaw, "law_says_something"),
    (NoLaw, "law_holds_after_registration"),
    (WrongLaw, "law_holds_after_registration"),
    (WrongCount, "multiplicities_count_the_copies"),
    (WrongCount, "rescale_multiplies_by_the_root_of_the_multiplicity"),
    (MeanForInit, "representatives_are_members_of_their_orbits"),
    (MeanForInit, "init_keeps_one_draw_per_orbit"),
    (MeanForInit, "reset_parameters_keeps_one_draw_per_orbit"),
    (DoubleGradient, "gradient_is_the_sum_over_each_orbit"),
    (DoubleGradient, "gradcheck_and_gradgradcheck_pass"),
    (NoGradient, "gradient_is_the_sum_over_each_orbit"),
    (NoGradient, "gradcheck_and_gradgradcheck_pass"),
    (NoGradient, "law_holds_after_100_optimizer_steps"),
    (Shrinking, "projection_is_idempotent"),
    (Shrinking, "lawful_weights_come_back_to_the_bit"),
    (Shrinking, "residual_is_zero_for_lawful_and_zero_weights"),
    (Shrinking, "residual_of_independent_entries_is_what_the_counts_say"),
    (Restless, "layer_computes_what_its_dense_twin_computes"),
    (Restless, "untying_leaves_a_plain_layer"),
    (Restless, "memory_format_of_the_weight_does_not_matter"),
    (OtherWhenCompiled, "compiled_layer_equals_the_eager_one"),
    (Nameless, "layer_stays_of_its_class_and_shows_the_tie"),
    (Narrow, "projection_is_the_rounded_one_in_every_dtype"),
    (IndexBuffer, "state_dict_has_the_free_values_for_the_weight"),
    (IndexBuffer, "saved_files_hold_the_free_values_to_the_byte"),
    (Widened, "projection_is_idempotent"),
    (UnsignedInit, "registration_is_the_least_squares_projection"),
    (UnsignedInit, "right_inverse_undoes_forward"),
    (Snapshot, "law_holds_after_100_optimizer_steps"),
    (Snapshot, "law_holds_after_loading"),
    (Snapshot, "deepcopy_is_independent"),
    (Detached, "gradients_of_a_copy_arrive_in_the_source"),
    (OwnSource, "a_copy_stores_nothing"),
    (OwnSource, "state_dict_has_the_free_values_for_the_weight"),
    (OwnSource, "saved_files_hold_the_free_values_to_the_byte"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "name"), CAUGHT, ids=[f"{rule.__name__}-{name}" for rule, name in CAUGHT]
)
def test_contract_catches(rule, name):
    sound = rule.__mro__[1]
    examples = sound.examples()[:1]
    check_rule(sound, examples=examples, statements=[name])  # it is the rule that is at fault
    with pytest.raises(AssertionError, match=f"FAILS  {name}\n"):
        check_rule(rule, examples=examples, statements=[name])
