"""``import tiedparam``: what it enters at once, and what when it is first asked for."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys

import pytest
from torch import nn

import tiedparam as tp
from tests.support import ROOT


def names_for_type_checkers(package: str) -> dict[str, str]:
    """The names that are imported for type checkers alone, and from where."""
    source = (ROOT / package / "__init__.py").read_text(encoding="utf-8")
    (block,) = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    return {alias.name: node.module for node in block.body for alias in node.names}


def test_type_checkers_and_python_find_the_same_names():
    places = {name: f"tiedparam.{place}" for name, place in tp._PLACES.items()}
    rooms = dict.fromkeys(tp._ROOMS, "tiedparam")
    assert names_for_type_checkers("tiedparam") == {**places, **rooms}
    assert {*tp._PLACES, "__version__"} == set(tp.__all__)
    for name in tp.__all__:
        assert getattr(tp, name) is not None
    assert set(tp.__all__) <= set(dir(tp))


def test_type_checkers_and_python_find_the_same_names_of_laws():
    places = {name: f"tiedparam.{place}" for name, place in tp.laws._PLACES.items()}
    assert names_for_type_checkers("tiedparam/laws") == places
    assert set(tp.laws.__all__) == set(places) == set(dir(tp.laws))
    for name in tp.laws.__all__:
        assert getattr(tp.laws, name) is not None


def test_what_there_is_not_is_said_as_by_any_module():
    for package, name in ((tp, "tiedparam"), (tp.laws, "tiedparam.laws")):
        with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'register'"):
            package.register  # noqa: B018
        assert not hasattr(package, "nothing")


def said_by(code: str) -> list[str]:
    """What a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.splitlines()


def test_an_import_enters_no_room_and_a_name_those_that_it_needs():
    code = (
        "import sys, tiedparam as tp; rooms = lambda: {m.split('.')[1] for m in sys.modules if "
        "m.startswith('tiedparam.')}; "
        "print(sorted(rooms()), 'torch' in sys.modules); tp.register_tie; "
        "print(sorted({'model', 'files', 'cli', 'testing', 'rules'} & rooms())); tp.tie_model; "
        "from tiedparam import save; print(sorted({'model', 'files', 'rules'} & rooms()))"
    )
    assert said_by(code) == ["['_version'] False", "[]", "['files', 'model']"]


def test_a_name_imports_no_form_and_no_kind_of_law_that_ties_do_not_need():
    code = (
        "import sys, tiedparam as tp; tp.register_tie; ours = {m.removeprefix('tiedparam.') for m "
        "in sys.modules}; print(sorted({'laws.broadcast', 'products.windows'} & ours)); "
        "from tiedparam.laws import Broadcast; print(Broadcast.__module__)"
    )
    assert said_by(code) == ["[]", "tiedparam.laws.broadcast"]


def test_a_tie_imports_its_law_and_no_others_and_nothing_of_files():
    code = (
        "import sys, torch, tiedparam as tp; tp.register_tie(torch.nn.Linear(4, 4), 'symmetric'); "
        "ours = [m.split('.') for m in sys.modules if m.startswith('tiedparam.')]; "
        "print(sorted(m[2] for m in ours if m[1] == 'rules' and m[2:])); "
        "print(sorted({'cli', 'files', 'formats', 'model', 'testing'} & {m[1] for m in ours})); "
        "print(len(ours) <= 110, 'torch._dynamo' in sys.modules, 'numpy.testing' in sys.modules)"
    )
    assert said_by(code) == ["['flip_sym', 'symmetric']", "[]", "True False False"]


def test_what_is_listed_is_what_is_public():
    code = "import tiedparam as tp; tp.register_tie; print(*dir(tp))"
    assert said_by(code) == [" ".join(sorted({*tp.__all__, *tp._ROOMS}))]


ALL = len(tp.rules.CLASSES)


ASKED = [
    f"print(len(tp.available_rules()) == {ALL})",
    f"from tiedparam.laws import available_rules; print(len(available_rules()) == {ALL})",
    "print(tp.register_tie(torch.nn.Linear(4, 4), 'flip_sym').weight.shape == (4, 4))",
    "print(tp.residual(torch.nn.Linear(4, 4), 'symmetric') > 0)",
    "print(tp.tie_model(torch.nn.Linear(4, 4), {'': 'flip_sym'}) is not None)",
    "print(tp.scan(torch.nn.Linear(4, 4)) is not None)",
    "print(tp.rules.FlipSym.name == 'flip_sym' and issubclass(tp.laws.Coded, tp.Rule))",
    "from tiedparam.rules.flip_sym import FlipSym; print(FlipSym.name == 'flip_sym')",
    # a name of ours is taken before anything of ours was imported
    "try: tp.register_rule('flip_sym')(type('Mine', (tp.Rule,), {}))\n"
    "except tp.TieError as error: print('belongs to' in str(error))",
]


def test_every_law_is_known_to_whoever_asks_first():
    # torch is imported once; each question is asked in a process that has seen no other
    code = f"""
import os, sys, torch, tiedparam as tp
for ask in {ASKED!r}:
    if not (child := os.fork()):
        print(ask, end=": ")
        exec(ask)
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""
    assert said_by(code) == "\n".join(f"{ask}: True" for ask in ASKED).splitlines()


def test_a_pickle_needs_no_import():
    pickled = pickle.dumps(tp.register_tie(nn.Linear(4, 4), "flip_sym"))
    code = f"import pickle; layer = pickle.loads({pickled!r}); import tiedparam as tp; "
    assert said_by(code + "print(tp.get_tie(layer).name, layer.weight.shape)") == [
        "flip_sym torch.Size([4, 4])"
    ]


def test_a_star_imports_all_that_is_public():
    code = "from tiedparam import *; import tiedparam; print(set(tiedparam.__all__) - set(dir()))"
    assert said_by(code) == ["set()"]


def test_a_name_is_fetched_once():
    code = "import tiedparam as tp; first = tp.frozen; print(vars(tp)['frozen'] is first)"
    assert said_by(code) == ["True"]


def test_the_contract_is_there_when_it_is_first_asked_for_and_needs_no_test_library():
    code = (
        "import sys, tiedparam as tp; print('testing' in dir(tp), tp.testing.check_rule.__name__, "
        "sorted({'pytest', 'hypothesis', 'safetensors', 'numpy.testing'} & set(sys.modules)))"
    )
    assert said_by(code) == ["True check_rule []"]
