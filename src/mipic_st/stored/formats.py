"""Files of vectors, read in batches and written in pieces: Parquet, .npy, .safetensors; Lance is read.

A new format is one class here and a line in :data:`FORMATS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mipic_st.stored.arrow import KEY
from mipic_st.validation import require

if TYPE_CHECKING:
    import pyarrow as pa

# Rows of a batch; rows of a written piece, about; rows and bytes that are written at once, about.
BATCH, PIECE = 4096, 2**18
_GROUP_ROWS, _GROUP_BYTES = 2**16, 2**26


class Writer(ABC):
    """Takes coded batches one after the other."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column = path, column
        self.pending: list[pa.RecordBatch] = []

    def write(self, batch: pa.RecordBatch) -> None:
        """One batch; the first one, perhaps without rows, says what the columns are."""
        self.pending.append(batch)

    @abstractmethod
    def close(self) -> None:
        """The end of the file."""


class Format(ABC):
    """One file of vectors, or one data set."""

    suffix: ClassVar[str]  # of what is read
    written: ClassVar[str]  # of what is written
    writer: ClassVar[type[Writer]]

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column = path, column

    @abstractmethod
    def borders(self) -> list[int]:
        """Rows at which the file can be cut, with 0 and the number of rows."""

    @abstractmethod
    def batches(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """The rows between two borders, with the metadata of the file in the schema; one batch at least."""

    def state(self) -> list[int]:
        """What changes with the content: the bytes of a file, and when it was written."""
        return [self.path.stat().st_size, self.path.stat().st_mtime_ns]


def _pieces(rows: int) -> list[int]:
    return [*range(0, rows, PIECE), rows] if rows else [0, 0]


# --- Parquet ----------------------------------------------------------------------------------------------------------


class _ParquetWriter(Writer):
    """Row groups of some ten thousand rows."""

    file: Any = None

    def write(self, batch: pa.RecordBatch) -> None:
        """Write a row group, if the batches are enough for one."""
        super().write(batch)
        rows = sum(part.num_rows for part in self.pending)
        if rows >= _GROUP_ROWS or sum(part.nbytes for part in self.pending) >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.pending:
            table, self.pending = pa.Table.from_batches(self.pending), []
            self.file = self.file or pq.ParquetWriter(self.path, table.schema)
            self.file.write_table(table)

    def close(self) -> None:
        """Write the rest."""
        self._flush()
        self.file.close()


class Parquet(Format):
    """Row groups are not cut. They are read page by page, so that a large one needs no memory."""

    suffix = written = ".parquet"
    writer = _ParquetWriter

    def _open(self) -> Any:
        import pyarrow.parquet as pq

        return pq.ParquetFile(self.path, buffer_size=2**20, pre_buffer=False)

    def borders(self) -> list[int]:
        """Rows at which it can be cut."""
        with self._open() as file:
            borders = [0]
            rows = 0
            for group in range(file.num_row_groups):
                rows += file.metadata.row_group(group).num_rows
                if rows - borders[-1] >= PIECE:
                    borders.append(rows)
        return borders if borders[-1] == rows and rows else [*borders, rows]

    def batches(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """The rows between two borders."""
        import pyarrow as pa

        with self._open() as file:
            counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            firsts = np.cumsum([0, *counts])[:-1]
            groups = [group for group, first in enumerate(firsts) if start <= first < stop]
            if not groups:
                yield pa.RecordBatch.from_pylist([], schema=file.schema_arrow)
                return
            yield from file.iter_batches(BATCH, row_groups=groups, use_threads=False)


# --- arrays -----------------------------------------------------------------------------------------------------------


class _NumpyWriter(Writer):
    """One array, (N, w); a row without a code is zeros."""

    def array(self) -> np.ndarray:
        """All batches."""
        columns = [batch.column(self.column) for batch in self.pending]
        return np.concatenate([column.values.to_numpy().reshape(-1, column.type.list_size) for column in columns])

    def close(self) -> None:
        """Write all."""
        np.save(self.path, self.array())


class Numpy(Format):
    """An array, (N, D); it is not mapped into memory, for that would count as the process's own."""

    suffix = written = ".npy"
    writer = _NumpyWriter

    def _head(self) -> Any:
        array = np.load(self.path, mmap_mode="r")
        if array.ndim != 2:
            raise ValueError(f"must hold an array (N, D), got shape {array.shape}.")
        return array

    def borders(self) -> list[int]:
        """Rows at which it can be cut."""
        return _pieces(len(self._head()))

    def batches(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """The rows between two borders."""
        head = self._head()
        width, offset, kind, by_rows = head.shape[1], head.offset, head.dtype, head.flags.c_contiguous
        del head
        for first in range(start, max(stop, start + 1), BATCH):
            last = min(first + BATCH, stop)
            if by_rows:
                flat = np.fromfile(
                    self.path, kind, width * (last - first), offset=offset + first * width * kind.itemsize
                )
            else:
                flat = self._head()[first:last].ravel()
            yield _batch(self.column, flat.astype(kind.newbyteorder("="), copy=False), width)


class _SafetensorsWriter(_NumpyWriter):
    """The same as a tensor of the column's name."""

    def close(self) -> None:
        """Write all, with the note of how it was coded."""
        from safetensors.numpy import save_file

        note = {KEY.decode(): self.pending[0].schema.metadata[KEY].decode()}
        save_file({self.column: self.array()}, self.path, metadata=note)


class Safetensors(Format):
    """A tensor, (N, D), of the column's name."""

    suffix = written = ".safetensors"
    writer = _SafetensorsWriter

    def _open(self) -> Any:
        from safetensors import safe_open

        return safe_open(self.path, framework="numpy")

    def borders(self) -> list[int]:
        """Rows at which it can be cut."""
        with self._open() as file:
            if self.column not in (names := list(file.keys())):
                raise ValueError(f"there is no tensor {self.column!r}; the tensors are {names}.")
            shape, kind = file.get_slice(self.column).get_shape(), file.get_slice(self.column).get_dtype()
        if len(shape) != 2:
            raise ValueError(f"tensor {self.column!r} must have the shape (N, D), got {shape}.")
        if kind == "BF16":
            raise ValueError(f"tensor {self.column!r} is of bfloat16, which NumPy does not have: save it in float32.")
        return _pieces(shape[0])

    def batches(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """The rows between two borders."""
        for first in range(start, max(stop, start + 1), BATCH):
            # opened again each time: what was read stays mapped as long as the file is open
            with self._open() as file:
                # a slice of a tensor without rows is out of its bounds
                rows = (
                    file.get_slice(self.column)[first : min(first + BATCH, stop)]
                    if stop
                    else file.get_tensor(self.column)
                )
                yield _batch(self.column, rows.reshape(-1), rows.shape[1], file.metadata())


def _batch(column: str, flat: np.ndarray, width: int, metadata: Any = None) -> pa.RecordBatch:
    import pyarrow as pa

    rows = pa.FixedSizeListArray.from_arrays(pa.array(flat), width)
    return pa.RecordBatch.from_arrays([rows], schema=pa.schema({column: rows.type}, metadata=metadata))


# --- Lance ------------------------------------------------------------------------------------------------------------


class Lance(Format):
    """A data set; the codes are written as Parquet."""

    suffix, written = ".lance", ".parquet"
    writer = _ParquetWriter

    def _open(self) -> Any:
        return require("lance", "Lance data sets need pylance", "serve").dataset(str(self.path))

    def borders(self) -> list[int]:
        """Rows at which it can be cut."""
        return _pieces(self._open().count_rows())

    def batches(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """The rows between two borders."""
        import pyarrow as pa

        data = self._open()
        if start == stop:
            yield pa.RecordBatch.from_pylist([], schema=data.schema)
        else:
            yield from data.to_batches(offset=start, limit=stop - start, batch_size=BATCH, scan_in_order=True)

    def state(self) -> list[int]:
        """The version of the data set."""
        return [self._open().version]


FORMATS: dict[str, type[Format]] = {format.suffix: format for format in (Parquet, Numpy, Safetensors, Lance)}
"""The class of each ending."""
