"""Read training and evaluation pairs from a file or from the Hugging Face hub, under one set of column names.

Two shapes are understood, by the names of their columns (case does not matter): pairs, ``anchor, positive`` and perhaps
``negative``, for contrastive losses; and scored pairs (STS), ``sentence1, sentence2, score``. Other columns are left
out, and named where they look like labels. Pairs that a column of labels tells apart are refused: those that do not
belong together would be learned as if they did. Scores keep their range.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mipic_st.validation import as_list, require

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

#: Columns of the two shapes, each with the other names it is known by, most telling first.
PAIR_COLUMNS: dict[str, tuple[str, ...]] = {
    "anchor": ("anchor", "query", "question"),
    "positive": ("positive", "pos", "answer", "document"),
}
NEGATIVE_COLUMN: tuple[str, ...] = ("negative", "neg", "hard_negative")
SCORED_COLUMNS: dict[str, tuple[str, ...]] = {
    "sentence1": ("sentence1", "sentence_1", "sentence_a", "text1", "question1"),
    "sentence2": ("sentence2", "sentence_2", "sentence_b", "text2", "question2"),
    "score": ("score", "similarity", "similarity_score", "relatedness_score", "label", "is_duplicate"),
}
#: What the trainer's collator takes for the labels of a batch.
LABEL_COLUMNS: tuple[str, ...] = ("label", "labels", "score", "scores")
#: Those of them, and other names, that hold classes as often as degrees of similarity.
CLASS_COLUMNS: tuple[str, ...] = ("label", "labels", "is_duplicate")
#: All names under which a column may say which texts belong together, most telling first.
SCORE_NAMES: tuple[str, ...] = tuple(dict.fromkeys(("score", "scores", *SCORED_COLUMNS["score"], *LABEL_COLUMNS)))
TEXT_COLUMN: dict[str, tuple[str, ...]] = {"text": ("text", "sentence")}
#: One side of pairs, in a file that has no other.
_SIDE_COLUMN: dict[str, tuple[str, ...]] = {"text": ("document", "query")}
_SENTENCES = {name: SCORED_COLUMNS[name] for name in ("sentence1", "sentence2")}
_PAIRED = set().union(*PAIR_COLUMNS.values())
#: How files write flags, and what is not there.
TRUTHS: dict[str, float] = {"true": 1, "false": 0, "yes": 1, "no": 0, "t": 1, "f": 0, "y": 1, "n": 0}
MISSING: tuple[str, ...] = ("", "none", "nan", "null")
_MOST_CLASSES = 10
SUFFIXES: tuple[str, ...] = (".csv", ".tsv", ".jsonl", ".parquet")


def load_training_file(path: str | PathLike[str], *, columns: Sequence[str] | None = None) -> Dataset:
    """Read training data from a file, in either shape; one with both is read as pairs.

    Args:
        path: A ``.csv``, ``.tsv`` (no quoting), ``.jsonl`` (one object a line) or ``.parquet`` file, UTF-8, with named
            columns.
        columns: Names of the two columns that are the pairs, first and second text; others are left out. Default: the
            known names, e.g. anchor and positive, query and document, question and answer.

    Returns:
        Data set with the columns ``anchor, positive[, negative]`` or ``sentence1, sentence2, score``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, or does not hold what it should; the message names column and row.
        ImportError: If ``datasets`` is not installed.

    Example:
        >>> load_training_file("pairs.csv").column_names  # doctest: +SKIP
        ['anchor', 'positive']
    """
    return _select(_read(path, columns), (PAIR_COLUMNS, SCORED_COLUMNS), str(path))


def load_texts_file(path: str | PathLike[str], *, columns: Sequence[str] | None = None) -> list[str]:
    """Read texts without labels or scores from a file: each once, in the order of the file.

    ``path`` is a ``.txt`` file with one text a line, or a table as for :func:`load_training_file`: of this the one or
    two ``columns`` that are named, or the column ``text`` (or ``sentence``), or else both sides of its pairs, and their
    negatives, or a column ``document`` or ``query`` that is alone.

    Example:
        >>> load_texts_file("corpus.txt")[:2]  # doctest: +SKIP
        ['The first line.', 'The second one.']
    """
    file = Path(path)
    if file.suffix.lower() == ".txt":
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"Cannot read {path} as UTF-8: {error}") from error
        texts = [line.strip() for line in lines if line.strip()]
        if not texts:
            raise ValueError(f"{path} holds no text.")
    else:
        shapes = (TEXT_COLUMN, PAIR_COLUMNS, _SENTENCES, _SIDE_COLUMN)
        selected = _select(_read(path, columns), shapes, str(path))
        texts = [text for name in selected.column_names for text in selected[name]]
    return list(dict.fromkeys(texts))


def load_sts_file(path: str | PathLike[str]) -> Dataset:
    """Read scored pairs, ``sentence1, sentence2, score``, from a file; the rest is as in :func:`load_training_file`."""
    return _select(_read(path), (SCORED_COLUMNS,), str(path))


def load_training_hub(name: str, *, split: str = "train", columns: Sequence[str] | None = None) -> Dataset:
    """Load training data from the hub, or a folder of data files, in either shape.

    ``name`` has its configuration after a colon if there are several; ``split`` may be ``"train[:10000]"``. The rest is
    as in :func:`load_training_file`; if the hub cannot be reached, that is a ConnectionError.

    Example:
        >>> load_training_hub("sentence-transformers/all-nli:pair").column_names  # doctest: +SKIP
        ['anchor', 'positive']
    """
    datasets = _datasets()
    path, _, config = name.partition(":")
    if Path(name).exists():
        path, config = name, ""
    try:
        loaded = datasets.load_dataset(path, config or None, split=split)
    except ConnectionError as error:
        raise ConnectionError(
            f"The data set {name!r} is not in the local cache and the hub cannot be reached ({error}). Check the "
            "network and that HF_HUB_OFFLINE is not set, or use a file."
        ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot load split {split!r} of the data set {name!r}: {error}") from error
    if columns is not None:
        names = _named(columns, loaded.column_names, f"{name} ({split})")
        loaded = loaded.select_columns(list(names)).rename_columns(names)
    return _select(loaded, (PAIR_COLUMNS, SCORED_COLUMNS), f"{name} ({split})")


def is_scored(dataset: Dataset) -> bool:
    """Whether a data set loaded by this module holds scored pairs (else: anchor and positive)."""
    return "score" in dataset.column_names


def _datasets() -> Any:
    return require("datasets", "Reading data needs datasets", "train")


def _read(path: str | PathLike[str], columns: Sequence[str] | None = None) -> Dataset:
    """Read a file as it is, texts as texts; of named columns these only, under standard names."""
    datasets = _datasets()
    # datasets depends on pandas, whose readers need no cache folder on disk.
    import pandas as pd

    file = Path(path)
    classes: dict[str, Any] = {}
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"Cannot tell the format of {path}: the name must end in one of {', '.join(SUFFIXES)}.")
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        if suffix == ".parquet":
            import pyarrow.parquet as pq

            frame = pd.read_parquet(file)
            # the names of classes, which a frame has no place for
            noted = datasets.Features.from_arrow_schema(pq.read_schema(file))
            classes |= {name: kind for name, kind in noted.items() if hasattr(kind, "names")}
        elif suffix == ".jsonl":
            # "2020-01-01" or "1e5" in a text column must stay text.
            frame = pd.read_json(file, lines=True, dtype=False, convert_dates=False, encoding="utf-8-sig")
        else:
            # Sentences such as "None" or "NA" are no missing values. TSV has no quoting: a lone " would swallow rows.
            quoting = {"sep": "\t", "quoting": 3} if suffix == ".tsv" else {}
            frame = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8", **quoting)
            if not isinstance(frame.index, pd.RangeIndex):  # pandas takes surplus fields for an index
                raise ValueError("rows have more fields than the header has names (a comma that is not quoted?)")
            # pandas has renamed a repeated column by now
            header = pd.read_csv(file, header=None, nrows=1, dtype=str, keep_default_na=False, **quoting)
            _require_single(header.iloc[0].tolist())
    except pd.errors.EmptyDataError as error:
        raise ValueError(f"{path} is empty.") from error
    except (ValueError, OSError) as error:  # ParserError, UnicodeDecodeError and pyarrow's errors are ValueErrors
        raise ValueError(f"Cannot read {path} as {suffix[1:]}: {error}") from error
    if columns is not None:
        names = _named(columns, list(frame), str(path))
        frame = frame[list(names)].rename(columns=names)
    found = datasets.Dataset.from_pandas(frame, preserve_index=False)
    return found.cast(datasets.Features({**found.features, **classes})) if classes and columns is None else found


def _named(columns: Sequence[str], present: Sequence[str], source: str) -> dict[str, str]:
    """The columns that are asked for, with the standard name of each."""
    wanted = as_list("columns", columns, '["question", "answer"]')
    if len(set(wanted)) != len(wanted) or not 1 <= len(wanted) <= 2:
        raise ValueError(f"columns must be one column of texts or two of pairs, got {wanted}.")
    if missing := [name for name in wanted if name not in present]:
        raise ValueError(f"{source} has the columns {list(present)}, but not {missing} of columns={wanted}.")
    return dict(zip(wanted, ["text"] if len(wanted) == 1 else PAIR_COLUMNS, strict=True))


def _select(dataset: Dataset, shapes: Sequence[dict[str, tuple[str, ...]]], source: str) -> Dataset:
    """Keep the columns of the first shape that fits, under their standard names, and check their values."""
    try:
        _require_single(dataset.column_names)
    except ValueError as error:
        raise ValueError(f"Cannot use {source}: {error}") from error
    present = {plain_name(name): name for name in dataset.column_names}
    columns = next((found for shape in shapes if (found := _match(shape, present))), None)
    if columns is None:
        wanted = " or ".join(f"({', '.join(shape)})" for shape in shapes)
        raise ValueError(
            f"{source} has the columns {dataset.column_names}, expected {wanted}. Rename them to these names."
        )
    if not dataset.num_rows:
        raise ValueError(f"{source} has the columns {dataset.column_names} but no rows.")
    if "anchor" in columns:
        columns |= _match({"negative": NEGATIVE_COLUMN}, present) or {}
        if SCORED_COLUMNS in shapes and "negative" not in columns and not _match(SCORED_COLUMNS, present):
            _require_unscored(dataset, present, source)
    if "score" in columns:
        require_clear_classes(dataset, columns["score"], source)
    values: dict[str, list[Any]] = {}
    for name, original in columns.items():
        values[name] = column = list(dataset[original])
        where = f"column {original!r} of {source}"
        if name != "score":
            texts = [isinstance(text, str) and bool(text.strip()) for text in column]
            _require_all(texts, column, where, "be a text that is not empty")
            continue
        values[name] = scores = list(map(as_number, column))
        _require_all(list(map(math.isfinite, scores)), column, where, "be a finite number")
        require_degrees(original, scores, source)
    return _datasets().Dataset.from_dict(values)


def as_number(value: Any) -> float:
    """A number, or a flag as files write it (True, "false", "yes"); NaN for anything else."""
    try:
        return float(TRUTHS.get(plain_name(value), value) if isinstance(value, str) else value)
    except (TypeError, ValueError):  # texts such as topics, or vectors
        return math.nan


def _require_unscored(dataset: Dataset, present: dict[str, str], source: str) -> None:
    """Refuse pairs that a label's or score's column tells apart, and name other columns that look like one."""
    for original in (present[name] for name in SCORE_NAMES if name in present):
        if len(_numbers(dataset[original])) > 1:
            raise ValueError(
                f"{source} has pairs, and numbers that differ between them in the column {original!r}. If these say "
                "which pairs belong together, keep those rows; then leave the column out, of a file or with "
                "datasets' remove_columns. For scores, call the texts sentence1 and sentence2."
            )
    warn_of_labels(dataset, [original for name, original in present.items() if name not in _PAIRED], source)


def warn_of_labels(dataset: Dataset, others: Iterable[str], source: str) -> None:
    """Name the columns beside pairs that look like labels: a few numbers or flags, or a few words under such a name."""
    found = []
    for name in others:
        few = set(dataset[name]) if plain_name(name) in SCORE_NAMES and isinstance(dataset[0][name], str) else ()
        if 1 < len(few or _numbers(dataset[name])) <= _MOST_CLASSES:
            found.append(name)
    if found:
        logger.warning(
            "%s: every pair counts as belonging together, and the columns %s are left out, which look like labels. If "
            "these say which pairs belong together, keep those rows only.",
            source,
            found,
        )


def _numbers(values: Iterable[Any]) -> set[float]:
    """The different numbers or flags of a column, where it holds nothing else; what is missing does not count."""
    found = set()
    for value in values:
        if not math.isnan(number := as_number(value)):
            found.add(number)
        elif plain_name(str(value)) not in MISSING:
            return set()
    return found


def require_clear_classes(dataset: Dataset, column: str, source: str) -> None:
    """Refuse a column whose classes have names (GLUE's, for one) that do not say that 1 is what belongs together."""
    names = getattr(dataset.features[column], "names", None) or []
    first, *others = [plain_name(name) for name in names] or [""]
    counted = all(name.isdecimal() for name in (first, *others))
    opposed = len(others) == 1 and (first == f"not_{others[0]}" or (TRUTHS.get(first), TRUTHS.get(others[0])) == (0, 1))
    if names and not (counted or opposed):
        raise ValueError(
            f"Column {column!r} of {source} holds the classes {list(names)}, which do not say that texts of the second "
            "one belong together. Keep the pairs that do, as anchor and positive, without it, or make it scores."
        )


def require_degrees(name: str, scores: Sequence[float], source: str) -> None:
    """Refuse whole numbers under a label's name that are neither yes and no nor a scale."""
    found = set(scores)
    scale = plain_name(name) not in CLASS_COLUMNS or found <= {0, 1} or any(value != round(value) for value in found)
    if not scale:
        raise ValueError(
            f"Column {name!r} of {source} holds {sorted(map(int, found))[:5]}, which look like classes (in natural "
            "language inference, the highest is the contradiction). For degrees of similarity, name the column "
            "'score'; otherwise keep the pairs that belong together, as anchor and positive, without it."
        )


def plain_name(name: str) -> str:
    """The name of a column, or a word in it, as it is compared: case, spaces and hyphens do not matter."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _require_single(names: Sequence[str]) -> None:
    """Refuse two columns of one name, of which one would be taken without a word."""
    known = set(NEGATIVE_COLUMN).union(*PAIR_COLUMNS.values(), *SCORED_COLUMNS.values())
    found = list(map(plain_name, names))
    for alias in sorted(known.intersection(found) or TEXT_COLUMN["text"]):
        if found.count(alias) > 1:
            same = [name for name in names if plain_name(name) == alias]
            raise ValueError(f"the columns {same} share a name (case does not matter); rename or remove all but one")


def _match(shape: dict[str, tuple[str, ...]], present: dict[str, str]) -> dict[str, str] | None:
    """Standard name -> name in the data, or None if a column is missing."""
    telling = ((name, alias) for name, aliases in shape.items() for alias in reversed(aliases))  # the last one counts
    found = {name: present[alias] for name, alias in telling if alias in present}
    return found if len(found) == len(shape) else None


def _require_all(good: list[bool], column: list[Any], where: str, wanted: str) -> None:
    """Refuse a column with a value that is not good, and name the first one."""
    if not all(good):
        row = good.index(False)
        raise ValueError(f"Row {row + 1} in {where} must {wanted}, got {column[row]!r}. Fill it or leave the row out.")
