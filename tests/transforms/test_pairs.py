"""Which vectors belong together: repeated texts, rows held out, neighbours."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from mipic_st.transforms.model_rotation import rotate_model
from mipic_st.transforms.pairs import Pairs
from transforms_fixtures import DIMS, ROTATE, TEXTS, hidden_signal


def test_repeated_texts_are_no_negatives():
    """Copies of a pair, and an anchor among the positives, are masked in a batch."""
    anchors, positives = hidden_signal(60)
    anchors, positives = (torch.tensor(np.concatenate([vectors, vectors[:30]])) for vectors in (anchors, positives))
    pairs = Pairs.of(anchors, positives)
    training, test = pairs.split(0.2, torch.Generator().manual_seed(0))
    assert not set(training.ids.flatten().tolist()) & set(test.ids.flatten().tolist())
    first, second, others, same = pairs.batch(torch.tensor([0, 60, 1]), 2)
    assert same.tolist() == [[False, True, False], [True, False, False]]
    assert [len(part) for part in (first, second, others)] == [2, 2, 1]


@pytest.mark.parametrize("shared", [False, True])
def test_several_positives_of_one_query(caplog, shared):
    """Held out by query, none the other's negative, no row lost unless the log says how many."""
    random = np.random.default_rng(0)
    queries = random.normal(size=(100, 8)).astype(np.float32)
    answers = random.normal(size=(300 if shared else 2000, 8)).astype(np.float32)
    number = np.arange(2000) % 300 if shared else np.arange(2000)
    pairs = Pairs.of(torch.tensor(queries[np.arange(2000) % 100]), torch.tensor(answers[number]))
    with caplog.at_level(logging.INFO):
        training, test = pairs.split(0.1, torch.Generator().manual_seed(0))
    assert (len(training), len(test)) == (1800, 200)
    assert not set(training.ids[:, 0].tolist()) & set(test.ids[:, 0].tolist())
    assert caplog.text == ""
    rows = torch.arange(250)
    *_, same = training.batch(rows, 100)
    known = {tuple(pair) for pair in pairs.ids.tolist()}
    anchor, positive = training.ids[:100, 0].tolist(), training.ids[rows, 1].tolist()
    assert same.tolist() == [[j != i and (a, p) in known for j, p in enumerate(positive)] for i, a in enumerate(anchor)]
    assert same.any()


def test_rows_that_share_a_text_with_held_out_queries_are_counted(caplog):
    """A chain: each positive is the next anchor."""
    chain = torch.tensor(hidden_signal(101)[0])
    with caplog.at_level(logging.INFO):
        training, test = Pairs.of(chain[:100], chain[1:]).split(0.1, torch.Generator().manual_seed(0))
    left_out = 100 - len(training) - len(test)
    assert left_out > 10
    assert f"{left_out} of 100 pairs share a text with held-out queries" in caplog.text
    # an anchor of a training pair is nothing that was held out
    assert not set(training.ids[:, 0].tolist()) & set(test.ids.flatten().tolist())


def test_a_text_of_both_columns_is_one_text(tiny_model):
    """Encoded apart, it is padded otherwise, and rounding makes two texts of it, one the other's negative."""
    from datasets import Dataset

    model = tiny_model(normalize=True)
    columns = {"anchor": TEXTS[:200], "positive": TEXTS[:60] + TEXTS[260:200:-1] + TEXTS[60:140]}
    fitted = []
    with pytest.MonkeyPatch.context() as patch:
        original = Pairs.of.__func__
        patch.setattr(Pairs, "of", classmethod(lambda cls, *given: fitted.append(original(cls, *given)) or fitted[-1]))
        rotate_model(model, Dataset.from_dict(columns), DIMS, **ROTATE)
    (pairs,) = fitted
    assert len(pairs.ids.unique()) == len(
        {text for one, other in zip(*columns.values(), strict=True) if one != other for text in (one, other)}
    )
    assert len(pairs) == sum(one != other for one, other in zip(*columns.values(), strict=True))
