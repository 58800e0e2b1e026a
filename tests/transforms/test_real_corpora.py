"""The figures that the fit must reach on real vectors; slow, and skipped without the data."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mipic_st.transforms.measures import cosine_scores, ndcg, ranked
from mipic_st.transforms.orthogonal import pca_basis
from mipic_st.transforms.rotation import Rotation
from mipic_st.transforms.rotation_fit import fit_rotation
from transforms_fixtures import unit

pytestmark = pytest.mark.slow
DIMS = [256, 128, 64, 32, 16, 8]


@pytest.fixture(scope="module")
def encode(minilm_path):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(minilm_path, device="cpu")
    return lambda texts: model.encode(list(texts), batch_size=64, show_progress_bar=False)


@pytest.fixture(scope="module")
def cranfield(data_folder, encode):
    """Documents, queries, and the rows of the documents that answer each query."""
    import pandas as pd

    documents, queries, judged = (
        pd.read_csv(data_folder / f"cranfield_{name}.csv") for name in ("docs", "queries", "qrels")
    )
    row = {name: place for place, name in enumerate(documents.id)}
    relevant = [[row[doc] for doc in judged.doc[judged["query"] == name]] for name in queries.id]
    return encode(documents.text), encode(queries.text), relevant


def searched(matrix, documents, queries, relevant, dims):
    """nDCG@10 x100 per dim of the queries that have an answer."""
    asked = [number for number, rows in enumerate(relevant) if len(rows)]
    sides = [torch.tensor(side) @ torch.as_tensor(matrix) for side in (queries[asked], documents)]
    rows = [torch.tensor(relevant[number]) for number in asked]
    figures = []
    for dim in dims:
        first, second = (torch.nn.functional.normalize(side[:, :dim], dim=1) for side in sides)
        found = ranked(cosine_scores(first, second), 10)
        figures.append(100 * float(ndcg(found, rows).mean()))
    return np.array(figures)


def test_documents_alone_serve_their_search(cranfield):
    """Mean of three seeds on Cranfield; no dim below the PCA by more than 0.3."""
    documents = cranfield[0]
    fits = [fit_rotation(documents, dims=DIMS, seed=seed) for seed in range(3)]
    found = np.mean([searched(rotation.matrix, *cranfield, DIMS) for rotation in fits], axis=0)
    pca = searched(pca_basis(torch.tensor(documents), torch.arange(len(documents))), *cranfield, DIMS)
    assert (found[2:] >= [38.3, 37.3, 32.8, 25.2]).all(), found
    assert (found >= pca - 0.3).all(), (found, pca)
    assert all(rotation.gained for rotation in fits)


def test_documents_that_come_later_lose_nothing_to_the_pca(cranfield):
    """Half of the documents fitted, the other half searched; mean of three, that scatter by a point."""
    documents, queries, relevant = cranfield
    results = []
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(documents))
        fitted, rest = np.split(order, [len(documents) // 2])
        place = {row: number for number, row in enumerate(rest)}
        task = documents[rest], queries, [[place[row] for row in rows if row in place] for rows in relevant]
        given = torch.tensor(documents[fitted])
        matrices = fit_rotation(given, dims=DIMS, seed=seed).matrix, pca_basis(given, torch.arange(len(given)))
        results.append([searched(matrix, *task, DIMS) for matrix in matrices])
    found, pca = np.mean(results, axis=0)
    assert (found >= pca - 0.5).all(), (found, pca)
    assert (found[4:] >= pca[4:] + 1).all(), (found, pca)


def mixed_pairs(data_folder):
    """The 9,490 pairs of the data's README."""
    import pandas as pd

    sick, mrpc, sts, banking = (
        pd.read_csv(data_folder / f"{name}_train.csv", keep_default_na=False)
        for name in ("sick", "mrpc", "sts12", "banking77")
    )
    rows = [
        sick[sick.entailment.str.upper().str.startswith("ENTAIL")],
        mrpc[mrpc.label.astype(str) == "1"],
        sts[sts.score.astype(float) >= 4],
    ]
    pairs = [pair for part in rows for pair in zip(part.sentence1, part.sentence2, strict=True)]
    draw = random.Random(0)
    for _, part in banking.groupby("label"):
        texts = list(part.text)
        draw.shuffle(texts)
        pairs += zip(texts[::2], texts[1::2], strict=False)
    return pairs


def test_similar_sentences_and_another_domain(cranfield, data_folder, encode, caplog, tmp_path):
    """The pairs' rotation serves STS and topics; on Cranfield's documents, where it serves nothing, it says so."""
    import pandas as pd
    from scipy.stats import spearmanr

    pairs = mixed_pairs(data_folder)
    assert len(pairs) == 9490
    first, second = (encode(texts) for texts in zip(*pairs, strict=True))
    rotation = fit_rotation(first, second, dims=DIMS)
    assert rotation.chosen == "rotation of the pairs"
    train, test = (pd.read_csv(data_folder / f"banking77_{name}.csv") for name in ("train", "test"))
    known, fresh = (encode(part.text) for part in (train, test))
    tables = [pd.read_csv(data_folder / f"sts{year}_test.csv", keep_default_na=False) for year in (14, 15)]
    sides = [(encode(table.sentence1), encode(table.sentence2), table.score) for table in tables]
    for dim, sts, topics in ((16, 72.2, 89.4), (8, 64.7, 80.6)):
        scores = [
            100 * spearmanr((rotation(one, dim) * rotation(other, dim)).sum(axis=1), score)[0]
            for one, other, score in sides
        ]
        nearest = (rotation(fresh, dim) @ rotation(known, dim).T).argmax(axis=1)
        assert np.mean(scores) >= sts - 0.3
        assert 100 * (train.label.to_numpy()[nearest] == test.label.to_numpy()).mean() >= topics - 0.3
    rotation.save(tmp_path / "rotation.safetensors")
    judged = Rotation.load(tmp_path / "rotation.safetensors").evaluate(unit(cranfield[0]))
    assert {64, 32} <= set(judged.foreign_dims)
    assert "keeps far fewer neighbours than their own PCA at dims" in caplog.text
    caplog.clear()
    assert not fit_rotation(cranfield[0], dims=DIMS).evaluate(cranfield[0]).foreign_dims
    assert "far fewer" not in caplog.text
