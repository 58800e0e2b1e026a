"""How well truncated vectors rank a corpus: the full width's neighbours found again, judged documents found early.

All functions give one number per query, so that differences between two ways have an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

# Documents that are scored at once, so that neither their vectors nor the scores need much memory. Of fewer than 64
# times what is wanted, torch sorts all to find the best.
BLOCK = 768


def cosine_scores(queries: Tensor, corpus: Tensor) -> Iterator[Tensor]:
    """Scores of all queries with the corpus, for :func:`ranked`.

    Args:
        queries: (Q, d), unit length.
        corpus: (N, d), unit length.

    Yields:
        (Q, n), for some documents after the other.
    """
    return (queries @ block.T for block in corpus.split(BLOCK))


def ranked(scores: Iterable[Tensor], k: int, own: Tensor | None = None) -> Tensor:
    """The k best rows of the corpus for each query, best first.

    Args:
        scores: (Q, n) scores of all queries with the first rows of the corpus, with the next ones, and so on.
        k: How many; all if the corpus has fewer.
        own: (Q,), the row of the corpus that is the query itself and is no answer; -1 for none.

    Returns:
        (Q, k), rows of the corpus.

    Example:
        >>> corpus = torch.eye(3)
        >>> ranked(cosine_scores(corpus[:1], corpus), 1).tolist()
        [[0]]
        >>> ranked([torch.tensor([[0.9, 0.5]]), torch.tensor([[0.7]])], 2, own=torch.tensor([0])).tolist()
        [[2, 1]]
    """
    best = found = torch.empty(0)
    start = 0
    for block in scores:
        # one more, since the query itself may be among them
        values, rows = block.topk(min(k + (own is not None), block.shape[1]), dim=1)
        rows += start
        if own is not None:
            values[rows == own[:, None].to(rows.device)] = -torch.inf
        if start:
            values, rows = torch.cat([best, values], dim=1), torch.cat([found, rows], dim=1)
        best, places = values.topk(min(k, values.shape[1]), dim=1)
        found = rows.gather(1, places)
        start += block.shape[1]
    return found


def recall(found: Tensor, wanted: Tensor) -> Tensor:
    """Share of the wanted rows that were found.

    Args:
        found: (Q, k).
        wanted: (Q, k), e.g. what the full width finds.

    Returns:
        (Q,), double.

    Example:
        >>> recall(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).tolist()
        [0.5]
    """
    return (found[:, :, None] == wanted[:, None, :]).any(dim=1).double().mean(dim=1)


def gains(found: Tensor, relevant: Sequence[Tensor]) -> Tensor:
    """Which of the found rows are relevant.

    Args:
        found: (Q, k).
        relevant: Rows of the corpus that answer each query.

    Returns:
        (Q, k), double: 1 or 0.
    """
    most = max((len(rows) for rows in relevant), default=0)
    padded = torch.full((len(relevant), max(1, most)), -1)
    for number, rows in enumerate(relevant):
        padded[number, : len(rows)] = rows
    return (found[:, :, None] == padded.to(found.device)[:, None, :]).any(dim=2).double()


def ndcg(found: Tensor, relevant: Sequence[Tensor]) -> Tensor:
    """nDCG@k with equal gains: 1 where all relevant rows come first.

    Args:
        found: (Q, k), best first.
        relevant: Rows of the corpus that answer each query, one at least.

    Returns:
        (Q,), double.

    Example:
        >>> ndcg(torch.tensor([[5, 1]]), [torch.tensor([1])]).round(decimals=2).tolist()
        [0.63]
    """
    k = found.shape[1]
    discount = 1 / torch.arange(2, k + 2, dtype=torch.double, device=found.device).log2()
    best = torch.stack([discount[: min(k, len(rows))].sum() for rows in relevant])
    return gains(found, relevant) @ discount / best


def reciprocal_rank(found: Tensor, relevant: Sequence[Tensor]) -> Tensor:
    """One over the place of the first relevant row; 0 where none was found.

    Args:
        found: (Q, k), best first.
        relevant: Rows of the corpus that answer each query.

    Returns:
        (Q,), double.

    Example:
        >>> reciprocal_rank(torch.tensor([[5, 1], [3, 2]]), [torch.tensor([1]), torch.tensor([9])]).tolist()
        [0.5, 0.0]
    """
    places = torch.arange(1, found.shape[1] + 1, dtype=torch.double, device=found.device)
    return (gains(found, relevant) / places).amax(dim=1)
