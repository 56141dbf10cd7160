"""A dense checkpoint comes in through every door that people use (S46), or is told the way.

huggingface/accelerate#938, #1289: by accelerate, and by set_model_state_dict.
"""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

import tiedparam as tp

accelerate = pytest.importorskip("accelerate")

FULL = StateDictOptions(full_state_dict=True)


def stock() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))


def tied(device: str | None = None) -> nn.Sequential:
    with torch.device(device or "cpu"):
        model = stock()
    tp.register_tie(model[0], "flip_sym")
    tp.register_tie(model[2], "row_repeat")
    tp.register_tie(model[2], "row_repeat", "bias")
    tp.register_tie(model[3], "copy", source=model[2], root=model)
    return model


@pytest.fixture
def dense():
    return {key: value.clone() for key, value in tp.dense_state_dict(tied()).items()}


def assert_holds(model: nn.Module, dense) -> None:
    held = tp.dense_state_dict(model)
    assert held.keys() == dense.keys()
    for key, value in dense.items():
        assert torch.equal(held[key], value), key


def file_of(dense, folder):
    safetensors.torch.save_file(dense, folder / "dense.safetensors", {"format": "pt"})
    return str(folder / "dense.safetensors")


def through_accelerate(model, dense, folder, **options):
    accelerate.load_checkpoint_in_model(model, file_of(dense, folder), **options)


DOORS = {
    "load_state_dict": lambda m, dense, _: m.load_state_dict(dense),
    "assign": lambda m, dense, _: m.load_state_dict(dense, assign=True),
    "set_model_state_dict": lambda m, dense, _: set_model_state_dict(m, dict(dense)),
    "full_state_dict": lambda m, dense, _: set_model_state_dict(m, dict(dense), options=FULL),
    "accelerate": through_accelerate,
    "accelerate, strict": lambda *given: through_accelerate(*given, strict=True),
    "accelerate, of torch": lambda m, dense, folder: (
        torch.save(dense, folder / "dense.bin"),
        accelerate.load_checkpoint_in_model(m, str(folder / "dense.bin")),
    ),
}


@pytest.mark.slow
@pytest.mark.feature(
    "Copies and files",
    "a dense checkpoint by `set_model_state_dict`, `full_state_dict=True` or not, and by "
    "accelerate's `load_checkpoint_in_model`",
    needs="accelerate",
)
@pytest.mark.parametrize("door", DOORS)
def test_s46_a_dense_checkpoint_comes_in_through(door, dense, tmp_path):
    model = tied()
    DOORS[door](model, dense, tmp_path)
    assert_holds(model, dense)
    assert tp.is_tied(model[0])
    DOORS[door](model, dense, tmp_path)  # once more, over equal values
    assert_holds(model, dense)


def test_s46_a_model_without_memory_and_one_with_nan_are_completed_too(dense, tmp_path):
    model = tied()
    model[0] = tied("meta")[0]
    set_model_state_dict(model, dict(dense), options=FULL)
    assert_holds(model, dense)
    model = tied()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    set_model_state_dict(model, dict(dense), options=FULL)
    assert_holds(model, dense)


def test_s46_tied_entries_that_are_not_the_models_own_are_refused(dense):
    """Of two values for one tensor, nobody can say which is meant."""
    for key in (key for key in tied().state_dict() if "parametrizations" in key):
        for change in (lambda value: value + 1, torch.Tensor.double, lambda value: 3):
            model = tied()
            own = {key: value.clone() for key, value in model.state_dict().items()}
            with pytest.raises(RuntimeError, match=r"both dense and tied.*tie_state_dict"):
                model.load_state_dict({**own, **dense, key: change(own[key])})
            assert torch.equal(model.state_dict()[key], own[key])
            model.load_state_dict({**model.state_dict(), **dense})
            assert_holds(model, dense)


def device_map_dense(model, dense, folder):
    through_accelerate(model, dense, folder, device_map={"": "cpu"})


def dispatched_dense(model, dense, folder):
    path = file_of(dense, folder)
    accelerate.load_checkpoint_and_dispatch(model, path, device_map={"": "cpu"})


@pytest.mark.feature(
    "Copies and files",
    "a dense checkpoint by accelerate with `device_map=` "
    "(`load_checkpoint_in_model`, `load_checkpoint_and_dispatch`)",
    refused="accelerate sets each tensor under its own key; give it "
    "`tie_state_dict(model, dense)`, or `tp.load(path, model)` before `dispatch_model`",
    needs="accelerate",
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("call", [device_map_dense, dispatched_dense])
def test_s46_accelerate_with_a_device_map_is_refused_before_it_passes_over(
    call, device, dense, tmp_path
):
    model = tied(device)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        tp.TieError, match=r"(?s)pass over '0.weight' of .*dense.safetensors.*tie_state_dict"
    ):
        call(model, dense, tmp_path)
    for key, value in model.state_dict().items():
        assert value.is_meta if device == "meta" else torch.equal(value, before[key])
    # the two ways that the message names
    path = str(tmp_path / "tied.safetensors")
    safetensors.torch.save_file(dict(tp.tie_state_dict(model, dense)), path, {"format": "pt"})
    accelerate.load_checkpoint_and_dispatch(model, path, device_map={"": "cpu"})
    assert_holds(model, dense)
    other = tp.load(file_of(dense, tmp_path), tied(device))
    accelerate.dispatch_model(other, device_map={"": "cpu"}, force_hooks=True)
    assert_holds(other, dense)


def test_a_stock_model_and_a_tied_layer_elsewhere_are_not_held_up(dense, tmp_path):
    plain = stock()
    device_map_dense(plain, dense, tmp_path)
    assert_holds(plain, dense)
    part = {key: value for key, value in dense.items() if key in ("0.bias", "3.bias")}
    model = tied()
    device_map_dense(model, part, tmp_path)
    assert torch.equal(model[3].bias, dense["3.bias"])
    (tmp_path / "dense.safetensors").write_bytes(b"no checkpoint")
    with pytest.raises(Exception, match="(?i)header"):  # accelerate's own
        accelerate.load_checkpoint_in_model(
            model, str(tmp_path / "dense.safetensors"), device_map={"": "cpu"}
        )


def sharded(dense, folder, shards):
    places = {}
    for number, keys in enumerate(shards):
        name = f"model-{number}.safetensors"
        safetensors.torch.save_file({k: dense[k] for k in keys}, folder / name, {"format": "pt"})
        places |= dict.fromkeys(keys, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return str(index)


def test_a_sharded_dense_checkpoint_by_accelerate(dense, tmp_path):
    """It loads shard by shard; a copy whose source comes later is judged too early."""
    keys = list(dense)
    model = tied()
    accelerate.load_checkpoint_in_model(model, sharded(dense, tmp_path, [keys[:4], keys[4:]]))
    assert_holds(model, dense)
    model = tied()
    index = sharded(dense, tmp_path, [keys[4:], keys[:4]])
    with pytest.raises(RuntimeError, match=r"'3.weight' is tied by 'copy'.*tie_state_dict"):
        accelerate.load_checkpoint_in_model(model, index)
    assert_holds(tp.load(index, model), dense)  # tiedparam reads all shards at once
