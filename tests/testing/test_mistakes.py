"""Laws that break the contract in one point each are caught, and what is told can be read."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

import tiedparam as tp
from tests.support.fitted_mistakes import FITTED_MISTAKES
from tests.support.users_laws import Centred, Circulant, Lower, Mirrored, OddKernel, Skew
from tiedparam.laws import Orbits, form
from tiedparam.rules.copy import Copy
from tiedparam.testing import STATEMENTS, check_rule

# Laws of which one statement or another does not hold ------------------------------------------


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


class Hasty(Circulant):
    """Offers a form that leaves out the bias, where it is not even cheap."""

    @form("hasty", cost=lambda rule, use: 2.0)
    def hastily(self, call):
        return call.stock(call.input, self.forward(*call.free), None)


class OtherWhenCompiled(Circulant):
    """Not the same rule under torch.compile."""

    def forward(self, free):
        return super().forward(2 * free if torch.compiler.is_compiling() else free)


class Nameless(Circulant):
    """Does not say what it is."""

    def extra_repr(self):
        return ""


class AlongAxis(Orbits):
    """Its own mirror image along one axis."""

    law = "W = its mirror image"

    def __init__(self, axis=0):
        super().__init__()
        self.axis = axis

    def options(self):
        return {"axis": self.axis}

    def symmetries(self, weight):
        yield weight.flip(self.axis)

    @classmethod
    def examples(cls):
        return [tp.Example(lambda: nn.Linear(4, 4), {"axis": 1})]


class Forgetful(AlongAxis):
    """A checkpoint of the other axis would load."""

    def options(self):
        return {}


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
    (Hasty, "every_form_computes_what_the_dense_twin_computes"),
    (Restless, "untying_leaves_a_plain_layer"),
    (Restless, "memory_format_of_the_weight_does_not_matter"),
    (OtherWhenCompiled, "compiled_layer_equals_the_eager_one"),
    (Nameless, "layer_stays_of_its_class_and_shows_the_tie"),
    (Forgetful, "options_say_what_the_law_was_made_with"),
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


# What users get wrong, and what they read ------------------------------------------------------


class Mixing(Mirrored):
    """Every entry is made of two free values."""

    def forward(self, half):
        mixed = (half + half.roll(1, -1)) / 2
        return torch.cat([mixed, mixed.flip(-1)], -1)

    def right_inverse(self, weight):
        self.bind_shape(weight)
        return (weight[..., : weight.shape[-1] // 2].clone(),)

    representatives = right_inverse


class Squaring(Mirrored):
    """Not linear."""

    def forward(self, half):
        return super().forward(half.square())

    def right_inverse(self, weight):
        self.bind_shape(weight)
        half = weight[..., : weight.shape[-1] // 2]
        return (half.clamp(min=0).sqrt(),)

    representatives = right_inverse


class OneTooMany(Mirrored):
    """Counts one more column than the law leaves."""

    def free_shapes(self):
        *rest, last = self.bound_layout.shape
        return ((*rest, last // 2 + 1),)

    def forward(self, half):
        return super().forward(half[..., :-1])

    def right_inverse(self, weight):
        self.bind_shape(weight)
        half = weight[..., : weight.shape[-1] // 2]
        return (torch.cat([half, half[..., :1]], -1),)

    representatives = right_inverse


class Silent(Mirrored):
    """Its symmetries say nothing."""

    def symmetries(self, weight):
        yield weight.clone()


class AnotherLaw(Mirrored):
    """Its symmetries say more than forward does."""

    def symmetries(self, weight):
        yield weight.flip(-1)
        yield weight.roll(1, -1)


class FirstHalf(Mirrored):
    """Drops one half instead of taking the mean."""

    def right_inverse(self, weight):
        self.bind_shape(weight)
        return (weight[..., : weight.shape[-1] // 2].clone(),)


class Rounding(Mirrored):
    """Goes through bfloat16 in one half: nothing is lost where the weight is bfloat16."""

    def forward(self, half):
        return torch.cat([half, half.flip(-1).bfloat16().to(half.dtype)], -1)

    def right_inverse(self, weight):
        self.bind_shape(weight)
        return (weight[..., : weight.shape[-1] // 2].clone(),)

    representatives = right_inverse


class OneMoreHalfBit(Mirrored):
    """Lawful in every dtype but bfloat16."""

    def forward(self, half):
        mirrored = half.flip(-1)
        if half.dtype is torch.bfloat16:
            mirrored = mirrored * (1 + torch.finfo(half.dtype).eps)
        return torch.cat([half, mirrored], -1)


class Counting(Mirrored):
    """Another weight at each call."""

    calls = 0

    def forward(self, half):
        self.calls += 1
        weight = super().forward(half)
        return weight if torch.compiler.is_compiling() else weight + self.calls - self.calls % 4

    def right_inverse(self, weight):
        self.bind_shape(weight)
        return (weight[..., : weight.shape[-1] // 2].clone(),)

    representatives = right_inverse


class OnTheCpu(Mirrored):
    """Makes its weight where tensors are made by default."""

    def forward(self, half):
        weight = torch.zeros(self.bound_layout.shape, dtype=half.dtype, device="cpu")
        weight[..., : half.shape[-1]] = half
        weight[..., half.shape[-1] :] = half.flip(-1)
        return weight


class Widening(Mirrored):
    """Computes in float32, and does not go back."""

    def forward(self, half):
        return super().forward(half.float() if half.dtype is torch.bfloat16 else half)


class Noisy(Mirrored):
    """Finds other free values each time."""

    def right_inverse(self, weight):
        return tuple(value + torch.rand_like(value) for value in super().right_inverse(weight))


class Unused(Mirrored):
    """Stores a value that nothing reads."""

    def free_shapes(self):
        return (*super().free_shapes(), (1,))

    def forward(self, half, unused):
        return super().forward(half)

    def right_inverse(self, weight):
        self.bind_shape(weight)
        half = weight[..., : weight.shape[-1] // 2]
        return half.clone(), weight.new_zeros(1)

    representatives = right_inverse


class RealOnly(Mirrored):
    """Says that it has a meaning for complex numbers, and drops half of them."""

    complex_valued = True

    def forward(self, half):
        mirrored = half.flip(-1)
        return torch.cat([half, mirrored.conj() if half.is_complex() else mirrored], -1)


class CountingCopy(Copy):
    """Another weight at each call."""

    calls = 0

    def forward(self, *free: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(*free) + self.calls


class Asking(Mirrored):
    """Looks at the numbers, which vmap, the compiler and the exporter do not have."""

    def forward(self, half):
        mirrored = half.flip(-1)
        return torch.cat([half, mirrored if half.sum() > -1e9 else -mirrored], -1)


class Random(Mirrored):
    """A gradient that is another one each time."""

    def forward(self, half):
        weight = super().forward(half)
        if weight.requires_grad and not torch.compiler.is_compiling():
            weight.register_hook(lambda grad: grad * (1 + torch.rand(()) * 1e-6))
        return weight


class NoTangent(Mirrored):
    """An autograd function that knows backward only."""

    class Expand(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(half):
            return torch.cat([half, half.flip(-1)], -1)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, gradient):
            first, second = gradient.chunk(2, -1)
            return first + second.flip(-1)

    def forward(self, half):
        return self.Expand.apply(half)


class Locked(Mirrored):
    """Holds what no pickle can hold."""

    def __init__(self):
        super().__init__()
        self.turn = lambda half: half.flip(-1)

    def forward(self, half):
        return torch.cat([half, self.turn(half)], -1)


class TimesMask(Lower):
    """0 · inf is NaN, and 0 · −1 is −0."""

    def forward(self, *free):
        (values,) = free
        mask = torch.ones(self.bound_layout.shape).tril()
        index = mask.flatten().cumsum(0).long() - 1
        return values[index].reshape(mask.shape) * mask.to(values.dtype)

    def free_shapes(self):
        rows, columns = self.bound_layout.shape
        return ((int(torch.ones(rows, columns).tril().sum()),),)

    def representatives(self, weight):
        return (weight.detach()[torch.ones(weight.shape).tril().bool()],)


class OtherSign(Skew):
    """Its forward forgets the sign."""

    def free_shapes(self):
        n = len(self.bound_layout.shape) and self.bound_layout.shape[0]
        return ((n * (n - 1) // 2,),)

    def forward(self, *free):
        n = self.bound_layout.shape[0]
        upper = free[0].new_zeros(n, n)
        upper[tuple(torch.triu_indices(n, n, 1))] = free[0]
        return upper + upper.t()

    def representatives(self, weight):
        n = self.bound_layout.shape[0]
        return (weight.detach()[tuple(torch.triu_indices(n, n, 1))],)


class FixedInSpread(Centred):
    """Says that the given numbers belong to the linear part."""

    def spread(self, *free):
        return self(*free)


class UnlikeItsDraw(Mirrored):
    """Initialised with other numbers than were drawn."""

    def representatives(self, weight):
        return tuple(value * 2 for value in super().representatives(weight))


class NeverTies(Mirrored):
    """Refuses its own examples."""

    def check(self, layout):
        return "it fits nowhere. Choose another law."


class Typo(Mirrored):
    """A name that there is not."""

    def forward(self, half):
        return torch.cat([half, half.fliped(-1)], -1)


MISTAKES = [
    (Mixing, "labels_number_the_orbits", "forward scales or mixes its free values"),
    (Squaring, "labels_number_the_orbits", "forward is not linear: its weight differs in"),
    (OneTooMany, "no_value_is_stored_that_is_not_needed", "9 values are stored, and they move"),
    (Silent, "law_says_something", "a random weight has all the symmetries"),
    (AnotherLaw, "law_holds_after_registration", "symmetry 1 is broken: the weight differs in"),
    (AnotherLaw, "orbits_are_those_that_the_symmetries_close", "by symmetries it belongs to"),
    (FirstHalf, "registration_is_the_least_squares_projection", "the free values is off: Mis"),
    (Rounding, "law_holds_after_registration", "in torch.float64 symmetry 0 is broken"),
    (OneMoreHalfBit, "law_holds_after_registration", "in torch.bfloat16 symmetry 0 is broken"),
    (Counting, "lawful_weights_come_back_to_the_bit", "differs to the bit in"),
    (OnTheCpu, "meta_tensors_are_expanded", "no data! (test_mistakes.py:"),
    (OnTheCpu, "law_holds_after_loading_on_the_meta_device", "no data!"),
    (RealOnly, "complex_weights_obey_the_law_or_are_refused", "with complex numbers symmetry 0"),
    (Widening, "law_holds_after_casts", "cast to torch.bfloat16 the weight is torch.float32"),
    (Noisy, "law_holds_after_loading_an_unlawful_checkpoint", "the loaded weight differs in"),
    (Noisy, "effective_weight_can_be_assigned", "raised TieError: the value breaks the law"),
    (Unused, "optimizer_state_is_as_small_as_the_free_values", "Adam keeps 0 moments"),
    (CountingCopy, "init_and_reset_leave_a_copy_alone", "the weight differs in"),
    (Asking, "vmap_expands_each_sample", "raised RuntimeError: vmap: It looks like you're"),
    (Asking, "exported_layer_equals_the_eager_one", "(test_mistakes.py:"),
    (Random, "backward_gives_the_same_bits_each_time", "the gradient of a second backward"),
    (NoTangent, "forward_mode_moves_along_the_expansion", "jvp"),
    (Locked, "bound_rule_can_be_pickled", "pickle"),
    (TimesMask, "what_is_fixed_stays_fixed", "with free values of -0.0 what is fixed differs"),
    (OtherSign, "forward_of_its_own_is_the_derived_one", "the wrong sign by what is derived"),
    (FixedInSpread, "spread_is_the_linear_part", "spread() differs in 4 of 12 entries"),
    (UnlikeItsDraw, "init_keeps_one_draw_per_orbit", "the size of a weight that was init"),
    (NeverTies, "every_example_can_be_tied", "it fits nowhere"),
    (Typo, "every_example_can_be_tied", "'Tensor' object has no attribute 'fliped'"),
    *FITTED_MISTAKES,
]
"""A law, the statement that tells best what is wrong with it, and what it tells."""


@pytest.mark.parametrize(
    ("rule", "name", "fact"), MISTAKES, ids=[f"{rule.__name__}-{n}" for rule, n, _ in MISTAKES]
)
def test_a_mistake_is_told(rule, name, fact):
    with pytest.raises(AssertionError) as caught:
        check_rule(rule, statements=[name])
    lines = str(caught.value).splitlines()
    assert re.search(r"^\d of \d statements? do(es)? not hold for \d examples?: ", lines[1])
    at = lines.index(f"  FAILS  {name}")
    told = [line.strip() for line in lines[at + 1 :] if line.startswith("     ")]
    assert fact in told[0]
    assert told[0].startswith(("Linear-", "Conv", "Embedding-"))
    assert told[-2:] == [
        f"Means: {STATEMENTS[name].meaning}",
        f"Correct: {STATEMENTS[name].correct}",
    ]


def test_what_does_not_hold_comes_first_and_the_reasons_before_what_follows():
    with pytest.raises(AssertionError) as caught:
        check_rule(Rounding, quick=True)
    lines = str(caught.value).splitlines()
    judged = [line.split() for line in lines if line.startswith(("  FAILS", "  holds"))]
    failed = [name for word, name in judged if word == "FAILS"]
    assert [word for word, _ in judged] == ["FAILS"] * len(failed) + ["holds"] * (
        len(judged) - len(failed)
    )
    assert lines[1].startswith(f"{len(failed)} of {len(judged)} statements do not hold for 2 exa")
    assert failed[0] == "law_holds_after_registration"
    assert failed == [name for name in STATEMENTS if name in failed]


@pytest.mark.parametrize("name", STATEMENTS)
def test_a_law_is_caught_by_each_statement(name):
    """Not one of them is satisfied by whatever it is given."""
    caught = {name for _, name in CAUGHT} | {name for _, name, _ in MISTAKES}
    assert name in caught
