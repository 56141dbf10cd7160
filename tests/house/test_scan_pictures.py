"""The pictures of docs/recipes/finding-symmetries.md are what its example draws today."""

from __future__ import annotations

import importlib
import re
import shutil

import pytest

from tests.support import ROOT

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


@pytest.fixture
def maker(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("make_scan_pictures")


def is_pinned(name: str, version: str) -> bool:
    pins = (ROOT / "tests" / "constraints.txt").read_text(encoding="utf-8")
    return f"{name}=={version}" in pins.splitlines()


@pytest.mark.skipif(
    not is_pinned("matplotlib", matplotlib.__version__), reason="it sets its texts otherwise"
)
def test_the_pictures_are_what_the_example_draws(maker, tmp_path):
    maker.draw(tmp_path)
    for name in maker.NAMES:
        assert not maker.differ(maker.PICTURES / name, tmp_path / name), (
            f"docs/pictures/{name} is not what the example draws; run '{maker.COMMAND}' and commit "
            "the result"
        )


def test_the_page_shows_them(maker):
    page = (ROOT / "docs" / "recipes" / "finding-symmetries.md").read_text(encoding="utf-8")
    assert re.findall(r"!\[[^\]]+\]\(\.\./pictures/([^)]+)\)", page) == [*maker.NAMES]


def test_a_picture_of_something_else_is_noticed(maker, tmp_path):
    one, other = (maker.PICTURES / name for name in maker.NAMES)
    assert maker.differ(one, other)
    assert not maker.differ(one, one)
    same = tmp_path / "same.png"
    shutil.copyfile(one, same)
    assert not maker.differ(one, same)
    pixels = matplotlib.image.imread(one).copy()
    pixels[:40] = 0.0
    matplotlib.image.imsave(same, pixels)
    assert maker.differ(one, same)
