r"""What the fits minimise, on one batch of tensors.

Symbols: B rows of a batch, D the width, ``dims`` the truncation dimensions d, m the largest of them. A_d is the first
d values of each row of A, at unit length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mipic_st.numerics import masked, prefix_cosines, similarity_kl


@dataclass(frozen=True)
class RotationObjective:
    r"""Contrastive at some dims, similarity distillation at the others.

    .. math:: \sum_{d \in C} \text{InfoNCE}((A R)_d (P R)_d^T / \tau_c)
        + \lambda \sum_{d \notin C} KL(\text{softmax}(A P^T / \tau_s) \,\|\, \text{softmax}((A R)_d (P R)_d^T / \tau_s))

    C, the contrastive dims, holds the smallest, which are to know what belongs together among many negatives; the
    larger ones are to keep the similarities of the full width.

    Example:
        >>> vectors = torch.eye(4)
        >>> RotationObjective([4], contrastive_dims=[4])(vectors, vectors, torch.eye(4)).item() < 1e-3
        True
    """

    dims: Sequence[int]  # the last one m
    contrastive_dims: Sequence[int] = ()
    similarity_weight: float = 10.0  # lambda
    contrastive_temperature: float = 0.1  # tau_c
    similarity_temperature: float = 0.07  # tau_s

    def __call__(
        self,
        anchors: Tensor,
        positives: Tensor,
        frame: Tensor,
        *,
        negatives: Tensor | None = None,
        same: Tensor | None = None,
    ) -> Tensor:
        """The sum over dims, for pairs of unit length and a frame, (D, m).

        ``negatives``, (M, D), are more of them for InfoNCE; ``same``, (B, B + M), is true where a positive or negative
        is the anchor's own text, or its own positive again.
        """
        rotated, others = anchors @ frame, positives @ frame
        wanted = (anchors @ positives.T / self.similarity_temperature).log_softmax(dim=1)
        total = frame.new_zeros(())
        for dim in (dim for dim in self.dims if dim not in self.contrastive_dims):
            cosines = prefix_cosines(rotated, others, dim)
            total = total + self.similarity_weight * similarity_kl(cosines, wanted, self.similarity_temperature)
        if negatives is not None and self.contrastive_dims:
            widest = max(self.contrastive_dims)
            others = torch.cat([others[:, :widest], negatives @ frame[:, :widest]])
        own = torch.arange(len(rotated), device=rotated.device)
        for dim in self.contrastive_dims:
            cosines = masked(prefix_cosines(rotated, others, dim), same)
            total = total + F.cross_entropy(cosines.div_(self.contrastive_temperature), own)
        return total


@dataclass(frozen=True)
class CutObjective:
    r"""What a layer cut is for: similarities and vectors of the full depth at the dims that are served.

    .. math:: \sum_d KL(\text{softmax}(F F^T / \tau) \,\|\, \text{softmax}((Z W)_d (Z W)_d^T / \tau))
        + \frac{\lambda}{B} \sum_{d, D} \|(Z W)_d - F_d\|^2

    No text is compared with itself.

    Example:
        >>> states = torch.eye(4)
        >>> CutObjective([4])(states, states, torch.eye(4)).item()
        0.0
    """

    dims: Sequence[int]
    vector_weight: float = 1.0  # lambda
    temperature: float = 0.1  # tau

    def __call__(self, states: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """The sum over dims, for states Z (B, H), targets F (B, D) of unit length and a map W (H, D)."""
        vectors = states @ weight
        itself = torch.eye(len(states), dtype=torch.bool, device=states.device)
        wanted = masked(targets @ targets.T, itself).div(self.temperature).log_softmax(dim=1)
        total = weight.new_zeros(())
        for dim in self.dims:
            cosines = masked(prefix_cosines(vectors, vectors, dim), itself)
            total = total + similarity_kl(cosines, wanted, self.temperature)
        for dim in {*self.dims, targets.shape[1]}:
            found, goal = (F.normalize(part[:, :dim], dim=1, eps=1e-6) for part in (vectors, targets))
            total = total + self.vector_weight * (found - goal).square().sum(dim=1).mean()
        return total
