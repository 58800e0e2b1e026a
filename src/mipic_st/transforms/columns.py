"""Which columns of a data set are the texts of a fit, and which of its rows belong together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from mipic_st.data import SCORE_NAMES, found_classes
from mipic_st.validation import checked_texts

logger = logging.getLogger(__name__)


def text_columns(data: Any) -> dict[str, list[str]]:
    """One or two columns of texts, by name; of scored pairs those that belong together."""
    if not hasattr(data, "column_names"):
        return {"": checked_texts("data", data, "a datasets.Dataset or a list of texts")}
    if isinstance(data.column_names, Mapping):
        raise TypeError(f"data is a DatasetDict with {sorted(data.column_names)}: give one of its splits.")
    if not len(data):
        raise ValueError("data has no rows.")
    texts_of = _columns_of_texts(data)
    names = texts_of[:2]
    if not names:
        raise ValueError(f"data has no column of texts among {data.column_names}.")
    columns = {name: list(data[name]) for name in names}
    score = next((name for name in SCORE_NAMES if name in data.column_names), None)
    # beside three texts it is a margin, and several numbers a row are a teacher's
    if score is not None and len(texts_of) == 2 and np.ndim(data[0][score]) == 0:
        rows = _belonging(data[score], score)
        columns = {name: [texts[row] for row in rows] for name, texts in columns.items()}
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
        if name not in SCORE_NAMES
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
    if classes := found_classes(name, scores.tolist()):
        raise ValueError(
            f"column {name!r} of data holds {classes}, and which of them says that the texts belong together is not "
            "known: keep these rows and remove the column."
        )
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
    if hasattr(sts, "column_names"):
        if missing := {"sentence1", "sentence2", "score"} - set(sts.column_names):
            raise ValueError(f"sts lacks the columns {sorted(missing)}; it has {sts.column_names}.")
        sts = (sts["sentence1"], sts["sentence2"], sts["score"])
    first, second, scores = (list(column) for column in sts)
    if not len(first) == len(second) == len(scores) or len(first) < 2:
        raise ValueError(
            f"sts must hold as many first texts as second texts and scores, 2 or more: got {len(first)}, {len(second)} "
            f"and {len(scores)}."
        )
    scores = [float(score) for score in scores]
    if not np.isfinite(scores).all():
        raise ValueError("sts holds scores that are no finite numbers; leave these rows out.")
    return first, second, scores
