"""The linear map behind an early layer, fitted on arrays: least squares, then the similarities at the dims served."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mipic_st.numerics import no_autocast
from mipic_st.transforms.fitting import BATCH, BLOCK, checked_vectors, minimise, powers_of_rows, row_orders
from mipic_st.transforms.objectives import CutObjective
from mipic_st.validation import checked_count, checked_dims, checked_number


def fit_cut(states: np.ndarray | Tensor, targets: np.ndarray | Tensor, *, ridge: float = 1e-3) -> Tensor:
    r"""The linear map from an early layer's sentence vectors to the full-depth ones, by least squares.

    .. math:: W = (Z^T Z + \lambda I)^{-1} Z^T F, \quad \lambda = \text{ridge} \cdot \text{tr}(Z^T Z) / H

    Z, (N, H): pooled states of the layer, as long as they are; F, (N, D): full-depth vectors of unit length. The first
    d columns of W, (H, D), are the fit for the first d values, so one map serves all dims.

    Example:
        >>> states = torch.randn(50, 4)
        >>> torch.allclose(fit_cut(states, states[:, :2], ridge=0.0), torch.eye(4, 2), atol=1e-5)
        True
    """
    ridge = checked_number("ridge", ridge, 0)
    z, f = checked_vectors("states", states), checked_vectors("targets", targets)
    if len(z) != len(f):
        raise ValueError(f"states and targets must have one row for each text, got {len(z)} and {len(f)}.")
    if len(z) < z.shape[1]:
        raise ValueError(f"{len(z)} texts are too few for a map from {z.shape[1]} values: give {z.shape[1]} or more.")
    return ridge_map(z, f, ridge)


def ridge_map(z: Tensor, f: Tensor, ridge: float = 1e-3) -> Tensor:
    """W of :func:`fit_cut` on tensors, also for fewer texts than values."""
    gram = torch.zeros(z.shape[1], z.shape[1], dtype=torch.double, device=z.device)
    product = torch.zeros(z.shape[1], f.shape[1], dtype=torch.double, device=z.device)
    for left, right in zip(z.split(BLOCK), f.to(z.device).split(BLOCK), strict=True):
        gram += left.double().T @ left.double()
        product += left.double().T @ right.double()
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.double, device=z.device)
    return torch.linalg.solve(gram, product).float().cpu()


def refine_cut(
    weight: Tensor,
    states: np.ndarray | Tensor,
    targets: np.ndarray | Tensor,
    dims: Sequence[int],
    *,
    held_out: tuple[np.ndarray | Tensor, np.ndarray | Tensor],
    vector_weight: float = 1.0,
    max_steps: int = 400,
    learning_rate: float = 1e-3,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> Tensor:
    """Go on from least squares with what the dims are served for: the similarities of the full depth.

    Least squares takes each value for itself; here the cosines at every dim learn to follow those of the targets, on
    :class:`mipic_st.transforms.objectives.CutObjective`. The best step on the held-out states and targets is kept,
    least squares itself among them. The rate is for states scaled to a mean square of 1.
    """
    z, f = (checked_vectors(*part) for part in (("states", states), ("targets", targets)))
    test = [checked_vectors("held_out", part) for part in held_out]
    for rows in ((z, f), test):
        if [part.shape[1] for part in rows] != list(weight.shape) or len(rows[0]) != len(rows[1]):
            raise ValueError(
                f"a weight of {tuple(weight.shape)} maps states (N, {weight.shape[0]}) to targets (N, "
                f"{weight.shape[1]}), got {tuple(rows[0].shape)} and {tuple(rows[1].shape)}."
            )
    if not bool(weight.isfinite().all()):
        raise ValueError("weight holds NaN or infinite values: begin at fit_cut's map, or at zeros.")
    vector_weight = checked_number("vector_weight", vector_weight, 0)
    objective = CutObjective(checked_dims("dims", dims, weight.shape[1]), vector_weight)
    max_steps = checked_count("max_steps", max_steps)
    batch_size = min(BATCH, len(z))
    learning_rate = checked_number("learning_rate", learning_rate, 0, exclusive=True)
    generator = torch.Generator().manual_seed(checked_count("seed", seed, least=0))
    with no_autocast(z), torch.inference_mode(False), torch.enable_grad():
        # one learning rate for all models: their states differ in length
        scale = z.square().mean().sqrt()
        z = z / scale
        seen = test[0][:batch_size] / scale, test[1][:batch_size]
        free = (weight.to(z.device) * scale).requires_grad_()
        best = minimise(
            [free],
            lambda order: objective(z[rows := order[:batch_size].to(z.device)], f[rows], free),
            lambda: objective(*seen, free),
            lambda: free,
            row_orders(len(z), batch_size, generator),
            max_steps=max_steps,
            learning_rate=learning_rate,
            description="Layer cut",
            show_progress_bar=show_progress_bar,
        )
    # lengths are free in the objective; they become those of the targets again
    best = best * powers_of_rows(best.reshape(1, -1))
    vectors = z @ best
    return (best / scale * (vectors * f).sum() / vectors.square().sum().clamp(min=torch.finfo(z.dtype).tiny)).cpu()
