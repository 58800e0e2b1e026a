"""Train one of the paper's four recipes from its file: unsupervised SimCSE with the published loss.

    python examples/train_recipe.py examples/recipes/bert-base.toml --train-file sentences.csv --output-dir trained
    python examples/train_recipe.py examples/recipes/bert-base.toml --smoke      # a tiny random model of that depth

A recipe names the backbone, its pooling, the dims, what differs from the loss's paper preset, and the trainer's
arguments. The sentences are the first column of the file, or the anchors of a data set on the hub.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from common import arguments, load_data, parse, random_model, score, show, sts_evaluator, train, twice
from mipic_st import MIPICLoss
from mipic_st.synthetic import synthetic_pairs

KEYS = {"model", "pooling", "matryoshka_dims", "max_seq_length", "loss", "training"}


def read_recipe(path: str) -> dict[str, Any]:
    """The recipe, or an error that names the file and the key."""
    try:
        recipe = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SystemExit(f"{path}: {error}") from None
    wrong, missing = sorted(recipe.keys() - KEYS), sorted(KEYS - recipe.keys())
    if wrong or missing:
        raise SystemExit(f"{path}: unknown keys {wrong}, missing keys {missing}; a recipe has {sorted(KEYS)}")
    return recipe


def load_backbone(recipe: dict[str, Any], smoke: bool) -> SentenceTransformer:
    """The recipe's backbone with its pooling; in a smoke run a random one of the same depth and width."""
    if smoke:
        texts = [text for row in synthetic_pairs(64, negatives=False) for text in row.values()]
        depth, width = recipe["loss"]["pic_checkpoints"][-1][1], recipe["matryoshka_dims"][-1]
        return random_model(texts, depth=depth, width=width, pooling=recipe["pooling"])
    transformer = Transformer(recipe["model"])
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), recipe["pooling"])])


def main() -> None:
    parser = arguments(__doc__, steps=None, batch_size=None, learning_rate=None)  # the recipe has them
    parser.add_argument("recipe", help="a file of examples/recipes")
    args = parse(parser)
    recipe = read_recipe(args.recipe)
    model = load_backbone(recipe, args.smoke)
    model.max_seq_length = recipe["max_seq_length"]
    data = twice(load_data(args, synthetic_pairs(4000, negatives=False)))
    dims = sorted(args.dims or recipe["matryoshka_dims"], reverse=True)

    base = MultipleNegativesRankingLoss(model, scale=20)  # a temperature of 0.05
    loss = MIPICLoss.from_preset(model, base, dims, "paper", **recipe["loss"])

    evaluator = sts_evaluator(args, dims)
    before = score(model, evaluator, dims)
    names = {"max_steps": "steps", "per_device_train_batch_size": "batch_size", "learning_rate": "learning_rate"}
    given = {name: getattr(args, option) for name, option in names.items()}
    settings = recipe["training"] | {key: value for key, value in given.items() if value is not None}
    train(model, loss, data, args, **settings)
    show(before, score(model, evaluator, dims), Path(args.recipe).stem)


if __name__ == "__main__":
    main()
