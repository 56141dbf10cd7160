"""Write docs/maintainers/features.md: ``python docs/make_compatibility.py``.

Every row is a marker on the test that shows it, with literal arguments:

    @pytest.mark.feature("Area", "feature")                      the feature works
    @pytest.mark.feature("Area", "feature", needs="package")     it works with that package
    @pytest.mark.feature("Area", "feature", refused="why; way")  it raises, and nothing changes
    @pytest.mark.feature("Area", "feature", limit="what not")    it works, but for that

The tests are read and not imported, so that this needs none of their packages.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "maintainers" / "features.md"
COMMAND = "python docs/make_compatibility.py"
AREAS = (
    "Layers",
    "Compile and export",
    "Automatic differentiation",
    "Precision",
    "Optimizers",
    "Inference caches",
    "Copies and files",
    "Whole models",
    "Hooks and patches",
    "Other parametrizations",
    "Quantization and fusion",
    "Model averaging and parallelism",
    "Distributed",
    "Libraries",
)
_INTRODUCTION = """\
# What works on a tied layer

Each row is a test that CI runs with the real thing, in the versions of `tests/constraints.txt`.
*Works* means equal to the dense stock layer that holds the same weight, up to rounding. *Refused*
means an error with nothing changed; it names the way, unless it is torch's own. What an older torch
does otherwise is in [Versions](versions.md#what-an-older-torch-does-otherwise). This page is
written by `{command}` from the marks on the tests.

```python
import torch

import tiedparam as tp

layer = tp.register_tie(torch.nn.Linear(8, 8), "row_repeat")
print(torch.compile(layer, backend="eager", fullgraph=True)(torch.ones(2, 8)).shape)
```

```text
torch.Size([2, 8])
```
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


def features(folder: Path = ROOT / "tests") -> list[Feature]:
    """All marked features, in the order of `AREAS`, of the files and of the lines.

    Raises:
        ValueError: for a mark that cannot be read, or of an unknown area.
    """
    files = sorted(folder.rglob("test_*.py"), key=lambda path: (path.name, path))
    found = [feature for path in files for feature in _in_file(path, folder)]
    return sorted(found, key=lambda feature: AREAS.index(feature.area))


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


def page(rows: list[Feature] | None = None) -> str:
    """The whole page in Markdown."""
    rows = features() if rows is None else rows
    lines = [_INTRODUCTION.format(command=COMMAND)]
    for area in AREAS:
        of_area = [row for row in rows if row.area == area]
        if of_area:
            lines += [f"## {area}", "", "| feature | answer | test |", "|---|---|---|"]
            lines += [f"| {row.what} | {row.answer} | `{row.test}` |" for row in of_area]
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
