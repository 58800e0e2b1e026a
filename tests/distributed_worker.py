"""What each process of test_distributed.py runs: python distributed_worker.py MODEL_FOLDER OUTPUT_FOLDER.

Also imported by that test, which runs the same scenarios in one process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses

from mipic_st import MIPICCallback, MIPICLoss
from training_fixtures import datasets, make_loss, make_trainer, pairs, parameters

torch.set_num_threads(1)


def both_gather(model, **options):
    """Negatives from all devices for the base loss and for PIC."""
    base = losses.MultipleNegativesRankingLoss(model, gather_across_devices=True)
    return make_loss(model, base, gather_across_devices=True, **options)


def cached(model, **options):
    """The same with gradient caching."""
    base = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3, gather_across_devices=True)
    return make_loss(model, base, gather_across_devices=True, **options)


# Runs that must equal one process on the concatenated batch: loss, its options, and the trainer's.
EQUAL = {
    "plain": (both_gather, {}, {}),
    "accumulation": (both_gather, {}, {"gradient_accumulation_steps": 2}),
    "drawn dims": (both_gather, {"n_dims_per_step": 2}, {}),
    "cached": (cached, {}, {"gradient_accumulation_steps": 2}),
    "clipped": (both_gather, {"callback": True}, {"max_grad_norm": 0.05}),
}


def run_equal(name, model_folder, folder, processes):
    """One of the scenarios above; the loss after training."""
    make, options, arguments = EQUAL[name]
    options = dict(options)
    model = SentenceTransformer(str(model_folder), device="cpu")
    with_callback = options.pop("callback", False)
    loss = make(model, **options)
    trainer = make_trainer(
        model,
        loss,
        folder,
        max_steps=4,
        per_device_train_batch_size=8 // processes,
        # plain SGD: Adam would blow rounding errors of gradients that are zero up to whole steps
        optim="sgd",
        learning_rate=0.2,
        lr_scheduler_type="constant",
        callbacks=[MIPICCallback(loss)] if with_callback else [],
        **arguments,
    )
    trainer.train()
    return loss


def run_drift(model_folder, folder, rank):
    """Heads that differ at the start, batches that differ all along, Adam, nothing gathered."""
    model = SentenceTransformer(str(model_folder), device="cpu")
    loss = make_loss(model, lift_init="random", seed=rank)
    make_trainer(model, loss, folder, max_steps=5, gradient_accumulation_steps=2).train()
    return loss


def run_data_sets(model_folder, folder):
    """A dict of losses: in one step the ranks may be at different data sets, hence at different heads.

    Both have the same terms: the trainer gathers what it logs by position.
    """
    model = SentenceTransformer(str(model_folder), device="cpu")
    symmetric = losses.MultipleNegativesSymmetricRankingLoss(model)
    by_name = {
        "one": make_loss(model),
        "two": MIPICLoss(model, symmetric, [32, 8], alpha=0.5, attention_weight=1.0, seed=7),
    }
    data = datasets.DatasetDict({"one": pairs(40), "two": pairs(40, seed=20)})
    make_trainer(model, by_name, folder, train=data, max_steps=5, per_device_train_batch_size=4).train()
    return torch.nn.ModuleDict(by_name)


def run_resumed(model_folder, folder, stop):
    """A run in two halves, or whole."""
    from transformers import TrainerCallback

    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == stop

    def part(**kwargs):
        model = SentenceTransformer(str(model_folder), device="cpu")
        loss = make_loss(model, n_dims_per_step=2)
        callbacks = [MIPICCallback(loss), StopAt()]
        settings = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
        make_trainer(model, loss, folder, max_steps=4, callbacks=callbacks, **settings).train(**kwargs)
        return loss

    loss = part()
    if stop is not None:
        stop = None
        loss = part(resume_from_checkpoint=True)
    return loss


def main(model_folder, output):
    """All scenarios; each rank leaves its parameters."""
    rank = int(os.environ["RANK"])
    results = {name: run_equal(name, model_folder, output / "run", 2) for name in EQUAL}
    results["drift"] = run_drift(model_folder, output / "run", rank)
    results["data sets"] = run_data_sets(model_folder, output / "run")
    results["whole"] = run_resumed(model_folder, output / "whole", None)
    try:
        results["resumed"] = run_resumed(model_folder, output / "parts", 2)
    except RuntimeError as error:
        # transformers 5.0 cannot load an optimizer on CPU in several processes with a recent torch
        if "don't know how to restore data location" not in str(error):
            raise
    states = {name: parameters(loss) for name, loss in results.items()}
    torch.save(states, output / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
