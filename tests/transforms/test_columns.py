"""What is taken of a data set for a fit, and what is refused."""

from __future__ import annotations

import pytest

from mipic_st.transforms.columns import text_columns
from mipic_st.transforms.rotation import rotate_model
from transforms_fixtures import DIMS


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"anchor": "abc", "positive": "def", "negative": "ghi"}, {"anchor": "abc", "positive": "def"}),
        ({"text": "abc", "label": [0, 1, 2]}, {"text": "abc"}),
        ({"s1": "abc", "s2": "def", "score": [0.0, 0.8, 1.0]}, {"s1": "bc", "s2": "ef"}),
        ({"s1": "abc", "s2": "def", "score": [0.0, 4.2, 5.0]}, {"s1": "bc", "s2": "ef"}),
        ({"s1": "abc", "s2": "def", "label": [1, 0, 1]}, {"s1": "ac", "s2": "df"}),
        ({"id": [1, 2, 3], "s1": "abc", "s2": "def"}, {"s1": "abc", "s2": "def"}),
        ({"s1": "abc", "s2": "def", "labels": [0.0, 1.0, 1.0]}, {"s1": "bc", "s2": "ef"}),
        ({"s1": "abc", "s2": "def", "similarity_score": [0.1, 0.9, 0.3]}, {"s1": "b", "s2": "e"}),
        ({"s1": "abc", "s2": "def", "score": [-1, 1, 1]}, {"s1": "bc", "s2": "ef"}),
        ({"s1": "abc", "s2": "def", "score": [0, 3, 4]}, {"s1": "c", "s2": "f"}),
        ({"s1": "abc", "s2": "def", "s3": "ghi", "label": [0.3, 9.0, 18.2]}, {"s1": "abc", "s2": "def"}),
        ({"s1": "abc", "s2": "def", "label": [[[0.1], [0.2]]] * 3}, {"s1": "abc", "s2": "def"}),
    ],
    ids=str,
)
def test_what_is_taken_of_a_dataset(columns, expected):
    """The first two text columns; of scored pairs those that belong together."""
    from datasets import Dataset

    got = text_columns(Dataset.from_dict({name: list(values) for name, values in columns.items()}))
    assert got == {name: list(values) for name, values in expected.items()}


@pytest.mark.parametrize(
    ("columns", "error", "message"),
    [
        ({"s1": "abc", "s2": "def", "label": [0, 1, 2]}, ValueError, "which of them says that"),
        ({"s1": "abc", "s2": "def", "labels": [0, 1, 4]}, ValueError, r"'labels' of data holds \[0, 1, 4\], and which"),
        ({"s1": "abc", "s2": "def", "label": ["yes", "no", "yes"]}, ValueError, "'label' of data holds no numbers"),
        ({"s1": "abc", "s2": [None, "e", "f"], "s3": "ghi"}, TypeError, "column 's2' of data .* it holds None"),
        ({"s1": "abc", "s2": "def", "score": [0.1, 0.2, 0.3]}, ValueError, "no row of data has a score of 0.8"),
        ({"s1": "abc", "s2": "def", "score": [0.1, float("nan"), 1.0]}, ValueError, "no finite numbers"),
        ({"number": [1, 2, 3]}, ValueError, "no column of texts"),
        ({"text": []}, ValueError, "data has no rows"),
        ("one text", TypeError, "got one text"),
        (["a", 3], TypeError, "it holds 3"),
        ([], ValueError, "data has no texts"),
        (5, TypeError, "data must be a sequence"),
    ],
    ids=str,
)
def test_unusable_data_is_named(tiny_model, columns, error, message):
    """What is wrong with the data, before anything is encoded."""
    from datasets import Dataset

    data = Dataset.from_dict({k: list(v) for k, v in columns.items()}) if isinstance(columns, dict) else columns
    with pytest.raises(error, match=message):
        rotate_model(tiny_model(), data, DIMS)
