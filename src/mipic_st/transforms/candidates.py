"""Several ways to a rotation, each fitted on one part of what was given and judged on the other; the best is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mipic_st.transforms.corpus_fit import fit_corpus, rotated_values
from mipic_st.transforms.fitting import split_rows
from mipic_st.transforms.orthogonal import completed, pca_basis
from mipic_st.transforms.pair_fit import MOST_VALUES, fit_pairs
from mipic_st.transforms.pairs import Pairs, first_rows, numbered
from mipic_st.transforms.search import Search, most_queries, report
from mipic_st.transforms.verdict import K

logger = logging.getLogger(__name__)

_LEAST = K + 2


def require_documents(count: int) -> None:
    """Refuse so few distinct documents that every query finds all of them."""
    if count < _LEAST:
        raise ValueError(
            f"{count} distinct documents are too few for a fit that can be judged: give {_LEAST} or more, better "
            "a few hundred."
        )


@dataclass(frozen=True, eq=False)
class Given:
    """What a fit was given, or a part of it."""

    documents: Tensor  # (N, D), of unit length, each once
    rows: Tensor  # those that are fitted on
    queries: Tensor  # without answers, (Q, D), of unit length
    pairs: Pairs | None  # which belong together, if that is known; their numbers are the texts'
    row_of: Tensor  # the row of the documents of each text, -1 for none
    query_ids: Tensor  # numbers of the queries without answers

    @classmethod
    def of(
        cls, anchors: Tensor, positives: Tensor | None = None, documents: Tensor | None = None, queries: Any = None
    ) -> Given:
        """Number the texts, and leave out those that come again."""
        none = anchors[:0]
        columns = [anchors, *(none if given is None else given for given in (positives, documents, queries))]
        ids = numbered(*columns)
        pairs = None if positives is None else Pairs.of(anchors, positives, torch.stack(ids[:2], dim=1))
        searched = slice(1, 3) if pairs is not None else slice(0, 3)
        there = torch.cat(ids[searched])
        first = first_rows(there)
        require_documents(len(first))
        if len(first) < len(there):
            logger.info("%d of %d documents repeat another one and are left out.", len(there) - len(first), len(there))
        row_of = torch.full((1 + max(int(column.max()) for column in ids if len(column)),), -1)
        row_of[there[first]] = torch.arange(len(first))
        corpus = _taken([column for column in columns[searched] if len(column)], first)
        asked = first_rows(ids[3])
        return cls(
            corpus, torch.arange(len(corpus)), F.normalize(columns[3][asked], dim=1), pairs, row_of, ids[3][asked]
        )

    @cached_property
    def pca(self) -> Tensor:
        """PCA of the documents that are fitted on."""
        return pca_basis(self.documents, self.rows)

    @property
    def every_query(self) -> Tensor:
        """Queries without answers, and anchors of the pairs."""
        if self.pairs is None:
            return self.queries
        anchors = self.pairs.rows[first_rows(self.pairs.ids[:, 0])]
        return torch.cat([self.queries, F.normalize(self.pairs.anchors[anchors], dim=1)])

    def split(self, share: float, generator: torch.Generator) -> tuple[Given, Pairs | None, Search]:
        """What is fitted on, the pairs that are held out, and the search that judges: held-out queries, all documents.

        Where pairs are given, their anchors are the queries; else documents are, and queries without answers.
        """
        most = most_queries(len(self.documents))
        fitted = torch.ones(len(self.documents), dtype=torch.bool)
        if self.pairs is not None:
            training, test = self.pairs.split(share, generator)
            fitted[self.row_of[test.ids[:, 1]]] = False
            asked = first_rows(test.ids[:, 0])[:most]
            numbers = test.ids[asked, 0]
            relevant = [self.row_of[test.ids[test.ids[:, 0] == number, 1].unique()] for number in numbers]
            queries = F.normalize(test.anchors[test.rows[asked]], dim=1)
            search = Search(self.documents, queries, self.row_of[numbers], relevant)
            return replace(self, rows=fitted.nonzero().flatten(), pairs=training), test, search
        held, _ = split_rows(torch.randperm(len(self.documents), generator=generator), share, most)
        fitted[held] = False
        asked, kept = self.query_ids[:0], self.query_ids[:0]
        if len(self.queries):
            asked, kept = split_rows(torch.randperm(len(self.queries), generator=generator), share, most)
        queries = torch.cat([self.documents[held], self.queries[asked]])
        search = Search(self.documents, queries, torch.cat([held, self.row_of[self.query_ids[asked]]]))
        return replace(self, rows=fitted.nonzero().flatten(), queries=self.queries[kept]), None, search


def _taken(columns: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Some rows of all columns together, of unit length, with no second copy of them on the way."""
    starts = torch.tensor([0, *(len(column) for column in columns)]).cumsum(0)
    parts = [
        column[rows[(rows >= start) & (rows < end)] - start]
        for column, start, end in zip(columns, starts[:-1], starts[1:], strict=True)
    ]
    for part in parts:
        part /= part.norm(dim=1, keepdim=True)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class Candidate:
    """One way to a rotation: its name in the report, and its fit, from what is given to (D, D)."""

    name: str
    fit: Callable[[Given], Tensor]
    again: bool = True  # fitted on everything, once it was chosen


def candidates(given: Given, test: Pairs | None, dims: Sequence[int], seed: int, **options: Any) -> list[Candidate]:
    """All ways that make sense, the simplest first."""
    width = given.documents.shape[1]
    inside = rotated_values(len(given.documents), width)
    steps = options.pop("max_steps")

    def fresh() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def corpus(part: Given) -> Tensor:
        return fit_corpus(
            part.documents,
            part.rows,
            part.every_query,
            part.pca,
            dims,
            inside=inside,
            max_steps=steps or 150,
            generator=fresh(),
            **options,
        )

    def pairs(part: Given, start: Tensor) -> Tensor:
        assert part.pairs is not None
        assert test is not None
        return fit_pairs(part.pairs, test, start, dims, max_steps=steps or 250, generator=fresh(), **options)

    def plain(part: Given) -> Tensor:
        return torch.eye(width, device=part.documents.device)

    found = [Candidate("truncation", plain), Candidate("PCA of the documents", lambda part: part.pca)]
    if min(dims) < inside or inside == width:
        found.append(Candidate("rotation of the documents", corpus))
    if test is not None:
        # they stop at their best step on the held-out pairs, so these cannot be fitted on
        found.append(Candidate("rotation of the pairs from the PCA", lambda part: pairs(part, part.pca), again=False))
        if width <= MOST_VALUES:
            found.append(Candidate("rotation of the pairs", lambda part: pairs(part, plain(part)), again=False))
    return found


@dataclass(frozen=True, eq=False)
class Trial:
    """What the held-out part chose."""

    given: Given
    part: Given  # what the candidates were fitted on
    search: Search  # what judged them
    best: Candidate
    fitted: Tensor  # its matrix from the part, (D, D): the one that was judged
    columns: int  # of it, that were fitted
    report: list[dict[str, float]]

    def final(self) -> Tensor:
        """The matrix from everything, unless the held-out part chose its steps."""
        if not self.best.again:
            return self.fitted
        return completed(self.best.fit(self.given), self.columns, self.given.documents, self.given.rows)


def best_of(
    given: Given, dims: Sequence[int], *, held_out: float, seed: int, prefer_pairs: bool, **options: Any
) -> Trial:
    """Fit all candidates on a part, judge them on the other, choose.

    A candidate's worth is the mean over dims of the logarithm of the measure: plain means would be those of the large
    dims. Two ways stay unless they are worse by a twentieth. Pairs that are preferred, since they came alone, say more
    than who finds whom: of similar sentences, how similar they are. And of documents alone the rotation, if the PCA is
    above it: that documents find their neighbours says too little of queries, which gained by the rotation at every dim
    of five corpora where documents lost (examples/benchmarks/results/SEARCHES.md).
    """
    generator = torch.Generator().manual_seed(seed)
    part, test, search = given.split(held_out, generator)
    ways = candidates(given, test, dims, seed, **options)
    fitted = {way.name: completed(way.fit(part), max(dims), part.documents, part.rows) for way in ways}
    results = search.judge(fitted, dims)
    worth = {
        name: float(found[search.measure].mean(dim=1).clamp_min(1e-4).log().mean()) for name, found in results.items()
    }
    logger.info("Mean logarithm of %s: %s", search.measure, worth)
    best = max(ways, key=lambda way: worth[way.name])
    preferred = best is ways[1] if test is None else prefer_pairs
    if preferred and worth[best.name] < worth[ways[-1].name] + 0.05:
        best = ways[-1]
    shown = {"truncated": results[ways[0].name], "pca": results[ways[1].name], "rotated": results[best.name]}
    rows = report(shown, dims, search.measure)
    return Trial(given, part, search, best, fitted[best.name], max(dims), rows)
