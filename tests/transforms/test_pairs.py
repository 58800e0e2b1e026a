"""Which vectors belong together: repeated texts, rows held out, neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mipic_st.transforms.pairs import Pairs
from mipic_st.transforms.rotation import rotate_model
from transforms_fixtures import DIMS, ROTATE, TEXTS, hidden_signal, unit


def test_repeated_texts_are_no_negatives_and_never_on_both_sides():
    """A text that comes twice stays on one side of the split, and its copies are masked in a batch."""
    anchors, positives = hidden_signal(60)
    anchors, positives = (torch.tensor(np.concatenate([vectors, vectors[:30]])) for vectors in (anchors, positives))
    pairs = Pairs.of(anchors, positives)
    training, test = pairs.split(0.2, torch.Generator().manual_seed(0))
    assert not set(training.ids.flatten().tolist()) & set(test.ids.flatten().tolist())
    first, second, others, same = pairs.batch(torch.tensor([0, 60, 1]), 2)
    assert same.tolist() == [[False, True, False], [True, False, False]]
    assert [len(part) for part in (first, second, others)] == [2, 2, 1]


def test_repeated_rows_of_texts_count_once():
    """Texts only: copies are left out, and no text is its own neighbour."""
    vectors = torch.tensor(hidden_signal(50)[0])
    pairs = Pairs.of(torch.cat([vectors, vectors[:10]]), None).with_positives()
    assert len(pairs) == 50
    assert (pairs.ids[:, 0] != pairs.ids[:, 1]).all()
    cosines = unit(vectors.numpy()) @ unit(vectors.numpy()).T
    np.fill_diagonal(cosines, -2)
    np.testing.assert_array_equal(pairs.rows[:, 1].numpy(), cosines.argmax(axis=1))


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
    assert pairs.texts == len({*columns["anchor"], *columns["positive"]})
    assert len(pairs) == sum(one != other for one, other in zip(*columns.values(), strict=True))
