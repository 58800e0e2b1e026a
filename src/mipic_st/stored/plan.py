"""What is read and where it goes: the files of a place, cut into pieces, and rows of them chosen at random."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mipic_st.stored.formats import FORMATS, Format
from mipic_st.validation import require

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Piece:
    """Some rows of one file, which become one file."""

    data: Format
    source: str  # the file's name, in the given folder
    start: int
    stop: int
    state: list[int]  # changes when the source does
    target: str  # name of what is written, in the new folder

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def key(self) -> list[Any]:
        """What has to be the same for a written piece to be kept."""
        return [self.source, self.start, self.stop, self.state]

    def chosen(self, rows: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
        """Batches, and those of the chosen rows of the piece, ascending, that are in each, counted from its start."""
        first = 0
        for batch in self.data.batches(self.start, self.stop):
            ends = np.searchsorted(rows, [first, first + batch.num_rows])
            yield batch, rows[slice(*ends)] - first
            first += batch.num_rows


@dataclass
class Plan:
    """All pieces, and the files that cannot be read, with what is wrong."""

    pieces: list[Piece] = field(default_factory=list)
    failed: dict[str, Exception] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Of all pieces."""
        return sum(map(len, self.pieces))

    def choose(self, count: int, seed: int) -> list[np.ndarray]:
        """Rows chosen at random from all, each as likely: for each piece its own, ascending."""
        rows = np.sort(np.random.default_rng(seed).choice(self.rows, min(count, self.rows), replace=False))
        starts = np.cumsum([0, *map(len, self.pieces)])
        parts = np.split(rows, np.searchsorted(rows, starts[1:-1]))
        return [part - start for part, start in zip(parts, starts, strict=False)]


def files_of(place: str | PathLike[str]) -> list[tuple[str, Path]]:
    """Names and places of the files of vectors: of one file, of a folder and all below it, of a Lance data set."""
    place = Path(place)
    if not place.exists():
        raise FileNotFoundError(f"There is no file or folder {place}.")
    if _is_source(place):
        return [(place.name, place)]
    if place.is_file():
        raise ValueError(f"{place} must end with {', '.join(FORMATS)}.")
    found = {
        path.relative_to(place): path
        for path in sorted(place.rglob("*"))
        if _is_source(path) and not any(part[0] in "._" for part in path.relative_to(place).parts)
    }
    # what lies in a data set belongs to it
    found = {name: path for name, path in found.items() if not any(parent in found for parent in name.parents)}
    if not found:
        raise ValueError(f"{place} has no files of {', '.join(FORMATS)}; names that begin with . or _ do not count.")
    if len(kinds := {name.suffix for name in found}) > 1:
        raise ValueError(f"{place} has files of {', '.join(sorted(kinds))}: name one of them, or a folder of one kind.")
    return [(name.as_posix(), path) for name, path in found.items()]


def _is_source(path: Path) -> bool:
    """A file of a known ending, or a Lance data set; other folders are called ``name.parquet`` by Spark."""
    return path.suffix in FORMATS and (path.suffix == ".lance") == path.is_dir()


def plan(place: str | PathLike[str], column: str) -> Plan:
    """Cut the files into pieces; what cannot be read is put aside."""
    require("pyarrow", "Vectors in files need pyarrow", "serve")
    found = Plan()
    for name, path in files_of(place):
        data = FORMATS[path.suffix](path, column)
        try:
            borders, state = data.borders(), data.state()
        except ImportError:
            raise
        except Exception as error:  # of a damaged file it may be of any kind
            found.failed[name] = error
            continue
        stem, count = name.removesuffix(path.suffix), len(borders) - 1
        numbers = [f"-{number:05d}-of-{count:05d}" for number in range(count)] if count > 1 else [""]
        for number, start, stop in zip(numbers, borders, borders[1:], strict=False):
            found.pieces.append(Piece(data, name, start, stop, state, f"{stem}{number}{data.written}"))
    targets = [piece.target for piece in found.pieces]
    if doubled := {target for target in targets if targets.count(target) > 1}:
        raise ValueError(f"two files would be written as {min(doubled)}: rename one of {place}.")
    return found


def read(place: str | PathLike[str], column: str) -> pa.ChunkedArray | np.ndarray:
    """The vectors of all files at once; one file that cannot be read is an error. A file of NumPy needs no pyarrow."""
    if (path := Path(place)).suffix == ".npy" and path.is_file():
        try:
            return np.load(path, mmap_mode="r")
        except ValueError as fault:
            raise ValueError(f"Cannot read {path.name}: {fault}") from fault
    import pyarrow as pa

    found = plan(place, column)
    for name, error in found.failed.items():
        raise ValueError(f"Cannot read {name}: {error}") from error
    parts = []
    for piece in found.pieces:
        for batch in piece.data.batches(piece.start, piece.stop):
            if column not in (names := batch.schema.names):
                raise ValueError(f"{piece.source} has the columns {names}, but not {column!r}: give --columns NAME.")
            parts.append(getattr(batch.column(column), "storage", batch.column(column)))
    if len(kinds := {str(part.type) for part in parts}) > 1:
        raise ValueError(f"column {column!r} of {place} is of several types, {', '.join(sorted(kinds))}: make it one.")
    return pa.chunked_array(parts)
