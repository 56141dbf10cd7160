"""Which tensors of a model a scan looks at, and why not at the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from tiedparam.laws.layout import Layout
from tiedparam.layer.checks import why_untieable
from tiedparam.model.random_tensor import Moments
from tiedparam.model.reasons import Skipped
from tiedparam.tie.lookup import get_tie, is_tied
from tiedparam.tie.parameter_paths import Places
from tiedparam.tie.target import Target
from tiedparam.util.errors import Reason, TieError, key_of
from tiedparam.util.torch_private import has_values, is_quantized, parameters_of


@dataclass
class ScannedTensor:
    """A Parameter that can be tied, and where it lies."""

    path: str
    layer: nn.Module
    name: str
    value: Tensor
    moments: Moments

    @property
    def target(self) -> Target:
        """The tensor, as a tie would be asked for."""
        return Target(self.layer, self.name)

    @property
    def layout(self) -> Layout:
        """From the tensor's axes to channels."""
        return Layout.of(self.layer, self.name, tuple(self.value.shape))


def tensors_of(model: nn.Module) -> tuple[list[ScannedTensor], list[Skipped]]:
    """Every Parameter once, in the model's order; and what no rule can be put on."""
    tensors, left_out = [], []
    places = Places(model)
    for path, layer in model.named_modules():
        if isinstance(layer, parametrize.ParametrizationList):
            continue  # looked at with its layer
        for name in _tensor_names(layer):
            parameter = parameters_of(layer).get(name)
            if is_tied(layer, name):
                why: Reason | None = Reason(f"it is tied by '{get_tie(layer, name)}' already.")
            elif parameter is not None and (
                others := list(places.other_holders(layer, name, parameter))
            ):
                why = _why_shared(places, [(layer, name), *others])
            else:
                why = why_untieable(Target(layer, name)) or _why_no_values(
                    parameter, key_of(path, name)
                )
            if why is not None:
                left_out.append(Skipped(path, name, why))
                continue
            assert parameter is not None
            value = parameter.detach()
            tensors.append(ScannedTensor(path, layer, name, value, Moments.of(value)))
        if is_quantized(layer):
            left_out.append(Skipped(path, "weight", Reason("the layer is quantized.")))
    return tensors, left_out


def _why_shared(places: Places, holders: list[tuple[nn.Module, str]]) -> Reason:
    """Why the first of the holders of one Parameter cannot be tied."""
    padded = [
        places.describe(layer, name)
        for layer, name in holders
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.padding_idx is not None
    ]
    # said here, or whoever gives the embedding its own Parameter meets the next refusal
    circle = f" No other law can go on {padded[0]}, because of its padding_idx." if padded else ""
    other = places.describe(*holders[1])
    return Reason(
        f"it shares its Parameter with {other}, and a rule would take it away.",
        f"Give one of them a Parameter of its own, and tie it to the other by 'copy'.{circle}",
    )


def _tensor_names(layer: nn.Module) -> Iterator[str]:
    yield from (name for name, parameter in parameters_of(layer).items() if parameter is not None)
    if parametrize.is_parametrized(layer):
        yield from layer.parametrizations  # type: ignore[misc]


def _why_no_values(parameter: nn.Parameter | None, key: str) -> Reason | None:
    if parameter is None:
        return Reason("it is not a Parameter.")
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return Reason(f"no law has a meaning for {parameter.dtype}.")
    if parameter.dtype.itemsize < 2:  # float8: torch computes nothing in it
        return Reason(
            f"nothing can be computed in {parameter.dtype}.", "Convert the layer first (.float())."
        )
    if parameter.numel() == 0:
        return Reason("it is empty.")
    if not has_values(parameter):
        raise TieError(
            f"'{key}'",
            f"the model has no values to look at: '{key}' is on the meta device.",
            "Load the model first (model.to_empty, then load_state_dict).",
        )
    return None
