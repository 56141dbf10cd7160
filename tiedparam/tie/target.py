"""The tensor that a tie is wanted for, before there is a tie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from tiedparam.laws.layout import Layout
from tiedparam.tie.lookup import find_tie
from tiedparam.tie.parameter_paths import Places
from tiedparam.tie.record import Tie
from tiedparam.util.errors import describe
from tiedparam.util.torch_private import parameters_of


@dataclass(frozen=True)
class Target:
    """One tensor of one layer, in the model that holds it.

    Attributes:
        layer: the layer.
        tensor_name: which of its tensors.
        root: the model, if that is known.
    """

    layer: nn.Module
    tensor_name: str = "weight"
    root: nn.Module | None = None

    @classmethod
    def among(cls, places: Places, layer: nn.Module, tensor_name: str) -> Target:
        """A tensor in a model that was looked through already."""
        made = cls(layer, tensor_name, places.root)
        made.__dict__["places"] = places
        return made

    @cached_property
    def places(self) -> Places | None:
        """Where everything lies in the model, if that is known."""
        return Places(self.root) if self.root is not None else None

    @property
    def tensor(self) -> Any:
        """What the layer has under that name: a tensor, or what else there is, or None."""
        return getattr(self.layer, self.tensor_name, None)

    @property
    def parameter(self) -> nn.Parameter | None:
        """The Parameter, if it is one."""
        return parameters_of(self.layer).get(self.tensor_name)

    @property
    def layout(self) -> Layout:
        """From the tensor's axes to channels."""
        return Layout.of(self.layer, self.tensor_name, tuple(self.tensor.shape))

    def tie(self) -> Tie | None:
        """The tie that is there already."""
        return find_tie(self.layer, self.tensor_name)

    def describe(self) -> str:
        """The tensor, as messages name it: by its path, where the model is known."""
        if self.places is None:
            return describe(self.layer, self.tensor_name)
        return self.places.describe(self.layer, self.tensor_name)
