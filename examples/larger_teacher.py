"""A larger teacher: at every dim, the similarities within a batch follow those that a better model sees.

    mipic-st rotate MODEL --pairs pairs.csv --dims 8 16 32 64 128 256 --output rotated
    python examples/larger_teacher.py --model rotated --teacher sentence-transformers/all-mpnet-base-v2 \\
        --train-file pairs.csv
    python examples/larger_teacher.py --smoke                       # offline; the teacher is the model itself then

The teacher encodes each text once, before training, so a step costs no more than without it. The loss is a base loss:
`MIPICLoss` (or `MatryoshkaLoss`) applies it at every dim, whatever the teacher's width. With all-mpnet-base-v2 as the
teacher of a rotated all-MiniLM-L6-v2 it gave 0.5 points of STS at 16 and 8 dims (.docs/pages/choosing.md).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable

import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import Tensor
from torch.nn import functional as F

from common import (
    choose_dims,
    load_model,
    load_train,
    make_evaluator,
    make_parser,
    save,
    score,
    sentences_of,
    show,
    training_arguments,
)
from mipic_st import MIPICLoss
from mipic_st.data import is_scored
from mipic_st.demo import synthetic_pairs

TEMPERATURE = 0.1


class TaughtRankingLoss(MultipleNegativesRankingLoss):
    """In-batch negatives, and the KL of the batch's similarities to those of a teacher.

    Args:
        model: The student.
        anchors: The teacher's unit-length vectors of all anchors, (N, T).
        positives: The same of all positives, (N, T).
        weight: Weight of the KL.
    """

    def __init__(self, model: SentenceTransformer, anchors: Tensor, positives: Tensor, weight: float = 1.0) -> None:
        super().__init__(model)
        self.anchors, self.positives, self.weight = anchors, positives, weight

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            sentence_features: Of anchors and positives.
            labels: (B,), which rows of the data these are.

        Returns:
            Scalar.
        """
        first, second = (self.model(features)["sentence_embedding"] for features in sentence_features)
        rows = labels.to(self.anchors.device)
        teacher = (self.anchors[rows] @ self.positives[rows].T).to(first.device)
        student = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T
        wanted, found = ((cosines.float() / TEMPERATURE).log_softmax(dim=1) for cosines in (teacher, student))
        ranking = self.compute_loss_from_embeddings([first, second], labels)
        return ranking + self.weight * F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--teacher", help="name on the hub or local folder (default: the packaged all-MiniLM-L6-v2)")
    parser.add_argument("--teacher-weight", type=float, default=1.0)
    args = parser.parse_args()

    # 1. Pairs, and a student: best one that is rotated, so that its first values are worth keeping already
    pairs = load_train(args, synthetic_pairs(2000, negatives=False))
    if is_scored(pairs):
        raise SystemExit("This script is for pairs; scored ones are for sts_regression.py.")
    pairs = pairs.select_columns(pairs.column_names[:2])
    student = load_model(args.model)
    dims = choose_dims(args.dims, student.get_embedding_dimension())
    evaluator = make_evaluator(args, dims)
    before = score(student, evaluator)

    # 2. The teacher sees each text once; a row's label is its place in the teacher's vectors
    teacher = load_model(args.teacher)
    texts = sentences_of(pairs)
    vectors = teacher.encode(texts, batch_size=64, normalize_embeddings=True, convert_to_tensor=True).clone().cpu()
    row = {text: index for index, text in enumerate(texts)}
    first, second = (vectors[torch.tensor([row[text] for text in pairs[column]])] for column in pairs.column_names)
    train = pairs.add_column("label", list(range(len(pairs))))

    # 3. Both losses, at every dim
    loss = MIPICLoss(student, TaughtRankingLoss(student, first, second, args.teacher_weight), dims)

    # 4. Train, and score at each dim before and after
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model=student,
            args=training_arguments(args, pairs, args.output_dir or scratch),
            train_dataset=train,
            loss=loss,
        )
        trainer.train()
    show(before, score(student, evaluator))
    full = make_evaluator(args, [teacher.get_embedding_dimension()])
    print(f"the teacher at its full width: {next(iter(score(teacher, full).values())):.2f}")
    save(student, args.output_dir)


if __name__ == "__main__":
    main()
