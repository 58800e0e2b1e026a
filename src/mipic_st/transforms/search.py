"""What a rotation is judged by: queries that search a corpus at full width, and again at each dim."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mipic_st.numerics import spearman
from mipic_st.transforms.measures import BLOCK, cosine_scores, ndcg, ranked, recall, reciprocal_rank
from mipic_st.transforms.verdict import NDCG, RECALL, K

_SAMPLED = 256, 512
# Queries at most, fewer where the corpus is large: so many scores at most, but 100 queries.
_MOST_QUERIES, _MOST_SCORES = 1000, 2 * 10**7


def most_queries(documents: int) -> int:
    """How many queries judge a corpus of so many documents."""
    return min(_MOST_QUERIES, max(100, _MOST_SCORES // documents))


@dataclass(frozen=True, eq=False)
class Search:
    """Queries and the corpus that they search, all of unit length."""

    documents: Tensor  # (N, D), each once
    queries: Tensor  # (Q, D)
    own: Tensor  # the row of the documents that is the query itself, and no answer, (Q,); -1 for none
    relevant: Sequence[Tensor] | None = None  # rows that answer each query, where that is known

    @property
    def measure(self) -> str:
        """What counts: the answers where they are known, else what the full width finds."""
        return RECALL if self.relevant is None else NDCG

    @cached_property
    def neighbours(self) -> Tensor:
        """What each query finds at full width, (Q, K)."""
        return ranked(cosine_scores(self.queries, self.documents), K, self.own)

    def found(self, basis: Tensor | None, dim: int, stored: Callable[[Tensor], Tensor] = lambda block: block) -> Tensor:
        """What each query finds at one dim, (Q, K); ``stored`` gives what is kept of some documents, (n, dim)."""
        queries = torch.cat([*smaller(self.queries, basis, dim)])
        return ranked((queries @ stored(block).T for block in smaller(self.documents, basis, dim)), K, self.own)

    def judge(self, bases: Mapping[str, Tensor], dims: Sequence[int]) -> dict[str, dict[str, Tensor]]:
        """For each basis (D, D): measures, one number per dim and query; "similarity" has one per dim."""
        some = self.queries[: _SAMPLED[0]], self.documents[:: max(1, len(self.documents) // _SAMPLED[1])]
        full = _cosines(*some)
        results = {}
        for name, basis in bases.items():
            rows = []
            for dim in dims:
                cut = (torch.cat([*smaller(side, basis, dim)]) for side in some)
                similarity = torch.tensor(spearman(_cosines(*cut), full))
                rows.append(self._measured(self.found(basis, dim)) | {"similarity": similarity})
            results[name] = {measure: torch.stack([row[measure] for row in rows]) for measure in rows[0]}
        return results

    def _measured(self, found: Tensor) -> dict[str, Tensor]:
        now = {RECALL: recall(found, self.neighbours)}
        if self.relevant is not None:
            now |= {NDCG: ndcg(found, self.relevant), f"MRR@{K}": reciprocal_rank(found, self.relevant)}
        return {measure: values.cpu() for measure, values in now.items()}


def smaller(vectors: Tensor, basis: Tensor | None, dim: int) -> Iterator[Tensor]:
    """Vectors times a basis (D, D), truncated, of unit length: some (n, dim) after the other, since all take memory."""
    for block in vectors.split(BLOCK):
        yield F.normalize(block[:, :dim] if basis is None else block @ basis[:, :dim], dim=1)


def _cosines(queries: Tensor, documents: Tensor) -> np.ndarray:
    return (queries @ documents.T).flatten().cpu().numpy()


def report(results: Mapping[str, Mapping[str, Tensor]], dims: Sequence[int], measure: str) -> list[dict[str, float]]:
    """One row per dim: the measure for each way, what the rotation adds to the others, and the other measures."""
    rows = []
    for place, dim in enumerate(dims):
        values = {way: measured[measure][place] for way, measured in results.items()}
        row: dict[str, float] = {"dim": dim} | {way: float(value.mean()) for way, value in values.items()}
        for key, way in (("", "truncated"), ("pca_", "pca")):
            change = values["rotated"] - values[way]
            row |= {f"{key}change": float(change.mean()), f"{key}error": float(change.std() / len(change) ** 0.5)}
        for other in results["rotated"]:
            if other != measure:
                row |= {f"{other}_{way}": float(measured[other][place].mean()) for way, measured in results.items()}
        rows.append(row)
    return rows
