"""Clustered values: W[e] = w[c(e)], with the clusters c that the weight has when it is tied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tiedparam.laws import Coded, Orbits, Reason
from tiedparam.laws.choices import is_whole, why_not_one_of
from tiedparam.laws.clustering import MADE, clusters, why_no_importance, why_no_numbers
from tiedparam.laws.example import Example
from tiedparam.laws.indices import image_by_labels, why_no_index
from tiedparam.laws.layout import Layout
from tiedparam.laws.packing import pack_numbers, unpack_numbers
from tiedparam.laws.pattern import Pattern
from tiedparam.laws.registry import make_rule, register_rule, stated
from tiedparam.laws.rule import Rule
from tiedparam.util.bits import checksum_of
from tiedparam.util.torch_modes import plain_numbers
from tiedparam.util.torch_private import has_values

Per = Literal["tensor", "output"]
_MOST = 256
_CODES = "code_bits"
_OF = "of_"
"""What the names of the other law's data begin with."""


@register_rule("cluster")
class Cluster(Coded):
    """Every entry is one of ``n`` trained values: the weight's clusters when it was tied.

    Which entries share a value is found once, when the weight is tied, by k-means of its numbers,
    and stays; the ``n`` values are trained. `recluster` makes other clusters.

    Args:
        n: how many values, from 2 to 256.
        per: whether ``n`` values serve the whole ``"tensor"``, or each ``"output"`` has its own.
        weights: how much each entry matters, in the tensor's shape, such as the mean of its squared
            gradients: distances count so much. None is 1 for each. It is forgotten after the tie.
        of: another law, whose free values are clustered instead of the entries, each as often as it
            has entries: as `register_tie` takes it, such as ``("masked", {"mask": mask})``.
        codes: clusters that are known already, numbers from 0 to n − 1 in the tensor's shape (of an
            ``of=``: for each of its free values). None finds them.

    The clusters are stored with the layer, ``⌈log₂ n⌉`` bits for each entry. A state dict of the
    tied layer brings its own, unless ``codes`` are given; a dense one is projected onto those that
    the layer has.

    Shapes: ``free``: ``(1, n)``, or ``(outputs, n)``, or ``(n,)`` for a vector; ``weight``: any
    with at least ``n`` entries (of each output). Refused are numbers that are not finite. Where
    there are fewer different numbers than ``n``, several values are equal.

    Source: Han, Mao and Dally 2016, "Deep compression"; k-means in one dimension is exact (Wang and
    Song 2011), up to 2,048 different numbers, and nearly so beyond. The projection onto clusters
    that are known is the mean of each.

    Example:
        >>> layer = tp.register_tie(nn.Linear(64, 64), "cluster", n=16)
        >>> layer.weight.unique().numel(), tp.get_tie(layer).free_count
        (16, 16)
        >>> layer.state_dict()["parametrizations.weight.0.code_bits"].numel()  # 4 bits each
        2048
    """

    family = "from trained weights"
    law: str = "W[e] = w[c(e)]"
    holds_laws: ClassVar[tuple[str, ...]] = ("of",)
    complex_valued = False
    apart: ClassVar[frozenset[str]] = Coded.apart | {"weights"}

    def __init__(
        self,
        n: int,
        per: Per = "tensor",
        weights: Tensor | None = None,
        of: object = None,
        codes: Tensor | str | None = None,
    ) -> None:
        super().__init__()
        self.n = n
        self.per: Per = per
        self.weights = weights
        self.of: Rule | None = None
        if of is not None:
            self.of = self._apart(make_rule(of, {}))
        self.made_of_weight: bool = codes is None
        if isinstance(codes, str):
            self.expect(codes)
        elif codes is not None:
            self.fault: Reason | None = why_no_index(codes) or self._why_no_count()
            if self.fault is None and int(codes.max()) >= n:
                self.fault = Reason(f"codes go up to {int(codes.max())}, and n={n}.")
            if self.fault is None:
                self._keep_codes(codes)

    def _apart(self, part: Rule) -> Rule:
        """The other law without its data, which this rule keeps as its own."""
        if isinstance(part, Coded):
            self.hold({_OF + name: value for name, value in part.data().items()})
            part = copy(part)
            part.__dict__["_buffers"] = {}
        return part

    def _keep_codes(self, codes: Tensor) -> None:
        with plain_numbers():
            packed = pack_numbers(codes.detach().cpu().flatten().to(torch.uint8), self.n - 1)
        self.keep(tuple(codes.shape), {**self.data(), _CODES: packed})

    def options(self) -> dict[str, Any]:
        """What the law is made with; the tag of codes that were given."""
        said: dict[str, Any] = {"n": self.n}
        if self.per != "tensor":
            said["per"] = self.per
        if self.of is not None:
            said["of"] = stated(self.of)
        return said if self.made_of_weight or not self.checksum else {**said, "codes": self.tag}

    def sizes(self) -> Sequence[dict[str, Any]]:
        """Values of one bit, of two, and so on up to ``n``."""
        if not is_whole(self.n, 2):
            return ()  # `check` says what it should be
        bits = range(1, (self.n - 1).bit_length())
        return [{"n": 2**bit} for bit in bits] + [{"n": self.n}]

    # Whether it fits ----------------------------------------------------------------------------

    def check(self, layout: Layout) -> Reason | None:
        """There must be enough entries for so many values, and the other law must fit."""
        reason = super().check(layout) or self._why_no_count()
        reason = reason or why_not_one_of("per", self.per, Per)
        if reason is not None:
            return reason
        part = self._part(layout)
        if isinstance(part, Reason):
            return part
        where = "of an output " if self.per == "output" else ""
        count = prod(layout.shape) // self._rows(layout)
        if part is not None:
            where, count = f"of '{part}' ", part.free_count
        if self.n > count:
            return Reason(
                f"n={self.n}, and the entries {where}are {count}.", f"Choose one from 2 to {count}."
            )
        return self._why_other_sizes(layout, count * self._rows(layout))

    def _why_no_count(self) -> Reason | None:
        if is_whole(self.n, 2) and self.n <= _MOST:
            return None
        return Reason(f"n={self.n!r} is no number of values.", f"Choose one from 2 to {_MOST}.")

    def _why_other_sizes(self, layout: Layout, count: int) -> Reason | None:
        """Why what was given says nothing of this tensor, or None."""
        shape = layout.shape if self.of is None else (count,)
        codes = self.data().get(_CODES)
        sizes = ((self.n - 1).bit_length(), -(-count // 8))
        given = None if self.made_of_weight or not self.checksum else self.coded_shape
        if given not in (None, shape) or (codes is not None and tuple(codes.shape) != sizes):
            return Reason(
                f"codes are {given or 'packed for other sizes'}, and the entries {shape}.",
                "Give a number for each entry; of another law, for each of its free values.",
            )
        return None if self.weights is None else why_no_importance(self.weights, layout.shape)

    def reason_against_dtype(self, dtype: torch.dtype) -> Reason | None:
        """Numbers must have an order, and the other law a meaning."""
        reason = super().reason_against_dtype(dtype)
        return reason if self.of is None else reason or self.of.reason_against_dtype(dtype)

    def _rows(self, layout: Layout) -> int:
        """How many parts of the tensor have values of their own."""
        return layout.canonical_shape[0] if self.per == "output" else 1

    def _part(self, layout: Layout) -> Orbits | Reason | None:
        """The other law, bound to the tensor; None if there is none, or why it does not fit."""
        if self.of is None:
            return None
        part = copy(self.of)
        if isinstance(part, Coded):
            part.hold(_without_prefix(self.data()))
        reason = _why_not_clustered(part)
        if reason is None and isinstance(part, Orbits):
            reason = part.bind(layout, torch.float64)
            if reason is None and self.per == "output":
                reason = Reason("its values may lie in several outputs.", "Leave out per=.")
            if reason is None:
                return part
        return Reason(f"'{part}': {reason.fact}", reason.remedy) if reason is not None else None

    def bind_tensor(self, weight: Tensor, layout: Layout) -> Reason | None:
        """`bind`, after the clusters were made, if they are not known."""
        if self.made_of_weight and _CODES not in self.data():
            reason = (
                self.reason_against_dtype(weight.dtype)
                or self.check(layout)
                or why_no_numbers(weight)
            )
            if reason is not None:
                return reason
            self._make_codes(weight, layout)
        return super().bind_tensor(weight, layout)

    def bind(self, layout: Layout, dtype: torch.dtype) -> Reason | None:
        """Fit the rule to a layout. The clusters must be known."""
        if self.made_of_weight and self.fault is None and _CODES not in self.data():
            return self.check(layout) or Reason(
                f"{MADE}.", "Tie the whole tensor by register_tie, or give codes=."
            )
        return super().bind(layout, dtype)

    # Making clusters ----------------------------------------------------------------------------

    def _make_codes(self, weight: Tensor, layout: Layout) -> None:
        part = self._part(layout)
        with plain_numbers():
            numbers = weight.detach().cpu()
            numbers = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
            counts = None if self.weights is None else self.weights.detach().cpu().double()
            if isinstance(part, Orbits):
                if counts is None:
                    counts = torch.ones(layout.shape, dtype=torch.float64, device="cpu")
                number, entries = part.orbit_labels().abs().flatten(), part.free_count + 1
                counts = torch.bincount(number, counts.flatten(), entries)[None, 1:]
                values = torch.cat([each.flatten() for each in part.right_inverse(numbers)])
                self._keep_codes(clusters(values[None], self.n, counts)[0])
                return
            if counts is not None:
                counts = layout.canonical(counts).reshape(self._rows(layout), -1)
            numbers = layout.canonical(numbers).reshape(self._rows(layout), -1)
            codes = clusters(numbers, self.n, counts).view(layout.canonical_shape)
            self._keep_codes(layout.native(codes))

    def fit_to(self, weight: Tensor, sources: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The mean of each cluster, weighted if `weights` say so, which are forgotten then."""
        free, weights = self.right_inverse(weight), self.weights
        self.weights = None
        if weights is None:
            return free
        weighs = weights.to(weight.device, torch.float64)
        counts = self.adjoint(weighs * self.spread(*map(torch.ones_like, free)))
        left = self.adjoint(weighs * (weight.double() - self.forward(*free).double()))
        return tuple(
            (value + (rest / count).nan_to_num(0)).to(value.dtype)  # 0/0: none of them matters
            for value, rest, count in zip(free, left, counts, strict=True)
        )

    # Other clusters -----------------------------------------------------------------------------

    def anew(self, options: Mapping[str, Any]) -> Cluster:
        """The law before it has found clusters."""
        part = copy(self.of)
        if isinstance(part, Coded):
            part.hold(_without_prefix(self.data()))
        return Cluster(**{"n": self.n, "per": self.per, "of": part, **options})

    def why_other_data(self, data: Mapping[str, Tensor]) -> Reason | None:
        """Clusters that were given are a part of the law; others may be exchanged by loading."""
        held = self._buffers
        if not self.made_of_weight or all(data[name] is held.get(name) for name in data):
            return super().why_other_data(data)
        if isinstance(self.of, Coded):
            reason = self.of.why_other_data(_without_prefix(data))
            if reason is not None:
                return reason
        if self.layout is None or _CODES not in data or not has_values(data[_CODES]):
            return None
        other = self.for_layout(self.layout)
        other.hold(data)
        found = other.find_pattern()
        return found if isinstance(found, Reason) else None

    def take(self, data: Mapping[str, Tensor]) -> Reason | None:
        """Hold the data of a file, and believe in its clusters."""
        reason = super().take(data)
        if reason is None:
            self.adopt(self.data())
        return reason

    def adopt(self, data: Mapping[str, Tensor]) -> None:
        """Let the clusters of a state dict that is being loaded be those of the law."""
        if self.made_of_weight and _CODES in data and has_values(data[_CODES]):
            own = {name: x for name, x in self.data().items() if x.dtype == torch.uint8}
            with plain_numbers():
                checksum = checksum_of({**own, **data})
            if checksum != self.checksum:
                self.checksum: str = checksum
                self._forget_table()

    def with_data(self, data: Mapping[str, Tensor]) -> Self:
        """The bound rule with the data of a state dict."""
        other = super().with_data(data)
        other.adopt(data)
        return other

    # The law ------------------------------------------------------------------------------------

    def free_shapes(self) -> tuple[tuple[int, ...], ...]:
        """A row of values for the tensor, or for each output."""
        layout = self.bound_layout
        return ((self.n,),) if len(layout.shape) < 2 else ((self._rows(layout), self.n),)

    def _labels(self) -> Tensor:
        """For each entry the number of its value from 1, negative where it is minus that."""
        layout, packed = self.bound_layout, self.data()[_CODES]
        part = self._part(layout)
        with plain_numbers():
            if isinstance(part, Orbits):
                own = part.orbit_labels().flatten()
                number = unpack_numbers(packed, part.free_count).add_(1)
                number = torch.cat([number.new_zeros(1), number])[own.abs()]
                return torch.where(own < 0, -number, number)
            labels = unpack_numbers(packed, prod(layout.shape)).add_(1)
            if self.per == "output":
                outputs, *others = layout.canonical_shape
                row = torch.arange(outputs, dtype=torch.int32, device="cpu").view(
                    -1, *(1,) * len(others)
                )
                row = layout.native(row.expand(outputs, *others)).flatten()
                labels += self.n * row
            return labels

    def symmetries(self, weight: Tensor) -> Iterable[Tensor]:
        """Every entry as the first one of its cluster; and what the other law says."""
        labels, part = self._labels(), self._part(self.bound_layout)
        image = image_by_labels(weight, labels)
        if isinstance(part, Orbits):
            yield from part.symmetries(weight)
            fixed = (labels == 0).view(weight.shape).to(weight.device)
            image = torch.where(fixed, weight, image)
        yield image

    def find_pattern(self) -> Pattern | Reason:
        """As the codes say, with the numbers that the other law fixes."""
        labels, count = self._labels(), self.n * self._rows(self.bound_layout)
        part, fixed = self._part(self.bound_layout), None
        with plain_numbers():
            sizes = torch.bincount(labels.abs(), minlength=count + 1)[1:]
            if len(sizes) > count or not bool(sizes.all()):
                return Reason(
                    f"of the {count} values {int((sizes == 0).sum())} have no entry.",
                    "Give codes in which every number from 0 to n - 1 occurs.",
                )
            if isinstance(part, Orbits):
                zeros = (
                    torch.zeros(shape, dtype=torch.float64, device="cpu")
                    for shape in part.free_shapes()
                )
                numbers = part(*zeros).flatten()
                fixed = numbers if bool(numbers.any()) else None
            return Pattern(labels, count, fixed)

    @classmethod
    def variants(cls, layout: Layout) -> Sequence[dict[str, Any]]:
        """None: every weight is near to its clusters, so this says nothing of a law in it."""
        return ()

    @classmethod
    def examples(cls) -> Sequence[Example]:
        """Clusters that are known, on matrices, convolutions and a bias, and of other laws."""
        some = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 2, 2]], device="cpu")
        rows = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]], device="cpu")
        kernel = torch.tensor([[[1, 0, 1], [0, 0, 1]]], device="cpu").transpose(0, 1)
        skew = torch.tensor([0, 1, 1, 0, 1, 0], device="cpu")
        return (
            Example(lambda: nn.Linear(3, 3), {"n": 3, "codes": some}),
            Example(lambda: nn.Linear(4, 2), {"n": 2, "per": "output", "codes": rows}),
            Example(
                lambda: nn.ConvTranspose1d(2, 1, 3), {"n": 2, "per": "output", "codes": kernel}
            ),
            Example(lambda: nn.Linear(4, 4), {"n": 2, "of": "skew", "codes": skew}),
        )


def _without_prefix(data: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The data of the other law, by its own names."""
    return {name[len(_OF) :]: x for name, x in data.items() if name.startswith(_OF)}


def _why_not_clustered(part: Rule) -> Reason | None:
    """Why the values of another law cannot be clustered, or None."""
    if not isinstance(part, Orbits) or part.reads_layers:
        return Reason("its values are not entries.", "Cluster those of a law by symmetries.")
    if isinstance(part, Coded) and (part.holds_numbers or part.made_of_weight):
        return Reason("it holds numbers, or clusters, of the weight.", "Leave it out.")
    if part.compute not in ("auto", "dense"):
        return Reason(f"compute={part.compute!r} is a form of this law alone.", "Leave it out.")
    return None
