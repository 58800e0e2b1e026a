"""Layer cuts: what a model needs behind an early layer to give the vectors of its full depth.

A linear W, (H, D), from the pooled states of the layer to the full-depth vectors: by least squares (:func:`fit_cut`),
and then so that their similarities are kept at the dims that are served (:func:`refine_cut`). :func:`fit_layer_cuts`
does it for a whole (layer, dim) grid of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn import functional as F

from mipic_st._checks import checked_count, checked_dims, checked_number, checked_texts
from mipic_st.backbone import check_layers, evaluation_mode, full_width, model_depth, push_vectors, tail_of
from mipic_st.embedding_store import unit_length
from mipic_st.layers import encode_layers
from mipic_st.sia import no_autocast
from mipic_st.tails import (
    BLOCK,
    checked_vectors,
    masked,
    minimise,
    prefix_cosines,
    row_orders,
    similarity_kl,
    spearman,
    table_of,
    wants_bar,
)

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

__all__ = ["LayerCuts", "cut_objective", "fit_cut", "fit_layer_cuts", "refine_cut"]


# --- on arrays --------------------------------------------------------------------------------------------------------


def fit_cut(states: np.ndarray | Tensor, targets: np.ndarray | Tensor, *, ridge: float = 1e-3) -> Tensor:
    r"""The linear map from an early layer's sentence vectors to the full-depth ones, by least squares.

    .. math:: W = (Z^T Z + \lambda I)^{-1} Z^T F, \quad \lambda = \text{ridge} \cdot \text{tr}(Z^T Z) / H

    Its first d columns are the fit for the first d values, so one map serves all dims.

    Args:
        states: Z, (N, H): pooled states of the layer, as long as they are.
        targets: F, (N, D): full-depth vectors, of unit length.
        ridge: Ridge in units of the mean eigenvalue of Z^T Z, >= 0.

    Returns:
        W, (H, D), float32.

    Raises:
        ValueError: If the numbers of rows differ or are below H, a value is not finite, or ``ridge`` is out of range.

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
    gram = torch.zeros(z.shape[1], z.shape[1], dtype=torch.double, device=z.device)
    product = torch.zeros(z.shape[1], f.shape[1], dtype=torch.double, device=z.device)
    for left, right in zip(z.split(BLOCK), f.to(z.device).split(BLOCK), strict=True):
        gram += left.double().T @ left.double()
        product += left.double().T @ right.double()
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.double, device=z.device)
    return torch.linalg.solve(gram, product).float().cpu()


def cut_objective(
    states: Tensor,
    targets: Tensor,
    weight: Tensor,
    dims: Sequence[int],
    *,
    vector_weight: float = 1.0,
    temperature: float = 0.1,
) -> Tensor:
    r"""What :func:`refine_cut` minimises, on one batch: similarities and vectors at the dims that are served.

    .. math:: \sum_d KL(\text{softmax}(F F^T / \tau) \,\|\, \text{softmax}(Y_d Y_d^T / \tau))
        + \frac{\lambda}{B} \sum_{d, D} \|Y_d - F_d\|^2

    Y_d and F_d are the first d columns of Z W and of F, rows at unit length; no text is compared with itself.

    Args:
        states: Z, (B, H).
        targets: F, (B, D), unit length.
        weight: W, (H, D).
        dims: Truncation dimensions d, each up to D.
        vector_weight: lambda, weight of the vectors' distances. These are taken at the full width D, too.
        temperature: tau.

    Returns:
        Scalar.

    Example:
        >>> states = torch.eye(4)
        >>> cut_objective(states, states, torch.eye(4), [4]).item()
        0.0
    """
    vectors = states @ weight
    itself = torch.eye(len(states), dtype=torch.bool, device=states.device)
    teacher = masked(targets @ targets.T, itself).div(temperature).log_softmax(dim=1)
    total = weight.new_zeros(())
    for dim in dims:
        total = total + similarity_kl(masked(prefix_cosines(vectors, vectors, dim), itself), teacher, temperature)
    for dim in {*dims, targets.shape[1]}:
        found, wanted = (F.normalize(part[:, :dim], dim=1, eps=1e-6) for part in (vectors, targets))
        total = total + vector_weight * (found - wanted).square().sum(dim=1).mean()
    return total


def refine_cut(
    weight: Tensor,
    states: np.ndarray | Tensor,
    targets: np.ndarray | Tensor,
    dims: Sequence[int],
    *,
    held_out: tuple[np.ndarray | Tensor, np.ndarray | Tensor],
    vector_weight: float = 1.0,
    max_steps: int = 400,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> Tensor:
    """Go on from least squares with what the dims are served for: the similarities of the full depth.

    Least squares takes each value for itself; here the cosines at every dim learn to follow those of the targets. The
    best step on the held-out rows is kept, least squares itself among them. The objective is :func:`cut_objective`.

    Args:
        weight: The map to start from, (H, D), of :func:`fit_cut`.
        states: Z, (N, H).
        targets: F, (N, D), of unit length.
        dims: Truncation dimensions that are served.
        held_out: States and targets that no step sees.
        vector_weight: lambda, see :func:`cut_objective`.
        max_steps: Steps.
        batch_size: Texts per step; memory grows with its square.
        learning_rate: Adam's first learning rate, for states scaled to a mean square of 1; decayed along a cosine.
        seed: Seeds the batches; the global generators are left alone.
        show_progress_bar: Show a bar over steps. Default: as the log level says.

    Returns:
        W, (H, D), float32, on the CPU.

    Raises:
        TypeError: If states or targets are no arrays of floating numbers.
        ValueError: If shapes do not fit each other, or an argument is out of its range.

    Source:
        Batch, steps, rate and temperature were chosen on STS13 and SICK validation with layer 3 of all-MiniLM-L6-v2.
    """
    z, f = (checked_vectors(*part) for part in (("states", states), ("targets", targets)))
    test = [checked_vectors("held_out", part) for part in held_out]
    for rows in ((z, f), test):
        if [part.shape[1] for part in rows] != list(weight.shape) or len(rows[0]) != len(rows[1]):
            raise ValueError(
                f"a weight of {tuple(weight.shape)} maps states (N, {weight.shape[0]}) to targets (N, "
                f"{weight.shape[1]}), got {tuple(rows[0].shape)} and {tuple(rows[1].shape)}."
            )
    dims = checked_dims("dims", dims, weight.shape[1])
    vector_weight = checked_number("vector_weight", vector_weight, 0)
    max_steps = checked_count("max_steps", max_steps)
    batch_size = min(checked_count("batch_size", batch_size, least=2), len(z))
    learning_rate = checked_number("learning_rate", learning_rate, 0, exclusive=True)
    generator = torch.Generator().manual_seed(checked_count("seed", seed, least=0))
    with no_autocast(z), torch.inference_mode(False), torch.enable_grad():
        # one learning rate for all models: their states differ in length
        scale = z.square().mean().sqrt()
        z = z / scale
        seen = [test[0][:batch_size] / scale, test[1][:batch_size]]
        free = (weight.to(z.device) * scale).requires_grad_()

        def objective(states: Tensor, targets: Tensor) -> Tensor:
            return cut_objective(states, targets, free, dims, vector_weight=vector_weight)

        best = minimise(
            [free],
            lambda order: objective(z[rows := order[:batch_size].to(z.device)], f[rows]),
            lambda: objective(*seen),
            lambda: free,
            row_orders(len(z), batch_size, generator),
            max_steps=max_steps,
            learning_rate=learning_rate,
            description="Layer cut",
            show_progress_bar=show_progress_bar,
        )
    # lengths are free in the objective; they become those of the targets again
    vectors = z @ best
    return (best / scale * (vectors * f).sum() / vectors.square().sum()).cpu()


# --- on models --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LayerCuts:
    """Fitted tails for a whole (layer, dim) grid, out of one encoding.

    Attributes:
        maps: One W, (H, D), per layer: pooled states of that layer to full-depth vectors. Its first d columns are the
            tail of the cell (layer, d).
        dims: The dims of the grid, ascending.
        report: One dict per cell, measured on texts that were held out: ``layer``, ``dim``, and ``similarity_plain``,
            ``similarity_fitted``, ``similarity_full``: Spearman correlation with the full model's full-width cosines,
            for the layer cut as it is, with its fitted tail, and for the full depth at that dim; and
            ``similarity_mixed``, the same for cosines of the fitted cut's vectors with the full depth's, which is what
            counts if queries and documents are encoded by different ones of the two. With STS data also
            ``sts_plain``, ``sts_fitted``, ``sts_full``, Spearman correlation with the scores.
    """

    maps: dict[int, Tensor]
    dims: tuple[int, ...]
    report: list[dict[str, float]]

    def to_frame(self) -> pd.DataFrame:
        """The report as a table.

        Returns:
            One row per cell.

        Raises:
            ImportError: If pandas is missing.
        """
        return table_of(self.report)


def fit_layer_cuts(
    model: SentenceTransformer,
    texts: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
    sts: Dataset | tuple[Sequence[str], Sequence[str], Sequence[float]] | None = None,
    ridge: float = 1e-3,
    vector_weight: float = 1.0,
    max_steps: int = 400,
    held_out: float = 0.1,
    prompt: str | None = None,
    batch_size: int = 32,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> LayerCuts:
    """Fit what a model needs behind an early layer to give the vectors of its full depth, and say what is lost.

    All texts are encoded once; all layers and dims are served from that. The targets are the model's own vectors at
    unit length, rotated ones if it has a rotation. ``export_truncated(model, layer, dim, cuts=...)`` makes the model of
    a cell.

    Args:
        model: A SentenceTransformer of Transformer, Pooling and any tail.
        texts: Texts like those that will be encoded, without labels; a few thousand.
        layers: Layers to cut after, 1 to the depth - 1. Default: all of them.
        dims: Truncation dimensions of the grid. Default: powers of two from 16, and the full width. One map serves all
            dims of a layer; a single dim gets a little more at that dim.
        sts: Scored pairs for the report: a Dataset with ``sentence1``, ``sentence2``, ``score``, or three lists.
        ridge: Ridge of the least squares, see :func:`fit_cut`.
        vector_weight: What the steps after least squares weigh the distance to the full-depth vectors with, >= 0,
            beside the similarities among the cut's own. A high one keeps the vectors of the cut comparable with those
            of the full model at small dims (queries by the one, documents by the other); with 0 the cut is best by
            itself, and not comparable.
        max_steps: Steps per layer in which the map then learns to keep the similarities at ``dims``, see
            :func:`refine_cut`; 0 leaves it at least squares, which takes no time.
        held_out: Share of the texts that no step sees, in (0, 0.5]; at most 2,048 of them. The best step on them is
            kept, and the report is made on them.
        prompt: Put before every text.
        batch_size: Texts per forward pass.
        seed: Seeds the choice of the held-out texts and the batches.
        show_progress_bar: Show bars while encoding and fitting. Default: as the log level says.

    Returns:
        :class:`LayerCuts`.

    Raises:
        TypeError: If the model has no layers, or texts are no list of strings.
        ValueError: If there are fewer texts than hidden values, or another argument is out of its range.

    Example:
        >>> cuts = fit_layer_cuts(model, texts, layers=[3, 4], dims=[64, 16])  # doctest: +SKIP
        >>> cuts.to_frame()  # doctest: +SKIP
    """
    depth, width = model_depth(model), full_width(model)
    if layers is None:
        layers = range(1, depth)
    layers = check_layers(layers, model)
    if wrong := [layer for layer in layers if not 1 <= layer < depth]:
        raise ValueError(f"layers must be from 1 to {depth - 1}, below the model's depth of {depth}, got {wrong}.")
    if dims is None:
        dims = [*(2**power for power in range(4, 13) if 2**power < width), width]
    dims = sorted(checked_dims("dims", dims, width))
    held_out = checked_number("held_out", held_out, 0, 0.5, exclusive=True)
    seed = checked_count("seed", seed, least=0)
    vector_weight = checked_number("vector_weight", vector_weight, 0)
    max_steps = checked_count("max_steps", max_steps, least=0)
    batch_size = checked_count("batch_size", batch_size)
    texts = list(dict.fromkeys(checked_texts("texts", texts)))
    show_progress_bar = wants_bar(show_progress_bar)
    tail = tail_of(model)

    def push(states: np.ndarray) -> np.ndarray:
        """Pooled states through the model's own tail."""
        with evaluation_mode(model), torch.inference_mode():
            vectors = torch.as_tensor(states, device=model.device)
            for module in tail:
                kind = next((parameter.dtype for parameter in module.parameters()), vectors.dtype)
                vectors = push_vectors([module], vectors.to(kind))
            return vectors.float().cpu().numpy()

    def encode(some: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Pooled states of the layers, (n, layers, H), and full-depth vectors at unit length, (n, D)."""
        states = encode_layers(
            model,
            some,
            [*layers, depth],
            tail=False,
            prompt=prompt,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
        )
        return states[:, :-1], unit_length(push(states[:, -1]))

    states, full = encode(texts)
    order = np.random.default_rng(seed).permutation(len(texts))
    test, training = np.split(order, [min(BLOCK, max(2, round(held_out * len(texts))))])
    known, held_full = full[training], full[test]
    maps = {}
    for column, layer in enumerate(layers):
        early = states[training, column]
        maps[layer] = fit_cut(early, known, ridge=ridge)
        if max_steps:
            maps[layer] = refine_cut(
                maps[layer],
                early,
                known,
                dims,
                held_out=(states[test, column], held_full),
                vector_weight=vector_weight,
                max_steps=max_steps,
                seed=seed,
                show_progress_bar=show_progress_bar,
            )
    pairs = None
    if sts is not None:
        first, second, scores = _scored_pairs(sts)
        pairs = encode(first), encode(second), scores
    upper = np.triu_indices(len(test), k=1)
    reference = (held_full @ held_full.T)[upper]
    report = []
    for column, layer in enumerate(layers):
        cells: list[dict[str, float]] = [{"layer": layer, "dim": dim} for dim in dims]
        weight = maps[layer].numpy()
        makers: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
            "plain": lambda states, full: push(states),
            "fitted": lambda states, full, weight=weight: states @ weight,  # type: ignore[misc]
            "full": lambda states, full: full,
        }
        for kind, make in makers.items():
            held = make(states[test, column], held_full)
            ends = None if pairs is None else [make(part[:, column], whole) for part, whole in pairs[:2]]
            for cell, dim in zip(cells, dims, strict=True):
                cut = unit_length(held[:, :dim])
                cell[f"similarity_{kind}"] = spearman((cut @ cut.T)[upper], reference)
                if kind == "fitted":
                    whole = unit_length(held_full[:, :dim])
                    cell["similarity_mixed"] = spearman((cut @ whole.T)[upper], reference)
                if ends is not None and pairs is not None:
                    left, right = (unit_length(end[:, :dim]) for end in ends)
                    cell[f"sts_{kind}"] = spearman((left * right).sum(axis=1), pairs[2])
        report += cells
    return LayerCuts(maps, tuple(dims), report)


def _scored_pairs(sts: Any) -> tuple[list[str], list[str], list[float]]:
    """First texts, second texts and scores, one each."""
    if hasattr(sts, "column_names"):
        if missing := {"sentence1", "sentence2", "score"} - set(sts.column_names):
            raise ValueError(f"sts lacks the columns {sorted(missing)}; it has {sts.column_names}.")
        sts = (sts["sentence1"], sts["sentence2"], sts["score"])
    first, second, scores = (list(column) for column in sts)
    if not len(first) == len(second) == len(scores) or len(first) < 2:
        raise ValueError(
            f"sts must hold as many first texts as second texts and scores, 2 or more: got {len(first)}, {len(second)} "
            f"and {len(scores)}."
        )
    scores = [float(score) for score in scores]
    if not np.isfinite(scores).all():
        raise ValueError("sts holds scores that are no finite numbers; leave these rows out.")
    return first, second, scores
