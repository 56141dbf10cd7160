"""Notebooks as pages of the site: a hook of mkdocs that runs them whenever the site is built.

A notebook in docs/ has no outputs. It runs in an empty folder; an error in it fails the build. What
it shows becomes Markdown, so that its page looks as the others do, is searched, and has its links
checked. (mkdocs-jupyter puts half a megabyte of styles and three scripts of other hosts into each.)
"""

from __future__ import annotations

import base64
import functools
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient

AT_ONCE = 2
LONGEST = 120
"""Seconds of one cell."""

PICTURES = {"image/svg+xml": "svg", "image/png": "png"}
_WARNING = re.compile(r"^\S+\.py:\d+: (\w+: .*\n)(?:  .*\n)?", re.MULTILINE)


class Notebook(File):
    """A notebook whose page is there already, in Markdown."""

    def is_documentation_page(self) -> bool:
        """Yes, though its name does not end as that of other pages."""
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Run every notebook, some at once, and put its page and its pictures in its place."""
    found = [file for file in files if file.src_uri.endswith(".ipynb")]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        pages = list(pool.map(page_of, (file.content_string for file in found)))
    for file, (text, pictures) in zip(found, pages, strict=True):
        files.remove(file)
        place = PurePosixPath(file.src_uri)
        text = text.replace(_STEM, place.stem)
        kept = place.parent / "notebooks" / place.name
        files.append(File.generated(config, str(kept), content=file.content_string))
        files.append(Notebook.generated(config, file.src_uri, content=text))
        for name, content in pictures.items():
            uri = str(place.parent / name.replace(_STEM, place.stem))
            files.append(File.generated(config, uri, content=content))
    return files


_STEM = "{the notebook}"


@functools.cache
def page_of(notebook: str) -> tuple[str, dict[str, bytes]]:
    """The page of a notebook in Markdown, and its pictures by name. Kept while mkdocs serves."""
    pictures: dict[str, bytes] = {}
    text = "\n\n".join(markdown_of(executed(notebook), pictures))
    return text + "\n", pictures


def executed(notebook: str) -> Any:
    """A notebook with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: with the traceback, if a cell raises.
    """
    cells = nbformat.reads(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            cells,
            timeout=LONGEST,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            extra_arguments=["--log-level=ERROR"],  # it warns of ports that others could hear
        ).execute(env=os.environ | {"OMP_NUM_THREADS": "1"})  # for some run at once
    return cells


def markdown_of(notebook: Any, pictures: dict[str, bytes]) -> Iterator[str]:
    """The cells and what they show, block by block; pictures are put aside."""
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            yield cell.source
            if not number:
                yield f"[The notebook itself](notebooks/{_STEM}.ipynb), to run and to change."
        elif cell.cell_type == "code" and cell.source.strip():
            yield fenced("python", cell.source)
            yield from outputs_of(cell, pictures)


def outputs_of(cell: Any, pictures: dict[str, bytes]) -> Iterator[str]:
    """What one cell has printed, warned of and shown."""
    printed = ""
    for output in cell.outputs:
        if output.output_type == "stream":
            printed += output.text
            continue
        if printed:
            yield fenced("text", plain(printed))
            printed = ""
        yield shown(output.data, pictures)
    if printed:
        yield fenced("text", plain(printed))


def plain(printed: str) -> str:
    """Warnings without their place, which is a file of the kernel, and their line of code."""
    return _WARNING.sub(r"\1", printed)


def shown(data: Any, pictures: dict[str, bytes]) -> str:
    """What a cell shows, in the richest form that a page can hold."""
    for kind, suffix in PICTURES.items():
        if kind in data:
            name = f"{_STEM}-{len(pictures) + 1}.{suffix}"
            content = data[kind]
            is_text = suffix == "svg"
            pictures[name] = content.encode() if is_text else base64.b64decode(content)
            return f"![What this cell draws]({name})"
    if "text/markdown" in data:
        return str(data["text/markdown"])
    if "text/html" in data:
        return "\n".join(line for line in data["text/html"].splitlines() if line.strip())
    return fenced("text", data["text/plain"])


def fenced(kind: str, text: str) -> str:
    """A block of code, or of what it printed."""
    return f"```{kind}\n{text.rstrip()}\n```"
