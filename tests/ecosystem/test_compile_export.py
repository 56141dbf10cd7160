"""torch.compile, torch.export and ahead-of-time compilation of models with ties."""

from __future__ import annotations

import copy
import io
import re
import shutil

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support import ROOT, older_than

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Net(nn.Module):
    """One layer for every rule, and stock layers between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 8, 3, padding=1)
        self.mix = nn.Conv2d(8, 8, 3, padding=1)
        self.square = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 16)
        self.out = nn.Linear(16, 8)

    def forward(self, x):
        x = self.mix(self.stem(x).tanh()).tanh()
        x = self.square(x).mean((-2, -1))
        return self.out(self.head(x).tanh())


def tie_all(model: Net) -> Net:
    tp.register_tie(model.stem, "channel_shared", over="in", init="rescale", root=model)
    tp.register_tie(model.mix, "flip_sym", root=model)
    tp.register_tie(model.square, "squared_copy", source=model.mix, root=model)
    tp.register_tie(model.head, "row_repeat", groups=2, init="rescale", root=model)
    tp.register_tie(model.out, "copy", source=model.head, fn=torch.t, root=model)
    return model


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 8, 6, 6)


class Counter:
    """A backend that counts the graphs it was given."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.graphs = 0
        self.inner = torch._dynamo.backends.registry.lookup_backend(backend)

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.inner(graph, inputs)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.feature(
    "Compile and export", "`torch.compile(fullgraph=True)`: one graph forward, one backward"
)
def test_one_graph_forward_and_backward():
    model = tie_all(Net())
    counter = Counter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert counter.graphs == 1
    results = []
    for run in (model, compiled):
        model.zero_grad()
        run(x).square().sum().backward()
        results.append(gradients(model))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    assert counter.graphs == 2  # one with gradients, one without


@pytest.mark.slow
@pytest.mark.feature(
    "Compile and export", "`torch.compile`: training steps without a recompilation"
)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_no_recompiles_over_training_steps(optimizer):
    compiled_model = tie_all(Net())
    eager_model = copy.deepcopy(compiled_model)
    counter = Counter()
    losses = []
    for model, compile_it in ((compiled_model, True), (eager_model, False)):
        steps = optimizer(model.parameters(), lr=0.01)
        forward = torch.compile(model, fullgraph=True, backend=counter) if compile_it else model
        torch.manual_seed(3)
        losses.append([])
        for _ in range(6):
            loss = forward(images()).square().mean()
            steps.zero_grad()
            loss.backward()
            steps.step()
            losses[-1].append(loss.item())
    assert counter.graphs == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != losses[0][-1]
    weight = compiled_model.mix.weight
    assert torch.equal(weight, weight.transpose(0, 1).flip(2, 3))


@pytest.mark.slow
@pytest.mark.feature("Compile and export", "`torch.compile` with a dynamic batch")
def test_a_dynamic_batch_is_one_graph():
    model = tie_all(Net())
    counter = Counter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for batch in (2, 3, 5, 9):
        x = images(batch)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert counter.graphs == 1


@pytest.mark.slow
@pytest.mark.feature(
    "Compile and export",
    "tying and untying after `torch.compile`",
    limit="a tied layer that was compiled by itself is compiled anew after untying",
)
def test_tying_and_untying_after_compile():
    model = Net()
    counter = Counter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = images()
    dense = compiled(x)
    tie_all(model)
    tied = compiled(x)
    torch.testing.assert_close(tied, model(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tied, dense)
    for layer in (model.out, model.square, model.mix, model.stem, model.head):
        tp.remove_tie(layer)
        torch.testing.assert_close(compiled(x), tied, rtol=1e-4, atol=1e-5)
    assert counter.graphs == 6  # dense, tied, four in between; untied is dense again
    with torch.no_grad():
        model.mix.weight.zero_()
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(compiled(x), tied)


def test_a_layer_compiled_by_itself_and_untied_says_so_or_computes_right():
    layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
    x = torch.randn(2, 4)
    strict = torch.compile(layer, fullgraph=True, backend="aot_eager")
    loose = torch.compile(layer, backend="aot_eager")
    strict(x), loose(x)
    tp.remove_tie(layer)
    with torch.no_grad():
        layer.weight.add_(1)
    torch.testing.assert_close(loose(x), layer(x))
    if older_than("2.11"):
        torch.testing.assert_close(strict(x), layer(x))
    else:
        with pytest.raises(RuntimeError, match="no compiled frames"):
            strict(x)
    again = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(again(x), layer(x))


def test_loading_and_assigning_after_compile_are_seen():
    model, other = tie_all(Net()), tie_all(Net())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images()
    before = compiled(x)
    for entries in (other.state_dict(), tp.dense_state_dict(other)):
        model.load_state_dict({k: v * 0 for k, v in entries.items()})
        assert not torch.allclose(compiled(x), before)
        model.load_state_dict(entries)
        torch.testing.assert_close(compiled(x), other(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.feature(
    "Compile and export", "`torch.export`, strict and not, dynamic shapes, saved and loaded"
)
@pytest.mark.parametrize("strict", [True, False])
def test_export_of_every_rule(strict):
    model = tie_all(Net()).eval()
    if strict and older_than("2.9"):  # which copies each layer alone to learn its output's shape
        with pytest.raises(Exception, match="without its source"):
            torch.export.export(model, (images(3),), strict=True)
        return
    batch = torch.export.Dim("batch", min=1, max=64)
    size = torch.export.Dim("size", min=4, max=32)
    program = torch.export.export(
        model, (images(3),), strict=strict, dynamic_shapes=({0: batch, 2: size, 3: size},)
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert loaded.state_dict.keys() == model.state_dict().keys()  # free values, no dense weight
    for shape in ((1, 8, 6, 6), (3, 8, 6, 6), (5, 8, 9, 9)):
        x = torch.randn(shape)
        for run in (program.module(), loaded.module()):
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.feature("Compile and export", "training an exported program: the law holds")
def test_an_exported_program_trains_under_the_law():
    model = tie_all(Net())
    program = copy.deepcopy(torch.export.export(model, (images(),), strict=False).module())
    optimizer = torch.optim.SGD(program.parameters(), lr=0.1)
    program(images()).square().mean().backward()
    optimizer.step()
    trained = tie_all(Net())
    trained.load_state_dict(program.state_dict())
    x = images()
    torch.testing.assert_close(program(x), trained(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(program(x), model(x))


def test_s33_an_export_computes_the_weight_and_bakes_in_no_constant():
    model = tie_all(Net())
    program = torch.export.export(model, (images(),), strict=False)
    assert not program.constants
    module = copy.deepcopy(program.module())
    x = images()
    before = module(x)
    with torch.no_grad():
        for parameter in [*module.parameters(), *model.parameters()]:
            parameter.mul_(1.5)
    torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(module(x), before)


@pytest.mark.slow
@pytest.mark.feature(
    "Compile and export", "AOTInductor: compiled, packaged, loaded", needs="a C++ compiler"
)
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_aot_compiled_package(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).eval()
    tp.register_tie(model[0], "flip_sym")
    tp.register_tie(model[2], "row_repeat", groups=2)
    batch = torch.export.Dim("batch", min=1, max=64)
    # by the function that docs/recipes/deployment.md shows, and does not call
    page = (ROOT / "docs" / "recipes" / "deployment.md").read_text(encoding="utf-8")
    (shown,) = re.findall(
        r"^```python\n(def compile_package.*?)^```$", page, re.MULTILINE | re.DOTALL
    )
    exec(shown, found := {"torch": torch})
    example, shapes = (torch.randn(3, 8),), ({0: batch},)
    loaded = found["compile_package"](model, example, str(tmp_path / "model.pt2"), shapes)
    with torch.no_grad():
        for count in (1, 4):
            x = torch.randn(count, 8)
            torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.feature("Compile and export", "inductor's freezing and constant folding")
def test_inductor_freezing():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    tp.register_tie(model[0], "flip_sym")
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    x = images()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.feature("Compile and export", "`torch.jit.trace`")
def test_jit_trace():
    model = tie_all(Net()).eval()
    traced = torch.jit.trace(model, (images(),))
    x = images(3)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.mix.parametrizations.weight.original0.mul_(2)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.feature(
    "Compile and export",
    "`torch.jit.script`",
    refused="torch scripts no parametrized layer; untie first, or use `torch.jit.trace` or export",
)
def test_jit_script_is_refused():
    layer = tp.register_tie(nn.Linear(4, 4), "flip_sym")
    x = torch.randn(2, 4)
    before = layer(x)
    with pytest.raises(Exception, match="Unknown type annotation|script"):
        torch.jit.script(layer)(x)
    assert torch.equal(layer(x), before)
    tp.remove_tie(layer)
    torch.testing.assert_close(torch.jit.script(layer)(x), before)


@pytest.mark.feature("Compile and export", "`torch.fx.symbolic_trace`")
def test_symbolic_trace():
    model = tie_all(Net()).eval()
    x = images()
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
