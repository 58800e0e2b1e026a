r"""What the fits minimise, on one batch: settings that are checked once, called on tensors.

Symbols: B rows of a batch, D the width, ``dims`` the truncation dimensions d, m the largest of them. A_d is the first
d values of each row of A, at unit length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mipic_st.numerics import masked, prefix_cosines, similarity_kl
from mipic_st.validation import checked_dims, checked_number


@dataclass(frozen=True)
class RotationObjective:
    r"""Contrastive at some dims, similarity distillation at the others.

    .. math:: \sum_{d \in C} \text{InfoNCE}((A R)_d (P R)_d^T / \tau_c)
        + \lambda \sum_{d \notin C} KL(\text{softmax}(A P^T / \tau_s) \,\|\, \text{softmax}((A R)_d (P R)_d^T / \tau_s))

    C holds the smallest dims, which are to know what belongs together among many negatives; the larger ones are to keep
    the similarities of the full width.

    Attributes:
        dims: Dims in ascending order, the last one m.
        contrastive_dims: C, those of ``dims`` that take InfoNCE; the others take the KL of similarities.
        similarity_weight: lambda, weight of the KL, >= 0.
        contrastive_temperature: tau_c, > 0.
        similarity_temperature: tau_s, > 0.

    Raises:
        TypeError: If a setting is of the wrong kind.
        ValueError: If a setting is out of its range, or leaves nothing to fit at a dim.

    Example:
        >>> vectors = torch.eye(4)
        >>> RotationObjective([4], contrastive_dims=[4])(vectors, vectors, torch.eye(4)).item() < 1e-3
        True
    """

    dims: Sequence[int]
    contrastive_dims: Sequence[int] = ()
    similarity_weight: float = 10.0
    contrastive_temperature: float = 0.1
    similarity_temperature: float = 0.07

    def __post_init__(self) -> None:
        dims = checked_dims("dims", self.dims)
        contrastive = checked_dims("contrastive_dims", self.contrastive_dims) if len(self.contrastive_dims) else []
        if wrong := sorted(set(contrastive) - set(dims)):
            raise ValueError(f"contrastive_dims must be among dims {dims}, got {wrong}.")
        if not checked_number("similarity_weight", self.similarity_weight, 0) and set(dims) - set(contrastive):
            raise ValueError(
                f"similarity_weight=0 leaves nothing to fit at dims {sorted(set(dims) - set(contrastive))}: name them "
                "in contrastive_dims, or drop them."
            )
        for name in ("contrastive_temperature", "similarity_temperature"):
            checked_number(name, getattr(self, name), 0, exclusive=True)
        object.__setattr__(self, "dims", tuple(dims))
        object.__setattr__(self, "contrastive_dims", tuple(contrastive))

    @classmethod
    def below(
        cls, width: int, dims: Sequence[int], contrastive_dims: Sequence[int] | None, **settings: float
    ) -> RotationObjective:
        """At the dims below a width; the contrastive term is at those up to 32, where it helped, or at those named."""
        dims = sorted(dim for dim in checked_dims("dims", dims, width) if dim < width)
        if not dims:
            raise ValueError(
                f"dims must hold a dimension below the vectors' width of {width}, else there is nothing to do."
            )
        return cls(
            dims, [dim for dim in dims if dim <= 32] if contrastive_dims is None else contrastive_dims, **settings
        )

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
        total = frame.new_zeros(())
        for term in self.similarity_terms(anchors @ positives.T, rotated, others):
            total = total + term
        if self.contrastive_dims:
            if negatives is not None:
                widest = max(self.contrastive_dims)
                others = torch.cat([others[:, :widest], negatives @ frame[:, :widest]])
            for term in self.contrastive_terms(rotated, others, same):
                total = total + term
        return total

    def similarity_terms(self, full: Tensor, rotated: Tensor, others: Tensor) -> Iterator[Tensor]:
        """The KL at each dim outside of C, given the cosines of the full width."""
        wanted = (full / self.similarity_temperature).log_softmax(dim=1)
        for dim in self.dims:
            if dim not in self.contrastive_dims:
                cosines = prefix_cosines(rotated, others, dim)
                yield self.similarity_weight * similarity_kl(cosines, wanted, self.similarity_temperature)

    def contrastive_terms(self, rotated: Tensor, candidates: Tensor, same: Tensor | None) -> Iterator[Tensor]:
        """InfoNCE at each dim of C; the candidates begin with the anchors' own positives."""
        own = torch.arange(len(rotated), device=rotated.device)
        for dim in self.contrastive_dims:
            cosines = masked(prefix_cosines(rotated, candidates, dim), same)
            yield F.cross_entropy(cosines / self.contrastive_temperature, own)


@dataclass(frozen=True)
class CutObjective:
    r"""What a layer cut is for: similarities and vectors of the full depth at the dims that are served.

    .. math:: \sum_d KL(\text{softmax}(F F^T / \tau) \,\|\, \text{softmax}((Z W)_d (Z W)_d^T / \tau))
        + \frac{\lambda}{B} \sum_{d, D} \|(Z W)_d - F_d\|^2

    No text is compared with itself.

    Attributes:
        dims: Truncation dimensions d, each up to D.
        vector_weight: lambda, weight of the vectors' distances, >= 0. These are taken at the full width D, too.
        temperature: tau, > 0.

    Raises:
        TypeError: If a setting is of the wrong kind.
        ValueError: If a setting is out of its range.

    Example:
        >>> states = torch.eye(4)
        >>> CutObjective([4])(states, states, torch.eye(4)).item()
        0.0
    """

    dims: Sequence[int]
    vector_weight: float = 1.0
    temperature: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(checked_dims("dims", self.dims)))
        checked_number("vector_weight", self.vector_weight, 0)
        checked_number("temperature", self.temperature, 0, exclusive=True)

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
