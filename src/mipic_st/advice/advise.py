"""Measure what a corpus's vectors are worth at each dim and precision, and say which to store."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from mipic_st.advice.advice import Advice, chosen
from mipic_st.advice.cells import (
    MEASURES,
    PRECISIONS,
    TOP,
    Cell,
    bytes_of,
    cell_keys,
    gain_on_unseen,
    paired_intervals,
    values_by_cell,
)
from mipic_st.encoder.encoding import encode_columns
from mipic_st.encoder.fingerprint import fingerprint, model_name_of
from mipic_st.encoder.structure import describe, evaluation_mode, full_width, unwrap
from mipic_st.transforms.candidates import Trial, require_documents
from mipic_st.transforms.columns import as_dataset, text_columns
from mipic_st.transforms.fitting import one_thread, wants_bar
from mipic_st.transforms.pairs import numbered
from mipic_st.transforms.rotation import Rotation
from mipic_st.transforms.rotation_fit import checked_settings, fitted, of_one_width
from mipic_st.transforms.verdict import NDCG
from mipic_st.validation import as_list, checked_choice, checked_count, checked_dims, checked_texts, default_dims

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

logger = logging.getLogger(__name__)

# Share of the queries that judges, how many that should be, and below how many a warning is due.
_SHARE, _ENOUGH, _FEW = 0.1, 200, 50

# What `fit_rotation` calls what is given here, without pairs and with them.
_ALONE = {"anchors": "corpus", "queries": "queries"}
_PAIRED = {"anchors": "pairs' queries", "positives": "pairs' documents", "documents": "corpus", "queries": "queries"}


def advise(
    model: SentenceTransformer | np.ndarray | Tensor,
    corpus: Iterable[str] | None = None,
    *,
    queries: Iterable[str] | np.ndarray | Tensor | None = None,
    pairs: Dataset | pd.DataFrame | Mapping[str, Sequence[str]] | tuple[Any, Any] | None = None,
    bytes: Sequence[int] = (8, 16, 32, 64, 128),
    dims: Sequence[int] | None = None,
    precisions: Sequence[str] = PRECISIONS,
    measure: str | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    held_out: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    show_progress_bar: bool | None = None,
) -> Advice:
    """Recommend a dim and a precision for storing a corpus, measured on the corpus itself.

    A rotation is fitted as in :func:`~mipic_st.transforms.rotation_fit.fit_rotation`, but some queries are held out (of
    the pairs; without pairs, of the documents and ``queries``). They search the whole corpus, coded in every cell, that
    is, at every dim in every precision, truncated and rotated. They stay floats, as in search engines, and are used
    neither for the fit nor for the ranges of the codes. Intervals are bootstrapped over queries, for the difference to
    full width in float32. They do not account for choosing the best of many cells. Whether the rotation helps at all is
    judged on documents that its fit has not seen: among those that it has seen, even random vectors seem to gain.

    Without pairs there are no known answers. Then the measure is how many of the three nearest neighbours at full width
    are among the ten that are found. For int4 x 64 it kept 97.9% on Cranfield, where nDCG@10 kept 97.1%, but 91.5% on
    2,400 docstrings, where nDCG@10 kept 86.2%; for int4 x 32 there, 80.1% and 67.9%. So it is close or too optimistic:
    if you have pairs, give them. recall@10 of all ten neighbours is reported as well; it understates what is kept.

    Args:
        model: The SentenceTransformer that encodes the texts; or the documents' vectors, (N, D), a NumPy array or a
            tensor, of any origin.
        corpus: Texts of the documents that are searched. Optional with pairs; leave it out with vectors.
        queries: Queries without answers: texts, or vectors where documents are vectors.
        pairs: Queries and the documents that answer them, which are searched too: a table with two columns of texts, as
            for :func:`~mipic_st.transforms.model_rotation.rotate_model`, or ``(queries, documents)``, two lists of
            texts, or of vectors. Give a query with several answers in several rows.
        bytes: Budgets, in bytes per vector.
        dims: Default: powers of two from 8, and the full width.
        precisions: Those that your search engine supports, of float32, float16, int8, int4 and binary.
        measure: ``"nDCG@10"``, the default with pairs; ``"3-recall@10"``, the default without; or ``"recall@10"``.
        query_prompt: Default: the model's own for queries, as ``encode_query`` takes it.
        document_prompt: Default: the model's own for documents, as ``encode_document`` takes it.
        held_out: Share of the queries to hold out, in (0, 0.5]. Default: a tenth, or up to half to have 200 of them.
        seed: Seeds the held-out part, the fit and the intervals.
        batch_size: Texts per forward pass.
        show_progress_bar: Show bars. Default: as the log level says, like ``encode``.

    Returns:
        :class:`~mipic_st.advice.advice.Advice`; print it.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If there are fewer than 12 distinct documents, a vector is zero or not finite, a dim exceeds the
            width, no cell is as small as one of the budgets, or another argument is out of its range.

    Example:
        >>> advice = advise(model, documents, pairs=(questions, answers))  # doctest: +SKIP
        >>> print(advice)                                                  # doctest: +SKIP
        >>> print(advise(vectors, bytes=[16, 64]).snippet)                 # doctest: +SKIP
    """
    if isinstance(model, (str, Mapping)):
        raise TypeError(
            f"model must be a SentenceTransformer, or vectors as an array, got {type(model).__name__}: load a model "
            "with SentenceTransformer(name), give one column of a table."
        )
    own = unwrap(model) if isinstance(model, nn.Module) else None
    if own is None and corpus is not None:
        raise TypeError("corpus is for a model's texts: with vectors, these are the documents; leave corpus out.")
    given = _given(model if own is None else corpus, queries, pairs, own is not None)
    names = _PAIRED if pairs is not None else _ALONE
    arrays: list[Any] = [] if own is not None else _vectors(names, given)
    width = full_width(own) if own is not None else arrays[0].shape[1]
    wanted = checked_dims("dims", default_dims(width) if dims is None else dims, width)
    fit_dims, options = checked_settings(
        width,
        wanted,
        max_steps=None,
        held_out=_SHARE if held_out is None else held_out,
        seed=seed,
        show_progress_bar=show_progress_bar,
    )
    precisions = [
        checked_choice("precisions", name, PRECISIONS) for name in as_list("precisions", precisions, '["int8"]')
    ]
    budgets = _budgets(bytes, width, wanted, precisions)
    decides = checked_choice("measure", measure or (TOP if pairs is None else NDCG), MEASURES)
    if decides == NDCG and pairs is None:
        raise ValueError(f"measure {NDCG!r} needs pairs, which say what the answers are; leave it out, or give pairs.")
    settings: dict[str, Any] = {"model": None, "fingerprint": None}
    if own is not None:
        require_documents(len({*given.get("positives", given["anchors"]), *given.get("documents", ())}))
        prompts = (query_prompt, document_prompt)
        arrays = _encoded(own, names, given, prompts, checked_count("batch_size", batch_size), show_progress_bar)
        settings = {"model": model_name_of(own), "fingerprint": fingerprint(own)}
    if held_out is None:
        asked = 1 + int(numbered(arrays[0])[0].max())
        options["held_out"] = min(0.5, max(_SHARE, _ENOUGH / asked))
    # nobody prefers similar sentences to what is found, as a fit on pairs alone does
    rotation, trial = fitted(arrays, fit_dims, prefer_pairs=False, **options)
    arrays.clear()
    settings |= {
        "documents": len(trial.search.documents),
        "queries": len(trial.search.queries),
        "dims": wanted,
        "precisions": precisions,
        "held_out": options["held_out"],
        "seed": seed,
    }
    if settings["queries"] < _FEW:
        logger.warning("Only %d queries judge: look at the intervals, and give more queries.", settings["queries"])
    return _measured(rotation, trial, wanted, precisions, budgets, decides, settings, wants_bar(show_progress_bar))


def _given(documents: Any, queries: Any, pairs: Any, texts: bool) -> dict[str, Any]:
    """What was given, under the names of `fit_rotation`; texts are checked."""
    if isinstance(pairs, (tuple, list)) and len(pairs) == 2 and not all(isinstance(side, str) for side in pairs):
        anchors, positives = pairs
    elif pairs is not None and (not texts or isinstance(pairs, (str, tuple, list))):
        raise TypeError(
            f"pairs must be (queries, documents){', or a table with two columns of texts' if texts else ''}, got "
            f"{type(pairs).__name__}."
        )
    elif pairs is not None:
        columns = text_columns(as_dataset(pairs))
        if len(columns) != 2:
            raise ValueError(f"pairs must have two columns of texts, got {list(columns)}.")
        anchors, positives = columns.values()
    if pairs is None:
        if documents is None:
            raise ValueError("corpus is missing: give the texts of the documents that will be searched, or pairs.")
        found = {"anchors": documents, "queries": queries}
    else:
        found = {"anchors": anchors, "positives": positives, "documents": documents, "queries": queries}
    found = {name: value for name, value in found.items() if value is not None}
    if texts:
        names = _ALONE if pairs is None else _PAIRED
        found = {name: checked_texts(names[name], value) for name, value in found.items()}
    if pairs is not None and len(found["anchors"]) != len(found["positives"]):
        raise ValueError(
            f"pairs must have one document for each query, got {len(found['anchors'])} queries and "
            f"{len(found['positives'])} documents."
        )
    return found


def _vectors(names: Mapping[str, str], given: Mapping[str, Any]) -> list[Any]:
    """Anchors, positives, documents and queries as tensors of one width and device."""
    # the documents' vectors are the first argument, whatever the fit calls them
    shown = {name: "vectors" if text == "corpus" else text for name, text in names.items()}
    return list(of_one_width(given, shown))


def _encoded(
    model: SentenceTransformer,
    names: Mapping[str, str],
    given: Mapping[str, Sequence[str]],
    prompts: tuple[str | None, str | None],
    batch_size: int,
    show_progress_bar: bool | None,
) -> list[Any]:
    """The texts' vectors, as :func:`_vectors` gives them: with the prompts and routes of queries and of documents."""
    own = (["query"], ["document", "passage", "corpus"])
    prompt, route = {}, {}
    routes = describe(model).routes
    for name in given:
        side = int("queries" not in names[name])
        known = next((model.prompts[key] for key in own[side] if key in model.prompts), None)
        prompt[name] = known if prompts[side] is None else prompts[side]
        route[name] = own[side][0] if own[side][0] in routes else None
    with evaluation_mode(model):
        vectors = encode_columns(
            model, given, prompts=prompt, routes=route, batch_size=batch_size, show_progress_bar=show_progress_bar
        )
        return _vectors(names, dict(vectors))


def _budgets(given: Any, width: int, dims: Sequence[int], precisions: Sequence[str]) -> list[int]:
    """Ascending numbers of bytes that a cell meets, each."""
    budgets = sorted({checked_count("bytes", size) for size in as_list("bytes", given, "[16, 64]")})
    if not budgets or not precisions:
        raise ValueError(f"{'precisions' if budgets else 'bytes'} is empty: give at least one.")
    smallest = min(bytes_of(cell_keys(width, dims, precisions, rotated=False)))
    if budgets[0] < smallest:
        raise ValueError(
            f"bytes {[size for size in budgets if size < smallest]}: no cell is so small, the smallest of dims "
            f"{list(dims)} and precisions {list(precisions)} takes {smallest}; give more bytes, smaller dims, or other "
            "precisions."
        )
    return budgets


def _measured(
    rotation: Rotation,
    trial: Trial,
    dims: Sequence[int],
    precisions: Sequence[str],
    budgets: Sequence[int],
    measure: str,
    settings: dict[str, Any],
    show_bar: bool,
) -> Advice:
    """All cells, judged by the held-out queries with the map that was fitted without them."""
    from tqdm.auto import tqdm

    width = trial.search.documents.shape[1]
    plain = rotation.chosen == "truncation"
    keys = cell_keys(width, dims, precisions, not plain)
    with torch.inference_mode(), one_thread():
        found = values_by_cell(trial.search, trial.part.rows, None if plain else trial.fitted, dims, precisions)
        values = dict(tqdm(found, total=len(keys), desc="Cells", disable=not show_bar))
        below = [dim for dim in dims if dim < width]
        gained, gain, chance = gain_on_unseen(trial.search, trial.part.rows, trial.fitted, below, settings["seed"])
    full = values["truncated", width, "float32"][measure]
    if not full.any():
        raise ValueError(
            f"at full width none of the {len(full)} held-out queries finds an answer among the first 10, so nothing "
            "can be compared: are pairs in order, and from this model's domain?"
        )
    intervals = paired_intervals(np.stack([values[key][measure] - full for key in keys]), settings["seed"])
    cells = []
    for key, size, (low, high) in zip(keys, bytes_of(keys), intervals.tolist(), strict=True):
        way, dim, precision = key
        scores = {name: float(value.mean()) for name, value in values[key].items()}
        kept, change = scores[measure] / float(full.mean()), scores[measure] - float(full.mean())
        cells.append(Cell(dim, precision, way, size, scores, kept, change, low, high))
    cells, by_budget, by_loss = chosen(cells, budgets, gained)
    return Advice(measure, float(full.mean()), cells, by_budget, by_loss, gained, gain, chance, rotation, settings)
