"""Share the blocks of a small Llama, train it with Trainer, save it tied, and dense for others."""

import tempfile
from pathlib import Path

import torch
import transformers

import tiedparam as tp

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
folder = Path(tempfile.mkdtemp())  # in your project: where your checkpoints lie
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
    num_attention_heads=4, max_position_embeddings=16, tie_word_embeddings=True,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
sentences = [torch.arange(start, start + 12) for start in range(48)]  # 7 is followed by 8
data = [{"input_ids": sentence, "labels": sentence} for sentence in sentences]


def tied_model():
    """Every block is the first one, but for its norms."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)  # or .from_pretrained(...)
    blocks = ("copy", {"source": "model.layers.0.*", "exclude": "*norm*"})
    tp.tie_model(model, {"model.layers.*.*": blocks})
    return model


def trainer(model, steps):
    """Built after tying, since the optimizer that it makes holds what is there then."""
    arguments = transformers.TrainingArguments(
        str(folder / "run"), max_steps=steps, save_steps=20, logging_steps=10, learning_rate=1e-2,
        lr_scheduler_type="constant", use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    made = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    made.remove_callback(transformers.PrinterCallback)  # a line for every log
    return made


def logits(model):
    """What the model says of four sentences."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.stack(sentences[:4])).logits


model = tied_model()
print(f"{model.num_parameters():,} values in {len(model.model.layers)} blocks and the rest")

run = trainer(model, steps=40)
run.train()
losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
print("the loss fell to a fifth:", losses[-1] < losses[0] / 5)

# for yourself: the free values and the laws, in one file
tp.save(model, folder / "tied.safetensors")
plain = transformers.AutoModelForCausalLM.from_config(config)
loaded = tp.load(folder / "tied.safetensors", plain)
print("loaded, tied:", tp.is_tied(loaded), torch.equal(logits(loaded), logits(model)))

# for people who do not have tiedparam: a folder that transformers reads
model.save_pretrained(folder / "dense", state_dict=tp.dense_state_dict(model))
dense = transformers.AutoModelForCausalLM.from_pretrained(folder / "dense")
print("loaded, dense:", tp.is_tied(dense), torch.allclose(logits(dense), logits(model), atol=1e-5))
print(f"{dense.num_parameters():,} values")
