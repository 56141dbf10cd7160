"""Look before you tie: how far every tensor of a model is from every law that fits it.

A residual alone says little: a law that stores half of the values is half kept by any random
weight, and a law of equal entries by any weight with a mean. So every residual stands beside the
one that a random tensor of the same mean and spread would have (`tiedparam.model.random_tensor`).

The work is linear in the model's size. Copies are looked for in all pairs by some sampled
entries, and compared in full for the nearest few of each tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tiedparam.compute.forms import computing_of
from tiedparam.laws.distance import relative_distance
from tiedparam.laws.layout import Layout
from tiedparam.laws.registry import PART, make_rule
from tiedparam.laws.rule import Rule
from tiedparam.layer.checks import why_refused
from tiedparam.model import cost
from tiedparam.model.near_copies import Sources, sample
from tiedparam.model.plan import Value
from tiedparam.model.random_tensor import Moments, RandomResidual
from tiedparam.model.reasons import Skipped
from tiedparam.model.scan_choices import Choice, chosen_rules
from tiedparam.model.scan_report import Candidate, Pairs, ScanReport
from tiedparam.model.scanned import ScannedTensor, tensors_of
from tiedparam.tie.binding import bind
from tiedparam.util.errors import Reason, key_of
from tiedparam.util.progress import progress as progress_bar


def scan(
    model: nn.Module,
    rules: Iterable[Value | list[Any]] | None = None,
    *,
    pairs: int = 2,
    example: Any = None,
    progress: bool | None = None,
) -> ScanReport:
    """Look at every tensor of a model through every rule that fits it. Nothing is changed.

    Args:
        model: the model; tensors that are tied already are left out, and listed as such.
        rules: names, `Rule` subclasses, or pairs of one and its options; by default all of
            `available_rules`, each with all of its `Rule.variants`; a rule that has none and needs
            options, such as ``"head_share"``, needs a pair. A list among them is laws that hold
            together, as in `register_tie`. Sources are looked for, and not given.
            What fits no tensor is listed with the reason.
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

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        >>> _ = nn.init.eye_(model[1].weight)
        >>> print(tp.scan(model, ["flip_sym"]).headline())
        1 of 2 tensors looks tied: 1.weight (flip_sym).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"scan takes an nn.Module, not {type(model).__name__}")
    if isinstance(pairs, bool) or not isinstance(pairs, int) or pairs < 0:
        raise TypeError(f"pairs= takes a number of pairs per tensor, 0 or more, not {pairs!r}")
    chosen = chosen_rules(rules)
    tensors, left_out = tensors_of(model)
    work = cost.work(model, example) if example is not None else {}
    passes = sum(pairs > 0 or not choice.rule.reads_layers for choice in chosen)
    total = sum(t.value.numel() for t in tensors) * passes
    with progress_bar(total, "scanning", progress) as advance, torch.no_grad():
        looked = _Scan(chosen, work, advance, left_out)
        found = {id(tensor): list(looked.laws_on(tensor)) for tensor in tensors}
        searched = looked.copies_among(tensors, pairs, found)
        left_out += looked.idle()
    in_order = [candidate for tensor in tensors for candidate in found[id(tensor)]]
    return ScanReport(tuple(in_order), tuple(left_out), searched)


class _Scan:
    """One pass over a model."""

    def __init__(
        self,
        rules: list[Choice],
        work: dict[nn.Module, cost.Work],
        advance: Callable[[int], None],
        left_out: list[Skipped],
    ) -> None:
        self.rules = rules
        self.work = work
        self.advance = advance
        self.left_out = left_out
        self._broken: set[type[Rule]] = set()
        self._misfits: dict[int, Skipped] = {}
        self._fitted: set[int] = set()
        self._shapes: dict[tuple[str, Layout], _OfShape] = {}

    def laws_on(self, tensor: ScannedTensor) -> Iterator[Candidate]:
        """The candidates of one tensor alone."""
        refused: dict[Reason, Skipped] = {}
        for choice in self.rules:
            if choice.rule.reads_layers or choice.rule in self._broken:
                continue
            try:
                yield from self._law_on(tensor, choice, refused)
            except Exception as error:  # a user's rule that fails: the others go on
                self._leave_out(choice, tensor, error)
            self.advance(tensor.value.numel())
        self.left_out += refused.values()

    def idle(self) -> Iterator[Skipped]:
        """Rules that were asked for and fit no tensor: where they were tried first, and why."""
        for number, misfit in self._misfits.items():
            if number not in self._fitted:
                yield misfit

    def _is_misfit(self, choice: Choice, tensor: ScannedTensor, why: Reason) -> None:
        if choice.named:
            left_out = Skipped(tensor.path, tensor.name, why)
            self._misfits.setdefault(id(choice), left_out)

    def _leave_out(self, choice: Choice, tensor: ScannedTensor, error: Exception) -> None:
        self._broken.add(choice.rule)
        fact = (
            f"the rule '{choice.rule.name or choice.rule.__name__}' raised "
            f"{type(error).__name__} here and was left out from then on: {error}"
        )
        self.left_out.append(Skipped(tensor.path, tensor.name, Reason(fact)))

    def _law_on(
        self, tensor: ScannedTensor, choice: Choice, refused: dict[Reason, Skipped]
    ) -> Iterator[Candidate]:
        variants = choice.variants(tensor.layout)
        if not (variants or choice.bare):
            self._is_misfit(choice, tensor, choice.why_no_options())
        for options in variants:
            rule = choice.make(options)
            refusal = why_refused(tensor.target, rule)
            if refusal is not None:
                refused[refusal] = Skipped(tensor.path, tensor.name, refusal)
                continue
            misfit = bind(rule, tensor.target)
            if misfit is not None:
                fact = f"'{rule}' fits no tensor of the model; here, for example: {misfit.fact}"
                self._is_misfit(choice, tensor, Reason(fact, misfit.remedy))
                continue
            self._fitted.add(id(choice))
            entries, free = tensor.value.numel(), rule.free_count
            if free >= entries or not free:
                continue  # it ties nothing, or leaves nothing
            # rows and columns as they are counted here, which a file can hold
            part = {key: rule.options().get(key) for key in PART if key in options}
            options = {**options, **part}
            known = self._of_shape(rule, tensor.value)
            random = RandomResidual.from_law(
                tensor.moments, entries, free, known.unlawful, is_complex=tensor.value.is_complex()
            )
            if known.fixed is not None:
                random = random.beside(known.fixed, tensor.moments)
            yield self._candidate(tensor, rule, choice.law, options, random, known.multiplicity)

    def copies_among(
        self, tensors: list[ScannedTensor], pairs: int, found: dict[int, list[Candidate]]
    ) -> Pairs:
        """Compare tensors with functions of each other; add the candidates to ``found``."""
        if not pairs:
            return Pairs()
        rules = [choice for choice in self.rules if choice.rule.reads_layers]
        work = sum(tensor.value.numel() for tensor in tensors)
        # a constant tensor is near to every other constant one
        tensors = [t for t in tensors if t.value.dim() >= 2 and not t.moments.constant]
        fitting = compared = 0
        values = [tensor.value for tensor in tensors]
        own = [sample(value) for value in values]
        for choice in rules:
            before = compared
            for options, sources in self._functions(choice, tensors):
                for index, near in sources.nearest(values, own, pairs):
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
            if tensors and compared == before and choice.rule not in self._broken:
                self._is_misfit(choice, tensors[0], choice.why_no_source())
            self.advance(work)
        return Pairs(fitting, compared, pairs)

    def _functions(
        self, choice: Choice, tensors: list[ScannedTensor]
    ) -> Iterator[tuple[Mapping[str, Any], Sources]]:
        """Every set of options of a rule that copies, with samples of what the sources give."""
        by_options: dict[str, tuple[Mapping[str, Any], Sources]] = {}
        for index, tensor in enumerate(tensors):
            try:
                for options in choice.variants(tensor.layout):
                    _, sources = by_options.setdefault(repr(options), (options, Sources()))
                    sources.add(index, tensor.value, _copy_of(tensor, choice.rule, options).forward)
            except Exception as error:
                self._leave_out(choice, tensor, error)
                return
        yield from by_options.values()

    def _copy(
        self,
        kind: type[Rule],
        options: Mapping[str, Any],
        tensor: ScannedTensor,
        source: ScannedTensor,
    ) -> Candidate | None:
        rule = _copy_of(source, kind, options)
        refused = why_refused(tensor.target, rule)
        if refused is not None or bind(rule, tensor.target) is not None:
            return None
        random = RandomResidual.from_copy(
            tensor.moments,
            Moments.of(rule.forward(*rule.read())),
            tensor.value.numel(),
            is_complex=tensor.value.is_complex(),
        )
        shown = {**options, "source": source.path}
        if source.name != tensor.name:
            shown["source_name"] = source.name
        return self._candidate(tensor, rule, kind, shown, random, None)

    def _candidate(
        self,
        tensor: ScannedTensor,
        rule: Rule,
        law: Any,
        options: Mapping[str, Any],
        random: RandomResidual,
        multiplicity: tuple[int, int] | None,
    ) -> Candidate:
        residual, constant = rule.residual(tensor.value), tensor.moments.constant
        shape = tuple(tensor.value.shape)
        costs = cost.multiply_adds(tensor.layer, tensor.name, shape, rule)
        work = self.work.get(tensor.layer)
        gains = cost.gains(
            tensor.layer,
            tensor.name,
            rule,
            tensor.value,
            computing=computing_of(tensor.layer, tensor.name, rule),
            rows=work.rows if work else None,
        )
        text = str(rule)
        if rule.reads_layers:
            place = key_of(options["source"], options.get("source_name", tensor.name))
            text = f"{text} of {place}"
        return Candidate(
            layer=tensor.path,
            tensor_name=tensor.name,
            rule=text,
            rule_class=type(rule),
            law=law,
            options=dict(options),
            shape=shape,
            dense_values=tensor.value.numel(),
            free_values=rule.free_count,
            multiplicity=multiplicity,
            residual=residual,
            expected=random.expected,
            z_score=None if constant else random.z_score(residual),
            p_value=None
            if constant
            else random.p_value(residual, rounding=torch.finfo(tensor.value.dtype).eps),
            constant=constant,
            multiply_adds_dense=costs[0] if costs else None,
            multiply_adds_tied=costs[1] if costs else None,
            positions=work.positions if work else None,
            gain_inference=gains.inference,
            gain_training=gains.training,
        )

    def _of_shape(self, rule: Rule, value: Tensor) -> _OfShape:
        """What a bound rule says of every tensor like ``value``; once for each shape."""
        key = (f"{type(rule).__qualname__} {rule}", rule.bound_layout)
        if key not in self._shapes:
            several = None
            if rule.has_orbits:
                counts = torch.cat([count.flatten() for count in rule.multiplicities()])
                several = int(counts.min()), int(counts.max())
            self._shapes[key] = _OfShape(several, _unlawful(rule, value), _fixed(rule, value))
        return self._shapes[key]


def _unlawful(rule: Rule, like: Tensor) -> float:
    """The residual² of a tensor of equal entries."""
    wide = torch.promote_types(like.dtype, torch.float32)
    equal = like.new_ones(like.shape, dtype=wide)
    free = (like.new_ones(shape, dtype=wide) for shape in rule.free_shapes())
    # all that share without signs: an expansion costs a fraction of a projection
    if torch.equal(rule.spread(*free), equal):
        return 0.0
    lawful = rule.spread(*rule.right_inverse(equal))
    return min(1.0, relative_distance(equal, lawful) ** 2)


def _fixed(rule: Rule, like: Tensor) -> Moments | None:
    """The moments of the numbers to which entries are fixed, and zeros; None if all are 0."""
    wide = torch.promote_types(like.dtype, torch.float32)
    fixed = rule.forward(*(like.new_zeros(shape, dtype=wide) for shape in rule.free_shapes()))
    return Moments.of(fixed) if bool(fixed.any()) else None


@dataclass(frozen=True)
class _OfShape:
    """What a rule says of all tensors of one shape.

    Attributes:
        multiplicity: how many entries share a free value, least and most; None if it has none.
        unlawful: the residual² of a tensor of equal entries, by the linear part of the law.
        fixed: the moments of the numbers to which it fixes entries, if they are not all 0.
    """

    multiplicity: tuple[int, int] | None
    unlawful: float
    fixed: Moments | None


def _copy_of(source: ScannedTensor, kind: type[Rule], options: Mapping[str, Any]) -> Rule:
    """A rule that reads this tensor."""
    return make_rule(kind, {**options, "source": source.layer, "source_name": source.name})
