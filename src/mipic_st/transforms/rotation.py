r"""The rotation: an orthogonal map of embeddings after which their first values are worth keeping.

Turned vectors have the same full-width cosines; what changes is what is left when they are cut. :func:`fit_rotation`
works on vectors, :func:`rotate_model` puts the result into a model.

Symbols: N vectors (or pairs), D their width, ``dims`` the truncation dimensions d_1 < ... < d_n, m the largest of them,
``frame`` the first m columns of R, (D, m). Only these matter to the objective; the others are completed.

The objective is, with unit-length anchors A and positives P, and A_d the first d values of A R at unit length,

.. math:: \sum_{d \in C} \text{InfoNCE}(A_d P_d^T / \tau_c)
    + \lambda \sum_{d \in S} KL(\text{softmax}(A P^T / \tau_s) \,\|\, \text{softmax}(A_d P_d^T / \tau_s))

C holds the smallest dims, which are to know what belongs together among many negatives; S the larger ones, which are to
keep the similarities of the full width. Related work: AdaWidth (arXiv 2608.23862) learns a product of Householder
reflections, Matryoshka-Adaptor (arXiv 2407.20243) a residual network that changes the full width too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from mipic_st.data import SCORE_NAMES, found_classes
from mipic_st.encoder.card import describe_dims
from mipic_st.encoder.encoding import encode_columns
from mipic_st.encoder.structure import evaluation_mode, full_width, in_half_precision, unwrap
from mipic_st.encoder.surgery import put_in_map
from mipic_st.numerics import masked, no_autocast, prefix_cosines, similarity_kl, spearman, unit_length
from mipic_st.transforms.fitting import BLOCK, as_tensor, checked_vectors, minimise, row_orders, table_of
from mipic_st.validation import checked_count, checked_dims, checked_number, checked_texts, per_column

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

logger = logging.getLogger(__name__)

Vectors = TypeVar("Vectors", np.ndarray, Tensor)

# Wider vectors than this are kept orthonormal by a QR decomposition: Cayley's map solves a D x D system in every step,
# and the backward pass of torch's Householder map takes 20 s at 4,096 values.
_CAYLEY_UP_TO = 1024
# Rows whose cosines with each other are ranked for the report.
_RANKED = 512
# Texts whose full-width cosines are compared before and after a model was changed.
_PROBES = 32
# Texts whose nearest neighbours are looked for: all pairs of them are compared.
_NEIGHBOURHOOD = 20_000
# Passes over texts that come without pairs.
_TEXT_PASSES = 8


# --- the objective ----------------------------------------------------------------------------------------------------


def rotation_objective(
    anchors: Tensor,
    positives: Tensor,
    frame: Tensor,
    dims: Sequence[int],
    *,
    contrastive_dims: Sequence[int] = (),
    negatives: Tensor | None = None,
    same: Tensor | None = None,
    similarity_weight: float = 10.0,
    contrastive_temperature: float = 0.1,
    similarity_temperature: float = 0.07,
) -> Tensor:
    """What the rotation minimises, on one batch: contrastive at some dims, similarity distillation at the others.

    Args:
        anchors: A, (B, D), unit length.
        positives: P, (B, D), unit length.
        frame: The first m columns of the rotation, (D, m).
        dims: Ascending dims, the last one m.
        contrastive_dims: C, those of ``dims`` that take InfoNCE; the others take the KL of similarities.
        negatives: (M, D), unit length: more negatives for InfoNCE beside the other positives of the batch.
        same: (B, B + M), true where a positive or negative is the anchor's own text, or its own positive once more.
        similarity_weight: lambda, weight of the KL.
        contrastive_temperature: tau_c.
        similarity_temperature: tau_s.

    Returns:
        Scalar, the sum over dims.

    Example:
        >>> vectors = torch.eye(4)
        >>> rotation_objective(vectors, vectors, torch.eye(4, 4), [4], contrastive_dims=[4]).item() < 1e-3
        True
    """
    total = frame.new_zeros(())
    turned, others = anchors @ frame, positives @ frame
    if distilled := [dim for dim in dims if dim not in contrastive_dims]:
        teacher = (anchors @ positives.T / similarity_temperature).log_softmax(dim=1)
        for dim in distilled:
            cosines = prefix_cosines(turned, others, dim)
            total = total + similarity_weight * similarity_kl(cosines, teacher, similarity_temperature)
    if contrastive_dims:
        candidates = others[:, : max(contrastive_dims)]
        if negatives is not None:
            candidates = torch.cat([candidates, negatives @ frame[:, : max(contrastive_dims)]])
        own = torch.arange(len(anchors), device=anchors.device)
        for dim in contrastive_dims:
            cosines = masked(prefix_cosines(turned, candidates, dim), same)
            total = total + F.cross_entropy(cosines / contrastive_temperature, own)
    return total


# --- on arrays --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rotation:
    """An orthogonal map of embeddings whose leading values are worth keeping.

    Attributes:
        matrix: R, (D, D), float32, on the CPU. Vectors are rows: turned vectors are ``vectors @ R``.
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

    matrix: Tensor
    dims: tuple[int, ...]
    report: list[dict[str, float]] = field(default_factory=list)

    def __call__(self, vectors: Vectors, dim: int | None = None) -> Vectors:
        """Turn vectors; with ``dim``, cut them and scale them to unit length too.

        Args:
            vectors: (N, D) or (D,), NumPy or torch, any floating type and device.
            dim: Values to keep, 1 to D. None keeps all, and the length as it is.

        Returns:
            The same kind, type and device, (N, D) or (N, dim).

        Raises:
            TypeError: If the vectors are no array of floating numbers.
            ValueError: If the vectors are not of width D, or ``dim`` is out of range.
        """
        given = as_tensor("vectors", vectors)
        width = len(self.matrix)
        if vectors.shape[-1] != width:
            raise ValueError(f"vectors have width {vectors.shape[-1]}, this rotation is for {width}.")
        if dim is not None:
            (dim,) = checked_dims("dim", [dim], width)
        matrix = self.matrix[:, :dim].to(given.device)
        with no_autocast(given):
            turned = given.to(matrix.dtype) @ matrix
        if dim is not None:
            turned = F.normalize(turned, dim=-1)
        turned = turned.to(given.dtype)
        return turned if isinstance(vectors, Tensor) else turned.numpy()

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

    def save(self, path: str | PathLike[str]) -> None:
        """Write matrix, dims and report into one safetensors file.

        Args:
            path: The file; its folder must exist.
        """
        from safetensors.torch import save_file

        notes = {"dims": json.dumps(self.dims), "report": json.dumps(self.report)}
        save_file({"rotation": self.matrix.contiguous()}, path, metadata=notes)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read what :meth:`save` wrote.

        Args:
            path: The file.

        Returns:
            The rotation.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        try:
            with safe_open(path, framework="pt") as file:
                notes, matrix = file.metadata() or {}, file.get_tensor("rotation")
            return cls(matrix, tuple(json.loads(notes["dims"])), json.loads(notes["report"]))
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no rotation that Rotation.save wrote, or is damaged: {error}.") from error

    def to_frame(self) -> pd.DataFrame:
        """The report as a table.

        Returns:
            One row per dim.

        Raises:
            ImportError: If pandas is missing.
        """
        return table_of(self.report)

    def __str__(self) -> str:
        rows = [("dim", "found, truncated", "found, rotated", "similarity, truncated", "similarity, rotated")]
        for row in self.report:
            values = (row[f"{kind}_{when}"] for kind in ("accuracy", "similarity") for when in ("before", "after"))
            rows.append((str(row["dim"]), *(f"{100 * value:.1f}" for value in values)))  # type: ignore[arg-type]
        widths = [len(head) for head in rows[0]]
        head = "held-out data, x100; found: own pair comes first; similarity: correlation of cosines with full width"
        lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join([head, *lines])


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
        The objective is the one of the module's docstring. Defaults were chosen on STS13 and SICK validation with
        all-MiniLM-L6-v2: weights of the similarity term from 4 to 20 and temperatures from 0.05 to 0.1 are within 0.3
        of each other, a weight of 1 loses half a point at 64 dims.

    Example:
        >>> rotation = fit_rotation(anchor_vectors, positive_vectors, dims=[128, 64, 32, 16, 8])  # doctest: +SKIP
        >>> small = rotation(vectors, dim=16)                                                  # doctest: +SKIP
    """
    anchors = checked_vectors("anchors", anchors)
    if positives is not None:
        positives = checked_vectors("positives", positives)
        if positives.shape != anchors.shape:
            raise ValueError(
                f"anchors and positives must have one vector for each other, got {tuple(anchors.shape)} and "
                f"{tuple(positives.shape)}."
            )
        positives = positives.to(anchors.device)
    width = anchors.shape[1]
    dims = sorted(dim for dim in checked_dims("dims", dims, width) if dim < width)
    if not dims:
        raise ValueError(
            f"dims must hold a dimension below the vectors' width of {width}, else there is nothing to do."
        )
    if contrastive_dims is None:
        contrastive_dims = [dim for dim in dims if dim <= 32]
    else:
        contrastive_dims = checked_dims("contrastive_dims", contrastive_dims) if len(contrastive_dims) else []
        if wrong := sorted(set(contrastive_dims) - set(dims)):
            raise ValueError(f"contrastive_dims must be among dims {dims}, got {wrong}.")
    similarity_weight = checked_number("similarity_weight", similarity_weight, 0)
    if not similarity_weight and set(dims) - set(contrastive_dims):
        raise ValueError(
            f"similarity_weight=0 leaves nothing to fit at dims {sorted(set(dims) - set(contrastive_dims))}: name them "
            "in contrastive_dims, or drop them."
        )
    settings: dict[str, Any] = {
        "contrastive_dims": contrastive_dims,
        "similarity_weight": similarity_weight,
        "contrastive_temperature": checked_number(
            "contrastive_temperature", contrastive_temperature, 0, exclusive=True
        ),
        "similarity_temperature": checked_number("similarity_temperature", similarity_temperature, 0, exclusive=True),
    }
    batch_size = checked_count("batch_size", batch_size, least=2)
    negatives = checked_count("negatives", negatives)
    max_steps = checked_count("max_steps", max_steps)
    learning_rate = checked_number("learning_rate", learning_rate, 0, exclusive=True)
    held_out = checked_number("held_out", held_out, 0, 0.5, exclusive=True)
    seed = checked_count("seed", seed, least=0)

    pairs = _Pairs.of(anchors, positives)
    if pairs.texts < max(dims):
        raise ValueError(
            f"{pairs.texts} distinct texts cannot say which {max(dims)} values to keep: give more, or leave dims from "
            f"{pairs.texts} on out of dims."
        )
    generator = torch.Generator().manual_seed(seed)
    # the fit needs gradients, also where the caller switched them off for its encoder
    with no_autocast(anchors), torch.inference_mode(False), torch.enable_grad():
        training, test = (part.with_positives() for part in pairs.split(held_out, generator))
        if positives is None:
            max_steps = min(max_steps, math.ceil(_TEXT_PASSES * len(training) / batch_size))
        frame = _fit_frame(
            training,
            test,
            dims,
            settings,
            batch_size,
            negatives,
            generator,
            max_steps=max_steps,
            learning_rate=learning_rate,
            show_progress_bar=show_progress_bar,
        )
        matrix = _completed(frame, training)
        rotation = Rotation(matrix.cpu(), tuple(dims), _held_out_report(test, matrix, dims))
    if rotation.worse_dims:
        logger.warning(
            "On held-out data the rotation is worse than plain truncation at dims %s:\n%s\nGive more data, or data "
            "nearer to what will be searched.",
            list(rotation.worse_dims),
            rotation,
        )
    return rotation


def _digest(row: np.ndarray) -> bytes:
    """A short name for a vector; the rows' own bytes would hold all vectors once more."""
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Which vectors belong together, and which of them are the same text. The vectors stay where they came in.

    Attributes:
        anchors: (A, D).
        positives: (P, D), or None where there are texts only.
        rows: (N, 2), of anchors and positives, or (N, 1) where there are texts only, each once.
        ids: As rows: one number per distinct vector, of anchors and positives.
        texts: Number of distinct vectors.
    """

    anchors: Tensor
    positives: Tensor | None
    rows: Tensor
    ids: Tensor
    texts: int

    @classmethod
    def of(cls, anchors: Tensor, positives: Tensor | None) -> _Pairs:
        known: dict[bytes, int] = {}
        columns = [anchors] if positives is None else [anchors, positives]
        ids = torch.tensor(
            [[known.setdefault(_digest(row), len(known)) for row in column.cpu().numpy()] for column in columns]
        ).T
        if positives is None:
            rows = torch.as_tensor(np.sort(np.unique(ids[:, 0].numpy(), return_index=True)[1]))
        else:
            rows = (ids[:, 0] != ids[:, 1]).nonzero().flatten()
            if not len(rows):
                raise ValueError("anchors and positives are the same vectors: give anchors only.")
        if len(rows) < len(anchors):
            logger.info("%d of %d rows repeat a text and are left out.", len(anchors) - len(rows), len(anchors))
        return cls(anchors, positives, rows[:, None].expand(-1, len(columns)), ids[rows], len(known))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: Tensor) -> _Pairs:
        return _Pairs(self.anchors, self.positives, self.rows[chosen], self.ids[chosen], self.texts)

    def split(self, share: float, generator: torch.Generator) -> tuple[_Pairs, _Pairs]:
        """Rows to fit on and rows held out, none of whose texts is in the others."""
        order = torch.randperm(len(self), generator=generator)
        if self.positives is None:
            order = order[:_NEIGHBOURHOOD]
        test, rest = order.tensor_split([min(BLOCK, max(2, round(share * len(order))))])
        inside = torch.zeros(self.texts, dtype=torch.bool)
        inside[self.ids[test].flatten()] = True
        training = rest[~inside[self.ids[rest]].any(dim=1)]
        if len(training) < 2:
            raise ValueError(
                f"the {len(order)} rows share so few texts that none is left beside the held-out ones: give more "
                "distinct texts, or texts only."
            )
        return self.take(training), self.take(test)

    def with_positives(self) -> _Pairs:
        """Pairs as they are; texts with their nearest neighbours at full width."""
        if self.positives is not None:
            return self
        vectors = F.normalize(self.anchors[self.rows[:, 0].to(self.anchors.device)], dim=1)
        found = []
        for start in range(0, len(vectors), BLOCK):
            cosines = vectors[start : start + BLOCK] @ vectors.T
            cosines.diagonal(start).fill_(-2.0)
            found.append(cosines.argmax(dim=1))
        nearest = torch.cat(found).cpu()
        rows, ids = (torch.cat([part, part[nearest]], dim=1) for part in (self.rows, self.ids))
        return _Pairs(self.anchors, self.anchors, rows, ids, self.texts)

    def batch(self, chosen: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Anchors and positives of the first ``size`` pairs, positives of the others, and which are no negatives."""
        assert self.positives is not None
        rows = self.rows[chosen].to(self.anchors.device)
        anchor, positive = self.ids[chosen[:size], :1], self.ids[chosen, 1]
        same = (positive == positive[:size, None]) | (positive == anchor)
        same.fill_diagonal_(False)
        positives = F.normalize(self.positives[rows[:, 1]], dim=1)
        mask = same.to(self.anchors.device) if bool(same.any()) else None
        return F.normalize(self.anchors[rows[:size, 0]], dim=1), positives[:size], positives[size:], mask


class _Orthonormal(nn.Module):
    """Any D x m matrix to the orthonormal frame of its QR decomposition; a frame to itself."""

    def forward(self, free: Tensor) -> Tensor:
        frame, triangle = torch.linalg.qr(free)
        # QR may turn a column's sign
        return frame * torch.where(triangle.diagonal() < 0, -1.0, 1.0)


class _Frame(nn.Module):
    """The first columns of an orthogonal matrix, started at the identity."""

    def __init__(self, width: int, columns: int, device: torch.device) -> None:
        super().__init__()
        self.columns = nn.Parameter(torch.eye(width, columns, device=device))
        if width <= _CAYLEY_UP_TO:
            # Cayley's map has no inverse in torch, so the start goes in as a constant factor
            parametrizations.orthogonal(self, "columns", orthogonal_map="cayley", use_trivialization=True)
        else:
            parametrize.register_parametrization(self, "columns", _Orthonormal())


def _fit_frame(
    training: _Pairs,
    test: _Pairs,
    dims: list[int],
    settings: Mapping[str, Any],
    batch_size: int,
    negatives: int,
    generator: torch.Generator,
    **schedule: Any,
) -> Tensor:
    """Minimise the objective over frames, (D, m); the one that the held-out part likes best is returned."""
    count, width = len(training), training.anchors.shape[1]
    batch_size = min(batch_size, count)
    # torch completes the start to a square matrix with random columns
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed all GPUs, too
        module = _Frame(width, max(dims), training.anchors.device)

    def objective(pairs: _Pairs, rows: Tensor) -> Tensor:
        anchors, positives, others, same = pairs.batch(rows, batch_size)
        return rotation_objective(anchors, positives, module.columns, dims, negatives=others, same=same, **settings)

    return minimise(
        module.parameters(),
        lambda order: objective(training, order[: max(batch_size, negatives)]),
        lambda: objective(test, torch.arange(len(test))),
        lambda: module.columns,
        row_orders(count, batch_size, generator),
        description="Rotation",
        **schedule,
    )


def _completed(frame: Tensor, training: _Pairs) -> Tensor:
    """The orthogonal matrix that begins with the frame; the other columns follow by the variance they hold."""
    width, columns = frame.shape
    leading = _Orthonormal()(frame.double())
    rest = torch.linalg.qr(leading, mode="complete").Q[:, columns:]
    second = torch.zeros(width - columns, width - columns, dtype=torch.double, device=rest.device)
    for block in training.rows[:, 0].to(rest.device).split(BLOCK):
        part = F.normalize(training.anchors[block].double(), dim=1) @ rest
        second += part.T @ part
    order = torch.linalg.eigh(second).eigenvectors.flip(1)
    return torch.cat([leading, rest @ order], dim=1).float()


def _held_out_report(test: _Pairs, matrix: Tensor, dims: Sequence[int]) -> list[dict[str, float]]:
    """Truncation before and after the rotation, on rows that no step has seen."""
    anchors, positives, _, same = test.batch(torch.arange(len(test)), len(test))
    wanted = torch.arange(len(anchors), device=anchors.device)
    # ranks of all pairs of 2,048 rows would take more memory than the fit
    some = slice(_RANKED)
    reference = (anchors[some] @ positives[some].T).flatten().cpu().numpy()
    found: dict[str, list[Tensor]] = {"before": [], "after": []}
    kept: dict[str, list[float]] = {"before": [], "after": []}
    for when, turned in (("before", (anchors, positives)), ("after", (anchors @ matrix, positives @ matrix))):
        for dim in dims:
            cosines = prefix_cosines(*turned, dim)
            kept[when].append(spearman(cosines[some, some].flatten().cpu().numpy(), reference))
            found[when].append((masked(cosines, same).argmax(dim=1) == wanted).double())
    report = []
    for index, dim in enumerate(dims):
        change = found["after"][index] - found["before"][index]
        report.append(
            {
                "dim": dim,
                "accuracy_before": float(found["before"][index].mean()),
                "accuracy_after": float(found["after"][index].mean()),
                "similarity_before": kept["before"][index],
                "similarity_after": kept["after"][index],
                "change": float(change.mean()),
                "error": float(change.std() / len(change) ** 0.5),
            }
        )
    return report


# --- on models --------------------------------------------------------------------------------------------------------


@torch.inference_mode(False)  # what is put into the model must be trainable, wherever the call stands
def rotate_model(
    model: SentenceTransformer,
    data: Dataset | Sequence[str],
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
        data: A ``datasets.Dataset``, or a list of texts. Of the text columns the first two are taken as pairs, in the
            order in which the trainer takes them; further ones (negatives) are not used. Of two text columns with
            scores or labels beside them (``score``, ``label`` and the other names of :mod:`mipic_st.data`), only pairs
            that say yes are used: 1 of labels 0 and 1, or scores from 80% of the range on (from 0 to the highest of 1,
            5 or 10 that covers them). One text column, or a list, is texts only.
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
        RuntimeError: If full-width cosines changed; the model is then as it was.

    Example:
        >>> rotation = rotate_model(model, train_dataset, [384, 128, 64, 32, 16, 8])  # doctest: +SKIP
        >>> print(rotation)  # doctest: +SKIP
        >>> model.save_pretrained("rotated")  # doctest: +SKIP
    """
    dims = checked_dims("dims", dims, full_width(model))
    if "fit_batch_size" in fit_options:
        fit_options["batch_size"] = fit_options.pop("fit_batch_size")
    batch_size = checked_count("batch_size", batch_size)
    columns = _text_columns(data)
    names = " and ".join(map(repr, columns)) if any(columns) else "a list"
    used = f"{len(next(iter(columns.values())))} {'pairs' if len(columns) == 2 else 'texts'} of {names}"
    logger.info("The rotation is fitted on %s.", used)
    present = getattr(data, "column_names", [])
    prompt_of = per_column("prompts", prompts, [*columns], present)
    route_of = per_column("router_mapping", router_mapping, [*columns], present)

    def encode(texts: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
        found = dict(
            encode_columns(
                model,
                texts,
                prompts=prompt_of,
                routes=route_of,
                batch_size=batch_size,
                show_progress_bar=show_progress_bar,
            )
        )
        return {name: found[name] for name in texts}

    inner = unwrap(model)
    training, known = inner.training, list(inner.children())
    with evaluation_mode(model):
        arrays = encode(columns).values()
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
        before = encode(probes)
        undo = put_in_map(inner, rotation.matrix)
        try:
            for name, after in encode(probes).items():
                _check_cosines(before[name], after, rotation, half=in_half_precision(model))
        except BaseException:
            undo()
            raise
    for module in inner.children():
        if all(module is not other for other in known):
            module.train(training)
    _describe_rotation(model, dims, rotation)
    return rotation


def _text_columns(data: Any) -> dict[str, list[str]]:
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


def _check_cosines(before: np.ndarray, after: np.ndarray, rotation: Rotation, half: bool) -> None:
    """Full-width cosines must not move, and the leading values must be the rotation's."""
    matrix = rotation.matrix.double()
    off = float((matrix.T @ matrix - torch.eye(len(matrix), dtype=torch.double)).abs().max())
    first, second, turned = (unit_length(vectors) for vectors in (before, after, rotation(before)))
    moved = float(np.abs(first @ first.T - second @ second.T).max())
    wrong = float(np.abs(turned - second).max())
    limit = 3e-2 if half else 1e-5
    if off > 1e-5 or moved > limit or wrong > max(limit, 1e-4):
        raise RuntimeError(
            f"The rotation changed full-width cosines by {moved:.1e} (allowed {limit:.0e}; orthogonal to {off:.1e}, "
            f"vectors off by {wrong:.1e}), so the model was left as it was. A module behind the pooling does more than "
            "this function knows; fit_rotation turns the vectors outside the model."
        )
    logger.info("Full-width cosines moved by %.1e at most.", moved)


def _describe_rotation(model: SentenceTransformer, dims: Sequence[int], rotation: Rotation) -> None:
    """Tell the config, for serving engines, and the model card what the model can do now."""
    width = len(rotation.matrix)
    describe_dims(
        model,
        {*dims, width},
        introduction="The embedding space was rotated with mipic-st, so that the first values of a vector say most. "
        "Full-width cosine similarities are those of the original model.",
    )
