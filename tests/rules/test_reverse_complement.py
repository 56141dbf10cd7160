"""reverse_complement: both strands of DNA alike, equirc's kernels, loops, counts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tiedparam as tp
from tests.support.cases import assert_refused, canonical_entries, layer_id
from tests.support.tensors import stored

BASES = "ACGT"
COMPLEMENT = {"A": "T", "C": "G", "G": "C", "T": "A"}


def one_hot(sequence: str) -> Tensor:
    return torch.tensor([[float(base == each) for each in sequence] for base in BASES])


def other_strand(sequence: str) -> str:
    """By letters: complements, read from the other end."""
    return "".join(COMPLEMENT[base] for base in reversed(sequence))


def random_sequence(length: int) -> str:
    return "".join(BASES[n] for n in torch.randint(4, (length,)).tolist())


LAYERS = [
    (lambda: nn.Conv1d(4, 6, 3), None),
    (lambda: nn.Conv1d(5, 3, 5), None),
    (lambda: nn.Conv1d(4, 4, 4), None),
    (lambda: nn.Conv1d(2, 3, 1), None),
    (lambda: nn.Conv1d(4, 5, 3), ([3, 2, 1, 0], [2, 1, 0, 4, 3])),
    (lambda: nn.Conv1d(4, 3, 3), ([1, 0, 2, 3], [0, 1, 2])),
    (lambda: nn.Conv1d(6, 4, 3, groups=2), None),
    (lambda: nn.Conv1d(4, 4, 3, groups=2), ([1, 0, 2, 3], [0, 1, 3, 2])),
    (lambda: nn.Conv1d(6, 3, 2, groups=3), ([2, 3, 0, 1, 5, 4], [1, 0, 2])),
    (lambda: nn.ConvTranspose1d(4, 6, 3), None),
    (lambda: nn.ConvTranspose1d(4, 6, 4, groups=2), None),
    (lambda: nn.ConvTranspose1d(3, 2, 3), ([0, 2, 1], [1, 0])),
]
EVERY = pytest.mark.parametrize(
    ("build", "pairs"), LAYERS, ids=[f"{n}-{layer_id(b)}" for n, (b, _) in enumerate(LAYERS)]
)


def partners(layer: nn.Module, pairs) -> tuple[list[int], list[int]]:
    if pairs is not None:
        return pairs
    return [*range(layer.in_channels)][::-1], [*range(layer.out_channels)][::-1]


@EVERY
def test_every_entry_is_the_mean_of_the_two_strands(build, pairs):
    layer = build().double()
    dense = canonical_entries(layer)
    tp.register_tie(layer, "reverse_complement", pairs=pairs)
    inputs, outputs = partners(layer, pairs)
    within, of_group = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    (k,), fixed = layer.kernel_size, 0
    for (o, i, a), value in canonical_entries(layer).items():
        channel = inputs[o // of_group * within + i]
        assert channel // within == outputs[o] // of_group
        partner = (outputs[o], channel % within, k - 1 - a)
        assert value == pytest.approx((dense[o, i, a] + dense[partner]) / 2, rel=1e-12, abs=1e-15)
        fixed += partner == (o, i, a)
    assert stored(layer) == (len(dense) + fixed) // 2


@pytest.mark.filterwarnings("ignore:the tie of 'bias' .* frees nothing")  # own partners all
@EVERY
def test_the_other_strand_has_the_other_strands_answer(build, pairs):
    layer = build().double()
    tp.register_tie(layer, "reverse_complement", pairs=pairs)
    tp.register_tie(layer, "reverse_complement", "bias", pairs=pairs)
    inputs, outputs = partners(layer, pairs)
    x = torch.randn(2, layer.in_channels, 11, dtype=torch.float64)
    for padding in (0, 1) if layer.kernel_size[0] > 1 else (0,):
        layer.padding = (padding,)
        torch.testing.assert_close(
            layer(x[:, inputs].flip(-1)), layer(x)[:, outputs].flip(-1), rtol=1e-12, atol=1e-12
        )


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(4, 16, 7), nn.ReLU(), nn.Conv1d(16, 10, 4)).double()


def tie(net: nn.Sequential) -> nn.Sequential:
    for layer in (net[0], net[2]):
        for name in ("weight", "bias"):
            tp.register_tie(layer, "reverse_complement", name, init="rescale")
    return net


def pooled(net: nn.Module, sequence: str) -> Tensor:
    """Maximum over places, and over the two channels of a pair."""
    answer = net(one_hot(sequence).double()[None]).amax(2)
    return torch.maximum(answer, answer.flip(1))


def test_a_network_does_not_see_which_strand_it_reads():
    torch.manual_seed(0)
    net = tie(network())
    untied = network()
    for _ in range(5):
        strand = random_sequence(40)
        other = other_strand(strand)
        assert strand != other
        torch.testing.assert_close(pooled(net, strand), pooled(net, other), rtol=1e-12, atol=1e-12)
        assert (pooled(untied, strand) - pooled(untied, other)).abs().max() > 1e-3


def test_the_reversed_order_of_bases_is_their_complement():
    strand = "AACGTTGCA"
    assert other_strand(strand) == "TGCAACGTT"
    assert torch.equal(one_hot(other_strand(strand)), one_hot(strand).flip(0, 1))


@pytest.mark.parametrize("kernel", [1, 4, 7])
def test_the_kernels_of_equirc_are_lawful(kernel):
    layers = pytest.importorskip("equirc.pytorch_rclayers")
    theirs = layers.RegToRegConv(reg_in=2, reg_out=3, kernel_size=kernel)
    ours = nn.Conv1d(4, 6, kernel, bias=False)
    # their layer keeps halves of a kernel; its answers to impulses are the whole
    impulses = torch.zeros(4, 4, 2 * kernel - 1)
    impulses[range(4), range(4), kernel - 1] = 1
    with torch.no_grad():
        ours.weight.copy_(theirs(impulses).flip(-1).transpose(0, 1))
    assert tp.residual(ours, "reverse_complement") < 1e-6
    tp.register_tie(ours, "reverse_complement")
    x = torch.randn(3, 4, 20)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "fixed"),
    [(64, 128, 15, 0), (64, 128, 16, 0), (65, 33, 15, 1), (65, 33, 16, 0), (65, 32, 15, 0)],
)
def test_closed_counts(inputs, outputs, kernel, fixed):
    conv = tp.register_tie(nn.Conv1d(inputs, outputs, kernel), "reverse_complement")
    count = (inputs * outputs * kernel + fixed) // 2
    assert tp.get_tie(conv).free_shapes() == ((1, count),)
    tp.register_tie(conv, "reverse_complement", "bias")
    assert tp.get_tie(conv, "bias").free_shapes() == (((outputs + 1) // 2,),)


def test_own_partners_are_counted_by_both_sides_and_the_centre():
    pairs = ([0, 1, 3, 2], [0, 1, 2, 4, 3])  # 2 inputs and 3 outputs by themselves
    for kernel, fixed in ((5, 6), (4, 0)):
        conv = tp.register_tie(nn.Conv1d(4, 5, kernel), "reverse_complement", pairs=pairs)
        assert stored(conv) == (20 * kernel + fixed) // 2


def test_pairs_may_be_tensors():
    pairs = (torch.tensor([3, 2, 1, 0]), torch.tensor([1, 0, 2]))
    conv = tp.register_tie(nn.Conv1d(4, 3, 3), "reverse_complement", pairs=pairs)
    assert tp.get_tie(conv).options() == {"pairs": ((3, 2, 1, 0), (1, 0, 2))}
    both = torch.tensor([[1, 0], [0, 1]])
    conv = tp.register_tie(nn.Conv1d(2, 2, 3), "reverse_complement", pairs=both)
    assert torch.equal(conv.weight[0, 0], conv.weight[0, 1].flip(-1))


def test_saved_and_loaded_by_a_file(tmp_path):
    pairs = ([3, 2, 1, 0], [1, 0, 2])
    for given in (None, pairs):
        conv = tp.register_tie(nn.Conv1d(4, 3, 3), "reverse_complement", pairs=given)
        tp.register_tie(conv, "reverse_complement", "bias", pairs=given)
        tp.save(conv, tmp_path / "conv.safetensors")
        other = tp.load(tmp_path / "conv.safetensors", nn.Conv1d(4, 3, 3))
        assert torch.equal(other.weight, conv.weight)
        assert torch.equal(other.bias, conv.bias)
        assert tp.get_tie(other).options() == tp.get_tie(conv).options()
        again = copy.deepcopy(other)
        assert torch.equal(again.weight, conv.weight)


def test_scan_finds_untied_layers_and_leaves_vectors_out():
    net = tp.untie_model(tie(network()))
    found = tp.scan(net, ["reverse_complement"]).candidates
    assert {c.layer for c in found if c.residual < 1e-12} == {"0", "2"}
    assert {c.tensor_name for c in found} == {"weight"}


# What does not fit ----------------------------------------------------------------------------

REFUSED = [
    (([0, 1, 2], [0, 1]), "pairs has 3 partners for 4 inputs. Name the partner of every channel."),
    (([3, 2, 1, 0], [0]), "pairs has 1 partners for 2 outputs"),
    (([3, 2, 1, 4], [0, 1]), "pairs gives input 3 the partner 4, and there are 4 inputs"),
    (([3, 2, 1, 0], [-1, 0]), "pairs gives output 0 the partner -1, and there are 2 outputs"),
    (([1, 2, 3, 0], [0, 1]), "pairs gives input 0 the partner 1, whose partner is 2"),
    (([3, 2, 1, 0], [1, 1]), "pairs gives output 0 the partner 1, whose partner is 1"),
    (([3, 2, 1, 0],), "pairs must be two lists of channels, of the inputs and of the outputs"),
    (([3, 2, 1, 0], [0.0, 1.0]), "pairs must be two lists of channels"),
    (("ACGT", "AC"), "pairs must be two lists of channels"),
    (3, "pairs must be two lists of channels, of the inputs and of the outputs, not 3"),
]


@pytest.mark.parametrize(("pairs", "said"), REFUSED, ids=[repr(pairs) for pairs, _ in REFUSED])
def test_refuses_what_pairs_no_channels(pairs, said):
    assert_refused(nn.Conv1d(4, 2, 3), "reverse_complement", said, pairs=pairs)


def test_refuses_other_layers_and_pairs_across_groups():
    for layer in (nn.Linear(4, 4), nn.Conv2d(4, 4, 3)):
        shape = tuple(layer.weight.shape)
        assert_refused(layer, "reverse_complement", f"the tensor {shape} is not that of a layer")
    conv = nn.Conv1d(4, 4, 3, groups=2)
    for pairs in (([2, 3, 0, 1], [0, 1, 2, 3]), ([2, 1, 0, 3], [0, 1, 2, 3])):
        assert_refused(
            conv, "reverse_complement", "the partners of group 0 of 2 are not one group",
            pairs=pairs,
        )  # fmt: skip
