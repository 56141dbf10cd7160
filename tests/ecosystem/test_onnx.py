"""ONNX: the dynamo exporter, run by onnxruntime."""

from __future__ import annotations

import copy
import functools
import io
import math
import warnings

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support import form_of
from tests.support.cases import CASES, sample_input

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def _translated_once():
    """The exporter translates hundreds of functions at each export, always to the same ones."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    once = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", once)
        yield


def exported(layer: nn.Module, inputs: tuple, dynamic: bool = True):
    """The ONNX program of a layer, with a dynamic batch."""
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = tuple({0: batch} for _ in inputs) if dynamic else None
    return torch.onnx.export(
        layer.eval(), inputs, dynamo=True, dynamic_shapes=shapes, verbose=False
    )


def run(program, inputs: tuple) -> torch.Tensor:
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [entry.name for entry in session.get_inputs()]
    values = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return torch.from_numpy(session.run(None, values)[0])


def assert_runs_equal(layer: nn.Module, make_inputs) -> object:
    program = exported(layer, make_inputs(3))
    for batch in (1, 3, 5):
        inputs = make_inputs(batch)
        with torch.no_grad():
            expected = layer(*inputs)
        torch.testing.assert_close(run(program, inputs), expected, rtol=1e-5, atol=1e-5)
    return program


@pytest.mark.slow
@pytest.mark.feature(
    "Compile and export",
    "ONNX (`torch.onnx.export(dynamo=True)`) of every rule, dynamic batch",
    needs="onnxscript, and onnxruntime to run it",
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_example_of_every_rule(case):
    host = case.tied()
    assert_runs_equal(host.layer, lambda batch: sample_input(host.layer, batch))


STRUCTURED = [
    (lambda: nn.Linear(64, 64), "row_repeat", {}, (64,)),
    (lambda: nn.Linear(64, 64), "row_repeat", {"groups": 4}, (64,)),
    (lambda: nn.Linear(64, 48), "channel_shared", {"over": "in"}, (64,)),
    (lambda: nn.Conv1d(16, 16, 3, padding=1), "channel_shared", {"over": "in"}, (16, 12)),
    (lambda: nn.Conv2d(16, 16, 3, stride=2), "channel_shared", {"over": "in"}, (16, 9, 9)),
    (lambda: nn.Conv2d(16, 16, 3, padding="same"), "channel_shared", {"over": "out"}, (16, 8, 8)),
    (
        lambda: nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"),
        "channel_shared", {"over": "all"}, (16, 8, 8),
    ),
    (lambda: nn.Conv2d(16, 16, 3), "row_repeat", {"groups": 2}, (16, 8, 8)),
    (lambda: nn.Conv3d(16, 16, 2), "channel_shared", {"over": "in"}, (16, 4, 4, 4)),
    (lambda: nn.ConvTranspose2d(16, 16, 3, 2), "channel_shared", {"over": "in"}, (16, 5, 5)),
    (lambda: nn.ConvTranspose2d(16, 16, 3, 2), "row_repeat", {}, (16, 5, 5)),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.feature(
    "Compile and export", "ONNX of structured layers: the graph has the cheap form"
)
@pytest.mark.parametrize(("build", "rule", "options", "shape"), STRUCTURED)
def test_forward_layers_export_their_base(build, rule, options, shape):
    layer = tp.register_tie(build(), rule, **options)
    assert form_of(layer, traced=True) == "reduced"
    program = assert_runs_equal(layer, lambda batch: (torch.randn(batch, *shape),))
    graph = program.model.graph
    products = [n for n in graph if n.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm")]
    dense = math.prod(layer.weight.shape)
    for node in products:
        assert math.prod(int(size) for size in node.inputs[1].shape) < dense
    stored = sum(math.prod(v.shape) for v in graph.initializers.values())
    assert stored < dense / 2  # and the file stores no dense weight


@pytest.mark.feature("Compile and export", "ONNX of attention layers")
def test_attention():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    tp.register_tie(layer.linear1, "row_repeat", groups=4)
    tp.register_tie(layer.self_attn, "row_repeat", "in_proj_weight", groups=12)
    tp.register_tie(layer.self_attn.out_proj, "flip_sym")
    layer.eval()
    x = torch.randn(2, 5, 16)
    program = exported(layer, (x,), dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(run(program, (x,)), layer(x), rtol=1e-5, atol=1e-5)


def untied_copy(model: nn.Module) -> nn.Module:
    """As docs/recipes/deployment.md has it: its file loads as fast as that of a stock layer."""
    return tp.untie_model(copy.deepcopy(model))


@pytest.mark.feature("Compile and export", "ONNX of a dense copy: one tensor and one node a layer")
@pytest.mark.parametrize("dynamo", [True, False])
def test_a_dense_copy_exports_its_weight(dynamo):
    onnx = pytest.importorskip("onnx")
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    tp.register_tie(model[0], "flip_sym")
    tp.register_tie(model[2], "copy", source="0", root=model)
    x = torch.randn(1, 8, 7, 7)
    expected = model(x).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            proto = torch.onnx.export(
                untied_copy(model), (x,), dynamo=True, verbose=False
            ).model_proto
        else:
            file = io.BytesIO()
            torch.onnx.export(untied_copy(model), (x,), file, dynamo=False)
            proto = onnx.load_from_string(file.getvalue())
    nodes = [node.op_type for node in proto.graph.node]
    # the older exporter names equal tensors once
    assert [node for node in nodes if node != "Identity"] == ["Conv", "Relu", "Conv"]
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)
    assert tp.is_tied(model[0])  # the model itself stays tied
    assert tp.is_tied(model[2])


FEW_NODES = {
    "block_circulant": {"block": 4},
    "centrosymmetric": {},
    "circulant": {},
    "hankel": {},
    "head_share": {"heads": 8, "groups": 2},
    "hypercomplex": {"algebra": "quaternion"},
    "masked": {"pattern": "lower"},
    "row_repeat": {"groups": 4},
    "set_equivariant": {"items": 8},
    "toeplitz": {},
}


@pytest.mark.slow
@pytest.mark.feature("Compile and export", "ONNX of most laws: at most 7 nodes make the weight")
@pytest.mark.parametrize("rule", FEW_NODES)
def test_few_nodes_make_a_weight(rule):
    layer = tp.register_tie(nn.Linear(256, 256), rule, init="rescale", **FEW_NODES[rule])
    graph = exported(layer, (torch.randn(2, 256),), dynamic=False).model.graph
    assert len([*graph]) <= 1 + 7, [node.op_type for node in graph]
