"""Write what type checkers and editors know of the rules: ``python docs/make_signatures.py``.

From the registry: the names of `tiedparam.rules`, the options of each rule as a ``TypedDict``,
and the overloads by which `register_tie` and `residual` take a rule's name with its own options.
A new law needs a file in ``tiedparam/rules``, and a run of this.
`tests/house/test_typed_surface.py` says that the files are what this writes.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor, nn

import tiedparam as tp
from tiedparam.laws.registry import PART

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python docs/make_signatures.py"
RULES = "tiedparam/rules/__init__.py"
OPTIONS = "tiedparam/layer/rule_options.py"
TIE = "tiedparam/layer/register.py"
RESIDUAL = "tiedparam/layer/residual.py"


def shipped_rules() -> dict[str, type[tp.Rule]]:
    """The library's own rules by name, also those of files that are not imported yet."""
    for file in sorted((ROOT / "tiedparam" / "rules").glob("[!_]*.py")):
        import_module(f"tiedparam.rules.{file.stem}")
    known = tp.available_rules()
    return {n: rule for n, rule in known.items() if rule.__module__.startswith("tiedparam.rules.")}


# The parts ----------------------------------------------------------------------------------


def rules_imports() -> str:
    """The names of `tiedparam.rules`, for type checkers and for Python."""
    names = sorted((rule.__name__, name) for name, rule in shipped_rules().items())
    return "\n".join(
        [
            "if TYPE_CHECKING:",
            *(f"    from tiedparam.rules.{name} import {kind}" for kind, name in names),
            "",
            "__all__ = [",
            *(f'    "{kind}",' for kind, _ in names),
            "]",
            "",
            "CLASSES = {",
            *(f'    "{name}": "{kind}",' for kind, name in names),
            "}",
            '"""By name, which is the name of the file too, the class of each law."""',
        ]
    )


def options_classes() -> str:
    """For each rule with options: these, and these with all that `register_tie` takes alone."""
    names = "".join(f'    "{name}",\n' for name in shipped_rules())  # a line each: never too long
    parts = [f'KnownName = Literal[\n{names}]\n"""The names of the library\'s own rules."""']
    for name, rule in shipped_rules().items():
        fields = list(option_fields(rule))
        if fields:
            options, tie = options_names(rule)
            parts.append(
                f"class {options}(Place, total=False):\n"
                f'    """The options of ``{name}``."""\n\n' + "\n".join(fields)
            )
            parts.append(
                f"class {tie}(TieAlone, {options}, total=False):\n"
                f'    """All that `register_tie` takes by name for ``{name}``."""'
            )
    return "\n\n\n".join(parts) + "\n\n"


def options_names(rule: type[tp.Rule]) -> tuple[str, str]:
    """What the classes of a rule's options are called: for `residual`, and for `register_tie`."""
    if not inspect.signature(rule).parameters:
        return "Place", "TieArguments"
    return f"{rule.__name__}Options", f"{rule.__name__}Tie"


def option_fields(rule: type[tp.Rule]) -> Iterator[str]:
    """The options of a rule, as fields of a class."""
    hints = get_type_hints(rule.__init__)
    for name, parameter in inspect.signature(rule).parameters.items():
        if name in PART:  # every law takes them
            continue
        text = annotation(hints[name])
        required = parameter.default is inspect.Parameter.empty
        yield f"    {name}: Required[{text}]" if required else f"    {name}: {text}"


def annotation(kind: Any) -> str:
    """A type as source text.

    Raises:
        TypeError: for a type of which this does not know how it is written.
    """
    known = {Tensor: "Tensor", nn.Module: "nn.Module", type(None): "None", ...: "..."}
    if kind in known:
        return known[kind]
    if isinstance(kind, type) and kind.__module__ == "builtins" and not get_args(kind):
        return kind.__name__
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"Literal[{', '.join(map(_quoted, arguments))}]"
    if origin in (Union, types.UnionType):
        return " | ".join(map(annotation, arguments))
    if origin is Callable or getattr(origin, "__name__", "") == "Callable":
        return f"Callable[{', '.join(map(annotation, arguments))}]"
    if origin is not None and origin.__module__ == "collections.abc":
        return f"{origin.__name__}[{', '.join(map(annotation, arguments))}]"
    raise TypeError(f"{COMMAND} does not know how to write the type {kind!r}")


def _quoted(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def tie_overloads() -> str:
    """The overloads of `register_tie` for names."""
    return "\n".join(
        "@overload\n"
        "def register_tie(\n"
        "    layer: Layer,\n"
        f'    rule: Literal["{name}"],\n'
        "    tensor_name: str = ...,\n"
        f"    **options: Unpack[rule_options.{options_names(rule)[1]}],\n"
        ") -> Layer: ..."
        for name, rule in shipped_rules().items()
    )


def residual_overloads() -> str:
    """The overloads of `residual` for names."""
    parts = []
    for name, rule in shipped_rules().items():
        parts.append(
            "@overload\n"
            "def residual(\n"
            "    layer: nn.Module,\n"
            f'    rule: Literal["{name}"],\n'
            "    tensor_name: str = ...,\n"
            f"    **options: Unpack[rule_options.{options_names(rule)[0]}],\n"
            ") -> float: ..."
        )
    return "\n".join(parts)


# The files ----------------------------------------------------------------------------------

CONTENTS: dict[str, Callable[[], str]] = {
    RULES: rules_imports,
    OPTIONS: options_classes,
    TIE: tie_overloads,
    RESIDUAL: residual_overloads,
}
"""What stands between the marks of each file."""


def updated(name: str, text: str) -> str:
    """The text of a file with its generated part brought up to date.

    Raises:
        ValueError: if the file has no place for it.
    """
    begin, end = f"# begin: by {COMMAND}", "# end"
    pattern = re.compile(rf"^{re.escape(begin)}\n.*?^{end}$", re.DOTALL | re.MULTILINE)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{name} must have one place between {begin!r} and {end!r}")
    content = CONTENTS[name]()
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def main() -> None:
    """Rewrite them in place."""
    for name in CONTENTS:
        file = ROOT / name
        file.write_text(updated(name, file.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote the generated part of {name}")


if __name__ == "__main__":
    main()
