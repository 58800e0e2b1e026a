"""Supervised training on (anchor, entailment, contradiction) triplets with in-batch and hard negatives.

python examples/supervised_nli.py                                                    # offline, synthetic triplets
python examples/supervised_nli.py --dataset sentence-transformers/all-nli:triplet --model bert-base-uncased
"""

from __future__ import annotations

from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from common import arguments, dims_for, load_data, load_model, parse, score, show, sts_evaluator, train
from mipic_st import MIPICLoss
from mipic_st.synthetic import synthetic_pairs


def main() -> None:
    args = parse(arguments(__doc__))
    model = load_model(args.model)
    data = load_data(args, synthetic_pairs(4000))  # columns: anchor, positive, negative
    dims = dims_for(model, args)

    # The contradiction of every other row is one more negative for each anchor.
    loss = MIPICLoss(model, MultipleNegativesRankingLoss(model), dims)

    evaluator = sts_evaluator(args, dims)
    before = score(model, evaluator, dims)
    # The same sentence twice in a batch would be its own negative.
    train(model, loss, data, args, batch_sampler="no_duplicates")
    show(before, score(model, evaluator, dims), "supervised NLI")


if __name__ == "__main__":
    main()
