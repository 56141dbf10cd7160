"""Whether the ties of a file fit a model, before any of them is made.

All reasons are listed at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.files.compatible_entries import DOES_NOT_FIT
from tiedparam.files.header import Header
from tiedparam.files.law_options import functions_in, same_law, sources_in
from tiedparam.files.stored_tie import StoredTie
from tiedparam.formats.checkpoint import StoredCheckpoint
from tiedparam.laws.functions import Functions
from tiedparam.laws.layout import Layout
from tiedparam.laws.rule import Rule
from tiedparam.laws.sharing import Sharing
from tiedparam.state.loading import signatures_of
from tiedparam.tie.binding import bind, find_sources
from tiedparam.tie.lookup import find_tie, is_tied, named_ties_in
from tiedparam.tie.record import Tie
from tiedparam.tie.target import Target
from tiedparam.util.errors import Reason, TieError, key_of, quoted, refuse, shown_shape, within
from tiedparam.util.torch_private import parameters_of


def ties_to_make(
    model: nn.Module, stored: StoredCheckpoint, header: Header, functions: Functions
) -> list[tuple[StoredTie, Rule]]:
    """The ties that the model lacks, once all ties of the file are known to fit.

    Args:
        model: the model, not changed yet.
        stored: the file.
        header: what it says of ties.
        functions: what copies in the file may have as ``fn=``.

    Raises:
        TieError: listing what does not fit.
    """
    new, problems = [], []
    for tie in header.ties:
        data = tie.data_in(stored, header.aliases)
        reason = _misfit(tie, model, functions, data, header.ties)
        if reason is not None:
            fact = f"{quoted(tie.key)} was saved tied by {quoted(tie.rule)}: {reason.fact}"
            problems.append(Reason(fact, reason.remedy))
        elif not is_tied(model.get_submodule(tie.layer), tie.tensor):
            new.append((tie, tie.make(functions, data)))
    for prefix, present in named_ties_in(model):
        name, rule = present.tensor_name, str(present.rule)
        written = signatures_of(stored.module_metadata.get(prefix[:-1], {})).get(name)
        if written is not None and written != rule:
            fact = (
                f"'{prefix}{name}' was saved under the rule {quoted(written)} and is tied by "
                f"'{rule}' here."
            )
            problems.append(Reason(fact, "Tie it as it was."))
    refuse(f"'{stored.path}'", problems, DOES_NOT_FIT)
    # what others read is tied before them
    return sorted(new, key=lambda each: each[1].reads_layers)


_ANOTHER_MODEL = "Build the model that was saved."


def _misfit(
    tie: StoredTie,
    model: nn.Module,
    functions: Functions,
    data: Mapping[str, Tensor],
    others: Sequence[StoredTie],
) -> Reason | None:
    """Why a tie cannot be made, or is another one than what is tied already; or None."""
    layer = _submodule(model, tie.layer)
    if layer is None:
        return Reason("the model has no such layer.", _ANOTHER_MODEL)
    try:
        present = find_tie(layer, tie.tensor)
        if present is not None:
            # the model's own code has brought the function
            rule = tie.make({**functions_in(present.rule), **functions}, data)
            return _why_another_tie(tie, rule, present, model)
        return _why_not_made(tie, tie.make(functions, data), layer, model, others)
    except TieError as error:
        return within("", error).reason
    except Exception as error:  # data that was forged, or a rule that may be anybody's
        fact = f"the rule raised {type(error).__name__}: {error}"
        return Reason(fact, "Fetch or save it again.")


def _why_not_made(
    tie: StoredTie, rule: Rule, layer: nn.Module, model: nn.Module, others: Sequence[StoredTie]
) -> Reason | None:
    """Why a tensor that is not tied cannot be tied as the file says; binds ``rule``."""
    if tie.stacked:
        return Reason(
            "another parametrization was stacked on it.",
            "Tie the model and register that one first.",
        )
    if parametrize.is_parametrized(layer, tie.tensor):
        return Reason("it has another parametrization here.", _ANOTHER_MODEL)
    if not isinstance(parameters_of(layer).get(tie.tensor), nn.Parameter):
        return Reason("the model has no such Parameter.", _ANOTHER_MODEL)
    target = Target(layer, tie.tensor, model)
    owner = _owner_to_come(tie, rule, others, model)
    reason = bind(rule, target) if owner is None else _why_not_shared(owner, rule, target)
    if reason is not None:
        return reason
    if rule.bound_layout != tie.layout:
        return _another_layout(tie.layout, rule.bound_layout)
    return None


def _owner_to_come(
    tie: StoredTie, rule: Rule, others: Sequence[StoredTie], model: nn.Module
) -> StoredTie | None:
    """The tie of the file whose values this one is to read, where it is yet to be made."""
    if not isinstance(rule, Sharing) or not rule.reads_layers:
        return None
    for other in others:
        if [(other.layer, other.tensor)] == sources_in(tie.options) and other.rule == tie.rule:
            layer = _submodule(model, other.layer)
            made = layer is None or is_tied(layer, other.tensor)
            return None if made or sources_in(other.options) else other
    return None


def _why_not_shared(owner: StoredTie, rule: Rule, target: Target) -> Reason | None:
    """Why a tie cannot read what another one will have; binds ``rule``."""
    reason = rule.bind(target.layout, target.tensor.dtype)
    there = owner.make({}, {})
    if reason is None and isinstance(rule, Sharing) and isinstance(there, Sharing):
        reason = there.bind(owner.layout, target.tensor.dtype)
        if reason is None:
            shared = torch.empty(there.shared_shape(), device="meta")
            reason = rule.why_not_joined(shared)
    return reason


def _why_another_tie(tie: StoredTie, rule: Rule, here: Tie, model: nn.Module) -> Reason | None:
    """How a tensor is tied otherwise than the file says."""
    present = here.rule
    if present.reads_layers != rule.reads_layers and type(present) is type(rule):
        there, here_too = ("reads", "stores") if rule.reads_layers else ("stores", "reads")
        fact = f"it {there} what layers share there, and {here_too} it here."
        return Reason(fact, "Tie the layers in the order in which they were tied.")
    if not same_law(present, rule):
        fact = f"it was '{rule}' and is '{present}' here."
        return Reason(fact, "Tie it as it was saved, or leave it untied.")
    if present.bound_layout != tie.layout:
        return _another_layout(tie.layout, present.bound_layout)
    if here.is_stacked != tie.stacked:
        return Reason("another parametrization is stacked on it in one of the two.", "Drop it.")
    if present.reads_layers:
        found = find_sources(rule, Target(here.layer, here.tensor_name, model))
        if found is not None or list(rule.sources()) != list(present.sources()):
            read = [key_of(path, name) for path, name in sources_in(tie.options)]
            shown = " and ".join(map(quoted, read))
            return Reason(f"it reads {shown} there and another tensor here.")
    return None


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _another_layout(there: Layout, here: Layout) -> Reason:
    """How the axes differ, and what to do where the file could not know it."""
    fact = f"it was {_shown(there)} and is {_shown(here)} here."
    if there.shape != here.shape:
        return Reason(fact)
    return Reason(
        fact,
        "Build the model that was saved; if a file was tied in the shell, do it again with "
        "--groups or --transposed for this layer.",
    )


def _shown(layout: Layout) -> str:
    groups = f" in {layout.groups} groups" if layout.groups > 1 else ""
    return f"{shown_shape(layout.shape)}{groups}{', transposed' if layout.transposed else ''}"
