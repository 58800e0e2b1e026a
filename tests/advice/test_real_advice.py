"""The advice on a real collection holds when its own questions search it; slow, and skipped without the data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mipic_st import advise
from mipic_st.numerics import unit_length
from mipic_st.transforms.measures import ndcg, ranked

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cranfield(data_folder, minilm_path):
    """Documents, questions, and (question, document) rows that were judged relevant."""
    import pandas as pd
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(minilm_path, device="cpu")
    documents, queries, judged = (
        pd.read_csv(data_folder / f"cranfield_{name}.csv") for name in ("docs", "queries", "qrels")
    )
    rows = [
        [{name: row for row, name in enumerate(table.id)}[one] for one in column]
        for table, column in ((queries, judged["query"]), (documents, judged.doc))
    ]
    encoded = (model.encode(list(table.text), batch_size=64, show_progress_bar=False) for table in (documents, queries))
    return *encoded, np.array(rows)


def searched(scores, judged):
    """nDCG@10 of all questions that have an answer."""
    asked = sorted(set(judged[0]))
    relevant = [torch.tensor(judged[1][judged[0] == number]) for number in asked]
    found = ranked([torch.as_tensor(scores)[asked]], 10)
    return float(ndcg(found, relevant).mean())


@pytest.mark.parametrize("with_pairs", [False, True])
def test_32_bytes_lose_at_most_a_twentieth(cranfield, with_pairs):
    """Documents alone, or with judged pairs: the cell it ends with is small, and loses little in the real search."""
    documents, queries, judged = cranfield
    pairs = (queries[judged[0]], documents[judged[1]]) if with_pairs else None
    advice = advise(documents, pairs=pairs)
    assert advice.measure == ("nDCG@10" if with_pairs else "3-recall@10")
    assert advice.gained
    cell = advice.cell
    assert cell.bytes <= 32
    assert cell.kept >= 0.95
    codes = advice.rotation.encode(documents, cell.dim, cell.precision)
    assert codes.nbytes == cell.bytes * len(documents)
    full = searched(unit_length(queries) @ unit_length(documents).T, judged)
    assert full == pytest.approx(0.395, abs=0.001)
    assert searched(advice.rotation.scores(queries, codes, cell.dim, cell.precision), judged) >= 0.95 * full
