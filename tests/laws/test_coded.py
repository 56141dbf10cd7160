"""The life of laws whose pattern is data: what becomes of it in all that befalls a layer."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tiedparam as tp
from tests.support.tensors import free_value
from tiedparam.laws import Coded, Reason, coded, shared_tables
from tiedparam.laws.packing import pack_flags, pack_numbers, unpack_flags, unpack_numbers

CHESS = torch.arange(16).view(4, 4) % 3 == 0
LATIN = (torch.arange(4)[:, None] + torch.arange(4)) % 4
SIGNS = torch.where(CHESS, -1, 1)
NUMBERS = torch.linspace(-2, 2, 16).view(4, 4)
TURN = [1, 2, 3, 0]

LAWS = {
    "masked": {"mask": CHESS},
    "fixed": {"mask": CHESS, "value": NUMBERS},
    "index": {"index": LATIN, "signs": SIGNS},
    "orbit": {"generators": [(TURN, TURN)]},
}
OTHERS = {
    "masked": {"mask": CHESS.t().flip(0)},
    "fixed": {"mask": CHESS.flip(1), "value": NUMBERS},
    "index": {"index": LATIN.flip(1), "signs": SIGNS},
    "orbit": {"generators": [(TURN, [1, 0, 3, 2])]},
}
every_law = pytest.mark.parametrize("name", LAWS)


def model_of(name: str, seed: int = 0, options: dict | None = None) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    tp.register_tie(model[0], name, **(LAWS[name] if options is None else options))
    return model


def weight_of(model: nn.Module) -> torch.Tensor:
    return model[0].weight.detach().clone()


def rule_of(model: nn.Module) -> Coded:
    return tp.get_tie(model[0])


def spoil(model: nn.Module) -> None:
    """As memory that nobody wrote may be."""
    for value in rule_of(model).buffers():
        value.fill_(0x5A if value.dtype == torch.uint8 else 7)


# What is packed ----------------------------------------------------------------------------------


def test_packed_bits_are_the_same_on_every_machine():
    flags = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]).bool()
    assert pack_flags(flags).tolist() == [1, 6]
    assert torch.equal(unpack_flags(pack_flags(flags), 11), flags)
    numbers = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0, 7])
    assert pack_numbers(numbers, 7).tolist() == [[42, 1], [12, 1], [48, 1]]
    assert torch.equal(unpack_numbers(pack_numbers(numbers, 7), 9).long(), numbers)
    assert str(rule_of(model_of("masked"))) == "masked(mask='4x4 sha256:35ec6f5e181f0d31')"


@every_law
def test_state_dicts_have_the_data_under_the_rule(name):
    model = model_of(name)
    keys = [key for key in model.state_dict() if key.startswith("0.parametrizations.weight.0.")]
    expected = {
        "masked": {"mask_bits": 2},
        "fixed": {"values": 6, "mask_bits": 2},
        "index": {"index_bits": 4, "sign_bits": 2},
        "orbit": {"outputs_bits": 2, "inputs_bits": 2},
    }[name]
    prefix = "0.parametrizations.weight.0."
    assert {key.removeprefix(prefix): model.state_dict()[key].numel() for key in keys} == expected
    assert "0.weight" in tp.dense_state_dict(model)
    assert not any(".0.0." in key or "bits" in key for key in tp.dense_state_dict(model))


def test_one_table_serves_all_layers_of_a_pattern():
    one, other = rule_of(model_of("masked")), rule_of(model_of("masked", 1))
    assert one._table is other._table
    assert rule_of(model_of("masked", 0, OTHERS["masked"]))._table is not one._table


# Loading -----------------------------------------------------------------------------------------


@every_law
@pytest.mark.parametrize("assign", [False, True])
def test_tied_and_dense_state_dicts_load_strictly(name, assign):
    other = model_of(name, 1)
    for entries in (other.state_dict(), tp.dense_state_dict(other)):
        model = model_of(name)
        model.load_state_dict(copy.deepcopy(entries), assign=assign)
        assert torch.equal(weight_of(model), weight_of(other))
        assert model.state_dict().keys() == other.state_dict().keys()


@every_law
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_another_pattern_is_refused_and_nothing_changes(name, strict, assign):
    model, other = model_of(name), model_of(name, 1, OTHERS[name])
    before, law = weight_of(model), str(rule_of(model))
    entries = other.state_dict()
    for known in (True, False):  # with and without the signature
        given = entries if known else dict(entries)
        with pytest.raises(RuntimeError, match=r"0\.weight"):
            model.load_state_dict(given, strict=strict, assign=assign)
        assert torch.equal(weight_of(model), before)
        assert str(rule_of(model)) == law
    # nor is the data alone taken, or that beside a dense weight
    data = {key: value for key, value in entries.items() if "_bits" in key}
    for given in (data, {**data, "0.weight": before}):
        with pytest.raises(RuntimeError, match="pattern"):
            model.load_state_dict(given, strict=False, assign=assign)
        assert torch.equal(weight_of(model), before)


def test_data_of_another_kind_or_size_is_refused():
    model = model_of("masked")
    key = "0.parametrizations.weight.0.mask_bits"
    for wrong in (torch.zeros(3, dtype=torch.uint8), torch.zeros(2), "text"):
        with pytest.raises(RuntimeError, match="mask_bits"):
            model.load_state_dict({**model.state_dict(), key: wrong})


def test_fixed_numbers_of_the_law_are_refused_if_they_differ_and_others_come_along():
    model = model_of("fixed")
    other = model_of("fixed", 1, {"mask": CHESS, "value": NUMBERS + 1})
    with pytest.raises(RuntimeError, match="saved under the rule"):
        model.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="other fixed numbers"):
        model.load_state_dict(dict(other.state_dict()))
    # the law says no numbers: a state dict brings its own
    model, other = (model_of("fixed", seed, {"mask": CHESS}) for seed in (0, 1))
    model.load_state_dict(other.state_dict())
    assert torch.equal(weight_of(model), weight_of(other))


def test_rounded_numbers_are_the_same_numbers():
    model = model_of("fixed")
    half = copy.deepcopy(model).bfloat16()
    model.load_state_dict(half.state_dict())
    assert torch.equal(weight_of(model)[CHESS], NUMBERS[CHESS].bfloat16().float())
    model.load_state_dict(model_of("fixed", 1).state_dict())
    assert torch.equal(weight_of(model)[CHESS], NUMBERS[CHESS])


@every_law
def test_dictionaries_are_converted_without_the_layers_values(name):
    model, other = model_of(name), model_of(name, 1)
    tied = other.state_dict()
    dense = tp.untie_state_dict(model, tied)
    assert torch.equal(dense["0.weight"], weight_of(other))
    again = tp.tie_state_dict(model, dense)
    assert again.keys() == tied.keys()
    assert all(torch.equal(again[key], tied[key]) for key in tied)
    wrong = model_of(name, 1, OTHERS[name]).state_dict()
    with pytest.raises(tp.TieError):
        tp.untie_state_dict(model, dict(wrong))


def test_untying_a_dictionary_takes_its_own_fixed_numbers():
    model, other = (model_of("fixed", seed, {"mask": CHESS}) for seed in (0, 1))
    dense = tp.untie_state_dict(model, other.state_dict())
    assert torch.equal(dense["0.weight"], weight_of(other))


# Where the data is lost --------------------------------------------------------------------------


@every_law
def test_after_to_empty_reading_raises_until_the_data_is_loaded(name):
    model = model_of(name)
    entries, before = copy.deepcopy(model.state_dict()), weight_of(model)
    dense = tp.dense_state_dict(model)
    model.to_empty(device="cpu")
    spoil(model)
    for use in (
        lambda: model[0].weight,
        lambda: model(torch.ones(1, 4)),
        lambda: tp.dense_state_dict(model),
        lambda: model[0].reset_parameters(),
        lambda: tp.remove_tie(model[0]),
        lambda: pickle.loads(pickle.dumps(model))[0].weight,
        lambda: copy.deepcopy(model)[0].weight,
    ):
        with pytest.raises(tp.TieError, match=r"to_empty.*Load a state dict"):
            use()
    with pytest.raises(RuntimeError, match="no pattern"):
        model.load_state_dict(dense)
    assert name in repr(model)
    assert set(model.state_dict()) == set(entries)
    model.load_state_dict(entries)
    assert torch.equal(weight_of(model), before)


@every_law
def test_on_the_meta_device_reading_raises_until_the_data_is_loaded(name):
    model = model_of(name)
    entries, before = copy.deepcopy(model.state_dict()), weight_of(model)
    model.to("meta")
    with pytest.raises(tp.TieError, match="meta"):
        model[0].weight  # noqa: B018
    model.load_state_dict(entries, assign=True)
    assert torch.equal(weight_of(model), before)


@every_law
def test_tied_on_the_meta_device_and_loaded(name):
    other = model_of(name, 1)
    for entries in (other.state_dict(), tp.dense_state_dict(other)):
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        tp.register_tie(model[0], name, **LAWS[name])
        assert model[0].weight.is_meta
        model.load_state_dict(copy.deepcopy(entries), assign=True)
        assert torch.equal(weight_of(model), weight_of(other))
    model.to_empty(device="cpu")
    spoil(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(weight_of(model), weight_of(other))


@every_law
def test_a_pickle_without_the_data_is_healed_by_loading(name):
    model = model_of(name)
    entries, before = copy.deepcopy(model.state_dict()), weight_of(model)
    model.to_empty(device="cpu")
    spoil(model)
    content = pickle.dumps(model)
    shared_tables._last.clear()  # as in another process
    again = pickle.loads(content)
    assert again[0].parametrizations.weight.original0.shape == free_value(model[0]).shape
    again.load_state_dict(entries)
    assert torch.equal(weight_of(again), before)


def test_codes_that_were_overwritten_are_told():
    model = model_of("masked")
    (codes,) = rule_of(model).buffers()
    kept = codes.clone()
    with torch.no_grad():
        codes.zero_()
    with pytest.raises(tp.TieError, match="overwritten"):
        model(torch.ones(1, 4))
    codes.copy_(kept)
    model(torch.ones(1, 4))
    codes.data = torch.zeros_like(kept)  # another memory, which no version counts
    with pytest.raises(tp.TieError, match="overwritten"):
        model(torch.ones(1, 4))


def test_averaged_models_keep_the_codes():
    # torch averages buffers as well, which bytes need not survive
    for average in ({}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}):
        averaged = AveragedModel(model_of("index"), use_buffers=True, **average)
        for _ in range(5):
            averaged.update_parameters(model_of("index", 1))
        averaged(torch.ones(1, 4))
        assert rule_of(averaged.module).why_stale() is None


def test_checking_costs_nothing_at_later_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(
        coded, "checksum_of", lambda data, real=coded.checksum_of: calls.append(1) or real(data)
    )
    model = model_of("masked")
    model(torch.ones(1, 4))
    calls.clear()
    for _ in range(3):
        model(torch.ones(1, 4)).sum().backward()
    assert not calls
    model._apply(torch.clone)  # as for another device: the buffers are other objects now
    for _ in range(3):
        model(torch.ones(1, 4))
    assert len(calls) == 1
    # what DistributedDataParallel does before a forward
    (codes,) = rule_of(model).buffers()
    codes.copy_(codes.clone())
    model(torch.ones(1, 4))
    model(torch.ones(1, 4))
    assert len(calls) == 2


# Casts, copies and tools ------------------------------------------------------------------------


@every_law
def test_codes_are_not_cast(name):
    model = model_of(name)
    before = {key: value.clone() for key, value in rule_of(model).data().items()}
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        held = rule_of(model).data()
        for key, value in held.items():
            if key == "values":
                assert value.dtype == dtype
            else:
                assert torch.equal(value, before[key])
        assert model[0].weight.dtype == dtype


@every_law
def test_copies_and_pickles_stand_alone(name):
    model = model_of(name)
    before = weight_of(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    shared_tables._last.clear()
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(weight_of(again), before)
        assert not {id(value) for value in again.buffers()} & {id(v) for v in model.buffers()}
        spoil(again)
        assert torch.equal(weight_of(model), before)


@every_law
def test_frozen_and_cached_weights_are_the_computed_ones(name):
    model = model_of(name)
    before = weight_of(model)
    with tp.frozen(model.eval()), torch.no_grad():
        assert torch.equal(model[0].weight, before)
    cached = tp.register_tie(nn.Linear(4, 4), name, cache=True, **LAWS[name])
    twin = copy.deepcopy(cached)
    x = torch.ones(3, 4)
    with torch.no_grad():
        cached.eval()(x)
        free_value(cached).add_(1)
        free_value(twin).add_(1)
        assert torch.equal(cached(x), twin(x))


@every_law
def test_ensembles_of_stacked_states_are_computed_together(name):
    models = [model_of(name, seed) for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(5, 4)

    def output(parameters, buffers):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    together = torch.vmap(output)(parameters, buffers)
    torch.testing.assert_close(together, torch.stack([model(x) for model in models]))


def test_functional_calls_cannot_put_another_pattern_in():
    model = model_of("masked")
    key = "0.parametrizations.weight.0.mask_bits"
    other = rule_of(model_of("masked", 0, OTHERS["masked"])).data()["mask_bits"]
    with pytest.raises(tp.TieError, match="overwritten"):
        torch.func.functional_call(model, {key: other}, (torch.ones(1, 4),))


@every_law
def test_compiled_and_exported_programs_have_no_need_to_check(name):
    torch._dynamo.reset()
    model = model_of(name)
    x = torch.randn(3, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


@every_law
def test_an_optimizer_moves_with_the_tie_and_back(name):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    for _ in range(2):
        layer(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
    tp.register_tie(layer, name, optimizer=optimizer, **LAWS[name])
    (moments,) = [optimizer.state[p]["exp_avg"] for p in layer.parametrizations.weight.parameters()]
    assert moments.shape == free_value(layer).shape
    tp.remove_tie(layer, optimizer=optimizer)
    assert optimizer.state[layer.weight]["exp_avg"].shape == (4, 4)
    assert not list(layer.buffers())


def test_given_to_torch_directly():
    layer = nn.Linear(4, 4)
    dense = layer.weight.detach().clone()
    rule = tp.available_rules()["fixed"](mask=CHESS)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", rule)
    assert torch.equal(layer.weight, dense)
    assert "parametrizations.weight.0.mask_bits" in layer.state_dict()


def test_a_rule_that_did_not_fit_fits_elsewhere():
    rule = tp.available_rules()["fixed"](mask=CHESS)
    with pytest.raises(tp.TieError):
        tp.register_tie(nn.Linear(5, 4), rule)
    other = nn.Linear(4, 4)
    with pytest.raises(tp.TieError, match="holds"):  # after the numbers were taken
        tp.register_tie(other, rule, optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters()))
    layer = nn.Linear(4, 4)
    dense = layer.weight.detach().clone()
    tp.register_tie(layer, rule)
    assert torch.equal(layer.weight, dense)


# Laws of users -----------------------------------------------------------------------------------


class Diagonals(Coded):
    """A user's law: equal numbers for diagonals, of which a vector says how they are shared."""

    law = "W[o, c] = w[d[o + c]]"

    def __init__(self, shares: torch.Tensor | str) -> None:
        super().__init__()
        if isinstance(shares, str):
            self.expect(shares)
        else:
            self.keep(tuple(shares.shape), {"share_bits": pack_numbers(shares, int(shares.max()))})

    def options(self):
        return {"shares": self.tag}

    def check(self, layout):
        reason = super().check(layout)
        if reason is None and self.coded_shape != (sum(layout.shape) - 1,):
            return Reason(f"{self.coded_shape} is not the number of diagonals.")
        return reason

    def symmetries(self, weight):
        shares = unpack_numbers(self.data()["share_bits"], self.coded_shape[0])
        rows, columns = weight.shape
        where = shares[torch.arange(rows)[:, None] + torch.arange(columns)].flatten()
        first = [int((where == number).nonzero()[0, 0]) for number in where]
        yield weight.flatten()[first].view(weight.shape)


def test_a_law_of_a_user_has_the_same_life(registry, tmp_path):
    tp.register_rule("diagonals")(Diagonals)
    shares = torch.tensor([0, 1, 0, 2, 1, 2, 0])
    layer = tp.register_tie(nn.Linear(4, 4), "diagonals", shares=shares)
    assert tp.get_tie(layer).free_count == 3
    tp.save(layer, tmp_path / "law.safetensors")
    again = tp.load(tmp_path / "law.safetensors", nn.Linear(4, 4))
    assert torch.equal(again.weight, layer.weight)


class WithMore(Diagonals):
    def __init__(self, shares):
        super().__init__(shares)
        self.register_buffer("scale", torch.ones(1))


def test_a_buffer_that_is_no_data_is_refused_or_kept_as_data():
    shares = torch.tensor([0, 1, 0, 2, 1, 2, 0])
    layer = tp.register_tie(nn.Linear(4, 4), WithMore, shares=shares)
    assert "parametrizations.weight.0.scale" in layer.state_dict()

    class WithLayer(Diagonals):
        def __init__(self, shares):
            super().__init__(shares)
            self.inner = nn.Linear(2, 2)

    with pytest.raises(tp.TieError, match="holds the layer"):
        tp.register_tie(nn.Linear(4, 4), WithLayer, shares=shares)
