"""Large batches in little memory: a cached base loss embeds mini-batches and still sees all in-batch negatives.

    python examples/large_batches.py                                     # offline: batch 128 in mini-batches of 16
    python examples/large_batches.py --train-file pairs.csv --batch-size 2048 --mini-batch-size 64

Loss and gradients equal those of the uncached loss, SIA and PIC included; the price is one more forward pass.
"""

from __future__ import annotations

from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

from common import arguments, dims_for, load_data, load_model, parse, score, show, sts_evaluator, train
from mipic_st import MIPICLoss
from mipic_st.synthetic import synthetic_pairs


def main() -> None:
    parser = arguments(__doc__, batch_size=128, steps=30)
    parser.add_argument("--mini-batch-size", type=int, default=16, help="texts that are embedded at once")
    args = parse(parser)
    model = load_model(args.model)
    data = load_data(args, synthetic_pairs(4000, negatives=False))
    dims = dims_for(model, args)

    base = CachedMultipleNegativesRankingLoss(model, mini_batch_size=min(args.mini_batch_size, args.batch_size))
    loss = MIPICLoss(model, base, dims)

    evaluator = sts_evaluator(args, dims)
    before = score(model, evaluator, dims)
    train(model, loss, data, args, batch_sampler="no_duplicates")
    show(before, score(model, evaluator, dims), f"batch {args.batch_size}, cached")


if __name__ == "__main__":
    main()
