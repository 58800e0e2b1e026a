"""MIPICLoss in SentenceTransformerTrainer, on the real model."""

from __future__ import annotations

import json

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from conftest import all_terms
from mipic_st import MIPICLoss
from training_fixtures import datasets, make_trainer

TERMS = ["matryoshka", "sia_attention", "sia_cka", "pic"]
SUBJECTS = ["a man", "the old woman", "a small child", "our neighbour", "the teacher", "her brother", "the cook"]
ACTIONS = [
    ("plays the guitar", "makes music on a guitar"),
    ("reads a long letter", "goes through a lengthy letter"),
    ("repairs the bicycle", "fixes the bike"),
    ("walks along the river", "takes a stroll by the river"),
    ("paints the kitchen wall", "puts colour on the wall of the kitchen"),
]
PLACES = ["", " in the morning", " behind the house", " without any help"]


def pairs():
    """140 paraphrase pairs."""
    rows = [
        (f"{subject} {one}{place}", f"{subject} {other}{place}")
        for place in PLACES
        for subject in SUBJECTS
        for one, other in ACTIONS
    ]
    anchors, positives = zip(*rows, strict=True)
    return datasets.Dataset.from_dict({"anchor": anchors, "positive": positives})


def test_training_the_real_model(minilm, tmp_path):
    """A few steps lower every component, log each, move model and projections, and save a plain SentenceTransformer."""
    loss = all_terms(minilm, MultipleNegativesRankingLoss(minilm), [384, 128, 64, 32, 16, 8], alpha=0.5)
    before = {name: parameter.detach().clone() for name, parameter in loss.named_parameters()}
    trainer = make_trainer(
        minilm,
        loss,
        tmp_path / "run",
        pairs(),
        eval_dataset=pairs().select(range(40)),
        max_steps=10,
        per_device_train_batch_size=20,
        learning_rate=1e-4,
        learning_rate_mapping={r"^mipic_projections\.": 1e-3},
        warmup_steps=2,
        eval_strategy="steps",
        eval_steps=10,
    )
    trainer.evaluate()
    start = trainer.state.log_history[-1]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "sia_cka" in entry]
    assert len(logs) == 10
    for entry in logs:
        assert set(TERMS) <= set(entry)
        assert entry["loss"] == pytest.approx(sum(entry[name] for name in TERMS), rel=1e-2, abs=2e-3)
    end = [entry for entry in trainer.state.log_history if "eval_pic" in entry][-1]
    for name in TERMS:
        assert end[f"eval_{name}"] < start[f"eval_{name}"], name

    for name, parameter in loss.named_parameters():
        unused = name.startswith(("model.0.model.pooler", "loss.model.0.model.pooler"))
        assert torch.equal(before[name], parameter) is unused, name

    assert "forward" not in vars(minilm)
    folder = tmp_path / "saved"
    minilm.save(str(folder))
    saved = {path.name: path for path in folder.rglob("*") if path.is_file()}
    for name, path in saved.items():
        if path.suffix in {".json", ".txt"}:
            assert "mipic_projections" not in path.read_text(), name
    assert json.loads(saved["config.json"].read_text()).get("output_hidden_states", False) is False

    loaded = SentenceTransformer(str(folder), device="cpu")
    assert set(loaded.state_dict()) == set(minilm.state_dict())
    assert not any("mipic" in name for name in loaded.state_dict())
    texts = ["a plain sentence", "another one"]
    torch.testing.assert_close(loaded.encode(texts), minilm.encode(texts))


def test_model_card_lists_the_loss(minilm, tmp_path):
    """The card of a trained model names the loss, its settings and the paper."""
    loss = MIPICLoss(minilm, MultipleNegativesRankingLoss(minilm), [384, 32])
    make_trainer(minilm, loss, tmp_path / "run", pairs(), max_steps=1, per_device_train_batch_size=2).train()
    minilm.save(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "MIPICLoss" in card
    assert '"attention_temperature": 1.0' in card
    assert "2604.24374" in card
