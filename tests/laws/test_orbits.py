"""What follows from the symmetries alone, against graphs, matrices and hand-written closures."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
import weakref

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import jvp, vmap

import tiedparam as tp
from tests.support.cases import assert_refused, same_bits
from tiedparam.laws import Example, Layout, Orbits, components, shared_tables
from tiedparam.laws.cells import consecutive_cells


class Mirrored(Orbits):
    law = "W[o, c, x] = W[o, c, k − 1 − x]"

    def symmetries(self, weight):
        yield weight.flip(-1)

    def cell(self):
        return (1, 1, *self.bound_layout.kernel)


class WholeMirrored(Mirrored):
    def cell(self):
        return None


class Skew(Orbits):
    law = "W = −Wᵀ"

    def symmetries(self, weight):
        yield -weight.transpose(0, 1)


class Lower(Orbits):
    law = "W[o, c] = 0 for c > o"

    def symmetries(self, weight):
        yield weight.tril()


class FirstRow(Orbits):
    law = "W[0] = 7"

    def __init__(self, value=7.0):
        super().__init__()
        self.value = value

    def symmetries(self, weight):
        yield torch.cat([torch.full_like(weight[:1], self.value), weight[1:]])


class Rolled(Orbits):
    law = "W[o, c] = W[o + 1, c + 1]"

    def symmetries(self, weight):
        yield weight.roll((1, 1), (0, 1))


class Toeplitz(Orbits):
    """Orbits of 1, 2, …, n members: more sizes than are gathered apart."""

    law = "W[o, c] = W[o + 1, c + 1], not round the edge"

    def symmetries(self, weight):
        moved = weight.clone()
        moved[1:, 1:] = weight[:-1, :-1]
        yield moved


LAYERS = [
    (lambda: nn.Conv2d(3, 4, 3), Mirrored),
    (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), Mirrored),
    (lambda: nn.Conv1d(4, 6, 5, groups=2), WholeMirrored),
    (lambda: nn.Linear(5, 5), Skew),
    (lambda: nn.Linear(5, 7), Lower),
    (lambda: nn.Linear(5, 4), FirstRow),
    (lambda: nn.Linear(6, 6), Rolled),
    (lambda: nn.Linear(7, 9), Toeplitz),
]
laws = pytest.mark.parametrize(("build", "law"), LAYERS, ids=lambda v: getattr(v, "__name__", None))


def tied(build, law, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = build().to(dtype)
    return tp.register_tie(layer, law, **options)


def matrix_of(rule):
    """The expansion as a matrix, and what it gives for zeros, by hand from the labels."""
    labels = rule.orbit_labels().flatten()
    matrix = torch.zeros(len(labels), rule.free_count, dtype=torch.float64)
    for entry, label in enumerate(labels.tolist()):
        if label:
            matrix[entry, abs(label) - 1] = 1 if label > 0 else -1
    return matrix


# Components ---------------------------------------------------------------------------------


@st.composite
def equalities(draw):
    count = draw(st.integers(1, 40))
    number = st.integers(-count, count)
    return count, draw(st.lists(st.lists(number, min_size=count, max_size=count), max_size=3))


def by_scipy(images, count):
    """The same by scipy, on two nodes for each entry."""
    pairs = []
    for image in images:
        for entry, number in enumerate(image):
            if number:
                other = abs(number) - 1 + (count if number < 0 else 0)
                pairs.append((entry, other))
                pairs.append((entry + count, (other + count) % (2 * count)))
    rows, columns = zip(*pairs, strict=True) if pairs else ((), ())
    graph = coo_matrix((numpy.ones(len(pairs)), (rows, columns)), shape=(2 * count, 2 * count))
    _, found = connected_components(graph, directed=False)
    expected = []
    for entry in range(count):
        first = next(e for e in range(count) if found[entry] in (found[e], found[e + count]))
        zero = found[entry] == found[entry + count]
        expected.append(0 if zero else (first + 1) * (1 if found[entry] == found[first] else -1))
    return expected


@settings(max_examples=300, deadline=None)
@given(equalities())
def test_components_are_those_of_scipy(case):
    count, images = case
    found = components.of_equalities([torch.tensor(image) for image in images], count)
    assert found.tolist() == by_scipy(images, count)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_one_pass_over_a_group_gives_what_its_generators_give(signed, turns):
    number = torch.arange(1, 26).view(5, 5)
    if turns == 4:  # the mirror with a sign: its axis is zero
        group = [number.rot90(k) for k in range(4)]
        group += [(-1 if signed else 1) * number.rot90(k).flip(0) for k in range(4)]
        generators = [group[1], group[4]]
    else:
        power = {1: [0, 1, 2, 3], 2: [0, 2], 3: [0, 1, 2, 3]}[turns]
        sign = -1 if signed else 1
        group = [sign**k * number.rot90(k) for k in power]
        generators = [group[1]]
    by_group = components.of_group([image.flatten() for image in group], 25)
    by_generators = components.of_equalities([image.flatten() for image in generators], 25)
    assert torch.equal(by_group, by_generators)
    assert not torch.equal(by_group, number.flatten())


def test_a_long_chain_is_one_orbit():
    count = 100_000
    chain = torch.arange(count)  # each equals the one before it, and of the first nothing is said
    assert components.of_equalities([chain], count).eq(1).all()
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(0)) + 1
    cycle = torch.empty(count, dtype=torch.int64)
    cycle[shuffled - 1] = shuffled.roll(1)
    assert components.of_equalities([cycle], count).eq(1).all()


# What is derived ----------------------------------------------------------------------------


@laws
def test_expansion_adjoint_and_counts_are_those_of_the_matrix(build, law):
    layer = tied(build, law)
    rule = tp.get_tie(layer)
    matrix, (free,) = matrix_of(rule), layer.parametrizations.weight.parameters()
    fixed = rule.forward(torch.zeros_like(free)).detach().flatten()
    torch.testing.assert_close(layer.weight.flatten(), matrix @ free.flatten() + fixed)
    dense = torch.randn_like(layer.weight)
    (folded,) = rule.adjoint(dense)
    torch.testing.assert_close(folded.flatten(), matrix.T @ dense.flatten())
    assert torch.equal(rule.multiplicities()[0].flatten(), (matrix**2).sum(0))
    (gradient,) = torch.autograd.grad(layer.weight, free, dense)
    assert torch.equal(gradient, folded)
    assert torch.equal(rule.spread(free).flatten(), layer.weight.flatten() - fixed)
    assert torch.linalg.matrix_rank(matrix) == rule.free_count


@laws
def test_values_are_numbered_by_their_first_entries(build, law):
    layer = tied(build, law)
    rule = tp.get_tie(layer)
    seen = []
    for label in rule.orbit_labels().flatten().tolist():
        if abs(label) not in seen and label:
            assert label > 0
            seen.append(label)
    assert seen == list(range(1, rule.free_count + 1))
    weight = torch.randn(layer.weight.shape)
    assert rule.representatives(weight)[0].flatten().tolist() == [
        weight.flatten()[rule.orbit_labels().flatten().tolist().index(number)] for number in seen
    ]


@laws
def test_projection_is_the_nearest_by_least_squares(build, law):
    layer = tied(build, law)
    rule = tp.get_tie(layer)
    weight = torch.randn(layer.weight.shape, dtype=torch.float64)
    fixed = rule.forward(torch.zeros(rule.free_shapes()[0], dtype=torch.float64)).flatten()
    solved = torch.linalg.lstsq(matrix_of(rule), (weight.flatten() - fixed)[:, None]).solution
    torch.testing.assert_close(rule.right_inverse(weight)[0].flatten(), solved[:, 0])


@laws
def test_derivatives_of_every_order_and_direction(build, law):
    layer = tied(build, law)
    rule = tp.get_tie(layer)
    free = next(layer.parametrizations.weight.parameters()).detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(rule, free)
    assert torch.autograd.gradgradcheck(rule, free)
    assert torch.autograd.gradcheck(rule, free, check_forward_ad=True, check_backward_ad=False)
    value, tangent = jvp(rule, (free.detach(),), (free.detach() + 1,))
    assert torch.equal(value, rule(free))
    assert torch.equal(tangent, rule.spread(free + 1))
    stacked = torch.stack([free, 2 * free, free - 1])
    assert torch.equal(vmap(rule)(stacked), torch.stack([rule(each) for each in stacked]))


@laws
def test_a_gradient_has_the_same_bits_at_every_run(build, law):
    layer = tied(build, law, torch.float32)
    dense = torch.randn_like(layer.weight)
    (free,) = layer.parametrizations.weight.parameters()
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(torch.autograd.grad(layer.weight, free, dense)[0])
    finally:
        torch.set_num_threads(threads)
    assert same_bits(found[0], found[1])
    assert same_bits(found[1], found[2])


def test_zeros_are_zeros_and_fixed_numbers_are_exact():
    layer = tied(lambda: nn.Linear(4, 4), Skew, torch.float32)
    with torch.no_grad():
        for parameter in layer.parametrizations.weight.parameters():
            parameter.fill_(torch.inf)
    assert same_bits(layer.weight.diagonal().detach().clone(), torch.zeros(4))
    layer = tied(lambda: nn.Linear(3, 4), FirstRow, torch.float32, value=0.1)
    assert torch.equal(layer.weight[0], torch.full((3,), 0.1))
    assert torch.equal(layer.to(torch.bfloat16).weight[0], torch.full((3,), 0.1).bfloat16())
    assert torch.equal(layer.double().weight[0], torch.full((3,), 0.1, dtype=torch.float64))


def test_a_gradient_of_infinity_stays_in_its_orbit():
    layer = tied(lambda: nn.Linear(7, 9), Toeplitz)
    rule = tp.get_tie(layer)
    dense = torch.ones(9, 7, dtype=torch.float64)
    dense[0, 6] = torch.inf  # an orbit of one member, filled up with itself
    (folded,) = rule.adjoint(dense)
    assert folded.isinf().sum() == 1
    assert not folded.isnan().any()


def test_fixed_numbers_that_contradict_each_other_are_refused():
    class Both(Orbits):
        law = "W[0] = 1 and W[0] = W[1] = 2"

        def symmetries(self, weight):
            yield torch.cat([torch.ones_like(weight[:1]), weight[1:]])
            yield torch.cat([weight[:1], torch.full_like(weight[1:2], 2.0), weight[2:]])
            yield weight[[1, 0, *range(2, len(weight))]]

    assert_refused(nn.Linear(2, 4), Both, "1", "2", "fixes one entry")

    class Opposite(Orbits):
        law = "W = −W = 3"

        def symmetries(self, weight):
            yield -weight
            yield torch.full_like(weight, 3.0)

    assert_refused(nn.Linear(2, 4), Opposite, "0 and to 3")


def test_a_fixed_number_reaches_its_whole_orbit_with_its_signs():
    class Chain(Orbits):
        law = "W[0] = 5, W[1] = −W[0], W[2] = W[1]"

        def symmetries(self, weight):
            yield torch.stack([torch.full_like(weight[0], 5.0), -weight[0], weight[1], weight[3]])

    layer = tied(lambda: nn.Linear(2, 4), Chain)
    assert layer.weight[:3].tolist() == [[5, 5], [-5, -5], [-5, -5]]
    assert tp.get_tie(layer).free_count == 2


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (lambda w: (w + w.flip(0)) / 2, "computed from several"),
        (lambda w: 2 * w, "scaled"),
        (lambda w: w.square(), "several, or scaled"),
        (lambda w: w.mean(0, keepdim=True).expand_as(w), "computed from several"),
        (lambda w: w.cumsum(0), "computed from several"),
        (lambda w: w[:2], "(2, 3)"),
        (lambda w: torch.full_like(w, torch.nan), "several, or scaled"),
        (lambda w: w.clamp(min=0), "minus that weight"),
        (lambda w: w.flip(0) if w[0, 0] > 0.9 else w, "minus that weight"),
        (lambda w: w + 0j, "complex128"),
        (lambda w: torch.empty_like(w, device="meta"), "on meta"),
        (lambda w: w.tolist(), "a list"),
        (lambda w: None, "None"),
    ],
)
def test_symmetries_that_state_no_equalities_are_refused(image, said):
    class Wrong(Orbits):
        law = "W = ?"

        def symmetries(self, weight):
            yield image(weight)

    assert_refused(nn.Linear(3, 4), Wrong, "state no equalities", said)


def test_symmetries_that_depend_on_the_weight_are_refused():
    class ForSome(Orbits):
        law = "W = Wᵀ, where the first entry is positive"

        def symmetries(self, weight):
            if weight[0, 0] > 0:
                yield weight.t()

    class Forgetful(Orbits):
        law = "W = Wᵀ"

        def symmetries(self, weight):
            weight.t()

    assert_refused(nn.Linear(3, 3), ForSome, "not as many tensors for every weight")
    assert_refused(nn.Linear(3, 3), Forgetful, "state no equalities", "None")


def test_symmetries_may_write_to_the_weight_that_they_are_given():
    class Written(Orbits):
        law = "W = its rows in reverse order"

        def symmetries(self, weight):
            weight.copy_(weight.flip(0))
            yield weight

    layer = tied(lambda: nn.Linear(3, 5), Written)
    assert torch.equal(layer.weight, layer.weight.flip(0))
    assert tp.get_tie(layer).free_count == 9


def test_generators_that_are_said_to_be_a_whole_group_are_closed_all_the_same():
    class Turned(Orbits):
        law = "W = W turned by a quarter"
        states_whole_group = True

        def __init__(self, sign=1):
            super().__init__()
            self.sign = sign

        def symmetries(self, weight):
            yield self.sign * weight.rot90()

    layer = tied(lambda: nn.Linear(5, 5), Turned)
    assert torch.equal(layer.weight, layer.weight.rot90())
    assert tp.get_tie(layer).free_count == 7
    skew = tied(lambda: nn.Linear(5, 5), Turned, sign=-1)
    assert torch.equal(skew.weight, -skew.weight.rot90())
    assert skew.weight[2, 2] == 0


def test_a_fixed_number_must_be_one_of_the_dtype():
    class Huge(Orbits):
        law = "the first row is 1e300"

        def symmetries(self, weight):
            image = weight.clone()
            image[0] = 1e300
            yield image

    assert_refused(nn.Linear(3, 4), Huge, "1 of 1 fixed numbers are too large for torch.float32")
    assert tied(lambda: nn.Linear(3, 4), Huge).weight[0].eq(1e300).all()


def test_a_law_that_leaves_nothing_is_refused():
    class Nothing(Orbits):
        law = "W = 0"

        def symmetries(self, weight):
            yield torch.zeros_like(weight)

    assert_refused(nn.Linear(3, 4), Nothing, "no value is left")


# Cells --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "layout", "count", "shape", "groups"),
    [
        ((1, 1, 3, 3), Layout((4, 5, 3, 3)), 20, (1, 1, 3, 3), 1),
        ((2, 1, 3), Layout((4, 5, 3)), 2, (2, 5, 3), 1),
        ((2, 5, 3), Layout((8, 5, 3), groups=2), 4, (2, 5, 3), 1),
        ((4, 5, 3), Layout((4, 5, 3)), 1, (4, 5, 3), 1),
        ((4, 5, 3), Layout((8, 5, 3), groups=4), 2, (4, 5, 3), 2),
        ((1, 1, 3), Layout((4, 3, 3), groups=2, transposed=True), 12, (1, 1, 3), 1),
        ((3, 2, 3), Layout((4, 3, 3), groups=2, transposed=True), 2, (2, 3, 3), 1),
        ((6, 2, 3), Layout((4, 3, 3), groups=2, transposed=True), 1, (4, 3, 3), 2),
        ((1,), Layout((4,)), 4, (1,), 1),
        ((1, 2, 1), Layout((4, 6, 5)), 12, (1, 2, 5), 1),
        (None, Layout((4, 6, 5)), 1, (4, 6, 5), 1),
    ],
)
def test_cells_lie_one_after_the_other(cell, layout, count, shape, groups):
    found = consecutive_cells(cell, layout)
    assert (found.count, found.layout.shape, found.layout.groups) == (count, shape, groups)
    assert found.layout.transposed == layout.transposed


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Conv1d(4, 6, 5, groups=2),
        lambda: nn.ConvTranspose1d(4, 6, 5, groups=2),
        lambda: nn.Conv2d(2, 3, (4, 3)),
        lambda: nn.Conv3d(2, 3, (1, 2, 3)),
    ],
)
def test_a_cell_gives_what_the_whole_weight_gives(build):
    by_cell, whole = tied(build, Mirrored), tied(build, WholeMirrored)
    one, other = tp.get_tie(by_cell), tp.get_tie(whole)
    assert torch.equal(one.orbit_labels(), other.orbit_labels())
    assert torch.equal(by_cell.weight, whole.weight)
    assert one._table.cells > 1 == other._table.cells
    assert same_bits(one.multiplicities()[0].flatten(), other.multiplicities()[0].flatten())


def test_a_cell_of_which_the_weight_is_not_made_is_refused():
    class Uneven(Mirrored):
        def cell(self):
            return (2, 1, *self.bound_layout.kernel)

    assert_refused(nn.Conv1d(2, 5, 3), Uneven, "cell() is (2, 1, 3)", "(5, 2, 3)")


@pytest.mark.parametrize("cell", [5, "abc", (1.0, 1, 3), (1, None, 3), {1, 2, 3}])
def test_what_is_no_cell_is_refused(cell):
    class Odd(Mirrored):
        def cell(self):
            return cell

    assert_refused(nn.Conv1d(2, 5, 3), Odd, f"cell() is {cell}")


def test_a_cell_that_the_law_does_not_leave_alone_is_refused():
    class MirroredAndRolled(Mirrored):
        def symmetries(self, weight):
            yield weight.flip(-1)
            yield weight.roll(1, 0)

    assert_refused(nn.Conv1d(2, 4, 3), MirroredAndRolled, "cell() is (1, 1, 3)", "breaks the law")


# Tables -------------------------------------------------------------------------------------


def test_layers_copies_and_pickles_share_one_table():
    layers = [tied(lambda: nn.Conv2d(3, 4, 3), Mirrored) for _ in range(2)]
    layers += [copy.deepcopy(layers[0]), pickle.loads(pickle.dumps(layers[0]))]
    assert len({id(tp.get_tie(layer)._table) for layer in layers}) == 1
    assert all(torch.equal(layer.weight, layers[0].weight) for layer in layers)
    assert b"_places" not in pickle.dumps(layers[0])
    assert list(layers[0].buffers()) == []
    other = tied(lambda: nn.Conv2d(3, 4, 5), Mirrored)
    assert tp.get_tie(other)._table is not tp.get_tie(layers[0])._table


def test_layouts_of_other_layer_groups_have_tables_of_their_own():
    class OfStreams(Orbits):
        law = "b[o] = b[o + g], g the groups of the layer"

        def symmetries(self, weight):
            yield weight.roll(self.bound_layout.layer_groups)

    for groups in (1, 2, 3):
        layer = nn.Conv1d(6, 6, 1, groups=groups)
        tp.register_tie(layer, OfStreams, "bias")
        assert tp.get_tie(layer, "bias").free_count == groups


def test_a_law_that_says_itself_what_it_is_is_told_apart():
    class Rolls(Orbits):
        def __init__(self, step):
            super().__init__()
            self.law = f"W[o] = W[o + {step}]"

        def symmetries(self, weight):
            yield weight.roll(int(self.law[-2]), 0)

    counts = [tp.get_tie(tied(lambda: nn.Linear(1, 6), Rolls, step=s)).free_count for s in (2, 3)]
    assert counts == [2, 3]


def test_options_that_are_not_returned_by_options_are_told_apart():
    # FirstRow has no options(): what it was made with is seen all the same
    seven, three = (tied(lambda: nn.Linear(5, 4), FirstRow, value=v) for v in (7.0, 3.0))
    assert seven.weight[0].eq(7).all()
    assert three.weight[0].eq(3).all()


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (1, 1, True),
        (1, True, False),
        ([1, 2], [1, 2], True),
        ([1, 2], (1, 2), False),
        ({"a": [1]}, {"a": [1]}, True),
        ({"a": [1]}, {"a": [2]}, False),
        (slice(1, 2), slice(1, 2), True),
        (slice(1, 2), slice(1, 3), False),
        ({1, 2}, {2, 1}, True),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), True),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), False),
        (torch.tensor([1, 2]), torch.tensor([[1, 2]]), False),
        (torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32), False),
        (torch.tensor([1, 2, 3, 4])[::2], torch.tensor([1, 3]), True),
        (torch.ones(2, device="meta"), torch.ones(2, device="meta"), False),
        (Skew(), Skew(), True),
        (Skew(), Lower(), False),
        (FirstRow(7.0), FirstRow(7.0), True),
        (FirstRow(7.0), FirstRow(8.0), False),
        (random.Random(0), random.Random(0), False),
    ],
)
def test_a_table_is_shared_where_all_that_the_law_holds_is_equal(one, other, equal):
    rules = FirstRow(one), FirstRow(other)
    assert (rules[0].law_key() == rules[1].law_key()) is equal
    assert rules[0].law_key() == rules[0].law_key() or not equal


def test_parts_and_buffers_of_a_law_count():
    rules = []
    for part, value in ((Skew(), 1.0), (Lower(), 1.0), (Skew(), 2.0), (Skew(), 1.0)):
        rule = FirstRow()
        rule.part = part
        rule.register_buffer("numbers", torch.tensor([value]))
        rules.append(rule.law_key())
    assert rules[0] == rules[3]
    assert rules[0] not in rules[1:3]


def test_few_tables_outlive_their_layers():
    layer = tied(lambda: nn.Linear(6, 6), Rolled)
    table = weakref.ref(tp.get_tie(layer)._table)
    del layer
    gc.collect()
    assert table() is not None
    for size in range(2, 2 + shared_tables._KEPT):
        tied(lambda size=size: nn.Linear(size, size), Rolled if size != 6 else Skew)
    gc.collect()
    assert len(shared_tables._last) == shared_tables._KEPT
    assert table() is None


def test_large_tables_do_not_outlive_their_layers(monkeypatch):
    monkeypatch.setattr(shared_tables, "_KEPT_BYTES", 2 * 4 * 36 * 3)  # three of 6×6 entries
    shared_tables._last.clear()
    layers = [tied(lambda: nn.Linear(6, 6), FirstRow, value=float(v)) for v in range(5)]
    tables = [weakref.ref(tp.get_tie(layer)._table) for layer in layers]
    assert len(shared_tables._last) == 3
    again = tied(lambda: nn.Linear(6, 6), FirstRow, value=0.0)
    assert tp.get_tie(again)._table is tables[0]()  # still used, so it is shared
    del layers, again
    gc.collect()
    assert [table() is not None for table in tables] == [True, False, False, True, True]


@laws
def test_tables_are_small_and_survive_to_empty(build, law):
    layer = tied(build, law, torch.float32)
    expected = copy.deepcopy(layer.state_dict()), layer.weight.detach().clone()
    table = tp.get_tie(layer)._table
    assert table._places.dtype == torch.int32
    assert table._places.numel() * table.cells == layer.weight.numel()
    layer.to_empty(device="cpu")
    layer.load_state_dict(expected[0])
    assert torch.equal(layer.weight, expected[1])
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    assert set(layer.state_dict()) == {"parametrizations.weight.original0", "bias"}


@laws
def test_fake_and_meta_tensors_have_the_shape(build, law):
    layer = tied(build, law)
    rule, shape = tp.get_tie(layer), layer.weight.shape
    (free,) = layer.parametrizations.weight.parameters()
    assert rule(free.detach().to("meta")).shape == shape
    value = free.detach()
    with FakeTensorMode() as mode:
        assert rule(mode.from_tensor(value)).shape == shape
    assert torch.equal(rule(value), layer.weight)  # nothing fake was kept


@laws
def test_a_law_is_bound_to_real_numbers_whatever_mode_is_at_work(build, law):
    shared_tables._last.clear()
    shared_tables._used.clear()
    with torch.device("meta"):
        layer = tp.register_tie(build(), law)
    expected = tied(build, law)
    assert torch.equal(tp.get_tie(layer).orbit_labels(), tp.get_tie(expected).orbit_labels())
    shared_tables._last.clear()
    shared_tables._used.clear()
    with torch.inference_mode():
        layer = tied(build, law)
    layer.weight.sum().backward()
    with FakeTensorMode():
        rule = law()
        assert rule.bind(tp.get_tie(layer).bound_layout, torch.float64) is None
    assert torch.equal(rule.orbit_labels(), tp.get_tie(expected).orbit_labels())


@laws
def test_a_compiled_and_an_exported_graph_hold_one_cell(build, law):
    torch._dynamo.reset()
    layer = tied(build, law, torch.float32)
    x = torch.randn(2, *([layer.in_channels] + [6] * (layer.weight.dim() - 2)
        if hasattr(layer, "in_channels") else [layer.in_features]))  # fmt: skip
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    table = tp.get_tie(layer)._table
    for strict in (False, True):
        program = torch.export.export(layer, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), layer(x))
        sizes = sorted(value.numel() for value in program.constants.values())
        assert sizes[-1] == layer.weight.numel() // table.cells


def test_derived_labels_of_a_law_with_a_forward_of_its_own():
    layer = tp.register_tie(nn.Conv2d(3, 3, 3), "flip_sym")
    rule = tp.get_tie(layer)
    derived, own = rule.derived_labels(), rule.orbit_labels()
    assert not torch.equal(derived, own)  # numbered otherwise
    pairs = set(zip(derived.flatten().tolist(), own.flatten().tolist(), strict=True))
    assert len(pairs) == rule.free_count == 42

    class Undecided(Orbits):
        law = "W = mean"

        def free_shapes(self):
            return (self.bound_layout.shape,)

        def forward(self, free):
            return free.clone()

        def symmetries(self, weight):
            yield weight.mean(0, keepdim=True).expand_as(weight)

    layer = tp.register_tie(nn.Linear(3, 3), Undecided)
    with pytest.raises(tp.TieError, match="state no equalities"):
        tp.get_tie(layer).derived_labels()


def test_an_example_of_a_law_of_four_lines_trains():
    layer = tied(lambda: nn.Linear(6, 6), Rolled, torch.float32)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    before = layer.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.weight, layer.weight.roll((1, 1), (0, 1)))
    assert Example(lambda: layer).build() is layer
