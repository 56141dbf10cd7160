"""Write docs/works-with.md and docs/maintainers/features.md: ``python docs/make_compatibility.py``.

Every row is a marker on the test that shows it, with literal arguments:

    @pytest.mark.feature("Area", "feature")                      the feature works
    @pytest.mark.feature("Area", "feature", needs="package")     it works with that package
    @pytest.mark.feature("Area", "feature", refused="why; way")  it raises, and nothing changes
    @pytest.mark.feature("Area", "feature", limit="what not")    it works, but for that

The first page is for users, and names no test; the second has them. The tests are read and not
imported, so that this needs none of their packages.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python docs/make_compatibility.py"
AREAS = {
    "Layers": """\
Weights and biases of stock layers and of your own. The layer keeps its forward, its hooks and its
options.""",
    "Compile and export": """\
A tied layer compiles to one graph, and is exported as it is. Programs hold the free values and the
law; for a program of the dense weight, untie a copy first.

```python
compiled = torch.compile(layer, backend="eager", fullgraph=True)
print(torch.allclose(compiled(x), layer(x)))
program = torch.export.export(layer, (x,))
print(torch.allclose(program.module()(x), layer(x)))
```

```text
True
True
```""",
    "Automatic differentiation": """\
What is differentiated are the free values: give transforms these, by the names that they have in
the state dict.

```python
values = {name: value.detach() for name, value in layer.named_parameters()}
gradients = torch.func.grad(
    lambda values: torch.func.functional_call(layer, values, (x,)).square().sum()
)(values)
print({name: tuple(gradient.shape) for name, gradient in gradients.items()})
```

```text
{'bias': (8,), 'parametrizations.weight.original0': (1, 8)}
```""",
    "Precision": """\
Casts and autocast do what they do to a stock layer.""",
    "Optimizers": """\
Build the optimizer after tying, and nothing is to be done. One that is there already, in the middle
of a training run, is handed over:

```python
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
optimizer = torch.optim.AdamW(model.parameters())
model(x).square().sum().backward()
optimizer.step()
tp.register_tie(model[0], "symmetric", optimizer=optimizer)  # its averages follow the tie
```""",
    "Inference caches": """\
Inside of `frozen` every weight of a model in eval mode is computed once:

```python
with tp.frozen(model.eval()), torch.no_grad():
    model(x)
```""",
    "Copies and files": """\
`deepcopy`, `pickle`, `torch.save` and state dicts work as for stock layers. Dense dictionaries go
in and out:

```python
dense = tp.dense_state_dict(model)
print(list(dense))
model.load_state_dict(dense)
```

```text
['0.weight', '0.bias', '2.weight', '2.bias']
```""",
    "Whole models": """\
Plans, scans and reports, in Python and in files.""",
    "Hooks and patches": """\
Whatever changes a tied weight on its way counts.""",
    "Other parametrizations": """\
One tensor has one law or one parametrization of torch that says what is stored. Other tensors of
the layer are free.""",
    "Quantization and fusion": """\
Numbers that are quantized one by one obey no law: untie first.""",
    "Model averaging and parallelism": "",
    "Distributed": """\
Tie first, then wrap. A layer that copies another belongs into one unit, or one stage, with it.""",
    "Libraries": "",
}
"""The areas in the order of the pages, each with what a user should know first."""

_FOR_USERS = """\
# Does it work with …?

<!-- by `{command}`, from the marks on the tests; do not edit -->

Nearly always: a tied layer is a stock layer whose weight is computed, so what runs, compiles,
exports, trains, casts, copies or shards the one does it with the other. Three things to remember:

- **Tie first**, then build the optimizer, wrap the model in DDP or FSDP, or cut it. A tie that
  comes later is refused; an optimizer that is there already is handed over by `optimizer=`.
- **Untie** (`remove_tie`, `untie_model`) before a tool that replaces weights by numbers of its own:
  quantization, merged adapters, pruning.
- **Refused** means an error that names the way, with nothing changed. *Works* means: equal to the
  dense stock layer that holds the same weight, up to rounding.

Each line is a test with the real thing, with {versions}.
[Versions](maintainers/versions.md#what-an-older-torch-does-otherwise) says what an older torch does
otherwise.

{areas}

The examples of this page go on with this layer:

```python
import torch

import tiedparam as tp

layer = tp.register_tie(torch.nn.Linear(8, 8), "row_repeat", init="rescale")
x = torch.randn(2, 8)
```
"""

_WITH_TESTS = """\
# Features and their tests

Each row is a test that CI runs with the real thing, in the versions of `tests/constraints.txt`.
*Works* means equal to the dense stock layer that holds the same weight, up to rounding. *Refused*
means an error with nothing changed; it names the way, unless it is torch's own. What an older torch
does otherwise is in [Versions](versions.md#what-an-older-torch-does-otherwise). This page and [the
one for users](../works-with.md), which names no tests, are written by `{command}` from the marks on
the tests.
"""


@dataclass(frozen=True)
class Feature:
    """One row: what, the answer, and the test that shows it."""

    area: str
    what: str
    test: str
    needs: str = ""
    refused: str = ""
    limit: str = ""

    @property
    def answer(self) -> str:
        """What a user wants to know."""
        if self.refused:
            return f"refused: {self.refused}"
        needs = f", needs {self.needs}" if self.needs else ""
        return f"works{needs}{f', but {self.limit}' if self.limit else ''}"

    @property
    def condition(self) -> str:
        """On which condition it works; empty where there is none but that the library is there."""
        named = all(part in self.what.casefold() for part in _words(self.needs))
        needs = f"needs {self.needs}" if self.needs and not named else ""
        return ", but ".join(part for part in (needs, self.limit) if part)


def _words(needs: str) -> list[str]:
    return [part.strip() for part in needs.casefold().split(" and ")]


def features(folder: Path = ROOT / "tests") -> list[Feature]:
    """All marked features, in the order of `AREAS`, of the files and of the lines.

    Raises:
        ValueError: for a mark that cannot be read, or of an unknown area.
    """
    files = sorted(folder.rglob("test_*.py"), key=lambda path: (path.name, path))
    found = [feature for path in files for feature in _in_file(path, folder)]
    return sorted(found, key=lambda feature: list(AREAS).index(feature.area))


def _in_file(path: Path, folder: Path) -> Iterator[Feature]:
    name = path.relative_to(folder).as_posix()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef):
            continue
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.feature":
                yield _feature(mark, f"{name}::{node.name}")


def _feature(mark: ast.Call, test: str) -> Feature:
    texts = [ast.literal_eval(value) for value in mark.args]
    options = {str(word.arg): ast.literal_eval(word.value) for word in mark.keywords}
    if len(texts) != 2 or not options.keys() <= {"needs", "refused", "limit"}:
        raise ValueError(
            f"{test}: a feature is marked by area and feature, needs=, refused=, limit="
        )
    area, what = texts
    if area not in AREAS:
        raise ValueError(f"{test}: the area {area!r} is none of {', '.join(AREAS)}")
    return Feature(area, what, test, **options)


def with_tests(rows: Sequence[Feature]) -> str:
    """The page for maintainers, in Markdown."""
    lines = [_WITH_TESTS.format(command=COMMAND)]
    for area, of_area in _by_area(rows):
        table = [[row.what, row.answer, f"`{row.test}`"] for row in of_area]
        lines += [f"## {area}", "", *_table(["feature", "answer", "test"], table), ""]
    return "\n".join(lines)


def for_users(rows: Sequence[Feature]) -> str:
    """The page for users, in Markdown: what works, then conditions, then what is refused."""
    found = dict(_by_area(rows))
    links = [f"[{area}](#{area.lower().replace(' ', '-')})" for area in found]
    lines = [_FOR_USERS.format(areas=" · ".join(links), command=COMMAND, versions=versions())]
    for area, of_area in found.items():
        lines += [f"## {area}", ""] + ([AREAS[area], ""] if AREAS[area] else [])
        works = [row for row in of_area if not row.refused]
        works.sort(key=lambda row: not row.what.startswith("`"))  # what has a name comes first
        plain = [f"- {row.what}" for row in works if not row.condition]
        lines += ["Works:", "", *plain, ""] if plain else []
        on_condition = [[row.what, row.condition] for row in works if row.condition]
        lines += (
            [*_table(["works, on a condition", "which"], on_condition), ""] if on_condition else []
        )
        refused = [[row.what, row.refused] for row in of_area if row.refused]
        lines += [*_table(["refused", "why, and the way"], refused), ""] if refused else []
    return "\n".join(lines)


def versions() -> str:
    """The versions of torch and of the libraries that the features are tested with."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    beside = re.search(r"^ecosystem = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert beside, "pyproject.toml has no extra `ecosystem`"
    names = ["torch", *re.findall(r'^ *"([\w-]+)', beside[1], re.MULTILINE)]
    pins = (ROOT / "tests" / "constraints.txt").read_text(encoding="utf-8")
    found = dict(re.findall(r"^([\w-]+)==(\S+)", pins, re.MULTILINE))
    return ", ".join(f"{name} {found[name]}" for name in names)


def _by_area(rows: Sequence[Feature]) -> Iterator[tuple[str, list[Feature]]]:
    for area in AREAS:
        of_area = [row for row in rows if row.area == area]
        if of_area:
            yield area, of_area


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)]


PAGES = {
    ROOT / "docs" / "works-with.md": for_users,
    ROOT / "docs" / "maintainers" / "features.md": with_tests,
}


if __name__ == "__main__":
    for page, render in PAGES.items():
        page.write_text(render(features()), encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}")
