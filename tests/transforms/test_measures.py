"""Ranking measures against slow counting, and against scikit-learn where it has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mipic_st.transforms import measures
from mipic_st.transforms.measures import cosine_scores, ndcg, ranked, recall, reciprocal_rank


@pytest.fixture
def search():
    """Queries that are rows of the corpus, the corpus, and relevant rows per query."""
    generator = torch.Generator().manual_seed(0)
    corpus = torch.nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=1)
    own = torch.arange(0, 40, 4)
    relevant = [torch.randperm(40, generator=generator)[: 1 + number % 4] for number in range(len(own))]
    return corpus[own], corpus, own, relevant


def test_ranking_leaves_the_query_out_in_blocks_too(search, monkeypatch):
    """Sorted by hand, one query after the other."""
    queries, corpus, own, _ = search
    wanted = [
        sorted((row for row in range(40) if row != own[q]), key=lambda row: -float(queries[q] @ corpus[row]))[:5]
        for q in range(10)
    ]
    for rows in (1024, 7, 1):
        monkeypatch.setattr(measures, "BLOCK", rows)
        assert ranked(cosine_scores(queries, corpus), 5, own).tolist() == wanted
    without = ranked(cosine_scores(queries, corpus), 5, torch.full((10,), -1))
    assert without[:, 0].tolist() == own.tolist()
    assert ranked(cosine_scores(queries, corpus), 99).shape == (10, 40)


def test_measures_count_what_they_say(search):
    """Recall, nDCG and reciprocal rank, counted by loops."""
    queries, corpus, own, relevant = search
    found = ranked(cosine_scores(queries, corpus), 10, own)
    other = ranked(cosine_scores(queries[:, :3], corpus[:, :3]), 10, own)
    by_hand = [len(set(a.tolist()) & set(b.tolist())) / 10 for a, b in zip(other, found, strict=True)]
    assert recall(other, found).tolist() == by_hand
    for q in range(10):
        hits = [row in relevant[q].tolist() for row in found[q].tolist()]
        gained = sum(hit / np.log2(place + 2) for place, hit in enumerate(hits))
        best = sum(1 / np.log2(place + 2) for place in range(min(10, len(relevant[q]))))
        assert ndcg(found, relevant)[q].item() == pytest.approx(gained / best)
        first = next((1 / (place + 1) for place, hit in enumerate(hits) if hit), 0.0)
        assert reciprocal_rank(found, relevant)[q].item() == pytest.approx(first)


def test_ndcg_is_that_of_scikit_learn(search):
    """At 10, with gains of 0 and 1."""
    metrics = pytest.importorskip("sklearn.metrics", reason="needs the eval extra")
    queries, corpus, _, relevant = search
    scores = queries @ corpus.T
    truth = np.zeros((10, 40))
    for q, rows in enumerate(relevant):
        truth[q, rows] = 1
    found = ranked(cosine_scores(queries, corpus), 10)
    assert ndcg(found, relevant).mean().item() == pytest.approx(metrics.ndcg_score(truth, scores.numpy(), k=10))
