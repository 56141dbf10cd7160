"""The anchors of headings, by which the pages are linked and the tests look links up."""

from __future__ import annotations

import re


def anchor_of(heading: str) -> str:
    """The anchor of a heading, as code hosts and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
