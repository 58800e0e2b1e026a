"""Pairs with a similarity score: CoSENT ranks the pairs of a batch by their cosine, at every dim.

python examples/sts_regression.py                                            # offline, synthetic scores
python examples/sts_regression.py --dataset sentence-transformers/stsb --model bert-base-uncased
"""

from __future__ import annotations

from sentence_transformers.sentence_transformer.losses import CoSENTLoss

from common import arguments, dims_for, load_data, load_model, parse, score, show, sts_evaluator, train
from mipic_st import MIPICLoss
from mipic_st.synthetic import synthetic_sts


def main() -> None:
    args = parse(arguments(__doc__))
    model = load_model(args.model)
    rows = synthetic_sts(4000, split="train")
    scored = [{key: row[key] for key in ("sentence1", "sentence2", "score")} for row in rows]
    data = load_data(args, scored)
    dims = dims_for(model, args)

    loss = MIPICLoss(model, CoSENTLoss(model), dims)

    evaluator = sts_evaluator(args, dims)
    before = score(model, evaluator, dims)
    train(model, loss, data, args)
    show(before, score(model, evaluator, dims), "STS regression")


if __name__ == "__main__":
    main()
