"""Distillation: a small student learns the similarities that a larger teacher sees, at every dim.

    python examples/distillation.py                      # offline: all-MiniLM-L6-v2 teaches its own lower layers
    python examples/distillation.py --teacher BAAI/bge-m3 --model sentence-transformers/all-MiniLM-L6-v2 \
        --train-file pairs.csv

The label of a pair is the cosine of the teacher's full-width vectors, and CoSENT ranks the student's pairs alike. It
holds at any width. MSELoss compares vectors with vectors and cannot be truncated: its label would keep its width.
"""

from __future__ import annotations

from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from sentence_transformers.util import pairwise_cos_sim

from common import arguments, dims_for, load_data, load_model, parse, score, show, sts_evaluator, train
from mipic_st import MIPICLoss
from mipic_st.export import export_truncated
from mipic_st.synthetic import synthetic_pairs


def taught(teacher: SentenceTransformer, pairs: Dataset) -> Dataset:
    """Each pair as it is, and its first text beside the next pair's second; the score is the teacher's cosine."""
    first, second = (list(pairs[column]) for column in pairs.column_names[:2])
    first, second = first * 2, second + second[1:] + second[:1]
    vectors = [teacher.encode(texts, batch_size=64, convert_to_tensor=True) for texts in (first, second)]
    cosines = pairwise_cos_sim(*vectors).cpu().tolist()
    return Dataset.from_dict({"sentence1": first, "sentence2": second, "score": cosines})


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--teacher", help="name on the hub or local folder (default: the packaged all-MiniLM-L6-v2)")
    args = parse(parser)
    teacher = load_model(args.teacher)
    # The student: the teacher without its upper half, a plain model of its own.
    student = load_model(args.model) if args.model else export_truncated(teacher, layer=3)
    pairs = load_data(args, synthetic_pairs(1500, negatives=False))
    data = taught(teacher, pairs)
    dims = dims_for(student, args)

    loss = MIPICLoss(student, CoSENTLoss(student), dims)

    evaluator = sts_evaluator(args, dims)
    before = score(student, evaluator, dims)
    train(student, loss, data, args)
    show(before, score(student, evaluator, dims), "distillation, the student")
    width = teacher.get_embedding_dimension()
    print("the teacher at full width:", round(score(teacher, sts_evaluator(args, [width]), [width])[width], 2))


if __name__ == "__main__":
    main()
