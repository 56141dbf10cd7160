"""A copy and its source stay one, whatever becomes of the source: cloned, resized, computed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import tiedparam as tp
from tests.support import older_than

X = torch.linspace(-1, 1, 20).reshape(5, 4)


def pair(**options) -> nn.Sequential:
    """Two layers, the second a copy of the first."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    tp.register_tie(model[2], "copy", **{"source": "0", "root": model, **options})
    return model


# Shallow clones, as the meta-learning libraries make them ------------------------------------


def clone(module: nn.Module) -> nn.Module:
    """Everything by reference but the tables and the parameters, which stay in the graph."""
    new = module.__new__(type(module))
    new.__dict__ = dict(module.__dict__)
    new._parameters = {k: p if p is None else p.clone() for k, p in module._parameters.items()}
    new._modules = {k: clone(m) for k, m in module._modules.items()}
    return new


def memoizing_clone(module: nn.Module, memo: dict | None = None) -> nn.Module:
    """The same as learn2learn does it: what several layers share is cloned once, and recurrent
    layers are run through ``_apply``.
    """
    memo = {} if memo is None else memo
    new = module.__new__(type(module))
    new.__dict__ = module.__dict__.copy()
    new._buffers = module._buffers.copy()
    new._parameters = {
        key: None if value is None else memo.setdefault(id(value), value.clone())
        for key, value in module._parameters.items()
    }
    new._modules = {key: memoizing_clone(m, memo) for key, m in module._modules.items()}
    return new._apply(lambda value: value) if hasattr(new, "flatten_parameters") else new


clones = pytest.mark.parametrize("cloned", [clone, memoizing_clone], ids=["bare", "learn2learn"])


def stored(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Every tensor that a clone's tables hold, with its place."""
    return [(m, k, p) for m in module.modules() for k, p in m._parameters.items() if p is not None]


def adapted(module: nn.Module, x: Tensor, target: Tensor, rate: float = 0.5) -> None:
    """One step of the inner loop of MAML, in the graph."""
    held = stored(module)
    loss = (module(x) - target).square().mean()
    gradients = torch.autograd.grad(loss, [p for *_, p in held], create_graph=True)
    for (holder, key, value), gradient in zip(held, gradients, strict=True):
        holder._parameters[key] = value - rate * gradient


@pytest.mark.feature(
    "Copies and files",
    "shallow clones of a model, as learn2learn makes them (MAML), with a copy in it",
    limit="the tie must know its model (`root=`), and the clone hold both ends",
)
@clones
def test_s43_a_copy_in_a_shallow_clone_reads_the_clones_source(cloned):
    model = pair()
    learner = cloned(model)
    adapted(learner, X, X)
    assert torch.equal(learner[2].weight, learner[0].weight)
    assert not torch.equal(learner[2].weight, model[0].weight)
    assert torch.equal(model[2].weight, model[0].weight)
    # the oracle: the same step by functional_call, on a model that shares the Parameter
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    plain[2].weight = plain[0].weight
    plain.load_state_dict(tp.dense_state_dict(model))
    values = dict(plain.named_parameters())
    loss = (plain(X) - X).square().mean()
    gradients = torch.autograd.grad(loss, values.values(), create_graph=True)
    step = {k: v - 0.5 * g for (k, v), g in zip(values.items(), gradients, strict=True)}
    torch.testing.assert_close(learner(X), torch.func.functional_call(plain, step, (X,)))
    # the outer loop: gradients through the step arrive in the original's parameters
    learner(X).square().sum().backward()
    torch.func.functional_call(plain, step, (X,)).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad)


@clones
def test_s43_a_clone_of_a_clone_and_a_copied_clone(cloned):
    learner = cloned(cloned(pair()))
    with torch.no_grad():
        learner[0]._parameters["weight"].fill_(0.25)
    assert learner(X).isfinite().all()
    assert learner[2].weight.eq(0.25).all()
    detached = cloned(learner)
    for holder, key, value in stored(detached):
        holder._parameters[key] = nn.Parameter(value.detach())
    replica = copy.deepcopy(detached)
    with torch.no_grad():
        replica[0].weight.fill_(2)
    assert replica[2].weight.eq(2).all()
    assert detached[2].weight.eq(0.25).all()


@clones
def test_s43_deep_in_a_model_and_through_a_chain_of_copies(cloned):
    model = nn.ModuleDict({"a": pair(), "b": nn.Sequential(nn.Linear(4, 4))})
    tp.register_tie(model["b"][0], "squared_copy", source="a.2", root=model)
    learner = cloned(model)
    learner["a"][0]._parameters["weight"] = torch.full((4, 4), 3.0)
    assert learner["b"][0].weight.eq(9).all()
    assert learner["a"][2].weight.eq(3).all()
    assert torch.equal(model["b"][0].weight, model["a"][0].weight ** 2)


@pytest.mark.parametrize("way", ["remove_tie", "untie_model", "dense_state_dict", "save"])
@clones
def test_s43_leaving_the_tie_in_a_clone_leaves_the_original_alone(cloned, way, tmp_path):
    model = tied_head()
    learner = cloned(model)
    learner["embed"]._parameters["weight"] = nn.Parameter(torch.full((6, 4), 0.5))
    if way == "save":
        tp.save(learner, tmp_path / "model.safetensors")
        fresh = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
        weight = tp.load(tmp_path / "model.safetensors", fresh)["head"].weight
    elif way == "dense_state_dict":
        weight = tp.dense_state_dict(learner)["head.weight"]
    else:
        WAYS_OUT[way](learner)
        weight = learner["head"].weight
    assert weight.eq(0.5).all()
    assert tp.is_tied(model["head"])
    assert torch.equal(model["head"].weight, model["embed"].weight)
    assert len(model["embed"]._load_state_dict_post_hooks) == 1


@pytest.mark.parametrize("alone", [True, False])
@clones
def test_s43_a_recurrent_layer_in_a_clone(cloned, alone):
    layer = tp.register_tie(nn.LSTM(4, 4), "row_repeat", "weight_ih_l0", groups=4)
    learner = cloned(layer) if alone else cloned(nn.Sequential(layer))[0]
    for holder, key, value in stored(learner):
        holder._parameters[key] = value * 0.5 + 0.1
    names = [name for name, _ in nn.LSTM(4, 4).named_parameters()]
    twin = nn.LSTM(4, 4)
    twin.load_state_dict({name: getattr(learner, name).detach() for name in names})
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(learner(x)[0], twin(x)[0])
    assert not torch.allclose(learner(x)[0], layer(x)[0])


@pytest.mark.parametrize("read_before", [False, True])
def test_s43_a_pickled_clone_reads_its_own_source(read_before):
    model = pair()
    replica = clone(model)
    for holder, key, value in stored(replica):
        holder._parameters[key] = nn.Parameter(value.detach())
    if read_before:
        replica(X)
    again = pickle.loads(pickle.dumps(replica))
    with torch.no_grad():
        again[0].weight.add_(1)
    assert torch.equal(again[2].weight, again[0].weight)
    assert torch.equal(replica[2].weight, replica[0].weight)
    assert not torch.equal(again[2].weight, model[2].weight)


def test_s43_a_clone_whose_source_is_not_known_raises():
    unknown = clone(pair(root=None, source=nn.Linear(4, 4)))
    alone = clone(pair()[2])  # the source was not cloned with it
    for use in (lambda: unknown(X), lambda: unknown[2].weight, lambda: alone(X)):
        with pytest.raises(tp.TieError, match="shallow clone.*root=model.*functional_call"):
            use()


def test_s43_compiled_clones_read_their_own_source_or_raise():
    learner = clone(pair())
    said = "TieError" if older_than("2.9") else "shallow clone"
    with pytest.raises(Exception) as raised:  # noqa: PT011
        torch.compile(learner, backend="eager", fullgraph=True)(X)
    assert said in f"{raised.value} {raised.value.__cause__}"
    learner[0]._parameters["weight"] = torch.full((4, 4), 3.0)
    with torch.no_grad():
        of_clone = torch.compile(clone(learner), backend="eager")
        if older_than("2.7"):  # which resumes inside of the function that is to refuse
            with pytest.raises(tp.TieError, match=r"shallow clone\. Call it once"):
                of_clone(X)
        else:
            torch.testing.assert_close(of_clone(X), learner(X))
    expected = learner(X)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(learner, backend="eager", fullgraph=True)(X), expected)


LAYERS = [
    (lambda: nn.Linear(8, 8), "row_repeat", {"groups": 2}, (5, 8)),
    (lambda: nn.Linear(8, 8), "flip_sym", {}, (5, 8)),
    (lambda: nn.Conv2d(8, 8, 3), "channel_shared", {"over": "in"}, (2, 8, 6, 6)),
    (lambda: nn.Conv2d(8, 8, 3), "channel_shared", {"over": "out"}, (2, 8, 6, 6)),
    (lambda: nn.Conv1d(4, 8, 3, groups=4), "channel_shared", {"over": "groups"}, (2, 4, 9)),
    (lambda: nn.Conv2d(8, 8, 3), "flip_sym", {}, (2, 8, 6, 6)),
]


@pytest.mark.parametrize(("build", "rule", "options", "shape"), LAYERS)
@pytest.mark.parametrize("mode", ["train", "eval", "cache", "frozen"])
@clones
def test_s43_other_laws_in_a_shallow_clone_use_its_free_values(
    cloned, build, rule, options, shape, mode
):
    torch.manual_seed(0)
    layer = tp.register_tie(build(), rule, cache=mode == "cache", **options)
    layer.train(mode == "train")
    x = torch.randn(shape)
    with torch.set_grad_enabled(mode == "train"):
        layer(x)  # whatever is kept of the original's weight is kept now
        learner = cloned(layer)
        for holder, key, value in stored(learner):
            holder._parameters[key] = value * 0.5 + 0.25
        twin = build()
        twin.load_state_dict({"weight": learner.weight.detach(), "bias": learner.bias.detach()})
        torch.testing.assert_close(learner(x), twin(x))
        if mode == "frozen":
            with tp.frozen(layer):
                torch.testing.assert_close(learner(x), twin(x))
                inner = cloned(layer)
                for holder, key, value in stored(inner):
                    holder._parameters[key] = value * 0.5 + 0.25
                torch.testing.assert_close(inner(x), twin(x))
        assert not torch.allclose(learner(x), layer(x))


# Resized sources ---------------------------------------------------------------------------


def tied_head() -> nn.ModuleDict:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    tp.register_tie(model["head"], "copy", source="embed", root=model)
    return model


def by_parameter(layer: nn.Module, rows: int) -> None:
    layer.weight = nn.Parameter(torch.randn(rows, 4))


def by_data(layer: nn.Module, rows: int) -> None:  # as transformers does
    layer.weight.data = torch.randn(rows, 4)


resizes = pytest.mark.parametrize("resize", [by_parameter, by_data])
sizes = pytest.mark.parametrize("rows", [9, 3])
WAYS_OUT = {
    "remove_tie": lambda model: tp.remove_tie(model["head"]),
    "untie_model": tp.untie_model,
    "remove_parametrizations": lambda model: parametrize.remove_parametrizations(
        model["head"], "weight"
    ),
}


@pytest.mark.feature(
    "Copies and files",
    "untying and exporting a copy whose source was resized",
    limit="it has the source's size then, with a `TieWarning`",
)
@resizes
@sizes
@pytest.mark.parametrize("way", WAYS_OUT)
def test_s44_every_way_out_of_a_resized_tie_is_open(resize, rows, way):
    model = tied_head()
    resize(model["embed"], rows)
    with pytest.raises(tp.TieError, match=rf"\({rows}, 4\) now.*register_tie\(layer, 'copy', sou"):
        model["head"](X)
    dense = tp.dense_state_dict(model)
    assert torch.equal(dense["head.weight"], model["embed"].weight)
    if way == "remove_parametrizations":
        WAYS_OUT[way](model)
    else:
        message = rf"tied as \(6, 4\).*\({rows}, 4\) now"
        with pytest.warns(tp.TieWarning, match=message) as caught:
            WAYS_OUT[way](model)
        assert way == "untie_model" or caught[0].filename == __file__
        assert model["head"].out_features == rows
    assert type(model["head"]) is nn.Linear
    assert torch.equal(model["head"].weight, model["embed"].weight)
    assert model["head"].weight is not model["embed"].weight
    assert model["head"](X).shape == (5, rows)


@resizes
@sizes
def test_s44_one_call_renews_the_tie(resize, rows):
    model = tied_head()
    replaced = tp.get_tie(model["head"])  # lives on, and leaves the source nevertheless
    resize(model["embed"], rows)
    tp.register_tie(model["head"], "copy", source="embed", root=model)
    assert tp.get_tie(model["head"]) is not replaced
    assert model["head"].out_features == rows
    model["head"](X).square().sum().backward()
    assert torch.equal(model["head"].weight, model["embed"].weight)
    assert list(model.state_dict()) == ["embed.weight"]
    assert len(model["embed"]._load_state_dict_post_hooks) == 1  # the old tie's is gone
    with pytest.raises(tp.TieError, match="tied by 'copy' already"):
        tp.register_tie(model["head"], "copy", source="embed", root=model)


@resizes
def test_s44_a_tie_whose_ends_were_both_resized_goes_along(resize):
    model = tied_head()
    resize(model["embed"], 9)
    model["head"].out_features = 9
    assert model["head"](X).shape == (5, 9)
    assert torch.equal(model["head"].weight, model["embed"].weight)
    tp.remove_tie(model["head"])
    assert model["head"](X).shape == (5, 9)


def test_s44_assigning_what_it_copies_renews_the_tie():
    model = tied_head()
    by_data(model["embed"], 9)
    model["head"].weight = model["embed"].weight
    assert model["head"](X).shape == (5, 9)
    assert model["head"].out_features == 9


def test_s44_a_file_is_written_of_what_can_be_loaded_again(tmp_path):
    model = tied_head()
    by_data(model["embed"], 9)
    for write in (tp.save, tp.export_dense):
        with pytest.raises(tp.TieError, match=r"\(9, 4\) now.*register_tie"):
            write(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
    tp.register_tie(model["head"], "copy", source="embed", root=model)
    tp.save(model, tmp_path / "model.safetensors")
    fresh = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    tp.load(tmp_path / "model.safetensors", fresh)
    assert tp.is_tied(fresh["head"])
    assert torch.equal(fresh["head"].weight, model["embed"].weight)


def test_s44_a_failed_renewal_changes_nothing():
    model = tied_head()
    by_data(model["embed"], 9)
    for source in ("no such layer", nn.ReLU(), nn.Conv1d(1, 1, 1)):
        with pytest.raises(tp.TieError):
            tp.register_tie(model["head"], "copy", source=source, root=model)
        assert next(tp.get_tie(model["head"]).sources())[0] is model["embed"]
        assert model["head"].out_features == 6
    assert len(model["embed"]._load_state_dict_post_hooks) == 1


def test_s44_a_chain_of_copies_is_untied_after_a_resize():
    model = tied_head()
    model["third"] = nn.Linear(4, 6, bias=False)
    tp.register_tie(model["third"], "squared_copy", source="head", root=model)
    by_data(model["embed"], 9)
    dense = tp.dense_state_dict(model)
    assert torch.equal(dense["third.weight"], model["embed"].weight ** 2)
    with pytest.warns(tp.TieWarning):
        tp.untie_model(model)
    assert torch.equal(model["third"].weight, model["embed"].weight ** 2)


def lose(model: nn.ModuleDict) -> None:
    model["embed"].weight = None


def delete(model: nn.ModuleDict) -> None:
    del model["embed"].weight


def exchange(model: nn.ModuleDict) -> None:
    model["embed"] = nn.Embedding(6, 4)


@pytest.mark.parametrize("spoil", [lose, delete, exchange])
def test_one_call_helps_whatever_became_of_the_source(spoil):
    model = tied_head()
    spoil(model)
    for use in (tp.dense_state_dict, lambda model: model["head"](X)):
        with pytest.raises(tp.TieError, match="register_tie"):
            use(model)
    other = nn.Embedding(6, 4)
    tp.register_tie(model["head"], "copy", source=other)
    assert torch.equal(model["head"].weight, other.weight)
    tp.remove_tie(model["head"])
    assert torch.equal(model["head"].weight, other.weight)


@pytest.mark.parametrize("way", WAYS_OUT)
def test_s30_every_way_out_of_a_tie_whose_source_was_exchanged_is_open(way):
    model = tied_head()
    before = model["embed"].weight
    exchange(model)
    WAYS_OUT[way](model)
    assert type(model["head"]) is nn.Linear
    assert torch.equal(model["head"].weight, before)


def test_s30_dictionaries_are_not_converted_by_a_source_that_was_exchanged():
    model = pair()
    dense, tied = tp.dense_state_dict(model), model.state_dict()
    model[0] = nn.Linear(4, 4)
    with pytest.raises(tp.TieError, match="'0' of a 'copy' tie was exchanged"):
        tp.tie_state_dict(model, dense)
    with pytest.raises(tp.TieError, match="'0' of a 'copy' tie was exchanged"):
        tp.untie_state_dict(model, tied)


@pytest.mark.parametrize("spoil", [lose, delete])
def test_a_tie_without_numbers_is_not_untied_and_says_what_helps(spoil):
    model = tied_head()
    spoil(model)
    for way in (WAYS_OUT["remove_tie"], tp.untie_model):
        with pytest.raises(tp.TieError, match=r"has lost its 'weight'.*register_tie\(layer"):
            way(model)
        assert tp.is_tied(model["head"])


def test_a_function_that_does_not_take_the_new_size_says_what_helps():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    tp.register_tie(model["b"], "copy", source=model["a"], fn=lambda w: w.view(2, 8).view(4, 4))
    model["a"].weight = nn.Parameter(torch.ones(5, 4))
    for use in (lambda: model["b"](X), lambda: tp.remove_tie(model["b"])):
        with pytest.raises(tp.TieError, match=r"\(5, 4\) now, on which fn raised.*register_tie"):
            use()
    tp.register_tie(model["b"], "copy", source=model["a"], fn=lambda w: w[:4])
    assert torch.equal(model["b"].weight, model["a"].weight[:4])


def test_s30_a_source_behind_a_wrapper_on_the_way_is_still_the_source():
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4)), "head": nn.Linear(4, 4)})
    tp.register_tie(model["head"], "copy", source="body.0", root=model)
    model["body"] = torch.compile(model["body"], backend="eager")
    assert torch.equal(model["head"].weight, model["body"]._orig_mod[0].weight)
    model["body"]._orig_mod[0] = nn.Linear(4, 4)
    with pytest.raises(tp.TieError, match=r"'body\.0'.*exchanged"):
        model["head"](X)


# Assigning what is copied ------------------------------------------------------------------


def test_assigning_the_parameter_that_is_copied_is_no_change():
    model = pair()
    before = model[0].weight
    model[2].weight = model[0].weight
    tp.assign_(model[2], model[0].weight)
    assert tp.is_tied(model[2])
    assert model[0].weight is before
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.bias"]


def test_assigning_the_guarded_weight_of_a_tied_source_is_no_change():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tp.register_tie(model[0], "flip_sym")
    tp.register_tie(model[1], "copy", source="0", root=model)
    tp.register_tie(model[2], "copy", source="1", root=model)
    model[1].weight = model[0].weight
    model[2].weight = model[1].weight
    model[2].weight = model[0].weight  # what is at the end of the chain
    assert torch.equal(model[2].weight, model[0].weight)


@pytest.mark.parametrize(
    "value",
    [
        lambda source: nn.Parameter(source.weight.detach().clone()),
        lambda source: source.weight.detach(),
        lambda source: source.weight * 1,
        lambda source: source.weight.t(),
    ],
    ids=["equal values", "detached", "computed", "transposed"],
)
def test_assigning_anything_else_to_a_copy_raises(value):
    for tied_source in (False, True):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        if tied_source:
            tp.register_tie(model[0], "flip_sym")
        tp.register_tie(model[1], "copy", source="0", root=model)
        with pytest.raises(tp.TieError, match="computed from another layer's tensor by 'copy'"):
            model[1].weight = value(model[0])


def test_assigning_the_source_to_another_function_of_it_raises():
    model = pair(fn=torch.t)
    with pytest.raises(tp.TieError, match="computed from another layer's tensor"):
        model[2].weight = model[0].weight
    squared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tp.register_tie(squared[1], "squared_copy", source="0", root=squared)
    with pytest.raises(tp.TieError, match="computed from another layer's tensor"):
        squared[1].weight = squared[0].weight


# Sources that a hook computes --------------------------------------------------------------

OLD_TOOLS = {
    "weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "prune": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.remove(layer, "weight"),
    ),
    "prune twice": (
        lambda layer: [prune.random_unstructured(layer, "weight", 0.25) for _ in range(2)],
        lambda layer: prune.remove(layer, "weight"),
    ),
}
old_tools = pytest.mark.parametrize("tool", OLD_TOOLS)
warned = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


@pytest.mark.feature(
    "Other parametrizations",
    "a copy of what old `weight_norm`, `spectral_norm` or `prune` computes",
    refused="between two forwards it is that of the last step; use those of "
    "`torch.nn.utils.parametrizations`, or make it permanent",
)
@warned
@old_tools
def test_s45_a_source_that_a_hook_computes_is_refused_when_tied(tool):
    apply, undo = OLD_TOOLS[tool]
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    apply(model[0])
    for rule in ("copy", "squared_copy"):
        message = r"cannot tie '1\.weight' .* is computed by .*parametrizations\.weight_norm"
        with pytest.raises(tp.TieError, match=message):
            tp.register_tie(model[1], rule, source="0", root=model)
    assert type(model[1]) is nn.Linear
    undo(model[0])
    tp.register_tie(model[1], "copy", source="0", root=model)
    assert torch.equal(model[1].weight, model[0].weight)


@warned
@old_tools
@pytest.mark.parametrize("root", [True, False])
def test_s45_a_source_that_a_hook_computes_later_is_refused_at_the_next_forward(tool, root):
    apply, undo = OLD_TOOLS[tool]
    model = pair() if root else pair(root=None, source=(source := nn.Linear(4, 4)))
    source = model[0] if root else source
    model(X)
    apply(source)
    for use in (lambda: model[2](X), lambda: model[2].weight, lambda: tp.residual(model[2], "copy",
                source=source)):  # fmt: skip
        with pytest.raises(tp.TieError, match="before each forward of that layer"):
            use()
    undo(source)
    model(X)
    assert torch.equal(model[2].weight, source.weight)


@warned
@old_tools
def test_s45_untying_and_exporting_take_what_the_hook_computes_now(tool):
    apply, _ = OLD_TOOLS[tool]
    model = pair()
    model.eval()
    apply(model[0])
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.mul_(1.5)  # a step of which the plain attribute knows nothing
    dense = tp.dense_state_dict(model)["2.weight"]
    assert torch.equal(dense, tp.remove_tie(model[2]).weight)
    model(X)  # the oracle: what the hook itself writes
    torch.testing.assert_close(model[2].weight, model[0].weight)


def test_a_source_under_fully_shard_compiles_to_one_graph():
    pytest.importorskip("torch.distributed.fsdp")
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    tp.register_tie(model[2], "copy", source=model[0])
    model[0]._is_fsdp_managed_module = model[0]._fsdp_use_orig_params = True  # what it writes
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))


@warned
def test_s45_a_compiled_copy_notices_a_hook_that_comes_later():
    model = pair()
    compiled = torch.compile(model[2], backend="eager")
    compiled(X)
    nn.utils.weight_norm(model[0])
    with pytest.raises(tp.TieError, match="computed by WeightNorm"):
        compiled(X)


@warned
def test_s45_a_hook_is_seen_under_fsdp_as_well():
    model = pair()
    nn.utils.weight_norm(model[0])
    model[0]._is_fsdp_managed_module = True  # where plain attributes are the parts of a unit
    with pytest.raises(tp.TieError, match="computed by WeightNorm"):
        model[2](X)


def test_s45_a_user_hook_that_sets_the_weight_is_refused():
    source, layer = nn.Linear(4, 4), nn.Linear(4, 4)
    raw = nn.Parameter(source.weight.detach().clone())
    del source.weight
    source.raw = raw
    source.register_forward_pre_hook(lambda module, _: setattr(module, "weight", module.raw * 2))
    source(X)
    with pytest.raises(tp.TieError, match="before each forward of that layer"):
        tp.register_tie(layer, "copy", source=source)
    tp.register_tie(layer, "copy", source=source, source_name="raw")
    assert torch.equal(layer.weight, raw)


def test_a_source_whose_class_computes_the_weight_works():
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stored = nn.Parameter(torch.randn(4, 4))

        @property
        def weight(self) -> Tensor:
            return self.stored * 2

    source, layer = Doubled(), nn.Linear(4, 4)
    tp.register_tie(layer, "copy", source=source)
    layer(X).sum().backward()
    assert torch.equal(layer.weight, source.stored * 2)
    assert source.stored.grad is not None


@pytest.mark.feature(
    "Other parametrizations", "a copy of what `parametrizations.weight_norm` computes"
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_s45_the_new_weight_norm_on_a_source_works(when):
    embed, head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    model = nn.ModuleList([embed, head])
    if when == "before":
        parametrizations.weight_norm(head)
    tp.register_tie(embed, "copy", source=head, root=model)
    if when == "after":
        parametrizations.weight_norm(head)
    tokens = torch.arange(6)
    sgd = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(3):
        sgd.zero_grad()
        nn.functional.cross_entropy(head(embed(tokens)), tokens).backward()
        sgd.step()
        assert torch.equal(embed.weight, head.weight)


# What is removed leaves nothing behind -----------------------------------------------------


def remove_by_exchange(model: nn.Sequential) -> None:
    model[2] = nn.Linear(4, 4)
    gc.collect()


REMOVALS = {
    "remove_tie": lambda model: tp.remove_tie(model[2]),
    "untie_model": tp.untie_model,
    "remove_parametrizations": lambda model: parametrize.remove_parametrizations(
        model[2], "weight"
    ),
    "exchanging the layer": remove_by_exchange,
}


@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("made_by", ["tying", "deepcopy", "pickle"])
def test_a_removed_copy_leaves_nothing_on_its_source(removal, made_by):
    model = pair()
    if made_by == "deepcopy":
        model = copy.deepcopy(model)
    elif made_by == "pickle":
        model = pickle.loads(pickle.dumps(model))
    for _ in range(3):
        assert len(model[0]._load_state_dict_post_hooks) == 1
        held = tp.get_tie(model[2]) if removal in ("remove_tie", "untie_model") else None
        REMOVALS[removal](model)
        assert not model[0]._load_state_dict_post_hooks
        assert b"tiedparam" not in pickle.dumps(model)
        del held
        tp.register_tie(model[2], "copy", source="0", root=model)


def test_a_removed_copy_of_a_deepcopy_leaves_the_originals_hook():
    model = pair()
    replica = copy.deepcopy(model)
    del replica
    gc.collect()
    assert len(model[0]._load_state_dict_post_hooks) == 1
    # and the hook still does its work: the copy's entry comes before its source's
    late = nn.ModuleDict({"copy": nn.Linear(4, 4), "source": nn.Linear(4, 4)})
    tp.register_tie(late["copy"], "copy", source="source", root=late)
    late = copy.deepcopy(late)
    other = nn.Linear(4, 4).state_dict()
    entries = {f"{end}.{k}": v for end in late for k, v in other.items()}
    late.load_state_dict(entries)
    assert torch.equal(late["copy"].weight, other["weight"])


def test_untying_a_shallow_copy_leaves_the_originals_hook():
    model = pair()
    tp.remove_tie(copy.copy(model[2]))
    assert len(model[0]._load_state_dict_post_hooks) == 1
    tp.remove_tie(model[2])
    assert not model[0]._load_state_dict_post_hooks


def test_a_source_is_freed_with_its_model():
    model = pair()
    seen = weakref.ref(model[0])
    del model
    gc.collect()
    assert seen() is None
