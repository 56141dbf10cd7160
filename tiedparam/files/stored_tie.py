"""What a file says of one tied tensor: names, options and shapes, which make its rule again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf, isfinite, prod
from typing import Any

from torch import Tensor

from tiedparam.files.law_options import functions_in, made, same_law, same_weights, written
from tiedparam.formats.safetensors import are_sizes
from tiedparam.laws.coded import Coded, data_of
from tiedparam.laws.functions import Functions
from tiedparam.laws.layout import Layout
from tiedparam.laws.rule import Rule
from tiedparam.tie.record import Tie
from tiedparam.util.errors import TieError, key_of, raise_if


@dataclass(frozen=True)
class StoredTie:
    """One tied tensor.

    Attributes:
        layer: the path of its layer.
        tensor: its name in the layer.
        rule: the rule's registered name.
        options: what the rule is made with; a ``source`` is a path, a ``fn`` a name.
        shape: the dense shape.
        groups: the convolution's groups, as the rule sees them.
        transposed: whether the rule sees a transposed convolution.
        stacked: whether another parametrization works on what the tie gives.
        residual: how far the tensor was from the law when it was tied, if that is known.
    """

    layer: str
    tensor: str
    rule: str
    options: dict[str, Any]
    shape: list[int]
    groups: int
    transposed: bool
    stacked: bool
    residual: float | None

    @property
    def key(self) -> str:
        """The dense model's key for the tensor."""
        return key_of(self.layer, self.tensor)

    @property
    def layout(self) -> Layout:
        """The layout that the rule was bound to."""
        return Layout(tuple(self.shape), self.groups, self.transposed)

    def make(self, functions: Functions, data: Mapping[str, Tensor]) -> Rule:
        """A fresh rule, not bound yet; see `tiedparam.files.law_options.made`."""
        return made(self.rule, self.options, functions, data)

    @property
    def path_of_rule(self) -> str:
        """What the keys begin with under which a file has tensors of the law itself."""
        return key_of(self.layer, f"parametrizations.{self.tensor}.0.")

    def data_in(
        self, stored: Mapping[str, Tensor], aliases: Mapping[str, str]
    ) -> dict[str, Tensor]:
        """The tensors that a file has for the law itself, by their names in the rule."""
        places = dict(zip(stored, stored, strict=True)) | dict(aliases)
        path = self.path_of_rule
        return {
            key[len(path) :]: stored[place]
            for key, place in places.items()
            if key.startswith(path) and place in stored
        }

    @classmethod
    def of(cls, tie: Tie, path: str, paths: Mapping[int, str]) -> StoredTie:
        """What a file says of a tie, once it is sure that this gives the rule back.

        Args:
            tie: the tie.
            path: its layer's path in the model.
            paths: the paths of all modules of the model, by ``id``.

        Raises:
            TieError: if names and options do not give the rule back.
        """
        rule, residual = tie.rule, tie.residual_at_tying
        try:
            options, layout = written(rule, paths), rule.bound_layout
            stored = cls(
                path,
                tie.tensor_name,
                rule.name,
                options,
                list(layout.shape),
                layout.groups,
                layout.transposed,
                tie.is_stacked,
                float(f"{residual:.4g}") if residual is not None and isfinite(residual) else None,
            )
            _refuse_changed(rule, stored)
        except TieError as error:
            where = f"cannot save the tie of '{key_of(path, tie.tensor_name)}' by '{rule}'"
            remedy = (
                f"{error.remedy} Or save the values alone: torch.save(model.state_dict(), path), "
                "or tiedparam.export_dense(model, path)."
            )
            raise TieError(where, error.fact, remedy.strip()) from error
        return stored

    @classmethod
    def read(cls, value: dict[str, Any]) -> StoredTie:
        """A tie out of a file.

        Raises:
            ValueError: if it is malformed; so do the errors of what is not even a table.
        """
        kinds: dict[str, type] = {
            "layer": str, "tensor": str, "rule": str, "options": dict, "shape": list,
            "groups": int, "transposed": bool, "stacked": bool,
        }  # fmt: skip
        if value.keys() != {field.name for field in fields(cls)}:
            raise ValueError("not the fields of a tie")
        if not all(type(value[name]) is kind for name, kind in kinds.items()):
            raise ValueError("a field of a wrong type")
        if not (value["residual"] is None or type(value["residual"]) is float):
            raise ValueError("a field of a wrong type")
        if value["residual"] is not None and not 0 <= value["residual"] < inf:
            raise ValueError("a residual that is not a distance")
        if not are_sizes(value["shape"]) or 0 in value["shape"] or value["groups"] < 1:
            raise ValueError("sizes must be positive")
        if max(prod(value["shape"]), value["groups"]) >= 2**60:  # bytes are counted in 64 bits
            raise ValueError("larger than any tensor")
        return cls(**value)


def _refuse_changed(rule: Rule, stored: StoredTie) -> None:
    """Raise unless what is stored makes a rule that gives the same weight, to the bit."""
    if isinstance(rule, Coded):
        raise_if(str(rule), rule.why_stale())
    again = stored.make(functions_in(rule), data_of(rule))
    if not (same_weights(rule, again) and same_law(rule, again)):
        raise TieError(
            "options()",
            "its options() does not return everything that it was made with.",
            "Add it there.",
        )
