"""The rotation of a corpus: its gradient, its start, what stays the PCA."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mipic_st.transforms.corpus_fit import fit_corpus, rotated_values, similarity_gradient
from mipic_st.transforms.orthogonal import completed, pca_basis


@pytest.fixture
def corpus():
    """1,000 vectors, of a few directions mostly."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(1000, 96, generator=generator) * torch.linspace(2, 0.1, 96)
    return F.normalize(vectors @ torch.linalg.qr(torch.randn(96, 96, generator=generator)).Q, dim=1)


@pytest.mark.parametrize("queries", [0, 3])
def test_the_gradient_is_that_of_autograd(queries):
    """Of the formula in the module's docstring, in float64."""
    generator = torch.Generator().manual_seed(0)
    anchors = torch.randn(7 + queries, 20, generator=generator, dtype=torch.double, requires_grad=True)
    off = torch.eye(7 + queries, 7, dtype=torch.bool)
    full = torch.randn(7 + queries, 7, generator=generator, dtype=torch.double)
    wanted = full.masked_fill(off, -torch.inf).softmax(dim=1)
    loss = 0
    for dim, weight, tau in ((8, 2.0, 0.05), (16, 1.5, 0.05), (20, 1.0, 0.05)):
        rows = F.normalize(anchors[:, :dim], dim=1)
        found = (rows @ rows[:7].T / tau).masked_fill(off, -torch.inf).log_softmax(dim=1)
        loss = loss - weight * (wanted * found.masked_fill(off, 0)).sum(dim=1).mean()
    (by_autograd,) = torch.autograd.grad(loss, anchors)
    by_hand = similarity_gradient(anchors.detach(), wanted, [8, 16, 20])
    torch.testing.assert_close(by_hand, by_autograd)


@pytest.mark.parametrize("queries", [0, 40])
def test_dims_from_k_on_are_the_pca(corpus, queries):
    """Below, prefixes see neighbours that the PCA's do not; queries without answers count."""
    start, rows = pca_basis(corpus, torch.arange(1000)), torch.arange(1000)
    options = {"inside": 32, "max_steps": 30, "show_progress_bar": False}
    fits = [
        fit_corpus(corpus, rows, asked, start, [4, 8, 64], generator=torch.Generator().manual_seed(0), **options)
        for asked in (corpus[:queries], corpus[:0])
    ]
    matrix = completed(fits[0], 64, corpus, rows)
    torch.testing.assert_close(matrix[:, 32:64], start[:, 32:64], atol=1e-4, rtol=0)
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(96), atol=1e-5, rtol=0)
    assert (matrix[:, :8] - start[:, :8]).abs().max() > 0.05
    assert torch.equal(*fits) is (queries == 0)


def test_more_documents_rotate_more_values():
    """Five documents per direction, 64 directions at least, 256 and the width at most."""
    assert [rotated_values(count, 384) for count in (20, 699, 1398, 10**6)] == [64, 139, 256, 256]
    assert rotated_values(10**6, 96) == 96
