"""Why a tensor cannot be tied: reasons, looked for before anything is changed."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.laws.rule import Rule
from tiedparam.tie.offloaded import is_on_disk, why_offloaded
from tiedparam.tie.parameter_paths import Places
from tiedparam.tie.target import Target
from tiedparam.tie.wrapped import is_wrapper, why_wrapped
from tiedparam.util.errors import Reason, TieError, describe, quoted, some_of
from tiedparam.util.torch_private import (
    buffers_of,
    has_gradient_hooks,
    parameters_of,
    submodules_of,
)

Init = Literal["project", "rescale", "exact"]
"""What ``init=`` may be."""
REMOVE_THE_TIE = "Call remove_tie first."
"""What to do about a tensor that is tied already."""


def check_arguments(layer: object, tensor_name: object, init: object, root: object) -> None:
    """Raise for arguments that no layer and no rule could make right.

    Raises:
        TypeError: for one of a wrong type.
        TieError: for an unknown ``init``.
    """
    if not isinstance(layer, nn.Module):
        raise TypeError(
            f"a tie is registered on an nn.Module, not on {type(layer).__name__}. Pass the layer, "
            "and the name of its tensor as tensor_name="
        )
    if not isinstance(tensor_name, str):
        raise TypeError(f"tensor_name takes a string, not {type(tensor_name).__name__}")
    if root is not None and not isinstance(root, nn.Module):
        raise TypeError(f"root= takes the model that holds the layer, not {type(root).__name__}")
    check_init(init)


def check_init(init: object) -> None:
    """Raise unless ``init=`` is known.

    Raises:
        TieError: if it is not.
    """
    inits = get_args(Init)
    if init not in inits:
        known = ", ".join(map(repr, inits))
        raise TieError(f"init={init!r}", f"init={init!r} is unknown.", f"Choose one of {known}.")


def why_untieable(target: Target) -> Reason | None:
    """Why no rule can tie this tensor, or None.

    Other layers that hold its Parameter are looked for where the model is known.
    """
    layer, tensor_name, places = target.layer, target.tensor_name, target.places
    tie = target.tie()
    if tie is not None:
        return Reason(f"it is tied by '{tie.rule}' already.", REMOVE_THE_TIE)
    if parametrize.is_parametrized(layer, tensor_name):
        return Reason(
            "it has another parametrization.", "Remove that one, tie, and register it again."
        )
    weight = target.parameter
    wrappers = places.modules_that(is_wrapper) if places is not None else ()
    if weight is None:
        return why_wrapped(layer, [], "tie", wrappers) or why_no_parameter(target)
    if isinstance(weight, nn.UninitializedParameter):
        return Reason("the layer is lazy and has no shape yet.", "Run one forward pass first.")
    if weight.layout is not torch.strided or weight.is_quantized:
        return Reason("only dense, unquantized tensors can be tied.", "Convert the layer first.")
    if has_gradient_hooks(weight):
        return Reason("it carries gradient hooks, which would be lost.", "Remove them first.")
    on_disk = places.modules_that(is_on_disk) if places is not None else ()
    reason = why_wrapped(layer, [weight], "tie", wrappers) or why_offloaded(layer, on_disk)
    if reason is not None:
        return reason
    around = places or Places(layer)
    for other, name in around.other_holders(layer, tensor_name, weight):
        own = f"layer.{tensor_name} = nn.Parameter(layer.{tensor_name}.detach().clone())"
        holder = around.describe(other, name) if places is not None else describe(other, name)
        return Reason(
            f"it shares its Parameter with {holder}.",
            f"Give one of them a Parameter of its own ({own}), and tie it to the other by 'copy'.",
        )
    return None


def why_refused(target: Target, rule: Rule) -> Reason | None:
    """Why this kind of rule cannot go on the layer, or None; shapes aside."""
    layer = target.layer
    if not isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return None
    if layer.sparse:
        return Reason("its gradients are sparse.", "Build the embedding with sparse=False.")
    if layer.max_norm is not None:
        return Reason(
            "max_norm writes into single rows of the weight.", "Build it without max_norm."
        )
    if layer.padding_idx is not None and not rule.reads_layers:
        return Reason("padding_idx keeps one row at zero, which the law does not.", "Leave it out.")
    return None


def why_no_values(target: Target) -> Reason:
    """Why a layer has no tensor, or none with values, that a law could be compared with."""
    if target.tensor is None:
        return why_no_parameter(target)
    return Reason("it has no values to compare.", "Load or initialise the layer first.")


def why_no_parameter(target: Target) -> Reason:
    """What is there instead of a Parameter, and what to tie."""
    layer, tensor_name = target.layer, target.tensor_name
    if tensor_name in parameters_of(layer):
        return Reason(
            f"the layer was built without {tensor_name}.", "Build it with one, or drop the tie."
        )
    if tensor_name in buffers_of(layer):
        return Reason("it is a buffer, and only Parameters can be tied.")
    if isinstance(target.tensor, Tensor):
        return Reason(
            "it is computed by a hook, not a Parameter.",
            "Remove that first (weight_norm, prune).",
        )
    names = [name for name, parameter in parameters_of(layer).items() if parameter is not None]
    known = some_of([quoted(name) for name in names])
    if known:
        return Reason(f"the layer has no such tensor. Its Parameters are {known}.")
    if not submodules_of(layer):
        return Reason("the layer has no Parameters.", "Tie another one.")
    children = [f"'{name}'" for name in list(submodules_of(layer))[:5]]
    return Reason(
        "the layer has no Parameter of its own.",
        f"Pass one of its layers ({', '.join(children)}), as layer.get_submodule({children[0]}), "
        "or tie by names with tiedparam.tie_model.",
    )
