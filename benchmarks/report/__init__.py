"""Results to text and charts. Nothing is written by hand.

`summary` makes docs/speed.md, which answers whether a case gets faster; `background` the pages
of machines and goals for maintainers, and `tables` the full tables behind both, a page for each
machine; `charts` the pictures; `readme` the table of the README.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import goal_cases, result_files
from benchmarks.report import background, charts, readme, summary, tables
from benchmarks.report.results import COMMAND, FOLDER, files, load, machines, of_machine

__all__ = ["COMMAND", "FOLDER", "files", "load", "write", "write_readme"]


def pages(results: Path) -> dict[str, str]:
    """Every page, by its path from the folder of the documents."""
    found = load(results)
    made = {
        "speed.md": summary.render(found),
        f"{FOLDER}/index.md": background.render(found),
        f"{FOLDER}/goals.md": background.render_goals(found),
    }
    for machine in machines(found):
        text = tables.render(of_machine(found, machine))
        made[f"{FOLDER}/{machine['key']}.md"] = text
    return made


def judge(result: dict[str, Any]) -> dict[str, Any]:
    """A result of the case `goals`, judged by the goals as they are now."""
    return {**result, "goals": goal_cases.evaluate(result["comparisons"])}


def write(results: Path, page: Path) -> None:
    """Write the page for users, those behind it, and the charts.

    The goals are judged again first, so that one may be reworded without measuring.
    """
    for path in files(results, "goals"):
        result_files.write(path, judge(json.loads(path.read_text(encoding="utf-8"))))
    for name, text in pages(results).items():
        path = page if name == "speed.md" else page.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    charts.write(load(results), page.parent / charts.FOLDER)


def write_readme(results: Path, page: Path) -> None:
    """Write the figures between the README's two marks."""
    text = page.read_text(encoding="utf-8")
    page.write_text(readme.put_into(text, load(results)), encoding="utf-8")
