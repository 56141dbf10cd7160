"""Hugging Face transformers: BERT and GPT-2 with random weights, tied, trained, saved, loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tiedparam as tp
from tests.support.models import train_on_tokens

transformers = pytest.importorskip("transformers")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def tie_bert(model: nn.Module) -> None:
    for block in model.bert.encoder.layer:
        attention = block.attention
        tp.register_tie(attention.self.query, "flip_sym", root=model)
        tp.register_tie(attention.self.key, "copy", source=attention.self.query, root=model)
        tp.register_tie(attention.output.dense, "row_repeat", groups=4, root=model)
        tp.register_tie(block.intermediate.dense, "row_repeat", groups=8, root=model)
        tp.register_tie(
            block.output.dense, "copy", source=block.intermediate.dense, fn=torch.t, root=model
        )


def tie_gpt2(model: nn.Module) -> None:
    for block in model.transformer.h:
        tp.register_tie(block.attn.c_attn, "row_repeat", groups=12, root=model)
        tp.register_tie(block.attn.c_proj, "flip_sym", root=model)
        tp.register_tie(block.mlp.c_fc, "row_repeat", groups=16, root=model)
        tp.register_tie(block.mlp.c_proj, "copy", source=block.mlp.c_fc, fn=torch.t, root=model)


@dataclass(frozen=True)
class Family:
    """A model class, its small configuration, and where the ties go."""

    kind: type
    config: Callable
    tie: Callable[[nn.Module], None]

    def fresh(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.kind(self.config())

    def tied(self, seed: int = 0) -> nn.Module:
        model = self.fresh(seed)
        self.tie(model)
        return model


FAMILIES = [
    Family(
        transformers.BertForMaskedLM,
        lambda: transformers.BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            vocab_size=40, max_position_embeddings=16,
        ),
        tie_bert,
    ),
    Family(
        transformers.GPT2LMHeadModel,
        lambda: transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16,
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        ),
        tie_gpt2,
    ),
]  # fmt: skip
families = pytest.mark.parametrize("family", FAMILIES, ids=["BERT", "GPT-2"])
TOKENS = torch.arange(14).reshape(2, 7) % 40


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def train(model: nn.Module) -> list[float]:
    torch.manual_seed(7)
    return train_on_tokens(model, TOKENS, 4)


def dense_twin(family: Family, model: nn.Module) -> nn.Module:
    twin = family.fresh(1)
    twin.load_state_dict(tp.dense_state_dict(model))
    return twin


@pytest.mark.feature(
    "Libraries",
    "transformers: BERT and GPT-2, ties in attention and MLP, training",
    needs="transformers",
)
@families
def test_training_keeps_every_law(family):
    model = family.tied()
    torch.testing.assert_close(logits(model), logits(dense_twin(family, model)))
    before = logits(model)
    losses = train(model)
    assert losses[-1] < losses[0]
    assert not torch.allclose(logits(model), before)
    ties = 0
    for layer in model.modules():
        if tp.is_tied(layer, recurse=False):
            ties += 1
            images = list(tp.get_tie(layer).symmetries(layer.weight))
            assert images
            assert all(torch.equal(image, layer.weight) for image in images)
    assert ties == {"BertForMaskedLM": 10, "GPT2LMHeadModel": 8}[family.kind.__name__]
    torch.testing.assert_close(logits(model), logits(dense_twin(family, model)))
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))


@pytest.mark.feature(
    "Libraries",
    "transformers: `save_pretrained(path, state_dict=tp.dense_state_dict(model))`, then "
    "`from_pretrained` and tie again",
    needs="transformers",
)
@families
def test_saved_dense_and_loaded_by_transformers(family, tmp_path):
    model = family.tied()
    train(model)
    model.save_pretrained(tmp_path, state_dict=tp.dense_state_dict(model))
    loaded, info = family.kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(loaded), logits(model))
    family.tie(loaded)
    assert torch.equal(logits(loaded), logits(model))
    assert train(loaded) == pytest.approx(train(model), rel=1e-5)


@pytest.mark.feature(
    "Libraries",
    "transformers: `save_pretrained(path)` stores the free values",
    limit="`from_pretrained` cannot read them alone: give it "
    "`state_dict=tp.untie_state_dict(tied_model, file)`",
    needs="transformers",
)
@families
def test_saved_tied_and_loaded(family, tmp_path):
    model = family.tied()
    train(model)
    model.save_pretrained(tmp_path)
    entries = load_file(tmp_path / "model.safetensors")
    assert {key for key in entries if "parametrizations" in key}
    dense_count = sum(p.numel() for p in family.fresh().parameters())
    assert sum(v.numel() for v in entries.values()) < dense_count
    again = family.tied(seed=3)
    unknown = again.load_state_dict(entries, strict=False).unexpected_keys
    assert unknown == []
    again.tie_weights()
    assert torch.equal(logits(again), logits(model))
    # a stock model from the same file
    dense = tp.untie_state_dict(family.tied(seed=3), entries)
    stock = family.kind.from_pretrained(None, config=family.config(), state_dict=dense)
    assert not any(tp.is_tied(layer) for layer in stock.modules())
    torch.testing.assert_close(logits(stock), logits(model))


@pytest.mark.feature(
    "Libraries",
    "transformers: embeddings that share their Parameter with the head",
    needs="transformers",
    refused="tying one would change the other (seen with `root=`); separate them, tie by `copy`",
)
@families
def test_s22_shared_embeddings_are_recognised(family):
    model = family.tied()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight is head.weight
    for layer in (embedding, head):
        with pytest.raises(tp.TieError, match="shares its Parameter with"):
            tp.register_tie(layer, "row_repeat", groups=4, root=model)
    before = logits(model)
    head.weight = nn.Parameter(head.weight.detach().clone())
    tp.register_tie(head, "copy", source=embedding, root=model)
    assert torch.equal(logits(model), before)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert embedding.weight.grad is not None


@pytest.mark.feature("Libraries", "transformers: `generate`", needs="transformers")
def test_generate():
    family = FAMILIES[1]
    model = family.tied()
    train(model)
    options = {
        "max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(TOKENS),
        "pad_token_id": 1,
    }  # fmt: skip
    expected = dense_twin(family, model).eval().generate(TOKENS, **options)
    assert torch.equal(model.eval().generate(TOKENS, **options), expected)


@pytest.mark.feature(
    "Layers", "transformers' `Conv1D`, which stores `W[in, out]`", needs="transformers"
)
def test_conv1d_outputs_are_the_columns():
    layer = Conv1D(6, 4)  # six outputs of four inputs
    assert layer.weight.shape == (4, 6)
    dense = copy.deepcopy(layer)
    tp.register_tie(layer, "row_repeat", groups=2)
    weight = layer.weight
    assert tp.get_tie(layer).free_count == 8
    for output in range(6):
        assert torch.equal(weight[:, output], weight[:, output // 3 * 3])
    assert not torch.equal(weight[:, 0], weight[:, 3])
    expected = dense.weight.detach()[:, :3].mean(1)
    torch.testing.assert_close(weight[:, 0].detach(), expected)
    dense.load_state_dict(tp.dense_state_dict(layer))
    x = torch.randn(5, 4)
    torch.testing.assert_close(layer(x), dense(x))
    other = tp.register_tie(Conv1D(6, 4), "channel_shared", over="in")
    assert torch.equal(other.weight, other.weight[:1].expand(4, 6))
    linear = tp.register_tie(nn.Linear(4, 6), "row_repeat", groups=2)
    assert tp.get_tie(linear).free_shapes() == ((2, 4),)


@pytest.mark.feature(
    "Libraries", "transformers: `gradient_checkpointing_enable`", needs="transformers"
)
@families
def test_gradient_checkpointing(family):
    model = family.tied()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_a_llama_with_shared_heads_is_the_one_with_fewer_key_value_heads():
    """The model of transformers repeats keys and values by itself."""

    def llama(key_value_heads: int) -> nn.Module:
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=key_value_heads, vocab_size=40, attention_bias=True,
            )
        ).eval()  # fmt: skip

    torch.manual_seed(0)
    model, grouped = llama(4), llama(2)
    tokens = torch.randint(40, (2, 7))
    dense = model(tokens).logits
    tp.share_heads(model, groups=2)
    state = tp.dense_state_dict(model)
    for path, layer in model.named_modules():
        if tp.is_tied(layer, recurse=False):
            small = tp.export_gqa(layer).state_dict()
            state |= {f"{path}.{name}": value for name, value in small.items()}
    grouped.load_state_dict(state)
    tied = model(tokens).logits
    torch.testing.assert_close(grouped(tokens).logits, tied, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(dense, tied, rtol=1e-4, atol=1e-5)
