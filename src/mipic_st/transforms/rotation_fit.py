"""Find a rotation for vectors, and judge one on others. How it is found: :mod:`mipic_st.transforms.candidates`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mipic_st.codes import evenly
from mipic_st.numerics import no_autocast
from mipic_st.transforms.candidates import Given, Trial, best_of
from mipic_st.transforms.fitting import checked_vectors, one_thread
from mipic_st.transforms.rotation import CALIBRATED, Rotation
from mipic_st.transforms.search import Search, most_queries, report
from mipic_st.validation import checked_count, checked_dims, checked_number

# What a fit is given, each under its own name.
_SIDES = {name: name for name in ("anchors", "positives", "documents", "queries")}


def fit_rotation(
    anchors: Any,
    positives: Any = None,
    *,
    dims: Sequence[int],
    documents: Any = None,
    queries: Any = None,
    max_steps: int | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> Rotation:
    """Fit a rotation of vectors, after which the first values carry the most information.

    Works on vectors of any origin: a model, an API, a database. Give the documents that will be searched and, if you
    have them, pairs of a query and its answer, and queries without answers. A held-out part searches all documents
    after truncation, after their PCA, after a rotation of the documents and, with pairs, after a rotation fitted to
    these. What ranks best is kept (``rotation.chosen``), of documents alone the PCA only where it is better than the
    rotation by a twentieth. It is fitted again on everything, except for a rotation of pairs, which is stopped at its
    best step on the held-out part. The report is that of the first fit.

    The fit runs on the device of the vectors, in float32, and on one thread of a CPU. The rotation keeps the ranges
    that codes of the documents need, for each dim and the full width.

    Args:
        anchors: (N, D) vectors of the documents or, with ``positives``, of the queries or first texts of pairs. Of any
            length: directions count. Arrays, tensors, lists, columns of pandas or Arrow, here and below.
        positives: (N, D) vectors of the answers or second texts, row by row; a query with several answers stands in
            several rows. They are among the documents.
        dims: The truncation dimensions to serve, each up to D. D itself needs no fit and is left out.
        documents: (M, D) vectors of further documents.
        queries: (Q, D) vectors of queries without answers.
        max_steps: Steps of each fit. Default: 150 on documents, 250 on pairs.
        held_out: Share of the queries, or documents where there are no pairs, that is held out, in (0, 0.5].
        seed: Seeds the held-out part and the batches; the global generators are left alone.
        show_progress_bar: Show a bar over steps. Default: as the log level says, like ``encode``.

    Returns:
        :class:`Rotation`, with its report. A warning in the log names the dims that got worse than truncation.

    Raises:
        TypeError: If the vectors are no arrays of floating numbers.
        ValueError: If shapes do not fit, a value is not finite, a vector is zero, there are fewer than 12 distinct
            documents, or another argument is out of its range.

    Example:
        >>> rotation = fit_rotation(document_vectors, dims=[128, 64, 32, 16, 8])  # doctest: +SKIP
        >>> small = rotation(vectors, dim=16)                                     # doctest: +SKIP
    """
    arrays = _checked(anchors, positives, documents, queries)
    width = arrays[0].shape[1]
    dims, options = checked_settings(
        width, dims, max_steps=max_steps, held_out=held_out, seed=seed, show_progress_bar=show_progress_bar
    )
    rotation, _ = fitted(arrays, dims, prefer_pairs=documents is None, **options)
    rotation.warn("held-out data")
    return rotation


def fitted(arrays: Sequence[Any], dims: Sequence[int], *, prefer_pairs: bool, **options: Any) -> tuple[Rotation, Trial]:
    """The rotation of checked vectors (anchors, positives, documents, queries), and what was tried for it."""
    # the fit needs gradients, also where the caller switched them off for its encoder
    with no_autocast(arrays[0]), torch.inference_mode(False), torch.enable_grad(), one_thread():
        trial = best_of(Given.of(*arrays), dims, prefer_pairs=prefer_pairs, **options)
        matrix = trial.final()
    rotation = Rotation(matrix.cpu().numpy(), tuple(dims), trial.report, trial.best.name, trial.search.measure)
    return rotation.calibrate(evenly(trial.given.documents, CALIBRATED)), trial


def judged_on(rotation: Rotation, vectors: Any, queries: Any) -> Rotation:
    """The rotation with the report of other vectors, see :meth:`Rotation.evaluate`."""
    anchors, _, _, asked = _checked(vectors, None, None, queries)
    if anchors.shape[1] != len(rotation.matrix):
        raise ValueError(f"vectors have width {anchors.shape[1]}, this rotation is for {len(rotation.matrix)}.")
    with no_autocast(anchors), torch.inference_mode(), one_thread():
        given = Given.of(anchors, queries=asked)
        most = most_queries(len(given.documents))
        generator = torch.Generator().manual_seed(0)
        own = torch.randperm(len(given.documents if asked is None else given.queries), generator=generator)[:most]
        if asked is None:
            search = Search(given.documents, given.documents[own], own)
        else:
            search = Search(given.documents, given.queries[own], given.row_of[given.query_ids[own]])
        device = anchors.device
        bases = {"truncated": torch.eye(len(rotation.matrix), device=device), "pca": given.pca}
        bases["rotated"] = torch.from_numpy(rotation.matrix).to(device)
        results = search.judge(bases, rotation.dims)
    return replace(rotation, report=report(results, rotation.dims, search.measure), measure=search.measure)


def _checked(anchors: Any, positives: Any, documents: Any, queries: Any) -> tuple[Any, ...]:
    """The vectors, on one device and of one width."""
    given = {"anchors": anchors, "positives": positives, "documents": documents, "queries": queries}
    arrays = of_one_width({name: vectors for name, vectors in given.items() if vectors is not None}, _SIDES)
    first, second, *_ = arrays
    if second is not None and len(second) != len(first):
        raise ValueError(
            f"anchors and positives must have one vector for each other, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}."
        )
    return arrays


def of_one_width(given: Mapping[str, Any], shown: Mapping[str, str]) -> tuple[Any, ...]:
    """Anchors, positives, documents and queries as tensors, None for what is not given; ``shown`` says their names."""
    arrays = {name: checked_vectors(shown[name], vectors, directions=True) for name, vectors in given.items()}
    first = arrays["anchors"]
    for name, vectors in arrays.items():
        if vectors.shape[1] != first.shape[1]:
            raise ValueError(
                f"{shown[name]} have width {vectors.shape[1]}, {shown['anchors']} {first.shape[1]}: "
                "encode both the same way."
            )
    return tuple(arrays[name].to(first.device) if name in arrays else None for name in _SIDES)


def checked_settings(
    width: int,
    dims: Sequence[int],
    *,
    max_steps: int | None,
    held_out: float,
    seed: int,
    show_progress_bar: bool | None,
) -> tuple[list[int], dict[str, Any]]:
    """Arguments of :func:`fit_rotation`: dims below the width, ascending, and the options of the fit."""
    dims = sorted(dim for dim in checked_dims("dims", dims, width) if dim < width)
    if not dims:
        raise ValueError(
            f"dims must hold a dimension below the vectors' width of {width}, else there is nothing to do."
        )
    return dims, {
        "max_steps": max_steps if max_steps is None else checked_count("max_steps", max_steps),
        "held_out": checked_number("held_out", held_out, 0, 0.5, exclusive=True),
        "seed": checked_count("seed", seed, least=0),
        "show_progress_bar": show_progress_bar,
    }
