"""Small functions on tensors that several folders share: precision, unit length, cosines of prefixes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def full_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float32, or untouched where they are float64."""
    return tuple(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)


def no_autocast(tensor: Tensor) -> AbstractContextManager:
    """A context in which autocast is off on the tensor's device."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """Cosines with those under the mask out of the running."""
    return values if mask is None else values.masked_fill(mask, -1e4)


def prefix_cosines(anchors: Tensor, positives: Tensor, dim: int) -> Tensor:
    """Cosine of every anchor, (B, m), with every positive, (M, m), truncated to ``dim``: (B, M).

    Example:
        >>> prefix_cosines(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), dim=2)
        tensor([[0.6000]])
    """
    left, right = (F.normalize(part[:, :dim], dim=1, eps=1e-6) for part in (anchors, positives))
    return left @ right.T


def similarity_kl(cosines: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """KL of a student's cosines, (B, M), to the logarithms of a teacher's softmax, the mean over rows."""
    return F.kl_div((cosines / temperature).log_softmax(dim=1), wanted, reduction="batchmean", log_target=True)


def spearman(values: Any, others: Any) -> float:
    """Rank correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(values, others).statistic)


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1, whatever length they have; rows of zeros stay zero."""
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    odd = ~((lengths > 1e-12) & (lengths < np.inf))[:, 0]
    if odd.any():  # squares of their values are too small or too large
        vectors, largest = vectors.copy(), np.abs(vectors[odd]).max(axis=1, keepdims=True, initial=0)
        vectors[odd] /= np.where(largest > 0, largest, 1)
        lengths[odd] = np.linalg.norm(vectors[odd], axis=1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)


class Difference(NamedTuple):
    """The largest difference of two values, the largest value, and whether that is no more than rounding."""

    worst: float
    scale: float
    same: bool


def compare_vectors(own: Any, other: Any, *, half: bool = False, allowed: float = 1e-3) -> Difference:
    """Whether two ways to the same vectors, (..., D), agree up to rounding: the one rule wherever vectors are compared.

    ``allowed`` is a share of the largest value; 0.03 at least with ``half``, for vectors of which one was computed in
    half precision. Rows that are not finite in one of the two are left out.

    Example:
        >>> compare_vectors([[1.0, 2.0]], [[1.0, 2.001]]).same
        True
    """
    first, second = (torch.as_tensor(part).detach().cpu().double() for part in (own, other))
    if first.shape != second.shape:
        raise ValueError(f"vectors of shapes {tuple(first.shape)} and {tuple(second.shape)} cannot be compared.")
    both = first.isfinite().all(dim=-1) & second.isfinite().all(dim=-1)
    if not bool(both.any()):
        return Difference(0.0, 0.0, True)
    first, second = first[both], second[both]
    worst, scale = float((first - second).abs().max()), float(first.abs().max())
    return Difference(worst, scale, worst <= (max(allowed, 3e-2) if half else allowed) * scale)
