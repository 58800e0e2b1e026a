"""Train on scored sentence pairs (STS) with CoSENTLoss, which orders the pairs by their score.

    python examples/sts_regression.py                                             # offline, synthetic pairs
    python examples/sts_regression.py --dataset sentence-transformers/stsb --epochs 4

Only the order of the scores counts, so 0 to 5 and 0 to 1 give the same result.
"""

from __future__ import annotations

import tempfile

from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import CoSENTLoss

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
from mipic_st.data import is_scored
from mipic_st.demo import synthetic_sts


def main() -> None:
    args = make_parser(__doc__).parse_args()

    # 1. A model, and the dims that it will be served at
    model = load_model(args.model)
    dims = choose_dims(args.dims, model.get_embedding_dimension())

    # 2. Pairs with a score; the synthetic ones also tell their kind, which is not trained on
    synthetic = [{key: row[key] for key in ("sentence1", "sentence2", "score")} for row in synthetic_sts(split="train")]
    train = load_train(args, synthetic)
    if not is_scored(train):
        raise SystemExit(f"Regression needs the columns sentence1, sentence2 and score, got {train.column_names}")
    print(f"{len(train)} scored pairs, the first one: {train[0]}")

    # 3. The regression loss at every dim, with MIPIC's alignments
    loss = MIPICLoss(model, CoSENTLoss(model), matryoshka_dims=dims)

    # 4. Train, and score at each dim before and after
    evaluator = make_evaluator(args, dims)
    before = score(model, evaluator)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=training_arguments(args, model, train, args.output or scratch),
            train_dataset=train,
            loss=loss,
            callbacks=[MIPICCallback(loss)],
        )
        trainer.train()
    show(before, score(model, evaluator))
    save(model, args.output)


if __name__ == "__main__":
    main()
