"""A rotation in front of faiss's own codes: the parts of :meth:`mipic_st.transforms.rotation.Rotation.faiss_index`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from mipic_st.transforms.arrays import of_usual_length
from mipic_st.validation import require


def _faiss() -> Any:
    return require("faiss", "indexes need faiss", "serve")


def linear_transform(columns: np.ndarray) -> Any:
    """A matrix, (D, d), of orthonormal columns as faiss's own transform of rows."""
    faiss = _faiss()
    transform = faiss.LinearTransform(*columns.shape, False)
    faiss.copy_array_to_vector(np.ascontiguousarray(columns.T).ravel(), transform.A)
    transform.set_is_orthonormal()
    transform.is_trained = True
    return transform


def balanced(columns: np.ndarray, factory: str) -> np.ndarray:
    """The columns in an order that gives each part of a product quantizer an equal share of the leading ones.

    All parts have the same number of bits, so neighbouring columns in one part would spend many of them on little.
    """
    found = re.search(r"PQ(\d+)", factory)
    dim, parts = columns.shape[1], int(found[1]) if found else 0
    if not parts or dim % parts:
        return columns
    return columns[:, np.arange(dim).reshape(-1, parts).T.ravel()]


def index_of(columns: np.ndarray, factory: str) -> Any:
    """An empty index by inner product: orthonormal columns, (D, d), unit length, and what faiss's factory makes."""
    faiss = _faiss()
    if not isinstance(factory, str):
        raise TypeError(f"factory must be a string for faiss.index_factory, e.g. 'SQ8', got {factory!r}.")
    transform = linear_transform(balanced(columns, factory))
    if "RaBitQ" in factory and not hasattr(faiss, "IndexRaBitQ"):
        raise ValueError(f"factory {factory!r} needs faiss 1.11 or later, this is {faiss.__version__}: update it.")
    try:
        coded = faiss.index_factory(transform.d_out, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(
            f"factory {factory!r} is none that faiss {faiss.__version__} makes of {transform.d_out} dims: {error}"
        ) from error
    index = faiss.IndexPreTransform(coded)
    index.prepend_transform(faiss.NormalizationTransform(transform.d_out, 2.0))
    index.prepend_transform(transform)
    return index


def filled(index: Any, vectors: np.ndarray, factory: str) -> Any:
    """The index trained on vectors, which it then holds."""
    vectors = of_usual_length(vectors)
    try:
        index.train(vectors)
        index.add(vectors)
    except RuntimeError as error:
        raise ValueError(f"factory {factory!r} cannot be trained on {len(vectors)} vectors: {error}") from error
    return index
