"""Vectors in memory up to a limit, in a temporary file above it."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

# Vectors are kept, read and written in blocks of this size: what an evaluation holds besides them stays small.
_BLOCK_BYTES = 2**24


class Vectors:
    """Rows in the order in which they came. The file has no name, so the system frees it however the process ends."""

    def __init__(self, states: int, width: int, limit: int | None) -> None:
        self._states, self._width, self._limit = states, width, limit
        self._row_bytes = 4 * states * width
        self.block_rows = max(1, _BLOCK_BYTES // self._row_bytes)
        self._blocks: list[np.ndarray] = []
        self._file: Any = None
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self._count * self._row_bytes

    @property
    def in_file(self) -> bool:
        """Whether the rows have gone to a file."""
        return self._file is not None

    def append(self, vectors: np.ndarray) -> None:
        """Add (n, S, D)."""
        if self._file is None and self._limit is not None and self.nbytes + vectors.nbytes > self._limit:
            self._move_to_file()
        if self._file is not None:
            self._file.seek(self.nbytes)  # not its end: a write that failed may have left a part of its rows
            write_array(self._file, vectors)
            self._count += len(vectors)
            return
        done = 0
        while done < len(vectors):
            inside = self._count % self.block_rows
            if inside == 0:
                self._blocks.append(np.empty((self.block_rows, self._states, self._width), dtype=np.float32))
            part = vectors[done : done + self.block_rows - inside]
            self._blocks[-1][inside : inside + len(part)] = part
            done += len(part)
            self._count += len(part)

    def _move_to_file(self) -> None:
        file = tempfile.TemporaryFile(prefix="mipic-st-")  # noqa: SIM115 - lives as long as the vectors
        for index in range(len(self._blocks)):
            write_array(file, self._block(index))
        self._file, self._blocks = file, []
        logger.info("the vectors exceed %s bytes and go to a temporary file.", self._limit)

    def _block(self, index: int) -> np.ndarray:
        first = index * self.block_rows
        rows = min(self.block_rows, self._count - first)
        if self._file is None:
            return self._blocks[index][:rows]
        # mapped for as long as it is read: resident memory does not grow with the file
        shape = (rows, self._states, self._width)
        return np.memmap(self._file, dtype=np.float32, mode="r", offset=first * self._row_bytes, shape=shape)

    def gather(self, rows: np.ndarray, state: int, dim: int) -> np.ndarray:
        """(n, dim) of these rows."""
        out = np.empty((len(rows), dim), dtype=np.float32)
        of_row = rows // self.block_rows
        for index in np.unique(of_row):
            inside = np.flatnonzero(of_row == index)
            block = self._block(int(index))
            out[inside] = block[rows[inside] - index * self.block_rows, state, :dim]
        return out

    def close(self) -> None:
        """Forget the rows."""
        if self._file is not None:
            self._file.close()
        self._file, self._blocks, self._count = None, [], 0


def write_array(file: Any, array: np.ndarray) -> None:
    """Write an array where a temporary file stands; what to do if its folder cannot take it is in the error."""
    try:
        file.write(np.ascontiguousarray(array).data)
        file.flush()
    except OSError as error:
        raise OSError(
            error.errno,
            f"vectors above the memory limit go to {tempfile.gettempdir()!r}, which cannot take them "
            f"({error.strerror}); point TMPDIR to a folder with room, or raise memory_limit",
        ) from error
