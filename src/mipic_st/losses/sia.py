r"""SIA, the self-distilled intra-relational alignment (paper Sec. 3.2, Eq. 4-12), as pure tensor functions.

Symbols, used in every signature below:

- ``hidden``: H of one layer, (B, L, D). B sentences, L padded tokens, D the full width.
- ``mask``: (B, L), true at real tokens; ``n_b`` is the number of real tokens of sentence b.
- ``query``: q of the layer, (B, D): the model's own pooling of ``hidden`` (h_CLS in the paper).
- ``dims``: the n truncated prefixes d_1 < ... < d_n < D. Each learns from the full width.
- ``lifts``: P, one (d_i, D) matrix per prefix.

Nothing depends on the padding or on the other sentences of the batch. Everything is computed in float32, or in float64
if the input is float64, whatever autocast says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mipic_st.losses.cka import topk_cka_loss
from mipic_st.numerics import full_precision, no_autocast

LiftInit = Literal["identity", "orthogonal", "random"]
KLDirection = Literal["prefix_full", "full_prefix"]


class SIATerms(NamedTuple):
    """What one layer contributes per sentence and prefix, (B, n) each: the KL of Eq. 6, and ``1 - CKA`` of Eq. 11.

    CKA is defined (``cka_valid``) if the selected set has at least two distinct tokens; else its value is zero.
    """

    attention: Tensor
    cka: Tensor
    cka_valid: Tensor


def initial_lift(dim: int, width: int, init: LiftInit = "identity") -> Tensor:
    """Make the first value of one lift P.

    Args:
        dim: Prefix width d_i, 0 < dim <= width.
        width: Full width D.
        init: ``"identity"`` is ``[I 0]``, ordinary truncation. ``"orthogonal"`` has random orthonormal rows.
            ``"random"`` is what a linear layer from d_i to D starts with.

    Returns:
        Tensor of shape (dim, width).

    Raises:
        ValueError: If ``init`` is none of the three.

    Example:
        >>> initial_lift(2, 3)
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
    """
    if init == "identity":
        return torch.eye(dim, width)
    if init == "orthogonal":
        return nn.init.orthogonal_(torch.empty(dim, width))
    if init == "random":
        return nn.Linear(dim, width, bias=False).weight.detach().T.contiguous()
    raise ValueError(f"lift_init must be 'identity', 'orthogonal' or 'random', got {init!r}.")


def project_query(query: Tensor, lifts: Sequence[Tensor]) -> Tensor:
    r"""Project the query once per prefix, instead of lifting every token (right side of Eq. 5).

    Since :math:`q \cdot (h_{:d_i} P_i) = (P_i q) \cdot h_{:d_i}`, each prefix needs one vector per sentence.

    Args:
        query: (B, D).
        lifts: n matrices (d_i, D).

    Returns:
        (B, n, D), row i being P_i q followed by zeros.

    Example:
        >>> query = torch.tensor([[1.0, 2.0, 3.0]])
        >>> project_query(query, [initial_lift(1, 3), initial_lift(2, 3)])
        tensor([[[1., 0., 0.],
                 [1., 2., 0.]]])
    """
    width = query.shape[-1]
    projected = (query @ torch.cat(list(lifts)).T).split([lift.shape[0] for lift in lifts], dim=-1)
    return torch.stack([nn.functional.pad(part, (0, width - part.shape[-1])) for part in projected], dim=1)


def token_scores(hidden: Tensor, queries: Tensor) -> Tensor:
    r"""Score every token against every query: :math:`s_j = q \cdot h_j / \sqrt{D}` (Eq. 4 and 5).

    Args:
        hidden: (B, L, D).
        queries: (B, n, D).

    Returns:
        (B, n, L), padding included.

    Example:
        >>> token_scores(torch.ones(1, 2, 4), torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]))
        tensor([[[5., 5.]]])
    """
    return queries @ hidden.transpose(1, 2) / hidden.shape[-1] ** 0.5


def masked_log_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Log-softmax over the real tokens; padding is given 0, so that its probability must be masked by the caller.

    Args:
        scores: (B, ..., L).
        mask: (B, L), true at real tokens.

    Returns:
        Same shape as ``scores``; finite everywhere, also for a sentence without real tokens.

    Example:
        >>> masked_log_softmax(torch.zeros(1, 3), torch.tensor([[True, True, False]])).exp()
        tensor([[0.5000, 0.5000, 1.0000]])
    """
    mask = mask.view(mask.shape[0], *[1] * (scores.ndim - 2), mask.shape[1])
    log_probs = scores.masked_fill(~mask, torch.finfo(scores.dtype).min / 2).log_softmax(dim=-1)
    return log_probs.masked_fill(~mask, 0.0)


def attention_kl(
    prefix_scores: Tensor,
    full_log_probs: Tensor,
    mask: Tensor,
    temperature: float,
    direction: KLDirection = "prefix_full",
) -> Tensor:
    """Divergence between the distributions over tokens of each prefix and of the full width (Eq. 6).

    Args:
        prefix_scores: s_i, (B, n, L).
        full_log_probs: log a_D, (B, L), from :func:`masked_log_softmax`.
        mask: (B, L), true at real tokens.
        temperature: tau of the prefixes' softmax, > 0.
        direction: ``"prefix_full"`` is KL(a_i || a_D), the paper's; ``"full_prefix"`` KL(a_D || a_i), the notebooks'.

    Returns:
        (B, n), in nats. Zero for a sentence with one real token or none.

    Example:
        >>> mask = torch.tensor([[True, True]])
        >>> full = masked_log_softmax(torch.zeros(1, 2), mask)
        >>> attention_kl(torch.tensor([[[0.0, 0.0], [2.0, 0.0]]]), full, mask, temperature=1.0)
        tensor([[0.0000, 0.3278]])
    """
    one, other = masked_log_softmax(prefix_scores / temperature, mask), full_log_probs[:, None, :]
    if direction == "full_prefix":
        one, other = other, one
    return (one.exp() * (one - other)).masked_fill(~mask[:, None, :], 0.0).sum(dim=-1)


def sia_terms(
    hidden: Tensor,
    query: Tensor,
    mask: Tensor,
    dims: Sequence[int],
    lifts: Sequence[Tensor] | None,
    gammas: Sequence[float],
    *,
    min_k: int = 8,
    temperature: float = 0.05,
    kl_direction: KLDirection = "prefix_full",
    detach_full_width: bool = True,
    full_attention: Tensor | None = None,
    with_cka: bool = True,
) -> SIATerms:
    """Both SIA terms of one layer, per sentence and prefix (Eq. 4-12).

    Args:
        hidden: H, (B, L, D).
        query: q, (B, D).
        mask: (B, L), true at real tokens.
        dims: The n prefixes, ascending.
        lifts: P, n matrices (d_i, D). None leaves out Eq. 6; its values are then zero.
        gammas: n shares for the top-k sets.
        min_k: Smallest set.
        temperature: tau of the attention softmax, > 0.
        kl_direction: See :func:`attention_kl`.
        detach_full_width: Whether everything of the full width (q, a_D, X_D) is a constant.
        full_attention: (B, L), importance of each token from the model's own attention maps, instead of the
            softmax at full width. Default: similarity.
        with_cka: Whether Eq. 11 is wanted; if not, its values are zero and not valid.

    Returns:
        :class:`SIATerms`.
    """
    with no_autocast(hidden):
        hidden, query = full_precision(hidden, query)
        mask = mask.bool()
        if detach_full_width:
            query = query.detach()
        shape = (hidden.shape[0], len(dims))

        if full_attention is None:
            full_scores = token_scores(hidden, query[:, None, :])[:, 0]
            full_log_probs = masked_log_softmax(full_scores / temperature, mask)
        else:
            (full_scores,) = full_precision(full_attention)
            smallest = torch.finfo(full_scores.dtype).tiny
            full_log_probs = masked_log_softmax(full_scores.clamp(min=smallest).log(), mask)
        if detach_full_width:
            full_scores, full_log_probs = full_scores.detach(), full_log_probs.detach()

        attention = cka = hidden.new_zeros(shape)
        valid = torch.zeros(shape, dtype=torch.bool, device=hidden.device)
        if lifts is not None:
            prefix_scores = token_scores(hidden, project_query(query, [lift.to(query) for lift in lifts]))
            attention = attention_kl(prefix_scores, full_log_probs, mask, temperature, kl_direction)
        if with_cka:
            cka, valid = topk_cka_loss(hidden, full_scores, mask, dims, gammas, min_k, detach_full_width)
        return SIATerms(attention, cka, valid)
