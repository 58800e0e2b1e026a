"""Small runs of the trainer, shared by the tests of training."""

from __future__ import annotations

import pytest
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from conftest import DIMS, sentences
from mipic_st import MIPICLoss

datasets = pytest.importorskip("datasets", reason="needs the train extra")

EVERY_TERM = {
    "alpha": 0.4,
    "attention_weight": 1.0,
    "pic_weight": 1.0,
    "sia_layers": [1, 3],
    "min_k": 2,
    "lift_init": "identity",
}


def pairs(rows=64, seed=0, columns=("anchor", "positive")):
    """Random sentence pairs."""
    return datasets.Dataset.from_dict(
        {name: sentences(rows, seed=seed + index, shortest=2) for index, name in enumerate(columns)}
    )


def make_loss(model, base=None, **options):
    """MIPICLoss with all its terms on layers 1 and 3."""
    base = MultipleNegativesRankingLoss(model) if base is None else base
    return MIPICLoss(model, base, DIMS, **{**EVERY_TERM, **options})


def make_trainer(model, loss, folder, train=None, **arguments):
    """A trainer on CPU that saves and reports nothing unless asked to."""
    own = (
        "callbacks",
        "eval_dataset",
        "evaluator",
        "data_collator",
        "optimizers",
        "optimizer_cls_and_kwargs",
        "model_init",
    )
    options = {name: arguments.pop(name) for name in own if name in arguments}
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**{**settings, **arguments}),
        train_dataset=pairs() if train is None else train,
        loss=loss,
        **options,
    )


def parameters(loss):
    """Copies of all parameters, model and projections, under the names that they have without any wrapper."""
    return {
        name.replace("module.", "").replace("_orig_mod.", ""): parameter.detach().clone()
        for name, parameter in loss.named_parameters()
    }


def logs(trainer, key):
    """All logged values of one name."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]
