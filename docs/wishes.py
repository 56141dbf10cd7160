"""What people want, and the line that does it: the rows of `make_laws`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wish:
    """What somebody wants, and the line that does it.

    Attributes:
        what: the wish.
        rule: the rule's name.
        line: the line to write, about `layer`, `source` or `layers`.
        given: what these are, as code.
        family: its name in the benchmark `scaling`, if it is measured there.
    """

    what: str
    rule: str
    line: str
    given: str
    family: str = ""


WISHES: dict[str, tuple[Wish, ...]] = {
    "Outputs, channels or heads that are the same": (
        Wish(
            "all outputs have the same weights (and a bias each)",
            "row_repeat",
            'tp.register_tie(layer, "row_repeat")',
            "layer = nn.Linear(1024, 1024)",
            "one row for all outputs",
        ),
        Wish(
            "the outputs come in groups, equal within a group",
            "row_repeat",
            'tp.register_tie(layer, "row_repeat", groups=16)',
            "layer = nn.Linear(1024, 1024)",
        ),
        Wish(
            "each output has one kernel, for all input channels",
            "channel_shared",
            'tp.register_tie(layer, "channel_shared", over="in")',
            "layer = nn.Conv2d(256, 256, 3)",
            "one kernel for all inputs",
        ),
        Wish(
            "one kernel for the whole layer",
            "channel_shared",
            'tp.register_tie(layer, "channel_shared", over="all")',
            "layer = nn.Conv2d(256, 256, 3)",
        ),
        Wish(
            "all outputs apply the same kernels",
            "channel_shared",
            'tp.register_tie(layer, "channel_shared", over="out")',
            "layer = nn.Conv2d(256, 256, 3)",
        ),
        Wish(
            "independent streams, all through the same filters",
            "channel_shared",
            'tp.register_tie(layer, "channel_shared", over="groups")',
            "layer = nn.Conv1d(64, 64, 25, groups=64)",
            "one long filter for all channels",
        ),
        Wish(
            "every output, or every input, occurs several times",
            "repeat",
            'tp.register_tie(layer, "repeat", outputs=4, inputs=2)',
            "layer = nn.Linear(64, 64)",
        ),
        Wish(
            "attention heads share their keys and values",
            "head_share",
            'tp.register_tie(layer, "head_share", heads=16, groups=4)',
            "layer = nn.Linear(1024, 1024)",
            "shared heads, 4 of 16",
        ),
    ),
    "A symmetry of the weight": (
        Wish(
            "my convolution is self-adjoint",
            "flip_sym",
            'tp.register_tie(layer, "flip_sym")',
            "layer = nn.Conv2d(64, 64, 3, padding=1)",
        ),
        Wish(
            "my convolution is skew-adjoint, as a derivative is",
            "flip_sym",
            'tp.register_tie(layer, "flip_sym", sign=-1)',
            "layer = nn.Conv2d(64, 64, 3, padding=1)",
        ),
        Wish(
            "my matrix is symmetric",
            "symmetric",
            'tp.register_tie(layer, "symmetric")',
            "layer = nn.Linear(1024, 1024)",
            "symmetric",
        ),
        Wish(
            "my matrix is skew: it turns and does not stretch",
            "skew",
            'tp.register_tie(layer, "skew")',
            "layer = nn.Linear(64, 64)",
        ),
        Wish(
            "rotations and reflections do not matter to my kernels",
            "kernel_symmetry",
            'tp.register_tie(layer, "kernel_symmetry", group="d4")',
            "layer = nn.Conv2d(16, 16, 5)",
        ),
        Wish(
            "left and right do not matter to my kernels",
            "kernel_symmetry",
            'tp.register_tie(layer, "kernel_symmetry", group="h")',
            "layer = nn.Conv2d(16, 16, 5)",
        ),
        Wish(
            "my kernels are differences between left and right",
            "kernel_symmetry",
            'tp.register_tie(layer, "kernel_symmetry", group="h", sign=-1)',
            "layer = nn.Conv2d(16, 16, 5)",
        ),
        Wish(
            "my matrix is symmetric about the other diagonal",
            "persymmetric",
            'tp.register_tie(layer, "persymmetric")',
            "layer = nn.Linear(64, 64)",
        ),
    ),
    "The output should move as the input moves": (
        Wish(
            "a turned image gives turned features (first layer)",
            "group_conv",
            'tp.register_tie(layer, "group_conv", lift=True)',
            "layer = nn.Conv2d(3, 64, 3)",
        ),
        Wish(
            "a turned image gives turned features (all later layers)",
            "group_conv",
            'tp.register_tie(layer, "group_conv")',
            "layer = nn.Conv2d(64, 64, 3)",
        ),
        Wish(
            "the order of the items of a set does not matter",
            "set_equivariant",
            'tp.register_tie(layer, "set_equivariant", items=64)',
            "layer = nn.Linear(1024, 1024)",
            "sets of 64 items",
        ),
        Wish(
            "both strands of DNA are read alike",
            "reverse_complement",
            'tp.register_tie(layer, "reverse_complement")',
            "layer = nn.Conv1d(4, 16, 7)",
        ),
        Wish(
            "reversing the input reverses the output",
            "centrosymmetric",
            'tp.register_tie(layer, "centrosymmetric")',
            "layer = nn.Linear(64, 64)",
        ),
        Wish(
            "my features are complex numbers, or quaternions",
            "hypercomplex",
            'tp.register_tie(layer, "hypercomplex", algebra="complex")',
            "layer = nn.Linear(64, 64)",
        ),
        Wish(
            "my features lie on a ring",
            "circulant",
            'tp.register_tie(layer, "circulant")',
            "layer = nn.Linear(1024, 1024)",
            "circulant",
        ),
        Wish(
            "only the distance between two places counts",
            "toeplitz",
            'tp.register_tie(layer, "toeplitz")',
            "layer = nn.Linear(1024, 1024)",
            "Toeplitz and Hankel",
        ),
        Wish(
            "only the sum of two places counts",
            "hankel",
            'tp.register_tie(layer, "hankel")',
            "layer = nn.Linear(1024, 1024)",
            "Toeplitz and Hankel",
        ),
    ),
    "Zeros, fixed values, and patterns of your own": (
        Wish(
            "no output sees later inputs",
            "masked",
            'tp.register_tie(layer, "masked", pattern="lower")',
            "layer = nn.Linear(64, 64)",
        ),
        Wish(
            "blocks that do not mix",
            "masked",
            'tp.register_tie(layer, "masked", pattern="block_diagonal", blocks=8)',
            "layer = nn.Linear(1024, 1024)",
            "block-diagonal, 8 blocks",
        ),
        Wish(
            "my weight is pruned, and stays so",
            "masked",
            'tp.register_tie(layer, "masked", mask=layer.weight.abs() > 0.05)',
            "layer = nn.Linear(64, 64); nn.init.constant_(layer.weight, 0.1); "
            "layer.weight.data[:, ::2] = 0",
        ),
        Wish(
            "a part of the weight is not trained",
            "fixed",
            'tp.register_tie(layer, "fixed", mask=torch.arange(64) < 48)',
            "layer = nn.Linear(64, 64)",
        ),
        Wish(
            "I have a number for each entry: equal numbers, equal values",
            "index",
            'tp.register_tie(layer, "index", index=torch.arange(64 * 64).view(64, 64) % 10)',
            "layer = nn.Linear(64, 64)",
        ),
        Wish(
            "these permutations leave my weight as it is",
            "orbit",
            'tp.register_tie(layer, "orbit", generators=[([1, 2, 3, 0], [1, 2, 3, 0])])',
            "layer = nn.Linear(4, 4)",
        ),
    ),
    "A smaller model": (
        Wish(
            "a trained weight in 4 bits an entry",
            "cluster",
            'tp.register_tie(layer, "cluster", n=16)',
            "layer = nn.Linear(64, 64)",
        ),
        Wish(
            "a large layer with few values, still mixing everything",
            "block_circulant",
            'tp.register_tie(layer, "block_circulant", block=64)',
            "layer = nn.Linear(1024, 1024)",
            "block-circulant, blocks of 64",
        ),
        Wish(
            "a small file for a layer that is trained from the start",
            "hashed",
            'tp.register_tie(layer, "hashed", n=256)',
            "layer = nn.Linear(64, 64)",
        ),
        Wish(
            "twelve layers are sums of four templates",
            "bank",
            "tp.tie_bank(layers, templates=4)",
            "layers = [nn.Linear(64, 64) for _ in range(12)]",
        ),
    ),
    "Another layer's weight": (
        Wish(
            "the head uses the embedding's weight",
            "copy",
            'tp.register_tie(layer, "copy", source=source)',
            "source, layer = nn.Embedding(1000, 64), nn.Linear(64, 1000, bias=False)",
        ),
        Wish(
            "the decoder is the encoder's transpose",
            "transposed_copy",
            'tp.register_tie(layer, "transposed_copy", source=source)',
            "source, layer = nn.Linear(784, 64), nn.Linear(64, 784)",
        ),
        Wish(
            "conv_2 is the square of conv_1",
            "squared_copy",
            'tp.register_tie(layer, "squared_copy", source=source)',
            "source, layer = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)",
        ),
        Wish(
            "any other function of another layer",
            "copy",
            'tp.register_tie(layer, "copy", source=source, fn=torch.sin)',
            "source, layer = nn.Linear(64, 64), nn.Linear(64, 64)",
        ),
        Wish(
            "another layer's weight, with learned scales",
            "scaled_copy",
            'tp.register_tie(layer, "scaled_copy", source=source, per="output")',
            "source, layer = nn.Linear(64, 64), nn.Linear(64, 64)",
        ),
        Wish(
            "another layer's weight, and a small difference",
            "shared_delta",
            'tp.register_tie(layer, "shared_delta", source=source, rank=4)',
            "source, layer = nn.Linear(64, 64), nn.Linear(64, 64)",
        ),
    ),
    "Several laws, or a part of a weight": (
        Wish(
            "two laws hold at once",
            "joint",
            'tp.register_tie(layer, ["flip_sym", ("kernel_symmetry", {"group": "d4"})])',
            "layer = nn.Conv2d(8, 8, 3)",
        ),
        Wish(
            "only some rows or columns are tied",
            "within",
            'tp.register_tie(layer, "flip_sym", rows=slice(0, 32))',
            "layer = nn.Linear(32, 96)",
        ),
    ),
}
"""By heading. Every rule of the library has one at least."""
