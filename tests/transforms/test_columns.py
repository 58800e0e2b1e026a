"""What is taken of a data set for a fit, and what is refused."""

from __future__ import annotations

import pytest

from mipic_st.transforms.columns import as_dataset, scored_pairs, text_columns
from mipic_st.transforms.layer_cut import fit_layer_cuts
from mipic_st.transforms.model_rotation import rotate_model
from transforms_fixtures import DIMS

try:
    import polars
except ImportError:
    polars = None


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"anchor": "abc", "positive": "def", "negative": "ghi"}, {"anchor": "abc", "positive": "def"}),
        ({"text": "abc", "label": [0, 1, 2]}, {"text": "abc"}),
        ({"s1": "abc", "s2": "def", "score": [0.0, 0.8, 1.0]}, {"s1": "bc", "s2": "ef"}),
        ({"s1": "abc", "s2": "def", "score": [0.0, 4.2, 5.0]}, {"s1": "bc", "s2": "ef"}),
        ({"s1": "abc", "s2": "def", "label": [1, 0, 1]}, {"s1": "ac", "s2": "df"}),
        ({"s1": "abc", "s2": "def", "Is-Duplicate ": [1, 0, 1]}, {"s1": "ac", "s2": "df"}),
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
        ({"s1": "abc", "s2": "def", "label": [0, 1, 2]}, ValueError, "which look like classes"),
        (
            {"s1": "abc", "s2": "def", "labels": [0, 1, 4]},
            ValueError,
            r"'labels' of data holds \[0, 1, 4\], which look like",
        ),
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


COLUMNS = {"number": [1, 2, 3], "anchor": list("abc"), "positive": list("def"), "Score": [1.0, 0.2, 0.9]}


def tables():
    """The same table in all the ways in which people hold one."""
    import pandas as pd
    import pyarrow as pa
    from datasets import Dataset

    data = Dataset.from_dict(COLUMNS)
    frame = pd.DataFrame(COLUMNS)
    return {
        "dataset": data,
        "dict": COLUMNS,
        "frame": frame,
        "frame with an index": frame.set_index(frame.number + 7),
        "stream": data.to_iterable_dataset(),
        "dict of series": dict(frame),
        "dict of arrays": {name: frame[name].to_numpy() for name in frame},
        "arrow": pa.table(COLUMNS),
    } | ({"polars": polars.DataFrame(COLUMNS)} if polars else {})


@pytest.mark.parametrize("kind", [*tables()])
def test_tables_of_all_kinds(kind):
    """The same pairs; a column of scores is one in whatever case its name is written."""
    assert text_columns(as_dataset(tables()[kind])) == {"anchor": ["a", "c"], "positive": ["d", "f"]}


def test_columns_that_the_first_row_of_a_stream_lacks_count():
    """Labels that come later, too: pairs marked unlike are not learned as alike."""
    from datasets import IterableDataset

    rows = [{"a": f"a{n}", "b": f"b{n}"} | ({"label": n % 2} if n else {}) for n in range(6)]
    data = as_dataset(IterableDataset.from_generator(lambda: iter(rows)))
    assert data.column_names == ["a", "b", "label"]
    with pytest.raises(ValueError, match="column 'label' of data holds values that are no finite numbers"):
        text_columns(data)
    rows[0]["label"] = 0
    assert text_columns(as_dataset(IterableDataset.from_generator(lambda: iter(rows)))) == {
        "a": ["a1", "a3", "a5"],
        "b": ["b1", "b3", "b5"],
    }


def test_half_a_character_is_named():
    """A lone surrogate, which tokenizers refuse in words of their own."""
    with pytest.raises(ValueError, match=r"data holds half a character in row 1, which no tokenizer takes: leave"):
        text_columns(["a", "b\ud800"])


def test_a_long_stream_is_cut(monkeypatch, caplog):
    """Of one that never ends, the first rows are used, and the log says so."""
    from datasets import IterableDataset

    def endless():
        while True:
            yield {"text": "a"}

    monkeypatch.setattr("mipic_st.transforms.columns._STREAMED", 5)
    stream = IterableDataset.from_generator(endless)
    assert text_columns(as_dataset(stream)) == {"text": ["a"] * 5}
    assert "a stream of more than 5 rows, of which the first are used" in caplog.text


@pytest.mark.parametrize("wrap", [dict, "DatasetDict", "IterableDatasetDict", "frames", "dicts"])
def test_several_data_sets_are_refused(tiny_model, wrap):
    """Their names are no texts, however many there are."""
    import datasets

    one = datasets.Dataset.from_dict({"text": ["a", "b"]})
    made = {"IterableDatasetDict": one.to_iterable_dataset, "frames": one.to_pandas, "dicts": one.to_dict}
    one = made[wrap]() if wrap in made else one
    several = getattr(datasets, str(wrap), dict)({f"part{number}": one for number in range(50)})
    with pytest.raises(TypeError, match=r"data holds several data sets, .*'part0'.*: give one of them"):
        rotate_model(tiny_model(), several, DIMS)


def test_tables_are_no_lists_of_texts(tiny_model):
    """Where texts are wanted, names of columns are not taken for them."""
    for kind, table in tables().items():
        with pytest.raises(TypeError, match=r"texts must be a list of texts, got a table with the columns \['number'"):
            fit_layer_cuts(tiny_model(), table)
        assert kind


def test_columns_of_different_lengths_are_refused(tiny_model):
    """A dict that is no table."""
    with pytest.raises(ValueError, match="data is no table of columns of equal lengths"):
        rotate_model(tiny_model(), {"a": ["x", "y"], "b": ["z"]}, DIMS)


@pytest.mark.parametrize(
    ("names", "fine"), [(["not_equivalent", "equivalent"], True), (["entailment", "not_entailment"], False)]
)
def test_names_of_classes_are_read(names, fine):
    """In some data sets 1 says that the texts do not belong together."""
    from datasets import ClassLabel, Dataset

    data = Dataset.from_dict({"s1": list("abc"), "s2": list("def"), "label": [0, 1, 1]})
    data = data.cast_column("label", ClassLabel(names=names))
    scored = data.rename_columns({"s1": "sentence1", "s2": "sentence2", "label": "score"})
    if fine:
        assert text_columns(data)["s1"] == ["b", "c"]
        assert scored_pairs(scored)[2] == [0, 1, 1]
        return
    for read in (text_columns, lambda data: text_columns(as_dataset(data.to_iterable_dataset()))):
        with pytest.raises(ValueError, match=r"holds the classes \['entailment', 'not_entailment'\]"):
            read(data)
    with pytest.raises(ValueError, match=r"'score' of sts holds the classes"):
        scored_pairs(scored)


@pytest.mark.parametrize(
    ("name", "values", "named"),
    [
        ("gold", [0, 1, 1], True),
        ("match", [True, False, True], True),
        ("number", list(range(20)), False),
        ("weight", [1.0] * 3, False),
    ],
)
def test_columns_that_look_like_labels_are_named(caplog, name, values, named):
    """All pairs are used, which may not be meant."""
    from datasets import Dataset

    texts = [str(number) for number in range(len(values))]
    assert len(text_columns(Dataset.from_dict({"s1": texts, name: values, "s2": texts}))["s1"]) == len(values)
    assert (f"the columns [{name!r}] are left out, which look like labels" in caplog.text) == named
