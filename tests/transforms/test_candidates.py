"""Which way to a rotation is chosen, from what was given."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from mipic_st.transforms.candidates import Given
from mipic_st.transforms.rotation_fit import fit_rotation
from transforms_fixtures import QUICK, hidden_signal


def clustered(count=600, width=48, seed=0):
    """Documents near some centres that lie in a few directions, noise in the others, all of it rotated."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(60, 6))
    inner = centres[random.integers(60, size=count)] + 0.4 * random.normal(size=(count, 6))
    vectors = np.concatenate([inner, 0.4 * random.normal(size=(count, width - 6))], axis=1)
    basis = np.linalg.qr(np.random.default_rng(9).normal(size=(width, width)))[0]
    return (vectors @ basis).astype(np.float32)


def test_documents_gain_over_truncation():
    """The report is of what was chosen, per dim, and names it."""
    rotation = fit_rotation(clustered(), dims=[4, 8])
    assert rotation.measure == "recall@10"
    assert rotation.chosen in ("rotation of the documents", "PCA of the documents")
    assert rotation.gained
    assert not rotation.worse_dims
    assert rotation.verdict.startswith(f"{rotation.chosen}: keeps more of the full width's neighbours")
    for row in rotation.report:
        assert row["rotated"] > row["truncated"] + 0.1
        assert row["change"] == pytest.approx(row["rotated"] - row["truncated"])
        assert row["pca_change"] == pytest.approx(row["rotated"] - row["pca"])


def test_of_documents_alone_the_rotation_stays_unless_it_is_clearly_worse(caplog):
    """By a twentieth of the measure, and against the PCA only; what is reported is what was chosen."""
    seen = set()
    names = ["truncation", "PCA of the documents", "rotation of the documents"]
    with caplog.at_level(logging.INFO, logger="mipic_st"):
        for count, seed in ((60, 0), (60, 2), (150, 0)):
            rotation = fit_rotation(clustered(count, seed=seed), dims=[4, 8, 16], max_steps=30)
            worth = next(record.args[1] for record in reversed(caplog.records) if "logarithm" in record.msg)
            plain, pca, rotated = (worth[name] for name in names)
            assert plain < pca
            assert rotation.chosen == names[1 if pca >= rotated + 0.05 else 2]
            seen.add((rotation.chosen, pca > rotated))
            assert rotation.chosen == names[2] or all(row["pca_change"] == 0 for row in rotation.report)
    assert seen == {(names[2], False), (names[2], True), (names[1], True)}


def test_truncation_stays_where_it_is_best(caplog):
    """Vectors whose values come in the order of their variance, as a PCA has them, are left alone."""
    vectors = np.random.default_rng(0).normal(size=(400, 24)) * 0.8 ** np.arange(24)
    with caplog.at_level(logging.INFO, logger="mipic_st"):
        rotation = fit_rotation(vectors.astype(np.float32), dims=[4, 8, 16], max_steps=30)
    worth = next(record.args[1] for record in caplog.records if "logarithm" in record.msg)
    assert worth["truncation"] == max(worth.values())
    assert rotation.chosen == "truncation"
    assert not rotation.gained


def test_nothing_to_gain_is_truncation():
    """Values of no order, and nothing better to be had: random vectors in all directions keep the identity or gain
    nothing that counts."""
    rotation = fit_rotation(np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32), dims=[15])
    assert not rotation.worse_dims
    assert rotation.report[0]["rotated"] >= rotation.report[0]["truncated"] - 0.02


def test_what_is_chosen_is_fitted_again_on_everything(caplog):
    """A small corpus needs all its documents: the matrix is another one than that of the report's fit."""
    vectors = clustered(120)
    given = Given.of(torch.tensor(vectors))
    part, _, search = given.split(0.25, torch.Generator().manual_seed(0))
    assert (len(part.rows), len(search.queries)) == (90, 30)
    assert torch.equal(given.documents[search.own], search.queries)
    assert not set(part.rows.tolist()) & set(search.own.tolist())
    rotation = fit_rotation(vectors, dims=[4], held_out=0.25, max_steps=1)
    variance = np.linalg.norm(rotation(vectors, 4), axis=1)
    np.testing.assert_allclose(variance, 1, atol=1e-5)
    assert np.abs(rotation.matrix - part.pca.numpy()).max() > 1e-3


def test_pairs_and_further_documents():
    """Held-out queries search positives and documents; what belongs to them is no negative, and not fitted on."""
    anchors, positives = (torch.tensor(vectors) for vectors in hidden_signal(100))
    more = torch.tensor(hidden_signal(150, seed=3)[0])
    documents = torch.cat([positives[:20], more, anchors[:50]])
    given = Given.of(anchors, positives, documents, more[:3])
    assert given.documents.shape == (100 + 150 + 50, 32)
    part, test, search = given.split(0.2, torch.Generator().manual_seed(0))
    assert (len(part.pairs), len(test), len(search.queries)) == (80, 20, 20)
    for number, (rows, own) in enumerate(zip(search.relevant, search.own, strict=True)):
        row = int(test.rows[number])
        expected = torch.nn.functional.normalize(positives[row], dim=0)
        torch.testing.assert_close(given.documents[rows[0]], expected)
        assert int(rows[0]) not in part.rows
        assert (int(own) >= 0) is (row < 50), "an anchor that is a document too does not find itself"
    assert {int(own) >= 0 for own in search.own} == {True, False}
    assert len(part.every_query) == 83
    rotation = fit_rotation(*hidden_signal(300), dims=[4], documents=more, queries=more[:3])
    assert (rotation.measure, rotation.chosen[:21]) == ("nDCG@10", "rotation of the pairs")
    assert rotation.gained


def test_queries_without_answers_are_held_out_too():
    """A tenth of them searches when the fit is judged, the others are anchors; one that is a document is not found."""
    vectors, queries = (torch.tensor(clustered(count, seed=count)) for count in (200, 100))
    given = Given.of(vectors, queries=torch.cat([queries, vectors[:20], queries[:7]]))
    part, _, search = given.split(0.1, torch.Generator().manual_seed(0))
    assert (len(search.queries), len(part.queries), len(part.rows)) == (20 + 12, 120 - 12, 180)
    for query, own in zip(search.queries, search.own, strict=True):
        there = torch.isclose(given.documents, query, atol=1e-6).all(dim=1).nonzero().flatten().tolist()
        assert there == ([int(own)] if own >= 0 else [])
    plain, asked = (fit_rotation(vectors, queries=found, dims=[4], **QUICK) for found in (None, queries))
    assert plain.report[0]["rotated"] != asked.report[0]["rotated"]


def test_repeated_documents_are_counted(caplog):
    """And change nothing else."""
    vectors = clustered(100)
    with caplog.at_level(logging.INFO, logger="mipic_st"):
        one = fit_rotation(np.concatenate([vectors, vectors[:30]]), dims=[4], **QUICK)
    assert "30 of 130 documents repeat another one and are left out" in caplog.text
    assert np.array_equal(one.matrix, fit_rotation(vectors, dims=[4], **QUICK).matrix)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_of_the_caller_come_back(threads):
    """Also after an error."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        fit_rotation(clustered(50), dims=[4], **QUICK)
        with pytest.raises(ValueError, match="too few"):
            fit_rotation(clustered(5), dims=[4])
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
