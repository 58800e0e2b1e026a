r"""The rotation of a corpus: from its PCA, so that a prefix sees which documents are near each other at full width.

.. math:: \sum_d w_d\, KL(\text{softmax}(X A^T / \tau) \,\|\, \text{softmax}((X R)_d (A R)_d^T / \tau_d))

A are documents of a batch, X the same and queries, and no document is compared with itself. R = P Q, where P is the
uncentred PCA (an orthogonal map cannot centre) and Q rotates its first k values only, so that dims from k on are
exactly the PCA.

Settings were looked at on Cranfield and on docstrings with all-MiniLM-L6-v2 and tried once on Banking77. A softer
student at small dims, whose cosines are spread wider, and one second moment for all entries gain there; a sharper
teacher, more steps, or a second moment per entry (plain Adam) gain on the fitted documents and lose to the PCA on
others. With fewer than five documents per rotated direction the fit does so too, hence k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mipic_st.transforms.fitting import row_orders, wants_bar
from mipic_st.transforms.orthogonal import OrthogonalAdam

_BATCH, _QUERIES, _RATE = 512, 256, 3e-3
_FULL_TAU = 0.03
_MASKED = -1e4


def rotated_values(count: int, width: int) -> int:
    """k, the leading values of the PCA that so many documents can rotate."""
    return min(width, 256, max(64, count // 5))


def _temperature(dim: int) -> float:
    return 0.05 if dim <= 64 else 0.04 if dim <= 128 else _FULL_TAU


def _weight(dim: int) -> float:
    return 2.0 if dim <= 8 else 1.5 if dim <= 16 else 1.0


def similarity_gradient(anchors: Tensor, wanted: Tensor, dims: Sequence[int]) -> Tensor:
    """Gradient of the sum over dims, (A, m), for rotated anchors (A, m) of which the first B are the documents.

    By hand it takes one product of A x B per dim and direction, where autograd takes three. ``wanted`` is the softmax
    at full width, (A, B), with zeros on the diagonal.
    """
    count = wanted.shape[1]
    total = torch.zeros_like(anchors)
    for dim in dims:
        length = anchors[:, :dim].norm(dim=1, keepdim=True).clamp_min(1e-6)
        rows = anchors[:, :dim] / length
        off = (rows @ rows[:count].T).div_(_temperature(dim)).fill_diagonal_(_MASKED).softmax(dim=1).sub_(wanted)
        pull = off @ rows[:count]
        pull[:count] += off.T @ rows
        pull *= _weight(dim) / (_temperature(dim) * len(rows))
        total[:, :dim] += (pull - rows * (rows * pull).sum(dim=1, keepdim=True)) / length
    return total


def fit_corpus(
    documents: Tensor,
    rows: Tensor,
    queries: Tensor,
    start: Tensor,
    dims: Sequence[int],
    *,
    inside: int,
    max_steps: int,
    generator: torch.Generator,
    show_progress_bar: bool | None,
) -> Tensor:
    """The rotation of the documents in ``rows``, (D, D), started at their PCA and inside its first values.

    ``queries``, (Q, D), have no answers: they are further anchors. All vectors are of unit length.
    """
    from tqdm.auto import trange

    # where all values rotate, all dims take part
    served = [dim for dim in dims if dim < inside or inside == len(start)]
    optimizer = OrthogonalAdam(inside, max_steps, _RATE, documents.device, one_scale=True)
    leading = start[:, :inside]
    size, asked = min(_BATCH, len(rows)), min(_QUERIES, len(queries))
    orders = row_orders(len(rows), size, generator)
    more = row_orders(len(queries), asked, generator) if asked else None
    for _ in trange(max_steps, desc="Rotation of the documents", disable=not wants_bar(show_progress_bar)):
        anchors = documents[rows[next(orders)[:size]]]
        if more is not None:
            anchors = torch.cat([anchors, queries[next(more)[:asked]]])
        wanted = (anchors @ anchors[:size].T).div_(_FULL_TAU).fill_diagonal_(_MASKED).softmax(dim=1)
        coords = anchors @ leading
        gradient = similarity_gradient(coords @ optimizer.basis[:, : max(served)], wanted, served)
        optimizer.step(coords.T @ gradient)
    return torch.cat([leading @ optimizer.basis, start[:, inside:]], dim=1)
