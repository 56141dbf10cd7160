"""Tying and untying one tensor of one layer.

`register_tie` reads top to bottom: find the rule, check everything, compute the free values,
plan the optimizers' moves; only then touch the layer, and put everything back if torch
refuses midway.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from tiedparam.compute import forward as _structured
from tiedparam.compute import frozen as _cache
from tiedparam.laws.layout import declare_shape
from tiedparam.laws.linked import Linked
from tiedparam.laws.registry import find_rule
from tiedparam.laws.rule import Rule, relative_distance
from tiedparam.layer import host as _host
from tiedparam.layer.concerns import Concern, check_max_residual, concern_of, refuse_distant
from tiedparam.state import optimizer_guard as _optimizer_guard
from tiedparam.state import optimizer_moves as _optimizer
from tiedparam.state.dictionaries import watch_source
from tiedparam.tie.lookup import free_values, get_tie, is_stacked, is_tied, origins
from tiedparam.tie.marks import carry_attributes
from tiedparam.tie.offloaded import is_on_disk, refuse_offloaded
from tiedparam.tie.parameter_paths import Places
from tiedparam.tie.record import adopt
from tiedparam.tie.rollback import rolled_back_on_error
from tiedparam.tie.wrapped import is_wrapper, refuse_wrapped
from tiedparam.tie.write_guard import unguard
from tiedparam.util.errors import TieError, describe, quoted, some_of, warn
from tiedparam.util.sharded import is_sharded
from tiedparam.util.torch_private import (
    effective,
    has_values,
    never_compiled,
    parametrization_list,
)

Layer = TypeVar("Layer", bound=nn.Module)

INITS = ("project", "rescale", "exact")


@never_compiled
def register_tie(
    layer: Layer,
    rule: str | type[Rule] | Rule,
    tensor_name: str = "weight",
    *,
    init: str = "project",
    max_residual: float | None = None,
    cache: bool = False,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    root: nn.Module | None = None,
    **options: Any,
) -> Layer:
    """Tie a tensor of a stock layer: only its free values are stored from now on.

    A copy whose source was resized, exchanged or lost since is tied anew by another copy, in the
    size that its source has now.

    Args:
        layer: the layer; it stays of its class, and ``repr`` shows the tie.
        rule: a registered name (`available_rules`), a `Rule` subclass, or a `Rule`.
        tensor_name: which Parameter of the layer.
        init: how the free values come from the present weight: ``"project"``, the nearest
            lawful weight (for trained weights); ``"rescale"``, the projection times the
            square root of each orbit's multiplicity (for fresh i.i.d. ones, whose standard
            deviation it keeps); ``"exact"``, raise unless the weight is lawful already.
        max_residual: how far the weight may be from the law (see `residual`); above it this is an
            error. A number that is given also says that what lies below is meant, without a
            warning.
        cache: keep the computed weight between calls in eval mode without gradients. The
            free values are compared, bit for bit, before it is used again, which takes a
            fraction of computing it (on a GPU it waits for the device). Laws that compute
            their weight for next to nothing ignore it: see `Rule.gains_from_cache`, and
            `frozen` for whole models.
        optimizer: the optimizer or optimizers that hold the dense parameter; they are
            moved to the free values, state and coupled decay included. They must be of
            ``torch.optim``, or known by `register_optimizer`. A stepping optimizer that was
            left out raises.
        root: the model that holds the layer: names it in messages, finds a ``source=`` given
            as a path, refuses layers that share the Parameter with another one, and keeps a
            copy from being separated from its source.
        **options: the rule's own options.

    Returns:
        The layer itself.

    Raises:
        TieError: if anything does not fit. Nothing was changed then.
        TypeError: for arguments of a wrong type and options that the rule does not have.

    Warns:
        TieWarning: if the tie frees nothing, or if ``"project"`` keeps less than a fifth of the
            norm of a weight that was no nearer to the law than a random one. Tensors of fewer
            than 128 entries and copies, which replace the weight by definition, are left out.
        TieWarning: if decay that the optimizer adds to the gradient becomes weaker, with by how
            much and the way out.
    """
    _check_arguments(layer, tensor_name, init, root)
    check_max_residual(max_residual)
    made = make_rule(rule, options)
    places = Places(root) if root is not None else None
    return tie_one(
        layer,
        made,
        tensor_name,
        places,
        init=init,
        max_residual=max_residual,
        cache=cache,
        optimizer=optimizer,
        concerned=lambda concern: warn(f"{concern.fact()} {concern.advice()}"),
    )


@torch.inference_mode(False)  # Parameters made in inference mode could never be trained
def tie_one(
    layer: Layer,
    made: Rule,
    tensor_name: str,
    places: Places | None,
    *,
    init: str = "project",
    max_residual: float | None = None,
    cache: bool = False,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    concerned: Callable[[Concern], None] | None = None,
) -> Layer:
    """`register_tie` with a rule that is made, and a root that is looked through.

    ``concerned`` is told of a tie that is hardly meant, while all can still be put back.

    Raises:
        TieError: if anything does not fit. Nothing was changed then.
    """
    if isinstance(made, Linked) and _is_broken_copy(layer, tensor_name):
        return _tie_again(layer, made, tensor_name, places, init=init, cache=cache)
    root = places.root if places is not None else None
    where = _describe(layer, tensor_name, places)

    def refuse(reason: str) -> TieError:
        return TieError(f"cannot tie {where} by '{made}': {reason}")

    _cache.refuse_if_frozen(layer, "register_tie")
    weight = _weight_to_tie(layer, tensor_name, places, refuse)
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        _refuse_embedding_options(layer, made, refuse)
    optimizers = _optimizer.as_optimizers(optimizer)

    noted = rolled_back_on_error(layer.modules(), optimizers)
    with _long_chains_told(refuse), _unbound_on_error(made), noted:
        reason = made.bind(layer, tensor_name, root)
        if reason is not None:
            raise refuse(reason)
        if isinstance(made, Linked) and places is not None:
            made.locate(layer, tensor_name, places)
        if any(is_sharded(effective(*source)) for source in made.sources()):
            raise refuse("its source is sharded already. Tie before fully_shard.")
        free, residual = _initial_free_values(made, weight, init, max_residual, refuse)
        reason = made.why_not_kept()  # now that it has done all that it does
        if reason is not None:
            raise refuse(reason)
        _host.remember_order(layer)
        parametrize.register_parametrization(layer, tensor_name, made)
        _host.adopt(layer)
        values = adopt(parametrization_list(layer, tensor_name))
        values.computing = _structured.computing_of(layer, tensor_name, made)
        values.kept = _cache.memory_for(made, cache)
        values.residual_at_tying = residual
        stored = free_values(layer, tensor_name)
        with torch.no_grad():
            for parameter, value in zip(stored, free, strict=True):
                parameter.copy_(value)
                carry_attributes(weight, parameter)
        change = _optimizer.tying(made, weight, stored, tensor_name)
        try:
            moves = _optimizer.plan_moves(optimizers, change)
        except ValueError as error:
            raise refuse(f"{error}.") from error
        _optimizer.warn_of_losses(moves, f"tying {where} by '{made}'")
        _optimizer.move_gradient(change)
        for move in moves:
            move.apply()
        if isinstance(made, Linked):
            watch_source(made)
            _optimizer.share_gradient(weight, made, list(origins(layer, tensor_name)))
        unasked = init == "project" and max_residual is None
        concern = concern_of(
            where, tensor_name, made, weight.detach(), residual if unasked else None
        )
        if concern is not None and concerned is not None:
            concerned(concern)
    _optimizer_guard.retire(
        [weight],
        f"the dense parameter of {where}",
        "Build the optimizer anew, now that the tie is made; to keep its state, pass optimizer= to "
        "register_tie when you tie. If another layer shares that parameter, register_tie finds it "
        "with root=model.",
    )
    _optimizer_guard.watch_free_values(stored, where)
    return layer


def _is_broken_copy(layer: nn.Module, tensor_name: str) -> bool:
    """Whether the tensor is tied to a source that was resized, exchanged or lost since."""
    if not is_tied(layer, tensor_name) or is_stacked(layer, tensor_name):
        return False
    if not isinstance(get_tie(layer, tensor_name), Linked):
        return False
    try:
        with torch.no_grad():
            effective(layer, tensor_name)
    except TieError:
        return True
    return False


def _tie_again(
    layer: Layer, made: Linked, tensor_name: str, places: Places | None, *, init: str, cache: bool
) -> Layer:
    """Replace a broken copy: one call, from whatever has become of its source (S30, S44)."""
    _cache.refuse_if_frozen(layer, "register_tie")
    present = cast(Linked, get_tie(layer, tensor_name))
    with _unbound_on_error(made), rolled_back_on_error(layer.modules(), []):
        value = made.value_for(tensor_name, places.root if places is not None else None)
        shape = present.bound_layout.shape
        if value is None or value.dim() != len(shape):
            value = torch.empty(shape, device="cpu")  # `bind` says what does not fit
        _host.release(layer, tensor_name, _host.plain_parameter(value, requires_grad=True))
        declare_shape(layer, tensor_name, tuple(value.shape))
        tie_one(layer, made, tensor_name, places, init=init, cache=cache, optimizer=None)
    if present.watch is not None:
        present.watch.leave()
    return layer


@never_compiled
@torch.inference_mode(False)
def remove_tie(
    layer: Layer,
    tensor_name: str = "weight",
    *,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
) -> Layer:
    """Make a tied tensor a plain, contiguous Parameter again, with the same values.

    Args:
        layer: the tied layer; with its last tie gone it has its stock class again.
        tensor_name: which tensor.
        optimizer: the optimizer or optimizers that hold the free values; they are moved to
            the dense parameter, state included. The parameter of an untied copy joins the
            group of its source.

    Returns:
        The layer itself.

    Raises:
        TieError: if the tensor is not tied, if another parametrization is stacked on the
            tie, or if an optimizer cannot follow. Nothing was changed then.

    Warns:
        TieWarning: if decay that the optimizer adds to the gradient becomes stronger.
        TieWarning: if the source of a copy was resized: the tensor then has that size.
    """
    where = describe(layer, tensor_name)
    if not is_tied(layer, tensor_name):
        raise TieError(f"{where} is not tied, so there is no tie to remove.")
    rule = get_tie(layer, tensor_name)
    _cache.refuse_if_frozen(layer, "remove_tie")
    if is_stacked(layer, tensor_name):
        raise TieError(
            f"cannot untie {where}: another parametrization is stacked on '{rule}'. Remove that "
            f"one first (del layer.parametrizations.{tensor_name}[1:]), or use torch's "
            "remove_parametrizations to fix the combined weight."
        )
    optimizers = _optimizer.as_optimizers(optimizer)
    stored = free_values(layer, tensor_name)
    if any(_has_hooks(parameter) for parameter in stored):
        raise TieError(
            f"cannot untie {where}: its free values carry gradient hooks, which would be lost. "
            "Remove them first."
        )
    with rule.untying() if isinstance(rule, Linked) else nullcontext():
        origin = list(origins(layer, tensor_name))
        refuse_wrapped(layer, origin, where, "untie")
        refuse_offloaded(layer, where, "untie")
        with torch.enable_grad():
            weight = effective(layer, tensor_name)
        dense = _host.plain_parameter(weight, weight.requires_grad)
        try:
            if stored:
                change = _optimizer.untying(rule, stored, dense, tensor_name)
                moves = _optimizer.plan_moves(optimizers, change)
            else:
                moves = _optimizer.plan_addition(optimizers, dense, origin)
        except ValueError as error:
            raise TieError(f"cannot untie {where}: {error}.") from error
        _optimizer.warn_of_losses(moves, f"untying {where}")
        if stored:
            _optimizer.move_gradient(change)

    if dense.shape != rule.bound_layout.shape:
        # here, where nothing has changed: warnings may be errors
        warn(
            f"{where} was tied as {rule.bound_layout.shape} and its source was resized since: it "
            f"is {tuple(dense.shape)} now. Resize what else the layer has, such as its bias."
        )
        declare_shape(layer, tensor_name, tuple(dense.shape))
    if isinstance(rule, Linked) and rule.watch is not None:
        rule.watch.leave()
    for parameter in stored:
        carry_attributes(parameter, dense)
    _host.release(layer, tensor_name, dense)
    for move in moves:
        move.apply()
    _optimizer_guard.retire(
        stored,
        f"a free value of {where}",
        "Build the optimizer anew; to keep its state, pass optimizer= to remove_tie when you "
        "untie.",
    )
    return layer


def residual(
    layer: nn.Module,
    rule: str | type[Rule] | Rule,
    tensor_name: str = "weight",
    *,
    root: nn.Module | None = None,
    **options: Any,
) -> float:
    """How far a tensor is from a law: ``‖W − project(W)‖ / ‖W‖``. Look before you tie.

    Args:
        layer: the layer, tied or not; it is not changed.
        rule: as in `register_tie`.
        tensor_name: which tensor.
        root: the model, to find a ``source=`` given as a path.
        **options: the rule's own options.

    Returns:
        0 for a lawful (or zero) weight. For a rule with free values at most 1, and about
        ``sqrt(1 − free/entries)`` for i.i.d. entries; for a copy unbounded, and about √2 for
        unrelated weights of equal scale.

    Raises:
        TieError: if the tensor cannot carry the rule.
    """
    _check_arguments(layer, tensor_name, "project", root)
    made = make_rule(rule, options)
    where = describe(layer, tensor_name, root)
    weight = getattr(layer, tensor_name, None)
    if (
        not isinstance(weight, Tensor)
        or isinstance(weight, nn.UninitializedParameter)
        or not has_values(weight)
    ):
        if weight is None:
            raise TieError(
                f"cannot compare {where} with '{made}': {_why_no_parameter(layer, tensor_name)}"
            )
        raise TieError(
            f"{where} has no values to compare with '{made}'. Load or initialise the layer first."
        )
    looked_through = copy(made)  # an instance that was given can still tie
    reason = looked_through.bind(layer, tensor_name, root)
    if reason is not None:
        raise TieError(f"cannot compare {where} with '{made}': {reason}")
    return looked_through.residual(unguard(weight).detach())


def _check_arguments(layer: object, tensor_name: object, init: object, root: object) -> None:
    if not isinstance(layer, nn.Module):
        raise TypeError(
            f"a tie is registered on an nn.Module, not on {type(layer).__name__}. Pass the layer, "
            "and the name of its tensor as tensor_name="
        )
    if not isinstance(tensor_name, str):
        raise TypeError(f"tensor_name takes a string, not {type(tensor_name).__name__}")
    if root is not None and not isinstance(root, nn.Module):
        raise TypeError(f"root= takes the model that holds the layer, not {type(root).__name__}")
    if init not in INITS:
        raise TieError(f"init={init!r} is unknown. Choose one of {', '.join(map(repr, INITS))}.")


def make_rule(rule: str | type[Rule] | Rule, options: dict[str, Any]) -> Rule:
    """A fresh rule from a name or a class, or the given one."""
    if isinstance(rule, Rule):
        if options:
            raise TypeError(
                f"options {sorted(options)} go with a rule's name or class, not with an instance"
            )
        if rule.layout is not None:
            raise TieError(
                f"this '{rule}' is bound to a tensor already. Make a new instance for every tensor."
            )
        return rule
    if isinstance(rule, str):
        rule = find_rule(rule)
    if not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise TypeError(f"rule takes a name, a Rule subclass or a Rule, not {rule!r}")
    name = rule.name or rule.__name__
    signature = inspect.signature(rule)
    try:
        signature.bind(**options)
    except TypeError as error:
        known = ", ".join(f"{option}=" for option in signature.parameters) or "none"
        raise TypeError(f"rule '{name}': {error}. Its options are: {known}.") from error
    return rule(**options)


def _weight_to_tie(
    layer: nn.Module,
    tensor_name: str,
    places: Places | None,
    refuse: Callable[[str], TieError],
) -> nn.Parameter:
    """The Parameter to tie, once nothing speaks against touching it."""
    if is_tied(layer, tensor_name):
        present = get_tie(layer, tensor_name)
        raise refuse(f"it is tied by '{present}' already. Call remove_tie first.")
    if parametrize.is_parametrized(layer, tensor_name):
        raise refuse("it has another parametrization. Remove that one, tie, and register it again.")
    weight = layer._parameters.get(tensor_name)
    wrappers = places.modules_that(is_wrapper) if places is not None else ()
    on_disk = places.modules_that(is_on_disk) if places is not None else ()
    where = _describe(layer, tensor_name, places)
    if weight is None:
        refuse_wrapped(layer, [], where, "tie", wrappers)
        raise refuse(_why_no_parameter(layer, tensor_name))
    if isinstance(weight, nn.UninitializedParameter):
        raise refuse("the layer is lazy and has no shape yet. Run one forward pass first.")
    if weight.layout is not torch.strided or weight.is_quantized:
        raise refuse("only dense, unquantized tensors can be tied. Convert the layer first.")
    if _has_hooks(weight):
        raise refuse("it carries gradient hooks, which would be lost. Remove them first.")
    refuse_wrapped(layer, [weight], where, "tie", wrappers)
    refuse_offloaded(layer, where, "tie", on_disk)
    for other, name in (places or Places(layer)).other_holders(layer, tensor_name, weight):
        own = f"layer.{tensor_name} = nn.Parameter(layer.{tensor_name}.detach().clone())"
        raise refuse(
            f"it shares its Parameter with {_describe(other, name, places)}. Give one of them a "
            f"Parameter of its own ({own}), and tie it to the other by 'copy'."
        )
    return weight


def _has_hooks(parameter: nn.Parameter) -> bool:
    return bool(
        parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    )


def why_untieable(layer: nn.Module, tensor_name: str) -> str | None:
    """Why no rule can tie this tensor, or None. Other layers are not looked at."""
    try:
        _weight_to_tie(layer, tensor_name, None, TieError)
    except TieError as error:
        return str(error)
    return None


def why_refused(layer: nn.Module, rule: Rule) -> str | None:
    """Why this kind of rule cannot go on the layer, or None; shapes aside."""
    try:
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
            _refuse_embedding_options(layer, rule, TieError)
    except TieError as error:
        return str(error)
    return None


def _refuse_embedding_options(
    layer: nn.Embedding | nn.EmbeddingBag, rule: Rule, refuse: Callable[[str], TieError]
) -> None:
    if layer.sparse:
        raise refuse("its gradients are sparse. Build the embedding with sparse=False.")
    if layer.max_norm is not None:
        raise refuse("max_norm writes into single rows of the weight. Build it without max_norm.")
    if layer.padding_idx is not None and not isinstance(rule, Linked):
        raise refuse("padding_idx keeps one row at zero, which the law does not. Leave it out.")


def _why_no_parameter(layer: nn.Module, tensor_name: str) -> str:
    if tensor_name in layer._parameters:
        return f"the layer was built without {tensor_name}. Build it with one, or drop the tie."
    if tensor_name in layer._buffers:
        return "it is a buffer, and only Parameters can be tied."
    if isinstance(getattr(layer, tensor_name, None), Tensor):
        return "it is computed by a hook, not a Parameter. Remove that first (weight_norm, prune)."
    names = [name for name, parameter in layer._parameters.items() if parameter is not None]
    known = some_of([quoted(name) for name in names])
    if not known:
        if not layer._modules:
            return "the layer has no Parameters. Tie another one."
        children = [f"'{name}'" for name in list(layer._modules)[:5]]
        return (
            f"the layer has no Parameter of its own. Pass one of its layers ({', '.join(children)})"
            f", as layer.get_submodule({children[0]}), or tie by names with tiedparam.tie_model."
        )
    return f"the layer has no such tensor. Its Parameters are {known}."


def _describe(layer: nn.Module, tensor_name: str, places: Places | None) -> str:
    return (
        places.describe(layer, tensor_name) if places is not None else describe(layer, tensor_name)
    )


def _initial_free_values(
    rule: Rule,
    weight: nn.Parameter,
    init: str,
    max_residual: float | None,
    refuse: Callable[[str], TieError],
) -> tuple[list[Tensor], float | None]:
    """Free values for ``weight`` by ``init``, and its residual, once rule and weight fit."""
    with torch.no_grad():
        if has_values(weight) and not has_values(torch.empty(0, device=weight.device)):
            raise refuse("FakeTensorMode computes no values. Tie the layer outside of it.")
        dense = weight.detach()
        try:
            # the shape first: what follows from a wrong forward would be hard to read
            zeros = [dense.new_zeros(shape) for shape in rule.free_shapes()]
            _refuse_misshapen(rule(*zeros), dense, refuse)
            free = list(rule.right_inverse(dense))
            lawful = rule(*free)
        except (TieError, RecursionError):
            raise
        except Exception as error:
            raise refuse(f"the rule raised {type(error).__name__}: {error}") from error
        if any(value.dtype != dense.dtype for value in free):
            raise refuse(f"its free values are not {dense.dtype}. Correct the rule.")
        if any(value.numel() == 0 for value in free):
            raise refuse("one of its free values is empty. Leave it out of free_shapes.")
        _refuse_misshapen(lawful, dense, refuse)
        residual = None
        if has_values(dense):
            residual = relative_distance(dense, lawful)
        elif init == "exact":
            raise refuse("its weight has no values yet to compare. Use init='project', or load it.")
        if max_residual is not None:
            refuse_distant(residual, max_residual, refuse)
        if init == "exact" and not torch.equal(lawful, dense):
            raise refuse(
                f"the weight breaks the law {rule.law} (residual {residual:.2e}). "
                "Use init='project' to take the nearest lawful weight."
            )
        if init == "rescale":
            if isinstance(rule, Linked):
                raise refuse("a copy has no values of its own to rescale. Use init='project'.")
            counts = rule.multiplicities()
            free = [
                value * count.sqrt().to(value.device, value.dtype)
                for value, count in zip(free, counts, strict=True)
            ]
        return free, residual


def _refuse_misshapen(value: object, dense: Tensor, refuse: Callable[[str], TieError]) -> None:
    if not isinstance(value, Tensor) or value.shape != dense.shape:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise refuse(
            f"its forward returns {shape}, and the tensor is {tuple(dense.shape)}. "
            "Correct the rule."
        )
    if value.dtype != dense.dtype:
        raise refuse(f"its forward returns {value.dtype}, not {dense.dtype}. Correct the rule.")


@contextmanager
def _long_chains_told(refuse: Callable[[str], TieError]) -> Iterator[None]:
    """Say what it means if Python's stack does not reach to the end of a chain of copies."""
    try:
        yield
    except RecursionError as error:
        raise refuse(
            "its copies read each other in too long a chain. Tie each to the first."
        ) from error


@contextmanager
def _unbound_on_error(rule: Rule) -> Iterator[None]:
    """A rule that did not fit here may fit elsewhere: give it back as it was."""
    found = dict(rule.__dict__)
    try:
        yield
    except BaseException:
        rule.__dict__.clear()
        rule.__dict__.update(found)
        raise
