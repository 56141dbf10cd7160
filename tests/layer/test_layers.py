"""Stock layers beyond Linear and convolutions: embeddings, attention, norms, lazy layers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.cases import assert_refused


def tied_and_dense(layer: nn.Module, rule: str, tensor_name: str = "weight", **options):
    """The tied layer, and the stock one that holds the same effective weights."""
    dense = copy.deepcopy(layer)
    tp.register_tie(layer, rule, tensor_name, **options)
    dense.load_state_dict(tp.dense_state_dict(layer))
    return layer, dense


def assert_same_gradient(tied: nn.Module, dense: nn.Module, tensor_name: str = "weight") -> None:
    expected = tp.get_tie(tied, tensor_name).adjoint(getattr(dense, tensor_name).grad)
    free = list(tied.parametrizations[tensor_name].parameters())
    assert any(value.abs().sum() > 0 for value in expected)
    torch.testing.assert_close([p.grad for p in free], list(expected))


# Embeddings ----------------------------------------------------------------------------------

BAGS = [
    lambda **options: nn.Embedding(6, 4, **options),
    lambda **options: nn.EmbeddingBag(6, 4, mode="sum", **options),
    lambda **options: nn.EmbeddingBag(6, 4, mode="mean", **options),
]
BAG_IDS = ["Embedding", "EmbeddingBag-sum", "EmbeddingBag-mean"]


@pytest.mark.feature("Layers", "`nn.Embedding`, `nn.EmbeddingBag`, also with `scale_grad_by_freq`")
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("build", BAGS, ids=BAG_IDS)
def test_embeddings(build, scale):
    tied, dense = tied_and_dense(build(scale_grad_by_freq=scale), "row_repeat", groups=3)
    indices = torch.tensor([[0, 1, 5], [1, 1, 2]])
    torch.testing.assert_close(tied(indices), dense(indices))
    tied(indices).pow(2).sum().backward()
    dense(indices).pow(2).sum().backward()
    assert_same_gradient(tied, dense)


@pytest.mark.feature(
    "Layers",
    "embeddings with `padding_idx`, `max_norm` or `sparse=True`",
    refused="they write single rows, or keep one apart, which the law does not; build it without",
)
@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"padding_idx": 0}, "padding_idx keeps one row at zero"),
        ({"max_norm": 1.0}, "max_norm writes into single rows"),
        ({"sparse": True}, "its gradients are sparse"),
    ],
)
@pytest.mark.parametrize("build", BAGS, ids=BAG_IDS)
def test_embedding_options_that_write_rows_are_refused(build, option, text):
    assert_refused(build(**option), "row_repeat", text, groups=3)


@pytest.mark.feature(
    "Layers", "a copy-tied embedding honours `padding_idx`: no gradient for that row"
)
def test_a_copied_embedding_honours_padding():
    head, embedding = nn.Linear(4, 6, bias=False), nn.Embedding(6, 4, padding_idx=2)
    tp.register_tie(embedding, "copy", source=head)
    embedding(torch.tensor([[0, 2, 5]])).sum().backward()
    expected = torch.zeros(6, 4)
    expected[[0, 5]] = 1
    assert torch.equal(head.weight.grad, expected)
    with pytest.raises(tp.TieError, match="max_norm"):
        tp.register_tie(nn.Embedding(6, 4, max_norm=1.0), "copy", source=head)


@pytest.mark.feature("Layers", "`nn.Bilinear`")
@pytest.mark.parametrize(
    ("rule", "options"), [("row_repeat", {"groups": 2}), ("channel_shared", {})]
)
def test_bilinear(rule, options):
    tied, dense = tied_and_dense(nn.Bilinear(3, 5, 4), rule, **options)
    inputs = torch.randn(7, 3), torch.randn(7, 5)
    torch.testing.assert_close(tied(*inputs), dense(*inputs))
    tied(*inputs).square().sum().backward()
    dense(*inputs).square().sum().backward()
    assert_same_gradient(tied, dense)


# Attention -----------------------------------------------------------------------------------


def tie_attention(attention: nn.MultiheadAttention) -> None:
    tp.register_tie(attention, "row_repeat", "in_proj_weight", groups=12)
    tp.register_tie(attention, "row_repeat", "in_proj_bias", groups=12)
    tp.register_tie(attention.out_proj, "flip_sym")


@pytest.mark.feature(
    "Layers", "`nn.MultiheadAttention`: `in_proj_weight`, `in_proj_bias`, `out_proj`"
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_s26b_attention(batch_first):
    tied = nn.MultiheadAttention(16, 4, batch_first=batch_first)
    dense = copy.deepcopy(tied)
    tie_attention(tied)
    dense.load_state_dict(tp.dense_state_dict(tied))
    x = torch.randn(3, 5, 16)
    padding = torch.zeros(3 if batch_first else 5, 5 if batch_first else 3, dtype=torch.bool)
    padding[0, -2:] = True
    for training in (True, False):
        for layer in (tied, dense):
            layer.train(training)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                for options in ({}, {"need_weights": False}, {"key_padding_mask": padding}):
                    torch.testing.assert_close(tied(x, x, x, **options), dense(x, x, x, **options))
    tied(x, x, x)[0].square().sum().backward()
    dense(x, x, x)[0].square().sum().backward()
    assert_same_gradient(tied, dense, "in_proj_weight")
    assert_same_gradient(tied.out_proj, dense.out_proj)


@pytest.mark.feature("Layers", "`nn.MultiheadAttention` with separate key and value sizes")
def test_attention_with_separate_projections():
    tied = nn.MultiheadAttention(16, 4, kdim=6, vdim=10)
    dense = copy.deepcopy(tied)
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        tp.register_tie(tied, "row_repeat", name, groups=4)
    dense.load_state_dict(tp.dense_state_dict(tied))
    query, key, value = torch.randn(5, 2, 16), torch.randn(7, 2, 6), torch.randn(7, 2, 10)
    torch.testing.assert_close(tied(query, key, value), dense(query, key, value))


ENCODER_TIES = ["linear1", "linear2", "self_attn", "norm1"]


def encoder_layers(which: str, **options):
    torch.manual_seed(0)
    tied = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **options)
    dense = copy.deepcopy(tied)
    if which == "self_attn":
        tie_attention(tied.self_attn)
    else:
        tp.register_tie(tied.get_submodule(which), "row_repeat", groups=4)
    dense.load_state_dict(tp.dense_state_dict(tied))
    return tied, dense


@pytest.mark.feature("Layers", "`nn.TransformerEncoder` and its fast path, with padding masks")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("which", ENCODER_TIES)
def test_s26b_encoder_in_training_and_on_the_fast_path(which, norm_first):
    tied, dense = encoder_layers(which, norm_first=norm_first)
    x = torch.randn(3, 5, 16)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [1]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch: nested tensors are a prototype
        stacks = nn.TransformerEncoder(tied, 2), nn.TransformerEncoder(dense, 2)
        for training in (True, False):
            for model in (tied, dense, *stacks):
                model.train(training)
            for grad in (True, False):
                for padding in (None, mask):
                    with torch.set_grad_enabled(grad):
                        for ours, theirs in ((tied, dense), stacks):
                            torch.testing.assert_close(
                                ours(x, src_key_padding_mask=padding),
                                theirs(x, src_key_padding_mask=padding),
                            )
    tied.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in tied.parameters())


@pytest.mark.parametrize("which", ENCODER_TIES)
def test_s26b_the_fast_path_is_taken(which, monkeypatch):
    tied, _ = encoder_layers(which)
    tied.eval()
    taken = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *a, **k: taken.append(1) or fast(*a, **k)
    )
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        tied(x)
        assert taken == [1]
        mask = torch.arange(5) >= torch.tensor([[5], [3], [1]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = nn.TransformerEncoder(tied, 2).eval()(x, src_key_padding_mask=mask)
    assert out[mask].eq(0).all()  # nested tensors leave nothing where there was padding
    assert out[~mask].ne(0).any()


@pytest.mark.feature("Layers", "`nn.TransformerDecoderLayer`, `nn.Transformer`")
def test_transformer():
    tied = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
    dense = copy.deepcopy(tied)
    tie_attention(tied.decoder.layers[0].multihead_attn)
    tp.register_tie(tied.decoder.layers[0].linear1, "row_repeat", groups=8)
    tp.register_tie(tied.encoder.layers[0].linear2, "channel_shared")
    dense.load_state_dict(tp.dense_state_dict(tied))
    source, target = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    for training in (True, False):
        for model in (tied, dense):
            model.train(training)
        torch.testing.assert_close(tied(source, target), dense(source, target))


# Norms and lazy layers -----------------------------------------------------------------------

NORMS = [
    (lambda: nn.LayerNorm(8), (3, 8)),
    (lambda: nn.RMSNorm(8), (3, 8)),
    (lambda: nn.GroupNorm(2, 8), (3, 8, 4)),
    (lambda: nn.BatchNorm1d(8), (3, 8, 4)),
    (lambda: nn.BatchNorm2d(8), (3, 8, 4, 4)),
    (lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True), (3, 8, 4, 4)),
]


@pytest.mark.feature("Layers", "norm layers: weight and bias, running statistics")
@pytest.mark.parametrize(("build", "shape"), NORMS, ids=[type(b()).__name__ for b, _ in NORMS])
def test_norms(build, shape):
    layer = build()
    nn.init.normal_(layer.weight)
    tied, dense = tied_and_dense(layer, "row_repeat", groups=4)
    if getattr(layer, "bias", None) is not None:
        tp.register_tie(tied, "row_repeat", "bias", groups=2)
        dense.load_state_dict(tp.dense_state_dict(tied))
    x = torch.randn(shape) * 2 + 1
    for training in (True, False):
        tied.train(training), dense.train(training)
        torch.testing.assert_close(tied(x), dense(x))
    torch.testing.assert_close(dict(tied.named_buffers()), dict(dense.named_buffers()))
    probe = torch.randn(shape)
    (tied(x) * probe).sum().backward()
    (dense(x) * probe).sum().backward()
    assert_same_gradient(tied, dense)


@pytest.mark.feature("Layers", "`nn.PReLU`")
def test_prelu():
    layer = nn.PReLU(6)
    nn.init.uniform_(layer.weight)
    tied, dense = tied_and_dense(layer, "row_repeat", groups=3)
    x = torch.randn(4, 6)
    torch.testing.assert_close(tied(x), dense(x))
    assert tied.weight.unique().numel() == 3


@pytest.mark.feature(
    "Layers", "lazy layers", limit="only after their first forward; before it they are refused"
)
@pytest.mark.parametrize(
    ("build", "shape", "name"),
    [
        (lambda: nn.LazyLinear(4), (2, 4), "weight"),
        (lambda: nn.LazyConv2d(4, 3), (2, 4, 5, 5), "weight"),
        (lambda: nn.LazyConvTranspose1d(4, 3), (2, 4, 5), "weight"),
        (lambda: nn.LazyBatchNorm1d(), (2, 4), "bias"),
    ],
)
def test_lazy_layers(build, shape, name):
    layer = build()
    with pytest.raises(
        tp.TieError, match=r"lazy and has no shape yet\. Run one forward pass first"
    ):
        tp.register_tie(layer, "row_repeat", name)
    x = torch.randn(shape)
    layer(x)
    assert not any(isinstance(p, nn.UninitializedParameter) for p in layer.parameters())
    tied, dense = tied_and_dense(layer.eval(), "row_repeat", name)
    torch.testing.assert_close(tied(x), dense(x))


@pytest.mark.feature("Layers", "complex weights")
def test_complex_layers():
    tied, dense = tied_and_dense(nn.Linear(4, 4, dtype=torch.complex64), "row_repeat", groups=2)
    x = torch.randn(3, 4, dtype=torch.complex64)
    torch.testing.assert_close(tied(x), dense(x))
