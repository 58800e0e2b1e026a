"""Train in two processes, with the negatives of both.

    accelerate launch --num_processes 2 examples/two_processes.py                                       # two GPUs
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 examples/two_processes.py   # CPU, gloo
    python examples/two_processes.py                                                                    # one process

Without GPUs the first line starts a single process, whatever --num_processes says, hence the second, where --multi_gpu
only means several processes; torchrun --nproc-per-node 2 does the same. The first line printed tells how many run.
--batch-size counts per process. MIPICCallback keeps projections, if there are any, equal on all processes.
gather_across_devices is set twice: on the base loss for its negatives, and on MIPICLoss for those of PIC.
"""

from __future__ import annotations

import tempfile

import torch
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
from mipic_st.data import is_scored
from mipic_st.demo import synthetic_pairs
from mipic_st.encoder.encoding import prompt_of


def main() -> None:
    args = make_parser(__doc__, batch_size=16).parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        # 1. Data first: the trainer's settings start the process group, which the losses ask for its size
        train = load_train(args, synthetic_pairs(1600, negatives=False))
        if is_scored(train):
            raise SystemExit(f"A ranking loss needs the columns anchor and positive, got {train.column_names}")
        use_cpu = not torch.cuda.is_available()
        settings = training_arguments(args, None, train, args.output or scratch, use_cpu=use_cpu)
        first = settings.process_index == 0
        print(f"process {settings.process_index} of {settings.world_size} on {settings.device}")

        # 2. A model, and the dims that it will be served at
        model = load_model(args.model)
        settings.prompts = prompt_of(model, None)
        dims = choose_dims(args.dims, model.get_embedding_dimension())

        # 3. With 2 processes of 16 rows, each anchor has 31 negatives
        base = MultipleNegativesRankingLoss(model, gather_across_devices=True)
        loss = MIPICLoss(model, base, matryoshka_dims=dims, gather_across_devices=True)

        # 4. Train on all processes; score and print on the first one only
        evaluator = make_evaluator(args, dims)
        before = score(model, evaluator) if first else {}
        trainer = SentenceTransformerTrainer(
            model=model, args=settings, train_dataset=train, loss=loss, callbacks=[MIPICCallback(loss)]
        )
        trainer.train()
        if first:
            show(before, score(model, evaluator))
            save(model, args.output)
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
