"""group_conv: equivariance of layers and networks, e2cnn's fields, loops over a matrix group."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tiedparam as tp
from tests.support.cases import assert_refused, canonical_entries, layer_id
from tests.support.plane_groups import LEFT_RIGHT, QUARTER, identity, image, inverse, times
from tests.support.tensors import stored

GROUPS = {"p4": 4, "p4m": 8}
EVERY_GROUP = pytest.mark.parametrize("group", GROUPS)


def elements(group: str) -> list:
    """Matrices in the order of the channels: turns, and those after a flip."""
    found = []
    for flips in range(GROUPS[group] // 4):
        element = LEFT_RIGHT if flips else identity(2)
        for _ in range(4):
            found.append(element)
            element = times(QUARTER, element)
    assert len(set(found)) == GROUPS[group]
    return found


def moved(images: Tensor, element: int) -> Tensor:
    """An image under an element, by torch."""
    return (images.flip(-1) if element >= 4 else images).rot90(element % 4, (-2, -1))


def moved_fields(images: Tensor, element: int, group: str) -> Tensor:
    """Fields under an element: the image moves, and channel ``g`` becomes channel ``s·g``."""
    matrices = elements(group)
    fields = moved(images, element).unflatten(1, (-1, len(matrices)))
    result = torch.empty_like(fields)
    for number, matrix in enumerate(matrices):
        result[:, :, matrices.index(times(matrices[element], matrix))] = fields[:, :, number]
    return result.flatten(1, 2)


LAYERS = [  # for fields of n elements; groups of the convolution keep fields whole
    (False, lambda n: nn.Conv2d(2 * n, 3 * n, 3)),
    (False, lambda n: nn.Conv2d(n, 2 * n, 2)),
    (False, lambda n: nn.Conv2d(2 * n, 2 * n, 1)),
    (False, lambda n: nn.Conv2d(2 * n, 4 * n, 3, groups=2)),
    (False, lambda n: nn.ConvTranspose2d(2 * n, n, 3)),
    (False, lambda n: nn.ConvTranspose2d(4 * n, 2 * n, 2, groups=2)),
    (True, lambda n: nn.Conv2d(3, 2 * n, 5)),
    (True, lambda n: nn.Conv2d(2, 2 * n, 4, groups=2)),
    (True, lambda n: nn.ConvTranspose2d(3, n, 3)),
    (True, lambda n: nn.ConvTranspose2d(2, 2 * n, 2, groups=2)),
]
EVERY_LAYER = pytest.mark.parametrize(
    ("lift", "build"),
    LAYERS,
    ids=[
        f"{'lift' if lift else 'fields'}-{layer_id(lambda b=b: b(4))}-{b(4).groups}"
        for lift, b in LAYERS
    ],
)


# The law --------------------------------------------------------------------------------------


@EVERY_GROUP
@EVERY_LAYER
def test_every_entry_is_the_mean_over_the_group(lift, build, group):
    n, matrices = GROUPS[group], elements(group)
    layer = build(n).double()
    dense, kernel = canonical_entries(layer), layer.kernel_size
    tp.register_tie(layer, "group_conv", group=group, lift=lift)
    numbers = {matrix: number for number, matrix in enumerate(matrices)}
    for (output, c, *x), value in canonical_entries(layer).items():
        o, g = divmod(output, n)
        total = 0.0
        for s in matrices:  # the entry that s takes to this one
            back = inverse(s)
            source = o * n + numbers[times(back, matrices[g])]
            i, h = divmod(c, n)
            channel = c if lift else i * n + numbers[times(back, matrices[h])]
            total += dense[(source, channel, *image(back, tuple(x), kernel))]
        assert value == pytest.approx(total / n, rel=1e-12, abs=1e-15)
    assert stored(layer) == layer.weight.numel() // n


def test_filters_are_the_first_one_turned_and_its_inputs_shifted():
    """As p4 convolutions are written by hand (Cohen, Welling 2016)."""
    conv = tp.register_tie(nn.Conv2d(8, 12, 3), "group_conv")
    weight = conv.weight.detach().reshape(3, 4, 2, 4, 3, 3)
    first = weight[:, 0]
    by_hand = [first.roll(k, 2).rot90(k, (-2, -1)) for k in range(4)]
    assert torch.equal(weight, torch.stack(by_hand, 1))
    lifting = tp.register_tie(nn.Conv2d(3, 12, 3), "group_conv", lift=True)
    weight = lifting.weight.detach().reshape(3, 4, 3, 3, 3)
    by_hand = [weight[:, 0].rot90(k, (-2, -1)) for k in range(4)]
    assert torch.equal(weight, torch.stack(by_hand, 1))


@EVERY_GROUP
@pytest.mark.parametrize("kernel", [1, 3, 4])
def test_closed_counts(group, kernel):
    n, positions = GROUPS[group], kernel**2
    fields = tp.register_tie(nn.Conv2d(16 * n, 24 * n, kernel), "group_conv", group=group)
    lifting = nn.Conv2d(16, 24 * n, kernel)
    tp.register_tie(lifting, "group_conv", group=group, lift=True)
    assert tp.get_tie(fields).free_shapes() == ((24, 16 * n * positions),)
    assert tp.get_tie(lifting).free_shapes() == ((24, 16 * positions),)
    for layer in (fields, lifting):
        assert tp.get_tie(layer).multiplicities()[0].unique().tolist() == [n]


# Equivariance ---------------------------------------------------------------------------------


@EVERY_GROUP
@EVERY_LAYER
def test_the_layer_is_equivariant(lift, build, group):
    layer = build(GROUPS[group]).double()
    tp.register_tie(layer, "group_conv", group=group, lift=lift)
    tp.register_tie(layer, "repeat", "bias", outputs=GROUPS[group])
    x = torch.randn(2, layer.in_channels, 7, 7, dtype=torch.float64)
    for padding in (0, 1) if layer.kernel_size[0] > 1 else (0,):
        layer.padding = (padding, padding)
        answer = layer(x)
        for element in range(GROUPS[group]):
            given = moved(x, element) if lift else moved_fields(x, element, group)
            expected = moved_fields(answer, element, group)
            torch.testing.assert_close(layer(given), expected, rtol=1e-12, atol=1e-12)


class Pooled(nn.Module):
    """The largest answer over all places and orientations of each field."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.size)).amax((2, 3, 4))


def network(group: str) -> nn.Sequential:
    n = GROUPS[group]
    net = nn.Sequential(
        nn.Conv2d(3, 4 * n, 3, padding=1), nn.ReLU(), nn.Conv2d(4 * n, 6 * n, 3), Pooled(n)
    ).double()
    tp.register_tie(net[0], "group_conv", group=group, lift=True, init="rescale")
    tp.register_tie(net[2], "group_conv", group=group, init="rescale")
    for layer in (net[0], net[2]):
        tp.register_tie(layer, "repeat", "bias", outputs=n, init="rescale")
    return net


@EVERY_GROUP
def test_a_network_with_pooling_does_not_see_turns(group):
    """Lifting, ReLU, fields, pooling over space and orientations; after steps of training too."""
    torch.manual_seed(0)
    net = network(group)
    x = torch.randn(4, 3, 10, 10, dtype=torch.float64)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    expected = net(x)
    assert expected.std() > 1e-3
    for element in range(GROUPS[group]):
        torch.testing.assert_close(net(moved(x, element)), expected, rtol=1e-12, atol=1e-12)
        inner = net[:3](moved(x, element))
        torch.testing.assert_close(inner, moved_fields(net[:3](x), element, group))
    if group == "p4":  # a mirrored image is another one
        assert (net(x.flip(-1)) - expected).abs().max() > 1e-3
    stock = copy.deepcopy(net)
    with torch.no_grad():
        tp.untie_model(stock)[0].weight.add_(0.1 * torch.randn_like(stock[0].weight))
    assert (stock(moved(x, 1)) - stock(x)).abs().max() > 1e-3  # and an untied network sees them


@EVERY_GROUP
@pytest.mark.parametrize("kernel", [1, 3, 4])
def test_equivariance_as_e2cnn_moves_its_fields(group, kernel):
    gspaces = pytest.importorskip("e2cnn.gspaces")
    fields_of = pytest.importorskip("e2cnn.nn").FieldType
    space = gspaces.Rot2dOnR2(4) if group == "p4" else gspaces.FlipRot2dOnR2(4)
    plain = fields_of(space, 3 * [space.trivial_repr])
    regular = fields_of(space, 2 * [space.regular_repr])
    assert len(list(space.testing_elements)) == GROUPS[group]
    for inputs, lift in ((plain, True), (regular, False)):
        conv = nn.Conv2d(inputs.size, regular.size, kernel, bias=False)
        tp.register_tie(conv, "group_conv", group=group, lift=lift)
        x = torch.randn(2, inputs.size, 9, 9)
        answer = conv(x).detach()
        for element in space.testing_elements:
            answer_there = conv(inputs.transform(x, element))
            torch.testing.assert_close(
                answer_there, regular.transform(answer, element), rtol=1e-5, atol=1e-5
            )


def test_e2cnns_own_filters_are_lawful():
    gspaces, e2nn = pytest.importorskip("e2cnn.gspaces"), pytest.importorskip("e2cnn.nn")
    space = gspaces.Rot2dOnR2(4)
    regular = e2nn.FieldType(space, 2 * [space.regular_repr])
    plain = e2nn.FieldType(space, 3 * [space.trivial_repr])
    for inputs, lift in ((plain, True), (regular, False)):
        theirs = e2nn.R2Conv(inputs, regular, kernel_size=5, bias=False)
        nn.init.normal_(theirs.weights)
        filters = theirs.expand_parameters()[0].detach()
        conv = nn.Conv2d(inputs.size, regular.size, 5, bias=False)
        with torch.no_grad():
            conv.weight.copy_(filters)
        assert tp.residual(conv, "group_conv", lift=lift) < 1e-6
        tp.register_tie(conv, "group_conv", lift=lift, max_residual=1e-6)
        # theirs has no filters that a turn by less than 90° would blur
        assert theirs.weights.numel() < stored(conv)


# Files, scans, and what does not fit ----------------------------------------------------------


def test_saved_and_loaded_by_a_file(tmp_path):
    net = network("p4m")
    tp.save(net, tmp_path / "net.safetensors")
    other = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3), Pooled(8)
    )
    other = tp.load(tmp_path / "net.safetensors", other.double())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(other(x), net(x))
    assert str(tp.get_tie(other[0])) == "group_conv(group='p4m', lift=True)"
    assert str(tp.get_tie(other[2])) == "group_conv(group='p4m')"


@EVERY_GROUP
def test_scan_finds_untied_group_convolutions(group):
    net = tp.untie_model(network(group))
    found = tp.scan(net, ["group_conv"]).candidates
    exact = {(c.layer, str(c.rule)) for c in found if c.residual < 1e-12}
    assert exact >= {
        ("0", f"group_conv(group='{group}', lift=True)"), ("2", f"group_conv(group='{group}')")
    }  # fmt: skip


@pytest.mark.parametrize("group", ["p6", "c4", None, 4, ["p4"]], ids=repr)
def test_refuses_an_unknown_group(group):
    assert_refused(
        nn.Conv2d(8, 8, 3), "group_conv",
        f"group={group!r} is unknown. Choose one of 'p4', 'p4m'", group=group,
    )  # fmt: skip


@pytest.mark.parametrize("lift", [1, None, "yes"], ids=repr)
def test_refuses_what_is_neither_true_nor_false(lift):
    assert_refused(
        nn.Conv2d(8, 8, 3), "group_conv", f"lift must be True or False, not {lift!r}", lift=lift
    )


REFUSED = [
    (lambda: nn.Conv2d(8, 6, 3), {}, "6 outputs are not made of fields of 4 elements ('p4')"),
    (lambda: nn.Conv2d(6, 8, 3), {}, "6 inputs are not made of fields of 4 elements ('p4')"),
    (lambda: nn.Conv2d(6, 8, 3), {}, "a multiple of 4, or lift=True for plain channels."),
    (lambda: nn.Conv2d(4, 8, 3), {"group": "p4m"}, "4 inputs are not made of fields of 8"),
    (lambda: nn.Conv2d(3, 12, 3), {"group": "p4m", "lift": True}, "12 outputs are not made of"),
    (lambda: nn.Conv2d(8, 8, 3, groups=4), {}, "2 outputs of a group are not made of fields"),
    (lambda: nn.Conv2d(8, 16, 3, groups=4), {}, "2 inputs of a group are not made of fields"),
    (lambda: nn.ConvTranspose2d(8, 6, 3), {}, "6 outputs are not made of fields of 4"),
    (lambda: nn.Conv2d(8, 8, (3, 5)), {}, "(8, 8, 3, 5) has no square kernels"),
    (lambda: nn.Conv1d(8, 8, 3), {}, "(8, 8, 3) has no square kernels"),
    (lambda: nn.Linear(8, 8), {}, "a kernel (1, 1) does what a Linear layer does"),
]


@pytest.mark.parametrize(("build", "options", "said"), REFUSED)
def test_refuses_what_has_no_fields_or_cannot_be_turned(build, options, said):
    assert_refused(build(), "group_conv", said, **options)
