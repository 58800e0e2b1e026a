"""Resident memory of an evaluation over a large corpus; run by test_store.py, or by hand: python tests/large_corpus.py.

The encoder is random: a text's words index a table, so that encoding costs little and memory is what is measured.
"""

import argparse
import json
import resource
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.modules import Module

from mipic_st import MatryoshkaEvaluator


class RandomEncoder(Module):
    """A unit vector per text, the same one each time: two rows of a fixed random table, added."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.register_buffer("table", torch.randn(4093, width, generator=torch.Generator().manual_seed(0)))

    def preprocess(self, inputs, prompt=None, **kwargs):
        return {"codes": torch.tensor([zlib.crc32(text.encode()) for text in inputs])}

    def forward(self, features, **kwargs):
        codes = features["codes"]
        vectors = self.table[codes % 4093] + self.table[codes // 4093 % 4093].roll(1, dims=1)
        features["sentence_embedding"] = torch.nn.functional.normalize(vectors, dim=1)
        return features

    def get_embedding_dimension(self):
        return self.width

    def save(self, output_path, *args, **kwargs):
        raise NotImplementedError


def resident():
    """Megabytes now, and at most so far."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    now = pages * resource.getpagesize() / 2**20
    return now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=int, default=2_000_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--memory-limit", type=int, default=2**29)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = SentenceTransformer(modules=[RandomEncoder(arguments.width)], device="cpu", prompts={})
    figures = {"texts": arguments.texts, "imports_mb": resident()[0]}
    corpus = {f"d{i}": f"text {i} of the corpus" for i in range(arguments.texts)}
    queries = {f"q{i}": f"query {i}" for i in range(50)}
    relevant = {f"q{i}": {f"d{i * 7}"} for i in range(50)}
    evaluator = InformationRetrievalEvaluator(queries, corpus, relevant, batch_size=4096, name="large", write_csv=False)
    del corpus
    figures["texts_mb"] = resident()[0] - figures["imports_mb"]
    ours = MatryoshkaEvaluator(evaluator, [arguments.width // 6, arguments.width], memory_limit=arguments.memory_limit)
    start = time.perf_counter()
    scores = ours(model)
    figures["seconds"] = time.perf_counter() - start
    figures["vectors_mb"] = ours.peak_store_bytes / 2**20
    figures["peak_mb"] = resident()[1]
    assert np.isfinite(list(scores.values())).all()
    json.dump(figures, sys.stdout)


if __name__ == "__main__":
    main()
