"""Large batches in little memory: CachedMultipleNegativesRankingLoss embeds a batch in mini-batches.

    python examples/large_batches.py                                              # offline, synthetic pairs
    python examples/large_batches.py --dataset sentence-transformers/all-nli:pair --batch-size 1024 --mini-batch-size 64

--batch-size sets the number of in-batch negatives, --mini-batch-size the memory: the value of the loss does not depend
on it. MIPICLoss follows the cached loss, alignment terms included.
"""

from __future__ import annotations

import tempfile

from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

from common import (
    choose_dims,
    load_model,
    load_train,
    make_evaluator,
    make_parser,
    positive,
    save,
    score,
    show,
    training_arguments,
)
from mipic_st import MIPICCallback, MIPICLoss
from mipic_st.data import is_scored
from mipic_st.demo import synthetic_pairs


def main() -> None:
    parser = make_parser(__doc__, batch_size=256)
    parser.add_argument("--mini-batch-size", type=positive, default=32, help="sentences embedded at a time")
    args = parser.parse_args()

    # 1. A model, and the dims that it will be served at
    model = load_model(args.model)
    dims = choose_dims(args.dims, model.get_embedding_dimension())

    # 2. Pairs: the positives of all other rows are an anchor's negatives
    train = load_train(args, synthetic_pairs(2048, negatives=False))
    if is_scored(train):
        raise SystemExit(f"A ranking loss needs the columns anchor and positive, got {train.column_names}")
    print(f"{len(train)} pairs in batches of {args.batch_size}, embedded {args.mini_batch_size} at a time")

    # 3. The cached loss instead of MultipleNegativesRankingLoss; nothing else changes
    mini_batch_size = min(4, args.mini_batch_size) if args.smoke else args.mini_batch_size
    base = CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size)
    loss = MIPICLoss(model, base, matryoshka_dims=dims)

    # 4. Train, and score at each dim before and after
    evaluator = make_evaluator(args, dims)
    before = score(model, evaluator)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=training_arguments(args, model, train, args.output or scratch, logging_steps=1),
            train_dataset=train,
            loss=loss,
            callbacks=[MIPICCallback(loss)],
        )
        trainer.train()
    show(before, score(model, evaluator))
    save(model, args.output)


if __name__ == "__main__":
    main()
