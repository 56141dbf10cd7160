"""Both strands alike: W[o, i, a] = W[c(o), c(i), k − 1 − a], c pairing the channels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from tiedparam.laws import Reason
from tiedparam.laws.example import Example
from tiedparam.laws.layout import Layout
from tiedparam.laws.orbits import Orbits
from tiedparam.laws.registry import register_rule


@register_rule("reverse_complement")
class ReverseComplement(Orbits):
    """A layer that treats both strands of DNA alike: ``W[o, i, a] = W[c(o), c(i), k − 1 − a]``.

    ``c`` pairs channels: on the input each base with its complement, within the network each
    channel with the one that holds the other strand's answer. Reading the other strand, which is
    the reversed sequence of paired channels, gives the reversed output of paired channels. That
    needs symmetric padding, and a bias that obeys the law too: a vector follows the pairs of
    outputs, ``b[o] = b[c(o)]``.

    Args:
        pairs: ``(inputs, outputs)``, the channel that each channel is paired with, as lists or
            index tensors; a channel may be its own partner. None reverses the order of the
            channels on both sides, which for A, C, G, T is T, G, C, A, the complement.

    Shapes: ``free``: ``(1, (N + f)/2)``, ``N`` entries, of which ``f`` are their own partners: with
    an odd kernel, (outputs that are their own partners) × (inputs that are). A vector has
    ``((N + f)/2,)``. ``weight``: that of a layer with one kernel axis; in a grouped convolution
    ``c`` must take groups to groups.

    Multiplicity 2, and 1 where an entry is its own partner.

    Source: Shrikumar, Greenside, Kundaje 2017, "Reverse-complement parameter sharing improves deep
    learning models for genomics"; Mallet, Vert 2021, "Reverse-complement equivariant networks for
    DNA sequences".

    Example:
        >>> conv = tp.register_tie(nn.Conv1d(4, 6, 5, bias=False), "reverse_complement")
        >>> strand = torch.eye(4)[torch.tensor([0, 3, 1, 1, 2, 0, 3])].T  # A T C C G A T, one-hot
        >>> other = strand.flip(0, 1)  # A T C G G A T
        >>> torch.allclose(conv(other), conv(strand).flip(0, 1), atol=1e-6)
        True
    """

    family = "equivariance"
    law = "W[o, i, a] = W[c(o), c(i), k − 1 − a]"
    states_whole_group = True

    def __init__(self, pairs: Sequence[Sequence[int] | Tensor] | None = None) -> None:
        super().__init__()
        self.pairs: Sequence[Sequence[int]] | None = _as_numbers(pairs)

    def options(self) -> dict[str, Any]:
        """``pairs``, if given."""
        return {} if self.pairs is None else {"pairs": self.pairs}

    def check(self, layout: Layout) -> Reason | None:
        """One kernel axis, and pairs that fit the channels and the groups."""
        shape = layout.canonical_shape
        if len(shape) not in (1, 3):
            return Reason(
                f"the tensor {layout.shape} is not that of a layer with one kernel axis.",
                "Tie a Conv1d or ConvTranspose1d, or its bias.",
            )
        if self.pairs is not None and not _are_two_lists(self.pairs):
            return Reason(
                f"pairs must be two lists of channels, of the inputs and of the outputs, not "
                f"{self.pairs!r}."
            )
        sides = [("outputs", shape[0], self._partners(1, shape[0]))]
        if len(shape) == 3:
            inputs = shape[1] * layout.groups
            sides.insert(0, ("inputs", inputs, self._partners(0, inputs)))
        for side, channels, partners in sides:
            reason = _why_no_pairs(side, channels, partners)
            if reason is not None:
                return reason
        group = self._groups_apart(layout) if len(shape) == 3 else None
        if group is not None:
            return Reason(
                f"the partners of group {group} of {layout.groups} are not one group.",
                "Pair the channels of a group with those of one other, inputs and outputs alike.",
            )
        return None

    def _partners(self, side: int, channels: int) -> Sequence[int]:
        """Of the inputs (0) or outputs (1)."""
        return range(channels)[::-1] if self.pairs is None else self.pairs[side]

    def _groups_apart(self, layout: Layout) -> int | None:
        """The first group of a convolution whose partners are in several groups."""
        outputs, inputs = layout.canonical_shape[0], layout.canonical_shape[1] * layout.groups
        found: list[set[int]] = [set() for _ in range(layout.groups)]
        for side, channels in ((0, inputs), (1, outputs)):
            size = channels // layout.groups
            for channel, partner in enumerate(self._partners(side, channels)):
                found[channel // size].add(partner // size)
        return next((number for number, groups in enumerate(found) if len(groups) > 1), None)

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """Partners for channels, and the kernel reversed."""
        layout = self.bound_layout
        outputs = torch.tensor(self._partners(1, layout.canonical_shape[0]), device=weight.device)
        if len(layout.shape) == 1:
            yield weight[outputs]
            return
        within = layout.canonical_shape[1]
        every = self._partners(0, within * layout.groups)
        inputs = torch.tensor(every, device=weight.device).view(layout.groups, within) % within
        of_output = inputs.repeat_interleave(len(outputs) // layout.groups, 0)
        canonical = layout.canonical(weight).flip(-1)
        yield layout.native(canonical[outputs[:, None], of_output])

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """Channels in reversed order. A vector alone says little of strands: it ties nothing."""
        if len(layout.shape) == 1:
            return ({"pairs": ((), tuple(range(layout.shape[0])))},)
        return ({},)

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Reversed and given channels, own partners, odd and even kernels, groups, a bias."""
        pairs = ([3, 2, 1, 0], [0, 2, 1, 4, 3])
        return (
            Example(lambda: nn.Conv1d(4, 6, 3)),
            Example(lambda: nn.Conv1d(4, 5, 2), {"pairs": pairs}),
            Example(lambda: nn.Conv1d(3, 3, 5)),
            Example(lambda: nn.Conv1d(4, 6, 3, groups=2)),
            Example(lambda: nn.ConvTranspose1d(4, 2, 3)),
            Example(lambda: nn.Conv1d(4, 6, 3), {}, "", "bias"),
        )


def _as_numbers(pairs: Any) -> Any:
    """Two tuples of numbers; or what was given, if it is something else."""
    try:
        return tuple(
            tuple(map(index, side.tolist() if isinstance(side, Tensor) else side)) for side in pairs
        )
    except (TypeError, RuntimeError):
        return pairs


def _are_two_lists(pairs: Any) -> bool:
    return isinstance(pairs, tuple) and len(pairs) == 2 and all(isinstance(p, tuple) for p in pairs)


def _why_no_pairs(side: str, channels: int, partners: Sequence[int]) -> Reason | None:
    """Why a list of partners does not pair so many channels, or None."""
    if len(partners) != channels:
        return Reason(
            f"pairs has {len(partners)} partners for {channels} {side}.",
            "Name the partner of every channel.",
        )
    beyond = next((c for c, p in enumerate(partners) if not 0 <= p < channels), None)
    if beyond is not None:
        return Reason(
            f"pairs gives {side[:-1]} {beyond} the partner {partners[beyond]}, and there are "
            f"{channels} {side}.",
            "Number the channels from 0.",
        )
    apart = next((c for c, p in enumerate(partners) if partners[p] != c), None)
    if apart is not None:
        partner = partners[apart]
        return Reason(
            f"pairs gives {side[:-1]} {apart} the partner {partner}, whose partner is "
            f"{partners[partner]}.",
            "Let partners name each other.",
        )
    return None
