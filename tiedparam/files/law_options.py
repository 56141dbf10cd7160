"""A law's options in a file: as JSON, a layer by its path, a function by its name.

`written` and `made` are each other's inverse, up to the sources: a law that was made from a file
has their paths, and finds the layers when it is bound. Nothing that a file names is imported.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tiedparam.laws.coded import Coded
from tiedparam.laws.functions import (
    Function,
    Functions,
    function_name,
    is_made_in_script,
    is_of_script,
    with_functions,
)
from tiedparam.laws.linked import Linked
from tiedparam.laws.orbits import Orbits
from tiedparam.laws.registry import find_rule
from tiedparam.laws.rule import Rule
from tiedparam.laws.sharing import Sharing
from tiedparam.util.bits import same_bits
from tiedparam.util.errors import TieError, raise_if, within
from tiedparam.util.parametrized import tensor_at
from tiedparam.util.torch_private import effective

# Writing -------------------------------------------------------------------------------------


def written(rule: Rule, paths: Mapping[int, str]) -> dict[str, Any]:
    """Arguments, as JSON, that make a rule like this one.

    Args:
        rule: a bound rule.
        paths: the paths of all modules of the model, by ``id``.

    Raises:
        TieError: naming the option that has no name in a file, or that `options` does not return.
    """
    kind = type(rule)
    if not rule.name or find_rule(rule.name) is not kind:
        place = f"the class {kind.__name__}"
        raise TieError(place, "its class has no registered name.", "Use tiedparam.register_rule.")
    said, options = rule.options(), _written_sources(rule, paths)
    for parameter in list(inspect.signature(kind.__init__).parameters.values())[1:]:
        name = parameter.name
        if name in options or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in _laws_in(kind):
            laws = getattr(rule, name)
            if laws is not None:
                options[name] = _written_laws(laws, paths)
            continue
        if name in rule.functions:
            value = getattr(rule, name, parameter.default)
            if value is not parameter.default:
                options[name] = function_name(value)
            continue
        # what it says first: an attribute may be computed from data, which a part has not
        value = said[name] if name in said else getattr(rule, name, parameter.default)
        if value is inspect.Parameter.empty:
            raise TieError(f"{name}=", f"its options() does not return {name}.", "Add it there.")
        if value is not parameter.default:
            options[name] = _as_json(name, value)
    return options


def of_script(rule: Rule) -> Iterator[str]:
    """What the script itself defines of a rule that a file can name: classes, and functions."""
    for law in rule.modules():
        if not isinstance(law, Rule):
            continue
        if is_made_in_script(type(law)):
            yield f"the law '{law.name}'"
        for option in law.functions:
            value = getattr(law, option, None)
            if callable(value) and is_of_script(name := function_name(value)):
                yield f"the function '{name}'"


def _laws_in(kind: type[Rule]) -> tuple[str, ...]:
    """The options that are laws themselves."""
    return kind.holds_laws if issubclass(kind, Orbits) else ()


def _written_laws(laws: Any, paths: Mapping[int, str]) -> Any:
    """A law as its name, or as a list of its name and options; of several a list."""
    if isinstance(laws, list):
        return [_written_laws(law, paths) for law in laws]
    options = written(laws, paths)
    return [laws.name, options] if options else laws.name


def _written_sources(rule: Any, paths: Mapping[int, str]) -> dict[str, Any]:
    if not rule.reads_layers:
        return {}
    if not all(id(source) in paths for source, _ in rule.sources()):
        raise TieError(
            "source=", "its source is not in this model.", "Save the model that holds both."
        )
    if isinstance(rule.source, tuple):  # of several
        layers = [paths[id(source)] for source in rule.source]
        return {"source": layers, "source_name": list(rule.source_name)}
    layer, name = tensor_at(paths[id(rule.source)], rule.source_name)
    return {"source": layer, "source_name": name}


def _as_json(name: str, value: Any) -> Any:
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TieError(
            f"{name}=",
            f"its option {name}={value!r} must be made of numbers, texts, lists and tables.",
            "Return such values from options().",
        ) from error
    return json.loads(text)


# Reading -------------------------------------------------------------------------------------


def made(
    name: str, options: Mapping[str, Any], functions: Functions, data: Mapping[str, Tensor]
) -> Rule:
    """A fresh rule, not bound yet; its sources are paths.

    Args:
        name: the rule's registered name.
        options: as `written` gives them.
        functions: what a copy's function may be, beside those that all files may name.
        data: the tensors that the file has for the law itself, by their names in the rule; empty
            if the rule is only to be compared.

    Raises:
        TieError: if the rule, one of its options or a function is not known, or the data is not
            that of the law.
    """
    kind, place, options = find_rule(name), f"rule '{name}'", dict(options)
    own = issubclass(kind, Sharing) and "source" not in options
    if kind.reads_layers and not own and not sources_in(options):
        raise TieError(place, "its source is not named.", "Fetch or save it again.")
    options = with_functions(options, kind.functions, functions)
    for option in _laws_in(kind):
        options[option] = _made_laws(options.get(option), functions)
    try:
        rule = kind(**options)
    except TieError as error:
        raise within(place, error) from error
    except Exception as error:  # a rule may be anybody's
        raise TieError(place, f"{str(error).removesuffix('.')}.", "") from error
    if data and isinstance(rule, Coded):
        raise_if(place, rule.take(data))
    return rule


def _made_laws(value: Any, functions: Functions) -> Any:
    """What `_written_laws` has written; what it cannot have written, as it is."""
    if isinstance(value, str):
        return made(value, {}, functions, {})
    if not isinstance(value, list):
        return value
    if len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], dict):
        return made(value[0], value[1], functions, {})
    return [_made_laws(each, functions) for each in value]


def sources_in(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The tensors of other layers that options name, as path and tensor name; none if malformed."""
    layers, names = options.get("source"), options.get("source_name")
    if not isinstance(layers, list):
        layers, names = [layers], [names]
    if not isinstance(names, list) or len(layers) != len(names):
        return []
    if not all(isinstance(text, str) for text in (*layers, *names)):
        return []
    return list(zip(layers, names, strict=True))


# Comparing -----------------------------------------------------------------------------------


def same_law(one: Rule, other: Rule) -> bool:
    """Whether two rules are of one kind and have equal options, apart from their sources."""
    return type(one) is type(other) and _comparable(one) == _comparable(other)


def _comparable(rule: Rule) -> Any:
    # as a file gives them back: lists for tuples
    options = json.loads(json.dumps(rule.options(), default=repr))
    return {**options, **{name: id(getattr(rule, name)) for name in rule.functions}}


def same_weights(rule: Rule, again: Rule) -> bool:
    """Whether ``again``, not bound yet, computes from numbers what ``rule`` does, to the bit."""
    if rule.functions and not rule.free_shapes():
        return True  # a function may do anything, even at random; `same_law` compares those
    if isinstance(again, Linked):
        again.read_from(list(rule.sources()))  # a file holds their paths, which are compared there
    if again.bind(rule.bound_layout, torch.float32) is not None:
        return False
    if again.free_shapes() != rule.free_shapes():
        return False
    with torch.no_grad():
        sources = [_numbers_like(effective(layer, name)) for layer, name in rule.sources()]
        some = sources[0] if sources else torch.empty(0, device="cpu", dtype=torch.float32)
        free = [_numbers_like(some.new_empty(shape)) for shape in rule.free_shapes()]
        computed = rule(*sources, *free)
        # a law without any numbers computes where, and in what dtype, its layer is
        return same_bits(again(*sources, *free).to(computed), computed)


def _numbers_like(tensor: Tensor) -> Tensor:
    numbers = torch.arange(1.0, tensor.numel() + 1, device=tensor.device)
    return numbers.reshape(tensor.shape).to(tensor.dtype)


def functions_in(rule: Rule) -> dict[str, Function]:
    """The functions of a rule by their names in files; those without a name are left out."""
    found = {}
    for option in rule.functions:
        function = getattr(rule, option)
        try:
            found[function_name(function)] = function
        except TieError:
            continue
    return found
