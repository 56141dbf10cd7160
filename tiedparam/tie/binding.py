"""Fitting a rule to a tensor of a layer, and finding the layers that it is to read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.laws.coded import Coded
from tiedparam.laws.fitted import fitted_to, why_not_finite
from tiedparam.laws.linked import Source
from tiedparam.laws.rule import Rule
from tiedparam.laws.sharing import Sharing
from tiedparam.tie.changed_source import is_real_or_complex
from tiedparam.tie.computed_source import why_computed
from tiedparam.tie.sharing import shared_place
from tiedparam.tie.target import Target
from tiedparam.tie.write_guard import place_of
from tiedparam.util.errors import Reason, describe, describe_layer
from tiedparam.util.parametrized import parametrization_list
from tiedparam.util.torch_private import parameters_of, version_of


def bind(rule: Rule, target: Target) -> Reason | None:
    """Fit a rule to one tensor, or return why it does not fit. The layer is not changed.

    Sources that are given by path are found where the model is known.

    Raises:
        TypeError: if a source is a tensor whose layer is not known.
    """
    weight = target.tensor
    if rule.reads_layers:
        reason = find_sources(rule, target) or _why_unreadable(rule, target)
        if reason is not None:
            return reason
    if isinstance(rule, Sharing) and rule.reads_layers:
        rule.join(rule.read()[0])
    if isinstance(rule, Coded):
        reason = rule.bind_tensor(weight, target.layout)
    else:
        reason = rule.bind(target.layout, weight.dtype)
    if reason is None and isinstance(rule, Sharing) and rule.reads_layers:
        reason = rule.why_not_joined(rule.read()[0])
    if reason is None and rule.reads_layers and rule.free_shapes():
        reason = _why_other_kind(rule, weight)
    if reason is None and rule.reads_layers:
        reason = _why_misfit(rule, weight)
    if reason is None:
        rule.bind_device(weight.device)
    return reason


def find_sources(rule: Any, target: Target) -> Reason | None:
    """Look up what a rule's ``source=`` means, or return why nothing fits it.

    The sources' tensors have by default the name of the tensor that is to be tied.

    Raises:
        TypeError: if a source is a tensor whose layer is not known.
    """
    found = []
    for source, name in rule.given:
        each = _find(source, name, target.root)
        if isinstance(each, Reason):
            return each
        found.append((each[0], each[1] or target.tensor_name))
    if isinstance(rule, Sharing):
        place = shared_place(rule, *found[0])
        if isinstance(place, Reason):
            return place
        found = [place]
    rule.read_from(found)
    return None


def value_of(rule: Rule, target: Target) -> Tensor | None:
    """What an unbound rule would give, by which a tie of unknown size can be renewed.

    None if it cannot be computed, or takes values of its own.
    """
    if find_sources(rule, target) is not None:
        return None
    try:
        if rule.free_shapes():  # many need the layout
            return None
        with torch.no_grad():
            value = rule.forward(*(tensor.detach().clone() for tensor in rule.read()))
    except Exception:
        return None  # `bind` says why
    return value if isinstance(value, Tensor) else None


# What source= may be --------------------------------------------------------------------------


def _find(
    source: Source, name: str | None, root: nn.Module | None
) -> tuple[nn.Module, str | None] | Reason:
    """The layer to read and, if it is given, the tensor's name; or why there is none."""
    if isinstance(source, nn.Module):
        return source, name
    found = _by_path(source, root) if isinstance(source, str) else _holder(source, root)
    if isinstance(found, Reason):
        return found
    layer, tensor_name = found
    if tensor_name is not None and name not in (None, tensor_name):
        return Reason(
            f"source= means the tensor '{tensor_name}', and source_name= says '{name}'.",
            "Leave one of them out.",
        )
    return layer, tensor_name or name


def _by_path(path: str, root: nn.Module | None) -> tuple[nn.Module, str | None] | Reason:
    if root is None:
        return Reason(
            f"the source '{path}' is a path, and the model is unknown.", "Pass root=model."
        )
    try:
        return root.get_submodule(path), None
    except AttributeError:
        layer_path, _, tensor_name = path.rpartition(".")
    try:
        layer = root.get_submodule(layer_path)
    except AttributeError:
        layer = None
    if layer is None or not isinstance(getattr(layer, tensor_name, None), Tensor):
        return Reason(f"the model has no layer '{path}'.", "Correct source=.")
    return layer, tensor_name


def _holder(tensor: Tensor, root: nn.Module | None) -> tuple[nn.Module, str] | Reason:
    """The layer that a tensor was taken from. A Parameter does not know; a tied weight does."""
    place = place_of(tensor)
    if place is not None:
        return place
    call = "source=layer, source_name='weight'"
    if not isinstance(tensor, nn.Parameter):
        raise TypeError(
            "source= was given a tensor that no layer holds. Pass the layer and the tensor's name "
            f"({call}), and what is made of it as fn=, such as fn=torch.t."
        )
    if root is None:
        raise TypeError(
            "source= was given a Parameter, which does not know its layer. Pass the layer "
            f"({call}), or root=model to have it found."
        )
    for layer in root.modules():
        if not isinstance(layer, nn.utils.parametrize.ParametrizationList):
            for name, parameter in parameters_of(layer).items():
                if parameter is tensor:
                    return layer, name
    return Reason(
        "source= was given a Parameter that no layer of the model holds.",
        f"Pass a layer ({call}).",
    )


# Whether a source can be read, and what comes of it -------------------------------------------


def _why_unreadable(rule: Rule, target: Target) -> Reason | None:
    for source, name in rule.sources():
        computed = why_computed(source, name)
        if computed is not None:
            return computed
        present = getattr(source, name, None)
        if not isinstance(present, Tensor):
            return Reason(
                f"the source {describe_layer(source)} has no tensor '{name}'.",
                "Name one with source_name=.",
            )
        if isinstance(present, nn.UninitializedParameter):
            return Reason("the source is lazy and has no shape yet.", "Run one forward pass first.")
        if _reaches(source, name, target.layer, target.tensor_name):
            return Reason(
                f"the source {describe(source, name)} depends on this tensor: the ties would form "
                "a cycle.",
                "Tie both layers to a third, or only one to the other.",
            )
    return None


def _reaches(layer: nn.Module, name: str, goal: nn.Module, goal_name: str) -> bool:
    """Whether the tensor ``name`` of ``layer`` is, or is computed from, the goal tensor."""
    if layer is goal and name == goal_name:
        return True
    if not parametrize.is_parametrized(layer, name):
        return False
    return any(
        _reaches(source, source_name, goal, goal_name)
        for rule in parametrization_list(layer, name)
        if isinstance(rule, Rule)
        for source, source_name in rule.sources()
    )


def _why_other_kind(rule: Rule, weight: Tensor) -> Reason | None:
    """Why a source cannot be computed with beside values that are like the weight, or None."""
    for source in filter(is_real_or_complex, rule.read()):
        if source.dtype != weight.dtype:
            return Reason(f"the source is {source.dtype}, and the tensor {weight.dtype}.", _CONVERT)
        if source.device != weight.device:
            return Reason(
                f"the source is on {source.device}, and the tensor on {weight.device}.", _MOVE
            )
    return None


_CONVERT = "Convert one of the layers first."
_MOVE = "Move both to one device first."


def _why_misfit(rule: Any, weight: Tensor) -> Reason | None:
    """Why what the law computes from its sources cannot be the layer's weight, or None."""
    function = rule.functions[0] if rule.functions else "its forward"
    correct = f"Correct {function}=." if rule.functions else "Correct the rule."
    with torch.no_grad():
        present = rule.read()
        probes = [tensor.detach().clone() for tensor in present]
    shapes = " and ".join(str(tuple(tensor.shape)) for tensor in present)
    goal = weight.detach()
    unwritten = version_of(goal)
    try:
        with torch.no_grad():
            if rule.free_shapes():
                goal = goal.clone()
                unwritten = version_of(goal)
            if why_not_finite(rule, goal, tuple(probes)) is None:
                free = fitted_to(rule, goal, tuple(probes))
            else:  # whoever needs the solution tells; a file may bring other numbers
                free = tuple(goal.new_zeros(shape) for shape in rule.free_shapes())
            result = rule.forward(*probes, *free)
    except RecursionError:
        raise
    except Exception as error:
        return Reason(
            f"{function} raised {type(error).__name__} on the source's shape {shapes}: {error}.",
            correct,
        )
    if any(version_of(probe) for probe in probes):
        return Reason(
            f"{function} changes the source's tensor in place.", "Let it return a new tensor."
        )
    if version_of(goal) != unwritten:
        return Reason("its fit changes the weight in place.", "Let it compute new tensors.")
    if not isinstance(result, Tensor):
        return Reason(f"{function} must return a tensor, not {type(result).__name__}.", correct)
    if result.shape != weight.shape:
        return Reason(
            f"the source {shapes} gives {tuple(result.shape)}, and the tensor is "
            f"{tuple(weight.shape)}.",
            f"Pass {function}= to '{rule.name}' to make the shapes fit: a transpose, crop or tile."
            if rule.functions
            else "Use 'copy' with an fn= whose result has this shape, or correct the rule.",
        )
    if result.dtype != weight.dtype:
        return Reason(
            f"the source gives {result.dtype}, and the tensor is {weight.dtype}.",
            _CONVERT,
        )
    if weight.device.type != "meta" and result.device != weight.device:
        return Reason(
            f"the source is on {result.device}, and the tensor on {weight.device}.",
            _MOVE,
        )
    return None
