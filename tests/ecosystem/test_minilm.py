"""docs/examples/minilm.py: its steps on a small BERT, and MiniLM itself where its package is."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tiedparam as tp
from tests.support import ROOT

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

EXAMPLES = ROOT / "docs" / "examples"
SCRIPT = EXAMPLES / "minilm.py"
RESULTS = json.loads((EXAMPLES / "minilm.json").read_text(encoding="utf-8"))


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("minilm")


@pytest.fixture
def small():
    """Six blocks and twelve heads, as MiniLM has, and tokens for 40 sentences."""
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=32, max_position_embeddings=16, pad_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    tokens = torch.randint(1, 60, (40, 7))
    mask = (torch.arange(7) < torch.randint(3, 8, (40, 1))).long()
    return transformers.BertModel(config).eval(), {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.feature(
    "Libraries",
    "transformers: a BERT of clusters, of blocks with small differences, or with shared heads; "
    "distilled, saved, loaded, exported",
    needs="transformers",
)
@pytest.mark.parametrize(
    ("law", "rules"),
    [
        ("cluster, 4 bits", {"cluster": 37 + 3}),  # of six blocks and the pooler, and embeddings
        ("shared_delta, rank=8", {"shared_delta": 5 * 6}),
        ("share_heads, groups=6", {"head_share": 6 * 4}),
        ("symmetric, where square", {"symmetric": 6 * 4}),
    ],
)
def test_a_law_is_tied_trained_saved_loaded_and_exported(example, small, law, rules, monkeypatch):
    model, tokens = small
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = []
    tie = example.LAWS[law]
    monkeypatch.setitem(example.LAWS, law, lambda tied: (tie(tied), made.append(tied)))
    result = example.judge(law, model, tokens, steps=8)
    (tied,) = made
    count = {}
    for row in tp.report(tied).ties:
        name = row.rule.partition("(")[0].partition(" ")[0]
        count[name] = count.get(name, 0) + 1
    assert count == rules
    assert result.residual > 0
    assert result.loaded
    assert result.export_difference < 1e-6
    dense = sum(value.numel() for value in model.parameters())
    assert result.values == sum(value.numel() for value in tied.parameters()) < dense
    assert result.tied.distilled < 0.9999
    assert result.trained.distilled > result.tied.distilled
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_distillation_sees_half_of_the_sentences_and_leaves_the_word_vectors(example, small):
    model, tokens = small
    seen = []
    model.embeddings.word_embeddings.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    words = model.embeddings.word_embeddings.weight.clone()
    matrix = model.encoder.layer[0].output.dense.weight.clone()
    wanted = nn.functional.normalize(torch.randn(40, 24), dim=1)
    example.distil(model, tokens, wanted, steps=4)  # all of the twenty, once
    assert torch.equal(model.embeddings.word_embeddings.weight, words)
    assert not torch.equal(model.encoder.layer[0].output.dense.weight, matrix)
    shown = sorted(tuple(row[:3].tolist()) for batch in seen for row in batch)
    assert shown == sorted(tuple(row[:3].tolist()) for row in tokens["input_ids"][:20])


def test_nearness_counts_cosines_and_pairs(example):
    angles = torch.arange(20).repeat_interleave(2) * 0.3
    wanted = torch.stack([angles.cos(), angles.sin()], 1)
    turned = wanted.clone()
    turned[38] = -wanted[38]  # one of the held-out, away from its other

    def model(**tokens):
        return SimpleNamespace(last_hidden_state=3 * turned.unsqueeze(1))

    found = example.nearness(model, {"attention_mask": torch.ones(40, 1)}, wanted)
    assert found.distilled == pytest.approx(1)
    assert found.held_out == pytest.approx(18 / 20)
    assert found.lowest == pytest.approx(-1)
    assert found.pairs == 18


def test_the_embedding_is_the_mean_of_what_is_not_padding(example):
    states = torch.tensor([[[3.0, 0.0], [3.0, 8.0], [99.0, -7.0]]])
    tokens = {"attention_mask": torch.tensor([[1, 1, 0]])}
    found = example.embed(lambda **_: SimpleNamespace(last_hidden_state=states), tokens)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8]]))


def test_the_results_in_the_docs_are_of_these_laws_and_keep_their_promises(example):
    assert RESULTS["steps"] == example.STEPS
    assert [row["law"] for row in RESULTS["laws"]] == list(example.LAWS)
    for row in RESULTS["laws"]:
        assert row["loaded"], row["law"]
        assert row["export_difference"] < 1e-5, row["law"]
    assert len(example.PAIRS) == len({*example.SENTENCES}) // 2 == 20


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(
    importlib.util.find_spec("all_minilm_l6_v2") is None, reason="needs the extra 'examples'"
)
def test_minilm_gives_what_the_docs_say(example, tmp_path):
    out = tmp_path / "quick.json"
    process = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    found = json.loads(out.read_text(encoding="utf-8"))
    in_docs = {row["law"]: row for row in RESULTS["laws"]}
    assert [row["law"] for row in found["laws"]] == list(example.QUICK)
    for row in found["laws"]:
        wanted = in_docs[row["law"]]
        assert row["loaded"]
        assert row["export_difference"] < 1e-5
        assert row["values"] == wanted["values"]
        assert row["file_bytes"] == pytest.approx(wanted["file_bytes"], rel=1e-3)
        assert row["tied"] == pytest.approx(wanted["tied"], abs=2e-3)
