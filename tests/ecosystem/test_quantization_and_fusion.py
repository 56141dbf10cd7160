"""Quantization and batch-norm fusion: they replace dense weights, so ties must go first."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support import older_than

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def tied_model(rule: str = "flip_sym") -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    options = {"source": model[2]} if rule == "copy" else {}
    tp.register_tie(model[0], rule, root=model, **options)
    return model


def same_state(model, before) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.feature(
    "Quantization and fusion",
    "`torch.ao.quantization.quantize_dynamic`",
    refused="quantized numbers are as many as dense ones; untie first",
)
@pytest.mark.parametrize("rule", ["flip_sym", "row_repeat", "copy"])
def test_dynamic_quantization(rule):
    model = tied_model(rule)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(3, 16)
    expected = model(x)
    with pytest.raises(tp.TieError, match=r"torch\.ao\.quantization .* Linear\(.*remove_tie first"):
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert same_state(model, before)
    assert tp.is_tied(model[0])
    tp.remove_tie(model[0])
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    torch.testing.assert_close(quantized(x), expected, rtol=0.1, atol=0.1)


@pytest.mark.feature(
    "Quantization and fusion", "`quantize_dynamic` of the other layers of the model"
)
def test_dynamic_quantization_of_other_layers():
    model = nn.ModuleDict({"head": tied_model(), "rnn": nn.GRU(4, 4)})
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.GRU}, dtype=torch.qint8)
    assert type(quantized["rnn"]).__module__ != nn.GRU.__module__
    x = torch.randn(3, 16)
    assert torch.equal(quantized["head"](x), model["head"](x))
    assert tp.is_tied(quantized["head"][0])


@pytest.mark.feature(
    "Quantization and fusion",
    "torchao `quantize_`",
    needs="torchao",
    refused="quantized numbers are as many as dense ones; untie first",
)
@pytest.mark.parametrize("rule", ["flip_sym", "row_repeat", "copy"])
def test_torchao(rule):
    torchao = pytest.importorskip("torchao.quantization")
    model = tied_model(rule)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(3, 16)
    expected = model(x)
    with pytest.raises(tp.TieError, match=r"(Int8Tensor|computed from another).*remove_tie first"):
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert same_state(model, before)
    assert torch.equal(model(x), expected)
    tp.remove_tie(model[0])
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert type(model[0].weight.data).__name__ != "Tensor"
    torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.1)


def conv_and_norm(rule: str | None, statistics: bool = True) -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval()
    if statistics:
        nn.init.uniform_(model[1].running_var, 0.5, 2)
        nn.init.normal_(model[1].running_mean)
    if rule:
        tp.register_tie(model[0], rule)
    return model


@pytest.mark.feature(
    "Quantization and fusion",
    "batch-norm fusion: `fuse_conv_bn_eval`, `torch.ao.quantization.fuse_modules`",
    limit="a fused weight that breaks the law is refused; untie first",
)
@pytest.mark.parametrize("fuse", ["fuse_conv_bn_eval", "fuse_modules"])
def test_s24_batch_norm_fusion(fuse):
    def fused(model):
        if fuse == "fuse_modules":
            return torch.ao.quantization.fuse_modules(model, [["0", "1"]])
        return nn.utils.fuse_conv_bn_eval(*model)

    x = torch.randn(2, 4, 6, 6)
    model = conv_and_norm("flip_sym")
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    with pytest.raises(tp.TieError, match=r"breaks the law.*remove_tie first"):
        fused(model)
    assert same_state(model, before)
    assert torch.equal(model(x), expected)
    tp.remove_tie(model[0])
    torch.testing.assert_close(fused(model)(x), expected, rtol=1e-4, atol=1e-5)
    # one kernel per output channel: every channel may be scaled under the law
    model = conv_and_norm("channel_shared")
    expected = model(x)
    result = fused(model)
    torch.testing.assert_close(result(x), expected, rtol=1e-4, atol=1e-5)
    assert tp.is_tied(result[0] if fuse == "fuse_modules" else result)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.feature("Quantization and fusion", "fx fusion", limit="tied layers are left unfused")
def test_fx_fusion_leaves_tied_layers():
    from torch.fx.experimental.optimization import fuse

    x = torch.randn(2, 4, 6, 6)
    model = nn.Sequential(*conv_and_norm("flip_sym"), *conv_and_norm(None)).eval()
    expected = model(x.repeat(1, 1, 2, 2))
    fused = fuse(model)
    torch.testing.assert_close(fused(x.repeat(1, 1, 2, 2)), expected, rtol=1e-4, atol=1e-5)
    norms = [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 1


@pytest.mark.slow
@pytest.mark.feature(
    "Quantization and fusion",
    "torchao's PT2E on an exported model",
    limit="weights that are computed stay in float, as with any parametrization; untie first",
)
@pytest.mark.skipif(older_than("2.11"), reason="torchao quantizes nothing beside an older torch")
@pytest.mark.parametrize("rule", ["flip_sym", "channel_shared"])
def test_s52_pt2e_leaves_tied_weights_in_float(rule):
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    inductor = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3)).eval()
    tp.tie_model(net, {nn.Conv2d: rule}, init="rescale")
    x = torch.randn(4, 3, 8, 8)

    def quantized():
        """The quantized model, and how many of its weights are."""
        config = inductor.get_default_x86_inductor_quantization_config()
        quantizer = inductor.X86InductorQuantizer().set_global(config)
        ready = pt2e.prepare_pt2e(torch.export.export(net, (x,)).module(), quantizer)
        ready(x)
        graph = pt2e.convert_pt2e(ready)
        weights = sum("dequantize_per_channel" in str(node.target) for node in graph.graph.nodes)
        return graph, weights

    wanted = net(x)
    graph, weights = quantized()
    assert weights == 0
    torch.testing.assert_close(graph(x), wanted, rtol=0.1, atol=0.1)
    tp.untie_model(net)
    graph, weights = quantized()
    assert weights == 2
    torch.testing.assert_close(graph(x), wanted, rtol=0.1, atol=0.1)


@pytest.mark.feature("Quantization and fusion", "torchao's `quantize_` of the source of a copy")
def test_a_copy_of_a_quantized_source_is_read_and_untied():
    """Its weight is of torchao's class, which cannot be the write guard's as well."""
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    tp.register_tie(model[0], "copy", source=model[2], root=model)
    quantization.quantize_(model[2], quantization.Int8WeightOnlyConfig())
    numbers = model[2].weight.dequantize()
    assert torch.equal(model[0].weight.dequantize(), numbers)
    x = torch.randn(3, 32)
    wanted = torch.nn.functional.linear(x, numbers, model[0].bias)
    torch.testing.assert_close(model[0](x), wanted)
    tp.remove_tie(model[0])
    torch.testing.assert_close(model[0](x), wanted)
