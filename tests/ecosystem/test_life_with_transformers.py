"""The life of a Hugging Face model whose head is tied by `copy`, beside transformers' own tying.

The oracle is the same model with ``tie_word_embeddings=True`` and one shared Parameter: every
step of its life must give the same logits and losses, or raise before anything changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support.models import train_on_tokens

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:(peft|transformers|torch).*"),
]
transformers.logging.set_verbosity_error()
TOKENS = torch.arange(14).reshape(2, 7) % 30


@dataclass(frozen=True)
class Family:
    """A model class, its small configuration, and what the layers of its two ends are called."""

    kind: type
    config: Callable
    source: str
    head: str
    listed: str | None = None
    """The head's key, where transformers looks tied keys up among the Parameters of the model."""

    def stock(self) -> nn.Module:
        """With transformers' own tying: one Parameter in both layers."""
        torch.manual_seed(0)
        model = self.kind(self.config())
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return model

    def tied(self) -> nn.Module:
        return self.tie(self.stock())

    def tie(self, model: nn.Module) -> nn.Module:
        """The same with a copy: the head gets its own Parameter, and that is tied."""
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
        tp.register_tie(head, "copy", source=model.get_input_embeddings(), root=model)
        self.unlist(model)
        return model

    def unlist(self, model: nn.Module) -> None:
        """Transformers need not tie what is tied: a copy has no Parameter that it would find."""
        keys = model._tied_weights_keys
        model._tied_weights_keys = {k: v for k, v in keys.items() if k != self.listed}

    def both(self) -> tuple[nn.Module, nn.Module]:
        return self.stock(), self.tied()


SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
FAMILIES = [
    Family(
        transformers.GPT2LMHeadModel,
        lambda: transformers.GPT2Config(
            n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16, embd_pdrop=0.0,
            attn_pdrop=0.0, resid_pdrop=0.0, tie_word_embeddings=True, **SPECIAL,
        ),
        "wte",
        "lm_head",
    ),
    Family(
        transformers.T5ForConditionalGeneration,
        lambda: transformers.T5Config(
            d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=40,
            dropout_rate=0.0, tie_word_embeddings=True, decoder_start_token_id=0, **SPECIAL,
        ),
        "embed_tokens",  # the layers that read the source's Parameter
        "lm_head",
    ),
    Family(
        transformers.BertForMaskedLM,
        lambda: transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            vocab_size=40, max_position_embeddings=16, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, tie_word_embeddings=True,
        ),
        "word_embeddings",
        "decoder",
        listed="cls.predictions.decoder.weight",
    ),
]  # fmt: skip
BERT = FAMILIES[2]
families = pytest.mark.parametrize("family", FAMILIES, ids=["GPT-2", "T5", "BERT"])


def train(model: nn.Module) -> list[float]:
    return train_on_tokens(model, TOKENS, 3)


def outputs(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS, labels=TOKENS).logits


def is_one(model: nn.Module) -> bool:
    """Whether the head is tied, and has the source's numbers and size."""
    head, source = model.get_output_embeddings(), model.get_input_embeddings()
    return (
        tp.is_tied(head)
        and torch.equal(head.weight, source.weight)
        and head.out_features == source.num_embeddings == len(source.weight)
    )


def assert_alike(tied: nn.Module, stock: nn.Module) -> None:
    """Equal logits, and equal losses of a training that goes on."""
    assert is_one(tied)
    torch.testing.assert_close(outputs(tied), outputs(stock))
    assert train(tied) == pytest.approx(train(stock), rel=1e-5)
    assert is_one(tied)
    torch.testing.assert_close(outputs(tied), outputs(stock), rtol=1e-4, atol=1e-5)


# Resizing, tying, initialising -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.feature(
    "Libraries",
    "transformers: `resize_token_embeddings` with a head tied by `copy` (GPT-2, T5, BERT)",
    needs="transformers",
)
@families
@pytest.mark.parametrize("mean_resizing", [True, False])
@pytest.mark.parametrize("sizes", [(46,), (34,), (46, 34, 41)], ids=str)
def test_s44_resizing(family, sizes, mean_resizing):
    both = family.both()
    for size in sizes:
        for model in both:
            torch.manual_seed(3)
            model.resize_token_embeddings(size, mean_resizing=mean_resizing)
            assert model.config.vocab_size == size
    stock, tied = both
    assert outputs(tied).shape[-1] == sizes[-1]
    assert_alike(tied, stock)


@families
def test_s44_resizing_where_the_configuration_does_not_tie(family):
    stock, tied = family.both()
    for model in (stock, tied):
        model.config.tie_word_embeddings = False  # as in a user's own model
        torch.manual_seed(3)
        model.resize_token_embeddings(46, mean_resizing=False)
        model.config.tie_word_embeddings = True  # T5 scales by it
    if tied.get_output_embeddings().bias is None:
        assert_alike(tied, stock)
    assert is_one(tied)


@pytest.mark.feature(
    "Libraries",
    "transformers: `tie_weights`, `init_weights`, `post_init` with a head tied by `copy`",
    needs="transformers",
)
@families
@pytest.mark.parametrize("call", ["tie_weights", "init_weights", "post_init"])
def test_s44_what_transformers_calls_by_itself(family, call):
    stock, tied = family.both()
    getattr(stock, call)()
    getattr(tied, call)()
    assert_alike(tied, stock)
    assert "parametrizations" not in " ".join(tied.state_dict())


@families
def test_s44_untying_after_a_resize(family):
    stock, tied = family.both()
    for model in (stock, tied):
        torch.manual_seed(3)
        model.resize_token_embeddings(46, mean_resizing=False)
    tp.untie_model(tied)
    torch.testing.assert_close(outputs(tied), outputs(stock))
    assert tied.get_output_embeddings().weight is not tied.get_input_embeddings().weight


@pytest.mark.feature(
    "Libraries",
    "transformers: `resize_token_embeddings` and `tie_weights` of BERT with a head tied by `copy`",
    needs="transformers",
    limit="transformers looks BERT's head up among the Parameters, and raises ValueError: take "
    "`cls.predictions.decoder.weight` out of `model._tied_weights_keys` first",
)
def test_s44_bert_without_the_key_taken_out():
    stock, tied = BERT.both()
    tied._tied_weights_keys = stock._tied_weights_keys
    before = outputs(tied)
    with pytest.raises(ValueError, match="tie_weights_keys"):
        tied.tie_weights()
    assert torch.equal(outputs(tied), before)
    torch.manual_seed(3)
    stock.resize_token_embeddings(46, mean_resizing=False)
    torch.manual_seed(3)
    with pytest.raises(ValueError, match="tie_weights_keys"):
        tied.resize_token_embeddings(46, mean_resizing=False)
    BERT.unlist(tied)
    tied.tie_weights()  # what is left to do
    assert_alike(tied, stock)


# Files -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.feature(
    "Libraries",
    "transformers: `save_pretrained` and `from_pretrained` with a head tied by `copy`, resized "
    "or not",
    needs="transformers",
)
@families
@pytest.mark.parametrize("size", [40, 46])
@pytest.mark.parametrize("dense", [True, False])
def test_saving_and_loading(family, size, dense, tmp_path):
    tied = family.tied()
    tied.resize_token_embeddings(size, mean_resizing=False)
    train(tied)
    state = {"state_dict": tp.dense_state_dict(tied)} if dense else {}
    tied.save_pretrained(tmp_path, **state)
    loaded, info = family.kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(outputs(loaded), outputs(tied))
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    family.tie(loaded)
    assert_alike(loaded, tied)


class TiedInside(transformers.GPT2LMHeadModel):
    """A class of one's own whose model is tied as it is built."""

    # transformers need not look for the head's Parameter
    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    def __init__(self, config) -> None:
        super().__init__(config)
        tp.register_tie(self.lm_head, "copy", source="transformer.wte", root=self)
        tp.register_tie(self.transformer.h[0].attn.c_proj, "flip_sym", root=self)
        self.post_init()


@pytest.mark.feature(
    "Libraries",
    "transformers: a class that ties in its `__init__`: `save_pretrained`, `from_pretrained`",
    needs="transformers",
    limit="with `_tied_weights_keys = {}`; transformers does not convert a dense file, and lists "
    "the free values among the missing keys: load that into the stock class, and tie then",
)
def test_a_class_that_ties_as_it_is_built(tmp_path):
    torch.manual_seed(0)
    model = TiedInside(FAMILIES[0].config())
    assert is_one(model)
    train(model)
    model.save_pretrained(tmp_path / "tied")
    loaded, info = TiedInside.from_pretrained(tmp_path / "tied", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_alike(loaded, model)
    model.save_pretrained(tmp_path / "dense", state_dict=tp.dense_state_dict(model))
    _, info = TiedInside.from_pretrained(tmp_path / "dense", output_loading_info=True)
    key = "transformer.h.0.attn.c_proj"
    assert f"{key}.parametrizations.weight.original0" in info["missing_keys"]
    assert f"{key}.weight" in info["unexpected_keys"]
    fresh = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "dense")
    FAMILIES[0].tie(fresh)
    tp.register_tie(fresh.transformer.h[0].attn.c_proj, "flip_sym", init="exact")
    torch.testing.assert_close(outputs(fresh), outputs(model))


# Trainer -----------------------------------------------------------------------------------


class Sentences(torch.utils.data.Dataset):
    """Eight fixed sentences, each its own target."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(7) * (index + 1)) % 30
        return {"input_ids": tokens, "labels": tokens}


def trained(model: nn.Module, folder, steps: int, resume: bool = False) -> tuple[list[float], dict]:
    """The losses that Trainer logs, and what it says of the best model."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-1,
        logging_steps=1, eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2,
        load_best_model_at_end=True, report_to=[], seed=5, use_cpu=True, disable_tqdm=True,
        lr_scheduler_type="constant", metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Sentences(), eval_dataset=Sentences()
    )
    trainer.train(resume_from_checkpoint=True if resume else None)
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    best = {"metric": trainer.state.best_metric, "step": trainer.state.best_global_step}
    return history, best


@pytest.mark.slow
@pytest.mark.feature(
    "Libraries",
    "transformers: `Trainer` with `resume_from_checkpoint` and `load_best_model_at_end`",
    needs="transformers and accelerate",
)
@families
def test_trainer_resumes_and_loads_the_best_model(family, tmp_path):
    results = {}
    for name, model in zip(("stock", "tied"), family.both(), strict=True):
        trained(model, tmp_path / name, steps=2)
        fresh = family.stock() if name == "stock" else family.tied()
        history, best = trained(fresh, tmp_path / name, steps=6, resume=True)
        results[name] = history, best, outputs(fresh)
        if name == "tied":
            assert is_one(fresh)
    (stock_losses, stock_best, stock_logits), (losses, best, logits) = (
        results["stock"],
        results["tied"],
    )
    assert len(losses) == 6
    assert losses == pytest.approx(stock_losses, rel=1e-4)
    assert best["step"] == stock_best["step"]
    assert best["metric"] == pytest.approx(stock_best["metric"], rel=1e-4)
    torch.testing.assert_close(logits, stock_logits, rtol=1e-3, atol=1e-4)


# LoRA --------------------------------------------------------------------------------------


def with_lora(model: nn.Module, target: str) -> nn.Module:
    torch.manual_seed(4)
    config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.feature(
    "Libraries",
    "PEFT: LoRA on the source of a copy",
    needs="peft",
    limit="as with one shared Parameter, merging writes the adapter into the copy as well; a "
    "`TieWarning` says so at the first forward (with `root=`), and untying before the merge keeps "
    "them apart",
)
@families
def test_lora_on_the_source_is_as_with_one_shared_parameter(family):
    stock, tied = family.both()
    adapted_stock, adapted = with_lora(stock, family.source), with_lora(tied, family.source)
    if family.kind is transformers.T5ForConditionalGeneration:
        before = outputs(adapted)  # not the source, but two layers that share its Parameter
    else:
        with pytest.warns(tp.TieWarning, match=r"carries an adapter.*remove_tie"):
            before = outputs(adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("error", tp.TieWarning)
        outputs(adapted)  # once
    torch.testing.assert_close(before, outputs(adapted_stock))
    assert train(adapted) == pytest.approx(train(adapted_stock), rel=1e-5)
    trained_output = outputs(adapted)
    # what the limit says: the merge changes the outputs, here and there, and equally
    torch.testing.assert_close(
        outputs(adapted.merge_and_unload()), outputs(adapted_stock.merge_and_unload())
    )
    assert not torch.allclose(outputs(tied), trained_output, rtol=1e-3, atol=1e-3)
    assert is_one(tied)


@pytest.mark.parametrize("family", [FAMILIES[0], BERT], ids=["GPT-2", "BERT"])
def test_lora_on_the_source_merges_exactly_after_untying(family):
    adapted = with_lora(family.tied(), family.source)
    with pytest.warns(tp.TieWarning):
        before = outputs(adapted)
    tp.untie_model(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(outputs(merged), before, rtol=1e-4, atol=1e-5)


@families
def test_lora_on_the_copy_trains_and_its_merge_is_refused_until_untied(family):
    stock, tied = family.both()
    adapted_stock, adapted = with_lora(stock, family.head), with_lora(tied, family.head)
    torch.testing.assert_close(outputs(adapted), outputs(adapted_stock))
    assert train(adapted) == pytest.approx(train(adapted_stock), rel=1e-5)
    before = outputs(adapted)
    with pytest.raises(tp.TieError, match="remove_tie first"):
        adapted.merge_adapter()
    torch.testing.assert_close(outputs(adapted), before)
    tp.untie_model(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(outputs(merged), before, rtol=1e-4, atol=1e-5)


@families
def test_training_the_source_in_full_beside_the_frozen_model_is_refused(family):
    """``modules_to_save`` trains a copy of the source, which the tie would not see."""
    model = family.tied()
    source = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    config = peft.LoraConfig(
        r=2, target_modules="all-linear", modules_to_save=[source], exclude_modules=[family.head]
    )
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(tp.TieError, match=r"modules_to_save.*remove_tie"):
        outputs(adapted)
