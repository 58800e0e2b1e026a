"""Vectors with something to find, texts, and small helpers for the tests of fitted maps."""

from __future__ import annotations

import numpy as np
from sentence_transformers.sentence_transformer.modules import Dense

from conftest import sentences
from mipic_st.transforms.model_rotation import rotate_model

# few steps, on data where these are enough
QUICK = {"max_steps": 40}
DIMS = [4, 8]
TEXTS = sentences(300, seed=7, shortest=3)
ROTATE = {"max_steps": 40, "held_out": 0.2}


def hidden_signal(count=400, width=32, signal=4, seed=0):
    """Pairs whose common part lies in the last values; the first ones are noise of the same size."""
    random = np.random.default_rng(seed)
    common = random.normal(size=(count, signal))
    return [
        np.concatenate(
            [random.normal(size=(count, width - signal)), common + 0.05 * random.normal(size=(count, signal))], axis=1
        ).astype(np.float32)
        for _ in range(2)
    ]


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def rotate_until_gained(model):
    """A random model need not gain with every split of the texts, and is then left as it was."""
    tries = (rotate_model(model, TEXTS, DIMS, **ROTATE, seed=seed) for seed in range(20))
    return next(rotation for rotation in tries if rotation.gained)


def cosines(model, texts=TEXTS[:40], **options):
    vectors = unit(np.asarray(model.encode(texts, show_progress_bar=False, **options), dtype=np.float64))
    return vectors @ vectors.T


def dense_count(model):
    return sum(isinstance(module, Dense) for module in model.modules())
