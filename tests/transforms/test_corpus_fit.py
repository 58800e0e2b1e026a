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


def divergence(documents, matrix):
    """The formula in the module's docstring at 4, 8 and 16 dims, over all documents at once, in float64."""
    own = torch.eye(len(documents), dtype=torch.bool)
    wanted = (documents @ documents.T / 0.03).masked_fill(own, -torch.inf).softmax(dim=1)
    total = 0.0
    for dim, weight in ((4, 2.0), (8, 2.0), (16, 1.5)):
        rows = F.normalize(documents @ matrix[:, :dim], dim=1)
        found = (rows @ rows.T / 0.05).masked_fill(own, -torch.inf).softmax(dim=1)
        total += weight * float((wanted * (wanted / found).log().nan_to_num()).sum(dim=1).mean())
    return total


def test_the_fit_lowers_the_divergence(corpus):
    """By more than a tenth of what the PCA has: the steps lead down, and what they lead to is what is returned."""
    corpus = corpus[:400]
    start, rows = pca_basis(corpus, torch.arange(400)), torch.arange(400)
    options = {"inside": 32, "max_steps": 60, "generator": torch.Generator().manual_seed(0)}
    fit = fit_corpus(corpus, rows, corpus[:0], start, [4, 8, 16], show_progress_bar=False, **options)
    fitted, pca = (divergence(corpus.double(), matrix.double()) for matrix in (fit, start))
    assert fitted < 0.9 * pca


def test_no_document_teaches_that_it_is_its_own_neighbour(corpus, monkeypatch):
    """The wanted similarities are the softmax at full width over the other documents."""
    given = []
    monkeypatch.setattr(
        "mipic_st.transforms.corpus_fit.similarity_gradient",
        lambda anchors, wanted, dims: given.append((anchors, wanted)) or torch.zeros_like(anchors),
    )
    options = {"inside": 96, "max_steps": 1, "generator": torch.Generator(), "show_progress_bar": False}
    fit_corpus(corpus, torch.arange(50), corpus[50:60], pca_basis(corpus, torch.arange(50)), [96], **options)
    ((anchors, wanted),) = given
    assert wanted.shape == (60, 50)
    for row, found in enumerate(wanted):
        others = [column for column in range(50) if column != row]
        expected = (anchors[others] @ anchors[row] / 0.03).softmax(dim=0)
        torch.testing.assert_close(found[others], expected, atol=1e-5, rtol=1e-3)
        assert row >= 50 or found[row] == 0


def test_more_documents_rotate_more_values():
    """Five documents per direction, 64 directions at least, 256 and the width at most."""
    assert [rotated_values(count, 384) for count in (20, 699, 1398, 10**6)] == [64, 139, 256, 256]
    assert rotated_values(10**6, 96) == 96
