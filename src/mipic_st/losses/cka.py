r"""SIA's token similarities: CKA between each prefix and the full width (paper Sec. 3.2, Eq. 7-12).

Symbols are those of :mod:`mipic_st.losses.sia`. Values and gradients are written by hand, so that nothing but the
states themselves is kept for the backward pass, however long the sentences are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mipic_st.numerics import no_autocast

# Gammas are used as integers in units of 1/10000, so that ceil(gamma * n) is exact on every device.
_GAMMA_UNIT = 10_000


def topk_sizes(lengths: Tensor, gammas: Sequence[float], min_k: int) -> Tensor:
    """Number of tokens per sentence and prefix: min(n_b, max(min_k, ceil(gamma_i * n_b))) (App. A.5).

    The released code uses the padded length, clamped to the shortest sentence, instead of n_b.

    Args:
        lengths: n_b, (B,), integers.
        gammas: One share per prefix, in (0, 1], four decimals are kept.
        min_k: Smallest set, >= 1.

    Returns:
        (B, n), integers.

    Example:
        >>> topk_sizes(torch.tensor([40, 5]), gammas=(0.2, 0.7), min_k=8)
        tensor([[ 8, 28],
                [ 5,  5]])
    """
    shares = torch.tensor([round(gamma * _GAMMA_UNIT) for gamma in gammas], device=lengths.device)
    by_share = (lengths[:, None] * shares + _GAMMA_UNIT - 1) // _GAMMA_UNIT
    return torch.minimum(by_share.clamp(min=min_k), lengths[:, None])


def prefix_grams(tokens: Tensor, dims: Sequence[int]) -> list[Tensor]:
    """Token Gram matrices X_i X_i^T of nested prefixes: each is the one before plus the product of further columns.

    Args:
        tokens: (B, k, D).
        dims: Ascending prefix widths.

    Returns:
        One (B, k, k) tensor per prefix.

    Example:
        >>> prefix_grams(torch.ones(1, 1, 8), dims=(2, 8))
        [tensor([[[2.]]]), tensor([[[8.]]])]
    """
    grams: list[Tensor] = []
    for start, stop in pairwise([0, *dims]):
        block = tokens[..., start:stop]
        before = grams[-1] if grams else block.new_zeros(())
        grams.append(torch.baddbmm(before, block, block.transpose(1, 2), beta=bool(grams)))
    return grams


def centred_gram(gram: Tensor, selected: Tensor, sizes: Tensor) -> Tensor:
    """Double-centre a Gram matrix over the selected tokens and zero all others: C G C.

    Args:
        gram: (B, k, k).
        selected: (B, k), 1 for tokens of the set and 0 else.
        sizes: (B,), number of tokens in the set, at least 1.

    Returns:
        (B, k, k).

    Example:
        >>> tokens = torch.tensor([[[1.0], [3.0]]])
        >>> centred_gram(tokens @ tokens.mT, torch.tensor([[1.0, 1.0]]), torch.tensor([2.0]))
        tensor([[[ 1., -1.],
                 [-1.,  1.]]])
    """
    row_mean = (gram @ selected[:, :, None]) / sizes[:, None, None]
    mean = (row_mean * selected[:, :, None]).sum(dim=1, keepdim=True) / sizes[:, None, None]
    # (G - row - col + mean), in passes over one copy of the large matrix
    shift = row_mean - mean / 2
    centred = (gram - shift).sub_(shift.transpose(1, 2))
    return centred.mul_(selected[:, :, None]).mul_(selected[:, None, :])


class _Plan(NamedTuple):
    """What is known before any value is: the n prefixes, and the most tokens that the set of each can have."""

    dims: tuple[int, ...]
    bounds: tuple[int, ...]
    # rows that each set may add to the one before, for products of features; empty for token Gram matrices
    segments: tuple[int, ...]
    detach_full_width: bool


def _shifted(hidden: Tensor, order: Tensor, member: Tensor, sizes: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    """The tokens of the sets, (B, k, D), less the mean of the smallest; and the sum of their squares before that, (B,).

    ``order``, (B, k), says which token each row takes, and ``member`` whether it is in any set; if not, it is zero. CKA
    ignores a common shift: taking it out first keeps float32 sums of squares accurate. That mean lies among the tokens
    of every set, so no entry grows beyond its spread, also where a larger set has a token of massive norm.
    """
    tokens = hidden.gather(1, order[:, :, None].expand(-1, -1, hidden.shape[-1]))
    energy = tokens.masked_fill_(~member[:, :, None], 0.0).square().sum(dim=(1, 2))
    rank = torch.arange(plan.bounds[0], device=tokens.device)
    weight = (rank < sizes[:, :1]).to(tokens.dtype) / sizes[:, :1].clamp(min=1)
    tokens -= weight[:, None, :] @ tokens[:, : plan.bounds[0]]
    return tokens, energy


def _gram_sides(tokens: Tensor, sizes: Tensor, plan: _Plan) -> Iterator[tuple[Tensor, Tensor]]:
    """Centred Gram matrices C G_i C and C G_D C over the set of each prefix, (B, k_i, k_i), in fresh memory."""
    *grams, full = prefix_grams(tokens, [*plan.dims, tokens.shape[-1]])
    for index, (gram, bound) in enumerate(zip(grams, plan.bounds, strict=True)):
        size = sizes[:, index].clamp(min=1).to(tokens.dtype)
        in_set = (torch.arange(bound, device=tokens.device) < sizes[:, index, None]).to(tokens.dtype)
        yield tuple(centred_gram(side[:, :bound, :bound], in_set, size) for side in (gram, full))  # type: ignore[misc]


def _gram_squares(tokens: Tensor, member: Tensor, sizes: Tensor, plan: _Plan) -> Tensor:
    """(B, n, 3): the squared norms of cross, prefix and full-width products, from token Gram matrices."""
    rows = [
        torch.stack([part.sum(dim=(1, 2)) for part in (prefix * full, prefix.square_(), full.square_())], dim=1)
        for prefix, full in _gram_sides(tokens, sizes, plan)
    ]
    return torch.stack(rows, dim=1)


def _gram_gradient(tokens: Tensor, member: Tensor, sizes: Tensor, plan: _Plan, grad: Tensor) -> Tensor:
    """Gradient of the tokens: 2 A X, A being the gradient of the Gram matrix of each block of columns."""
    batch, length, width = tokens.shape
    # Of the Gram matrix of each prefix, and of the full width; centring is done already, it would change nothing.
    for_prefixes, for_full = [], tokens.new_zeros(batch, length, length)
    for index, (prefix, full) in enumerate(_gram_sides(tokens, sizes, plan)):
        cross, own, whole = grad[:, index, :, None, None].unbind(1)
        bound = plan.bounds[index]
        if not plan.detach_full_width:
            for_full[:, :bound, :bound].addcmul_(prefix, cross).addcmul_(full, whole, value=2)
        for_prefixes.append(full.mul_(cross).addcmul_(prefix, own, value=2))
    # The columns between two prefixes are in the wider one and in all beyond.
    result = torch.empty_like(tokens)
    last = plan.dims[-1]
    if not plan.detach_full_width:
        torch.bmm(for_full, tokens[..., last:], out=result[..., last:])
    for (start, stop), bound in reversed(list(zip(pairwise([0, *plan.dims]), plan.bounds, strict=True))):
        for_full[:, :bound, :bound] += for_prefixes.pop()
        result[..., start:stop] = for_full @ tokens[..., start:stop]
    return result.mul_(2)[..., : last if plan.detach_full_width else width]


def _covariances(tokens: Tensor, member: Tensor, sizes: Tensor, plan: _Plan) -> Iterator[tuple[Tensor, Tensor]]:
    """X^T X of the centred set of each prefix, (B, D, D), and its mean, (B, D), for the price of one product."""
    batch, _, width = tokens.shape
    total, summed = tokens.new_zeros(batch, width, width), tokens.new_zeros(batch, width)
    parts = zip(tokens.split(plan.segments, dim=1), member.split(plan.segments, dim=1), strict=True)
    for index, (part, present) in enumerate(parts):
        part = part.masked_fill(~present[:, :, None], 0.0)
        total.baddbmm_(part.mT, part)
        summed += part.sum(dim=1)
        mean = summed / sizes[:, index, None].clamp(min=1)
        yield torch.baddbmm(total, mean[:, :, None], summed[:, None, :], alpha=-1), mean


def _feature_squares(tokens: Tensor, member: Tensor, sizes: Tensor, plan: _Plan) -> Tensor:
    """The same as :func:`_gram_squares`, from products of features: X_i^T X_D is the first rows of X_D^T X_D."""
    rows = []
    for dim, (covariance, _) in zip(plan.dims, _covariances(tokens, member, sizes, plan), strict=True):
        square = covariance.square_()
        rows.append(torch.stack([part.sum(dim=(1, 2)) for part in (square[:, :dim], square[:, :dim, :dim], square)], 1))
    return torch.stack(rows, dim=1)


def _feature_gradient(tokens: Tensor, member: Tensor, sizes: Tensor, plan: _Plan, grad: Tensor) -> Tensor:
    """Gradient of the tokens: (X - mean) M, summed over the sets that a token is in."""
    width = plan.dims[-1] if plan.detach_full_width else tokens.shape[-1]
    matrices, means = [], []
    for index, (covariance, mean) in enumerate(_covariances(tokens, member, sizes, plan)):
        cross, own, whole = grad[:, index, :, None, None].unbind(1)
        dim = plan.dims[index]
        matrix = torch.zeros_like(covariance[..., :width])
        matrix[..., :dim] = 2 * cross * covariance[..., :dim]
        matrix[:, :dim, :dim].addcmul_(covariance[:, :dim, :dim], own, value=4)
        if not plan.detach_full_width:
            matrix[:, :dim].addcmul_(covariance[:, :dim], cross, value=2)
            matrix.addcmul_(covariance, whole, value=4)
        matrices.append(matrix)
        means.append(mean)
    result = tokens.new_empty(*tokens.shape[:2], width)
    matrix, offset = torch.zeros_like(matrices[-1]), tokens.new_zeros(len(tokens), 1, width)
    parts = zip(result.split(plan.segments, dim=1), tokens.split(plan.segments, dim=1), strict=True)
    for into, part in reversed(list(parts)):
        matrix += matrices[-1]
        offset += means.pop()[:, None] @ matrices.pop()
        torch.sub(part @ matrix, offset, out=into)
    return result.masked_fill_(~member[:, :, None], 0.0)


class _CKASquares(torch.autograd.Function):
    """The squared norms in CKA of every prefix, computed again in the backward pass instead of kept.

    That is k x k where the sets are smaller than the width, else D x D: memory grows with the length of the sentences.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, order: Tensor, member: Tensor, sizes: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        """Squares (B, n, 3) of cross, prefix and full width; and the sum of squares of all tokens in the sets, (B,)."""
        ctx.save_for_backward(hidden, order, member, sizes)
        ctx.plan = plan
        tokens, energy = _shifted(hidden, order, member, sizes, plan)
        squares = (_feature_squares if plan.segments else _gram_squares)(tokens, member, sizes, plan)
        ctx.mark_non_differentiable(energy)
        return squares, energy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Gradient of the states."""
        hidden, order, member, sizes = ctx.saved_tensors
        plan: _Plan = ctx.plan
        with no_autocast(hidden):
            tokens = _shifted(hidden, order, member, sizes, plan)[0]
            gradient = (_feature_gradient if plan.segments else _gram_gradient)(tokens, member, sizes, plan, grad)
            width = gradient.shape[-1]
            result = torch.zeros_like(hidden)
            result[..., :width].scatter_add_(1, order[:, :, None].expand(-1, -1, width), gradient)
        return result, None, None, None, None


# Compilers that trace this with lengths that vary fail on the shapes made inside; left out, it runs as it is.
@torch.compiler.disable
def _cka_squares(*inputs: Any) -> tuple[Tensor, Tensor]:
    return _CKASquares.apply(*inputs)


def topk_cka_loss(
    hidden: Tensor,
    importance: Tensor,
    mask: Tensor,
    dims: Sequence[int],
    gammas: Sequence[float],
    min_k: int = 8,
    detach_full_width: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""``1 - CKA`` between each prefix and the full width, over the most important tokens (Eq. 7-12).

    .. math:: CKA = \|X_i^T X_D\|_F^2 / (\|X_i^T X_i\|_F \, \|X_D^T X_D\|_F)

    Where the sets have no more tokens than the states have dimensions, it is computed as
    :math:`\langle C G_i C, C G_D C \rangle / (\|C G_i C\|_F \|C G_D C\|_F)` on token Gram matrices, otherwise as
    written. Either way nothing of it is kept for the backward pass.

    Args:
        hidden: H, (B, L, D).
        importance: The full width's score of each token, (B, L); only its order matters.
        mask: (B, L), true at real tokens.
        dims: n ascending prefix widths, below D.
        gammas: n shares, ascending.
        min_k: Smallest set.
        detach_full_width: Whether the full-width side is a constant.

    Returns:
        Values (B, n) and their validity (B, n). CKA of a constant is undefined, so a set of one token, or of equal
        tokens, has value zero and is not valid.
    """
    length, width = hidden.shape[1:]
    # Upper bounds of the set sizes come from the padded length, so that no value has to leave the device.
    units = [round(gamma * _GAMMA_UNIT) for gamma in gammas]
    bounds = [min(length, max(min_k, -(-length * share // _GAMMA_UNIT))) for share in units]
    # Stable: equal scores are ranked by position, with any padding.
    ranking = importance.detach().masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    sizes = topk_sizes(mask.sum(dim=1), gammas, min_k)

    segments: list[int] = []
    if bounds[-1] > width:
        # What a set adds to the one before starts at another rank in each sentence; ceil(a) - ceil(b) <= ceil(a - b).
        segments = [bounds[0], *(-(-length * (share - before) // _GAMMA_UNIT) for before, share in pairwise(units))]
        stops = sizes.split(1, dim=1)
        starts = [torch.zeros_like(stops[0]), *stops[:-1]]
        ranks = [start + torch.arange(n, device=hidden.device) for start, n in zip(starts, segments, strict=True)]
        member = torch.cat([rank < stop for rank, stop in zip(ranks, stops, strict=True)], dim=1)
        order = ranking.gather(1, torch.cat(ranks, dim=1).clamp(max=length - 1))
    else:
        order = ranking[:, : bounds[-1]]
        member = torch.arange(bounds[-1], device=hidden.device) < sizes[:, -1:]

    plan = _Plan(tuple(dims), tuple(bounds), tuple(segments), detach_full_width)
    squares, energy = _cka_squares(hidden, order, member, sizes, plan)
    cross, prefix, full = squares.unbind(dim=-1)
    if detach_full_width:
        full = full.detach()
    # A spread of tokens below rounding error, relative to their size, is no spread.
    threshold = (energy * (100 * torch.finfo(hidden.dtype).eps) ** 2).square()[:, None]
    valid = (sizes > 1) & (prefix > threshold) & (full > threshold)
    # Replaced by one before the root, not after: the gradient of sqrt at zero is infinite.
    norms = torch.where(valid, prefix, 1.0).sqrt() * torch.where(valid, full, 1.0).sqrt()
    return torch.where(valid, 1.0 - cross / norms, 0.0), valid
