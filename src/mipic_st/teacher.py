r"""A larger model as a teacher: at every dim, the similarities within a batch follow those that it sees.

The counterpart, between sentences, of what SIA does between tokens. The teacher encodes each text once, before the
training, and its vectors travel with the data (:func:`add_teacher_vectors`), so a step costs no more than without it.

Symbols: B sentences per column, C columns (anchors first), D the student's width, T the teacher's, which need not be D;
``dims`` the truncation dimensions.

.. math:: \sum_d KL(\text{softmax}(\cos(A^t, P^t) / \tau) \,\|\, \text{softmax}(\cos(A_d, P_d) / \tau))

with the anchors A, the sentences of all other columns P, t for the teacher's vectors and d for the student's first d
values. No part of MIPIC; in-batch similarities as what is distilled are those of ``DistillKLDivLoss`` and of
:func:`mipic_st.rotation.rotation_objective`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn import functional as F

from mipic_st._checks import checked_count, checked_texts
from mipic_st.backbone import NO_CUT, evaluation_mode
from mipic_st.sia import full_precision, no_autocast
from mipic_st.tails import checked_vectors, prefix_cosines

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["add_teacher_vectors", "similarity_divergence"]

# What the trainer's collator takes for the labels of a batch.
_LABEL_COLUMNS = ("label", "labels", "score", "scores")


def similarity_divergence(vectors: Tensor, teacher: Tensor, dims: Sequence[int], temperature: float) -> Tensor:
    """KL of the student's in-batch similarities at every dim to the teacher's, which are constants.

    Args:
        vectors: The student's sentence vectors, (C, B, D), anchors first.
        teacher: The teacher's, (C, B, T).
        dims: Truncation dimensions, each up to D.
        temperature: tau, > 0.

    Returns:
        One value per dim, float32, the mean over the B anchors.

    Example:
        >>> vectors = torch.eye(4).reshape(2, 2, 4)
        >>> similarity_divergence(vectors, vectors, [4], temperature=0.1).tolist()
        [0.0]
    """
    with no_autocast(vectors):
        vectors, teacher = full_precision(vectors, teacher.detach())
        # (B, D) anchors, (B * (C - 1), D) others
        (anchors, others), (first, second) = ((part[0], part[1:].flatten(0, 1)) for part in (vectors, teacher))
        wanted = (prefix_cosines(first, second, first.shape[1]) / temperature).log_softmax(dim=1)
        return torch.stack(
            [
                F.kl_div(
                    (prefix_cosines(anchors, others, dim) / temperature).log_softmax(dim=1),
                    wanted,
                    reduction="batchmean",
                    log_target=True,
                )
                for dim in dims
            ]
        )


def add_teacher_vectors(
    dataset: Dataset,
    teacher: SentenceTransformer,
    *,
    prompts: str | Mapping[str, str] | None = None,
    batch_size: int = 32,
    show_progress_bar: bool | None = None,
) -> Dataset:
    """Encode every text of a training set with a teacher, for ``MIPICLoss(..., teacher_weight=...)``.

    Each distinct text is encoded once. The vectors become the column ``label``, which the trainer hands to the loss.

    Args:
        dataset: Pairs, triplets or more columns of texts, as the trainer takes them, without labels or scores: the
            trainer reads one such column, and this one takes its place.
        teacher: Any SentenceTransformer, of any width.
        prompts: The teacher's prompts: one for all columns, or one per column name. Default: what its ``encode`` does
            by default.
        batch_size: Texts per forward pass.
        show_progress_bar: Show bars while encoding. Default: as the log level says, like ``encode``.

    Returns:
        The dataset with the column ``label``, which holds C vectors of T values in each row. They are 4 * C * T bytes,
        6 kB for pairs and 768 values, and lie in memory.

    Raises:
        TypeError: If ``dataset`` is no ``datasets.Dataset``, ``teacher`` no SentenceTransformer, or a column holds
            something other than texts.
        ValueError: If there are fewer than two columns or no rows, if there are labels or scores already, if
            ``prompts`` names another column, or if the teacher's vector of a text is zero or not finite.

    Example:
        >>> teacher = SentenceTransformer("sentence-transformers/all-mpnet-base-v2")  # doctest: +SKIP
        >>> train_dataset = add_teacher_vectors(train_dataset, teacher)  # doctest: +SKIP
        >>> loss = MIPICLoss(model, base_loss, dims, teacher_weight=4.0)  # doctest: +SKIP
    """
    if isinstance(getattr(dataset, "column_names", None), Mapping):
        raise TypeError(f"dataset is a DatasetDict with {sorted(dataset.column_names)}: give one of its splits.")
    if not hasattr(dataset, "add_column"):
        raise TypeError(f"dataset must be a datasets.Dataset, got {type(dataset).__name__}.")
    if not isinstance(teacher, SentenceTransformer):
        raise TypeError(f"teacher must be a SentenceTransformer, got {type(teacher).__name__}.")
    import pyarrow  # comes with datasets

    names = dataset.column_names
    if taken := [name for name in names if name in _LABEL_COLUMNS]:
        raise ValueError(
            f"dataset has the column {taken[0]!r}, and the trainer reads one column of labels: remove it, or train "
            "without a teacher."
        )
    if len(names) < 2 or not len(dataset):
        raise ValueError(f"dataset must have rows of two columns of texts or more, got {len(dataset)} of {names}.")
    if isinstance(prompts, Mapping) and (wrong := sorted(set(prompts) - set(names))):
        raise ValueError(f"prompts names {wrong}, which dataset does not have; its columns are {names}.")
    batch_size = checked_count("batch_size", batch_size)

    # a text may come with one prompt as a query and with another as a document
    prompt_of = {name: prompts.get(name) if isinstance(prompts, Mapping) else prompts for name in names}
    texts = {name: checked_texts(f"column {name!r} of dataset", dataset[name][:]) for name in names}
    known: dict[str | None, dict[str, np.ndarray]] = {}
    with evaluation_mode(teacher):
        for prompt in dict.fromkeys(prompt_of.values()):
            distinct = list(dict.fromkeys(text for name in names if prompt_of[name] == prompt for text in texts[name]))
            found = teacher.encode(
                distinct,
                prompt=prompt,
                batch_size=batch_size,
                show_progress_bar=show_progress_bar,
                truncate_dim=NO_CUT,
                convert_to_numpy=True,
            )
            known[prompt] = dict(zip(distinct, checked_vectors("the teacher's output", found).numpy(), strict=True))
    columns = [[known[prompt_of[name]][text] for text in texts[name]] for name in names]
    labels = np.stack(columns, axis=1)
    rows = pyarrow.array(labels.reshape(-1))
    for length in labels.shape[:0:-1]:
        rows = pyarrow.FixedSizeListArray.from_arrays(rows, length)
    return dataset.add_column("label", rows)
