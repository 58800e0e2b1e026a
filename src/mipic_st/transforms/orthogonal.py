"""Orthogonal matrices: the PCA of documents, a way to fit one by steps, the columns behind the largest dim."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mipic_st.transforms.fitting import BLOCK


def second_moments(documents: Tensor, rows: Tensor) -> Tensor:
    """X^T X of some rows, (D, D), double."""
    width = documents.shape[1]
    total = torch.zeros(width, width, dtype=torch.double, device=documents.device)
    for block in rows.split(BLOCK):
        part = documents[block]
        total += (part.T @ part).double()
    return total


def pca_basis(documents: Tensor, rows: Tensor) -> Tensor:
    """Eigenvectors of the second moments, largest first, (D, D); complete also for fewer documents than D.

    Uncentred: an orthogonal map cannot take off a mean.
    """
    return torch.linalg.eigh(second_moments(documents, rows)).eigenvectors.flip(1).float()


def completed(matrix: Tensor, columns: int, documents: Tensor, rows: Tensor) -> Tensor:
    """The orthogonal matrix nearest to a nearly orthogonal one, its columns behind the first ordered by variance.

    So that a cut behind the largest dim that was fitted loses the least.
    """
    exact = mended(mended(matrix.double()))
    rest = exact[:, columns:]
    order = torch.linalg.eigh(rest.T @ second_moments(documents, rows) @ rest).eigenvectors.flip(1)
    return torch.cat([exact[:, :columns], rest @ order], dim=1).float()


def mended(matrix: Tensor) -> Tensor:
    """One Newton-Schulz step towards the nearest orthogonal matrix."""
    return torch.addmm(matrix, matrix, matrix.T @ matrix, beta=1.5, alpha=-0.5)


class OrthogonalAdam:
    """Adam on orthogonal matrices Q, (k, k), along a cosine: moments of the skew gradient in the moving basis.

    The step is Q (I + S + S^2 / 2), S skew, and one Newton-Schulz step mends the rounding every five steps: products
    of k x k only, where Cayley's map solves a system.
    """

    def __init__(self, size: int, steps: int, rate: float, device: torch.device, *, one_scale: bool) -> None:
        """``one_scale``: one second moment for all entries, so that those with a small gradient hardly move."""
        self.basis = torch.eye(size, device=device)
        self.mean, self.square = torch.zeros_like(self.basis), torch.zeros_like(self.basis)
        self.steps, self.rate, self.one_scale, self.done = steps, rate, one_scale, 0

    def step(self, gradient: Tensor) -> None:
        """``gradient``: of the first m columns of Q, (k, m)."""
        own = torch.zeros_like(self.basis)
        own[:, : gradient.shape[1]] = self.basis.T @ gradient
        skew = own - own.T
        rate = self.rate * 0.5 * (1 + math.cos(math.pi * self.done / self.steps))
        self.done += 1
        self.mean.lerp_(skew, 0.1)
        square = skew.square()
        self.square.lerp_(square.mean().expand_as(square) if self.one_scale else square, 0.001)
        scale = (self.square / (1 - 0.999**self.done)).sqrt() + 1e-8
        small = self.mean / (1 - 0.9**self.done) / scale * -rate
        moved = self.basis @ small
        self.basis = (self.basis + moved).addmm_(moved, small, alpha=0.5)
        if self.done % 5 == 0 or self.done == self.steps:
            self.basis = mended(self.basis)
