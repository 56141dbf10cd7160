"""The library's docstrings, as mkdocstrings expects them: an extension of griffe.

A docstring here ends with ``Example:``, has simple tables as Sphinx reads them, says a name of the
library as `name` and code as ``code``, and a rule's says nothing of what its class does. On the
site an example is a block of code, a table is a table, a name is a link, and a rule says its law
and what it asks of a tensor. Types that are names of literals are shown as the literals.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import griffe

ROOMS = ("laws", "rules", "testing")
_LABEL = re.compile(r"^(Shapes|Source)(?=[:,])", re.MULTILINE)
_RULER = re.compile(r"=+( +=+)+")
_NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)")


class Docstrings(griffe.Extension):
    """Rewrites every docstring of a package, once it is read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """After all modules of the package are known."""
        names = public_names(pkg)
        for part in parts_of(pkg):
            if isinstance(part, griffe.Class) and part.docstring is not None:
                part.docstring.value = with_law(part.docstring.value, part)
            if isinstance(part, griffe.Function):
                show_literals(part)
            if part.docstring is not None:
                part.docstring.value = rewritten(part.docstring.value, links(names, part))


def public_names(package: griffe.Module) -> dict[str, str]:
    """Where each public name stands in the reference: by the name, and a law's by its own too."""
    found: dict[str, str] = {}
    for room in ("", *ROOMS):
        module: Any = package.members.get(room) if room else package
        for name in map(str, (module and module.exports) or ()):
            found.setdefault(name, ".".join(filter(None, (package.name, room, name))))
    rules: Any = package.members.get("rules")
    if rules is not None and "CLASSES" in rules.members:
        classes = ast.literal_eval(str(rules.members["CLASSES"].value))
        found |= {name: found[kind] for name, kind in classes.items()}
    return found


def parts_of(part: griffe.Object) -> Iterator[griffe.Object]:
    """An object and all that is defined in it; what it imports is elsewhere."""
    yield part
    for member in part.members.values():
        if not member.is_alias:
            yield from parts_of(member)


# The text -------------------------------------------------------------------------------------


def rewritten(text: str, link: Callable[[str], str]) -> str:
    """A docstring in Markdown, with its example in a section that griffe knows."""
    text, head, example = text.rpartition("\nExample:\n")
    if not head:
        text, example = example, ""
    lines: list[str] = []
    rows: list[str] | None = None
    for line in text.split("\n"):
        if _RULER.fullmatch(line.strip()):
            rulers = 1 if rows is None else 1 + sum(bool(_RULER.fullmatch(r.strip())) for r in rows)
            rows = [*(rows or []), line]
            if rulers == 3:
                lines += markdown_table(rows)
                rows = None
        elif rows is not None:
            rows.append(line)
        else:
            lines.append(line)
    text = re.sub(r"::$", ":", "\n".join(lines), flags=re.MULTILINE)
    text = _NAME.sub(lambda match: link(match[1]), _LABEL.sub(r"**\1**", text))
    return text + ("\nExamples:\n" + example if head else "")


def markdown_table(rows: list[str]) -> list[str]:
    """A simple table of three rulers, whose columns are where the rulers are."""
    ruler, indent = rows[0], len(rows[0]) - len(rows[0].lstrip())
    spans = [match.span() for match in re.finditer("=+", ruler)]
    ends = [start for start, _ in spans[1:]] + [None]
    cells: list[list[str]] = []
    for row in rows:
        if _RULER.fullmatch(row.strip()):
            continue
        found = [row[start:end].strip() for (start, _), end in zip(spans, ends, strict=True)]
        if found[0]:
            cells.append(found)
        else:  # the line before goes on
            cells[-1] = [
                " ".join(filter(None, pair)) for pair in zip(cells[-1], found, strict=True)
            ]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    lines.insert(1, "|" + "---|" * len(spans))
    return [" " * indent + line for line in lines]


def links(names: dict[str, str], part: griffe.Object) -> Callable[[str], str]:
    """How a name in the docstring of a part is shown: as a link, if it has a place."""

    def link(name: str) -> str:
        first, _, rest = name.partition(".")
        place = name if first == "tiedparam" else None
        if first in names:
            place = ".".join(filter(None, (names[first], rest)))
        elif isinstance(part, griffe.Class) and first in part.members:
            place = f"{names.get(part.name, part.path)}.{name}"
        elif part.parent is not None and part.parent.is_class and first in part.parent.members:
            place = f"{names.get(part.parent.name, part.parent.path)}.{name}"
        if place is None:
            return f"`{name}`"
        return f'<autoref identifier="{place}" optional><code>{name}</code></autoref>'

    return link


# Rules ----------------------------------------------------------------------------------------


def with_law(text: str, kind: griffe.Class) -> str:
    """The docstring of a rule with its law, and with what `register_tie` refuses."""
    name = registered_name(kind)
    if name is None:
        return text
    before, _, after = text.partition("\n\nExample:\n")
    law, asks = attribute_text(kind, "law"), first_paragraph(kind.members.get("check"))
    summary, _, rest = before.partition("\n\n")
    if law and law not in summary:
        summary += f"\n\n**Law**: ``{law}``"
    raises = f"if the tensor cannot carry the law, or an option does not fit it. {asks}".strip()
    raises = f"Raises:\n    TieError: {raises}"
    return "\n\n".join(filter(None, (summary, rest, raises))) + f"\n\nExample:\n{after}"


def registered_name(kind: griffe.Class) -> str | None:
    """The name that ``@register_rule`` gives a class."""
    for decorator in kind.decorators:
        if decorator.callable_path.endswith("register_rule"):
            return str(ast.literal_eval(str(decorator.value).partition("(")[2].rstrip(")")))
    return None


def attribute_text(kind: griffe.Class, name: str) -> str:
    """The text that a class gives an attribute, or nothing if that is computed."""
    with suppress(KeyError, ValueError, SyntaxError):
        value = kind.members[name].value
        return str(ast.literal_eval(str(value)))
    return ""


def first_paragraph(method: griffe.Object | griffe.Alias | None) -> str:
    """In one line, what the docstring of a method begins with."""
    if method is None or method.docstring is None:
        return ""
    return method.docstring.value.partition("\n\n")[0].replace("\n", " ")


# Types ----------------------------------------------------------------------------------------


def show_literals(function: griffe.Function) -> None:
    """Show ``Literal["a", "b"]`` where a signature names it."""
    for parameter in function.parameters:
        annotation = parameter.annotation
        if isinstance(annotation, griffe.ExprName):
            with suppress(KeyError, griffe.AliasResolutionError, griffe.NameResolutionError):
                named = function.modules_collection[annotation.canonical_path]
                value = named.value if named.is_attribute else None
                if str(value).startswith("Literal["):
                    parameter.annotation = value
