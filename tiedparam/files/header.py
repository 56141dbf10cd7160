"""What a saved file says of a model's ties: names, options and shapes as JSON, never code.

`of_model` writes it. `read` checks its form; `StoredTie.make` makes the rule that it speaks of,
by name from the registry, and its function by name from those that the reader allows.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import inf, isfinite, prod
from typing import Any

import torch
from torch import nn

from tiedparam.formats.safetensors import CHECKSUM, are_sizes
from tiedparam.formats.strict_json import read_json
from tiedparam.laws.functions import Functions, find_function, function_name
from tiedparam.laws.layout import Layout
from tiedparam.laws.linked import Linked
from tiedparam.laws.registry import find_rule
from tiedparam.laws.rule import Rule
from tiedparam.tie.lookup import is_stacked, tie_of, ties_of
from tiedparam.util.errors import TieError

LAYOUT_VERSION = 2
"""The version of the header and of how rules lay out their free values."""

_MOST_COPIES = 200
"""Copies that read each other in turn; Python's recursion ends before that."""

KEY = "tiedparam"
"""The metadata's key for the header."""


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
        return f"{self.layer}.{self.tensor}" if self.layer else self.tensor

    @property
    def layout(self) -> Layout:
        """The layout that the rule was bound to."""
        return Layout(tuple(self.shape), self.groups, self.transposed)

    def make(self, functions: Functions) -> Rule:
        """A fresh rule, not bound yet; a copy's source is a path.

        Args:
            functions: what a copy's function may be, beside those that all files may name.

        Raises:
            TieError: if the rule, one of its options or a function is not known.
        """
        kind = find_rule(self.rule)
        options = dict(self.options)
        if issubclass(kind, Linked):
            if not all(isinstance(options.get(k), str) for k in ("source", "source_name")):
                raise TieError(f"rule '{self.rule}': its source is not named.")
            if "fn" in options:
                options["fn"] = find_function(options["fn"], functions)
        try:
            return kind(**options)
        except Exception as error:  # a rule may be anybody's
            raise TieError(f"rule '{self.rule}': {error}.") from error


@dataclass(frozen=True)
class Header:
    """What the header says.

    Attributes:
        ties: the tied tensors, in the order in which they can be tied.
        aliases: tensors that are the same tensor as one that is stored: theirs → the stored.
        versions: torch's versions of the modules that have another than 1, by path.
    """

    ties: list[StoredTie]
    aliases: dict[str, str]
    versions: dict[str, int]

    def to_json(self) -> str:
        """As it stands in the file."""
        content = {"layout": LAYOUT_VERSION, **asdict(self)}
        return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def of_model(model: nn.Module, aliases: dict[str, str]) -> Header:
    """The header for a tied model.

    Raises:
        TieError: if one of its ties cannot be made again from names and options.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    ties = [
        stored_tie(layer, tensor, path, paths)
        for path, layer in model.named_modules(remove_duplicate=False)
        for tensor in ties_of(layer)
    ]
    versions = {
        path: version
        for path, module in model.named_modules(remove_duplicate=False)
        if (version := getattr(module, "_version", 1)) != 1 and type(version) is int
    }
    return Header(ties, aliases, versions)


def stored_tie(layer: nn.Module, tensor: str, path: str, paths: Mapping[int, str]) -> StoredTie:
    """What a file says of one tied tensor, once it is sure that this gives the rule back.

    Args:
        layer: the tied layer.
        tensor: the tensor's name.
        path: the layer's path in the model.
        paths: the paths of all modules of the model, by ``id``.

    Raises:
        TieError: if names and options do not give the rule back.
    """
    rule = ties_of(layer)[tensor]
    name = f"{path}.{tensor}" if path else tensor
    try:
        options = _options(rule, paths)
        layout, residual = rule.bound_layout, tie_of(layer, tensor).residual_at_tying
        stored = StoredTie(
            path,
            tensor,
            rule.name,
            options,
            list(layout.shape),
            layout.groups,
            layout.transposed,
            is_stacked(layer, tensor),
            float(f"{residual:.4g}") if residual is not None and isfinite(residual) else None,
        )
        _refuse_changed(rule, stored)
    except TieError as error:
        raise TieError(
            f"cannot save the tie of '{name}' by '{rule}': {error} Or save the values alone: "
            "torch.save(model.state_dict(), path), or tiedparam.export_dense(model, path)."
        ) from error
    return stored


def read(metadata: Mapping[str, str]) -> Header | None:
    """The header in a file's metadata, or None if tiedparam did not write the file.

    Raises:
        TieError: if it is malformed, of a newer version, or without the file's checksum.
    """
    if KEY not in metadata:
        return None
    if CHECKSUM not in metadata:
        raise TieError("its checksum is missing. Fetch or save it again.")
    try:
        content = read_json(metadata[KEY])
        version = content.pop("layout")
        if type(version) is not int or version < 1:
            raise ValueError("no version")
        if version < LAYOUT_VERSION:
            raise TieError(
                f"it has layout version {version}, whose free values lie in another order than "
                f"those of version {LAYOUT_VERSION}. Export it as a dense file with the tiedparam "
                "that wrote it."
            )
        if version > LAYOUT_VERSION:
            raise TieError(
                f"it has layout version {version}, and this tiedparam reads "
                f"{LAYOUT_VERSION}. Update tiedparam."
            )
        header = Header(
            [_read_tie(tie) for tie in content.pop("ties")],
            _read_table(content.pop("aliases"), str),
            _read_table(content.pop("versions"), int),
        )
        if content:
            raise ValueError("more than that")
        if len({(tie.layer, tie.tensor) for tie in header.ties}) < len(header.ties):
            raise ValueError("a tensor is tied twice")
        if _longest_chain(header.ties) > _MOST_COPIES:
            raise ValueError("copies of copies of copies")
    except TieError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TieError("its header is malformed. Fetch or save it again.") from error
    return header


def same_law(one: Rule, other: Rule) -> bool:
    """Whether two rules are of one kind and have equal options, apart from their sources."""
    return type(one) is type(other) and _law_options(one) == _law_options(other)


def _options(rule: Rule, paths: Mapping[int, str]) -> dict[str, Any]:
    """Arguments, as JSON, that make a rule like this one."""
    if not rule.name or find_rule(rule.name) is not type(rule):
        raise TieError("its class has no registered name. Use tiedparam.register_rule.")
    said = rule.options()
    options: dict[str, Any] = {}
    if isinstance(rule, Linked):
        options = {"source": _path_of(rule.source, paths), "source_name": rule.source_name}
    for parameter in list(inspect.signature(type(rule).__init__).parameters.values())[1:]:
        name = parameter.name
        if name in options or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        named = name in rule.functions
        value = getattr(rule, name, parameter.default)
        if name in said and not named:
            value = said[name]
        if value is inspect.Parameter.empty:
            raise TieError(f"its options() does not say its {name}=. Add it there.")
        if value is not parameter.default:
            options[name] = function_name(value) if named else _as_json(name, value)
    return options


def _as_json(name: str, value: Any) -> Any:
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TieError(
            f"its option {name}={value!r} is no number, text, list or table of these."
        ) from error
    return json.loads(text)


def _path_of(source: nn.Module, paths: Mapping[int, str]) -> str:
    if id(source) not in paths:
        raise TieError("its source is not in this model. Save the model that holds both.")
    return paths[id(source)]


def _refuse_changed(rule: Rule, stored: StoredTie) -> None:
    """Raise unless what is stored makes a rule that gives the same weight, to the bit."""
    named = {}
    for name in rule.functions:
        if name in stored.options:
            named[stored.options[name]] = getattr(rule, name)
    again = stored.make(named)
    if isinstance(rule, Linked) and isinstance(again, Linked):
        same = all(getattr(again, f) is getattr(rule, f) for f in rule.functions)
        same = same and again.source_name == rule.source_name
    else:
        reason = again.bind(rule.bound_layout, torch.float32)
        numbers = [
            torch.arange(1.0, prod(shape) + 1, device="cpu").reshape(shape)
            for shape in rule.free_shapes()
        ]
        with torch.no_grad():
            same = (
                reason is None
                and again.free_shapes() == rule.free_shapes()
                and torch.equal(again(*numbers), rule(*numbers))
            )
    if not (same and same_law(rule, again)):
        raise TieError("its options() does not say everything that it was made with. Add it there.")


def _law_options(rule: Rule) -> Any:
    # as a file gives them back: lists for tuples
    options = json.loads(json.dumps(rule.options(), default=repr))
    options.update({name: id(getattr(rule, name)) for name in rule.functions})
    return options


def _longest_chain(ties: list[StoredTie]) -> int:
    """How many copies read each other in turn, at most; cycles are judged when they are tied."""
    reads = {
        tie.key: f"{tie.options['source']}.{tie.options.get('source_name')}".removeprefix(".")
        for tie in ties
        if isinstance(tie.options.get("source"), str)
    }
    lengths: dict[str, int] = {}
    for key in reads:
        chain = []
        while key in reads and key not in lengths:
            lengths[key] = 0  # visited, should it come round
            chain.append(key)
            key = reads[key]
        length = lengths.get(key, 0)
        for link in reversed(chain):
            lengths[link] = length = length + 1
    return max(lengths.values(), default=0)


def _read_tie(value: dict[str, Any]) -> StoredTie:
    kinds: dict[str, type] = {
        "layer": str, "tensor": str, "rule": str, "options": dict, "shape": list,
        "groups": int, "transposed": bool, "stacked": bool,
    }  # fmt: skip
    if value.keys() != {field.name for field in fields(StoredTie)}:
        raise ValueError("not the fields of a tie")
    if not all(type(value[name]) is kind for name, kind in kinds.items()):
        raise ValueError("a field of a wrong type")
    if not (value["residual"] is None or type(value["residual"]) is float):
        raise ValueError("a field of a wrong type")
    if value["residual"] is not None and not 0 <= value["residual"] < inf:
        raise ValueError("no residual")
    if not are_sizes(value["shape"]) or 0 in value["shape"] or value["groups"] < 1:
        raise ValueError("sizes must be positive")
    if max(prod(value["shape"]), value["groups"]) >= 2**60:  # bytes are counted in 64 bits
        raise ValueError("larger than any tensor")
    return StoredTie(**value)


def _read_table(value: dict[str, Any], kind: type) -> dict[str, Any]:
    if not all(type(content) is kind for content in value.values()):
        raise ValueError(f"not a table of {kind}")
    return value
