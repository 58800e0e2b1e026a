"""Unsupervised SimCSE, the MIPIC paper's task, with its preset: each sentence is its own positive through dropout.

    python examples/unsupervised_simcse.py                                       # offline, synthetic sentences
    python examples/unsupervised_simcse.py --model google-bert/bert-base-uncased --pairs pairs.csv --epochs 5

Every distinct sentence of the data is used, its other columns are not. Expect nothing from the offline default:
all-MiniLM as shipped already tells sentences apart, so its loss is near zero from the first step. SimCSE is for
encoders that were never trained on sentences, such as BERT. train_recipe.py has the paper's exact settings.
"""

from __future__ import annotations

import tempfile

from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from common import (
    choose_dims,
    load_model,
    load_train,
    make_evaluator,
    make_parser,
    require_dropout,
    save,
    score,
    sentences_of,
    show,
    training_arguments,
)
from mipic_st import MIPICCallback, MIPICLoss
from mipic_st.demo import synthetic_pairs


def main() -> None:
    # Table 7 of the paper: batch 16, learning rate 2e-5
    args = make_parser(__doc__, batch_size=16, learning_rate=2e-5).parse_args()

    # 1. A model with dropout, which is what makes two passes over one sentence differ
    model = load_model(args.model)
    dims = choose_dims(args.dims, model.get_embedding_dimension())

    # 2. Sentences, each twice: the trainer embeds both columns, dropout makes them two views
    sentences = sentences_of(load_train(args, synthetic_pairs(1000, negatives=False)))
    train = Dataset.from_dict({"anchor": sentences, "positive": sentences})
    print(f"{len(train)} sentences, the first one: {sentences[0]}")
    require_dropout(model, sentences[0])

    # 3. In-batch contrast at temperature 0.05 (scale 20), with the published weights, layers and chain
    base = MultipleNegativesRankingLoss(model, scale=20.0)
    loss = MIPICLoss.from_preset(model, base, "paper", dims)

    # 4. Train, and score at each dim before and after
    evaluator = make_evaluator(args, dims)
    before = score(model, evaluator)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=training_arguments(
                args,
                model,
                train,
                args.output or scratch,
                lr_scheduler_type="cosine",
                weight_decay=0.01,
                warmup_steps=0,
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
