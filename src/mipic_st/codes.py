"""Codes of vectors: float16, int8, uint8, int4, binary and ubinary, with the ranges they need. NumPy only.

All but int4 are those of ``sentence_transformers.util.quantize_embeddings``, given the same ranges; binary subtracts
the mean first. int4 has 16 levels from the low to the high end of each value's range, two values to a byte: value 2i in
the low four bits of byte i, value 2i + 1 in the high four; of an odd dim the last four bits are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mipic_st.validation import checked_choice, checked_count

PRECISIONS = ("float32", "float16", "int8", "uint8", "int4", "binary", "ubinary")
"""What a vector can be stored in; those behind float16 need :class:`Ranges`."""


def needs_ranges(precision: str) -> bool:
    """Whether codes of this precision depend on the vectors that they were calibrated on."""
    return precision not in ("float32", "float16")


# Shares of the values that may lie below and above the range: a few outliers would cost all others their resolution.
QUANTILES = (0.003, 0.997)
_KINDS = {"int8": np.int8, "uint8": np.uint8, "int4": np.uint8, "binary": np.int8, "ubinary": np.uint8}
_BLOCK = 1024


def bytes_per_vector(dim: int, precision: str = "float32") -> int:
    """Bytes of one vector: 4, 2, 1, 1/2 or 1/8 per dim, the last two rounded up.

    Example:
        >>> [bytes_per_vector(64, precision) for precision in ("float32", "int8", "int4", "binary")]
        [256, 64, 32, 8]
    """
    dim = checked_count("dim", dim)
    checked_choice("precision", precision, PRECISIONS)
    bits = {"float32": 32, "float16": 16, "int8": 8, "uint8": 8, "int4": 4}.get(precision, 1)
    return (dim * bits + 7) // 8


@dataclass(frozen=True, eq=False)
class Ranges:
    """What the codes of vectors of one width go by, each of shape (d,).

    Codes lie between ``low`` and ``high``; binary ones subtract ``mean``, and a bit stands for the ``spread``, the mean
    distance from it.

    Example:
        >>> ranges = Ranges.of(np.array([[0.0, 1.0], [1.0, 3.0]]), quantiles=(0.0, 1.0))
        >>> ranges.low.tolist(), ranges.high.tolist(), ranges.mean.tolist()
        ([0.0, 1.0], [1.0, 3.0], [0.5, 2.0])
    """

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    spread: np.ndarray

    def __post_init__(self) -> None:
        parts = [np.asarray(part) for part in (self.low, self.high, self.mean, self.spread)]
        if any(part.ndim != 1 or part.shape != parts[0].shape or not len(part) for part in parts):
            raise ValueError(f"ranges must be four arrays of one width, got {[part.shape for part in parts]}.")
        if not all(np.isfinite(part).all() for part in parts):
            raise ValueError("ranges hold NaN or infinite values: they are damaged, calibrate again.")
        if (parts[0] > parts[1]).any():
            raise ValueError("ranges have a low end above the high end: they are damaged, calibrate again.")

    @classmethod
    def of(cls, vectors: np.ndarray, quantiles: tuple[float, float] = QUANTILES) -> Ranges:
        """Read the ranges off two or more vectors, (N, d), like those that will be coded.

        ``quantiles`` are the shares of the values below the low and below the high end; (0, 1) are minimum and maximum.
        """
        vectors = np.asarray(vectors)
        if vectors.ndim != 2 or len(vectors) < 2:
            raise ValueError(f"ranges need two vectors or more, (N, d), got shape {vectors.shape}.")
        if not all(np.isfinite(block).all() for block in _blocks(vectors)):
            raise ValueError("vectors hold NaN or infinite values; leave these rows out.")
        # value by value: np.quantile of a whole array sorts a copy of it
        ends = np.stack([np.quantile(column.astype(np.float32), quantiles) for column in vectors.T], axis=1)
        mean = vectors.mean(axis=0, dtype=np.float64)
        spread = sum(np.abs(block - mean).sum(axis=0) for block in _blocks(vectors)) / len(vectors)
        low, high, mean, spread = (part.astype(np.float32) for part in (*ends, mean, spread))
        return cls(low, high, mean, spread)

    def __len__(self) -> int:
        return len(self.low)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All four, (4, d): how they are stored. ``Ranges(*array)`` makes them again."""
        return np.stack([self.low, self.high, self.mean, self.spread]).astype(dtype or np.float32)

    def steps(self, levels: int) -> np.ndarray:
        """Distance of neighbouring levels, (d,); 1 where all values were equal."""
        steps = (self.high - self.low) / np.float32(levels - 1)
        return np.where(steps == 0, np.float32(1), steps)


def encode(vectors: np.ndarray, precision: str, ranges: Ranges | None = None) -> np.ndarray:
    """Vectors as codes.

    Args:
        vectors: (N, d), finite.
        precision: One of :data:`PRECISIONS`.
        ranges: Of width d; float32 and float16 need none.

    Returns:
        (N, d) for float32, float16, int8 and uint8; (N, ceil(d / 2)) for int4; (N, ceil(d / 8)) for the binary ones.

    Example:
        >>> ranges = Ranges.of(np.array([[0.0, 0.0, 0.0], [15.0, 15.0, 15.0]]), quantiles=(0.0, 1.0))
        >>> encode(np.array([[1.0, 2.0, 15.0]]), "int4", ranges).tolist()
        [[33, 15]]
    """
    checked_choice("precision", precision, PRECISIONS)
    vectors = np.asarray(vectors)
    if vectors.ndim != 2:
        raise ValueError(f"vectors must have the shape (N, d), got {vectors.shape}.")
    plain = not needs_ranges(precision)
    kind = np.dtype(precision if plain else _KINDS[precision])
    width = vectors.shape[1] if plain else bytes_per_vector(len(_fitting(ranges, vectors.shape[1])), precision)
    codes = np.empty((len(vectors), width), dtype=kind)
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[start : start + _BLOCK]
        finite = np.isfinite(block)
        if not finite.all():
            row = start + int(np.flatnonzero(~finite.all(axis=1))[0])
            raise ValueError(
                f"vectors hold NaN or infinite values, first in row {row}: they have no code, leave them out."
            )
        codes[start : start + _BLOCK] = block if plain else _coded(block, precision, ranges)
    return codes


def _coded(vectors: np.ndarray, precision: str, ranges: Any) -> np.ndarray:
    if precision in ("binary", "ubinary"):
        bits = np.packbits(vectors > ranges.mean, axis=1)
        return bits if precision == "ubinary" else (bits ^ 128).view(np.int8)
    levels = vectors - ranges.low
    if precision == "int4":
        levels /= ranges.steps(16)
        codes = np.clip(np.rint(levels, out=levels), 0, 15, out=levels).astype(np.uint8)
        if codes.shape[1] % 2:
            codes = np.pad(codes, ((0, 0), (0, 1)))
        return codes[:, ::2] | codes[:, 1::2] << 4
    levels /= ranges.steps(256)
    codes = np.clip(np.floor(levels, out=levels), 0, 255, out=levels).astype(np.uint8)
    return codes if precision == "uint8" else (codes ^ 128).view(np.int8)


def decode(codes: np.ndarray, precision: str, ranges: Ranges | None = None) -> np.ndarray:
    """The vectors, (N, d), float32, that codes stand for; a bit is the mean plus or minus the spread.

    A code of int8 and uint8 stands for the low end of its step, as in sentence-transformers' rescoring.

    Example:
        >>> ranges = Ranges.of(np.array([[0.0, 0.0, 0.0], [15.0, 15.0, 15.0]]), quantiles=(0.0, 1.0))
        >>> decode(np.array([[33, 15]], dtype=np.uint8), "int4", ranges).tolist()
        [[1.0, 2.0, 15.0]]
    """
    return _decoded(np.asarray(codes), precision, ranges).astype(np.float32)


def _decoded(codes: np.ndarray, precision: str, ranges: Any) -> np.ndarray:
    """What codes stand for, float64, in which int8 and uint8 have no rounding."""
    checked_choice("precision", precision, PRECISIONS)
    if not needs_ranges(precision):
        if not np.issubdtype(codes.dtype, np.floating):
            raise ValueError(f"{precision} codes must be floating numbers, got {codes.dtype}.")
        return codes.astype(np.float64)
    dim = len(_fitting(ranges, None))
    width, kind = bytes_per_vector(dim, precision), np.dtype(_KINDS[precision])
    if codes.ndim != 2 or codes.shape[1] != width or codes.dtype != kind:
        raise ValueError(
            f"{precision} codes of {dim} dims must have the shape (N, {width}) and be {kind}, got {codes.shape} of "
            f"{codes.dtype}."
        )
    if precision in ("int8", "uint8"):
        levels = codes.astype(np.float64)
        levels += 128 if precision == "int8" else 0
        levels *= ranges.steps(256)
        levels += ranges.low
        return levels
    if precision == "int4":
        levels = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), 2 * width)[:, :dim]
        return levels * ranges.steps(16).astype(np.float64) + ranges.low
    return (2.0 * bits_of(codes, precision, dim) - 1) * ranges.spread + ranges.mean


def bits_of(codes: np.ndarray, precision: str, dim: int) -> np.ndarray:
    """Binary codes as 0 and 1, (N, dim), uint8."""
    packed = codes if precision == "ubinary" else codes.view(np.uint8) ^ np.uint8(128)
    return np.unpackbits(packed, axis=1, count=dim)


def evenly(rows: Any, most: int) -> Any:
    """At most so many rows of an array or tensor, at equal distances: enough to read ranges off."""
    return rows[:: -(-len(rows) // most)]


def scores(queries: np.ndarray, codes: np.ndarray, precision: str, ranges: Ranges | None = None) -> np.ndarray:
    """Dot products, (Q, N), of float queries, (Q, d), truncated as the documents were, with the codes of N documents.

    Those of int8 and uint8 are the scores of sentence-transformers' rescoring, in float32.

    Example:
        >>> scores(np.array([[1.0, 0.0]]), np.array([[0.5, 2.0]], dtype=np.float16), "float16").tolist()
        [[0.5]]
    """
    asked, codes = np.asarray(queries, dtype=np.float64), np.asarray(codes)
    found = np.empty((len(asked), len(codes)), dtype=np.float32)
    for start in range(0, len(codes), _BLOCK):
        documents = _decoded(codes[start : start + _BLOCK], precision, ranges)
        if documents.shape[1] != asked.shape[1]:
            raise ValueError(f"queries have {asked.shape[1]} dims, the coded documents {documents.shape[1]}.")
        found[:, start : start + _BLOCK] = asked @ documents.T
    return found


def _fitting(ranges: Any, dim: int | None) -> Ranges:
    """The ranges, if there are any and of this width."""
    if not isinstance(ranges, Ranges):
        raise ValueError(f"these codes need ranges: Ranges.of(vectors like those that will be coded), got {ranges!r}.")
    if dim is not None and len(ranges) != dim:
        raise ValueError(f"ranges are for {len(ranges)} dims, the vectors have {dim}: calibrate at this dim.")
    return ranges


def _blocks(vectors: np.ndarray) -> list[np.ndarray]:
    """Views of some thousand rows; one empty view of no rows."""
    return [vectors[start : start + _BLOCK] for start in range(0, max(1, len(vectors)), _BLOCK)]
