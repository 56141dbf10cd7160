"""What ``source=`` of a copy may be, and how the layer that it reads is found and named."""

from __future__ import annotations

from torch import Tensor, nn

from tiedparam.tie.write_guard import place_of
from tiedparam.util.errors import describe_layer

Source = nn.Module | str | Tensor
"""A layer; the path of one, or of one of its tensors, in the model; or such a tensor itself."""

_LONGEST = 100


def find_source(
    source: Source, name: str | None, root: nn.Module | None
) -> tuple[nn.Module, str | None] | str:
    """The layer that is meant and, where it is said, which of its tensors; or why there is none.

    Args:
        source: what the user gave.
        name: the ``source_name`` that the user gave.
        root: the model, if it is known.

    Raises:
        TypeError: if it is a tensor of which nobody knows the layer.
    """
    if isinstance(source, nn.Module):
        return source, name
    found = _by_path(source, root) if isinstance(source, str) else _holder(source, root)
    if isinstance(found, str):
        return found
    layer, tensor_name = found
    if tensor_name is not None and name not in (None, tensor_name):
        return (
            f"source= means the tensor '{tensor_name}', and source_name= says '{name}'. "
            "Leave one of them out."
        )
    return layer, tensor_name or name


def _by_path(path: str, root: nn.Module | None) -> tuple[nn.Module, str | None] | str:
    if root is None:
        return f"the source '{path}' is a path, and the model is unknown. Pass root=model."
    try:
        return root.get_submodule(path), None
    except AttributeError:
        layer_path, _, tensor_name = path.rpartition(".")
    try:
        layer = root.get_submodule(layer_path)
    except AttributeError:
        layer = None
    if layer is None or not isinstance(getattr(layer, tensor_name, None), Tensor):
        return f"the model has no layer '{path}'. Correct source=."
    return layer, tensor_name


def _holder(tensor: Tensor, root: nn.Module | None) -> tuple[nn.Module, str] | str:
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
            for name, parameter in layer._parameters.items():
                if parameter is tensor:
                    return layer, name
    return f"source= was given a Parameter that no layer of the model holds. Pass a layer ({call})."


def shown(source: Source, name: str, meeting: nn.Module | None, path: str) -> str:
    """The source in a few words, for ``print(model)``.

    Args:
        source: the layer that is read.
        name: the tensor of it.
        meeting: the module that holds both ends of the copy, if it is known.
        path: where the source lies in there.
    """
    if not isinstance(source, nn.Module):
        text = f"source {source!r}" if isinstance(source, str) else "a source that is not found yet"
    elif meeting is None:
        text = f"{name} of {describe_layer(source)}"
    else:
        within = type(meeting).__name__.removeprefix("FSDP").removeprefix("Tied")
        text = f"{path}.{name}".removeprefix(".") + f" in this {within}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
