"""Reading pairs: every format and column name gives the same rows; whatever is wrong is said."""

import json
import re

import pandas as pd
import pytest

from mipic_st.data import (
    SCORED_COLUMNS,
    SUFFIXES,
    is_scored,
    load_sts_file,
    load_texts_file,
    load_training_file,
    load_training_hub,
)

# Texts that readers like to turn into something else.
TEXTS = ["None", "NA", "1.50", "2020-01-01", 'He said "no", twice', "comma, and ünïcode 日本", "null"]
PAIRS = {"anchor": TEXTS, "positive": TEXTS[::-1]}
SCORED = {"sentence1": TEXTS, "sentence2": TEXTS[::-1], "score": [0.0, 1.0, 2.5, 3.0, 4.0, 5.0, 0.5]}


def write(path, columns):
    """Write columns with each format's own usual writer."""
    path.parent.mkdir(exist_ok=True)
    frame = pd.DataFrame(columns)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".tsv":
        rows = [list(columns), *zip(*columns.values(), strict=True)]
        path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".jsonl":
        rows = frame.to_dict("records")
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    else:
        frame.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("columns", [PAIRS, {**PAIRS, "negative": TEXTS}, SCORED], ids=["pairs", "triplets", "scored"])
def test_every_format_gives_the_rows_as_written(tmp_path, suffix, columns):
    """What was written comes back, text as text, in the standard order of columns."""
    data = load_training_file(write(tmp_path / f"data{suffix}", columns))
    assert data.to_dict() == columns
    assert data.column_names == list(columns)
    assert is_scored(data) == ("score" in columns)


def test_upper_case_suffix_and_string_path(tmp_path):
    """The suffix may be in capitals, the path a string."""
    path = write(tmp_path / "data.csv", PAIRS)
    assert load_training_file(str(path.rename(tmp_path / "DATA.CSV"))).num_rows == len(TEXTS)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("Query", "Positive", "NEG"), ["anchor", "positive", "negative"]),
        (("question", "answer", "topic"), ["anchor", "positive"]),
        (("sentence_A", "sentence_B", "relatedness_score"), ["sentence1", "sentence2", "score"]),
        (("question1", "question2", "is_duplicate"), ["sentence1", "sentence2", "score"]),
        (("Text1", "text2", "similarity"), ["sentence1", "sentence2", "score"]),
    ],
)
def test_common_column_names(tmp_path, names, expected):
    """Common names are recognised in any case and any order; other columns are left out."""
    columns = dict(zip(names, (["a b"], ["c d"], ["1"]), strict=True))
    path = write(tmp_path / "data.csv", {"id": ["7"], **dict(reversed(columns.items()))})
    assert load_training_file(path).column_names == expected


def test_score_name_wins_over_label(tmp_path):
    """With several columns that could be the score, the one called score is taken."""
    path = write(tmp_path / "data.csv", {"label": [1], "sentence1": ["a"], "sentence2": ["b"], "score": [0.25]})
    assert load_sts_file(path)["score"][:] == [0.25]
    assert SCORED_COLUMNS["score"][0] == "score"


@pytest.mark.parametrize("name", ["Label", "is_duplicate"])
def test_classes_are_not_scores(tmp_path, name):
    """Three classes under a label's name are refused, since the highest may say that the texts contradict each other.

    Yes or no, fractions, and a name that says similarity are scores; texts alone need none.
    """
    texts = {"sentence1": ["a", "b", "c"], "sentence2": ["d", "e", "f"]}
    classes = write(tmp_path / "nli.csv", {**texts, name: [0, 1, 2]})
    for load in (load_training_file, load_sts_file):
        with pytest.raises(ValueError, match="classes"):
            load(classes)
    assert load_texts_file(classes) == list("abcdef")
    for column, scores in ((name, [0, 1, 1]), (name, [0.0, 1.5, 2.0]), ("score", [0, 1, 2])):
        assert load_sts_file(write(tmp_path / "sts.csv", {**texts, column: scores}))["score"][:] == scores


def test_pairs_win_over_scores(tmp_path):
    """A training file with both shapes is read as pairs, while evaluation takes the scored columns."""
    path = write(tmp_path / "data.csv", {**SCORED, **PAIRS})
    assert load_training_file(path).column_names == ["anchor", "positive"]
    assert load_sts_file(path).column_names == ["sentence1", "sentence2", "score"]


@pytest.mark.parametrize(
    ("names", "last"),
    [
        (("query", "answer"), "label"),
        (("anchor", "positive"), "score"),
        (("question", "answer"), "is_duplicate"),
        (("anchor", "positive"), "labels"),
    ],
)
def test_pairs_that_a_column_tells_apart_are_refused(tmp_path, caplog, names, last):
    """Those that do not belong together would be positives. One value throughout tells nothing; texts need none."""
    texts = dict(zip(names, (["a", "b"], ["c", "d"]), strict=True))
    path = write(tmp_path / "data.csv", {**texts, last: [1, 0]})
    with pytest.raises(ValueError, match=f"numbers that differ between them in the column '{last}'"):
        load_training_file(path)
    assert load_texts_file(path) == list("abcd")
    assert load_training_file(write(tmp_path / "same.csv", {**texts, last: [1, 1]})).num_rows == 2
    triplets = write(tmp_path / "triplets.csv", {**texts, "negative": ["e", "f"], last: [0.5, 0.1]})
    assert load_training_file(triplets).column_names == ["anchor", "positive", "negative"], "a margin"
    assert not caplog.text
    topics = write(tmp_path / "topics.csv", {**texts, last: ["tech", "food"]})
    assert load_training_file(topics).column_names == ["anchor", "positive"]
    assert f"the columns ['{last}'] are left out, which look like labels" in caplog.text, "they may mean yes and no"


WORDS = [["True", "False", "true"], ["yes", "no", "yes"], ["T", "F", "T"]]
FLAGS = [[True, False, True], *WORDS, [1, 0, 1], [1.0, 0.0, None]]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("name", ["label", "Score", "Similarity-Score"])
def test_flags_are_labels_in_every_format(tmp_path, suffix, flags, name):
    """Pairs that they tell apart are refused, and as a score they are 1 and 0, however a file writes them."""
    texts = {"anchor": list("abc"), "positive": list("def")}
    with pytest.raises(ValueError, match=f"numbers that differ between them in the column '{name}'"):
        load_training_file(write(tmp_path / f"pairs{suffix}", {**texts, name: flags}))
    if None not in flags:
        scored = {"sentence1": list("abc"), "sentence2": list("def"), name: flags}
        assert load_sts_file(write(tmp_path / f"sts{suffix}", scored))["score"][:] == [1, 0, 1]


@pytest.mark.parametrize(
    ("column", "named"),
    [
        ([0, 1, 1], True),
        (["True", "False", "True"], True),
        ([3, 1, 2], True),
        ([1, 1, 1], False),
        (["tech", "food", "tech"], False),
        ([[1.0], [2.0], [3.0]], False),
    ],
)
def test_unknown_columns_that_look_like_labels_are_named(tmp_path, caplog, column, named):
    """The pairs are taken, all of them as belonging together, which may not be meant."""
    path = write(tmp_path / "pairs.jsonl", {"anchor": list("abc"), "positive": list("def"), "Gold": column})
    assert load_training_file(path).column_names == ["anchor", "positive"]
    assert ("the columns ['Gold'] are left out" in caplog.text) == named


def test_numbers_of_rows_are_no_labels(tmp_path, caplog):
    """There are as many of them as rows."""
    texts = [str(number) for number in range(20)]
    load_training_file(write(tmp_path / "pairs.csv", {"id": texts, "anchor": texts, "positive": texts}))
    assert not caplog.text


@pytest.mark.parametrize(
    ("names", "clear"),
    [
        (["entailment", "not_entailment"], False),
        (["equivalent", "different"], False),
        (["similar", "unsimilar"], False),
        (["not_duplicate", "duplicate"], True),
        (["Not Equivalent", "Equivalent"], True),
        (["False", "True"], True),
        (["yes", "no"], False),
        (["0", "1"], True),
    ],
)
def test_the_names_of_classes_say_what_1_means(monkeypatch, tmp_path, names, clear):
    """In GLUE's RTE and QNLI, 1 is for texts that do not belong together."""
    import datasets

    features = datasets.Features(
        {
            "sentence1": datasets.Value("string"),
            "sentence2": datasets.Value("string"),
            "label": datasets.ClassLabel(names=names),
        }
    )
    rows = {"sentence1": list("abc"), "sentence2": list("def"), "label": [0, 1, 1]}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(rows, features=features))
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set.parquet")
    for load, place in ((load_training_hub, "some/set"), (load_sts_file, tmp_path / "set.parquet")):
        if clear:
            assert load(place)["score"][:] == [0, 1, 1]
        else:
            with pytest.raises(ValueError, match=re.escape(f"holds the classes {names}, which do not say")):
                load(place)


@pytest.mark.parametrize("header", ["text,text", "text,Text"])
def test_two_columns_of_texts_of_one_name_are_refused(tmp_path, header):
    """Of which one would be taken."""
    (tmp_path / "texts.csv").write_text(f"{header}\na,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match="share a name"):
        load_texts_file(tmp_path / "texts.csv")


def test_scores_stay_as_they_are(tmp_path):
    """Whatever their range is."""
    path = write(tmp_path / "data.csv", SCORED)
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "train.parquet", SCORED)
    for load in (load_sts_file, load_training_file, lambda _: load_training_hub(str(tmp_path / "hub"))):
        assert load(path)["score"][:] == SCORED["score"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.csv", b"anchor, positive\r\nx,y\r\n"),
        ("data.tsv", b"anchor\tpositive \nx\ty\n"),
        ("data.jsonl", b'{"anchor": "x", " positive": "y"}\n'),
    ],
)
def test_byte_order_mark_and_spaces_in_the_header(tmp_path, name, content):
    """Files as spreadsheets and editors write them are read, spaces around column names are ignored."""
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + content)
    assert load_training_file(path).to_dict() == {"anchor": ["x"], "positive": ["y"]}


def test_tsv_quotes_are_text(tmp_path):
    """A lone quotation mark in a TSV neither swallows rows nor fails."""
    path = tmp_path / "data.tsv"
    path.write_text('anchor\tpositive\n"open\tb\nc\td"\n', encoding="utf-8")
    assert load_training_file(path).to_dict() == {"anchor": ['"open', "c"], "positive": ["b", 'd"']}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"anchor,other\nx,y\n", "has the columns ['anchor', 'other'], expected (anchor, positive) or"),
        ("a.csv", b"anchor,positive\n", "has the columns ['anchor', 'positive'] but no rows"),
        ("a.csv", b"", "is empty"),
        ("a.jsonl", b"", "expected (anchor, positive)"),
        ("a.csv", b"anchor,positive\nx,y\nx, \n", "Row 2 in column 'positive' of"),
        ("a.csv", b"anchor,positive\nx,y\nx\n", "Row 2 in column 'positive' of"),
        ("a.csv", b'anchor,positive\n"x,y\nx,y\n', "as csv"),
        ("a.csv", b"anchor,positive\nx,y,z\n", "rows have more fields than the header has names"),
        ("a.csv", b"anchor,positive\nx,y\nx,y,z\n", "Expected 2 fields in line 3, saw 3"),
        ("a.csv", b"anchor,positive\n\xff\xfe,y\n", "as csv"),
        ("a.jsonl", b'{"anchor": "x"\n', "as jsonl"),
        ("a.jsonl", b'{"anchor": "x", "positive": 3}\n', "must be a text that is not empty, got 3"),
        ("a.jsonl", b'{"anchor": "x", "positive": "y"}\n{"anchor": "z"}\n', "Row 2 in column 'positive' of"),
        ("a.jsonl", b'{"anchor": "x", "positive": null}\n', "got None. Fill it or leave the row out"),
        ("a.csv", b'anchor,positive\nx,""\n', "got ''. Fill it or leave the row out"),
        ("a.csv", b"anchor,anchor,positive\nx,y,z\n", "the columns ['anchor', 'anchor'] share a name"),
        ("a.csv", b"Anchor,positive,anchor \nx,y,z\n", "the columns ['Anchor', 'anchor '] share a name"),
        ("a.tsv", b"anchor\tpositive\tpositive\nx\ty\tz\n", "the columns ['positive', 'positive'] share a name"),
        ("a.jsonl", b'{"anchor": "x", "positive": "y", "POSITIVE": "z"}\n', "['positive', 'POSITIVE'] share a name"),
        ("a.parquet", b"no parquet", "as parquet"),
        ("a.txt", b"x", "must end in one of .csv, .tsv, .jsonl, .parquet"),
        ("a.csv", b"sentence1,sentence2,score\na,b,1\na,b,high\n", "Row 2 in column 'score' of"),
        ("a.csv", b"sentence1,sentence2,score\na,b,nan\n", "must be a finite number, got 'nan'"),
        ("a.csv", b"sentence1,sentence2,score\na,b,\n", "must be a finite number, got ''"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    """The error says which file, and what is wrong where."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_training_file(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    """A file that is not there is named, a folder is no file."""
    for path in (tmp_path / "no.csv", tmp_path):
        with pytest.raises((FileNotFoundError, ValueError), match=re.escape(str(path))):
            load_training_file(path)


def test_evaluation_needs_scores(tmp_path):
    """Pairs cannot be evaluated: the expected columns are named."""
    with pytest.raises(ValueError, match=re.escape("expected (sentence1, sentence2, score)")):
        load_sts_file(write(tmp_path / "data.csv", PAIRS))


def test_hub_loader_takes_a_folder_and_a_split(tmp_path, monkeypatch):
    """load_training_hub passes name and split on, and names the columns as the file loader does."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    write(folder / "train.parquet", {"query": TEXTS, "answer": TEXTS})
    assert load_training_hub(str(folder), split="train[:3]").to_dict() == {"anchor": TEXTS[:3], "positive": TEXTS[:3]}


def test_hub_configuration_follows_the_colon(monkeypatch):
    """NAME:CONFIG is split into both, and a wrong column is reported with the name."""
    import datasets

    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=re.escape("some/set:part (train) has the columns ['text']")):
        load_training_hub("some/set:part")
    assert calls == [(("some/set", "part"), {"split": "train"})]


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (ConnectionError("no network"), ConnectionError, "HF_HUB_OFFLINE is not set, or use a file"),
        (FileNotFoundError("nothing there"), ValueError, "Cannot load split 'train' of the data set 'some/set'"),
        (ValueError("Unknown split"), ValueError, "Unknown split"),
    ],
)
def test_hub_errors_say_what_to_do(monkeypatch, raised, expected, message):
    """Errors of the hub come with the data set's name and the way out."""
    import datasets

    def load_dataset(*_, **__):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(expected, match=re.escape(message)):
        load_training_hub("some/set")


def test_missing_extra_gives_the_command(monkeypatch, tmp_path):
    """Without datasets, the error names the extra to install."""
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=re.escape('pip install "mipic-st[train]"')):
        load_training_file(tmp_path / "data.csv")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "\ufeffone\n\n two \none\n", ["one", "two"]),
        ("a.txt", "one\r\ntwo \u2028 parts\x0c\n", ["one", "two \u2028 parts"]),
        ("a.csv", "text,label\none,1\ntwo,2\n", ["one", "two"]),
        ("a.jsonl", '{"sentence": "one"}\n', ["one"]),
        ("a.csv", "anchor,positive,negative\na,b,c\nd,b,e\n", ["a", "d", "b", "c", "e"]),
        ("a.csv", "sentence1,sentence2,score\na,b,0.5\n", ["a", "b"]),
        ("a.csv", "query,document\na,b\n", ["a", "b"]),
        ("a.csv", "id,document\n1,b\n", ["b"]),
        ("a.csv", "query\na\n", ["a"]),
    ],
)
def test_texts_of_a_file(tmp_path, name, content, expected):
    """Lines, a column of texts, or both sides of pairs; each text once."""
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert load_texts_file(tmp_path / name) == expected


def test_columns_of_other_names(tmp_path):
    """Named columns are the pairs or the texts, whatever else there is; query and document need no names."""
    path = write(
        tmp_path / "data.csv", {"label": [0, 1], "Frage": ["a", "c"], "Antwort": ["b", "d"], "text": ["x", "y"]}
    )
    assert load_training_file(path, columns=["Frage", "Antwort"]).to_dict() == {
        "anchor": ["a", "c"],
        "positive": ["b", "d"],
    }
    assert load_texts_file(path, columns=["Antwort"]) == ["b", "d"]
    assert load_texts_file(path, columns=["Frage", "Antwort"]) == ["a", "c", "b", "d"]
    with pytest.raises(ValueError, match=r"has the columns .*'Frage'.*, but not \['Question'\]"):
        load_training_file(path, columns=["Question", "Antwort"])
    for wrong in ([], ["Frage", "Antwort", "text"], ["Frage", "Frage"]):
        with pytest.raises(ValueError, match="one column of texts or two of pairs"):
            load_training_file(path, columns=wrong)
    with pytest.raises(TypeError, match="columns must be a sequence"):
        load_training_file(path, columns="Frage")
    pairs = write(tmp_path / "pairs.csv", {"document": ["b"], "query": ["a"]})
    assert load_training_file(pairs).to_dict() == {"anchor": ["a"], "positive": ["b"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "as UTF-8"),
        ("a.csv", b"number\n1\n", r"expected \(text\) or \(anchor, positive\)"),
        ("a.doc", b"text", "Cannot tell the format"),
    ],
)
def test_files_without_texts_are_named(tmp_path, name, content, message):
    """Empty, not UTF-8, without a column of texts, of an unknown kind."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_texts_file(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_texts_file(tmp_path / f"none{name[1:]}") if name.endswith("txt") else load_texts_file(tmp_path / "n.txt")


def test_columns_of_the_hub(monkeypatch):
    """Named there too, and a label beside them is left out."""
    datasets = pytest.importorskip("datasets")
    loaded = datasets.Dataset.from_dict({"q": ["a", "b"], "label": [0, 1], "d": ["c", "e"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    assert load_training_hub("some/set", columns=["q", "d"]).to_dict() == {"anchor": ["a", "b"], "positive": ["c", "e"]}
    with pytest.raises(ValueError, match=r"some/set \(train\) has the columns .*, but not \['x'\] of columns="):
        load_training_hub("some/set", columns=["q", "x"])
