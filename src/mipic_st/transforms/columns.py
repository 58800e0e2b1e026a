"""Which columns of a data set are the texts of a fit, and which of its rows belong together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np

from mipic_st.data import SCORE_NAMES, plain_name, require_clear_classes, require_degrees, warn_of_labels
from mipic_st.validation import checked_texts, require

logger = logging.getLogger(__name__)


# Rows that are taken of a stream.
_STREAMED = 100_000


def as_dataset(data: Any) -> Any:
    """Tables of all kinds as a Dataset: dicts of columns, data frames, first rows of streams; lists as they are."""
    if hasattr(data, "to_pandas") and not hasattr(data, "features"):  # of polars and of Arrow
        data = data.to_pandas()
    splits = getattr(data, "column_names", data)
    if isinstance(splits, Mapping) and any(_is_table(data[name]) for name in splits):
        raise TypeError(f"data holds several data sets, {sorted(map(str, splits))[:5]}: give one of them.")
    is_frame = hasattr(data, "columns") and hasattr(data, "to_dict")
    is_stream = hasattr(data, "column_names") and not hasattr(data, "__len__")
    if not (isinstance(data, Mapping) or is_frame or is_stream):
        return data
    kind = require("datasets", "tables of texts need datasets", "train").Dataset
    try:
        if is_frame:
            return kind.from_pandas(data, preserve_index=False)
        if not is_stream:
            return kind.from_dict(dict(data))
        rows = list(islice(data, _STREAMED + 1))
        if len(rows) > _STREAMED:
            logger.warning("data is a stream of more than %d rows, of which the first are used.", _STREAMED)
        # the first row may lack columns
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows[:_STREAMED]] for name in names}
        return kind.from_dict(columns, features=data.features)
    except (TypeError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(f"data is no table of columns of equal lengths and kinds: {error}") from error


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or hasattr(value, "column_names") or hasattr(value, "columns")


def text_columns(data: Any) -> dict[str, list[str]]:
    """One or two columns of texts, by name; of scored pairs those that belong together."""
    if not hasattr(data, "column_names"):
        return {"": checked_texts("data", data, "a datasets.Dataset or a list of texts")}
    if not len(data):
        raise ValueError("data has no rows.")
    texts_of = _columns_of_texts(data)
    names = texts_of[:2]
    if not names:
        raise ValueError(f"data has no column of texts among {data.column_names}.")
    columns = {name: list(data[name]) for name in names}
    plain = {plain_name(name): name for name in reversed(data.column_names)}
    score = next((plain[name] for name in SCORE_NAMES if name in plain), None)
    # with three texts it is a margin, and several numbers a row are vectors of a larger model
    if score is not None and len(texts_of) == 2 and np.ndim(data[0][score]) == 0:
        require_clear_classes(data, score, "data")
        rows = _belonging(data[score], score)
        columns = {name: [texts[row] for row in rows] for name, texts in columns.items()}
    elif len(texts_of) == 2 and score is None:
        warn_of_labels(data, [name for name in data.column_names if name not in names], "data")
    for name, texts in columns.items():
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise TypeError(f"column {name!r} of data must hold texts only, it holds {wrong[0]!r}.")
    return columns


def _columns_of_texts(data: Any) -> list[str]:
    """Names of the columns whose kind is text, also if the first row has none."""
    kinds, first = getattr(data, "features", None) or {}, data[0]
    return [
        name
        for name in data.column_names
        if plain_name(name) not in SCORE_NAMES
        and (isinstance(first[name], str) or getattr(kinds.get(name), "dtype", "") in ("string", "large_string"))
    ]


def _belonging(given: Any, name: str) -> list[int]:
    """Rows whose two texts belong together."""
    try:
        scores = np.asarray(given, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"column {name!r} of data holds no numbers ({error}), so which texts belong together is not known: keep "
            "the rows whose texts do, and remove the column."
        ) from error
    if not np.isfinite(scores).all():
        raise ValueError(f"column {name!r} of data holds values that are no finite numbers; leave these rows out.")
    top = next((most for most in (1, 5, 10) if scores.max() <= most), float(scores.max()))
    require_degrees(name, scores.tolist(), "data")
    rows = np.flatnonzero(scores >= 0.8 * top).tolist()
    if not rows:
        raise ValueError(
            f"no row of data has a {name} of {0.8 * top:g} or more, so no texts belong together: give other pairs, or "
            "a list of texts."
        )
    logger.info("%d of %d pairs have a %s of %g or more and are used.", len(rows), len(scores), name, 0.8 * top)
    return rows


def scored_pairs(sts: Any) -> tuple[list[str], list[str], list[float]]:
    """First texts, second texts and scores, one each."""
    sts = as_dataset(sts)
    if hasattr(sts, "column_names"):
        if missing := {"sentence1", "sentence2", "score"} - set(sts.column_names):
            raise ValueError(f"sts lacks the columns {sorted(missing)}; it has {sts.column_names}.")
        require_clear_classes(sts, "score", "sts")
        sts = (sts["sentence1"], sts["sentence2"], sts["score"])
    try:
        first, second, scores = (list(column) for column in sts)
        scores = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise TypeError(f"sts must be three columns or lists, of texts, texts and scores: {error}.") from error
    if not len(first) == len(second) == len(scores) or len(first) < 2:
        raise ValueError(
            f"sts must hold as many first texts as second texts and scores, 2 or more: got {len(first)}, {len(second)} "
            f"and {len(scores)}."
        )
    first, second = checked_texts("sts", first), checked_texts("sts", second)
    if not np.isfinite(scores).all():
        raise ValueError("sts holds scores that are no finite numbers; leave these rows out.")
    return first, second, scores
