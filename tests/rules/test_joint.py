"""Laws together: joint orbits by linear algebra, projections by von Neumann, counts by Burnside."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tiedparam as tp
from tests.support.cases import COMPUTE, assert_refused, assert_satisfies
from tests.support.tensors import stored
from tiedparam.laws import Orbits
from tiedparam.rules import FlipSym, Joint, Masked, Repeat

REPEAT = ("repeat", {"outputs": 2})


class Mirrored(Orbits):
    """Kernels that are their own mirror images."""

    law = "W[o, c, x] = W[o, c, k − 1 − x]"

    def symmetries(self, weight):
        yield weight.flip(-1)

    def cell(self):
        return (1, 1, *self.bound_layout.kernel)


class Skew(Orbits):
    law = "W[i, j] = −W[j, i]"

    def check(self, layout):
        return None if len(set(layout.shape)) == 1 else "the weight must be square"

    def symmetries(self, weight):
        yield -weight.t()


class Permuted(Orbits):
    """One signed permutation of all entries."""

    law = "W[e] = ±W[π(e)]"

    def __init__(self, order, signs):
        super().__init__()
        self.order, self.signs = order, signs

    def options(self):
        return {"order": self.order, "signs": self.signs}

    def symmetries(self, weight):
        signs = weight.new_tensor(self.signs)
        yield (weight.flatten()[list(self.order)] * signs).view(weight.shape)


class First(Orbits):
    """The first entry is fixed."""

    law = "W[0, 0] = value"

    def __init__(self, value):
        super().__init__()
        self.value = value

    def options(self):
        return {"value": self.value}

    def symmetries(self, weight):
        image = weight.clone()
        image[0, 0] = self.value
        yield image


class InBlocks(Orbits):
    """Equal entries in blocks of some shape."""

    law = "W[o, c] = w[o // r, c // s]"

    def __init__(self, block):
        super().__init__()
        self.block = tuple(block)

    def options(self):
        return {"block": self.block}

    def symmetries(self, weight):
        outputs, inputs = self.block
        blocks = weight.unflatten(1, (-1, inputs)).unflatten(0, (-1, outputs))
        yield blocks.roll(1, 1).reshape(weight.shape)
        yield blocks.roll(1, 3).reshape(weight.shape)

    def cell(self):
        return self.block


def symmetric(weight: Tensor) -> Tensor:
    return (weight + weight.t()) / 2


def repeated(weight: Tensor) -> Tensor:
    return weight.unflatten(0, (-1, 2)).mean(1).repeat_interleave(2, 0)


# The oracle: projecting by one law after another, and linear algebra -----------------------------


def test_the_projection_is_the_limit_of_alternating_projections():
    layer = nn.Linear(6, 6, dtype=torch.float64)
    weight = layer.weight.detach().clone()
    tp.register_tie(layer, ["flip_sym", REPEAT])
    alternating = weight
    assert not torch.allclose(repeated(symmetric(weight)), layer.weight)  # they do not commute
    for _ in range(200):
        alternating = repeated(symmetric(alternating))
    torch.testing.assert_close(layer.weight.detach(), alternating, rtol=0, atol=1e-12)
    assert stored(layer) == 3 * 4 // 2
    assert_satisfies(FlipSym().for_layout(tp.Layout((6, 6))), layer.weight.detach())


@st.composite
def permutations(draw: st.DrawFn, count: int) -> tuple[list[int], list[float]]:
    signs = draw(st.lists(st.sampled_from([1.0, 1.0, 1.0, -1.0]), min_size=count, max_size=count))
    return draw(st.permutations(range(count))), signs


@given(st.lists(permutations(12), min_size=2, max_size=3))
@pytest.mark.filterwarnings("ignore:the tie of .* (leaves|frees) nothing")
def test_any_permutations_give_the_lawful_subspace(drawn):
    laws = [(Permuted, {"order": tuple(order), "signs": tuple(signs)}) for order, signs in drawn]
    layer = nn.Linear(4, 3, dtype=torch.float64)
    weight = layer.weight.detach().clone()
    tp.register_tie(layer, laws)
    unit = torch.eye(12, dtype=torch.float64)
    differences = [
        unit[list(order)] * torch.tensor(signs, dtype=torch.float64)[:, None] - unit
        for order, signs in drawn
    ]
    _, sizes, axes = torch.linalg.svd(torch.cat(differences))
    lawful = axes[sizes < 1e-9]
    assert tp.get_tie(layer).free_count == len(lawful)
    nearest = (lawful.t() @ lawful @ weight.flatten()).view(3, 4)
    torch.testing.assert_close(layer.weight.detach(), nearest, rtol=0, atol=1e-12)


# Counts --------------------------------------------------------------------------------------


def test_the_count_is_burnsides():
    channels, k = 8, 3
    conv = tp.register_tie(nn.Conv2d(channels, channels, k), ["flip_sym", Mirrored])
    identity, mirror = channels**2 * k**2, channels**2 * k
    flip, both = channels, channels * k  # the diagonal's centres; its middle rows
    assert (identity + mirror + flip + both) / 4 == stored(conv) == 200
    weight = conv.weight.detach()
    assert torch.equal(weight, weight.flip(-1))
    assert torch.equal(weight, weight.transpose(0, 1).flip(2, 3))
    row = tp.report(nn.Sequential(conv)).ties[0]
    assert (row.free_values, row.dense_values, row.multiplicity) == (200, 576, (1, 4))
    assert "200 of 576 values" in repr(conv)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.Conv2d, {}),
        (nn.Conv2d, {"groups": 2}),
        (nn.ConvTranspose2d, {}),
        (nn.ConvTranspose2d, {"groups": 2}),
    ],
)
def test_groups_and_transposed_layers(kind, options):
    layer = tp.register_tie(kind(8, 8, 3, **options), ["flip_sym", Mirrored])
    groups = options.get("groups", 1)
    assert stored(layer) == groups * ((8 // groups) ** 2 * 9 + (8 // groups) ** 2 * 3
                                      + 8 // groups + 8 // groups * 3) // 4  # fmt: skip
    for rule in (FlipSym(), Mirrored()):
        assert_satisfies(rule.for_layout(tp.get_tie(layer).bound_layout), layer.weight.detach())


def test_cells_are_the_least_common_multiples():
    layer = tp.register_tie(nn.Linear(24, 12), [(InBlocks, {"block": (2, 4)}),
                                                (InBlocks, {"block": (3, 1)})])  # fmt: skip
    rule = tp.get_tie(layer)
    assert rule.cell() == (6, 4)
    assert stored(layer) == 2 * 6  # all of a cell is one value
    weight = layer.weight.detach()
    assert torch.equal(weight, weight[::6, ::4].repeat_interleave(6, 0).repeat_interleave(4, 1))
    whole = tp.register_tie(nn.Linear(6, 6), [(InBlocks, {"block": (2, 2)}), "flip_sym"])
    assert tp.get_tie(whole).cell() is None


def test_layers_share_one_table():
    first, second = (tp.register_tie(nn.Linear(6, 6), ["flip_sym", REPEAT]) for _ in range(2))
    third = tp.register_tie(nn.Linear(6, 6), ["flip_sym", ("repeat", {"outputs": 3})])
    tables = [tp.get_tie(layer)._table for layer in (first, second, third)]
    assert tables[0] is tables[1]
    assert tables[0] is not tables[2]
    assert copy.deepcopy(tp.get_tie(first))._table is tables[0]


# Ways to state it ----------------------------------------------------------------------------


def test_all_ways_to_state_laws_are_one_tie():
    torch.manual_seed(0)
    dense = nn.Linear(4, 4)
    rule = Repeat(2)
    ways = [
        ["flip_sym", REPEAT],
        [FlipSym, rule],
        [FlipSym(), (Repeat, {"outputs": 2})],
        ["flip_sym", ["repeat", {"outputs": 2}]],  # as a file has it
        [["flip_sym", REPEAT], "flip_sym"],
        [REPEAT, "flip_sym"],
        Joint(["flip_sym", REPEAT]),
    ]
    found = [tp.register_tie(copy.deepcopy(dense), way) for way in ways]
    found.append(tp.register_tie(copy.deepcopy(dense), "joint", laws=["flip_sym", REPEAT]))
    for layer in found:
        assert torch.equal(layer.weight, found[0].weight)
        assert isinstance(tp.get_tie(layer), Joint)
    tp.register_tie(nn.Linear(4, 4), rule)  # which no list has bound


def test_a_list_of_one_law_is_that_law():
    layer = tp.register_tie(nn.Linear(4, 4), ["flip_sym"])
    assert type(tp.get_tie(layer)) is FlipSym
    assert tp.residual(layer, ["flip_sym"]) == 0
    with pytest.raises(TypeError, match="Its options are"):
        tp.register_tie(nn.Linear(4, 4), [("repeat", {"output": 2})])


def test_the_residual_is_that_of_the_tie():
    layer = nn.Linear(4, 4, dtype=torch.float64)
    weight = layer.weight.detach().clone()
    residual = tp.residual(layer, ["flip_sym", REPEAT])
    tp.register_tie(layer, ["flip_sym", REPEAT])
    distance = (weight - layer.weight.detach()).norm() / weight.norm()
    assert residual == pytest.approx(float(distance))
    assert tp.report(nn.Sequential(layer)).ties[0].residual == pytest.approx(residual)
    assert tp.residual(layer, ["flip_sym", REPEAT]) == 0


def test_repr_shows_the_laws():
    shown = repr(tp.register_tie(nn.Linear(4, 4), ["flip_sym", Mirrored, REPEAT]))
    assert "joint(laws=['flip_sym', Mirrored, ('repeat', {'outputs': 2})])" in shown
    assert "W[i, j, x] = W[j, i, flip(x)]" in shown
    assert "W[o] = w[o // r]" in shown


# Refusals ------------------------------------------------------------------------------------


def test_the_law_that_refuses_is_named():
    assert_refused(nn.Linear(4, 6), ["flip_sym", REPEAT], "'flip_sym'", "(6)", "(4)", "square")
    assert_refused(nn.Linear(5, 5), ["flip_sym", REPEAT], "'repeat(outputs=2)'", "5 outputs")
    assert_refused(
        nn.Linear(4, 4).to(torch.complex64), [REPEAT, "flip_sym"], "'flip_sym'", "complex64"
    )
    assert_refused(nn.Linear(4, 4), ["flip_sym", "flipsym"], "flip_sym")


def test_laws_that_read_other_layers_are_refused():
    source, layer = nn.Linear(4, 4), nn.Linear(4, 4)
    law = ("copy", {"source": source})
    assert_refused(layer, ["flip_sym", law], "'copy", "reads another layer", "Tie the source by")


def test_a_form_of_one_law_is_refused():
    law = ("channel_shared", {"over": "in", "compute": "reduced"})
    assert_refused(nn.Linear(4, 4), [law, "flip_sym"], "compute='reduced'", "Leave out compute=")


def test_laws_that_contradict_each_other_are_refused():
    laws = [(First, {"value": 1.0}), (First, {"value": 2.0})]
    assert_refused(nn.Linear(4, 4), laws, "fixes one entry to 1 and to 2", "Leave out one")


class Doubled(Orbits):
    law = "W = 2 W"

    def symmetries(self, weight):
        yield 2 * weight


def test_what_states_no_equalities_is_refused():
    assert_refused(nn.Linear(4, 4), ["flip_sym", Doubled], "state no equalities")


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ([], "empty list"),
        ([3], "not 3"),
        (["flip_sym", None], "not None"),
        (("flip_sym", "repeat"), "a list of these, not"),
        ({"flip_sym"}, "a list of these, not"),
        ([("flip_sym", {"groups": 2}), REPEAT], "has no|unexpected keyword"),
    ],
)
def test_what_is_no_list_of_laws_is_a_type_error(rule, said):
    layer = nn.Linear(4, 4)
    with pytest.raises(TypeError, match=said):
        tp.register_tie(layer, rule)
    assert not tp.is_tied(layer)


def test_options_beside_a_list_are_refused():
    with pytest.raises(TypeError, match=r"\['outputs'\] of a list .* belong to one of them"):
        tp.register_tie(nn.Linear(4, 4), ["flip_sym", "repeat"], outputs=2)
    with pytest.raises(TypeError, match="at least two laws"):
        Joint(["flip_sym"])


def test_a_rule_that_is_tied_already_is_refused():
    rule = FlipSym()
    tp.register_tie(nn.Linear(4, 4), rule)
    assert_refused(nn.Linear(4, 4), [rule, REPEAT], "bound to a tensor already")


# Nothing left --------------------------------------------------------------------------------


@pytest.fixture
def nothing():
    """A layer whose laws leave nothing but zeros."""

    def tied(**options):
        layer = nn.Linear(4, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", tp.TieWarning)
            return tp.register_tie(layer, ["flip_sym", "skew"], **options)

    return tied


def test_an_empty_intersection_is_warned_of():
    layer = nn.Linear(4, 4)
    with pytest.warns(tp.TieWarning, match="leaves nothing to train.* all 16 values.*fewer of"):
        tp.register_tie(layer, ["flip_sym", "skew"], init="rescale")
    assert list(layer.parametrizations.weight.parameters()) == []
    assert not layer.weight.any()
    plan = {"0": ["flip_sym", "skew"]}
    with pytest.warns(tp.TieWarning, match="leaves nothing to train"):
        done = tp.tie_model(nn.Sequential(nn.Linear(4, 4)), plan)
    assert done.ties[0].free_values == 0
    assert "Checkpoint, without its header: 16 B of 80 B dense" in str(done)


def test_a_law_alone_that_leaves_nothing_is_refused():
    assert_refused(nn.Linear(1, 1), Skew, "fixes every entry")


def test_what_is_left_follows_the_layer(nothing, tmp_path):
    layer = nothing()
    assert list(layer.state_dict()) == ["bias"]
    assert torch.equal(layer(torch.ones(2, 4)), layer.bias.expand(2, 4))
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        assert layer.to(dtype).weight.dtype == dtype
        assert pickle.loads(pickle.dumps(layer)).weight.dtype == dtype
        assert copy.deepcopy(layer).weight.dtype == dtype
    assert layer.to("meta").weight.is_meta
    assert not layer.to_empty(device="cpu").weight.any()
    model = nn.Sequential(nothing()).double()
    tp.save(model, tmp_path / "model.safetensors")
    loaded = nn.Sequential(nn.Linear(4, 4)).double()
    tp.load(tmp_path / "model.safetensors", loaded)
    assert isinstance(tp.get_tie(loaded[0]), Joint)
    assert torch.equal(loaded(torch.ones(1, 4).double()), model(torch.ones(1, 4).double()))


def test_what_is_left_follows_an_assigned_state_dict(nothing):
    beside = tp.register_tie(nn.Linear(2, 4), ["flip_sym", "skew"], rows=slice(0, 2))
    for loaded in (nothing(), beside):
        layer = copy.deepcopy(loaded).to("meta")
        layer.load_state_dict(loaded.state_dict(), assign=True)
        assert torch.equal(layer.weight, loaded.weight)


def test_nothing_left_trains_exports_and_is_removed(nothing):
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(layer.parameters())
    with pytest.warns(tp.TieWarning):
        tp.register_tie(layer, ["flip_sym", "skew"], optimizer=optimizer)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    exported = torch.export.export(layer, (torch.ones(1, 4),)).module()
    torch.testing.assert_close(exported(torch.ones(1, 4)), layer(torch.ones(1, 4)))
    layer.load_state_dict({"weight": torch.zeros(4, 4), "bias": torch.zeros(4)})
    tp.assign_(layer, torch.zeros(4, 4))
    tp.init_(layer, nn.init.ones_)
    layer.reset_parameters()
    assert not layer.weight.any()
    with pytest.raises(tp.TieError, match="breaks the law"):
        tp.assign_(layer, torch.ones(4, 4))
    tp.remove_tie(layer, optimizer=optimizer)
    assert layer.weight.requires_grad  # dense again, and to be trained
    assert sum(p is layer.weight for group in optimizer.param_groups for p in group["params"]) == 1


def test_fixed_numbers_alone_are_kept(nothing):
    class Ones(Orbits):
        law = "W = 1"

        def symmetries(self, weight):
            yield torch.ones_like(weight)

    layer = nn.Linear(3, 3)
    with pytest.warns(tp.TieWarning, match="leaves nothing to train"):
        tp.register_tie(layer, [Ones, "flip_sym"])
    assert torch.equal(layer.double().weight, torch.ones(3, 3).double())


# Life ----------------------------------------------------------------------------------------


def test_a_step_of_training_is_that_of_averaged_gradients():
    layer = nn.Linear(4, 4, dtype=torch.float64)
    tp.register_tie(layer, ["flip_sym", REPEAT])
    weight = layer.weight.detach().clone().requires_grad_()
    inputs = torch.randn(5, 4, dtype=torch.float64)
    (inputs @ weight.t()).square().sum().backward()
    layer(inputs).sub(layer.bias).square().sum().backward()
    rule = tp.get_tie(layer)
    (free,) = layer.parametrizations.weight.parameters()
    by_hand = torch.zeros(rule.free_count, dtype=torch.float64)
    by_hand.index_add_(0, rule.orbit_labels().flatten() - 1, weight.grad.flatten())
    torch.testing.assert_close(free.grad.flatten(), by_hand, **COMPUTE[torch.float64])


# Laws that are data --------------------------------------------------------------------------

MASK = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 1]]).bool()
SPARSE = ["flip_sym", ("masked", {"mask": MASK})]


def test_a_mask_holds_together_with_a_law():
    layer = nn.Linear(4, 4, dtype=torch.float64)
    weight = layer.weight.detach().clone()
    tp.register_tie(layer, SPARSE)
    both = MASK & MASK.t()
    nearest = torch.where(both, (weight + weight.t()) / 2, 0.0)
    torch.testing.assert_close(layer.weight.detach(), nearest, rtol=0, atol=1e-15)
    assert stored(layer) == int(both.triu().sum())
    assert "parametrizations.weight.0.law1_mask_bits" in layer.state_dict()


def test_a_fixed_number_holds_together_with_a_law():
    ones = ("fixed", {"mask": torch.eye(4).bool(), "value": 1.0})
    layer = tp.register_tie(nn.Linear(4, 4), [ones, "flip_sym"])
    assert torch.equal(layer.weight.diagonal(), torch.ones(4))
    assert torch.equal(layer.weight, layer.weight.t())
    assert stored(layer) == 6
    twos = ("fixed", {"mask": torch.eye(4).bool(), "value": 2.0})
    assert_refused(nn.Linear(4, 4), [ones, twos], "fixes one entry to 1 and to 2")
    huge = ("fixed", {"mask": torch.eye(4).bool(), "value": 1e39})
    assert_refused(nn.Linear(4, 4), [huge, "flip_sym"], "too large for torch.float32")
    weights = ("fixed", {"mask": torch.eye(4).bool()})
    assert_refused(nn.Linear(4, 4), [weights, "flip_sym"], "holds numbers", "one number as value=")


def test_their_data_lives_as_that_of_one_law(tmp_path):
    model = nn.Sequential(tp.register_tie(nn.Linear(4, 4), [SPARSE, "flip_sym"]))
    weight = model[0].weight.detach()
    tp.save(model, tmp_path / "tied.safetensors")
    loaded = tp.load(tmp_path / "tied.safetensors", nn.Sequential(nn.Linear(4, 4)))
    assert torch.equal(loaded[0].weight, weight)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model))).double().float()
    assert torch.equal(copied[0].weight, weight)
    copied.to_empty(device="cpu")
    with pytest.raises(tp.TieError, match=r"its data \(law0_law1_mask_bits\) is overwritten"):
        copied[0].weight.sum()
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied[0].weight, weight)
    transposed = ["flip_sym", ("masked", {"mask": MASK.t()})]  # the same zeros, by another mask
    other = tp.register_tie(nn.Linear(4, 4), [transposed, "flip_sym"])
    with pytest.raises(RuntimeError, match="pattern|joint"):
        other.load_state_dict(model[0].state_dict())


def test_tables_are_told_apart_by_the_data():
    first, second = (tp.register_tie(nn.Linear(4, 4), ["flip_sym", ("masked", {"mask": mask})])
                     for mask in (MASK, ~MASK))  # fmt: skip
    assert tp.get_tie(first).law_key() != tp.get_tie(second).law_key()
    assert not torch.equal(first.weight != 0, second.weight != 0)
    assert tp.get_tie(first).checksum == Masked(mask=MASK).checksum


def test_an_instance_with_data_stays_as_it_was():
    rule = Masked(mask=MASK)
    tp.register_tie(nn.Linear(4, 4), ["flip_sym", rule])
    assert rule.data().keys() == {"mask_bits"}
    tp.register_tie(nn.Linear(4, 4), rule)


def test_a_mask_of_another_shape_is_refused():
    law = ("masked", {"mask": torch.ones(3, 4).bool()})
    assert_refused(nn.Linear(4, 4), ["flip_sym", law], "'masked", "(3, 4)", "(4, 4)")
