"""Supervised training on (anchor, entailment, contradiction) triplets: the contradiction is a hard negative.

    python examples/supervised_nli.py                                                      # offline, synthetic
    python examples/supervised_nli.py --dataset sentence-transformers/all-nli:triplet --model microsoft/mpnet-base

Besides its own negative, each anchor has all other sentences of the batch as in-batch negatives. The offline triplets
are made from templates: they show that training works, not how good the model is.
"""

from __future__ import annotations

import tempfile

from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from common import (
    choose_dims,
    load_model,
    load_train,
    make_evaluator,
    make_parser,
    save,
    score,
    show,
    training_arguments,
)
from mipic_st import MIPICCallback, MIPICLoss
from mipic_st.demo import synthetic_pairs


def main() -> None:
    args = make_parser(__doc__).parse_args()

    # 1. A model, and the dims that it will be served at
    model = load_model(args.model)
    dims = choose_dims(args.dims, model.get_embedding_dimension())

    # 2. Triplets: anchor, positive (entailed), negative (contradicted)
    train = load_train(args, synthetic_pairs(negatives=True))
    if "negative" not in train.column_names:
        raise SystemExit(f"Triplets need the columns anchor, positive and negative, got {train.column_names}")
    print(f"{len(train)} triplets, the first one: {train[0]}")

    # 3. The usual loss for triplets, at every dim and with MIPIC's alignments
    loss = MIPICLoss(model, MultipleNegativesRankingLoss(model), matryoshka_dims=dims)

    # 4. Train, and score at each dim before and after
    evaluator = make_evaluator(args, dims)
    before = score(model, evaluator)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=training_arguments(args, train, args.output_dir or scratch),
            train_dataset=train,
            loss=loss,
            callbacks=[MIPICCallback(loss)],
        )
        trainer.train()
    show(before, score(model, evaluator))
    save(model, args.output_dir)


if __name__ == "__main__":
    main()
