"""A larger teacher: at every dim, the similarities within a batch follow those that a better model finds.

    mipic-st rotate MODEL --pairs pairs.csv --dims 8 16 32 64 128 256 --output rotated
    python examples/larger_teacher.py --model rotated --teacher sentence-transformers/all-mpnet-base-v2 \\
        --pairs pairs.csv
    python examples/larger_teacher.py --smoke                       # offline, with the model itself as teacher

The teacher encodes each text once, before training, so no step runs it. Its vectors may have any width. With
all-mpnet-base-v2 as the teacher of a rotated all-MiniLM-L6-v2 it gave half a point of STS at 16 and 8 dims
(.docs/pages/appendix.md).
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
    show_teacher,
    training_arguments,
)
from mipic_st import MIPICLoss, add_teacher_vectors
from mipic_st.data import is_scored
from mipic_st.demo import synthetic_pairs


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--teacher", help="name on the hub or local folder (default: the packaged all-MiniLM-L6-v2)")
    parser.add_argument("--distill-weight", type=float, default=4.0)
    args = parser.parse_args()

    # 1. Pairs, and a student: best one that is rotated, so that its first values are worth keeping already
    pairs = load_train(args, synthetic_pairs(2000, negatives=False))
    if is_scored(pairs):
        raise SystemExit("This script is for pairs; scored ones are for sts_regression.py.")
    student = load_model(args.model)
    dims = choose_dims(args.dims, student.get_embedding_dimension())
    evaluator = make_evaluator(args, dims)
    before = score(student, evaluator)

    # 2. The teacher sees each text once; its vectors become the column of labels
    teacher = load_model(args.teacher)
    taught = add_teacher_vectors(pairs, teacher, batch_size=64)

    # 3. The pairs, the tokens and the teacher, at every dim
    base = MultipleNegativesRankingLoss(student)
    loss = MIPICLoss(student, base, dims, distill_weight=args.distill_weight)

    # 4. Train, and score at each dim before and after
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model=student,
            args=training_arguments(args, student, taught, args.output or scratch),
            train_dataset=taught,
            loss=loss,
        )
        trainer.train()
    show(before, score(student, evaluator))
    show_teacher(args, teacher)
    save(student, args.output)


if __name__ == "__main__":
    main()
