"""Recipes that people were given, in our own words: theirs fail the law or the oracle, ours pass.

Every test shows both sides on the same numbers, so that neither passes because of its setup.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiedparam as tp
from tests.support.cases import assert_satisfies

F64 = {"dtype": torch.float64}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def flip_transpose(weight: Tensor) -> Tensor:
    return weight.transpose(0, 1).flip(2, 3)


def adjoint_gap(weight: Tensor) -> float:
    x, y = torch.randn(2, 1, weight.shape[1], 6, 7, **F64)
    image, back = F.conv2d(x, weight, padding=1), F.conv2d(y, weight, padding=1)
    return float(abs((image * y).sum() - (x * back).sum()) / (image.norm() * y.norm()))


# 1. "My kernel must be its own flip-transpose" -----------------------------------------------


class PlainTransposeInALoop(nn.Module):
    """One kernel for each pair of channels, the other one its transpose, a triangle for i = j."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.channels, self.size = channels, size
        self.pairs = nn.Parameter(torch.randn(channels * (channels - 1) // 2, size, size, **F64))
        self.own = nn.Parameter(torch.randn(channels, size * (size + 1) // 2, **F64))

    def weight(self) -> Tensor:
        rows, columns = torch.triu_indices(self.size, self.size)
        weight = torch.zeros(self.channels, self.channels, self.size, self.size, **F64)
        pair = 0
        for i in range(self.channels):
            weight[i, i, rows, columns] = self.own[i].detach()
            weight[i, i, columns, rows] = self.own[i].detach()
            for j in range(i + 1, self.channels):
                weight[i, j] = self.pairs[pair].detach()
                weight[j, i] = self.pairs[pair].detach().t()
                pair += 1
        return weight


def test_plain_transpose_is_not_the_flip_transpose():
    theirs = PlainTransposeInALoop(3, 3)
    weight = theirs.weight()
    assert count(theirs) == 45  # three more than are needed
    assert torch.equal(weight, weight.transpose(0, 1).transpose(2, 3))  # what it does keep
    assert not torch.equal(weight, flip_transpose(weight))
    assert adjoint_gap(weight) > 1e-3
    transposed = F.conv_transpose2d(torch.ones(1, 3, 5, 5, **F64), weight, padding=1)
    assert not torch.allclose(
        F.conv2d(torch.ones(1, 3, 5, 5, **F64), weight, padding=1), transposed
    )

    ours = nn.Conv2d(3, 3, 3, padding=1, bias=False, **F64)
    with torch.no_grad():
        ours.weight.copy_(weight)
    assert tp.residual(ours, "flip_sym") > 0.1
    with pytest.raises(tp.TieError, match="breaks the law"):
        tp.register_tie(ours, "flip_sym", init="exact")
    tp.register_tie(ours, "flip_sym")
    assert count(ours) == 42
    tied = ours.weight.detach().clone()
    assert torch.equal(tied, flip_transpose(tied))
    assert adjoint_gap(tied) < 1e-13


def test_averaging_in_every_forward_keeps_the_law_with_twice_the_values():
    full = nn.Parameter(torch.randn(3, 3, 3, 3, **F64))
    theirs = (full + flip_transpose(full)) / 2
    assert full.numel() == 81
    ours = nn.Conv2d(3, 3, 3, bias=False, **F64)
    with torch.no_grad():
        ours.weight.copy_(full)
    tp.register_tie(ours, "flip_sym")
    assert count(ours) == 42
    torch.testing.assert_close(ours.weight, theirs, rtol=0, atol=1e-15)
    # and the gradient of a stored value is what both of its copies receive there
    x = torch.randn(2, 3, 6, 6, **F64)
    F.conv2d(x, theirs).square().sum().backward()
    ours(x).square().sum().backward()
    sums = tp.get_tie(ours).adjoint(full.grad)
    for free, total in zip(ours.parameters(), sums, strict=True):
        torch.testing.assert_close(free.grad, total, **CLOSE)


# 2. "Every row of my Linear weight is the same vector" ----------------------------------------


def one_step_on_unequal_outputs(layer: nn.Module) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    (layer(torch.ones(5)) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    optimizer.step()


def test_a_parameter_of_repeated_rows_drifts_apart():
    vector = torch.randn(5)
    theirs = nn.Linear(5, 4, bias=False)
    theirs.weight = nn.Parameter(vector.repeat(4, 1))
    assert theirs.weight.unique(dim=0).shape[0] == 1  # equal rows, at first
    one_step_on_unequal_outputs(theirs)
    assert theirs.weight.unique(dim=0).shape[0] == 4
    assert count(theirs) == 20

    ours = nn.Linear(5, 4, bias=False)
    ours.weight = nn.Parameter(vector.repeat(4, 1))
    tp.register_tie(ours, "row_repeat", init="exact")
    before = ours.weight.detach().clone()
    one_step_on_unequal_outputs(ours)
    weight = ours.weight.detach().clone()
    assert torch.equal(weight, weight[:1].expand(4, 5))
    torch.testing.assert_close(weight, before - 0.1 * (1 + 2 + 3 + 4))  # each row's gradient
    assert count(ours) == 5


def test_s21_a_parameter_of_expanded_rows_cannot_be_trained():
    theirs = nn.Linear(5, 4, bias=False)
    theirs.weight = nn.Parameter(torch.randn(5).expand(4, 5))
    with pytest.raises(RuntimeError, match="single memory location"):
        one_step_on_unequal_outputs(theirs)
    with pytest.raises(RuntimeError, match="single memory location"):
        theirs.load_state_dict(nn.Linear(5, 4, bias=False).state_dict())

    ours = tp.register_tie(nn.Linear(5, 4, bias=False), "row_repeat")
    one_step_on_unequal_outputs(ours)
    with pytest.warns(tp.TieWarning):
        ours.load_state_dict(nn.Linear(5, 4, bias=False).state_dict())
    tp.remove_tie(ours)
    one_step_on_unequal_outputs(ours)


def test_rows_joined_in_a_loop_are_what_ours_computes():
    ours = tp.register_tie(nn.Linear(5, 4, **F64), "row_repeat")
    (vector,) = ours.parametrizations.weight.parameters()
    joined = torch.cat([vector for _ in range(4)])
    x = torch.randn(3, 5, **F64)
    torch.testing.assert_close(ours(x), F.linear(x, joined, ours.bias), **CLOSE)


# 3. "The same filter for every channel" -------------------------------------------------------


def test_a_kernel_repeated_over_the_outputs_is_rejected_or_mixes_the_batch():
    """``(1, 1, k, k).repeat(C, 1, 1, 1)`` fits no layer of C input channels without groups."""
    kernel = torch.randn(1, 1, 3, 3, **F64)
    x = torch.randn(2, 4, 6, 6, **F64)
    repeated = kernel.repeat(4, 1, 1, 1)
    with pytest.raises(RuntimeError, match="channels"):
        F.conv2d(x, repeated)
    # the usual repair: channels into the batch, and back in the wrong order
    folded = F.conv2d(x.transpose(0, 1).reshape(8, 1, 6, 6), kernel)
    theirs = folded.reshape(2, 4, 4, 4)

    ours = nn.Conv2d(4, 4, 3, groups=4, bias=False, **F64)
    with torch.no_grad():
        ours.weight.copy_(repeated)
    tp.register_tie(ours, "channel_shared", over="groups", init="exact")
    assert count(ours) == 9
    right = torch.cat([F.conv2d(x[:, c : c + 1], kernel) for c in range(4)], dim=1)
    assert theirs.shape == right.shape
    assert not torch.allclose(theirs, right)
    torch.testing.assert_close(ours(x), right, **CLOSE)


def test_a_kernel_repeated_over_the_wrong_axis_shares_the_other_channels():
    kernels = torch.randn(4, 3, 3, **F64)  # one for each output, meant for every input
    theirs = kernels.unsqueeze(0).repeat(4, 1, 1, 1)  # fits, because there are four of both
    ours = nn.Conv2d(4, 4, 3, bias=False, **F64)
    with torch.no_grad():
        ours.weight.copy_(theirs)
    assert tp.residual(ours, "channel_shared", over="in") > 0.1
    assert tp.residual(ours, "channel_shared", over="out") == 0
    x = torch.randn(2, 4, 6, 6, **F64)
    summed = F.conv2d(x.sum(1, keepdim=True), kernels.unsqueeze(1))
    assert not torch.allclose(F.conv2d(x, theirs), summed)

    right = kernels.unsqueeze(1).repeat(1, 4, 1, 1)
    with torch.no_grad():
        ours.weight.copy_(right)
    tp.register_tie(ours, "channel_shared", over="in", init="exact")
    assert count(ours) == 4 * 9
    torch.testing.assert_close(ours(x), summed, **CLOSE)


def test_a_mean_kernel_turns_into_a_layer_of_one_channel():
    theirs, ours = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    theirs.weight = nn.Parameter(theirs.weight.mean(1, keepdim=True).detach())
    tp.register_tie(ours, "channel_shared", over="in")
    colour, grey = torch.randn(2, 3, 6, 6), torch.randn(2, 1, 6, 6)
    assert theirs.in_channels == ours.in_channels == 3
    with pytest.raises(RuntimeError, match="channels"):
        theirs(colour)
    theirs(grey)  # in silence
    ours(colour)
    with pytest.raises(RuntimeError, match="channels"):
        ours(grey)
    assert ours.weight.shape == (4, 3, 3, 3)


def test_streams_by_loop_and_by_reshape_are_what_ours_computes():
    ours = nn.Conv1d(6, 18, 3, groups=6, bias=False, **F64)
    tp.register_tie(ours, "channel_shared", over="groups")
    bank = next(ours.parameters()).reshape(3, 1, 3)
    x = torch.randn(2, 6, 10, **F64)
    loop = torch.cat([F.conv1d(x[:, c : c + 1], bank) for c in range(6)], dim=1)
    reshaped = F.conv1d(x.reshape(12, 1, 10), bank).reshape(2, 18, 8)
    torch.testing.assert_close(ours(x), loop, **CLOSE)
    torch.testing.assert_close(ours(x), reshaped, **CLOSE)


# 4. "This layer's weight is a function of that layer's weight" --------------------------------


def autoencoder() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 3, bias=False), nn.Linear(3, 5, bias=False))


def shift_the_encoder(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[0].weight.add_(1)


@pytest.mark.parametrize(
    "change",
    [copy.deepcopy, lambda model: model.double()],
    ids=["deepcopy", "double"],
)
def test_a_parameter_over_the_same_storage_is_untied_by_a_copy_or_a_cast(change):
    theirs, ours = autoencoder(), autoencoder()
    theirs[1].weight = nn.Parameter(theirs[0].weight.t())
    tp.register_tie(ours[1], "copy", source=ours[0], fn=torch.t)
    for model in (theirs, ours):
        shift_the_encoder(model)
        assert torch.equal(model[1].weight, model[0].weight.t())  # both are tied so far
    theirs, ours = change(theirs), change(ours)
    for model in (theirs, ours):
        shift_the_encoder(model)
    assert not torch.equal(theirs[1].weight, theirs[0].weight.t())
    assert torch.equal(ours[1].weight, ours[0].weight.t())


def test_a_parameter_over_the_same_storage_is_updated_twice():
    theirs, ours = autoencoder(), autoencoder()
    ours.load_state_dict(theirs.state_dict())
    theirs[1].weight = nn.Parameter(theirs[0].weight.t())
    tp.register_tie(ours[1], "copy", source=ours[0], fn=torch.t)
    before = ours[0].weight.detach().clone()
    assert count(theirs) == 30
    assert count(ours) == 15
    x = torch.rand(4, 5)
    for model in (theirs, ours):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        model(x).square().sum().backward()
        optimizer.step()
    # Adam's first step moves each value by lr; by 0 or twice that where it is held twice
    assert (ours[0].weight - before).abs().max() < 0.0101
    assert (theirs[0].weight - before).abs().max() > 0.0199


def test_a_weight_that_is_set_once_is_forgotten_with_the_first_step():
    theirs = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    ours = copy.deepcopy(theirs)
    theirs[1].weight.data = theirs[0].weight.data ** 2
    tp.register_tie(ours[1], "squared_copy", source=ours[0])
    assert torch.equal(theirs[1].weight, ours[1].weight)
    x = torch.randn(4, 3)
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(x).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(theirs[1].weight, theirs[0].weight ** 2)
    assert torch.equal(ours[1].weight, ours[0].weight ** 2)


def test_torch_refuses_the_assignment_that_people_write_first():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(TypeError, match="cannot assign"):
        model[1].weight = model[0].weight ** 2


class HiddenSource(nn.Module):
    """The other layer in a list, so that its parameters are not registered twice."""

    def __init__(self, source: nn.Conv2d) -> None:
        super().__init__()
        self.hidden = [source]

    def forward(self, x: Tensor) -> Tensor:
        source = self.hidden[0]
        return F.conv2d(x, source.weight**2, source.bias**2, source.stride, source.padding)


class HiddenSourceWithoutInit(HiddenSource):
    """The same, written in a hurry."""

    def __init__(self, source: nn.Conv2d) -> None:
        self.hidden = [source]


def squared_convolution(source: nn.Conv2d) -> nn.Conv2d:
    options = {"padding": source.padding, "padding_mode": source.padding_mode, **F64}
    layer = nn.Conv2d(3, 3, 3, **options)
    tp.register_tie(layer, "squared_copy", source=source)
    return tp.register_tie(layer, "squared_copy", "bias", source=source)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_a_hidden_source_ignores_the_padding_mode(mode):
    source = nn.Conv2d(3, 3, 3, padding=1, padding_mode=mode, **F64)
    theirs, ours = HiddenSource(source), squared_convolution(source)
    plain = nn.Conv2d(3, 3, 3, padding=1, padding_mode=mode, **F64)
    plain.load_state_dict({name: p.detach() ** 2 for name, p in source.named_parameters()})
    x = torch.randn(2, 3, 6, 6, **F64)
    assert torch.allclose(theirs(x), plain(x)) == (mode == "zeros")
    torch.testing.assert_close(ours(x), plain(x), **CLOSE)
    assert isinstance(ours, nn.Conv2d)
    assert not isinstance(theirs, nn.Conv2d)
    assert_satisfies(tp.get_tie(ours), ours.weight.detach())
    assert count(theirs) == count(ours) == 0


def test_s13_a_hidden_source_is_copied_with_the_part_in_silence():
    source = nn.Conv2d(3, 3, 3, **F64)
    model = nn.ModuleDict({"a": source, "theirs": HiddenSource(source)})
    part = copy.deepcopy(model["theirs"])
    private = part.hidden[0]
    assert private is not source
    assert count(part) == 0  # nobody trains, saves or loads the private source
    model["ours"] = squared_convolution(source)
    with pytest.raises(tp.TieError, match="without its source"):
        copy.deepcopy(model["ours"])


def test_a_hidden_source_without_init_fails_when_it_is_used():
    source = nn.Conv2d(3, 3, 3)
    theirs = HiddenSourceWithoutInit(source)
    with pytest.raises(AttributeError):
        theirs(torch.randn(1, 3, 5, 5))
