"""Write the tables of docs/recipes/minilm.md: ``python docs/make_minilm.py``.

They are from what its example found.

The example writes that file: ``python docs/examples/minilm.py --out docs/examples/minilm.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from make_tables import filled

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "recipes" / "minilm.md"
RESULTS = ROOT / "docs" / "examples" / "minilm.json"
COMMAND = "python docs/make_minilm.py"


def results() -> dict[str, Any]:
    """What the example wrote."""
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def law_table(found: dict[str, Any]) -> str:
    """Every law in Markdown: what it stores, and the cosines before and after distillation."""
    lines = [
        "| law | residual | file, MB | cosine, held out | after distillation | lowest "
        "| of the distilled | pairs, of 20 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["laws"]:
        tied, trained = row["tied"], row["trained"]
        distilled = f"{tied['distilled']:.3f} → {trained['distilled']:.3f}"
        pairs = f"{tied['pairs']} → {trained['pairs']}"
        lines.append(
            f"| {row['law']} | {row['residual']:.2g} | {row['file_bytes'] / 1e6:.1f} "
            f"| {tied['held_out']:.3f} | {trained['held_out']:.3f} | {trained['lowest']:.3f} "
            f"| {distilled} | {pairs} |"
        )
    minutes = sum(row["processor_seconds"] for row in found["laws"]) / 60
    threads = f"{found['threads']} thread{'s' * (found['threads'] > 1)}"
    versions = f"torch {found['torch']}, transformers {found['transformers']}"
    lines += ["", f"{minutes:.0f} minutes of processor time in all, {threads}; {versions}."]
    return "\n".join(lines)


def scan_table(found: dict[str, Any]) -> str:
    """The matrix that is nearest to each law, in Markdown."""
    lines = ["| law | nearest matrix | its distance, of a random one's |", "|---|---|---|"]
    for law, (relative, layer) in found["scan"].items():
        lines.append(f"| `{law}` | `{layer}` | {relative:.3f} |")
    return "\n".join(lines)


def with_tables(page: str) -> str:
    """The text of the page with its tables brought up to date.

    Raises:
        ValueError: if the page has no place for one of them.
    """
    found = results()
    page = filled(page, "laws on MiniLM", law_table(found))
    return filled(page, "the scan of MiniLM", scan_table(found))


def main() -> None:
    """Rewrite the tables in place."""
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote the tables of {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
