"""Vectors of any kind as arrays, and their product with an orthogonal matrix to the last bit. NumPy only.

A sum of floats depends on its order, and the order on how many rows are multiplied at once, on threads and on the
processor. So rows and matrix are rounded to whole numbers of so few bits (24 of each, about what a float32 has) that
every product and every sum of them is exact in float64: a row has the same result alone and among a million others.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Rows that are multiplied at once, at least. Fewer are a tenth faster on one thread, and more threads wait for each
# other after every block, which costs a lot beside another job.
_ROWS = 1024
# Bits of the largest value of a row; bits of a row's sum of products, of 53.
_ROW_BITS, _SUM_BITS = 23, 52


def is_tensor(value: Any) -> bool:
    """Whether it is a torch tensor, asked without importing torch."""
    return "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor)


def as_rows(name: str, given: Any) -> np.ndarray:
    """Numbers as an array, without a copy where they are one: whatever has ``__array__``, lists, columns of tables.

    Columns are those of pandas, of Arrow (a list of numbers per row, of one length) and of ``datasets``.
    """
    if is_tensor(given):
        given = given.detach().cpu()
        # NumPy has no bfloat16
        return (given.float() if str(given.dtype) == "torch.bfloat16" else given).numpy()
    if type(given).__module__.partition(".")[0] == "pyarrow":
        return _rows_of_arrow(name, given)
    if not hasattr(given, "__array__"):
        if isinstance(given, (str, bytes, Mapping)) or not hasattr(given, "__iter__"):
            raise TypeError(f"{name} must be an array of vectors, or a list of them, got {type(given).__name__}.")
        given = list(given)
    nested = isinstance(given, list) and given and hasattr(given[0], "__array__") and np.ndim(given[0])
    try:
        found = _stacked(name, given) if nested else np.asarray(given)
    except ValueError:  # rows of several lengths
        found = _stacked(name, given)
    # a column of a data frame has one object per row
    return _stacked(name, list(found)) if found.dtype == object and found.ndim == 1 else found


def as_array(name: str, given: Any) -> np.ndarray:
    """Floating numbers as an array, see :func:`as_rows`."""
    found = as_rows(name, given)
    if not np.issubdtype(found.dtype, np.floating):
        raise TypeError(f"{name} must hold floating numbers, got {found.dtype}; quantised vectors cannot be mapped.")
    return found


def as_matrix(name: str, given: Any, width: int, owner: str) -> np.ndarray:
    """Vectors, (N, width), see :func:`as_array`."""
    found = as_array(name, given)
    if found.ndim != 2:
        raise ValueError(f"{name} must have the shape (N, {width}), got {found.shape}.")
    if found.shape[1] != width:
        raise ValueError(f"{name} have width {found.shape[1]}, {owner} is for {width}.")
    return found


def _stacked(name: str, rows: Sequence[Any]) -> np.ndarray:
    """One array of many, with the first row named that does not fit."""
    arrays = [as_rows(name, row) if is_tensor(row) else np.asarray(row) for row in rows]
    for number, array in enumerate(arrays):
        if array.ndim != 1 or array.dtype == object or array.shape != arrays[0].shape:
            what = f"shape {array.shape}" if array.dtype != object else f"{rows[number]!r:.60}"
            raise ValueError(
                f"{name} must be vectors of one width: row {number} has {what}, row 0 the shape {arrays[0].shape}; "
                "leave such rows out."
            )
    return np.stack(arrays)


def _rows_of_arrow(name: str, column: Any) -> np.ndarray:
    """(N, D) of an Arrow array or chunked array; one chunk without nulls is not copied."""
    types = sys.modules["pyarrow"].types
    if not hasattr(column, "type"):
        raise TypeError(f"{name} must be one column of vectors, got a {type(column).__name__}: give table[column].")
    array = getattr(column, "storage", column)  # of an extension type
    fixed = types.is_fixed_size_list(array.type)
    if not (fixed or types.is_list(array.type) or types.is_large_list(array.type)):
        raise TypeError(f"{name} must be a column with a list of numbers per row, got {array.type}.")
    if array.null_count:
        row = int(np.flatnonzero(np.asarray(array.is_null()))[0])
        raise ValueError(f"{name} has {array.null_count} rows without a vector, the first is row {row}: drop them.")
    if hasattr(array, "chunks"):
        chunks = [_rows_of_arrow(name, chunk) for chunk in array.chunks if len(chunk)]
        return np.concatenate(chunks) if len(chunks) > 1 else chunks[0] if chunks else _no_rows(array.type)
    if not len(array):
        return _no_rows(array.type)
    values = array.flatten()
    lengths = np.full(len(array), array.type.list_size) if fixed else array.value_lengths().to_numpy()
    if len(other := np.flatnonzero(lengths != lengths[0])):
        raise ValueError(
            f"{name} must be vectors of one width: row {other[0]} has {lengths[other[0]]} values, row 0 {lengths[0]}; "
            "leave such rows out."
        )
    if values.null_count:
        place = int(np.flatnonzero(np.asarray(values.is_null()))[0])
        raise ValueError(f"{name} has a vector with a missing value in row {place // lengths[0]}: leave it out.")
    return values.to_numpy(zero_copy_only=False).reshape(len(array), lengths[0])


def _no_rows(kind: Any) -> np.ndarray:
    """(0, D) of an Arrow list type; the width of lists is not known."""
    return np.empty((0, getattr(kind, "list_size", 0)), dtype=kind.value_type.to_pandas_dtype())


def of_usual_length(vectors: np.ndarray) -> np.ndarray:
    """Rows in float32, those whose squares would overflow or vanish there times a power of two: the same directions."""
    with np.errstate(invalid="ignore"):  # what is not finite stays so
        largest = np.maximum(vectors.max(axis=1, initial=0), -vectors.min(axis=1, initial=0))[:, None]
    odd = ((largest > 1e10) | (largest < 1e-10))[:, 0] & np.isfinite(largest[:, 0])
    if odd.any():
        vectors = vectors.copy()
        vectors[odd] = np.ldexp(vectors[odd], -np.frexp(largest[odd])[1])
    return np.ascontiguousarray(vectors, dtype=np.float32)


def off_orthogonal(matrix: np.ndarray) -> float:
    """How far a matrix is from orthogonal: the largest value of R^T R - I."""
    matrix = matrix.astype(np.float64)
    return float(np.abs(matrix.T @ matrix - np.eye(len(matrix))).max())


class WholeMatrix(NamedTuple):
    """An orthogonal matrix as whole numbers, (D, D), float64, to be multiplied by 2^-bits."""

    values: np.ndarray
    bits: int

    @classmethod
    def of(cls, matrix: np.ndarray) -> WholeMatrix:
        """Round it. Columns have length 1, so no sum of products is larger than a row, at most sqrt(D) times 2^23."""
        bits = _SUM_BITS - _ROW_BITS - math.ceil(math.log2(len(matrix)) / 2)
        return cls(np.rint(np.ldexp(matrix.astype(np.float64), bits)), bits)


class Mapped(NamedTuple):
    """Some rows times the matrix."""

    rows: slice
    values: np.ndarray  # (n, d), float64, exact; to be multiplied by the scales
    scales: np.ndarray  # (n, 1), powers of two
    lengths: np.ndarray  # of the values, (n, 1); not finite where a value is not

    def units(self) -> np.ndarray:
        """Scaled to unit length, float32; zeros stay zero."""
        with np.errstate(invalid="ignore"):
            return (self.values / np.where(self.lengths == 0, 1, self.lengths)).astype(np.float32)


def mapped(vectors: np.ndarray, matrix: WholeMatrix, dim: int) -> Iterator[Mapped]:
    """Rows of any length, (N, D), times the first columns of a matrix, in blocks."""
    size = max(_ROWS, dim)
    whole = np.empty((min(size, len(vectors)), len(matrix.values)))
    for start in range(0, len(vectors), size):
        block = vectors[start : start + size]
        rows, part = slice(start, start + len(block)), whole[: len(block)]
        with np.errstate(all="ignore"):
            largest = np.maximum(block.max(axis=1), -block.min(axis=1)).astype(np.float64)
            exponents = np.frexp(np.where(np.isfinite(largest), largest, 1))[1][:, None]
            # below 2^-1000 no power of two brings a value near 1
            exponents = np.maximum(exponents, -1000)
            np.rint(np.multiply(block, np.ldexp(1.0, _ROW_BITS - exponents), out=part), out=part)
            values = part @ matrix.values[:, :dim]
            lengths = np.sqrt(np.einsum("ij,ij->i", values, values))[:, None]
            scales = np.ldexp(1.0, exponents - _ROW_BITS - matrix.bits)
        yield Mapped(rows, values, scales, lengths)
