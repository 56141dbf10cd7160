"""Look before you tie: how far every tensor of a model is from every law that fits it.

A residual alone says little: a law that stores half of the values is half kept by any random
weight. So every residual stands beside the one that a random weight would have.

Laws on one tensor, ``n`` entries and ``f`` free values
    For i.i.d. normal entries ``residual² ~ Beta((n − f)/2, f/2)``: the projection is orthogonal
    and keeps ``f`` of ``n`` dimensions. Expected: ``sqrt(1 − f/n)``.
Copies
    ``residual² = 1 + q − 2·sqrt(q)·cosine`` with ``q = ‖fn(source)‖² / ‖W‖²``, and the cosine
    of unrelated weights has mean 0 and variance ``1/n``. Expected: ``sqrt(1 + q)``, which is √2
    for equal scales.

The work is linear in the model's size. Copies are looked for in all pairs by some sampled
entries, and compared in full for the nearest few of each tensor.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam import _cost, _structured
from tiedparam._errors import TieError
from tiedparam._layout import Layout
from tiedparam._linked import Linked
from tiedparam._places import Places
from tiedparam._plan import Plan, PlanEntry
from tiedparam._progress import progress as progress_bar
from tiedparam._register import make_rule, why_refused, why_untieable
from tiedparam._registry import available_rules
from tiedparam._rule import Rule
from tiedparam._stock import has_values
from tiedparam._table import Column, Table, TableReport, plain, show
from tiedparam._ties import get_tie, is_tied

SAMPLED = 1024
"""How many entries of each tensor are compared over all pairs."""

RuleChoice = str | type[Rule] | tuple[str | type[Rule], Mapping[str, Any]]


@dataclass(frozen=True)
class Candidate:
    """One tensor and one law that it can carry.

    Attributes:
        layer: path of the layer in the model.
        tensor_name: which of its tensors.
        rule: the rule with its options, as text.
        rule_class: the rule.
        options: its options; a source is given as its path.
        shape: of the tensor.
        dense_values: how many entries it has.
        free_values: how many numbers the rule stores.
        multiplicity: how many entries share a free value, least and most; None for a copy.
        residual: ``‖W − project(W)‖ / ‖W‖``; 0 for a zero weight.
        expected: the residual of a random weight of this shape (and scale, for a copy).
        z_score: how many standard deviations ``residual²`` lies from that of a normal i.i.d.
            weight; far below zero means that the law is kept on purpose. None if unknown.
        constant: whether all entries are equal: such a tensor keeps many laws and says nothing.
        multiply_adds_dense: multiply-adds per position without the tie, None if unknown.
        multiply_adds_tied: the same with the tie, in training.
        positions: on how many positions the layer works for the example; None without one.
    """

    layer: str
    tensor_name: str
    rule: str
    rule_class: type[Rule]
    options: Mapping[str, Any]
    shape: tuple[int, ...]
    dense_values: int
    free_values: int
    multiplicity: tuple[int, int] | None
    residual: float
    expected: float
    z_score: float | None
    constant: bool
    multiply_adds_dense: int | None
    multiply_adds_tied: int | None
    positions: int | None = None

    @property
    def compression(self) -> float:
        """Dense by free values; infinite for a copy."""
        return self.dense_values / self.free_values if self.free_values else math.inf

    @property
    def relative(self) -> float | None:
        """Residual by expected residual: 1 for a random weight, 0 for a lawful one.

        None for a constant tensor, whose residual says nothing.
        """
        if self.constant or not self.expected:
            return None
        return self.residual / self.expected

    def entry(self) -> PlanEntry:
        """The entry of a plan that ties this tensor by this rule."""
        rule = self.rule_class.name or self.rule_class
        return PlanEntry(glob.escape(self.layer), rule, dict(self.options), self.tensor_name)


@dataclass(frozen=True)
class NotLookedAt:
    """A tensor that was left out, and why."""

    layer: str
    tensor_name: str
    reason: str


@dataclass(frozen=True)
class Pairs:
    """How much of the search for copies was done.

    Attributes:
        fitting: pairs of tensor and function of another tensor whose shapes fit.
        compared: how many of them were compared in full; the others by sampled entries only.
        per_tensor: how many were allowed for each tensor and function.
    """

    fitting: int = 0
    compared: int = 0
    per_tensor: int = 0


def _path(candidate: Candidate | NotLookedAt) -> str:
    return f"{candidate.layer}.{candidate.tensor_name}".removeprefix(".")


# what candidates and ties have in common
WHAT_IT_TIES: list[Column[Any]] = [
    Column("tensor", "tensor", _path),
    Column("rule", "rule", lambda r: r.rule),
    Column("shape", "shape", lambda r: r.shape),
    Column("dense_values", "dense", lambda r: r.dense_values),
    Column("free_values", "free", lambda r: r.free_values),
    Column("compression", "ratio", lambda r: r.compression),
    Column("multiplicity", "mult.", lambda r: r.multiplicity, lambda r: _span(r.multiplicity)),
    Column("residual", "residual", lambda r: r.residual),
]
WHAT_IT_COSTS: list[Column[Any]] = [
    Column("multiply_adds_dense", "mult-adds", lambda r: r.multiply_adds_dense),
    Column("multiply_adds_tied", "tied", lambda r: r.multiply_adds_tied),
]
WHERE_IT_LIES: list[Column[Any]] = [
    Column("layer", "", lambda r: r.layer),
    Column("tensor_name", "", lambda r: r.tensor_name),
]
_COLUMNS: list[Column[Candidate]] = [
    *WHAT_IT_TIES,
    Column("expected", "random", lambda c: c.expected),
    Column("relative", "relative", lambda c: c.relative),
    *WHAT_IT_COSTS,
]
_ONLY_DATA: list[Column[Candidate]] = [
    *WHERE_IT_LIES,
    Column("z_score", "", lambda c: c.z_score),
    Column("constant", "", lambda c: c.constant),
    Column("positions", "", lambda c: c.positions),
]


def _span(multiplicity: tuple[int, int] | None) -> str:
    """``4``, ``1–2``, or ``–`` for a copy."""
    if multiplicity is None:
        return "–"
    least, most = multiplicity
    return show(least) if least == most else f"{show(least)}–{show(most)}"


@dataclass(frozen=True)
class ScanReport(TableReport[Candidate]):
    """What `scan` saw. Print it, or go on with `found`, `plan` and `rows`.

    Attributes:
        candidates: every tensor with every rule that fits it, in the model's order.
        not_looked_at: tensors that were left out, and why.
        pairs: how much of the search for copies was done.
    """

    candidates: tuple[Candidate, ...]
    not_looked_at: tuple[NotLookedAt, ...] = ()
    pairs: Pairs = field(default_factory=Pairs)

    shown_rows: ClassVar[int | None] = 40

    def ranked(self) -> list[Candidate]:
        """The candidates, those first that keep their law better than a random weight would."""

        def key(candidate: Candidate) -> tuple[bool, float]:
            relative = candidate.relative
            unknown = relative is None or math.isnan(relative)
            return unknown, 0.0 if unknown or relative is None else relative

        return sorted(self.candidates, key=key)

    def found(self, below: float = 0.9) -> list[Candidate]:
        """Near-symmetries that chance does not explain, the clearest first.

        Args:
            below: how small the residual must be, as a part of what a random weight has. It
                must also lie four standard deviations below that, so that a tensor of few
                entries does not stand out by luck. Constant tensors are left out.
        """
        return [
            c for c in self.ranked()
            if c.relative is not None and c.relative < below
            and c.z_score is not None and c.z_score < -4
        ]  # fmt: skip

    def plan(self, below: float = 0.9) -> Plan:
        """A plan for `tie_model`: for each tensor the clearest of what was `found`.

        Where several laws are kept equally well, the one that stores least.
        """
        best: dict[tuple[str, str], Candidate] = {}
        for candidate in self.found(below):
            key = (candidate.layer, candidate.tensor_name)
            if key not in best or _better(candidate, best[key]):
                best[key] = candidate
        return Plan(tuple(candidate.entry() for candidate in best.values()))

    def table(self) -> Table[Candidate]:
        """The ranked candidates."""
        return Table(_COLUMNS, self.ranked())

    def rows(self) -> list[dict[str, Any]]:
        """A flat dictionary for every candidate, in the model's order."""
        return Table([*_COLUMNS, *_ONLY_DATA], self.candidates).data()

    def notes(self) -> list[str]:
        """What was not looked at, and how copies were searched."""
        notes = []
        if not self.candidates:
            notes.append("No tensor of the model can carry one of the rules.")
        fitting, compared = self.pairs.fitting, self.pairs.compared
        if fitting and compared == fitting:
            notes.append(f"Copies: every fitting pair of tensors was compared ({fitting:,}).")
        elif fitting:
            notes.append(
                f"Copies: {compared:,} of {fitting:,} fitting pairs were compared in full, the "
                f"{self.pairs.per_tensor} nearest of each tensor; the others by {SAMPLED:,} "
                "sampled entries only, and have no row (pairs= sets the bound)."
            )
        by_reason: dict[str, list[str]] = {}
        for left_out in self.not_looked_at:
            by_reason.setdefault(left_out.reason, []).append(_path(left_out))
        for reason, names in by_reason.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            notes.append(f"Not looked at: {', '.join(names[:3])}{more}: {reason}")
        return notes

    def to_data(self) -> dict[str, Any]:
        """Rows, notes, what was left out, and the bound on copies."""
        return {
            "kind": "scan",
            "rows": plain(self.rows()),
            "not_looked_at": [plain(vars(left_out)) for left_out in self.not_looked_at],
            "pairs": plain(vars(self.pairs)),
            "notes": self.notes(),
        }


def _better(one: Candidate, other: Candidate) -> bool:
    return one.relative == other.relative and one.free_values < other.free_values


def scan(
    model: nn.Module,
    rules: Iterable[RuleChoice] | None = None,
    *,
    pairs: int = 2,
    example: Any = None,
    progress: bool | None = None,
) -> ScanReport:
    """Look at every tensor of a model through every rule that fits it. Nothing is changed.

    Args:
        model: the model; tensors that are tied already are left out, and listed as such.
        rules: names, `Rule` subclasses, or pairs of one and its options; by default all of
            `available_rules`, each with all of its `Rule.variants`. Sources are looked for, and
            not given. Options that fit no tensor are listed with the reason.
        pairs: with how many other tensors of a fitting shape each tensor is compared in full,
            for rules that copy; 0 looks for no copies. Which ones is decided by 1,024
            sampled entries of every tensor, over all pairs. Biases are not searched for copies.
        example: an input of the model: a tensor, a tuple of arguments, or a mapping of keyword
            arguments. The model then runs once, in eval mode, to count the positions that
            each layer works on.
        progress: a bar on stderr: True, False, or None for work of more than a second on a
            terminal.

    Returns:
        The report. Combinations that tie nothing (as many free values as entries) are left
        out.

    Raises:
        TieError: if the model has no values to look at (meta device), a rule is unknown, or a
            source was given.
        TypeError: for arguments of a wrong type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"scan takes an nn.Module, not {type(model).__name__}")
    if isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < 0:
        raise TypeError(f"pairs= takes a number of pairs per tensor, 0 or more, not {pairs!r}")
    chosen = _chosen_rules(rules)
    tensors, left_out = _tensors_of(model)
    positions = _cost.positions(model, example) if example is not None else {}
    passes = sum(pairs > 0 or not issubclass(choice.rule, Linked) for choice in chosen)
    total = sum(t.value.numel() for t in tensors) * passes
    with progress_bar(total, "scanning", progress) as advance, torch.no_grad():
        looked = _Scan(chosen, positions, advance, left_out)
        found = {id(tensor): list(looked.laws_on(tensor)) for tensor in tensors}
        searched = looked.copies_among(tensors, pairs, found)
        left_out += looked.idle()
    in_order = [candidate for tensor in tensors for candidate in found[id(tensor)]]
    return ScanReport(tuple(in_order), tuple(left_out), searched)


@dataclass
class _Tensor:
    """A Parameter that can be tied, and where it lies."""

    path: str
    layer: nn.Module
    name: str
    value: Tensor
    constant: bool

    @property
    def layout(self) -> Layout:
        return Layout.of(self.layer, self.name, tuple(self.value.shape))


@dataclass(frozen=True)
class _Choice:
    """A rule to try, with its options, or with all of its variants."""

    rule: type[Rule]
    options: Mapping[str, Any] | None

    def variants(self, layout: Layout) -> Sequence[Mapping[str, Any]]:
        return self.rule.variants(layout) if self.options is None else [self.options]


def _chosen_rules(rules: Iterable[RuleChoice] | None) -> list[_Choice]:
    if rules is None:
        return [_Choice(rule, None) for rule in available_rules().values()]
    if isinstance(rules, (str, type)):
        raise TypeError("rules= takes a list of rules, such as ['flip_sym']")
    chosen = []
    for item in rules:
        rule, options = item if isinstance(item, tuple) else (item, None)
        kind = PlanEntry("*", rule, options or {}).rule_class()
        if options is not None and not issubclass(kind, Linked):
            make_rule(kind, dict(options))  # unknown options are said before any work
        given = {"source", "source_name"} & set(options or ())
        if issubclass(kind, Linked) and given:
            raise TieError(
                f"scan looks for the sources of '{kind.name or kind.__name__}' itself. Leave out "
                f"{' and '.join(f'{name}=' for name in sorted(given))}, or call residual for one."
            )
        chosen.append(_Choice(kind, options))
    return chosen


def _tensors_of(model: nn.Module) -> tuple[list[_Tensor], list[NotLookedAt]]:
    """Every Parameter once, in the model's order; and what no rule can be put on."""
    tensors, left_out = [], []
    places = Places(model)
    for path, layer in model.named_modules():
        if isinstance(layer, parametrize.ParametrizationList):
            continue  # its layer speaks for it
        for name in _tensor_names(layer):
            parameter = layer._parameters.get(name)
            where = f"{path}.{name}".removeprefix(".")
            if is_tied(layer, name):
                reason: str | None = f"it is tied by '{get_tie(layer, name)}' already."
            elif parameter is not None and (
                others := list(places.other_holders(layer, name, parameter))
            ):
                reason = _why_shared(places, [(layer, name), *others])
            else:
                reason = why_untieable(layer, name) or _why_no_values(parameter, where)
            if reason is not None:
                left_out.append(NotLookedAt(path, name, reason))
                continue
            assert parameter is not None
            value = parameter.detach()
            constant = bool((value == value.reshape(-1)[0]).all())
            tensors.append(_Tensor(path, layer, name, value, constant))
        if hasattr(layer, "_packed_params") and hasattr(layer, "weight"):
            left_out.append(NotLookedAt(path, "weight", "the layer is quantized."))
    return tensors, left_out


def _why_shared(places: Places, holders: list[tuple[nn.Module, str]]) -> str:
    """Why the first of the holders of one Parameter cannot be tied."""
    padded = [
        places.describe(layer, name)
        for layer, name in holders
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.padding_idx is not None
    ]
    # said here: else who gives the embedding its own Parameter is refused by the next law
    circle = f" No other law can go on {padded[0]}, because of its padding_idx." if padded else ""
    return (
        f"it shares its Parameter with {places.describe(*holders[1])}, and a rule would take it "
        f"away. Give one of them a Parameter of its own, and tie it to the other by 'copy'.{circle}"
    )


def _tensor_names(layer: nn.Module) -> Iterator[str]:
    yield from (name for name, parameter in layer._parameters.items() if parameter is not None)
    if parametrize.is_parametrized(layer):
        yield from layer.parametrizations  # type: ignore[misc]


def _why_no_values(parameter: nn.Parameter | None, where: str) -> str | None:
    if parameter is None:
        return "it is no Parameter."
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return f"no law has a meaning for {parameter.dtype}."
    if parameter.numel() == 0:
        return "it is empty."
    if not has_values(parameter):
        raise TieError(
            f"the model has no values to look at: '{where}' is on the meta device. Load the "
            "model first (model.to_empty, then load_state_dict)."
        )
    return None


class _Scan:
    """One pass over a model."""

    def __init__(
        self,
        rules: list[_Choice],
        positions: dict[nn.Module, int],
        advance: Callable[[int], None],
        left_out: list[NotLookedAt],
    ) -> None:
        self.rules = rules
        self.positions = positions
        self.advance = advance
        self.left_out = left_out
        self._broken: set[type[Rule]] = set()
        self._misfits: dict[int, NotLookedAt] = {}
        self._fitted: set[int] = set()
        self._spans: dict[tuple[str, Layout], tuple[int, int]] = {}

    def laws_on(self, tensor: _Tensor) -> Iterator[Candidate]:
        """The candidates of one tensor alone."""
        refused: dict[str, NotLookedAt] = {}
        for choice in self.rules:
            if issubclass(choice.rule, Linked) or choice.rule in self._broken:
                continue
            try:
                yield from self._law_on(tensor, choice, refused)
            except Exception as error:  # a rule of the user's own ends the look at itself alone
                self._leave_out(choice, tensor, error)
            self.advance(tensor.value.numel())
        self.left_out += refused.values()

    def idle(self) -> Iterator[NotLookedAt]:
        """Where options that were given and fit no tensor were tried first, and why they do not."""
        for number, misfit in self._misfits.items():
            if number not in self._fitted:
                yield misfit

    def _leave_out(self, choice: _Choice, tensor: _Tensor, error: Exception) -> None:
        self._broken.add(choice.rule)
        reason = (
            f"the rule '{choice.rule.name or choice.rule.__name__}' raised "
            f"{type(error).__name__} here and was left out from then on: {error}"
        )
        self.left_out.append(NotLookedAt(tensor.path, tensor.name, reason))

    def _law_on(
        self, tensor: _Tensor, choice: _Choice, refused: dict[str, NotLookedAt]
    ) -> Iterator[Candidate]:
        for options in choice.variants(tensor.layout):
            rule = make_rule(choice.rule, dict(options))
            refusal = why_refused(tensor.layer, rule)
            if refusal is not None:
                refused[refusal] = NotLookedAt(tensor.path, tensor.name, refusal)
                continue
            misfit = rule.bind(tensor.layer, tensor.name, None)
            if misfit is not None and choice.options is not None:
                reason = f"'{rule}' fits this tensor as little as the others: {misfit}"
                left_out = NotLookedAt(tensor.path, tensor.name, reason)
                self._misfits.setdefault(id(choice), left_out)
            if misfit is not None:
                continue
            self._fitted.add(id(choice))
            entries, free = tensor.value.numel(), rule.free_count
            if free >= entries:
                continue  # it ties nothing
            residual = rule.residual(tensor.value)
            # the Beta distribution of the module's first lines
            mean = (entries - free) / entries
            deviation = math.sqrt(mean * (1 - mean) / (entries / 2 + 1))
            yield self._candidate(
                tensor, rule, options, residual, mean, deviation, self._span(rule)
            )

    def copies_among(
        self, tensors: list[_Tensor], pairs: int, found: dict[int, list[Candidate]]
    ) -> Pairs:
        """Compare tensors with functions of each other; add the candidates to ``found``."""
        if not pairs:
            return Pairs()
        rules = [choice for choice in self.rules if issubclass(choice.rule, Linked)]
        work = sum(tensor.value.numel() for tensor in tensors)
        # a constant tensor is near to every other constant one
        tensors = [t for t in tensors if t.value.dim() >= 2 and not t.constant]
        fitting = compared = 0
        own = [_sample(tensor.value) for tensor in tensors]
        for choice in rules:
            for options, sources in self._functions(choice, tensors):
                for index, near in sources.nearest(tensors, own, pairs):
                    tensor = tensors[index]
                    fitting += near.fitting
                    for source in near.sources:
                        if choice.rule in self._broken:
                            continue
                        try:
                            candidate = self._copy(choice.rule, options, tensor, tensors[source])
                        except Exception as error:
                            self._leave_out(choice, tensor, error)
                            continue
                        if candidate is not None:
                            compared += 1
                            found[id(tensor)].append(candidate)
            self.advance(work)
        return Pairs(fitting, compared, pairs)

    def _functions(
        self, choice: _Choice, tensors: list[_Tensor]
    ) -> Iterator[tuple[Mapping[str, Any], _Sources]]:
        """Every set of options of a rule that copies, with samples of what the sources give."""
        by_options: dict[str, tuple[Mapping[str, Any], _Sources]] = {}
        for index, tensor in enumerate(tensors):
            try:
                for options in choice.variants(tensor.layout):
                    _, sources = by_options.setdefault(repr(options), (options, _Sources()))
                    sources.add(index, tensor, _linked(choice.rule, options, tensor))
            except Exception as error:
                self._leave_out(choice, tensor, error)
                return
        yield from by_options.values()

    def _copy(
        self, kind: type[Rule], options: Mapping[str, Any], tensor: _Tensor, source: _Tensor
    ) -> Candidate | None:
        rule = _linked(kind, options, source)
        refused = why_refused(tensor.layer, rule)
        if refused is not None or rule.bind(tensor.layer, tensor.name, None) is not None:
            return None
        computed = rule.forward()
        wide = torch.promote_types(computed.dtype, torch.float32)
        norms = [float(torch.linalg.vector_norm(v.to(wide))) for v in (computed, tensor.value)]
        if not norms[1]:
            return None
        scale = (norms[0] / norms[1]) ** 2
        mean, deviation = 1 + scale, 2 * math.sqrt(scale / tensor.value.numel())
        residual = rule.residual(tensor.value)
        shown = {**options, "source": source.path}
        if source.name != tensor.name:
            shown["source_name"] = source.name
        return self._candidate(tensor, rule, shown, residual, mean, deviation, None)

    def _candidate(
        self,
        tensor: _Tensor,
        rule: Rule,
        options: Mapping[str, Any],
        residual: float,
        mean: float,
        deviation: float,
        multiplicity: tuple[int, int] | None,
    ) -> Candidate:
        """The record; ``mean`` and ``deviation`` are those of a random weight's residual²."""
        _structured.prepare(tensor.layer, tensor.name, rule)
        shape = tuple(tensor.value.shape)
        costs = _cost.multiply_adds(tensor.layer, tensor.name, shape, rule)
        text = str(rule)
        if isinstance(rule, Linked):
            place = options["source"] + "." + options.get("source_name", tensor.name)
            text = f"{text} of {place.removeprefix('.')}"
        return Candidate(
            layer=tensor.path,
            tensor_name=tensor.name,
            rule=text,
            rule_class=type(rule),
            options=dict(options),
            shape=shape,
            dense_values=tensor.value.numel(),
            free_values=rule.free_count,
            multiplicity=multiplicity,
            residual=residual,
            expected=math.sqrt(mean),
            z_score=(residual**2 - mean) / deviation if deviation and not tensor.constant else None,
            constant=tensor.constant,
            multiply_adds_dense=costs[0] if costs else None,
            multiply_adds_tied=costs[1] if costs else None,
            positions=self.positions.get(tensor.layer),
        )

    def _span(self, rule: Rule) -> tuple[int, int]:
        """Least and greatest multiplicity; layers of one shape are counted once."""
        key = (f"{type(rule).__qualname__} {rule}", rule.bound_layout)
        if key not in self._spans:
            counts = rule.multiplicities()
            least, most = min(c.min() for c in counts), max(c.max() for c in counts)
            self._spans[key] = int(least), int(most)
        return self._spans[key]


def _linked(kind: type[Rule], options: Mapping[str, Any], source: _Tensor) -> Linked:
    rule = make_rule(kind, {**options, "source": source.layer, "source_name": source.name})
    assert isinstance(rule, Linked)
    return rule


@dataclass(frozen=True)
class _Near:
    """Which sources are nearest to a tensor, and how many fitted."""

    sources: list[int]
    fitting: int


class _Sources:
    """Samples of ``fn(source)`` for one function and every source, by shape, dtype and device."""

    def __init__(self) -> None:
        self._samples: dict[tuple[Any, ...], tuple[list[int], list[Tensor]]] = {}
        self._mutual: bool | None = None

    def add(self, index: int, tensor: _Tensor, rule: Linked) -> None:
        """Note what the function makes of one source; nothing if it cannot take it."""
        try:
            value = rule.fn(tensor.value)
            if self._mutual is None:
                # copying there and back is one finding, not two
                self._mutual = torch.equal(rule.fn(value), tensor.value)
        except Exception:  # any function, on any shape
            return
        indices, samples = self._samples.setdefault(_kind(value), ([], []))
        indices.append(index)
        samples.append(_sample(value))

    def nearest(
        self, tensors: list[_Tensor], own: list[Tensor], count: int
    ) -> Iterator[tuple[int, _Near]]:
        """For each tensor the sources whose function is nearest, by the sampled entries.

        All pairs of one shape are compared by products of matrices of samples, some rows at a
        time.
        """
        members: dict[tuple[Any, ...], list[int]] = {}
        for index, tensor in enumerate(tensors):
            members.setdefault(_kind(tensor.value), []).append(index)
        for kind, indices in members.items():
            if kind not in self._samples:
                continue
            numbers, samples = self._samples[kind]
            sources, values = torch.tensor(numbers), torch.stack(samples)
            squares = values.abs().square().sum(1)
            for chunk in torch.tensor(indices).split(_ROWS):
                mine = torch.stack([own[index] for index in chunk.tolist()])
                products = (mine @ values.mH).real
                distances = mine.abs().square().sum(1, keepdim=True) + squares - 2 * products
                allowed = chunk[:, None]
                allowed = sources < allowed if self._mutual else sources != allowed
                distances = distances.nan_to_num(math.inf).masked_fill(~allowed, math.inf)
                order = torch.argsort(distances, dim=1, stable=True)[:, :count]
                for index, row, fitting in zip(
                    chunk.tolist(), sources[order].tolist(), allowed.sum(1).tolist(), strict=True
                ):
                    yield index, _Near(row[:fitting], fitting)


_ROWS = 256


def _kind(value: Tensor) -> tuple[Any, ...]:
    return tuple(value.shape), value.dtype, value.device


def _sample(value: Tensor) -> Tensor:
    """Some entries of a tensor, the same ones for every tensor of its shape."""
    count = value.numel()
    if count <= SAMPLED:
        flat = value.reshape(-1)
    else:
        generator = torch.Generator().manual_seed(count)
        chosen = torch.randint(count, (SAMPLED,), generator=generator)
        flat = value[torch.unravel_index(chosen.to(value.device), value.shape)]
    wide = torch.complex128 if value.is_complex() else torch.float64
    return flat.to("cpu", wide)
