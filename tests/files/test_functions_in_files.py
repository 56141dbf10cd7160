"""Functions of copies in files: saved by name, and resolved only where the reader allows it."""

from __future__ import annotations

import functools
import importlib
import json
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiedparam as tp
from tiedparam.__main__ import main
from tiedparam.cli.model_from_file import open_model
from tiedparam.laws import Linked, Orbits

MODULE = """
from pathlib import Path

import torch

Path({seen!r}).touch()  # what an import leaves behind


def tile(weight):
    return weight.repeat(2, 2) / 2


class Tools:
    @staticmethod
    def tile(weight):
        return weight.repeat(2, 2) / 4
"""


def build():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(6, 8))


def tied(function):
    model = build()
    tp.register_tie(model[1], "copy", source=model[0], fn=function)
    return model


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's, and what its import leaves behind."""
    (tmp_path / "my_functions.py").write_text(MODULE.format(seen=str(tmp_path / "imported")))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("my_functions", None)  # the docs have one as well
    yield importlib.import_module("my_functions")
    sys.modules.pop("my_functions", None)


def forget(tmp_path):
    """As in another process, which never imported the module."""
    del sys.modules["my_functions"]
    (tmp_path / "imported").unlink()


@pytest.mark.feature(
    "Copies and files",
    "`copy` with a function of one's own, saved as `module:name`, loaded with `functions=`",
)
def test_a_function_of_ones_own_is_saved_by_name_and_loads_where_it_is_allowed(mine, tmp_path):
    for name, function in (
        ("my_functions:tile", mine.tile),
        ("my_functions:Tools.tile", mine.Tools.tile),
    ):
        model, path = tied(function), tmp_path / "tied.safetensors"
        tp.save(model, path)
        loaded = tp.load(path, nn.Sequential(nn.Linear(3, 4), nn.Linear(6, 8)),
                         functions={name: function})  # fmt: skip
        assert tp.get_tie(loaded[1]).fn is function
        assert torch.equal(loaded[1].weight, function(model[0].weight))
        assert torch.equal(loaded[1].bias, model[1].bias)
        offline = open_model(path, functions={name: function})
        assert torch.equal(getattr(offline, "1").weight, model[1].weight)
    moved = tp.load(path, build(), functions={name: lambda weight: mine.Tools.tile(weight)})
    assert torch.equal(moved[1].weight, model[1].weight)  # the reader says what the name means


def test_a_function_of_a_script_is_loaded_where_it_is_passed(mine, tmp_path, monkeypatch):
    """Saved by a script that was run, it is called __main__:tile; no module has it later."""

    def tile(weight):
        return mine.tile(weight)

    tile.__module__, tile.__qualname__ = "__main__", "tile"
    monkeypatch.setattr(sys.modules["__main__"], "tile", tile, raising=False)
    path = tmp_path / "tied.safetensors"
    model = tied(tile)
    with pytest.warns(tp.TieWarning, match="the function '__main__:tile', which a script.*module"):
        tp.save(model, path)
    monkeypatch.undo()
    with pytest.raises(tp.TieError, match="in the shell, a script cannot be imported: save it"):
        tp.load(path, build())
    loaded = tp.load(path, build(), functions={"__main__:tile": mine.tile})
    assert torch.equal(loaded[1].weight, model[1].weight)


class OfAScript(Orbits):
    """A law that is registered under a name while a test runs."""

    law = "W = flip(W)"

    def symmetries(self, weight):
        yield weight.flip(1)


@pytest.fixture
def law_of_a_script(registry, monkeypatch):
    monkeypatch.setattr(OfAScript, "__module__", "__main__")
    tp.register_rule("of_a_script")(OfAScript)
    return "of_a_script"


def test_a_law_of_a_script_is_told_when_it_is_saved(law_of_a_script, mine, tmp_path):
    path = tmp_path / "tied.safetensors"
    flipped = nn.Sequential(tp.register_tie(nn.Linear(4, 4), law_of_a_script))
    both = [("row_repeat", {"groups": 2}), law_of_a_script]
    together = nn.Sequential(tp.register_tie(nn.Linear(4, 4), both))
    for model in (flipped, together):
        with pytest.warns(tp.TieWarning, match=r"the law 'of_a_script', which a script") as caught:
            tp.save(model, path)
        assert len(caught) == 1
        assert tp.get_tie(tp.load(path, nn.Sequential(nn.Linear(4, 4)))[0]).law
        path.unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(tp.TieWarning):
                tp.save(model, path)
        assert not path.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tp.save(tied(mine.tile), path)


def test_a_plan_that_names_what_a_script_has_says_so(law_of_a_script, mine, tmp_path, monkeypatch):
    def tile(weight):
        return mine.tile(weight)

    tile.__module__, tile.__qualname__ = "__main__", "tile"
    monkeypatch.setattr(sys.modules["__main__"], "tile", tile, raising=False)
    copied = ("copy", {"source": "0", "fn": tile})
    law, function = "the law 'of_a_script'", "the function '__main__:tile'"
    for plan, names in (
        ({"0": law_of_a_script}, law),
        ({"1": copied}, function),
        ({"0": [law_of_a_script, "row_repeat"], "1": copied}, f"{function} and {law}"),
    ):
        with pytest.warns(tp.TieWarning, match=f"the file will name {names}, which"):
            tp.write_plan(plan, tmp_path / "plan.toml")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tp.write_plan({"1": ("copy", {"source": "0", "fn": mine.tile})}, tmp_path / "plan.toml")


def test_a_files_say_so_imports_nothing(mine, tmp_path):
    path = tmp_path / "tied.safetensors"
    tp.save(tied(mine.tile), path)
    other = mine.Tools.tile
    forget(tmp_path)
    for functions in (None, {}, {"my_functions:tail": other}, {"tile": other}):
        model = build()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(
            tp.TieError,
            match=r"'1.weight' was saved tied by 'copy': its function 'my_functions:tile' is code, "
            r"and a file holds no code.*functions=\{'my_functions:tile': the function\}",
        ):
            tp.load(path, model, functions=functions)
        assert not tp.is_tied(model[1])
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(tp.TieError, match="in the shell, --import my_functions"):
        open_model(path)
    assert "my_functions" not in sys.modules
    assert not (tmp_path / "imported").exists()


def test_a_module_that_is_imported_already_is_not_looked_into_either(mine, tmp_path):
    tp.save(tied(mine.tile), tmp_path / "tied.safetensors")
    with pytest.raises(tp.TieError, match="pass functions="):
        tp.load(tmp_path / "tied.safetensors", build())


def test_a_model_that_is_tied_by_the_function_needs_no_leave(mine, tmp_path):
    model, path = tied(mine.tile), tmp_path / "tied.safetensors"
    tp.save(model, path)
    again = tied(mine.tile)
    again[0].weight.data.zero_()
    assert torch.equal(tp.load(path, again)[1].weight, model[1].weight)
    for other in (mine.Tools.tile, lambda weight: mine.tile(weight)):
        with pytest.raises(tp.TieError, match="its function 'my_functions:tile' is code"):
            tp.load(path, tied(other))
        with pytest.raises(tp.TieError, match="Tie it as it was saved, or leave it untied"):
            tp.load(path, tied(other), functions={"my_functions:tile": mine.tile})


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.relu, "torch:relu"),
        (torch.square, "torch.square"),
        (torch.t, "torch.t"),
        (F.relu, "torch.nn.functional:relu"),
        (F.gelu, "torch._C._nn:gelu"),
    ],
)
def test_functions_of_torch_have_names(function, name, tmp_path):
    model, path = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), tmp_path / "m.safetensors"
    tp.register_tie(model[1], "copy", source=model[0], fn=function)
    tp.save(model, path)
    fresh = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    loaded = tp.load(path, fresh, functions={name: function} if ":" in name else None)
    assert torch.equal(loaded[1].weight, function(model[0].weight))


class Tiling:
    def __call__(self, weight):
        return weight.repeat(2, 2)

    def method(self, weight):
        return weight.repeat(2, 2)


def renamed(weight):
    return weight.repeat(2, 2)


original, renamed = renamed, None


@pytest.mark.feature(
    "Copies and files",
    "saving a `copy` whose function is a lambda, a partial or a bound method",
    refused="it has no name; write it with `def` at the top of a module",
)
@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda weight: weight.repeat(2, 2), "'<lambda>', a lambda"),
        (functools.partial(torch.tile, dims=(2, 2)), "'partial', a partial"),
        (Tiling(), "'Tiling', an object of the class Tiling"),
        (Tiling().method, "'method', a bound method"),
        (original, "'renamed', which its module does not have under that name"),
    ],
)
def test_a_function_without_a_name_is_refused_with_the_way_out(function, kind, tmp_path):
    with pytest.raises(tp.TieError, match="cannot save the tie of '1.weight'") as caught:
        tp.save(tied(function), tmp_path / "file")
    assert f"a file cannot name its function {kind}. Write it with def at the top" in str(
        caught.value
    )
    assert not list(tmp_path.iterdir())


def test_a_closure_is_refused(tmp_path):
    def closure(weight):
        return weight.repeat(2, 2)

    with pytest.raises(tp.TieError, match="'closure', which was defined inside another function"):
        tp.save(tied(closure), tmp_path / "file")


def test_what_functions_takes(tmp_path):
    tp.save(build(), tmp_path / "file")
    for wrong in (torch.relu, [torch.relu], {"a": 3}, {3: torch.relu}):
        with pytest.raises(TypeError, match="functions= takes a mapping of the names"):
            tp.load(tmp_path / "file", build(), functions=wrong)


def test_a_plan_names_functions_the_same_way(mine, tmp_path):
    for name in ("plan.toml", "plan.json"):
        plan = {"1": ("copy", {"source": "0", "fn": mine.tile})}
        tp.write_plan(plan, tmp_path / name)
        with pytest.raises(tp.TieError, match="its function 'my_functions:tile' is code"):
            tp.read_plan(tmp_path / name)
        read = tp.read_plan(tmp_path / name, functions={"my_functions:tile": mine.tile})
        model = build()
        tp.tie_model(model, read)
        assert tp.get_tie(model[1]).fn is mine.tile


def test_a_plan_names_the_functions_of_any_law(mine, registry, tmp_path):
    @tp.register_rule("test_mapped")
    class Mapped(Linked):
        law = "W = of(A.W)"
        functions = ("of",)

        def __init__(self, source, source_name=None, of=torch.t):
            super().__init__(source, source_name)
            self.of = of

        def forward(self, source):
            return self.of(source)

    for name in ("plan.toml", "plan.json"):
        tp.write_plan({"1": ("test_mapped", {"source": "0", "of": mine.tile})}, tmp_path / name)
        with pytest.raises(tp.TieError, match="its function 'my_functions:tile' is code"):
            tp.read_plan(tmp_path / name)
        model = build()
        tp.tie_model(
            model, tp.read_plan(tmp_path / name, functions={"my_functions:tile": mine.tile})
        )
        assert tp.get_tie(model[1]).of is mine.tile
    unknown = {"layers": "1", "rule": "test_mapped", "options": {"source": "0", "of": "torch.s"}}
    (tmp_path / "plan.json").write_text(json.dumps({"tie": [unknown]}))
    with pytest.raises(tp.TieError, match=r"of='torch.s' is not a known function"):
        tp.read_plan(tmp_path / "plan.json")


def test_the_shell_allows_what_it_imports(mine, tmp_path, capsys):
    path, out = tmp_path / "tied.safetensors", tmp_path / "dense.safetensors"
    model = tied(mine.tile)
    tp.save(model, path)
    forget(tmp_path)
    assert main(["untie", str(path), "-o", str(out)]) == 1
    assert "--import my_functions" in capsys.readouterr().err
    assert "my_functions" not in sys.modules
    assert main(["untie", str(path), "-o", str(out), "--import", "my_functions"]) == 0
    assert torch.equal(tp.load(out, build())[1].weight, model[1].weight)
    tie = "1=copy:source=0,fn=my_functions:tile"
    tied_again = tmp_path / "again.safetensors"
    command = ["tie", str(out), "--tie", tie, "-o", str(tied_again), "--import", "my_functions"]
    assert main(command) == 0
    capsys.readouterr()
    with_plan = tmp_path / "plan.toml"
    imported = sys.modules["my_functions"]
    tp.write_plan({"1": ("copy", {"source": "0", "fn": imported.tile})}, with_plan)
    command = ["tie", str(out), "--plan", str(with_plan), "--dry-run", "--json"]
    assert main([*command, "--import", "my_functions"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["rule"], row["residual"]) == ("copy(fn='tile') of 0.weight", 0.0)


def test_s27_the_way_out_of_one_refusal_is_not_refused_by_another(mine, tmp_path, registry):
    """A law that reads a layer is sent to `copy` with fn=, and that is saved."""

    @tp.register_rule("tile_copy")
    class Tile(tp.Rule):
        law = "W = tile(source.W)"

        def __init__(self, source):
            super().__init__()
            self.source = source

        def options(self):
            return {"source": self.source}

        def free_shapes(self):
            return ()

        def forward(self):
            return mine.tile(self.source.weight)

        def right_inverse(self, weight):
            return ()

    model = build()
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    with pytest.raises(
        tp.TieError, match=r"it holds the layer 'source'.*'copy' with source= and fn="
    ):
        tp.register_tie(model[1], "tile_copy", source=model[0], root=model)
    assert [(type(m), dict(m.__dict__)) for m in model.modules()] == before
    tp.register_tie(model[1], "copy", source=model[0], fn=mine.tile)
    tp.save(model, tmp_path / "file")
    tp.load(tmp_path / "file", build(), functions={"my_functions:tile": mine.tile})


# Rules that keep more than free values -----------------------------------------------------


def clustered(registry_name, keep):
    """pytorch/ao#4557: weight clustering, with an index table that ``keep`` stores in the rule."""

    @tp.register_rule(registry_name)
    class Clustered(tp.Rule):
        law = "W = codebook[index]"

        def __init__(self, index):
            super().__init__()
            keep(self, torch.as_tensor(index))

        def options(self):
            return {"index": self.index.tolist()}

        def free_shapes(self):
            return ((int(self.index.max()) + 1,),)

        def forward(self, book):
            return book[self.index.long()]

        def symmetries(self, weight):
            yield weight

    return Clustered


def as_buffer(rule, index):
    rule.register_buffer("index", index)


def as_parameter(rule, index):
    rule.index = nn.Parameter(index.double(), requires_grad=False)


def in_a_layer(rule, index):
    rule.table = nn.Module()
    rule.table.register_buffer("index", index)
    type(rule).index = property(lambda self: self.table.index)


def as_plain_buffer(rule, index):
    rule.register_buffer("index", index, persistent=False)


def as_attribute(rule, index):
    rule.index = index


INDEX = (torch.arange(16).reshape(4, 4) % 3).tolist()


@pytest.mark.feature(
    "Copies and files",
    "a rule with a persistent buffer, a Parameter or a layer of its own",
    refused="no file would give it back; say it in `options()`, or read another layer by `copy`",
)
@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (as_buffer, r"it keeps 'index' of its own.*options\(\).*persistent=False"),
        (as_parameter, "it keeps 'index' of its own"),
        (in_a_layer, "it holds the layer 'table'"),
    ],
)
def test_a_rule_that_keeps_what_no_file_gives_back_is_refused(keep, message, registry):
    clustered("clustered", keep)
    model = nn.Sequential(nn.Linear(4, 4))
    before = dict(model[0].__dict__), dict(model[0]._parameters)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(tp.TieError, match=message):
        tp.register_tie(model[0], "clustered", index=INDEX, optimizer=optimizer)
    assert type(model[0]) is nn.Linear
    assert (dict(model[0].__dict__), dict(model[0]._parameters)) == before
    assert optimizer.param_groups[0]["params"][0] is model[0].weight
    with pytest.raises(tp.TieError, match=message):
        tp.tie_model(model, {"0": ("clustered", {"index": INDEX})})


@pytest.mark.parametrize("keep", [as_plain_buffer, as_attribute])
def test_the_same_rule_with_its_table_as_an_option_saves_and_loads(keep, registry, tmp_path):
    clustered("clustered", keep)
    model = nn.Sequential(tp.register_tie(nn.Linear(4, 4), "clustered", index=INDEX))
    tp.save(model, tmp_path / "file")
    loaded = tp.load(tmp_path / "file", nn.Sequential(nn.Linear(4, 4)))
    assert torch.equal(loaded[0].weight, model[0].weight)
    loaded.load_state_dict(tp.dense_state_dict(model))
    assert torch.equal(loaded[0].weight, model[0].weight)
