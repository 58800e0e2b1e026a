"""What each process of test_distributed.py runs: python distributed_worker.py MODEL_FOLDER OUTPUT_FOLDER [nodes].

Also imported by that test, which runs the same scenarios in one process.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from conftest import column_features, make_tail, sentences, total
from mipic_st import MIPICCallback, MIPICLoss, add_teacher_vectors, rotate_model
from mipic_st.transforms.rotation import Rotation
from training_fixtures import datasets, logs, make_loss, make_trainer, pairs, parameters

torch.set_num_threads(1)


def both_gather(model, **options):
    """Negatives from all devices for the base loss and for PIC."""
    base = losses.MultipleNegativesRankingLoss(model, gather_across_devices=True)
    return make_loss(model, base, gather_across_devices=True, **options)


def cached(model, **options):
    """The same with gradient caching."""
    base = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3, gather_across_devices=True)
    return make_loss(model, base, gather_across_devices=True, **options)


def tail(model, **options):
    """A tail as LaBSE has it: its parameters are used in the wrapped forward, and by the terms outside of it."""
    for module in make_tail("labse"):
        model.append(module)
    return both_gather(model, **options)


def cached_tail(model, **options):
    """The same with gradient caching."""
    for module in make_tail("labse"):
        model.append(module)
    return cached(model, **options)


# Runs that must equal one process on the concatenated batch: loss, its options, and the trainer's.
EQUAL = {
    "plain": (both_gather, {}, {}),
    "accumulation": (both_gather, {}, {"gradient_accumulation_steps": 2}),
    "drawn dims": (both_gather, {"n_dims_per_step": 2}, {}),
    "cached": (cached, {}, {"gradient_accumulation_steps": 2}),
    "tail": (tail, {}, {}),
    "cached tail": (cached_tail, {}, {"gradient_accumulation_steps": 2}),
    "clipped": (both_gather, {}, {"max_grad_norm": 0.05}),
}


def defaults(model):
    """The loss as it is without any argument."""
    return MIPICLoss(model, losses.MultipleNegativesRankingLoss(model, gather_across_devices=True), [32, 16, 8])


def cached_defaults(model):
    """The same with gradient caching."""
    base = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3, gather_across_devices=True)
    return MIPICLoss(model, base, [32, 16, 8])


# The same on two nodes.
NODES = {
    "defaults": (defaults, {}, {}),
    "cached defaults": (cached_defaults, {}, {"gradient_accumulation_steps": 2}),
    "cached": EQUAL["cached"],
}


def run_equal(name, model_folder, folder, processes):
    """One of the scenarios above; the loss after training."""
    make, options, arguments = {**EQUAL, **NODES}[name]
    model = SentenceTransformer(str(model_folder), device="cpu")
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
        callbacks=[MIPICCallback(loss)],
        **arguments,
    )
    trainer.train()
    return loss


def run_drift(model_folder, folder, rank):
    """Projections that differ at the start, batches that differ all along, Adam, nothing gathered."""
    model = SentenceTransformer(str(model_folder), device="cpu")
    loss = make_loss(model, lift_init="random", seed=rank)
    settings = {"max_steps": 5, "gradient_accumulation_steps": 2}
    make_trainer(model, loss, folder, callbacks=[MIPICCallback(loss)], **settings).train()
    return loss


def run_data_sets(model_folder, folder):
    """A dict of losses: in one step the ranks may be at different data sets, hence at different projections.

    Both have the same terms: the trainer gathers what it logs by position.
    """
    model = SentenceTransformer(str(model_folder), device="cpu")
    symmetric = losses.MultipleNegativesSymmetricRankingLoss(model)
    by_name = {
        "one": make_loss(model),
        "two": MIPICLoss(
            model, symmetric, [32, 8], alpha=0.5, attention_weight=1.0, pic_weight=0.5, lift_init="identity", seed=7
        ),
    }
    data = datasets.DatasetDict({"one": pairs(40), "two": pairs(40, seed=20)})
    settings = {"max_steps": 5, "per_device_train_batch_size": 4, "callbacks": [MIPICCallback(by_name)]}
    make_trainer(model, by_name, folder, train=data, **settings).train()
    return torch.nn.ModuleDict(by_name)


def run_taught(model_folder, folder, processes):
    """A teacher, nothing gathered: each process has a batch, or one process two and the mean of their gradients."""
    model = SentenceTransformer(str(model_folder), device="cpu")
    taught = add_teacher_vectors(pairs(40), SentenceTransformer(str(model_folder), device="cpu"))
    loss = make_loss(model, distill_weight=20.0)
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2 // processes, "max_steps": 4}
    sgd = {"optim": "sgd", "learning_rate": 0.2, "lr_scheduler_type": "constant"}
    trainer = make_trainer(model, loss, folder, train=taught, callbacks=[MIPICCallback(loss)], **settings, **sgd)
    trainer.train()
    assert len(logs(trainer, "distillation")) == 4
    return loss


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


# fully_shard on a CPU needs streams that torch has from 2.7 on.
SHARDS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)
# What has no projections and so must run where the model is sharded.
WITHOUT_PROJECTIONS = {
    "CKA alone": {"attention_weight": 0, "pic_weight": 0},
    "frozen lifts": {"lift_init": "frozen", "pic_weight": 0},
    "alpha=1": {"alpha": 1},
}


def sharded(model):
    """The model under FSDP, layer by layer, on all processes."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model[0].auto_model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run_by_hand(name, model_folder, batches, shard):
    """Three steps of SGD on the mean of the gradients: of all batches, or of this rank's and, by FSDP, the others'."""
    model = SentenceTransformer(str(model_folder), device="cpu").train()
    if shard:
        sharded(model)
    loss = make_loss(model, **WITHOUT_PROJECTIONS[name])
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.05)
    for step in range(3):
        for batch in batches:
            features = column_features(model, rows=4, seed=10 * step + 100 * batch)
            (total(loss(features, None)) / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss


def refusal(model_folder):
    """What MIPICLoss with projections says to a loop in which nobody averages their gradients."""
    model = SentenceTransformer(str(model_folder), device="cpu").train()
    features = column_features(model)
    loss = make_loss(model)
    try:
        loss(features, None)
    except RuntimeError as error:
        loss.managed = True
        assert loss(features, None)
        loss.managed = False
        with torch.no_grad():
            assert loss(features, None)
        return str(error)


def run_rotations(model_folder, rank):
    """rotate_model in two processes; by case, what it raised or logged, and the model's parameters and vectors."""
    texts = sentences(120, seed=8)
    cases = {
        "same": {"data": texts},
        "shards": {"data": texts[rank::2]},
        "bad on the second": {"data": texts if rank == 0 else texts[:5]},
        "fit fails on the first": {"data": texts},
        "card fails on the second": {"data": texts},
    }
    results = {}
    for name, options in cases.items():
        model = SentenceTransformer(str(model_folder), device="cpu")
        if name == "fit fails on the first" and rank == 0:
            encode = model.encode
            model.encode = lambda *args, encode=encode, **kwargs: 0 * encode(*args, **kwargs)
        before, result = parameters(model), {}
        with ExitStack() as stack:
            log = stack.enter_context(caught_log())
            stack.enter_context(patch.object(Rotation, "gained", True))
            if name == "card fails on the second" and rank == 1:
                stack.enter_context(patch("mipic_st.transforms.model_rotation.describe_dims", lambda *_, **__: 1 / 0))
            try:
                rotation = rotate_model(model, **options, dims=[4, 8], max_steps=10, show_progress_bar=False)
                result["matrix"] = torch.as_tensor(rotation.matrix)
            except (ValueError, ZeroDivisionError) as error:
                result["error"] = f"{type(error).__name__}: {error}"
        after = parameters(model)
        same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in after)
        results[name] = result | {"log": log.getvalue(), "parameters": after, "unchanged": same}
    return results


@contextmanager
def caught_log():
    """What the package says inside of the block."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logging.getLogger("mipic_st").addHandler(handler)
    try:
        yield text
    finally:
        logging.getLogger("mipic_st").removeHandler(handler)


def on_nodes(model_folder, output):
    """What runs where each node has one process; each leaves its parameters."""
    results = {name: run_equal(name, model_folder, output / "run", 2) for name in NODES}
    results["taught"] = run_taught(model_folder, output / "run", 2)
    nodes = [None, None]
    torch.distributed.all_gather_object(nodes, (os.environ["GROUP_RANK"], os.environ["LOCAL_RANK"]))
    states = {name: parameters(loss) for name, loss in results.items()}
    torch.save(states | {"nodes": nodes}, output / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


def main(model_folder, output):
    """All scenarios; each rank leaves its parameters."""
    rank = int(os.environ["RANK"])
    results = {name: run_equal(name, model_folder, output / "run", 2) for name in EQUAL}
    results["drift"] = run_drift(model_folder, output / "run", rank)
    results["taught"] = run_taught(model_folder, output / "run", 2)
    results["data sets"] = run_data_sets(model_folder, output / "run")
    results["whole"] = run_resumed(model_folder, output / "whole", None)
    try:
        results["resumed"] = run_resumed(model_folder, output / "parts", 2)
    except RuntimeError as error:
        # transformers 5.0 cannot load an optimizer on CPU in several processes with a recent torch
        if "don't know how to restore data location" not in str(error):
            raise
    states = {name: parameters(loss) for name, loss in results.items()}
    for name in WITHOUT_PROJECTIONS if SHARDS else ():
        loss = run_by_hand(name, model_folder, [rank], shard=True)
        assert isinstance(next(loss.parameters()), DTensor)
        states[f"sharded, {name}"] = {key: value.full_tensor() for key, value in parameters(loss).items()}
    states["refusal"] = refusal(model_folder)
    states["rotations"] = run_rotations(model_folder, rank)
    torch.save(states, output / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    (on_nodes if sys.argv[3:] == ["nodes"] else main)(Path(sys.argv[1]), Path(sys.argv[2]))
