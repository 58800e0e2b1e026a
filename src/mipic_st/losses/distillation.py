r"""Distillation: at every dim, the similarities within a batch follow those that a larger model, the teacher, sees.

.. math:: \sum_d KL(\text{softmax}(\cos(A^t, P^t) / \tau) \,\|\, \text{softmax}(\cos(A_d, P_d) / \tau))

with the anchors A, the sentences of all other columns P, t for the teacher's vectors, which travel with the data, and d
for the student's first d values. An anchor's own text among P is left out: it takes most of the softmax. Nothing counts
as a negative, so a query may have several positives in a batch. No part of MIPIC.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from mipic_st.data import LABEL_COLUMNS
from mipic_st.encoder.encoding import encode_columns
from mipic_st.encoder.structure import evaluation_mode
from mipic_st.numerics import full_precision, masked, no_autocast, prefix_cosines, similarity_kl
from mipic_st.validation import checked_count, checked_texts, per_column, require

if TYPE_CHECKING:
    from datasets import Dataset


def similarity_divergence(vectors: Tensor, teacher: Tensor, dims: Sequence[int], temperature: float) -> Tensor:
    """KL of the student's in-batch similarities at every dim to the teacher's, which are constants.

    Args:
        vectors: The student's sentence vectors, (C, B, D), anchors first.
        teacher: The teacher's, (C, B, T).
        dims: Truncation dimensions, each up to D.
        temperature: tau, > 0.

    Returns:
        One value per dim, the mean over the B anchors; float32, or float64 where the inputs are.

    Example:
        >>> vectors = torch.eye(4).reshape(2, 2, 4)
        >>> similarity_divergence(vectors, vectors, [4], temperature=0.1).tolist()
        [0.0]
    """
    with no_autocast(vectors):
        vectors, teacher = full_precision(vectors, teacher.detach())
        # (B, D) anchors, (B * (C - 1), D) others
        (anchors, others), (first, second) = ((part[0], part[1:].flatten(0, 1)) for part in (vectors, teacher))
        cosines = prefix_cosines(first, second, first.shape[1])
        itself = cosines > 1 - 1e-5
        wanted = (masked(cosines, itself) / temperature).log_softmax(dim=1)
        students = (masked(prefix_cosines(anchors, others, dim), itself) for dim in dims)
        return torch.stack([similarity_kl(student, wanted, temperature) for student in students])


def add_teacher_vectors(
    dataset: Dataset,
    teacher: SentenceTransformer,
    *,
    prompts: str | Mapping[str, str] | None = None,
    router_mapping: Mapping[str, str] | None = None,
    batch_size: int = 32,
    show_progress_bar: bool | None = None,
) -> Dataset:
    """Encode every text of a training set with a teacher, for ``MIPICLoss(..., distill_weight=...)``.

    The vectors become the column ``label``, which the trainer hands to the loss. They belong to the columns by their
    order and to the texts as they are now: rows may be shuffled, selected and joined afterwards, columns and texts not
    be changed. The column's type holds the names of the columns: ``datasets`` refuses to join data sets that have them
    in another order ("features can't be aligned"), and :class:`~mipic_st.losses.callback.MIPICCallback` to train on
    them.

    Args:
        dataset: Two or more columns of texts, as the trainer takes them, without labels or scores.
        teacher: Any SentenceTransformer; it teaches at its full width, whatever its ``truncate_dim``.
        prompts: The teacher's prompts: one for all columns, or one per column name. Default: what its ``encode`` does
            by default. Models with prompts for queries and documents need them here.
        router_mapping: Column name to route, for a teacher with a Router. Default: the Router's own default route.
        batch_size: Texts per forward pass.
        show_progress_bar: Show bars while encoding. Default: as the log level says, like ``encode``.

    Returns:
        The dataset with the column ``label``, C vectors of T values in each row, in torch format: 4 * C * T bytes a row
        in
        memory, also of each process of a distributed run. ``save_to_disk`` and ``datasets.load_from_disk`` give a
        dataset
        that lies in a file.

    Raises:
        TypeError: If an argument is of another kind, or a column holds something other than texts.
        ValueError: If there are fewer than two columns or no rows, labels or scores already, a transform or hidden
            columns, if an argument names another column, or the teacher's vector of a text is zero or not finite.

    Example:
        >>> teacher = SentenceTransformer("sentence-transformers/all-mpnet-base-v2")  # doctest: +SKIP
        >>> train_dataset = add_teacher_vectors(train_dataset, teacher)  # doctest: +SKIP
        >>> loss = MIPICLoss(model, base_loss, dims, distill_weight=4.0)  # doctest: +SKIP
    """
    names = _checked_columns(dataset)
    if not isinstance(teacher, SentenceTransformer):
        raise TypeError(f"teacher must be a SentenceTransformer, got {type(teacher).__name__}.")
    prompt_of = per_column("prompts", prompts, names, names)
    route_of = per_column("router_mapping", router_mapping, names, names)
    batch_size = checked_count("batch_size", batch_size)
    texts = {name: checked_texts(f"column {name!r} of dataset", dataset[name][:]) for name in names}

    labels: np.ndarray = np.empty(0, dtype=np.float32)
    with evaluation_mode(teacher):
        options: dict[str, Any] = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
        for name, vectors in encode_columns(teacher, texts, prompts=prompt_of, routes=route_of, **options):
            if not len(labels):
                labels = np.empty((len(dataset), len(names), vectors.shape[1]), dtype=np.float32)
            _require_directions(vectors, name, texts[name])
            labels[:, names.index(name)] = vectors
    import pyarrow  # comes with datasets
    from datasets import Sequence as Listed
    from datasets import Value

    rows: Any = pyarrow.array(labels.reshape(-1))
    kind: Any = Value("float32", id=json.dumps(names))
    for length in (labels.shape[2], labels.shape[1]):
        rows = pyarrow.FixedSizeListArray.from_arrays(rows, length)
        kind = Listed(kind, length=length)
    # a name for datasets' cache; made from the vectors, it would take a copy of them all
    taught = dataset.add_column("label", rows, new_fingerprint=uuid4().hex)
    taught.info.features["label"] = kind
    return taught.with_format("torch")


def require_taught_order(dataset: Any) -> None:
    """Refuse a data set, or several joined, whose columns are in another order than the teacher's vectors."""
    for part in getattr(dataset, "datasets", [dataset]):
        kind: Any = (getattr(part, "features", None) or {}).get("label")
        while hasattr(kind, "feature"):
            kind = kind.feature
        if names := getattr(kind, "id", None):
            own = [name for name in part.column_names if name not in ("label", "dataset_name")]
            if own != json.loads(names):
                raise ValueError(
                    f"The columns of the training data are {own}, and the teacher's vectors are those of "
                    f"{json.loads(names)}, in this order: call add_teacher_vectors after columns are chosen."
                )


def _checked_columns(dataset: Any) -> list[str]:
    """The columns of a dataset that can be taught."""
    datasets = require("datasets", "add_teacher_vectors needs datasets", "train")
    if isinstance(dataset, datasets.DatasetDict):
        raise TypeError(f"dataset is a DatasetDict with {sorted(dataset)}: give one of its splits.")
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"dataset must be a datasets.Dataset, got {type(dataset).__name__}. A dataset that is streamed has no end "
            "that is known, so its texts cannot be encoded beforehand."
        )
    names = list(dataset.column_names)
    if dataset.format["type"] == "custom" or set(dataset.format["columns"]) != set(names):
        raise ValueError(
            "dataset has a transform, or a format that hides columns, so what the trainer will see is not what is in "
            "it: use dataset.map, remove_columns or with_format(None) first."
        )
    if taken := [name for name in names if name in LABEL_COLUMNS]:
        raise ValueError(
            f"dataset has the column {taken[0]!r}, and the trainer reads one column of labels: remove it, or train "
            "without a teacher."
        )
    if len(names) < 2 or not len(dataset):
        raise ValueError(f"dataset must have rows of two columns of texts or more, got {len(dataset)} of {names}.")
    return names


def _require_directions(vectors: np.ndarray, name: str, texts: Sequence[str]) -> None:
    """Refuse vectors of zeros and of nan or inf, which would teach nothing, or everything."""
    lengths = np.einsum("nd,nd->n", vectors, vectors)
    if len(bad := np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))):
        raise ValueError(
            f"the teacher's vector of {texts[bad[0]]!r} (column {name!r}, row {bad[0]}) is zero or not finite, as are "
            f"those of {len(bad) - 1} other rows of this column: leave these rows out."
        )
