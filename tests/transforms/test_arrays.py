"""Vectors come in many forms, and a row's product with the matrix depends on nothing but the row."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from mipic_st.transforms import arrays
from mipic_st.transforms.arrays import WholeMatrix, as_array, mapped


def orthogonal(width, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0].astype(np.float32)


def rows_of(count, width, seed=1):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def products(vectors, matrix, dim):
    return np.concatenate([part.values * part.scales for part in mapped(vectors, WholeMatrix.of(matrix), dim)])


@pytest.mark.parametrize("width", [2, 3, 100, 384, 1100])
def test_products_are_exact(width):
    """Those of the rounded rows and columns, summed as fractions; and near those of float64."""
    matrix, vectors = orthogonal(width), rows_of(3, width) * np.float32(17.3)
    vectors[1] *= np.float32(1e-20)
    got = products(vectors, matrix, 2)
    bits = WholeMatrix.of(matrix).bits
    for row, vector in enumerate(vectors):
        exponent = np.frexp(np.abs(vector).max())[1]
        left = [round(Fraction(float(value)) * Fraction(2) ** int(23 - exponent)) for value in vector]
        for column in range(2):
            right = [round(Fraction(float(value)) * 2**bits) for value in matrix[:, column]]
            exact = sum(x * y for x, y in zip(left, right, strict=True)) * Fraction(2) ** int(exponent - 23 - bits)
            assert Fraction(float(got[row, column])) == exact
    wanted = vectors.astype(np.float64) @ matrix.astype(np.float64)[:, :2]
    assert (np.abs(got - wanted) <= 1e-6 * np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)).all()


def test_the_largest_sums_are_exact():
    """Rows along a column, with all values near the largest: the sum has all the bits that it can have."""
    for width in (64, 1024):
        column = np.full((width, 1), width**-0.5, dtype=np.float32)
        whole = WholeMatrix.of(np.pad(column, ((0, 0), (0, width - 1))))
        (part,) = mapped(np.full((1, width), np.float32(1) - np.float32(2**-24)), whole, 1)
        assert 2**51 < abs(part.values[0, 0]) <= 2**53


DIGEST = """
import hashlib, sys
import numpy as np
from mipic_st.transforms.rotation import Rotation
draw = np.random.default_rng(0)
digest = hashlib.sha256()
for width, dims in ((100, (1, 7, 64)), (384, (8, 64, 384))):
    rotation = Rotation(np.linalg.qr(draw.normal(size=(width, width)))[0].round(4), (8,))
    vectors = draw.normal(size=(3000, width)).astype(np.float32).round(3)
    for dim in dims:
        digest.update(rotation.calibrate(vectors[:50], [dim]).encode(vectors, dim).tobytes())
print(digest.hexdigest())
"""


def test_threads_and_processors_change_nothing():
    """Codes have the same bytes with one thread and two, and with the kernels of other processors."""
    source = Path(arrays.__file__).parents[2]
    found = set()
    for more in ({}, {"OPENBLAS_NUM_THREADS": "2"}, {"OPENBLAS_CORETYPE": "Nehalem"}):
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(source)} | more
        done = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True
        )
        found.add(done.stdout)
    assert len(found) == 1


def forms():
    """One small matrix in all forms that are taken."""
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    values = np.array([[1.5, 2.5, -3.5], [4.5, 0.5, 6.5]], dtype=np.float32)
    fixed = arrow.FixedSizeListArray.from_arrays(arrow.array(values.ravel()), 3)
    wide = arrow.FixedSizeListArray.from_arrays(arrow.array(np.tile(values, (3, 1)).ravel()), 3)
    listed = arrow.array(values.tolist(), type=arrow.list_(arrow.float32()))
    return values, {
        "list": values.tolist(),
        "tuple of arrays": tuple(values),
        "list of tensors": [torch.tensor(row) for row in values],
        "tensor": torch.tensor(values, requires_grad=True),
        "half": torch.tensor(values, dtype=torch.bfloat16),
        "frame": pandas.DataFrame(values),
        "column": pandas.Series(list(values)),
        "column of lists": pandas.Series(values.tolist()),
        "arrow column": pandas.Series(fixed.to_pylist(), dtype=pandas.ArrowDtype(arrow.list_(arrow.float32()))),
        "fixed": fixed,
        "slice": wide[2:4],
        "chunks": arrow.chunked_array([fixed[:1], fixed[1:]]),
        "lists": listed,
        "large lists": listed.cast(arrow.large_list(arrow.float64())),
        "float16": arrow.array(list(values.astype(np.float16)), type=arrow.list_(arrow.float16(), 3)),
        "tensor type": arrow.ExtensionArray.from_storage(arrow.fixed_shape_tensor(arrow.float32(), (3,)), fixed),
        "table column": arrow.table({"v": fixed})["v"],
        "iterator": iter(values),
    }


def test_all_forms_are_the_same_vectors():
    """Lists, tensors, columns of pandas and Arrow."""
    values, given = forms()
    for name, form in given.items():
        found = as_array("vectors", form)
        assert found.shape == (2, 3), name
        assert np.array_equal(found, values), name
        assert np.issubdtype(found.dtype, np.floating), name


def test_columns_of_datasets():
    """A column, and one of fixed length."""
    datasets = pytest.importorskip("datasets")
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    data = datasets.Dataset.from_dict({"v": values.tolist()})
    assert np.array_equal(as_array("vectors", data["v"]), values)
    assert np.array_equal(as_array("vectors", data.with_format("numpy")["v"]), values)
    assert np.array_equal(as_array("vectors", data.data["v"]), values)


def test_arrow_is_not_copied():
    """One chunk of floats is looked at where it lies."""
    arrow = pytest.importorskip("pyarrow")
    values = np.arange(12, dtype=np.float32)
    array = arrow.FixedSizeListArray.from_arrays(arrow.array(values), 3)
    address = array.flatten().buffers()[1].address
    assert as_array("vectors", array).__array_interface__["data"][0] == address
    assert as_array("vectors", array[1:]).__array_interface__["data"][0] == address + 12


def test_no_rows_in_arrow():
    """They keep their width and kind."""
    arrow = pytest.importorskip("pyarrow")
    kind = arrow.list_(arrow.float16(), 5)
    for empty in (arrow.array([], type=kind), arrow.chunked_array([], type=kind)):
        found = as_array("vectors", empty)
        assert (found.shape, found.dtype) == ((0, 5), np.float16)


def bad_forms():
    arrow, pandas = pytest.importorskip("pyarrow"), pytest.importorskip("pandas")
    three = arrow.list_(arrow.float32(), 3)
    return [
        ("some text", TypeError, "vectors must be an array of vectors, or a list of them, got str"),
        ({"v": [1.0]}, TypeError, "got dict"),
        (None, TypeError, "got NoneType"),
        ([["a", "b"]], TypeError, "vectors must hold floating numbers, got <U1"),
        ([[1, 2]], TypeError, "vectors must hold floating numbers, got int64"),
        ([[1.0, 2.0], [1.0, 2.0], [1.0]], ValueError, r"row 2 has shape \(1,\), row 0 the shape \(2,\)"),
        (pandas.Series([np.ones(2), None]), ValueError, "row 1 has None, row 0"),
        (arrow.table({"v": [1.0]}), TypeError, "one column of vectors, got a Table: give table"),
        (arrow.array([1.0, 2.0]), TypeError, "a list of numbers per row, got double"),
        (arrow.array(["a"]), TypeError, "a list of numbers per row, got string"),
        (arrow.array([[1, 2]]), TypeError, "must hold floating numbers, got int64"),
        (arrow.array([[1.0] * 3, None], type=three), ValueError, "1 rows without a vector, the first is row 1"),
        (
            arrow.chunked_array([[[1.0] * 3], [[1.0] * 3, None]], type=three),
            ValueError,
            "1 rows without a vector, the first is row 2",
        ),
        (arrow.array([[1.0, 2.0], [1.0, None]]), ValueError, "a missing value in row 1"),
        (arrow.array([[1.0, 2.0], [1.0]]), ValueError, "row 1 has 1 values, row 0 2"),
    ]


def test_what_are_no_vectors_is_named():
    """The argument, the row and what it has."""
    for given, error, message in bad_forms():
        with pytest.raises(error, match=message):
            as_array("vectors", given)
