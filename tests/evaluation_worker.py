"""What test_shared_encoding.py runs: python evaluation_worker.py MODEL_FOLDER OUTPUT_FOLDER DRAWS.

Two processes as torchrun starts them, forked from one that has imported everything: imports take most of the time.
"""

import copy
import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    SequentialEvaluator,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Router

from conftest import save_encoder, sentences
from mipic_st import MatryoshkaEvaluator
from random_models import assert_same, draw_evaluator, drawn_model
from training_fixtures import make_trainer

try:
    from sentence_transformers.util.distributed import distributed_evaluation
except ImportError:  # before 6.2 every process encodes for itself
    distributed_evaluation = None

torch.set_num_threads(1)

CASES = {
    "int8": {"precisions": ["float32", "int8"]},
    "layers, binary": {"layers": [1, 3], "precisions": ["float32", "binary"]},
}


def evaluator(**options):
    """Pairs, and a search whose prompts are the model's."""
    texts, others = sentences(16, 1), sentences(16, 2)
    queries, documents = (
        {f"{kind}{i}": text for i, text in enumerate(part)} for kind, part in (("q", texts), ("d", others))
    )
    parts = [
        EmbeddingSimilarityEvaluator(texts, others, [(7 * i % 16) / 16 for i in range(16)], name="sts"),
        InformationRetrievalEvaluator(queries, documents, {f"q{i}": {f"d{i}"} for i in range(16)}, name="ir"),
    ]
    return MatryoshkaEvaluator(SequentialEvaluator(parts), [8, 32], **options)


def drawn(seed, encoder_folder, folder):
    """Whether this process runs the evaluator: its scores, those it has alone, and the native ones of full width."""
    # transformers writes files in the first process only, so that has to come first
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        rng, model, padded = drawn_model(seed, encoder_folder, folder)
    torch.distributed.barrier()
    if not is_first:
        rng, model, padded = drawn_model(seed, encoder_folder, folder)
    with torch.random.fork_rng(devices=[]):
        judge = draw_evaluator(rng, model, 1 if padded else 5)
    width = model.encode(["cat"], **({"task": "query"} if isinstance(model[0], Router) else {})).shape[-1]
    shared, alone = (MatryoshkaEvaluator(copy.deepcopy(judge), [5, width]) for _ in range(2))
    with distributed_evaluation(model) as is_main:
        scores = shared(model) if is_main else None
    if not is_main:
        return None
    names = [part.name for part in getattr(judge, "evaluators", [judge]) if part.name]
    native, own = judge(model), alone(model)
    assert_same(scores, native, names, str(width), seed)
    # a mean squared error may be above 100, where float32 itself has steps of 1e-5
    assert scores == pytest.approx(own, rel=1e-6, abs=1e-5, nan_ok=True), seed
    return len(scores)


def draws(output, count):
    """Models and evaluators drawn at random, by two processes together and by one alone."""

    def encoder_folder(architecture, padding_side="right"):
        return save_encoder(output / f"{architecture}-{padding_side}", architecture, padding_side)

    return [drawn(seed, encoder_folder, output / f"drawn-{seed}") for seed in range(count)]


def main(rank, port, model_folder, output, count):
    """One step and one evaluation by the trainer for each case; then the same scores by this process alone."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({key: str(value) for key, value in ranks.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    scores = {}
    for name, options in CASES.items():
        model = SentenceTransformer(
            str(model_folder), device="cpu", prompts={"query": "the cat ", "document": "a dog "}
        )
        trainer = make_trainer(
            model,
            MultipleNegativesRankingLoss(model),
            output / "run",
            evaluator=evaluator(**options),
            max_steps=1,
            eval_strategy="steps",
            eval_steps=1,
        )
        trainer.train()
        logged = [row for row in trainer.state.log_history if any(key.startswith("eval_sts") for key in row)]
        scores[name] = {"shared": logged[-1], "alone": evaluator(**options)(model)}
    assert torch.distributed.get_world_size() == 2
    scores["draws"] = draws(output, count) if distributed_evaluation else None
    (output / f"rank{rank}.json").write_text(json.dumps(scores))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = Path(sys.argv[1]), Path(sys.argv[2])
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=main, args=(rank, port, *places, int(sys.argv[3]))) for rank in range(2)]
    for process in ranks:
        process.start()
    # where one fails, the other would wait for it
    while all(process.exitcode in (None, 0) for process in ranks) and any(process.is_alive() for process in ranks):
        time.sleep(0.1)
    if any(process.exitcode for process in ranks):
        for process in ranks:
            process.terminate()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in ranks))
