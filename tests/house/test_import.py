"""``import tiedparam``: what it enters at once, and what when it is first asked for."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

import tiedparam as tp
from tests.support import ROOT


def names_for_type_checkers() -> dict[str, str]:
    """The names that are imported for type checkers alone, and from where."""
    source = (ROOT / "tiedparam" / "__init__.py").read_text(encoding="utf-8")
    (block,) = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    return {alias.name: node.module for node in block.body for alias in node.names}


def test_type_checkers_and_python_find_the_same_names():
    assert names_for_type_checkers() == {**tp._LATER, "testing": "tiedparam"}
    assert len(tp._LATER) > 10
    for name in tp.__all__:
        assert getattr(tp, name) is not None
    assert set(tp.__all__) <= set(dir(tp))


def test_what_there_is_not_is_said_as_by_any_module():
    with pytest.raises(AttributeError, match=r"module 'tiedparam' has no attribute 'register'"):
        tp.register  # noqa: B018
    assert not hasattr(tp, "nothing")


def test_an_import_enters_neither_whole_models_nor_files():
    code = (
        "import sys, tiedparam as tp; rooms = lambda: {m.split('.')[1] for m in sys.modules if "
        "m.startswith('tiedparam.')}; "
        "print(sorted({'model', 'files', 'cli', 'testing'} & rooms())); tp.tie_model; "
        "from tiedparam import save; print(sorted({'model', 'files'} & rooms()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split("\n")[:2] == ["[]", "['files', 'model']"]


def test_the_contract_is_there_when_it_is_first_asked_for_and_needs_no_test_library():
    code = (
        "import sys, tiedparam as tp; print('testing' in dir(tp), tp.testing.check_rule.__name__, "
        "sorted({'pytest', 'hypothesis', 'safetensors', 'numpy.testing'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "True check_rule []\n"
