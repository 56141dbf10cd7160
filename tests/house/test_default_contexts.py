"""Default devices and dtypes of the user's change nothing of what the library computes."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support import older_than
from tiedparam.cli.model_from_file import open_model

LIBRARY = Path(tp.__file__).parent
MAKERS = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace",
    "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor",
    "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
"""torch's functions that go by a default device."""


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "with torch.device('meta')": lambda: torch.device("meta"),
    "set_default_device('meta')": lambda: default_device("meta"),
    "set_default_dtype(float64)": lambda: default_dtype(torch.float64),
    "set_default_dtype(bfloat16)": lambda: default_dtype(torch.bfloat16),
}
INPUT = torch.linspace(-1, 1, 2 * 4 * 7 * 7).reshape(2, 4, 7, 7)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.conv = nn.Conv2d(4, 4, 3, padding=1)
    model.norm = nn.BatchNorm2d(4)
    model.streams = nn.Conv2d(4, 8, 3, groups=2)
    model.up = nn.ConvTranspose2d(8, 4, 2)
    model.again = nn.Conv2d(4, 4, 3, padding=1)
    model.big = nn.Conv2d(4, 4, 3)
    model.linear = nn.Linear(4, 6)
    with torch.no_grad():
        model.conv.weight += model.conv.weight.transpose(0, 1).flip(2, 3)
    return model


PLAN = {
    "conv": "flip_sym",
    "streams": ("channel_shared", {"over": "groups"}),
    "up": ("channel_shared", {"over": "in"}),
    "again": ("squared_copy", {"source": "conv"}),
    "linear": [("row_repeat", {"groups": 2}), ("row_repeat", {"tensor_name": "bias"})],
}


def scan(model: nn.Module, folder: Path) -> Any:
    return tp.scan(model, example=INPUT).to_data()


def residuals(model: nn.Module, folder: Path) -> Any:
    return [
        tp.residual(model.conv, "flip_sym"),
        tp.residual(model.up, "channel_shared", over="out"),
        tp.residual(model.again, "copy", source=model.conv),
        tp.residual(model.linear, "row_repeat", "bias"),
    ]


def tied(model: nn.Module, folder: Path, init: str = "project") -> Any:
    report = tp.tie_model(model, PLAN, init=init)
    return [report.to_data(), model.state_dict(), model(INPUT), repr(model)]


def rescaled(model: nn.Module, folder: Path) -> Any:
    return tied(model, folder, "rescale")


def trained(model: nn.Module, folder: Path) -> Any:
    tp.tie_model(model, PLAN)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(INPUT).square().sum().backward()
        optimizer.step()
    tp.untie_model(model, optimizer=optimizer)
    tp.tie_model(model, PLAN, optimizer=optimizer)
    # torch's own counter of steps goes by the default dtype
    states = [{k: v for k, v in s.items() if k != "step"} for s in optimizer.state.values()]
    assert all("exp_avg" in state for state in states)
    return [model.state_dict(), states]


def frozen(model: nn.Module, folder: Path) -> Any:
    tp.tie_model(model, PLAN)
    model.eval()
    with tp.frozen(model), torch.no_grad():
        return model(INPUT)


def files(model: nn.Module, folder: Path) -> Any:
    tp.tie_model(model, PLAN)
    tp.save(model, folder / "tied.safetensors")
    tp.export_dense(model, folder / "dense.safetensors")
    # the model to fill is the user's, and lies where the user says
    other = make_model_on_the_cpu()
    again = make_model_on_the_cpu()
    tp.load(folder / "tied.safetensors", other)
    tp.load(folder / "dense.safetensors", again)
    pickled = make_model_on_the_cpu()
    torch.save(make_model_on_the_cpu().state_dict(), folder / "dense.pt")
    tp.load(folder / "dense.pt", pickled)
    loaded = [filled.state_dict() for filled in (other, again, pickled)]
    return [*loaded, *((folder / f"{kind}.safetensors").read_bytes() for kind in ("tied", "dense"))]


def offline(model: nn.Module, folder: Path) -> Any:
    torch.save(model.state_dict(), folder / "dense.pt")
    opened = open_model(folder / "dense.pt")
    seen = tp.scan(opened)
    tp.tie_model(opened, seen.plan())
    tp.save(opened, folder / "found.safetensors")
    found = open_model(folder / "found.safetensors")
    return [seen.to_data(), seen.plan(), opened.state_dict(), found.state_dict()]


def values(model: nn.Module, folder: Path) -> Any:
    tp.tie_model(model, PLAN)
    tp.assign_(model.conv, torch.ones_like(tp.dense_state_dict(model)["conv.weight"]))
    tp.init_(model.streams, nn.init.ones_)
    dense = tp.dense_state_dict(model)
    return [dense, tp.tie_state_dict(model, dense), tp.report(model, example=INPUT).to_data()]


def pictures(model: nn.Module, folder: Path) -> Any:
    canvas_of = pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg
    seen = tp.scan(model)
    tp.tie_model(model, PLAN)
    drawn = [
        *(tp.draw_orbits(model.get_submodule(name)) for name in ("conv", "up", "again", "linear")),
        tp.draw_weights([model.conv, model.up, torch.ones_like(INPUT)]),
        tp.draw_residuals(seen),
        tp.draw_scan(seen),
    ]
    canvases = [canvas_of(figure) for figure in drawn]
    for canvas in canvases:
        canvas.draw()
    return [bytes(canvas.buffer_rgba()) for canvas in canvases]


JOBS = [scan, residuals, tied, rescaled, trained, frozen, files, offline, values, pictures]


def make_model_on_the_cpu() -> nn.Module:
    with default_dtype(torch.float32), torch.device("cpu"):
        return make_model()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.slow
@pytest.mark.feature(
    "Whole models", "default devices and dtypes of your own while the library works"
)
@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_results_are_the_same_under_default_devices_and_dtypes(context, job, tmp_path):
    if job is trained and "meta" in context and older_than("2.13"):
        pytest.skip("Adam of this torch counts its steps on the default device, and reads them")
    expected = job(make_model_on_the_cpu(), tmp_path)
    model = make_model_on_the_cpu()
    with CONTEXTS[context]():
        result = job(model, tmp_path)
    assert same(result, expected)


def calls_without_device(source: str) -> list[str]:
    """Calls of a maker of tensors, or of a layer, that leave the device to the user's default."""
    found = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        # the layers of a rule's examples are made where the user says
        if isinstance(node, ast.FunctionDef) and node.name == "examples":
            node.body.clear()
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner, name = ast.unparse(node.func.value), node.func.attr
        makes = (owner == "torch" and name in MAKERS) or (
            owner == "nn" and hasattr(getattr(nn, name, None), "reset_parameters")
        )
        if makes and "device" not in {keyword.arg for keyword in node.keywords}:
            found.append(ast.unparse(node))
    return found


def test_no_tensor_of_the_library_goes_by_a_default_device():
    assert calls_without_device("torch.ones(3); nn.Linear(3, 3); nn.ReLU(); torch.exp(x)") == [
        "torch.ones(3)",
        "nn.Linear(3, 3)",
    ]
    checked = 0
    for path in sorted(LIBRARY.rglob("*.py")):
        if path.name == "demo.py" or path.parent.name == "testing":  # they set their own context
            continue
        assert calls_without_device(path.read_text(encoding="utf-8")) == [], path.name
        checked += 1
    assert checked > 40
