"""Read training and evaluation pairs from a file or from the Hugging Face hub, under one set of column names.

Two shapes are understood, by the names of their columns (case does not matter):

- pairs: ``anchor, positive`` and perhaps ``negative``, for contrastive losses;
- scored pairs (STS): ``sentence1, sentence2, score``, for ``CoSENTLoss`` and for evaluation.

Other columns are left out, and named where they look like labels. Pairs that a label's column tells apart are refused:
those that do not belong together would be learned as if they did. Scores stay as they are, whatever their range,
since ``CoSENTLoss`` and Spearman's correlation only use their order; pass ``score_range`` to map them to [0, 1].
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mipic_st.validation import is_number, plain, require

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

#: Columns of the two shapes, each with the other names it is known by, most telling first.
PAIR_COLUMNS: dict[str, tuple[str, ...]] = {
    "anchor": ("anchor", "query", "question"),
    "positive": ("positive", "pos", "answer"),
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
#: How files write flags, and what is not there.
TRUTHS: dict[str, float] = {"true": 1, "false": 0, "yes": 1, "no": 0}
MISSING: tuple[str, ...] = ("", "none", "nan", "null")
_MOST_CLASSES = 10
SUFFIXES: tuple[str, ...] = (".csv", ".tsv", ".jsonl", ".parquet")


def load_training_file(path: str | PathLike[str], *, score_range: tuple[float, float] | None = None) -> Dataset:
    """Read training data from a file, in either shape.

    Args:
        path: A ``.csv``, ``.tsv`` (tab between fields, no quoting), ``.jsonl`` (one object a line) or ``.parquet``
            file, UTF-8, with named columns.
        score_range: Lowest and highest possible score, e.g. ``(0, 5)``, to map scores to [0, 1]. None keeps them.

    Returns:
        Data set with the columns ``anchor, positive[, negative]`` or ``sentence1, sentence2, score``, in this order.
        A file with both shapes is read as pairs.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, has no rows or not the columns, or holds an empty text or a score that
            is no finite number or outside ``score_range``, or classes under a label's name (whole numbers other than 0
            and 1, without ``score_range``, or names that do not say what 1 means), or pairs and under a label's or
            score's name numbers or flags that differ between them. The message names the file, and column and row.
        ImportError: If ``datasets`` is not installed.

    Example:
        >>> load_training_file("pairs.csv").column_names  # doctest: +SKIP
        ['anchor', 'positive']
    """
    return _select(_read(path), (PAIR_COLUMNS, SCORED_COLUMNS), str(path), score_range)


def load_texts_file(path: str | PathLike[str]) -> list[str]:
    """Read texts without labels or scores from a file.

    Args:
        path: A ``.txt`` file with one text a line, UTF-8, or a table as for :func:`load_training_file`: its column
            ``text`` (or ``sentence``) is taken, or else both sides of its pairs, and their negatives.

    Returns:
        The texts, each once, in the order of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read or holds no texts.
        ImportError: If ``datasets`` is not installed and the file is a table.

    Example:
        >>> load_texts_file("corpus.txt")[:2]  # doctest: +SKIP
        ['The first line.', 'The second one.']
    """
    file = Path(path)
    if file.suffix.lower() == ".txt":
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"Cannot read {path} as UTF-8: {error}") from error
        texts = [line.strip() for line in lines if line.strip()]
        if not texts:
            raise ValueError(f"{path} holds no text.")
    else:
        selected = _select(_read(path), (TEXT_COLUMN, PAIR_COLUMNS, _BOTH), str(path), None)
        texts = [text for name in selected.column_names for text in selected[name]]
    return list(dict.fromkeys(texts))


def load_sts_file(path: str | PathLike[str], *, score_range: tuple[float, float] | None = None) -> Dataset:
    """Read scored pairs from a file, for evaluation.

    Args:
        path: As for :func:`load_training_file`.
        score_range: As for :func:`load_training_file`.

    Returns:
        Data set with the columns ``sentence1, sentence2, score``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As for :func:`load_training_file`.
        ImportError: If ``datasets`` is not installed.

    Example:
        >>> load_sts_file("sts13_test.csv").num_rows  # doctest: +SKIP
        1500
    """
    return _select(_read(path), (SCORED_COLUMNS,), str(path), score_range)


def load_training_hub(name: str, *, split: str = "train", score_range: tuple[float, float] | None = None) -> Dataset:
    """Load training data from the hub, in either shape.

    Args:
        name: Name of the data set, with its configuration after a colon if it has several:
            ``"sentence-transformers/all-nli:pair"``. A local folder of data files works too.
        split: Split to load, e.g. ``"train"`` or ``"train[:10000]"``.
        score_range: As for :func:`load_training_file`.

    Returns:
        Data set as from :func:`load_training_file`.

    Raises:
        ConnectionError: If the hub cannot be reached and the data set is not in the local cache.
        ValueError: If there is no such data set, configuration or split, or as for :func:`load_training_file`.
        ImportError: If ``datasets`` is not installed.

    Example:
        >>> load_training_hub("sentence-transformers/stsb").column_names  # doctest: +SKIP
        ['sentence1', 'sentence2', 'score']
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
    return _select(loaded, (PAIR_COLUMNS, SCORED_COLUMNS), f"{name} ({split})", score_range)


def is_scored(dataset: Dataset) -> bool:
    """Whether a data set loaded by this module holds scored pairs (else: anchor and positive).

    Args:
        dataset: Result of one of the functions above.

    Returns:
        True for ``sentence1, sentence2, score``.

    Example:
        >>> from datasets import Dataset
        >>> is_scored(Dataset.from_dict({"anchor": ["a"], "positive": ["b"]}))
        False
    """
    return "score" in dataset.column_names


_BOTH = {name: SCORED_COLUMNS[name] for name in ("sentence1", "sentence2")}


def _datasets() -> Any:
    return require("datasets", "Reading data needs datasets", "train")


def _read(path: str | PathLike[str]) -> Dataset:
    """Read a file as it is, texts as texts."""
    datasets = _datasets()
    # datasets depends on pandas, whose readers need no cache folder on disk.
    import pandas as pd

    file = Path(path)
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"Cannot tell the format of {path}: the name must end in one of {', '.join(SUFFIXES)}.")
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        if suffix == ".parquet":
            frame = pd.read_parquet(file)
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
    return datasets.Dataset.from_pandas(frame, preserve_index=False)


def _select(
    dataset: Dataset, shapes: Sequence[dict[str, tuple[str, ...]]], source: str, score_range: tuple[float, float] | None
) -> Dataset:
    """Keep the columns of the first shape that fits, under their standard names, and check their values."""
    score_range = plain(score_range)
    if score_range is not None and not _is_range(score_range):
        raise ValueError(f"score_range must be (lowest, highest), two finite numbers, got {score_range!r}.")
    try:
        _require_single(dataset.column_names)
    except ValueError as error:
        raise ValueError(f"Cannot use {source}: {error}") from error
    present = {_plain_name(name): name for name in dataset.column_names}
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

    if "score" in columns and (names := unclear_classes(dataset, columns["score"])):
        raise ValueError(
            f"Column {columns['score']!r} of {source} holds the classes {names}, which do not say that texts of "
            "the second one belong together. Keep the pairs that do, as anchor and positive, or make them scores."
        )
    values: dict[str, list[Any]] = {}
    for name, original in columns.items():
        column = list(dataset[original])
        check = _checked_scores if name == "score" else _checked_texts
        values[name] = check(column, f"column {original!r} of {source}", score_range)
        if name == "score" and score_range is None and (classes := found_classes(original, values[name])):
            raise ValueError(
                f"Column {original!r} of {source} holds {classes}, which look like classes (in natural language "
                "inference, the highest is the contradiction). For degrees of similarity, name the column 'score' or "
                "give score_range; otherwise keep the pairs that belong together, as anchor and positive."
            )
    return _datasets().Dataset.from_dict(values)


def _is_range(given: Any) -> bool:
    numbers = isinstance(given, (list, tuple)) and len(given) == 2 and all(map(is_number, given))
    return bool(numbers and -math.inf < given[0] < given[1] < math.inf)


def as_number(value: Any) -> float:
    """A number, or a flag as files write it (True, "false", "yes"); NaN for anything else."""
    try:
        return float(TRUTHS.get(_plain_name(value), value) if isinstance(value, str) else value)
    except (TypeError, ValueError):  # texts such as topics, or vectors
        return math.nan


def _require_unscored(dataset: Dataset, present: dict[str, str], source: str) -> None:
    """Refuse pairs that a label's or score's column tells apart, and name other columns that look like one."""
    for original in (present[name] for name in SCORE_NAMES if name in present):
        numbers = {as_number(value) for value in dataset[original] if _plain_name(str(value)) not in MISSING}
        if len(numbers) > 1 and not any(map(math.isnan, numbers)):
            raise ValueError(
                f"{source} has pairs, and numbers that differ between them in the column {original!r}. If these say "
                "which pairs belong together, keep those rows; then leave the column out, of a file or with "
                "datasets' remove_columns. For scores, call the texts sentence1 and sentence2."
            )
    known = {*SCORE_NAMES, *(alias for aliases in PAIR_COLUMNS.values() for alias in aliases)}
    others = [
        original for name, original in present.items() if name not in known and _looks_like_labels(dataset[original])
    ]
    if others:
        logger.warning(
            "%s: every pair counts as belonging together, and the columns %s are left out, which hold a few numbers or "
            "flags. If these say which pairs belong together, keep those rows only.",
            source,
            others,
        )


def _looks_like_labels(values: Iterable[Any]) -> bool:
    """Whether a column holds a few different numbers or flags, and nothing else."""
    found: set[float] = set()
    for value in values:
        found.add(number := as_number(value))
        if math.isnan(number) or len(found) > _MOST_CLASSES:
            return False
    return len(found) > 1


def unclear_classes(dataset: Dataset, column: str) -> list[str]:
    """The names of a column's classes (GLUE's, for instance), if these do not say that 1 is what belongs together."""
    names = getattr(dataset.features[column], "names", None) or []
    first, *others = [_plain_name(name) for name in names] or [""]
    counted = all(name.isdecimal() for name in (first, *others))
    opposed = len(others) == 1 and (
        first.replace(" ", "_") == f"not_{others[0]}" or (TRUTHS.get(first), TRUTHS.get(others[0])) == (0, 1)
    )
    return [] if counted or opposed else list(names)


def found_classes(name: str, scores: Sequence[float]) -> list[int]:
    """The first classes in a column of whole numbers under a label's name, none for yes or no, or for a scale."""
    found = set(scores)
    scale = _plain_name(name) not in CLASS_COLUMNS or found <= {0, 1} or any(value != round(value) for value in found)
    return [] if scale else sorted(map(int, found))[:5]


def _plain_name(name: str) -> str:
    return name.strip().lower()


def _require_single(names: Sequence[str]) -> None:
    """Refuse two columns of one name, of which one would be taken without a word."""
    groups = (PAIR_COLUMNS, {"": NEGATIVE_COLUMN}, SCORED_COLUMNS)
    known = {alias for columns in groups for each in columns.values() for alias in each}
    if not known & set(map(_plain_name, names)):
        known = {alias for each in TEXT_COLUMN.values() for alias in each}
    for alias in sorted(known):
        if len(same := [name for name in names if _plain_name(name) == alias]) > 1:
            raise ValueError(f"the columns {same} share a name (case does not matter); rename or remove all but one")


def _match(shape: dict[str, tuple[str, ...]], present: dict[str, str]) -> dict[str, str] | None:
    """Standard name -> name in the data, or None if a column is missing."""
    found = {name: next((present[a] for a in aliases if a in present), None) for name, aliases in shape.items()}
    matched = {name: original for name, original in found.items() if original is not None}
    return matched if len(matched) == len(shape) else None


def _checked_texts(column: list[Any], where: str, _: tuple[float, float] | None) -> list[str]:
    for row, text in enumerate(column, start=1):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"Row {row} in {where} must be a text that is not empty, got {text!r}. Fill it or leave the row out."
            )
    return column


def _checked_scores(column: list[Any], where: str, score_range: tuple[float, float] | None) -> list[float]:
    low, high = score_range or (-math.inf, math.inf)
    scores = []
    for row, value in enumerate(column, start=1):
        score = as_number(value)
        if not math.isfinite(score):
            raise ValueError(
                f"Row {row} in {where} must be a finite number, got {value!r}. Fill it or leave the row out."
            )
        if not low <= score <= high:
            raise ValueError(f"Row {row} in {where} must lie in score_range={score_range}, got {value!r}.")
        scores.append((score - low) / (high - low) if score_range else score)
    return scores
