"""The rotation: an orthogonal map of embeddings after which their first values are worth keeping.

Rotated vectors have the same full-width cosines; what changes is what is left when they are truncated.
:func:`fit_rotation` works on vectors, :func:`rotate_model` puts the result into a model. What is minimised:
:class:`mipic_st.transforms.objectives.RotationObjective`.

Symbols: N vectors (or pairs), D their width, ``dims`` the truncation dimensions d_1 < ... < d_n, m the largest of them,
``frame`` the first m columns of R, (D, m). Related work: AdaWidth (arXiv 2608.23862) learns a product of Householder
reflections, Matryoshka-Adaptor (arXiv 2407.20243) a residual network that changes the full width too.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from mipic_st.encoder.card import describe_dims
from mipic_st.encoder.encoding import encode_columns
from mipic_st.encoder.structure import evaluation_mode, full_width, in_half_precision, unwrap
from mipic_st.encoder.surgery import identity_dense, keep_description
from mipic_st.numerics import compare_vectors, no_autocast, unit_length
from mipic_st.transforms.base import Transform, Vectors, apply_matrix
from mipic_st.transforms.columns import as_dataset, text_columns
from mipic_st.transforms.fitting import checked_vectors
from mipic_st.transforms.frames import Candidate, checked_settings, completed, held_out_report, off_orthogonal
from mipic_st.transforms.objectives import RotationObjective
from mipic_st.transforms.pairs import Pairs
from mipic_st.validation import checked_count, checked_dims, per_column

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

logger = logging.getLogger(__name__)

# Texts whose full-width cosines are compared before and after a model was changed.
_PROBES = 32
# Passes over texts that come without pairs.
_TEXT_PASSES = 8


# --- on arrays --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Rotation(Transform):
    """An orthogonal map of embeddings whose leading values are worth keeping.

    Attributes:
        matrix: R, (D, D), float32, on the CPU. Vectors are rows: rotated vectors are ``vectors @ R``.
        dims: The truncation dimensions that it was fitted for, ascending.
        report: What a held-out part of the data says, one dict per dim: ``accuracy_before`` and ``accuracy_after``, the
            share of anchors that find their own positive among the held-out ones (texts only: that find what is nearest
            at full width); ``similarity_before`` and ``similarity_after``, Spearman correlation of cosines with those
            at full width; ``change``, accuracy after minus before, and ``error``, its standard error. "before" is plain
            truncation.

    Example:
        >>> rotation = Rotation(torch.eye(4)[:, [2, 0, 1, 3]], (1, 2))
        >>> rotation(np.array([[1.0, 0.0, 3.0, 4.0]], dtype=np.float32)).tolist()
        [[3.0, 1.0, 0.0, 4.0]]
        >>> rotation(np.array([[4.0, 0.0, 3.0, 0.0]]), dim=2).round(1).tolist()
        [[0.6, 0.8]]
    """

    kind: ClassVar[str] = "rotation"
    caption = "held-out data, x100; found: own pair comes first; similarity: correlation of cosines with full width"
    headings: ClassVar[dict[str, str]] = {
        "dim": "dim",
        "accuracy_before": "found, truncated",
        "accuracy_after": "found, rotated",
        "similarity_before": "similarity, truncated",
        "similarity_after": "similarity, rotated",
    }
    matrix: Tensor
    dims: tuple[int, ...]
    report: list[dict[str, float]] = field(default_factory=list)

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

    @property
    def gained(self) -> bool:
        """Whether any dim is better than plain truncation on the held-out part.

        That is, by two standard errors of its accuracy, or by 0.01 of its similarity.
        """
        return any(
            row["change"] > 2 * row["error"] or row["similarity_after"] > row["similarity_before"] + 0.01
            for row in self.report
        )

    @property
    def worse_dims(self) -> tuple[int, ...]:
        """Dims that are worse than plain truncation on the held-out part, by two standard errors or more."""
        return tuple(int(row["dim"]) for row in self.report if row["change"] < -2 * row["error"])

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
            dims, report = (json.loads(notes[name]) for name in ("dims", "report"))
            return {"matrix": tensors["rotation"], "dims": tuple(dims), "report": report}
        return super()._read(tensors, notes)


def fit_rotation(
    anchors: np.ndarray | Tensor,
    positives: np.ndarray | Tensor | None = None,
    *,
    dims: Sequence[int],
    contrastive_dims: Sequence[int] | None = None,
    similarity_weight: float = 10.0,
    contrastive_temperature: float = 0.1,
    similarity_temperature: float = 0.07,
    batch_size: int = 512,
    negatives: int = 4096,
    max_steps: int = 250,
    learning_rate: float = 3e-3,
    held_out: float = 0.1,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> Rotation:
    """Learn an orthogonal map after which the first values of an embedding say most, from vectors alone.

    Works on vectors of any origin: a model, an API, a database. All dims learn to keep the full-width similarities,
    the smallest also what belongs together: the two texts of a pair or, with texts only, a text and its nearest
    neighbour at full width. A part of the data is held out: on it the fit is stopped at its best step and compared with
    plain truncation. The fit runs on the device of the vectors, and in float32.

    Args:
        anchors: (N, D) vectors of the texts, or of the first text of each pair. Of any length: directions count.
        positives: (N, D) vectors of the second texts, row by row. None if there are texts only, of which 20,000 at
            most are used.
        dims: The truncation dimensions to serve, each up to D. D itself needs no fit and is left out.
        contrastive_dims: Those of ``dims`` that take the contrastive term. Default: those up to 32, where it helped.
        similarity_weight: lambda, weight of the similarity term, >= 0.
        contrastive_temperature: tau_c of InfoNCE, > 0.
        similarity_temperature: tau_s of the similarity term, > 0.
        batch_size: Rows per step; memory grows with its square.
        negatives: How many positives each anchor of a step is compared with in the contrastive term, its own among
            them; at least ``batch_size`` are. Many help the smallest dims, and cost little without an encoder.
        max_steps: Steps; the best of them on the held-out part is kept. With texts only, also no more than eight passes
            over them: nearest neighbours are weak labels, which 1,000 texts followed for longer than that made STS
            worse than truncation.
        learning_rate: Adam's first learning rate, decayed along a cosine, > 0.
        held_out: Share of the rows that is held out, in (0, 0.5]; at most 2,048 rows are.
        seed: Seeds the held-out part and the batches; the global generators are left alone.
        show_progress_bar: Show a bar over steps. Default: as the log level says, like ``encode``.

    Returns:
        :class:`Rotation`, with its report. A warning in the log names the dims that got worse than truncation.

    Raises:
        TypeError: If the vectors are no arrays of floating numbers.
        ValueError: If shapes do not fit, a value is not finite, a vector is zero, there are fewer distinct texts than
            the largest dim, or another argument is out of its range.

    Source:
        Defaults were chosen on STS13 and SICK validation with
        all-MiniLM-L6-v2: weights of the similarity term from 4 to 20 and temperatures from 0.05 to 0.1 are within 0.3
        of each other, a weight of 1 loses half a point at 64 dims.

    Example:
        >>> rotation = fit_rotation(anchor_vectors, positive_vectors, dims=[128, 64, 32, 16, 8])  # doctest: +SKIP
        >>> small = rotation(vectors, dim=16)                                                  # doctest: +SKIP
    """
    anchors = checked_vectors("anchors", anchors, directions=True)
    if positives is not None:
        positives = checked_vectors("positives", positives, directions=True)
        if positives.shape != anchors.shape:
            raise ValueError(
                f"anchors and positives must have one vector for each other, got {tuple(anchors.shape)} and "
                f"{tuple(positives.shape)}."
            )
        positives = positives.to(anchors.device)
    objective, options, held_out = checked_settings(
        anchors.shape[1],
        dims=dims,
        contrastive_dims=contrastive_dims,
        similarity_weight=similarity_weight,
        contrastive_temperature=contrastive_temperature,
        similarity_temperature=similarity_temperature,
        batch_size=batch_size,
        negatives=negatives,
        max_steps=max_steps,
        learning_rate=learning_rate,
        held_out=held_out,
        seed=seed,
        show_progress_bar=show_progress_bar,
    )
    pairs = Pairs.of(anchors, positives)
    _require_texts(pairs.texts, objective)
    candidate = Candidate("rotation", objective)
    # the fit needs gradients, also where the caller switched them off for its encoder
    with no_autocast(anchors), torch.inference_mode(False), torch.enable_grad():
        training, test = (part.with_positives() for part in pairs.split(held_out, options["generator"]))
        if positives is None:
            passes = math.ceil(_TEXT_PASSES * len(training) / options["batch_size"])
            options["max_steps"] = min(options["max_steps"], passes)
        frame = candidate.fit(training, test, **options)
        matrix = completed(frame, training)
        rotation = Rotation(matrix.cpu(), tuple(objective.dims), held_out_report(test, matrix, objective.dims))
    if rotation.worse_dims:
        logger.warning(
            "On held-out data the rotation is worse than plain truncation at dims %s:\n%s\nGive more data, or data "
            "nearer to what will be searched.",
            list(rotation.worse_dims),
            rotation,
        )
    return rotation


def _require_texts(count: int, objective: RotationObjective) -> None:
    if count < max(objective.dims):
        raise ValueError(
            f"{count} distinct texts cannot say which {max(objective.dims)} values to keep: give more, or leave dims "
            f"from {count} on out of dims."
        )


# --- on models --------------------------------------------------------------------------------------------------------


@torch.inference_mode(False)  # what is put into the model must be trainable, wherever the call stands
def rotate_model(
    model: SentenceTransformer,
    data: Dataset | pd.DataFrame | Mapping[str, Sequence[Any]] | Iterable[str],
    dims: Sequence[int],
    *,
    prompts: str | Mapping[str, str] | None = None,
    router_mapping: Mapping[str, str] | None = None,
    batch_size: int = 32,
    show_progress_bar: bool | None = None,
    **fit_options: Any,
) -> Rotation:
    """Fit a rotation on texts and put it into the model, in place: one call makes an encoder Matryoshka.

    Every distinct text is encoded once, at full width. The rotation becomes a bias-free identity ``Dense`` before
    Normalize; a model that already ends in a linear Dense (a rotation put in earlier, for one) gets it multiplied into
    that layer's weight. Full-width cosines stay as they are, which is checked before the function returns. The model is
    changed in place, because a loss, a trainer and an evaluator hold this very object; :meth:`Rotation.save` keeps the
    matrix. If no dim gained on the held-out part, the model is left as it was, and a warning says so.

    In a model of half precision the Dense has that precision too, so cosines move by its rounding (about 1e-2 in
    bfloat16); ``Rotation.matrix`` is float32.

    Args:
        model: Any SentenceTransformer, also one of StaticEmbedding or with a Router.
        data: A ``datasets.Dataset``, a data frame, a dict of columns, a stream (its first 100,000 rows), or a list of
            texts. Of the text columns the first two are taken as pairs, in the order in which the trainer takes them;
            further ones (negatives) are not used. Of two text columns with scores or labels (``score``, ``label`` and
            the other names of :mod:`mipic_st.data`), only pairs that say yes are used: 1 of labels 0 and 1, or scores
            from 80% of the range on (from 0 to the highest of 1, 5 or 10 that covers them). One text column, or a list,
            is texts only.
        dims: The truncation dimensions to serve. The full width may be among them.
        prompts: As in the trainer's arguments: one prompt for all columns, or one per column name. Default: what
            ``encode`` does by default.
        router_mapping: As in the trainer's arguments: column name to route, for models with a Router. Default: the
            Router's own default route.
        batch_size: Texts per forward pass.
        show_progress_bar: Show bars while encoding and fitting. Default: as the log level says, like ``encode``.
        **fit_options: Any other keyword of :func:`fit_rotation`, e.g. ``seed``, ``max_steps``, ``held_out``; there
            ``batch_size`` is called ``fit_batch_size``.

    Returns:
        :class:`Rotation`: the matrix and the held-out report.

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
    dims = checked_dims("dims", dims, full_width(model))
    if "fit_batch_size" in fit_options:
        fit_options["batch_size"] = fit_options.pop("fit_batch_size")
    batch_size = checked_count("batch_size", batch_size)
    defaults = dict(fit_rotation.__kwdefaults__ or {})
    if wrong := sorted(set(fit_options) - set(defaults)):
        raise TypeError(f"rotate_model has no arguments {wrong}, and neither has fit_rotation.")
    # before anything is encoded
    objective, *_ = checked_settings(full_width(model), **(defaults | fit_options | {"dims": dims}))
    data = as_dataset(data)
    columns = text_columns(data)
    _require_texts(len({text for texts in columns.values() for text in texts}), objective)
    names = " and ".join(map(repr, columns)) if any(columns) else "a list"
    used = f"{len(next(iter(columns.values())))} {'pairs' if len(columns) == 2 else 'texts'} of {names}"
    logger.info("The rotation is fitted on %s.", used)
    present = getattr(data, "column_names", [])
    encode = partial(
        encode_columns,
        model,
        prompts=per_column("prompts", prompts, [*columns], present),
        routes=per_column("router_mapping", router_mapping, [*columns], present),
        batch_size=batch_size,
        show_progress_bar=show_progress_bar,
    )
    inner = unwrap(model)
    training, known = inner.training, list(inner.children())
    with evaluation_mode(model):
        vectors = dict(encode(columns))
        arrays = [vectors[name] for name in columns]
        rotation = fit_rotation(*arrays, dims=dims, show_progress_bar=show_progress_bar, **fit_options)
        if not rotation.gained:
            logger.warning(
                "No dim gained on held-out data, so the model was left as it is. It was fitted on %s; more texts, or "
                "pairs in the place of texts, may help.\n%s",
                used,
                rotation,
            )
            return rotation
        # of every column: with a Router each has its own way through the model
        probes = {name: list(dict.fromkeys(texts))[:_PROBES] for name, texts in columns.items()}
        before = dict(encode(probes))
        with ExitStack() as undo:  # all or nothing: whatever fails, the model is then what it was
            undo.callback(keep_description(inner))
            undo.callback(rotation.put_in(inner))
            for name, after in encode(probes):
                _check_cosines(before[name], after, rotation, half=in_half_precision(model))
            describe_dims(
                model,
                {*dims, len(rotation.matrix)},
                introduction="The embedding space was rotated with mipic-st, so that the first values of a vector say "
                "most. Full-width cosine similarities are those of the original model.",
            )
            undo.pop_all()
    for module in inner.children():
        if all(module is not other for other in known):
            module.train(training)
    return rotation


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
