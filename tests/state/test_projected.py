"""One warning for all weights that a dense checkpoint has and the laws have not."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import pytest
import torch
from torch import nn

import tiedparam as tp


def square_layers(count: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))


def tied(count: int = 5) -> nn.Sequential:
    model = square_layers(count)
    tp.tie_model(model, {"*": "symmetric"}, init="project")
    return model


def projected_in(load) -> list[dict[str, float]]:
    """Of each warning of a load, the weights that it names and their residuals, in order."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load()
    assert {warning.category for warning in caught} <= {tp.TieWarning}
    named = re.compile(r"'(\S+)' \(residual (\S+)\)")
    return [
        {key: float(residual) for key, residual in named.findall(str(warning.message))}
        for warning in caught
    ]


def test_one_warning_names_every_weight_of_a_model_the_worst_first():
    dense = square_layers().state_dict()
    model = tied()
    (named,) = projected_in(lambda: model.load_state_dict(dense))
    assert set(named) == {f"{number}.weight" for number in range(5)}
    assert list(named.values()) == sorted(named.values(), reverse=True)
    twin = square_layers()
    for number, layer in enumerate(twin):
        assert named[f"{number}.weight"] == pytest.approx(tp.residual(layer, "symmetric"), rel=1e-2)


def test_the_warning_says_how_many_and_points_at_the_load():
    with pytest.warns(tp.TieWarning, match="^5 weights were not lawful") as caught:
        tied().load_state_dict(square_layers().state_dict())
    assert caught[0].filename == __file__


def test_a_later_load_says_only_its_own():
    model, dense = tied(), square_layers().state_dict()
    some = {key: value for key, value in dense.items() if key.startswith("1")}
    projected_in(lambda: model.load_state_dict(dense))
    ((named),) = projected_in(lambda: model.load_state_dict(some, strict=False))
    assert set(named) == {"1.weight"}
    assert projected_in(lambda: model.load_state_dict(model.state_dict())) == []


def test_a_load_that_does_not_fit_names_what_it_projected():
    model, dense = tied(), square_layers().state_dict()
    dense["4.weight"] = torch.zeros(3, 3)
    with (
        pytest.warns(tp.TieWarning, match="^4 weights"),
        pytest.raises(RuntimeError, match="4.weight"),
    ):
        model.load_state_dict(dense)


def test_a_load_that_is_broken_off_leaves_nothing_for_the_next_to_say():
    def fail(*arguments):
        raise ValueError("no such disk")

    model = tied()
    handle = model[4].register_load_state_dict_pre_hook(fail)
    with pytest.raises(ValueError, match="no such disk") as kept:
        model.load_state_dict(square_layers().state_dict())
    handle.remove()
    assert kept.tb is not None  # which keeps the variables of the call
    assert projected_in(lambda: model.load_state_dict(model.state_dict())) == []


def test_nothing_is_left_on_the_model():
    model = tied()
    before = len(pickle.dumps(model))
    projected_in(lambda: model.load_state_dict(square_layers().state_dict()))
    assert len(pickle.dumps(model)) == before
    assert projected_in(lambda: copy.deepcopy(model).load_state_dict(model.state_dict())) == []


def test_a_filter_that_makes_it_an_error_ends_the_load():
    model = tied()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(tp.TieWarning, match="5 weights"):
            model.load_state_dict(square_layers().state_dict())


def test_weights_that_follow_from_a_source_loaded_later_are_named_with_the_others():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reads, self.other, self.source = (nn.Linear(4, 4) for _ in range(3))

    torch.manual_seed(0)
    model = Net()
    tp.register_tie(model.reads, "scaled_copy", source=model.source, root=model, init="project")
    tp.register_tie(model.other, "symmetric", init="project")
    (named,) = projected_in(lambda: model.load_state_dict(Net().state_dict()))
    assert set(named) == {"reads.weight", "other.weight"}


def test_a_layer_that_is_loaded_by_itself_warns_too():
    layer = tied(1)[0]
    state = square_layers(1)[0].state_dict()
    assert projected_in(lambda: layer.load_state_dict(state)) != []
    entries = dict(state)
    assert projected_in(lambda: layer._load_from_state_dict(entries, "", {}, True, [], [], []))
