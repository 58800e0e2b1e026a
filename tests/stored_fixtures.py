"""A random rotation with ranges, vectors, and files of them; files are cut into small pieces and batches."""

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="needs the serve extra")

from mipic_st.transforms.rotation import Rotation  # noqa: E402

WIDTH = 24
reads_nulls = pytest.mark.skipif(
    int(pa.__version__.partition(".")[0]) < 26,
    reason="pyarrow before 26 reads no null vectors in Parquet",
)


def random_vectors(count, width=WIDTH, seed=0):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def random_rotation(seed=0):
    square = np.random.default_rng(seed).normal(size=(WIDTH, WIDTH))
    rotation = Rotation(np.linalg.qr(square)[0].astype(np.float32), (8, 16))
    return rotation.calibrate(random_vectors(300, seed=9), [8, 16])


def fixed(vectors):
    """A fixed-size list column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def table_of(vectors):
    """Vectors between two other columns."""
    count = len(vectors)
    names = pa.array([f"text {row}" for row in range(count)])
    return pa.table({"id": np.arange(count), "embedding": fixed(vectors), "text": names})
