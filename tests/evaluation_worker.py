"""What test_shared_encoding.py runs: python evaluation_worker.py MODEL_FOLDER OUTPUT_FOLDER.

Two processes as torchrun starts them, forked from one that has imported everything: imports take most of the time.
"""

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    SequentialEvaluator,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from conftest import sentences
from mipic_st import MatryoshkaEvaluator
from training_fixtures import make_trainer

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


def main(rank, port, model_folder, output):
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
    (output / f"rank{rank}.json").write_text(json.dumps(scores))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=main, args=(rank, port, Path(sys.argv[1]), Path(sys.argv[2]))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode) for process in ranks))
