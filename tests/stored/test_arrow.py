"""Vectors out of every kind of Arrow column, compared with Python lists of them; nulls and faults by row."""

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="needs the serve extra")

from mipic_st.stored.arrow import rows_of, width_of  # noqa: E402
from stored_fixtures import WIDTH, fixed, random_vectors  # noqa: E402

VECTORS = random_vectors(7)


def nested(vectors, outer, inner):
    """Lists of lists, WIDTH values in all."""
    return pa.array([row.reshape(4, 6).tolist() for row in vectors], type=outer(inner(pa.float32())))


def tensors(vectors):
    kind = pa.fixed_shape_tensor(pa.float32(), [4, 6])
    return pa.ExtensionArray.from_storage(kind, fixed(vectors))


def arrays_2d(vectors):
    datasets = pytest.importorskip("datasets", reason="needs the eval extra")
    kind = datasets.features.features.Array2DExtensionType((4, 6), "float32")
    return pa.ExtensionArray.from_storage(kind, nested(vectors, pa.list_, pa.list_))


KINDS = {
    "fixed float16": lambda v: fixed(v.astype(np.float16)),
    "fixed float32": fixed,
    "fixed float64": lambda v: fixed(v.astype(np.float64)),
    "list float16": lambda v: pa.array(list(v.astype(np.float16)), type=pa.list_(pa.float16())),
    "list float32": lambda v: pa.array(v.tolist(), type=pa.list_(pa.float32())),
    "list float64": lambda v: pa.array(v.tolist(), type=pa.list_(pa.float64())),
    "large list": lambda v: pa.array(v.tolist(), type=pa.large_list(pa.float32())),
    "list of lists": lambda v: nested(v, pa.list_, pa.list_),
    "fixed list of fixed lists": lambda v: nested(v, lambda k: pa.list_(k, 4), lambda k: pa.list_(k, 6)),
    "list of fixed lists": lambda v: nested(v, pa.list_, lambda k: pa.list_(k, 6)),
    "tensor": tensors,
    "Array2D of datasets": arrays_2d,
}


def in_python(array):
    """Usable rows by way of Python's lists."""
    rows = [row for row in getattr(array, "storage", array).to_pylist() if row is not None]
    return np.array(rows, dtype=np.float64).reshape(len(rows), -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "stop"), [(0, 7), (2, 5), (6, 7), (3, 3)])
def test_rows_are_those_of_the_lists(kind, start, stop):
    """For whole arrays, slices and no rows at all, without loss of precision and of the same floating type."""
    array = KINDS[kind](VECTORS).slice(start, stop - start)
    rows = rows_of("embedding", array, WIDTH)
    assert rows.vectors.shape == (stop - start, WIDTH)
    np.testing.assert_array_equal(rows.vectors, in_python(array) if stop > start else rows.vectors)
    assert str(rows.vectors.dtype) == (kind.split()[-1] if "float" in kind else "float32")
    assert rows.usable.tolist() == [True] * (stop - start)
    assert rows.faults == {}
    assert width_of(array) == (WIDTH if stop > start else 0)


@pytest.mark.parametrize("kind", ["fixed float16", "fixed float32", "list float64", "tensor", "list of lists"])
def test_arrays_without_nulls_are_not_copied(kind):
    """The rows are Arrow's own memory."""
    array = KINDS[kind](VECTORS)
    leaf = getattr(array, "storage", array)
    while hasattr(leaf, "values"):
        leaf = leaf.values
    assert np.shares_memory(rows_of("embedding", array.slice(1, 4), WIDTH).vectors, leaf.to_numpy())


@pytest.mark.parametrize("size", [-1, WIDTH])
def test_nulls_are_left_out_and_are_no_faults(size):
    """Of a list and of a fixed-size list, in a slice too."""
    given = [None, *VECTORS[:3].tolist(), None, VECTORS[3].tolist()]
    array = pa.array(given, type=pa.list_(pa.float32(), size)).slice(1)
    rows = rows_of("embedding", array, WIDTH)
    assert rows.usable.tolist() == [True, True, True, False, True]
    np.testing.assert_array_equal(rows.vectors, VECTORS[:4])
    assert rows.faults == {}


def test_rows_of_another_width_are_named():
    """The others stay usable; the width that most have is known."""
    given = [VECTORS[0].tolist(), [1.0, 2.0], None, [], VECTORS[1].tolist()]
    array = pa.array(given, type=pa.list_(pa.float32()))
    rows = rows_of("embedding", array, WIDTH)
    assert rows.faults == {1: "has 2 values", 3: "has 0 values"}
    assert rows.usable.tolist() == [True, False, False, False, True]
    np.testing.assert_array_equal(rows.vectors, VECTORS[:2])
    assert width_of(array) == WIDTH


@pytest.mark.parametrize("size", [-1, 3])
def test_a_column_of_another_width_is_refused(size):
    """No row fits: the wrong model, not a wrong row."""
    array = pa.array([None, [1.0, 2.0, 3.0]], type=pa.list_(pa.float32(), size))
    with pytest.raises(ValueError, match="column 'v' has vectors of width 3, this rotation is for 24"):
        rows_of("v", array, WIDTH)


def test_a_missing_value_is_not_a_number():
    """A null within a vector."""
    given = VECTORS[:2].tolist()
    given[1][3] = None
    rows = rows_of("embedding", pa.array(given, type=pa.list_(pa.float32())), WIDTH)
    assert np.argwhere(np.isnan(rows.vectors)).tolist() == [[1, 3]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (pa.array(["a"]), "got string\\.$"),
        (pa.array([1.0]), "got double\\.$"),
        (pa.array([["a"]]), "got list<.*string>\\.$"),
        (pa.array([[1, 2]], type=pa.list_(pa.int8(), 2)), "are these codes already\\?"),
    ],
)
def test_other_columns_are_refused(array, message):
    """With what is taken and what was found."""
    with pytest.raises(TypeError, match=f"column 'v' must hold a list of float16, float32 or float64 .*{message}"):
        rows_of("v", array, WIDTH)
