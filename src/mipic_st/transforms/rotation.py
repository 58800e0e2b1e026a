"""The rotation: an orthogonal map of embeddings after which their first values are worth keeping.

Rotated vectors have the same full-width cosines; what changes is what is left when they are truncated.
:func:`fit_rotation` works on vectors, :func:`mipic_st.transforms.model_rotation.rotate_model` puts the result into a
model. How it is found: :mod:`mipic_st.transforms.candidates`.

Related work: AdaWidth (arXiv 2608.23862) learns a product of Householder reflections, Matryoshka-Adaptor (arXiv
2407.20243) a residual network that changes the full width too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from mipic_st.encoder.surgery import identity_dense
from mipic_st.numerics import no_autocast
from mipic_st.transforms.base import Transform, Vectors, apply_matrix
from mipic_st.transforms.candidates import Given, best_of
from mipic_st.transforms.fitting import checked_vectors, one_thread
from mipic_st.transforms.orthogonal import off_orthogonal
from mipic_st.transforms.search import Search, most_queries, report, verdict
from mipic_st.validation import checked_count, checked_dims, checked_number

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class Rotation(Transform):
    """An orthogonal map of embeddings whose leading values are worth keeping.

    Attributes:
        matrix: R, (D, D), float32, on the CPU. Vectors are rows: rotated vectors are ``vectors @ R``.
        dims: The truncation dimensions that it was fitted for, ascending.
        report: How queries that were held out search the given documents, one dict per dim. ``truncated``, ``pca`` and
            ``rotated`` are the values of ``measure`` for plain truncation, for the PCA of the documents and for this
            map; ``change`` is rotated minus truncated and ``error`` its standard error, ``pca_change`` and
            ``pca_error`` the same for the PCA; other measures stand as ``similarity_truncated`` and so on (Spearman
            correlation of cosines with those at full width), where pairs were given also recall@10 and MRR@10.
        chosen: Which way to a rotation was best on the held-out part.
        measure: ``nDCG@10`` of the positives where pairs were given, else ``recall@10`` of what the full width finds.

    Example:
        >>> rotation = Rotation(torch.eye(4)[:, [2, 0, 1, 3]], (1, 2))
        >>> rotation(np.array([[1.0, 0.0, 3.0, 4.0]], dtype=np.float32)).tolist()
        [[3.0, 1.0, 0.0, 4.0]]
        >>> rotation(np.array([[4.0, 0.0, 3.0, 0.0]]), dim=2).round(1).tolist()
        [[0.6, 0.8]]
    """

    kind: ClassVar[str] = "rotation"
    headings: ClassVar[dict[str, str]] = {
        "dim": "dim",
        "truncated": "truncated",
        "pca": "PCA",
        "rotated": "rotated",
        "change": "change",
        "error": "error",
        "similarity_truncated": "similarity, truncated",
        "similarity_pca": "similarity, PCA",
        "similarity_rotated": "similarity, rotated",
    }
    matrix: Tensor
    dims: tuple[int, ...]
    report: list[dict[str, float]] = field(default_factory=list)
    chosen: str = ""
    measure: str = ""

    def __call__(self, vectors: Vectors, dim: int | None = None) -> Vectors:
        """Rotate vectors; with ``dim``, truncate them and scale them to unit length too.

        Args:
            vectors: (N, D) or (D,), NumPy or torch, any floating type and device.
            dim: Values to keep, 1 to D. None keeps all, and the length as it is.

        Returns:
            The same kind, type and device, (N, D) or (N, dim).

        Raises:
            TypeError: If the vectors are no array of floating numbers.
            ValueError: If the vectors are not of width D, or ``dim`` is out of range.
        """
        return apply_matrix("vectors", vectors, self.matrix, dim, f"this {self.kind}")

    def to_modules(self, model: SentenceTransformer | None = None) -> Sequence[nn.Module]:
        """The rotation as a bias-free identity ``Dense``.

        Args:
            model: Not needed.

        Returns:
            One module, in float32.
        """
        return [identity_dense(self.matrix)]

    def evaluate(self, vectors: np.ndarray | Tensor, queries: np.ndarray | Tensor | None = None) -> Rotation:
        """Judge the rotation on any vectors, e.g. on the documents of another domain than it was fitted on.

        The PCA that it is compared with is that of these very vectors: what a fit on them would give at the least.

        Args:
            vectors: (N, D) documents to search.
            queries: (Q, D), what to search for. Default: up to 1,000 of the documents, which do not find themselves.

        Returns:
            The same rotation, with the report of these vectors. Warnings in the log name the dims that are worse than
            plain truncation, and those where their PCA alone has a tenth more: the sign of another domain.

        Raises:
            TypeError: If the vectors are no arrays of floating numbers.
            ValueError: If they do not fit the rotation, are not finite, or are too few.

        Example:
            >>> print(rotation.evaluate(other_vectors).verdict)  # doctest: +SKIP
        """
        anchors, _, _, asked = _checked(vectors, None, None, queries)
        if anchors.shape[1] != len(self.matrix):
            raise ValueError(f"vectors have width {anchors.shape[1]}, this {self.kind} is for {len(self.matrix)}.")
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
            bases = {"truncated": torch.eye(len(self.matrix), device=device), "pca": given.pca}
            results = search.judge(bases | {"rotated": self.matrix.to(device)}, self.dims)
            judged = replace(self, report=report(results, self.dims, search.measure), measure=search.measure)
        judged._warn("these vectors")
        if judged.foreign_dims:
            logger.warning(
                "On these vectors the rotation keeps far fewer neighbours than their own PCA at dims %s, as one that "
                "was fitted on another domain does: fit it on the documents that will be searched.\n%s",
                list(judged.foreign_dims),
                judged,
            )
        return judged

    def _warn(self, data: str) -> None:
        if self.worse_dims:
            logger.warning(
                "On %s the rotation is worse than plain truncation at dims %s: fit it on the documents that will be "
                "searched.\n%s",
                data,
                list(self.worse_dims),
                self,
            )

    @property
    def caption(self) -> str:  # type: ignore[override]
        """First line of the report as a text."""
        return f"{self.measure} of queries that no step has seen, x100; similarity: correlation of cosines"

    @property
    def verdict(self) -> str:
        """The report in one line."""
        return verdict(self.report, self.measure, self.chosen)

    @property
    def gained(self) -> bool:
        """Whether any dim is better than plain truncation, by two standard errors."""
        return any(row["change"] > 2 * row["error"] for row in self.report)

    @property
    def worse_dims(self) -> tuple[int, ...]:
        """Dims that are worse than plain truncation, by two standard errors or more."""
        return tuple(int(row["dim"]) for row in self.report if row["change"] < -2 * row["error"])

    @property
    def foreign_dims(self) -> tuple[int, ...]:
        """Dims at which the PCA of the searched documents has a tenth more, by two standard errors or more."""
        return tuple(
            int(row["dim"])
            for row in self.report
            if row.get("pca_change", 0) < min(-0.1 * row.get("pca", 0), -2 * row.get("pca_error", 0))
        )

    def __str__(self) -> str:
        return f"{super().__str__()}\n{self.verdict}"

    def check(self) -> None:
        """Shape, orthogonality and dims, too."""
        super().check()
        if not self.matrix.is_floating_point() or self.matrix.ndim != 2 or self.matrix.shape[0] != self.matrix.shape[1]:
            raise ValueError(
                f"its matrix of shape {tuple(self.matrix.shape)} is not square, or has no floating numbers"
            )
        if (off := off_orthogonal(self.matrix)) > 1e-4:
            raise ValueError(f"its matrix is not orthogonal, R^T R - I has values up to {off:.1e}")
        checked_dims("dims", self.dims, len(self.matrix))

    @classmethod
    def _read(cls, tensors: dict[str, Tensor], notes: dict[str, str]) -> dict[str, Any]:
        if "kind" not in notes and set(tensors) == {"rotation"}:  # a file of an earlier version
            dims, rows = (json.loads(notes[name]) for name in ("dims", "report"))
            names = {"accuracy_before": "truncated", "accuracy_after": "rotated"}
            names |= {"similarity_before": "similarity_truncated", "similarity_after": "similarity_rotated"}
            rows = [{names.get(name, name): value for name, value in row.items()} for row in rows]
            return {"matrix": tensors["rotation"], "dims": tuple(dims), "report": rows, "measure": "pairs found"}
        return super()._read(tensors, notes)


def fit_rotation(
    anchors: np.ndarray | Tensor,
    positives: np.ndarray | Tensor | None = None,
    *,
    dims: Sequence[int],
    documents: np.ndarray | Tensor | None = None,
    queries: np.ndarray | Tensor | None = None,
    max_steps: int | None = None,
    held_out: float = 0.1,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> Rotation:
    """Learn an orthogonal map after which the first values of an embedding say most, from vectors alone.

    Works on vectors of any origin: a model, an API, a database. Give the documents that will be searched; pairs of a
    query and its answer, if there are any; queries without answers, if there are any. A part is held out, and searches
    all documents after truncation, after their PCA, after a rotation of the documents and, with pairs, after a rotation
    that is fitted to these. What ranks best is kept (``rotation.chosen``) and fitted again on everything, but for the
    rotation of the pairs, which is stopped at its best step on the held-out part. The report is of the first fit.

    The fit runs on the device of the vectors, in float32, and on one thread of a CPU.

    Args:
        anchors: (N, D) vectors of the documents or, with ``positives``, of the queries or first texts of pairs. Of any
            length: directions count.
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
    # the fit needs gradients, also where the caller switched them off for its encoder
    with no_autocast(arrays[0]), torch.inference_mode(False), torch.enable_grad(), one_thread():
        matrix, chosen, measure, rows = best_of(Given.of(*arrays), dims, prefer_pairs=documents is None, **options)
    rotation = Rotation(matrix.cpu(), tuple(dims), rows, chosen, measure)
    rotation._warn("held-out data")
    return rotation


def _checked(anchors: Any, positives: Any, documents: Any, queries: Any) -> tuple[Any, ...]:
    """The vectors, on one device and of one width."""
    given = {"anchors": anchors, "positives": positives, "documents": documents, "queries": queries}
    arrays = {
        name: None if vectors is None else checked_vectors(name, vectors, directions=True)
        for name, vectors in given.items()
    }
    first = arrays["anchors"]
    assert first is not None
    for name, vectors in arrays.items():
        if vectors is not None and vectors.shape[1] != first.shape[1]:
            raise ValueError(f"{name} have width {vectors.shape[1]}, anchors {first.shape[1]}: encode both alike.")
    if (second := arrays["positives"]) is not None and len(second) != len(first):
        raise ValueError(
            f"anchors and positives must have one vector for each other, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}."
        )
    return tuple(None if vectors is None else vectors.to(first.device) for vectors in arrays.values())


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
