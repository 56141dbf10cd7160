"""Files that stand beside docs/ as pages of the site, and links to them: a hook of mkdocs."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "CONTRIBUTING.md": "maintainers/contributing.md",
    "CHANGELOG.md": "maintainers/changelog.md",
}
"""Files of the repository, and where on the site they stand."""

INSTEAD = {"README.md": "index.md"}
"""What the site has in place of a file: without its headings."""

_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for source, page in PAGES.items():
        text = with_links((ROOT / source).read_text(encoding="utf-8"), source, page)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links that leave docs/ for these files lead to their pages."""
    uri = page.file.src_uri
    return markdown if uri in PAGES.values() else with_links(markdown, f"docs/{uri}", uri)


def with_links(text: str, source: str, page: str) -> str:
    """A text whose links were made for its place in the repository, for its place on the site."""

    def link(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if file in PAGES:
            place = PAGES[file]
        elif file in INSTEAD:
            place, anchor = INSTEAD[file], ""
        elif source in PAGES and file.startswith("docs/"):
            place = file.removeprefix("docs/")
        else:
            return match[0]
        return posixpath.relpath(place, posixpath.dirname(page) or ".") + anchor

    return _LINK.sub(link, text)
