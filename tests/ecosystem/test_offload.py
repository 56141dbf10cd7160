"""Models whose weights are elsewhere between calls: accelerate's and diffusers' offloading (S38).

The oracle is the output before offloading. Junk is left in freed memory, so that values which are
not there do not look like zeros.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import tiedparam as tp
from tiedparam import TieError
from tiedparam.laws import Linked

accelerate = pytest.importorskip("accelerate")

CPU = torch.device("cpu")
EXAMPLES = [
    pytest.param(name, index, id=f"{name}-{index}", marks=[pytest.mark.slow] if index else [])
    for name, kind in tp.available_rules().items()
    for index in range(len(kind.examples()))
]


def tied(name: str, index: int):
    """A model with one tied layer in the order of its forward, that layer, and an input."""
    example = tp.available_rules()[name].examples()[index]
    torch.manual_seed(index)
    model = example.build()
    layer = model.get_submodule(example.path)
    tp.register_tie(layer, name, example.tensor_name, root=model, **example.options)
    if not isinstance(model, nn.Sequential):
        children = list(model.children()) if example.path else [model]
        model = nn.Sequential(*children)
    return model.eval(), layer, sample(model[0])


def sample(layer: nn.Module) -> torch.Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.randint(0, layer.num_embeddings, (2, 3))
    if isinstance(layer, nn.Linear):
        return torch.randn(2, layer.in_features)
    return torch.randn(2, layer.in_channels, *(6,) * len(layer.kernel_size))


def leave_junk() -> None:
    junk = [torch.full((size,), 1e30) for size in range(1, 300)]
    del junk


def dispatch(model, device_map, folder):
    return accelerate.dispatch_model(
        model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


DOORS = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, CPU),
    "cpu_offload with buffers": lambda model, folder: accelerate.cpu_offload(
        model, CPU, offload_buffers=True
    ),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, str(folder), CPU),
    "cpu_offload_with_hook": lambda model, folder: accelerate.cpu_offload_with_hook(model, CPU),
    "dispatch_model, all on the CPU": lambda model, folder: dispatch(model, {"": "cpu"}, folder),
    "dispatch_model, all on disk": lambda model, folder: dispatch(
        model, {name: "disk" for name, _ in model.named_children()}, folder
    ),
    "dispatch_model, first on disk": lambda model, folder: dispatch(
        model, {name: "cpu" if int(name) else "disk" for name, _ in model.named_children()}, folder
    ),
}


@pytest.mark.feature(
    "Libraries",
    "accelerate's `cpu_offload`, `disk_offload`, `dispatch_model`; a copy's source is loaded too",
)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("name", "index"), EXAMPLES)
def test_s38_offloaded_layers_compute_as_before(name, index, door, tmp_path):
    model, _, x = tied(name, index)
    with torch.no_grad():
        wanted = model(x).clone()
        DOORS[door](model, tmp_path)
        leave_junk()
        away = [value.device for value in model.parameters()]
        for _ in range(2):  # loaded and put away, twice
            torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
            assert [value.device for value in model.parameters()] == away


@pytest.mark.parametrize(("name", "index"), EXAMPLES)
def test_infer_auto_device_map_counts_the_free_values(name, index):
    model, _, x = tied(name, index)
    from accelerate.utils import compute_module_sizes

    sizes = compute_module_sizes(model)
    held = [*model.parameters(), *model.buffers()]  # a law that is data has it in buffers
    assert sizes[""] == sum(value.numel() * value.element_size() for value in held)
    device_map = accelerate.infer_auto_device_map(model, max_memory={"cpu": sizes[""] * 2})
    with torch.no_grad():
        wanted = model(x).clone()
        dispatch(model, device_map, "unused")
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("on", ["cpu", "disk"])
@pytest.mark.parametrize(("name", "index"), EXAMPLES)
def test_load_checkpoint_and_dispatch_of_a_tied_checkpoint(name, index, on, tmp_path):
    model, _, x = tied(name, index)
    torch.save(model.state_dict(), tmp_path / "tied.bin")
    with torch.no_grad():
        wanted = model(x).clone()
        for value in model.parameters():
            value.data = torch.full_like(value, 1e30)
        accelerate.load_checkpoint_and_dispatch(
            model,
            str(tmp_path / "tied.bin"),
            device_map={name: on for name, _ in model.named_children()},
            offload_folder=str(tmp_path / "offloaded"),
        )
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_ties_are_neither_made_nor_removed_while_accelerate_offloads():
    model, layer, x = tied("row_repeat", 0)
    with torch.no_grad():
        wanted = model(x).clone()
    accelerate.cpu_offload(model, CPU)
    with pytest.raises(TieError, match=r"cannot untie .* accelerate offloads.*remove_hook"):
        tp.remove_tie(layer)
    with pytest.raises(TieError, match="cannot tie .* accelerate offloads"):
        tp.register_tie(layer, "row_repeat", "bias")
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    tp.remove_tie(layer)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("door", ["cpu_offload", "disk_offload"])
@pytest.mark.parametrize(("name", "index"), EXAMPLES)
def test_s38_offloaded_layers_compute_in_a_frozen_block(name, index, door, tmp_path):
    """They are computed at every call, since that is when their values are there."""
    model, _, x = tied(name, index)
    with torch.no_grad():
        wanted = model(x).clone()
        DOORS[door](model, tmp_path)
        leave_junk()
        with tp.frozen(model):
            torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.feature(
    "Libraries",
    "saving, loading and writing the values of a model that accelerate offloads",
    refused="the values are elsewhere, and a write would be lost; call "
    "`remove_hook_from_module(model, recurse=True)` first",
)
def test_an_offloaded_model_is_saved_and_written_after_the_call_that_the_message_names(tmp_path):
    model, layer, x = tied("row_repeat", 0)
    with torch.no_grad():
        wanted = model(x).clone()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for value in other.parameters():
            value.add_(1)
    tp.save(other, tmp_path / "other.safetensors")
    accelerate.cpu_offload(model, CPU)
    attempts = {
        "load": lambda: tp.load(tmp_path / "other.safetensors", model),
        "save": lambda: tp.save(model, tmp_path / "a.safetensors"),
        "export": lambda: tp.export_dense(model, tmp_path / "a.safetensors"),
        "init_": lambda: tp.init_(layer, nn.init.zeros_),
        "assign_": lambda: tp.assign_(layer, torch.zeros_like(layer.weight)),
        "assignment": lambda: setattr(layer, "weight", torch.zeros_like(layer.weight)),
        "reset": lambda: layer.reset_parameters(),
    }
    calls = set()
    for name, attempt in attempts.items():
        with pytest.raises(TieError, match=r"accelerate.* Call accelerate\.hooks\.") as caught:
            attempt()
        calls |= set(re.findall(r"Call accelerate\.(.*) first\.$", str(caught.value)))
        with torch.no_grad():
            torch.testing.assert_close(model(x), wanted, msg=name)
    assert [file.name for file in tmp_path.iterdir()] == ["other.safetensors"]
    (call,) = calls
    eval(call, {"hooks": accelerate.hooks, "model": model})
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted)
    attempts["save"]()
    plain = copy.deepcopy(model)
    tp.untie_model(plain)
    with torch.no_grad():
        torch.testing.assert_close(tp.load(tmp_path / "a.safetensors", plain)(x), wanted)
    attempts["load"]()
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x))
    for name in ("export", "assign_", "assignment", "init_"):
        attempts[name]()
    assert not layer.weight.any()
    attempts["reset"]()
    assert layer.weight.any()


def test_a_forward_taken_while_tied_computes_after_untying():
    """Wrappers keep the bound forward that they found, as accelerate's hooks do."""
    layer = tp.register_tie(nn.Linear(16, 8), "row_repeat", init="rescale")
    x, found = torch.randn(2, 16), layer.forward
    layer.forward = lambda x: found(x) + 1
    tp.remove_tie(layer)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias) + 1)


class Blocks(nn.Module):
    """What diffusers offloads in groups: a module with a list of blocks."""

    def __init__(self, blocks: nn.Sequential) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.feature("Libraries", "diffusers' group offloading; copies on disk raise")
@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize(("name", "index"), EXAMPLES)
def test_s38_groups_that_are_offloaded_compute_as_before_or_raise(
    name, index, level, disk, tmp_path
):
    hooks = pytest.importorskip("diffusers.hooks")
    model, layer, x = tied(name, index)
    top = Blocks(model)
    with torch.no_grad():
        wanted = top(x).clone()
        hooks.apply_group_offloading(
            top, "cpu", "cpu", level, num_blocks_per_group=1,
            offload_to_disk_path=str(tmp_path) if disk else None,
        )  # fmt: skip
        leave_junk()
        if disk and issubclass(tp.available_rules()[name], Linked):
            with pytest.raises(TieError, match="diffusers keeps the source .* on disk"):
                top(x)
            return
        for _ in range(2):
            torch.testing.assert_close(top(x), wanted, rtol=1e-5, atol=1e-5)
    if disk:
        with pytest.raises(TieError, match="cannot untie .* diffusers keeps its values on disk"):
            tp.remove_tie(layer, tp.available_rules()[name].examples()[index].tensor_name)
