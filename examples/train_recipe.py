"""Train with one of the MIPIC paper's four recipes: unsupervised SimCSE, settings from a file in examples/recipes/.

    python examples/train_recipe.py examples/recipes/bert-base.toml --pairs pairs.csv --output model
    python examples/train_recipe.py examples/recipes/bert-base.toml --smoke       # offline, a tiny random model

The paper trains on about 24k sentences; every distinct sentence of the file is used. --smoke keeps the recipe's layers
and divides all widths by 8. What the files leave out (weights, sums, lifts) is the same in all four: the "paper"
preset.
"""

from __future__ import annotations

import argparse
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoModel, BertConfig, Qwen3Config

from common import (
    load_train,
    make_evaluator,
    require_dropout,
    save,
    score,
    sentences_of,
    show,
    training_arguments,
    word_tokenizer,
)
from mipic_st import MIPICCallback, MIPICLoss
from mipic_st.demo import synthetic_pairs

# Every key that a recipe has, and its type.
KEYS: dict[str, dict[str, type]] = {
    "model": {"name": str, "pooling": str, "layers": int, "width": int, "max_length": int},
    "loss": {"dims": list, "alpha": float, "sia_layers": list, "pic_chain": list, "temperature": float},
    "training": {
        "epochs": int,
        "batch_size": int,
        "learning_rate": float,
        "weight_decay": float,
        "lr_scheduler_type": str,
        "fp16": bool,
    },
}
SMOKE_SCALE = 8


def load_recipe(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read a recipe; keys that are unknown, missing or of another type are refused."""
    recipe = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    for table in dict.fromkeys((*recipe, *KEYS)):  # in the file's order, so that the same fault is named each time
        if table not in KEYS:
            raise ValueError(f"{path}: unknown key {table!r}, a recipe has the tables {list(KEYS)}.")
        if not isinstance(recipe.get(table), dict):
            raise ValueError(f"{path}: the table [{table}] is missing.")
        for key in dict.fromkeys((*recipe[table], *KEYS[table])):
            if key not in KEYS[table]:
                raise ValueError(f"{path}: unknown key {table}.{key}, [{table}] has {list(KEYS[table])}.")
            if key not in recipe[table]:
                raise ValueError(f"{path}: the key {table}.{key} is missing.")
            value, kind = recipe[table][key], KEYS[table][key]
            if type(value) is not kind:
                raise ValueError(f"{path}: {table}.{key} must be of type {kind.__name__}, got {value!r}.")
    return recipe


def make_model(settings: dict[str, Any]) -> SentenceTransformer:
    """The backbone of the recipe, with its pooling and without anything after it."""
    transformer = Transformer(settings["name"], max_seq_length=settings["max_length"])
    if getattr(transformer.auto_model.config, "attention_dropout", None) == 0:
        # decoders come without any, and dropout is what makes two views of a sentence; the paper does not say how much
        dropout = {"attention_dropout": 0.1}
        transformer = Transformer(settings["name"], max_seq_length=settings["max_length"], config_kwargs=dropout)
    return SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), settings["pooling"])]
    )


def scaled_down(recipe: dict[str, dict[str, Any]], sentences: list[str], folder: str) -> dict[str, dict[str, Any]]:
    """The recipe for a random model of as many layers, saved in the folder, with every width divided by 8."""
    model, loss = recipe["model"], recipe["loss"]
    decoder = model["pooling"] == "lasttoken"
    width = model["width"] // SMOKE_SCALE
    shape = {"hidden_size": width, "num_hidden_layers": model["layers"], "num_attention_heads": 4}
    tokenizer = word_tokenizer(sentences, padding_side="left" if decoder else "right")
    make_config = Qwen3Config if decoder else BertConfig
    own = {"num_key_value_heads": 2, "head_dim": width // 4} if decoder else {}
    config = make_config(vocab_size=len(tokenizer), intermediate_size=2 * width, pad_token_id=0, **shape, **own)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "model": {**model, "name": folder, "width": width, "max_length": 64},
        "loss": {
            **loss,
            "dims": [dim // SMOKE_SCALE for dim in loss["dims"]],
            "pic_chain": [[dim // SMOKE_SCALE, layer] for dim, layer in loss["pic_chain"]],
        },
        "training": recipe["training"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a file such as examples/recipes/bert-base.toml")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--pairs", help="csv, tsv, jsonl or parquet: anchor, positive[, negative] or STS columns")
    source.add_argument("--dataset", help="training data from the hub: NAME or NAME:CONFIG")
    parser.add_argument("--eval-file", help="STS columns: sentence1, sentence2, score (default: synthetic)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="where to save the trained model (default: not saved)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny random model on a few rows")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe)

    sentences = sentences_of(load_train(args, synthetic_pairs(negatives=False)))
    train = Dataset.from_dict({"anchor": sentences, "positive": sentences})
    torch.manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        if args.smoke:
            recipe = scaled_down(recipe, sentences, f"{scratch}/model")
        model = make_model(recipe["model"])
        require_dropout(model, sentences[0])

        # The three terms of Eq. 18: SimCSE at every dim, SIA at its layers, PIC along its chain
        settings = recipe["loss"]
        base = MultipleNegativesRankingLoss(model, scale=1 / settings["temperature"])
        loss = MIPICLoss.from_preset(
            model,
            base,
            "paper",
            settings["dims"],
            alpha=settings["alpha"],
            sia_layers=settings["sia_layers"],
            pic_chain=[tuple(pair) for pair in settings["pic_chain"]],
            attention_temperature=settings["temperature"],
            chain_temperature=settings["temperature"],
        )

        evaluator = make_evaluator(args, settings["dims"])
        before = score(model, evaluator)
        training = recipe["training"]
        args.epochs, args.steps = training["epochs"], -1
        args.batch_size, args.learning_rate = training["batch_size"], training["learning_rate"]
        trainer = SentenceTransformerTrainer(
            model=model,
            args=training_arguments(
                args,
                model,
                train,
                args.output or f"{scratch}/run",
                weight_decay=training["weight_decay"],
                lr_scheduler_type=training["lr_scheduler_type"],
                warmup_steps=0,
                # half precision as in the paper where there is a GPU for it
                fp16=training["fp16"] and torch.cuda.is_available(),
                bf16=False,
            ),
            train_dataset=train,
            loss=loss,
            callbacks=[MIPICCallback(loss)],
        )
        trainer.train()
        show(before, score(model, evaluator))
        save(model, args.output)


if __name__ == "__main__":
    main()
