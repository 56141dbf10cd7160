"""Dense and tied checkpoints: loading, saving, the pure dictionary functions."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import tiedparam as tp
from tests.support import older_than
from tests.support.rule_of_two_tensors import TwoHalves


class Net(nn.Module):
    """Every kind of tie, nested, with a copy that is registered before its source."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Conv2d(4, 4, 3, padding=1)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 6)

    def forward(self, x):
        x = self.late(self.body(self.stem(x)).relu())
        return self.head(x.mean((2, 3)))


def tie(net: Net) -> Net:
    tp.register_tie(net.stem, "channel_shared")
    tp.register_tie(net.body[0], "flip_sym")
    tp.register_tie(net.head, "row_repeat", groups=3)
    tp.register_tie(net.late, "squared_copy", source=net.body[0])
    return net


@pytest.fixture
def tied() -> Net:
    torch.manual_seed(0)
    return tie(Net())


@pytest.fixture
def lawful_dense(tied: Net) -> dict[str, torch.Tensor]:
    """The dense checkpoint of another tied model."""
    torch.manual_seed(1)
    return tp.dense_state_dict(tie(Net()))


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.feature("Copies and files", "a dense checkpoint out of a tied model")
def test_dense_state_dict_is_that_of_the_dense_model(tied: Net):
    dense = tp.dense_state_dict(tied)
    stock = Net()
    assert list(dense) == list(stock.state_dict())
    stock.load_state_dict(dense)
    x = torch.randn(2, 3, 6, 6)
    stock.eval(), tied.eval()
    torch.testing.assert_close(stock(x), tied(x))
    for name, value in dense.items():
        assert value.is_contiguous()
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), name
    assert safetensors.torch.save(dense)


@pytest.mark.feature(
    "Copies and files", "a dense checkpoint into a tied model, strict or not, `assign=True`"
)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("deep_copied", [True, False])
def test_s09_dense_checkpoint_loads(tied, lawful_dense, strict, assign, deep_copied):
    model = copy.deepcopy(tied) if deep_copied else tied
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = model.load_state_dict(lawful_dense, strict=strict, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert same(dict(tp.dense_state_dict(model)), dict(lawful_dense))
    for layer in (model.stem, model.body[0], model.head, model.late):
        (symmetry, *_) = tp.get_tie(layer).symmetries(layer.weight)
        assert torch.equal(symmetry, layer.weight)
    assert not same(values(tied), values(model)) or not deep_copied
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())


def test_s09_nested_in_a_larger_model(tied, lawful_dense):
    outer = nn.ModuleDict({"inner": nn.Sequential(tied)})
    outer.load_state_dict({f"inner.0.{key}": value for key, value in lawful_dense.items()})
    assert same(dict(tp.dense_state_dict(tied)), dict(lawful_dense))


def test_s09_one_layer_alone(tied, lawful_dense):
    tied.stem.load_state_dict(
        {"weight": lawful_dense["stem.weight"], "bias": lawful_dense["stem.bias"]}
    )
    assert torch.equal(tied.stem.weight, lawful_dense["stem.weight"])


@pytest.mark.feature("Copies and files", "models built on the meta device")
def test_s09_meta_device_model(lawful_dense):
    with torch.device("meta"):
        model = tie(Net())
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(lawful_dense, assign=True)
    assert same(dict(tp.dense_state_dict(model)), dict(lawful_dense))


def test_s09_meta_device_model_takes_a_tied_checkpoint(tied):
    with torch.device("meta"):
        model = tie(Net())
    model.load_state_dict(tied.state_dict(), assign=True)
    assert same(values(model), values(tied))


def test_the_hook_goes_away_with_the_tie(tied, lawful_dense):
    for layer in (tied.late, tied.stem, tied.body[0], tied.head):
        tp.remove_tie(layer)
    unlawful = {**lawful_dense, "stem.weight": torch.randn(4, 3, 3, 3)}
    tied.load_state_dict(unlawful)
    assert torch.equal(tied.stem.weight, unlawful["stem.weight"])
    assert not tied.body[0]._load_state_dict_post_hooks


def test_a_residual_above_a_thousandth_warns_and_names_the_layers(tied, lawful_dense):
    lawful_dense["stem.weight"] += 0.1 * torch.randn(4, 3, 3, 3)
    lawful_dense["head.weight"] += 0.1 * torch.randn(6, 4)
    with pytest.warns(tp.TieWarning) as caught:
        tied.load_state_dict(lawful_dense)
    told = " ".join(str(w.message) for w in caught)
    assert "'stem.weight'" in told
    assert "'head.weight'" in told
    assert "body" not in told
    expected = lawful_dense["stem.weight"].mean(1, keepdim=True).expand(4, 3, 3, 3)
    torch.testing.assert_close(tied.stem.weight, expected)
    with pytest.warns(tp.TieWarning, match=r"'stem.weight'.*'head.weight'|'head.*'stem"):
        tp.tie_state_dict(tied, lawful_dense)


def test_a_residual_of_rounding_size_does_not_warn(tied, lawful_dense):
    lawful_dense["stem.weight"] += 1e-6 * torch.randn(4, 3, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tied.load_state_dict(lawful_dense)
        tp.tie_state_dict(tied, lawful_dense)


def test_nan_in_a_dense_checkpoint_warns(tied, lawful_dense):
    lawful_dense["stem.weight"][0, 0, 0, 0] = torch.nan
    with pytest.warns(tp.TieWarning, match=r"stem.weight.*nan"):
        tied.load_state_dict(lawful_dense)


@pytest.mark.parametrize("source_first", [True, False])
def test_a_copy_is_compared_with_its_source_in_the_same_checkpoint(source_first):
    layers = {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}
    model = nn.ModuleDict(layers if source_first else dict(reversed(layers.items())))
    tp.register_tie(model["b"], "squared_copy", source=model["a"])
    weight, bias = torch.randn(3, 3), torch.zeros(3)
    good = {"a.weight": weight, "a.bias": bias, "b.weight": weight.square(), "b.bias": bias}
    model.load_state_dict(good)
    assert torch.equal(model["b"].weight, weight.square())
    model.load_state_dict(good)  # and once more, from the values that it has now

    bad = {**good, "a.weight": weight + 1}  # the copy agrees with the *old* source
    with pytest.raises(RuntimeError, match="'b.weight' is tied by 'squared_copy' and disagrees"):
        model.load_state_dict(bad)
    model.load_state_dict(good)
    with pytest.raises(RuntimeError, match="disagrees with its source"):
        model.load_state_dict({**good, "b.weight": weight}, strict=False)
    with pytest.raises(tp.TieError, match="'b.weight' is tied by 'squared_copy' and disagrees"):
        tp.tie_state_dict(model, bad)


@pytest.mark.parametrize("order", ["abc", "cba", "bca", "cab"])
def test_a_chain_of_copies_is_compared_link_by_link(order):
    model = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in order})
    tp.register_tie(model["b"], "squared_copy", source=model["a"])
    tp.register_tie(model["c"], "copy", source=model["b"], fn=torch.t)
    weight = torch.randn(3, 3)
    good = {"a.weight": weight, "b.weight": weight**2, "c.weight": (weight**2).t()}
    model.load_state_dict(good)
    assert torch.equal(model["c"].weight, (weight**2).t())
    for key in good:
        with pytest.raises(RuntimeError, match="disagrees with its source"):
            model.load_state_dict({**good, key: good[key] + 1})
    model.load_state_dict(good)
    copied = copy.deepcopy(model)
    copied.load_state_dict({key: value**2 for key, value in good.items()})
    assert torch.equal(model["a"].weight, weight)


def test_a_copy_without_an_entry_follows_its_source():
    model = nn.ModuleDict({"b": nn.Linear(3, 3, bias=False), "a": nn.Linear(3, 3, bias=False)})
    tp.register_tie(model["b"], "copy", source=model["a"])
    weight = torch.randn(3, 3)
    model.load_state_dict({"a.weight": weight})
    assert torch.equal(model["b"].weight, weight)


def test_a_half_precision_checkpoint_of_a_square_agrees():
    model = nn.ModuleDict({"b": nn.Linear(9, 9, bias=False), "a": nn.Linear(9, 9, bias=False)})
    tp.register_tie(model["b"], "squared_copy", source=model["a"])
    dense = {key: value.bfloat16() for key, value in tp.dense_state_dict(model).items()}
    model.load_state_dict(dense)
    assert torch.equal(model["a"].weight, dense["a.weight"].float())


def test_a_copy_keeps_no_checkpoint_tensor_alive():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    tp.register_tie(model["b"], "copy", source=model["a"])
    entry = torch.randn(3, 3)
    reference = torch.utils.weak.TensorWeakRef(entry)
    model.load_state_dict({"a.weight": entry.clone(), "b.weight": entry})
    del entry
    assert reference() is None


def damage(name):
    """A tied state dict with one fault in the layer of two free tensors."""

    def wreck(state):
        key = "body.0.parametrizations.weight.original1"
        if name == "missing":
            del state[key]
        elif name == "misshapen":
            state[key] = torch.zeros(1, 4, 3, 2)
        elif name == "not a tensor":
            state[key] = 3.0
        elif name == "one more":
            state["body.0.parametrizations.weight.original2"] = state[key]
        elif name == "both":
            state["body.0.weight"] = torch.zeros(4, 4, 3, 3)
        return state

    return wreck


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("fault", ["missing", "misshapen", "not a tensor", "both", "one more"])
def test_a_bad_load_leaves_the_tied_tensor_as_it_was(tied, fault, strict):
    for net in (tied, fresh := tie(Net())):
        tp.remove_tie(net.late)
        tp.remove_tie(net.body[0])
        tp.register_tie(net.body[0], TwoHalves)
    before = values(tied.body[0])
    other = damage(fault)(fresh.state_dict())
    with pytest.raises(RuntimeError, match=r"body\.0\.weight|body\.0\.param") as caught:
        tied.load_state_dict(other, strict=strict)
    assert "Missing key" not in str(caught.value)
    after = values(tied.body[0])
    tied_keys = [key for key in before if key.startswith("parametrizations")]
    assert len(tied_keys) == 2
    assert all(torch.equal(before[key], after[key]) for key in tied_keys)


@pytest.mark.parametrize("strict", [True, False])
def test_a_misshapen_dense_entry_is_refused(tied, lawful_dense, strict):
    before = values(tied.stem)
    lawful_dense["stem.weight"] = torch.zeros(4, 4, 3, 3)
    with pytest.raises(RuntimeError, match=r"size mismatch for 'stem.weight': \(4, 4, 3, 3\)"):
        tied.load_state_dict(lawful_dense, strict=strict)
    key = "parametrizations.weight.original0"
    assert torch.equal(before[key], values(tied.stem)[key])
    with pytest.raises(tp.TieError, match=r"size mismatch for 'stem.weight'"):
        tp.tie_state_dict(tied, lawful_dense)


@pytest.mark.feature(
    "Copies and files",
    "another rule's checkpoint of equal shape",
    refused="the numbers mean another weight; load it into a model tied by that rule",
)
def test_s28_another_rules_checkpoint_of_equal_shape_is_refused():
    one = tp.register_tie(nn.Conv2d(4, 4, 3, groups=2), "channel_shared", over="groups")
    other = tp.register_tie(nn.Conv2d(4, 4, 3, groups=2), "row_repeat", groups=2)
    with pytest.raises(RuntimeError, match=r"saved under the rule .*over='groups'.* tied by 'row_"):
        other.load_state_dict(one.state_dict())
    other.load_state_dict(dict(one.state_dict()))  # a plain dict carries no metadata
    assert "tiedparam" not in str(list(one.state_dict()))
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    with pytest.raises(RuntimeError, match="saved under the rule"):
        other.load_state_dict(torch.load(buffer, weights_only=True))


def test_pure_functions_round_trip_to_the_bit(tied, lawful_dense):
    before = values(tied)
    state = tied.state_dict()
    dense = tp.untie_state_dict(tied, state)
    assert list(dense) == list(Net().state_dict())
    assert same(dict(dense), dict(tp.dense_state_dict(tied)))
    assert same(dict(tp.tie_state_dict(tied, dense)), dict(state))
    again = tp.untie_state_dict(tied, tp.tie_state_dict(tied, lawful_dense))
    assert same(dict(again), dict(lawful_dense))
    assert same(before, values(tied))
    assert list(lawful_dense) == list(Net().state_dict())  # the argument is left alone


def test_pure_functions_need_neither_values_nor_hooks(tied, lawful_dense):
    with torch.device("meta"):
        names_only = tie(Net())
    state = tp.tie_state_dict(names_only, dict(lawful_dense))
    tied.load_state_dict(state)
    assert same(dict(tp.untie_state_dict(names_only, state)), dict(lawful_dense))
    # entries that are tied already pass through
    assert same(dict(tp.tie_state_dict(names_only, state)), dict(state))


def test_pure_functions_report_every_fault_at_once(tied, lawful_dense):
    lawful_dense["stem.weight"] = torch.zeros(1)
    lawful_dense["head.weight"] = torch.zeros(2)
    with pytest.raises(tp.TieError, match=r"(?s)stem\.weight.*head\.weight"):
        tp.tie_state_dict(tied, lawful_dense)
    state = tied.state_dict()
    del state["body.0.parametrizations.weight.original0"]
    with pytest.raises(tp.TieError, match=r"free values of 'body.0.weight' are missing"):
        tp.untie_state_dict(tied, state)


def test_a_source_outside_of_the_part(tied):
    part = nn.ModuleDict({"late": tied.late})
    dense = tp.dense_state_dict(part)
    assert torch.equal(dense["late.weight"], tied.body[0].weight.square())
    with pytest.raises(tp.TieError, match="is not in this model. Pass the whole model"):
        tp.untie_state_dict(part, part.state_dict())


def test_dense_state_dict_of_shared_layers_has_both_names():
    layer = tp.register_tie(nn.Linear(3, 3), "flip_sym")
    model = nn.ModuleDict({"a": layer, "b": layer})
    assert list(tp.dense_state_dict(model)) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    model.load_state_dict(tp.dense_state_dict(model))


def test_integer_and_double_checkpoints_are_cast_as_torch_casts():
    layer = tp.register_tie(nn.Linear(2, 2, bias=False), "row_repeat")
    layer.load_state_dict({"weight": torch.tensor([[1, 2], [1, 2]])})
    assert torch.equal(layer.weight, torch.tensor([[1.0, 2.0], [1.0, 2.0]]))
    layer.load_state_dict({"weight": torch.full((2, 2), 0.1, dtype=torch.float64)})
    assert layer.weight.dtype is torch.float32


def test_s15_a_saved_checkpoint_holds_no_dense_sized_tensor():
    layer = tp.register_tie(nn.Conv2d(64, 64, 3, bias=False), "channel_shared")
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    assert buffer.tell() < 64 * 9 * 4 + 3000  # the zip container's own overhead
    assert len(safetensors.torch.save(dict(layer.state_dict()))) < 64 * 9 * 4 + 200


def test_dense_order_where_a_layer_has_no_key_left_of_its_own():
    stock = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(3)], nn.BatchNorm1d(4))
    model = copy.deepcopy(stock)
    tp.register_tie(model[1], "copy", source="0", root=model)
    assert list(tp.dense_state_dict(model)) == list(stock.state_dict())
    assert list(tp.untie_state_dict(model, model.state_dict())) == list(stock.state_dict())


def spectral(model, index):
    parametrizations.spectral_norm(model[index], "weight")
    return model.eval()


@pytest.mark.parametrize("path", ["0", "1"])
def test_dense_and_untied_dictionaries_agree_with_a_parametrization_on_top(path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tp.register_tie(model[0], "flip_sym")
    tp.register_tie(model[1], "squared_copy", source=model[0], root=model)
    spectral(model, int(path))
    dense = tp.dense_state_dict(model)
    assert list(dense) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert torch.equal(dense["0.weight"], model[0].weight)
    assert torch.equal(dense["1.weight"], model[1].weight)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    untied = tp.untie_state_dict(model, model.state_dict())
    assert list(untied) == list(dense)
    for key, value in dense.items():
        torch.testing.assert_close(untied[key], value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(tp.TieError, match=f"'{path}.weight' is dense.*Remove that one first"):
        tp.tie_state_dict(model, {f"{path}.weight": dense[f"{path}.weight"]})
    with pytest.raises(RuntimeError, match=f"'{path}.weight' is dense"):
        model.load_state_dict(dense)


@pytest.mark.parametrize("how", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_copy_reads_a_source_under_a_parametrization_of_torch(how):
    model = nn.Sequential(how(nn.Linear(3, 3)), nn.Linear(3, 3)).eval()
    tp.register_tie(model[1], "squared_copy", source=model[0], root=model)
    untied = tp.untie_state_dict(model, model.state_dict())
    torch.testing.assert_close(untied["1.weight"], model[0].weight.square())
    partial = {k: v for k, v in model.state_dict().items() if "original0" not in k}
    partial.pop("0.parametrizations.weight.original", None)
    with pytest.raises(tp.TieError, match="has no '0.parametrizations.weight.original"):
        tp.untie_state_dict(model, partial)


def test_keys_under_a_foreign_prefix_are_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    dense = model.state_dict()
    tp.register_tie(model[0], "flip_sym")
    wrapped = {f"module.{key}": value for key, value in dense.items()}
    with pytest.raises(tp.TieError, match=r"begin with 'module\.', as in 'module\.0\.weight'"):
        tp.tie_state_dict(model, wrapped)
    assert list(tp.tie_state_dict(model, {"1.bias": dense["1.bias"]})) == ["1.bias"]


DAMAGES = {
    "missing": lambda state, key: state.pop(key),
    "extra": lambda state, key: state.update({f"{key}_more": state[key]}),
    "one more": lambda state, key: (
        state.update({f"{key[:-1]}{int(key[-1]) + 1}": state[key]}) if key[-1].isdigit() else None
    ),
    "misshapen": lambda state, key: state.update({key: state[key].flatten()[:-1]}),
    "NaN": lambda state, key: state.update({key: state[key] * float("nan")}),
    "integers": lambda state, key: state.update({key: state[key].to(torch.int8)}),
    "double": lambda state, key: state.update({key: state[key].double()}),
    "complex": lambda state, key: state.update({key: state[key].to(torch.complex64)}),
    "a number": lambda state, key: state.update({key: 3.0}),
    "nothing": lambda state, key: state.update({key: None}),
    "empty": lambda state, key: state.update({key: torch.empty(0)}),
    "a dense twin": lambda state, key: state.update(
        {key.split("parametrizations")[0] + "weight": torch.zeros(4, 4, 3, 3)}
    ),
}


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150)
@given(data=st.data())
def test_no_damage_to_a_checkpoint_breaks_a_law(data):
    """Either the load says so and every tied tensor that it names is as it was, or it is lawful."""
    net = tie(Net())
    dense = data.draw(st.booleans(), "dense")
    state = tp.dense_state_dict(tie(Net())) if dense else tie(Net()).state_dict()
    for _ in range(data.draw(st.integers(1, 3), "damages")):
        key = data.draw(st.sampled_from([k for k, v in state.items() if torch.is_tensor(v)]))
        DAMAGES[data.draw(st.sampled_from(sorted(DAMAGES)))](state, key)
    before = values(net)
    strict = data.draw(st.booleans(), "strict")
    try:
        net.load_state_dict(state, strict=strict)
    except IndexError:  # an empty number of batches, which torch before 2.9 does not look at
        assert older_than("2.9")
    except RuntimeError as error:
        # torch's complaint of unexpected keys is not one of a tied tensor
        message = "\n".join(line for line in str(error).splitlines() if "Unexpected" not in line)
        for path in ("stem", "body.0", "head", "late"):
            if f"{path}.weight'" in message or f"{path}.parametrizations" in message:
                for key, value in net.get_submodule(path).state_dict().items():
                    was = before[f"{path}.{key}"]
                    if key.startswith("parametrizations") and not torch.equal(value, was):
                        raise
    for layer in (net.stem, net.body[0], net.head, net.late):
        weight = layer.weight.detach()
        assert weight.dtype is torch.float32
        for symmetric in tp.get_tie(layer).symmetries(weight):
            assert weight.isnan().any() or torch.equal(symmetric, weight)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150)
@given(data=st.data())
def test_damaged_dictionaries_are_refused_whole(data):
    net = tie(Net())
    dense = dict(tp.dense_state_dict(tie(Net())))
    for _ in range(data.draw(st.integers(1, 3), "damages")):
        key = data.draw(st.sampled_from([k for k, v in dense.items() if torch.is_tensor(v)]))
        DAMAGES[data.draw(st.sampled_from(sorted(DAMAGES)))](dense, key)
    before = values(net)
    given_entries = dict(dense)
    try:
        tied_entries = tp.tie_state_dict(net, dense)
    except tp.TieError:
        pass
    else:
        for key, value in tied_entries.items():
            if "parametrizations" in key:
                assert value.shape == before[key].shape
    assert same(values(net), before)
    assert dense.keys() == given_entries.keys()
    assert all(dense[key] is value for key, value in given_entries.items())


def test_a_truncated_file_changes_nothing(tied, tmp_path):
    path = tmp_path / "tied.pt"
    torch.save(tied.state_dict(), path)
    whole = path.read_bytes()
    before = values(tied)
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises((RuntimeError, EOFError, OSError, pickle.UnpicklingError)):
            tied.load_state_dict(torch.load(path))
    assert same(values(tied), before)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("rule", "options"), [("scaled_copy", {"per": "output"}), ("shared_delta", {"rank": 1})]
)
def test_a_dense_entry_that_is_not_finite_does_not_reach_a_law_that_is_solved(
    rule, options, number
):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tp.register_tie(model[1], rule, source=model[0], **options)
    before = values(model)
    dense = tp.dense_state_dict(model)
    dense["1.weight"][0, 0] = number
    for load in (model.load_state_dict, lambda entries: tp.tie_state_dict(model, entries)):
        with pytest.raises(RuntimeError, match=r"'1.weight' is dense with entries that are not"):
            load(dense)
        after = values(model)
        assert all(torch.equal(after[name], before[name]) for name in before)
