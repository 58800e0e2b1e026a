"""Distillation: a small student learns how similar a larger teacher finds two sentences, at every dim.

    python examples/distillation.py                                                # offline, 2 of all-MiniLM's 6 layers
    python examples/distillation.py --teacher BAAI/bge-m3 --model nreimers/MiniLM-L6-H384-uncased --pairs pairs.csv

The label of a pair is the cosine of the teacher's embeddings, and CoSENTLoss orders the student's cosines like them.
That works at any dim and for any two widths. MSELoss does not: its label is an embedding of one fixed width, which an
embedding cut to fewer values cannot be compared to.
"""

from __future__ import annotations

import random
import tempfile

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from sentence_transformers.util import pairwise_cos_sim

from common import (
    choose_dims,
    load_model,
    load_train,
    make_evaluator,
    make_parser,
    positive,
    save,
    score,
    sentences_of,
    show,
    show_teacher,
    training_arguments,
)
from mipic_st import MIPICCallback, MIPICLoss, export_truncated
from mipic_st.data import is_scored
from mipic_st.demo import synthetic_pairs


def labelled_by(teacher: SentenceTransformer, data: Dataset, seed: int) -> Dataset:
    """The related sentences of each row and as many random pairs, scored by the teacher at its full width."""
    first, second = ("sentence1", "sentence2") if is_scored(data) else ("anchor", "positive")
    sentences = sentences_of(data)
    draw = random.Random(seed)
    pairs = list(zip(data[first], data[second], strict=True))
    pairs += [tuple(draw.sample(sentences, 2)) for _ in range(len(pairs))]

    vectors = teacher.encode(sentences, batch_size=64, convert_to_tensor=True, show_progress_bar=False)
    row = {sentence: index for index, sentence in enumerate(sentences)}
    left, right = (vectors[[row[pair[side]] for pair in pairs]] for side in (0, 1))
    return Dataset.from_dict(
        {
            "sentence1": [pair[0] for pair in pairs],
            "sentence2": [pair[1] for pair in pairs],
            "score": pairwise_cos_sim(left, right).tolist(),
        }
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--teacher", help="name on the hub or local folder (default: the packaged all-MiniLM-L6-v2)")
    parser.add_argument(
        "--student-layers", type=positive, default=2, help="without --model: layers kept of the teacher"
    )
    args = parser.parse_args()

    # 1. The teacher, and a student: another model, or the teacher's first layers
    teacher = load_model(args.teacher)
    student = load_model(args.model) if args.model else export_truncated(teacher, layer=args.student_layers)
    dims = choose_dims(args.dims, student.get_embedding_dimension())

    # 2. The teacher labels the pairs once, before training
    train = labelled_by(teacher, load_train(args, synthetic_pairs(2000, negatives=False)), args.seed)
    print(f"{len(train)} pairs labelled by the teacher, the first one: {train[0]}")

    # 3. The student's cosines follow the labels at every dim
    loss = MIPICLoss(student, CoSENTLoss(student), matryoshka_dims=dims)

    # 4. Train, and score at each dim before and after
    evaluator = make_evaluator(args, dims)
    before = score(student, evaluator)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model=student,
            args=training_arguments(args, student, train, args.output or scratch),
            train_dataset=train,
            loss=loss,
            callbacks=[MIPICCallback(loss)],
        )
        trainer.train()
    show(before, score(student, evaluator))
    show_teacher(args, teacher)
    save(student, args.output)


if __name__ == "__main__":
    main()
