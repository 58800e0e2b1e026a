"""One class that rotates, cuts and codes a column of vectors, wherever batches of a table pass by."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mipic_st.codes import PRECISIONS, bytes_per_vector
from mipic_st.stored.arrow import Rows, codes_array, note_of, replaced, rows_of
from mipic_st.transforms.rotation import Rotation
from mipic_st.validation import checked_choice, checked_dims, require

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

Batch = TypeVar("Batch", "pa.Table", "pa.RecordBatch", dict[str, Any])


class RotateVectors:
    """Rotate, truncate and code one column of a batch: of Arrow, of Ray Data, Spark and Lance, of ``datasets.map``.

    Other columns stay as they are. A null stays a null. A row that has no code (another width, a value that is not
    finite, zeros only) becomes a null and is named in the log. Loads neither torch nor transformers, and can be
    pickled.

    Args:
        rotation: The rotation, or its file.
        column: The column of vectors: list, fixed-size list, array or tensor of float16, float32 or float64.
        dim: Values to keep.
        precision: One of ``mipic_st.codes.PRECISIONS``.
        model: Name of the model that made the vectors, for the metadata.

    Raises:
        ValueError: If an argument is out of its range, or the rotation has no ranges for this dim and precision.
        ImportError: If pyarrow is missing.

    Example:
        >>> rotate = RotateVectors("r.safetensors", "embedding", dim=64, precision="int8")  # doctest: +SKIP
        >>> table = rotate(table)                                                           # doctest: +SKIP
        >>> dataset = dataset.with_format("arrow").map(rotate, batched=True)                # doctest: +SKIP
        >>> stored = ray.data.read_parquet("in").map_batches(                               # doctest: +SKIP
        ...     RotateVectors,
        ...     fn_constructor_args=["r.safetensors", "embedding"],
        ...     fn_constructor_kwargs={"dim": 64, "precision": "int8"},
        ...     batch_format="pyarrow",
        ...     compute=ray.data.ActorPoolStrategy(size=4),
        ... )
    """

    def __init__(
        self,
        rotation: Rotation | str | PathLike[str],
        column: str = "embedding",
        *,
        dim: int,
        precision: str = "int8",
        model: str = "",
    ) -> None:
        require("pyarrow", "Vectors in tables and files need pyarrow", "serve")
        self.rotation = rotation if isinstance(rotation, Rotation) else Rotation.load(rotation)
        self.column = column
        self.width = len(self.rotation.matrix)
        (self.dim,) = checked_dims("dim", [dim], self.width)
        self.precision = checked_choice("precision", precision, PRECISIONS)
        # the kind of its codes; a rotation without the ranges for them is refused here
        first = self.rotation.matrix[:, :1].T  # rotated it has its whole length in the first value, at any dim
        self._none = self.rotation.encode(first, dim=dim, precision=precision)[:0]
        ranges = (self.rotation.ranges or {}).get(self.dim)
        parts = {name: getattr(ranges, name).tolist() for name in ("low", "high", "mean", "spread")} if ranges else None
        # what the metadata of tables and files say
        self.note = {
            "column": column,
            "rotation": self.rotation.fingerprint,
            "model": model,
            "width": self.width,
            "dim": self.dim,
            "precision": self.precision,
            "bytes": bytes_per_vector(self.dim, self.precision),
            "ranges": parts,
        }

    def __call__(self, batch: Batch) -> Batch:
        """The batch with codes in place of the vectors.

        Args:
            batch: Table or RecordBatch of Arrow, or a dict of columns, as ``datasets.map(..., batched=True)`` and Ray's
                ``batch_format="numpy"`` give it. ``datasets`` keeps the numbers of a dict in the old column's float
                type where it can; of ``with_format("arrow")`` it takes them as they are.

        Returns:
            The same kind. In a dict, codes are an array, (N, w), or a list with None for each row without a code.

        Raises:
            TypeError: If the batch is something else, or the column holds no floating numbers.
            ValueError: If there is no such column, it was coded before, or no row has the rotation's width.
        """
        if isinstance(batch, Mapping):
            return self._of_columns(batch)
        coded, faults = self.coded(batch)
        if faults:
            named = "; ".join(f"row {row} {fault}" for row, fault in list(faults.items())[:5])
            logger.warning("%d rows of column %r have no code and are null: %s", len(faults), self.column, named)
        return coded

    def coded(self, batch: Any) -> tuple[Any, dict[int, str]]:
        """A Table or RecordBatch with codes, and why rows have none, by row; for callers that name rows themselves."""
        import pyarrow as pa

        if not isinstance(batch, (pa.Table, pa.RecordBatch)):
            raise TypeError(f"batch must be a Table or RecordBatch of Arrow or a dict, got {type(batch).__name__}.")
        self._check(batch.schema.names, note_of(batch.schema))
        vectors = batch.column(self.column)
        done, start = [], 0
        faults: dict[int, str] = {}
        for chunk in vectors.chunks if isinstance(batch, pa.Table) else [vectors]:
            codes, rows = self._codes(rows_of(self.column, chunk, self.width))
            done.append(codes_array(codes, rows.usable))
            faults |= {start + row: fault for row, fault in rows.faults.items()}
            start += len(chunk)
        kind = codes_array(self._none, np.ones(0, bool)).type
        new = pa.chunked_array(done, type=kind) if isinstance(batch, pa.Table) else done[0]
        columns = [new if name == self.column else batch.column(name) for name in batch.schema.names]
        return type(batch).from_arrays(columns, schema=replaced(batch.schema, self.column, kind, self.note)), faults

    def _codes(self, rows: Rows) -> tuple[np.ndarray, Rows]:
        """Codes of the rows that have one, and which these are."""
        if not len(rows.vectors):
            return self._none, rows
        try:
            return self.rotation.encode(rows.vectors, dim=self.dim, precision=self.precision), rows
        except ValueError:
            finite = np.isfinite(rows.vectors).all(axis=1)
            sound = finite & rows.vectors.any(axis=1)
            if sound.all():
                raise
        numbers = np.flatnonzero(rows.usable)
        faults = {int(row): "holds NaN or infinite values" for row in numbers[~finite]}
        faults |= {int(row): "holds zeros only" for row in numbers[finite & ~sound]}
        usable = rows.usable.copy()
        usable[numbers[~sound]] = False
        return self._codes(Rows(rows.vectors[sound], usable, dict(sorted((rows.faults | faults).items()))))

    def _of_columns(self, batch: Any) -> Any:
        import pyarrow as pa

        self._check(list(batch), None)
        given = batch[self.column]
        if isinstance(given, np.ndarray) and given.ndim > 1:
            size = int(np.prod(given.shape[1:]))
            given = pa.FixedSizeListArray.from_arrays(pa.array(given.reshape(-1)), size)
        elif not isinstance(given, (pa.Array, pa.ChunkedArray)):
            given = pa.array(list(given))
        coded = self(pa.table({self.column: given})).column(self.column).combine_chunks()
        codes = coded.values.to_numpy().reshape(len(coded), -1)
        if coded.null_count:
            codes = [None if null else code for null, code in zip(coded.is_null().to_pylist(), codes, strict=True)]
        return {**batch, self.column: codes}

    def _check(self, columns: list[str], note: dict[str, Any] | None) -> None:
        if note and note["column"] == self.column:
            which = "this rotation" if note["rotation"] == self.rotation.fingerprint else "another rotation"
            raise ValueError(
                f"column {self.column!r} was coded by {which} before ({note['dim']} dims, {note['precision']}, "
                f"rotation {note['rotation']}): give the vectors that the model made."
            )
        if columns.count(self.column) != 1:
            raise ValueError(f"there is no one column {self.column!r}; the columns are {columns}.")
