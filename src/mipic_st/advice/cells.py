"""What a corpus's vectors are worth at each dim and precision, truncated and rotated: one number per query.

Queries stay floats and search the coded documents, as engines do. All are judged by the same queries, so differences
have a paired interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mipic_st.codes import Ranges, bytes_per_vector, decode, encode, needs_ranges
from mipic_st.transforms.measures import BLOCK, cosine_scores, ndcg, ranked, recall
from mipic_st.transforms.rotation import calibrating
from mipic_st.transforms.search import Search, smaller
from mipic_st.transforms.verdict import NDCG, RECALL, K

PRECISIONS = ("float32", "float16", "int8", "int4", "binary")
TOP = f"3-recall@{K}"
MEASURES = (NDCG, TOP, RECALL)

_RESAMPLES, _BATCH_VALUES = 2000, 2**20
# Documents that tell whether a rotation is worth its while, random rotations that show what is chance, and what must be
# found more of the neighbours in any case.
_UNSEEN, _RANDOM, _LEAST_GAIN = 1000, 16, 0.01


@dataclass(frozen=True)
class Cell:
    """One way to store a vector, and what it finds.

    Attributes:
        dim: Values that are kept.
        precision: What each is stored in.
        way: "truncated" or "rotated".
        bytes: Of one vector.
        scores: Means over the held-out queries by measure, 0 to 1.
        kept: The measure that decides, as a share of the full width's in float32.
        change: The measure minus the full width's; ``low`` and ``high`` are the ends of its 95% interval.
        front: Whether no other cell that can be recommended is as good in as few bytes.

    Example:
        >>> print(Cell(64, "int4", "rotated", 32, {"recall@10": 0.78}, 0.78, -0.22, -0.24, -0.2, True))
        int4 x 64, rotated (32 bytes)
    """

    dim: int
    precision: str
    way: str
    bytes: int
    scores: dict[str, float]
    kept: float
    change: float
    low: float
    high: float
    front: bool = False

    def __str__(self) -> str:
        return f"{self.precision} x {self.dim}, {self.way} ({self.bytes} bytes)"


def cell_keys(width: int, dims: Sequence[int], precisions: Sequence[str], rotated: bool) -> list[tuple[str, int, str]]:
    """(way, dim, precision) of all cells; floats at full width are the same vectors, rotated or not."""
    ways = ("truncated", "rotated") if rotated else ("truncated",)
    keys = [
        (way, dim, precision)
        for way in ways
        for dim in dims
        for precision in precisions
        if way == "truncated" or dim < width or needs_ranges(precision)
    ]
    full = ("truncated", width, "float32")
    return keys if full in keys else [*keys, full]


def values_by_cell(
    search: Search, rows: Tensor, matrix: Tensor | None, dims: Sequence[int], precisions: Sequence[str]
) -> Iterator[tuple[tuple[str, int, str], dict[str, np.ndarray]]]:
    """For each cell its key, and one number per query for each measure; codes have the ranges of the fitted rows."""
    wanted = search.neighbours
    ranges: tuple[str, int, Ranges] | None = None
    keys = cell_keys(search.documents.shape[1], dims, precisions, matrix is not None)
    measures = MEASURES if search.relevant is not None else MEASURES[1:]
    # one place for all: small results between large arrays that come and go would keep their memory
    values = np.empty((len(keys), len(measures), len(search.queries)))
    for key, row in zip(keys, values, strict=True):
        way, dim, precision = key
        basis = matrix if way == "rotated" else None
        if needs_ranges(precision) and (ranges is None or ranges[:2] != key[:2]):
            ranges = way, dim, _ranges(search.documents, rows, basis, dim)
        stored = partial(_stored, precision=precision, ranges=ranges[2] if ranges else None)
        found = search.found(basis, dim, stored)
        row[-2:] = recall(found, wanted[:, :3]).cpu(), recall(found, wanted).cpu()
        if search.relevant is not None:
            row[0] = ndcg(found, search.relevant).cpu()
        yield key, dict(zip(measures, row, strict=True))


def _stored(block: Tensor, precision: str, ranges: Ranges | None) -> Tensor:
    """What a precision keeps of some documents."""
    if precision == "float32":
        return block
    codes = encode(block.cpu().numpy(), precision, ranges)
    return torch.from_numpy(decode(codes, precision, ranges)).to(block.device)


def _ranges(documents: Tensor, rows: Tensor, basis: Tensor | None, dim: int) -> Ranges:
    """Ranges of some rows, rotated, truncated and of unit length."""
    parts = calibrating(rows, dim).split(BLOCK)
    blocks = [block for part in parts for block in smaller(documents[part], basis, dim)]
    return Ranges.of(torch.cat(blocks).cpu().numpy())


def paired_intervals(differences: np.ndarray, seed: int) -> np.ndarray:
    """95% intervals, (C, 2), of the means over queries of (C, Q): all rows take the same resampled queries."""
    from scipy.stats import bootstrap

    found = bootstrap(
        (differences,),
        np.mean,
        axis=1,
        method="percentile",
        n_resamples=_RESAMPLES,
        batch=max(1, _BATCH_VALUES // differences.size),
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return np.stack([found.low, found.high], axis=1)


def bytes_of(keys: Sequence[tuple[str, int, str]]) -> list[int]:
    """Bytes of one vector of each cell."""
    return [bytes_per_vector(dim, precision) for _, dim, precision in keys]


def gain_on_unseen(
    search: Search, rows: Tensor, matrix: Tensor, dims: Sequence[int], seed: int
) -> tuple[bool, float, float]:
    """Whether rotated vectors find more than truncated ones among documents that the fit has not seen.

    On the whole corpus even random vectors gain, since the map knows the documents. What is compared are neighbours of
    the full width. Also given: the difference, and how far random rotations are from each other, which may be chance.
    """
    unseen = torch.ones(len(search.documents), dtype=torch.bool)
    unseen[rows] = False
    documents = search.documents[unseen.nonzero().flatten()[:_UNSEEN].to(search.documents.device)]
    count, width = documents.shape
    if count < 6:
        return False, 0.0, 0.0
    own, k = torch.arange(count), min(K, count // 3)
    wanted = ranked(cosine_scores(documents, documents), k, own)

    def kept(basis: Tensor) -> float:
        rotated, found = documents @ basis.to(documents), []
        for dim in dims:
            part = F.normalize(rotated[:, :dim], dim=1)
            found.append(recall(ranked(cosine_scores(part, part), k, own), wanted).mean())
        return float(torch.stack(found).mean())

    gain = kept(matrix) - kept(torch.eye(width))
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(width, max(dims), generator=generator) for _ in range(_RANDOM))
    chance = 3 * 2**0.5 * float(np.std([kept(torch.linalg.qr(values).Q) for values in drawn], ddof=1))
    return gain > max(chance, _LEAST_GAIN), gain, chance
