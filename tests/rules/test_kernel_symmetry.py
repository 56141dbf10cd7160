"""kernel_symmetry: layers that commute with flips and turns, Burnside's counts, loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import tiedparam as tp
from tests.support.cases import assert_refused, canonical_entries
from tests.support.plane_groups import (
    DIAGONAL,
    LEFT_RIGHT,
    QUARTER,
    UP_DOWN,
    Matrix,
    identity,
    image,
    times,
)  # fmt: skip
from tests.support.tensors import stored

GENERATORS = {
    "h": [LEFT_RIGHT],
    "v": [UP_DOWN],
    "hv": [LEFT_RIGHT, UP_DOWN],
    "c4": [QUARTER],
    "d4": [LEFT_RIGHT, DIAGONAL],
}
"""Matrices on (row, column) about the centre. Each generator gets the sign; products follow."""


def group_with_signs(group: str, dims: int, sign: int) -> dict[Matrix, int]:
    """All products of the generators, each with the product of their signs."""
    one = identity(dims)
    minus = tuple(tuple(-n for n in row) for row in one)
    generators = GENERATORS.get(group, [minus])
    found, new = {one: 1}, [one]
    while new:
        element = new.pop()
        for generator in generators:
            product = times(generator, element)
            if product in found:
                assert found[product] == sign * found[element], "the signs are no character"
            else:
                found[product] = sign * found[element]
                new.append(product)
    return found


def burnside(group: str, sign: int, kernel: tuple[int, ...]) -> int:
    """The dimension of the lawful kernels: the mean of the signed numbers of fixed positions."""
    elements = group_with_signs(group, len(kernel), sign)
    total = sum(
        character
        for element, character in elements.items()
        for position in itertools.product(*map(range, kernel))
        if image(element, position, kernel) == position
    )
    assert total % len(elements) == 0
    return total // len(elements)


SIZES = {"h": 2, "v": 2, "hv": 4, "point": 2, "c4": 4, "d4": 8}


@pytest.mark.parametrize(("group", "size"), SIZES.items())
@pytest.mark.parametrize("sign", [1, -1])
def test_the_groups_have_all_their_elements_and_the_signs_multiply(group, size, sign):
    elements = group_with_signs(group, 2, sign)
    assert len(elements) == size
    if sign == -1:  # a character that is not 1 everywhere sums to 0
        assert sum(elements.values()) == 0


# The law --------------------------------------------------------------------------------------

LAYERS = [
    ("h", lambda: nn.Conv2d(3, 2, (3, 4))),
    ("h", lambda: nn.Conv2d(2, 4, (2, 5), groups=2)),
    ("v", lambda: nn.Conv2d(2, 2, (4, 3))),
    ("v", lambda: nn.ConvTranspose2d(4, 2, (5, 2), groups=2)),
    ("hv", lambda: nn.Conv2d(2, 2, (4, 5))),
    ("hv", lambda: nn.ConvTranspose2d(2, 3, (2, 3))),
    ("point", lambda: nn.Conv1d(2, 3, 5)),
    ("point", lambda: nn.ConvTranspose1d(4, 6, 4, groups=2)),
    ("point", lambda: nn.Conv2d(2, 2, (2, 3))),
    ("point", lambda: nn.Conv3d(2, 2, (3, 2, 3))),
    ("c4", lambda: nn.Conv2d(2, 4, 5, groups=2)),
    ("c4", lambda: nn.ConvTranspose2d(2, 3, 4)),
    ("d4", lambda: nn.Conv2d(2, 2, 5)),
    ("d4", lambda: nn.Conv2d(3, 3, 4, groups=3)),
    ("d4", lambda: nn.ConvTranspose2d(4, 2, 6, groups=2)),
]
EVERY = pytest.mark.parametrize(
    ("group", "build"),
    LAYERS,
    ids=[f"{g}-{type(b()).__name__}-{b().kernel_size}" for g, b in LAYERS],
)
BOTH_SIGNS = pytest.mark.parametrize("sign", [1, -1])


@EVERY
@BOTH_SIGNS
def test_every_entry_is_the_signed_mean_over_its_positions(group, build, sign):
    layer = build().double()
    dense = canonical_entries(layer)
    kernel = layer.kernel_size
    tp.register_tie(layer, "kernel_symmetry", group=group, sign=sign)
    elements = group_with_signs(group, len(kernel), sign)
    for (o, c, *x), value in canonical_entries(layer).items():
        images = [(image(e, tuple(x), kernel), s) for e, s in elements.items()]
        mean = sum(s * dense[(o, c, *position)] for position, s in images) / len(elements)
        assert value == pytest.approx(mean, rel=1e-12, abs=1e-15)
    kernels = layer.weight.numel() // math.prod(kernel)
    assert stored(layer) == kernels * burnside(group, sign, kernel)


@EVERY
@BOTH_SIGNS
def test_the_layer_commutes_with_flips_and_turns(group, build, sign):
    layer = build().double()
    layer.bias = None
    tp.register_tie(layer, "kernel_symmetry", group=group, sign=sign)
    axes = tuple(range(2, 2 + len(layer.kernel_size)))
    size = (9, 7, 8)[: len(axes)] if group not in ("c4", "d4") else (9, 9)
    for padding in (0, 1):
        layer.padding = (padding,) * len(axes)
        x = torch.randn(2, layer.in_channels, *size, dtype=torch.float64)
        for moved in GENERATING[group]:
            left, right = layer(moved(x, axes)), sign * moved(layer(x), axes)
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
            assert left.abs().max() > 0.01


def flip_of(axis: int):
    return lambda x, axes: x.flip(axis)


GENERATING = {
    "h": [flip_of(-1)],
    "v": [flip_of(-2)],
    "hv": [flip_of(-1), flip_of(-2)],
    "point": [lambda x, axes: x.flip(axes)],
    "c4": [lambda x, axes: x.rot90(1, axes), lambda x, axes: x.rot90(-1, axes)],
    "d4": [flip_of(-1), flip_of(-2), lambda x, axes: x.transpose(*axes)],
}


def test_turns_leave_pseudoscalars_as_they_are():
    """With sign −1 the turns of d4 and hv have sign 1, and c4's half turn has."""
    x = torch.randn(1, 1, 12, 12, dtype=torch.float64)
    for group, quarters, expected in (("d4", 1, 1), ("hv", 2, 1), ("c4", 2, 1), ("c4", 1, -1)):
        conv = nn.Conv2d(1, 1, 5, bias=False, dtype=torch.float64)
        tp.register_tie(conv, "kernel_symmetry", group=group, sign=-1)
        moved = conv(x.rot90(quarters, (2, 3)))
        torch.testing.assert_close(moved, expected * conv(x).rot90(quarters, (2, 3)))


# Counts ---------------------------------------------------------------------------------------


def closed_count(group: str, sign: int, a: int, b: int) -> int:
    """As laws and documents say it."""
    up = sign == 1

    def half(n: int) -> int:
        return (n + up) // 2

    if group in ("c4", "d4"):
        assert a == b
        if group == "c4":
            return (a * a + 3 * up * (a % 2)) // 4
        m = half(a)
        return m * (m + 1 if up else m - 1) // 2
    return {
        "h": a * half(b), "v": half(a) * b, "hv": half(a) * half(b), "point": half(a * b)
    }[group]  # fmt: skip


@BOTH_SIGNS
@pytest.mark.parametrize("group", SIZES)
def test_the_closed_counts_are_burnsides(group, sign):
    for a, b in itertools.product(range(1, 8), repeat=2):
        if a == b or group not in ("c4", "d4"):
            assert closed_count(group, sign, a, b) == burnside(group, sign, (a, b))


@BOTH_SIGNS
@pytest.mark.parametrize(
    ("group", "kernel"),
    [*itertools.product(SIZES, [(7, 7), (8, 8)]), *itertools.product(["h", "v", "hv"], [(6, 9)])],
)
def test_closed_counts_of_large_layers(group, sign, kernel):
    conv = nn.Conv2d(64, 48, kernel)
    tp.register_tie(conv, "kernel_symmetry", group=group, sign=sign)
    assert stored(conv) == 48 * 64 * closed_count(group, sign, *kernel)
    assert tp.get_tie(conv).free_shapes() == ((48 * 64, closed_count(group, sign, *kernel)),)


def test_literal_kernels():
    def tied(group: str, sign: int, values: Tensor) -> list:
        conv = nn.Conv2d(1, 1, tuple(values.shape))
        with torch.no_grad():
            conv.weight.copy_(values)
        tp.register_tie(conv, "kernel_symmetry", group=group, sign=sign)
        return conv.weight[0, 0].tolist()

    numbers = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert tied("h", 1, numbers) == [[2, 2, 2], [5, 5, 5]]
    assert tied("h", -1, numbers) == [[-1, 0, 1], [-1, 0, 1]]  # Prewitt's derivative
    assert tied("v", 1, numbers) == [[2.5, 3.5, 4.5], [2.5, 3.5, 4.5]]
    assert tied("point", -1, numbers) == [[-2.5, -1.5, -0.5], [0.5, 1.5, 2.5]]
    square = torch.tensor([[1.0, 2.0], [3.0, 8.0]])
    assert tied("c4", 1, square) == [[3.5, 3.5], [3.5, 3.5]]
    assert tied("c4", -1, square) == [[1, -1], [-1, 1]]


def test_sobel_is_lawful_and_comes_back_to_the_bit():
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]).expand(2, 3, 3, 3)
    for group, sign, lawful in (
        ("h", -1, True), ("v", 1, True), ("point", -1, True),
        ("h", 1, False), ("v", -1, False), ("c4", 1, False), ("d4", 1, False),
    ):  # fmt: skip
        conv = nn.Conv2d(3, 2, 3)
        with torch.no_grad():
            conv.weight.copy_(sobel)
        assert (tp.residual(conv, "kernel_symmetry", group=group, sign=sign) == 0) is lawful


def test_saved_and_loaded_by_a_file(tmp_path):
    conv = tp.register_tie(nn.Conv2d(2, 2, 4), "kernel_symmetry", group="c4", sign=-1)
    tp.save(conv, tmp_path / "conv.safetensors")
    other = nn.Conv2d(2, 2, 4)
    tp.load(tmp_path / "conv.safetensors", other)
    assert torch.equal(other.weight, conv.weight)
    assert str(tp.get_tie(other)) == "kernel_symmetry(group='c4', sign=-1)"


def test_scan_finds_the_group_of_a_trained_kernel():
    conv = nn.Conv2d(4, 4, 5)
    tp.remove_tie(tp.register_tie(conv, "kernel_symmetry", group="d4"))
    found = [c.options for c in tp.scan(conv, ["kernel_symmetry"]).candidates if c.residual < 1e-6]
    assert {"group": "d4", "sign": 1} in found
    kind = tp.available_rules()["kernel_symmetry"]
    assert {o["group"] for o in kind.variants(tp.Layout((2, 2, 3)))} == {"point"}


# What does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["d3", "", None, 4, ["h"]], ids=repr)
def test_refuses_an_unknown_group(group):
    assert_refused(
        nn.Conv2d(2, 2, 3), "kernel_symmetry", f"group={group!r} is unknown. Choose one of 'h'",
        group=group,
    )  # fmt: skip


@pytest.mark.parametrize("sign", [0, 2, 1.0, True, "1", None], ids=repr)
def test_refuses_another_sign(sign):
    assert_refused(
        nn.Conv2d(2, 2, 3),
        "kernel_symmetry",
        f"sign={sign!r} is unknown. Choose one of 1, -1.",
        sign=sign,
    )


@pytest.mark.parametrize("group", ["c4", "d4"])
def test_refuses_to_turn_what_is_not_square(group):
    assert_refused(
        nn.Conv2d(2, 2, (3, 5)), "kernel_symmetry",
        f"group='{group}' turns the kernel (3, 5), which is not square", group=group,
    )  # fmt: skip


@pytest.mark.parametrize("group", ["h", "v", "hv", "c4", "d4"])
@pytest.mark.parametrize("build", [lambda: nn.Conv1d(2, 2, 3), lambda: nn.Conv3d(2, 2, 3)])
def test_refuses_kernels_of_other_dimensions(group, build):
    layer = build()
    assert_refused(
        layer, "kernel_symmetry", f"the kernel {layer.kernel_size} has {len(layer.kernel_size)}",
        "Choose group='point'", group=group,
    )  # fmt: skip


def test_refuses_tensors_without_a_kernel_and_kernels_that_would_vanish():
    assert_refused(nn.Linear(3, 4), "kernel_symmetry", "the tensor (4, 3) has no kernel positions")
    conv = nn.Conv2d(2, 5, 3)
    assert_refused(
        conv, "kernel_symmetry", "the tensor (5,) has no kernel positions", tensor_name="bias"
    )
    assert_refused(
        conv, "kernel_symmetry", "kernel_size=(3, 3)", "fixes every entry", group="d4", sign=-1
    )
