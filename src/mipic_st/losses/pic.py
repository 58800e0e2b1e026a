r"""PIC, progressive information chaining (paper Sec. 3.3, Eq. 15-17), as a pure tensor function and its heads.

The chain is a list of (dim, layer) pairs, the paper's checkpoints, from shallow and narrow to deep and wide. A small
head maps the sentence vector of one pair to the width of the next one; an InfoNCE loss asks it to find, among the
sentences of the batch, the vector that the next pair gave the same sentence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mipic_st.numerics import full_precision, no_autocast


def chain_head(dim: int, next_dim: int) -> nn.Sequential:
    """Make phi_c, the head from one pair of the chain to the next (Eq. 15).

    Args:
        dim: Width of this pair.
        next_dim: Width of the next one.

    Returns:
        Two linear layers with one ReLU between them; the hidden width is ``max(dim, next_dim) // 2``.

    Example:
        >>> [layer.out_features for layer in chain_head(16, 64) if isinstance(layer, nn.Linear)]
        [32, 64]
    """
    hidden_dim = max(1, max(dim, next_dim) // 2)
    return nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, next_dim))


def chain_info_nce(
    predicted: Tensor, target: Tensor, temperature: float = 0.05, offset: int = 0, valid: Tensor | None = None
) -> Tensor:
    r"""InfoNCE of one link of the chain, with in-batch negatives (Eq. 16).

    .. math:: -\frac{1}{B} \sum_b \log \frac{\exp(s_{bb} / \tau)}{\sum_j \exp(s_{bj} / \tau)}, \quad
        s_{bj} = \cos(\phi_c(z_c)_b, (z_{c+1})_j)

    Args:
        predicted: phi_c(z_c), (..., B, d). Leading axes (the input columns) are separate batches: the sentences of
            one column are no negatives for those of another.
        target: z_{c+1}, (..., M, d), M >= B. No gradient flows into it.
        temperature: tau, > 0.
        offset: Row of ``target`` that belongs to the first row of ``predicted``; more than zero where ``target``
            holds the sentences of several devices.
        valid: (..., M), boolean: which sentences there are; the others count as not in the batch. Default: all.

    Returns:
        Scalar, the mean over sentences and columns; zero for a batch of one, or without a valid sentence.

    Example:
        >>> import torch
        >>> vectors = torch.eye(3)
        >>> chain_info_nce(vectors, vectors).item() < 1e-6
        True
        >>> round(chain_info_nce(vectors.roll(1, 0), vectors).item(), 3)
        20.0
    """
    with no_autocast(predicted):
        (predicted,) = full_precision(predicted)
        target = target.detach().to(predicted.dtype)
        logits = F.normalize(predicted, dim=-1) @ F.normalize(target, dim=-1).transpose(-1, -2) / temperature
        if valid is None:
            return -logits.log_softmax(dim=-1).diagonal(offset, dim1=-2, dim2=-1).mean()
        own = valid[..., offset : offset + predicted.shape[-2]]
        logits = logits.masked_fill(~valid[..., None, :], torch.finfo(logits.dtype).min / 2)
        losses = -logits.log_softmax(dim=-1).diagonal(offset, dim1=-2, dim2=-1)
        return losses.masked_fill(~own, 0.0).sum() / own.sum().clamp(min=1)


def predict_next(head: nn.Module, vector: Tensor) -> Tensor:
    """Run the head on z_c, in the precision of the head's own parameters (Eq. 15).

    Args:
        head: phi_c, from :func:`chain_head`.
        vector: z_c, (..., B, d_c).

    Returns:
        phi_c(z_c), (..., B, d_{c+1}).
    """
    with no_autocast(vector):
        return head(vector.to(next(head.parameters()).dtype))
