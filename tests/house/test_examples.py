"""Every public docstring ends with an example that runs and shows what it says.

An example begins where the docs do, with ``import torch``, ``from torch import nn`` and
``import tiedparam as tp``, and runs in an empty folder. ``...`` in an output stands for anything.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import io
import re
import types
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support import ROOT
from tiedparam.state import optimizer_laws

MODULES = ("tiedparam", "tiedparam.laws", "tiedparam.rules", "tiedparam.testing")
"""Where public names stand, in their ``__all__``."""

LONGEST = 9
"""Lines of an example."""


def public_objects() -> Iterator[tuple[str, object]]:
    """Every public function and class by one name; data, such as ``__version__``, has none."""
    seen = set()
    for module in map(importlib.import_module, MODULES):
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            documented = isinstance(value, (type, types.FunctionType))
            if documented and value not in seen:
                seen.add(value)
                yield f"{module.__name__}.{name}", value
    shipped = (r for r in tp.available_rules().values() if r.__module__.startswith("tiedparam."))
    yield from ((f"{rule.__module__}.{rule.__name__}", rule) for rule in {*shipped} - seen)


PUBLIC = dict(sorted(public_objects()))


def example_of(value: object) -> str:
    """The example, which must be the last section of a docstring; fails where there is none."""
    docstring = inspect.cleandoc(value.__doc__ or "")
    before, head, example = docstring.rpartition("\nExample:\n")
    assert head, "no example: end the docstring with the section 'Example:'"
    left = [line for line in example.splitlines() if line[:4].strip()]
    assert not left, f"the example must be the last section, and {left[0]!r} follows"
    assert ">>>" not in before, "code outside of the example"
    assert len(example.splitlines()) <= LONGEST, "the example is long"
    return inspect.cleandoc("    " + example.lstrip()) + "\n"


def run(name: str, text: str) -> None:
    """Run an example as a doctest; fails with what differs, and where nothing is shown."""
    start = {"torch": torch, "nn": nn, "tp": tp}
    parsed = doctest.DocTestParser().get_doctest(text, start, name, name, 0)
    assert any(step.want for step in parsed.examples), "the example shows no output"
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.REPORT_NDIFF)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # as Python does, unless asked
        runner.run(parsed, out=report.write)
    assert not runner.failures, report.getvalue()


@pytest.fixture
def scratch(registry, tmp_path, monkeypatch):
    """An empty folder, and registries that forget what an example registers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(optimizer_laws, "_LAWS", dict(optimizer_laws._LAWS))


def test_the_public_names_are_found():
    assert {f"tiedparam.{name}" for name in ("register_tie", "Rule", "Plan", "draw_scan")} <= {
        *PUBLIC
    }
    assert "tiedparam.laws.Linked" in PUBLIC
    rules = [value for value in PUBLIC.values() if getattr(value, "name", "")]
    assert {"flip_sym", "copy", "repeat"} <= {rule.name for rule in rules}


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize("name", PUBLIC)
def test_the_docstring_ends_with_an_example_that_runs(name):
    if name.startswith("tiedparam.draw_"):
        pytest.importorskip("matplotlib")
    run(name, example_of(PUBLIC[name]))


def test_no_example_is_left_out():
    text = "".join(file.read_text("utf-8") for file in (ROOT / "tiedparam").rglob("*.py"))
    shown = len(re.findall(r"^ *Example::?$", text, re.MULTILINE))
    assert shown == len(PUBLIC), "an example of what has no public name: nobody runs it"


@pytest.mark.usefixtures("scratch")
def test_the_law_in_a_file_of_the_docs_has_one_too():
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    (file,) = re.findall(r'^```python\n(""".*?)^```$', page, re.MULTILINE | re.DOTALL)
    before = set(tp.available_rules())
    exec(file, {"__name__": "tiedparam.rules.of_the_docs"})
    (law,) = set(tp.available_rules()) - before
    run(law, example_of(tp.available_rules()[law]))


def documented(docstring):
    def function():
        pass

    function.__doc__ = docstring
    return function


@pytest.mark.parametrize(
    ("docstring", "what"),
    [
        (None, "no example"),
        ("Does it.", "no example"),
        ("Does it.\n\nExample::\n\n    f()\n", "no example"),
        ("Does it.\n\nExample:\n    >>> 1\n    1\n\nRaises:\n    It.\n", "'Raises:' follows"),
        ("Does it.\n\n>>> 1\n1\n\nExample:\n    >>> 1\n    1\n", "outside of the example"),
        ("Does it.\n\nExample:\n" + "    >>> 1\n    1\n" * 7, "is long"),
        ("Does it.\n\nExample:\n    >>> 1 + 1\n    3\n", "- 3"),
        ("Does it.\n\nExample:\n    >>> 1 / 0\n    0\n", "ZeroDivisionError"),
        ("Does it.\n\nExample:\n    >>> x = 1\n", "shows no output"),
        ("Does it.\n\nExample:\n    f() gives 1\n", "shows no output"),
        (
            "Does it.\n\nExample:\n    >>> import warnings\n    >>> warnings.warn('w')\n    >>> 1\n"
            "    1\n",
            "UserWarning: w",
        ),
    ],
    ids=lambda value: value if value and "\n" not in value else "",
)  # fmt: skip
def test_what_is_wrong_with_an_example_is_noticed(docstring, what):
    with pytest.raises((AssertionError, pytest.fail.Exception), match=re.escape(what)):
        run("a", example_of(documented(docstring)))


def test_a_docstring_of_the_class_above_is_none():
    class Silent(tp.Owner):
        pass

    with pytest.raises(AssertionError, match="no example"):
        example_of(Silent)
