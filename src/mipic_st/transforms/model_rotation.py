"""Fit a rotation on texts, and put it into the model that encodes them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from mipic_st.encoder.card import describe_dims
from mipic_st.encoder.encoding import encode_columns
from mipic_st.encoder.fingerprint import fingerprint, model_name_of
from mipic_st.encoder.structure import evaluation_mode, full_width, in_half_precision, unwrap
from mipic_st.encoder.surgery import keep_description, require_one_place_each
from mipic_st.numerics import compare_vectors, unit_length
from mipic_st.processes import by_the_first, everywhere, processes
from mipic_st.transforms.arrays import off_orthogonal
from mipic_st.transforms.candidates import require_documents
from mipic_st.transforms.columns import as_dataset, text_columns
from mipic_st.transforms.rotation import Rotation
from mipic_st.transforms.rotation_fit import checked_settings, fit_rotation
from mipic_st.validation import checked_count, checked_dims, checked_texts, per_column

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

logger = logging.getLogger(__name__)

# Texts whose full-width cosines are compared before and after a model was changed.
_PROBES = 32


@torch.inference_mode(False)  # what is put into the model must be trainable, wherever the call stands
def rotate_model(
    model: SentenceTransformer,
    data: Dataset | pd.DataFrame | Mapping[str, Sequence[Any]] | Iterable[str],
    dims: Sequence[int],
    *,
    documents: Sequence[str] | None = None,
    queries: Sequence[str] | None = None,
    prompts: str | Mapping[str, str] | None = None,
    router_mapping: Mapping[str, str] | None = None,
    batch_size: int = 32,
    show_progress_bar: bool | None = None,
    **fit_options: Any,
) -> Rotation:
    """Fit a rotation on texts and put it into the model, in place, so that its first dims carry most.

    Every distinct text is encoded once, at full width. The rotation becomes a bias-free identity ``Dense`` before
    Normalize; a model that already ends in a linear Dense (a rotation put in earlier, for one) gets it multiplied into
    that layer's weight. Full-width cosines stay as they are, which is checked (in half precision they move by its
    rounding, 1e-2 in bfloat16), and so do dot products and Euclidean distances. Manhattan distances do not; if they are
    the model's ``similarity_fn_name``, a warning says so. If no dim gained on the held-out part, the model is left as
    it was, and a warning says so. It is changed in place, because a loss, a trainer and an evaluator hold this very
    object.

    Under ``torch.distributed`` every process must call it: the first one fits, on its own texts, and all end with its
    rotation in their models, or with the same error. Simpler: rotate once, save, and train that in several processes.

    Args:
        model: Any SentenceTransformer, also one of StaticEmbedding or with a Router.
        data: A ``datasets.Dataset``, a data frame, a dict of columns, a stream (its first 100,000 rows), or a list of
            texts. The first two text columns are taken as pairs, in the trainer's order; further ones (negatives) are
            not used. With scores or labels (``score``, ``label`` and the other names of :mod:`mipic_st.data`), only
            pairs that belong together are used: label 1 of 0 and 1, or a score of at least 80% of the range (from 0 to
            the lowest of 1, 5 or 10 that covers them). One text column, or a list, holds the documents that will be
            searched.
        dims: The truncation dimensions to serve. The full width may be among them.
        documents: Texts of more documents.
        queries: Texts of queries without answers.
        prompts: As in the trainer's arguments: one prompt for all columns, or one per column name, where "documents"
            and "queries" are those of the arguments. Default: what ``encode`` does by default; for the arguments, what
            holds for the documents and queries in data.
        router_mapping: As in the trainer's arguments: column name to route, for models with a Router, and the same two
            names. Default: the Router's own default route.
        batch_size: Texts per forward pass.
        show_progress_bar: Show bars while encoding and fitting. Default: as the log level says, like ``encode``.
        **fit_options: Any other keyword of :func:`fit_rotation`, e.g. ``seed``, ``max_steps``, ``held_out``.

    Returns:
        :class:`Rotation`: the matrix, the held-out report, and the model's name and fingerprint before the change.

    Raises:
        TypeError: If data or an option is of the wrong kind.
        ValueError: If data has no usable column or too few texts, dims do not fit the model, or ``prompts`` or
            ``router_mapping`` name a column that data does not have.
        RuntimeError: If full-width cosines changed. Whatever is raised, the model is then as it was.

    Example:
        >>> rotation = rotate_model(model, train_dataset, [384, 128, 64, 32, 16, 8])  # doctest: +SKIP
        >>> print(rotation)  # doctest: +SKIP
        >>> model.save_pretrained("rotated")  # doctest: +SKIP
    """
    plan = everywhere(
        lambda: _plan(
            model, data, dims, documents, queries, prompts, router_mapping, batch_size, show_progress_bar, fit_options
        )
    )
    if processes() > 1 and by_the_first(plan.digest) != plan.digest():
        logger.warning("This process has different texts from the first one, on whose texts the rotation is fitted.")
    inner = unwrap(model)
    training, known = inner.training, list(inner.children())
    with evaluation_mode(model):
        rotation = by_the_first(plan.fit)
        if not rotation.gained:
            logger.warning(
                "No dim gained on held-out data, so the model was left as it is. It was fitted on %s; more texts, or "
                "pairs instead of texts, may help.\n%s",
                plan.used,
                rotation,
            )
            return rotation
        with ExitStack() as undo:  # all or nothing: whatever fails, in whichever process, the model is what it was
            everywhere(lambda: plan.put_in(rotation, undo))
            undo.pop_all()
    if getattr(inner, "_similarity_fn_name", None) == "manhattan":  # asked by its public name, None becomes cosine
        logger.warning(
            "The model's similarity is Manhattan distance, which no rotation keeps: scores differ at full width, too. "
            "Set model.similarity_fn_name to 'cosine' or 'euclidean'."
        )
    for module in inner.children():
        if all(module is not other for other in known):
            module.train(training)
    return rotation


@dataclass(frozen=True, eq=False)
class _Plan:
    """One fit, with all of its arguments checked; ``used`` says on what, ``encode`` takes columns of texts."""

    model: SentenceTransformer
    columns: Mapping[str, Sequence[str]]
    own: Sequence[str]  # of the columns, those of the data
    dims: Sequence[int]
    used: str
    encode: Callable[[Mapping[str, Sequence[str]]], Iterator[tuple[str, np.ndarray]]]
    options: Mapping[str, Any]

    def digest(self) -> str:
        """Of the texts."""
        return hashlib.blake2b(repr(self.columns).encode(), digest_size=16).hexdigest()

    def fit(self) -> Rotation:
        """Encode the texts and fit."""
        logger.info("The rotation is fitted on %s.", self.used)
        vectors = dict(self.encode(self.columns))
        documents, queries = (None if name in self.own else vectors.get(name) for name in ("documents", "queries"))
        given = [vectors[name] for name in self.own]
        rotation = fit_rotation(*given, dims=self.dims, documents=documents, queries=queries, **self.options)
        inner = unwrap(self.model)
        return rotation.describe(model_name=model_name_of(inner), revision=fingerprint(inner), corpus=self.used)

    def put_in(self, rotation: Rotation, undo: ExitStack) -> None:
        """Into the model, which is checked; ``undo`` takes it out again."""
        # of every column: with a Router each has its own way through the model
        probes = {name: list(dict.fromkeys(texts))[:_PROBES] for name, texts in self.columns.items()}
        before = dict(self.encode(probes))
        undo.callback(keep_description(unwrap(self.model)))
        undo.callback(rotation.put_in(unwrap(self.model)))
        for name, after in self.encode(probes):
            _check_cosines(before[name], after, rotation, half=in_half_precision(self.model))
        describe_dims(
            self.model,
            {*self.dims, len(rotation.matrix)},
            introduction="The embedding space was rotated with mipic-st, so that the first values of a vector carry "
            "the most information. Full-width cosine similarities are those of the original model.",
        )


def _plan(
    model: SentenceTransformer,
    data: Any,
    dims: Sequence[int],
    documents: Sequence[str] | None,
    queries: Sequence[str] | None,
    prompts: Any,
    router_mapping: Any,
    batch_size: int,
    show_progress_bar: bool | None,
    fit_options: dict[str, Any],
) -> _Plan:
    """All arguments of :func:`rotate_model` checked, before anything is encoded."""
    model = unwrap(model)
    require_one_place_each(model)
    dims = checked_dims("dims", dims, full_width(model))
    batch_size = checked_count("batch_size", batch_size)
    defaults = dict(fit_rotation.__kwdefaults__ or {})
    if wrong := sorted(set(fit_options) - set(defaults)):
        raise TypeError(f"rotate_model has no arguments {wrong}, and neither has fit_rotation.")
    fit_options |= {"show_progress_bar": show_progress_bar}
    settings = {name: default for name, default in defaults.items() if name not in ("dims", "documents", "queries")}
    checked_settings(full_width(model), dims, **settings | fit_options)
    data = as_dataset(data)
    columns = text_columns(data)
    names = list(columns)
    used = f"{len(columns[names[0]])} {'pairs' if len(names) == 2 else 'texts'} of " + (
        " and ".join(map(repr, names)) if any(names) else "a list"
    )
    given = {"documents": documents, "queries": queries}
    further = {name: checked_texts(name, texts) for name, texts in given.items() if texts is not None}
    if taken := sorted(set(further) & set(names)):
        raise ValueError(f"data has columns {taken}, and arguments of these names are given too: rename the columns.")
    used += "".join(f" and {len(texts)} {name}" for name, texts in further.items())
    require_documents(len({*columns[names[-1]], *further.get("documents", ())}))
    columns |= further
    present = [*getattr(data, "column_names", names), *further]
    encode = partial(
        encode_columns,
        model,
        prompts=_per_column("prompts", prompts, names, present, columns),
        routes=_per_column("router_mapping", router_mapping, names, present, columns),
        batch_size=batch_size,
        show_progress_bar=show_progress_bar,
    )
    return _Plan(model, columns, names, dims, used, encode, fit_options)


def _per_column(
    name: str, given: Any, names: Sequence[str], present: Sequence[str], columns: Mapping[str, Any]
) -> dict[str, str | None]:
    """Prompts or routes; further documents and queries have those of the data, unless named."""
    found = per_column(name, given, [*columns], present)
    like = {"documents": names[-1]} | ({"queries": names[0]} if len(names) == 2 else {})
    for further, column in like.items():
        if further in columns and not (isinstance(given, Mapping) and further in given):
            found[further] = found[column]
    return found


def _check_cosines(before: np.ndarray, after: np.ndarray, rotation: Rotation, half: bool) -> None:
    """Full-width cosines must not move, and the leading values must be the rotation's."""
    first, second, rotated = (unit_length(vectors) for vectors in (before, after, rotation(before)))
    moved = compare_vectors(first @ first.T, second @ second.T, half=half, allowed=1e-5)
    wrong = compare_vectors(rotated, second, half=half, allowed=1e-4)
    off = off_orthogonal(rotation.matrix)
    if not (moved.same and wrong.same and off <= 1e-5):
        raise RuntimeError(
            f"The rotation changed full-width cosines by {moved.worst:.1e} (allowed {3e-2 if half else 1e-5:.0e}; "
            f"orthogonal to {off:.1e}, vectors off by {wrong.worst:.1e}), so the model was left as it was. A "
            "module behind the pooling does more than this function knows; fit_rotation rotates vectors outside of it."
        )
    logger.info("Full-width cosines moved by %.1e at most.", moved.worst)
