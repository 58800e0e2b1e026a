"""Several processes (DDP), with negatives from all of them.

    accelerate launch --num_processes 2 examples/two_processes.py                  # two GPUs
    accelerate launch --cpu --num_processes 2 examples/two_processes.py --smoke    # two CPU processes (gloo)
    python examples/two_processes.py                                               # one process: the same script

The loss keeps its heads equal on all processes by itself. gather_across_devices is set twice: for the base loss and for
PIC; every process then needs the same batch size, so incomplete batches are dropped.
"""

from __future__ import annotations

from accelerate import PartialState
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from common import arguments, dims_for, load_data, load_model, parse, score, show, sts_evaluator, train
from mipic_st import MIPICLoss
from mipic_st.synthetic import synthetic_pairs


def main() -> None:
    args = parse(arguments(__doc__))
    state = PartialState()
    model = load_model(args.model)
    data = load_data(args, synthetic_pairs(4000, negatives=False))
    dims = dims_for(model, args)

    base = MultipleNegativesRankingLoss(model, gather_across_devices=True)
    loss = MIPICLoss(model, base, dims, gather_across_devices=True)

    evaluator = sts_evaluator(args, dims)
    before = score(model, evaluator, dims)
    train(model, loss, data, args, batch_sampler="no_duplicates", dataloader_drop_last=True)
    after = score(model, evaluator, dims)
    if state.is_main_process:
        show(before, after, f"{state.num_processes} process(es)")


if __name__ == "__main__":
    main()
