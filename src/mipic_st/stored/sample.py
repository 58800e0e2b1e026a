"""A sample of stored vectors: a rotation fitted on it, and how many of its neighbours the codes still find."""

from __future__ import annotations

from typing import Any

import numpy as np

from mipic_st import codes
from mipic_st.transforms.rotation import Rotation

ROWS, _QUERIES, _NEIGHBORS = 10_000, 500, 10


def neighbors_kept(vectors: np.ndarray, rotation: Rotation, dim: int, precision: str) -> dict[str, Any] | None:
    """Recall of the full width's neighbours in a sample: of codes of the first values as they are, and of rotated ones.

    ``vectors``, (N, D), are finite and not zero; None for one row, which has no neighbour.
    """
    if len(vectors) < 2:
        return None
    queries, neighbors = vectors[:_QUERIES], min(_NEIGHBORS, len(vectors) - 1)
    full = _unit(vectors)
    wanted = _nearest(full[: len(queries)] @ full.T, neighbors)
    prefixes = _unit(vectors[:, :dim])
    ranges = codes.Ranges.of(prefixes)
    coded = codes.encode(prefixes, precision, ranges)
    before = codes.scores(prefixes[: len(queries)], coded, precision, ranges)
    coded = rotation.encode(vectors, dim=dim, precision=precision)
    after = rotation.scores(queries, coded, dim=dim, precision=precision)
    found = {"truncated": before, "rotated": after}
    return {"rows": len(vectors), "queries": len(queries), "neighbors": neighbors} | {
        name: float((_nearest(scores, neighbors)[:, :, None] == wanted[:, None, :]).any(axis=1).mean())
        for name, scores in found.items()
    }


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))


def _nearest(scores: np.ndarray, count: int) -> np.ndarray:
    """The best rows for each query, in any order; the queries are the first rows and do not find themselves."""
    scores[np.arange(len(scores)), np.arange(len(scores))] = -np.inf
    return np.argpartition(-scores, count - 1, axis=1)[:, :count]
