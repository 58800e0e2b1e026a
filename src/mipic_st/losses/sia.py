r"""SIA, the self-distilled intra-relational alignment (paper Sec. 3.2, Eq. 4-14), as pure tensor functions.

Symbols, used in every signature below:

- ``hidden``: H of one layer, (B, L, D). B sentences, L padded tokens, D the full width.
- ``mask``: (B, L), true at real tokens; ``n_b`` is the number of real tokens of sentence b.
- ``query``: q of the layer, (B, D): the model's own pooling of ``hidden`` (h_CLS in the paper).
- ``dims``: the n truncated prefixes d_1 < ... < d_n < D. The full width is the teacher, each prefix a student.
- ``lifts``: P, one (d_i, D) matrix per prefix.

Nothing here loops over sentences and nothing depends on the padding or on the other sentences of the batch.
Everything is computed in float32, or in float64 if the input is float64, whatever autocast says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mipic_st.numerics import full_precision, no_autocast

LiftInit = Literal["identity", "orthogonal", "random"]
KLDirection = Literal["prefix_full", "full_prefix"]

# Gammas are used as integers in units of 1/10000, so that ceil(gamma * n) is exact on every device.
_GAMMA_UNIT = 10_000


class SIATerms(NamedTuple):
    """What one layer contributes, per sentence and prefix, before any aggregation.

    Attributes:
        attention: (B, n), the KL of Eq. 6.
        cka: (B, n), ``1 - CKA`` of Eq. 11; zero where it is undefined.
        cka_valid: (B, n), whether CKA is defined: at least two distinct tokens in the selected set.
    """

    attention: Tensor
    cka: Tensor
    cka_valid: Tensor


def initial_lift(dim: int, width: int, init: LiftInit = "identity") -> Tensor:
    """Make the first value of one lift P.

    Args:
        dim: Prefix width d_i, 0 < dim <= width.
        width: Full width D.
        init: ``"identity"`` is ``[I 0]``: the lifted prefix is the prefix itself padded with zeros, so training starts
            at ordinary truncation. ``"orthogonal"`` has random orthonormal rows. ``"random"`` is what a linear layer
            from d_i to D starts with.

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

    Since :math:`q \cdot (h_{:d_i} P_i) = (P_i q) \cdot h_{:d_i}`, each prefix needs one vector per sentence. Zeros
    behind the first d_i entries make one batched product with the full-width tokens enough for all prefixes.

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
    student_scores: Tensor,
    teacher_log_probs: Tensor,
    mask: Tensor,
    temperature: float,
    direction: KLDirection = "prefix_full",
) -> Tensor:
    """Divergence between the student's and the teacher's distribution over tokens (Eq. 6).

    The paper writes KL(a_i || a_D), student first, which is the default here. The released notebooks have
    KL(a_D || a_i).

    Args:
        student_scores: s_i, (B, n, L).
        teacher_log_probs: log a_D, (B, L), from :func:`masked_log_softmax`.
        mask: (B, L), true at real tokens.
        temperature: tau of the student's softmax, > 0.
        direction: ``"prefix_full"`` for KL(a_i || a_D), ``"full_prefix"`` for KL(a_D || a_i).

    Returns:
        (B, n), in nats. Zero for a sentence with one real token or none.

    Example:
        >>> mask = torch.tensor([[True, True]])
        >>> teacher = masked_log_softmax(torch.zeros(1, 2), mask)
        >>> attention_kl(torch.tensor([[[0.0, 0.0], [2.0, 0.0]]]), teacher, mask, temperature=1.0)
        tensor([[0.0000, 0.3278]])
    """
    student = masked_log_softmax(student_scores / temperature, mask)
    teacher = teacher_log_probs[:, None, :]
    real = mask[:, None, :]
    if direction == "prefix_full":
        terms = student.exp() * (student - teacher)
    else:
        terms = teacher.exp() * (teacher - student)
    return terms.masked_fill(~real, 0.0).sum(dim=-1)


def topk_sizes(lengths: Tensor, gammas: Sequence[float], min_k: int) -> Tensor:
    """Number of tokens per sentence and prefix: min(n_b, max(min_k, ceil(gamma_i * n_b))) (App. A.5).

    The released code uses the padded length clamped to the shortest sentence; here every sentence has its own length,
    so its sets do not change with its neighbours.

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
    """Token Gram matrices X_i X_i^T of nested prefixes, for the price of one full-width Gram matrix.

    Each is the one before plus the product of the columns in between.

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
    """How the squares in CKA are computed: what is known before any value is.

    Attributes:
        dims: The n prefixes.
        bounds: Most tokens that the set of each prefix can have, ascending.
        segments: Empty where token Gram matrices are used: the sets are then leading rows. Otherwise the rows that
            each set may add to the one before, for products of features.
        detach_full_width: Whether the full-width side is a constant.
    """

    dims: tuple[int, ...]
    bounds: tuple[int, ...]
    segments: tuple[int, ...]
    detach_full_width: bool


def _gathered(hidden: Tensor, order: Tensor, member: Tensor) -> Tensor:
    """The tokens of the sets, (B, k, D), zero in the rows that belong to none.

    Args:
        hidden: (B, L, D).
        order: (B, k), which token each row takes.
        member: (B, k), whether the row belongs to any set.

    Returns:
        Fresh memory.
    """
    tokens = hidden.gather(1, order[:, :, None].expand(-1, -1, hidden.shape[-1]))
    return tokens.masked_fill_(~member[:, :, None], 0.0)


def _shift(tokens: Tensor, sizes: Tensor, plan: _Plan) -> None:
    """Take the mean of the smallest set out of all rows, in place.

    CKA ignores a common shift: taking it out first keeps float32 sums of squares accurate. The mean of the smallest
    set lies among the tokens of every set, so no entry grows beyond the spread of its set, also where a larger set
    has a token of massive norm.
    """
    rank = torch.arange(plan.bounds[0], device=tokens.device)
    weight = (rank < sizes[:, :1]).to(tokens.dtype) / sizes[:, :1].clamp(min=1)
    tokens -= weight[:, None, :] @ tokens[:, : plan.bounds[0]]


def _gram_sides(tokens: Tensor, sizes: Tensor, plan: _Plan) -> Iterator[tuple[Tensor, Tensor]]:
    """Centred Gram matrices C G_i C and C G_D C over the set of each prefix, (B, k_i, k_i), in fresh memory."""
    *grams, teacher = prefix_grams(tokens, [*plan.dims, tokens.shape[-1]])
    for index, (gram, bound) in enumerate(zip(grams, plan.bounds, strict=True)):
        size = sizes[:, index].clamp(min=1).to(tokens.dtype)
        in_set = (torch.arange(bound, device=tokens.device) < sizes[:, index, None]).to(tokens.dtype)
        yield tuple(centred_gram(side[:, :bound, :bound], in_set, size) for side in (gram, teacher))  # type: ignore[misc]


def _gram_squares(tokens: Tensor, member: Tensor, sizes: Tensor, plan: _Plan) -> Tensor:
    """(B, n, 3): the squared norms of cross, student and teacher products, from token Gram matrices."""
    rows = [
        [part.sum(dim=(1, 2)) for part in (student * teacher, student.square_(), teacher.square_())]
        for student, teacher in _gram_sides(tokens, sizes, plan)
    ]
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def _gram_gradient(tokens: Tensor, member: Tensor, sizes: Tensor, plan: _Plan, grad: Tensor) -> Tensor:
    """Gradient of the tokens: 2 A X, A being the gradient of the Gram matrix of each block of columns."""
    batch, length, width = tokens.shape
    # Of the Gram matrix of each prefix, and of the full width; centring is done already, it would change nothing.
    students, full = [], tokens.new_zeros(batch, length, length)
    for index, (student, teacher) in enumerate(_gram_sides(tokens, sizes, plan)):
        cross, own, whole = grad[:, index, :, None, None].unbind(1)
        bound = plan.bounds[index]
        if not plan.detach_full_width:
            full[:, :bound, :bound].addcmul_(student, cross).addcmul_(teacher, whole, value=2)
        students.append(teacher.mul_(cross).addcmul_(student, own, value=2))
    # The columns between two prefixes are in the wider one and in all beyond.
    result = torch.empty_like(tokens)
    last = plan.dims[-1]
    if not plan.detach_full_width:
        torch.bmm(full, tokens[..., last:], out=result[..., last:])
    for (start, stop), bound in reversed(list(zip(pairwise([0, *plan.dims]), plan.bounds, strict=True))):
        full[:, :bound, :bound] += students.pop()
        result[..., start:stop] = full @ tokens[..., start:stop]
    return result.mul_(2)[..., : last if plan.detach_full_width else width]


def _covariances(tokens: Tensor, member: Tensor, sizes: Tensor, plan: _Plan) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """X^T X of the centred set of each prefix, (B, D, D), its mean, (B, D), and the tokens it adds, zero elsewhere.

    Sets are nested, so all of them together cost one product over the largest.
    """
    batch, _, width = tokens.shape
    total, summed = tokens.new_zeros(batch, width, width), tokens.new_zeros(batch, width)
    parts = zip(tokens.split(plan.segments, dim=1), member.split(plan.segments, dim=1), strict=True)
    for index, (part, present) in enumerate(parts):
        part = part.masked_fill(~present[:, :, None], 0.0)
        total.baddbmm_(part.mT, part)
        summed += part.sum(dim=1)
        mean = summed / sizes[:, index, None].clamp(min=1)
        yield torch.baddbmm(total, mean[:, :, None], summed[:, None, :], alpha=-1), mean, part


def _feature_squares(tokens: Tensor, member: Tensor, sizes: Tensor, plan: _Plan) -> Tensor:
    """The same as :func:`_gram_squares`, from products of features: X_i^T X_D is the first rows of X_D^T X_D."""
    rows = []
    for dim, (covariance, _, _) in zip(plan.dims, _covariances(tokens, member, sizes, plan), strict=True):
        square = covariance.square_()
        rows.append(torch.stack([part.sum(dim=(1, 2)) for part in (square[:, :dim], square[:, :dim, :dim], square)], 1))
    return torch.stack(rows, dim=1)


def _feature_gradient(tokens: Tensor, member: Tensor, sizes: Tensor, plan: _Plan, grad: Tensor) -> Tensor:
    """Gradient of the tokens: (X - mean) M, summed over the sets that a token is in."""
    width = plan.dims[-1] if plan.detach_full_width else tokens.shape[-1]
    matrices, means = [], []
    for index, (covariance, mean, _) in enumerate(_covariances(tokens, member, sizes, plan)):
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

    All that is kept are the states, which the model keeps anyway, and which tokens are in the sets. What is computed
    again is k x k where the sets are smaller than the width, and D x D where they are larger: memory grows with the
    length of the sentences, not with its square.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, order: Tensor, member: Tensor, sizes: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        """Squares (B, n, 3) of cross, student and teacher; and the sum of squares of all tokens in the sets, (B,)."""
        ctx.save_for_backward(hidden, order, member, sizes)
        ctx.plan = plan
        tokens = _gathered(hidden, order, member)
        energy = tokens.square().sum(dim=(1, 2))
        _shift(tokens, sizes, plan)
        squares = (_feature_squares if plan.segments else _gram_squares)(tokens, member, sizes, plan)
        ctx.mark_non_differentiable(energy)
        return squares, energy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the states."""
        hidden, order, member, sizes = ctx.saved_tensors
        plan: _Plan = ctx.plan
        with no_autocast(hidden):
            tokens = _gathered(hidden, order, member)
            _shift(tokens, sizes, plan)
            gradient = (_feature_gradient if plan.segments else _gram_gradient)(tokens, member, sizes, plan, grad)
            width = gradient.shape[-1]
            result = torch.zeros_like(hidden)
            result[..., :width].scatter_add_(1, order[:, :, None].expand(-1, -1, width), gradient)
        return result, None, None, None, None


# Compilers that trace this with lengths that vary fail on the shapes made inside; left out, it runs as it is.
@torch.compiler.disable
def _cka_squares(hidden: Tensor, order: Tensor, member: Tensor, sizes: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
    """:class:`_CKASquares`."""
    return _CKASquares.apply(hidden, order, member, sizes, plan)


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
    written. Either way nothing of it is kept for the backward pass. Tokens are ranked once; the sets of the prefixes
    are nested, hence leading rows of the ranking.

    Args:
        hidden: H, (B, L, D).
        importance: The teacher's score of each token, (B, L); only its order matters.
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
        starts = nn.functional.pad(sizes[:, :-1], (1, 0)).split(1, dim=1)
        ranks = [
            start + torch.arange(count, device=hidden.device) for start, count in zip(starts, segments, strict=True)
        ]
        member = torch.cat([rank < size for rank, size in zip(ranks, sizes.split(1, dim=1), strict=True)], dim=1)
        order = ranking.gather(1, torch.cat(ranks, dim=1).clamp(max=length - 1))
    else:
        order = ranking[:, : bounds[-1]]
        member = torch.arange(bounds[-1], device=hidden.device) < sizes[:, -1:]

    plan = _Plan(tuple(dims), tuple(bounds), tuple(segments), detach_full_width)
    squares, energy = _cka_squares(hidden, order, member, sizes, plan)
    cross, student, teacher = squares.unbind(dim=-1)
    if detach_full_width:
        teacher = teacher.detach()
    # A spread of tokens below rounding error, relative to their size, is no spread.
    threshold = (energy * (100 * torch.finfo(hidden.dtype).eps) ** 2).square()[:, None]
    valid = (sizes > 1) & (student > threshold) & (teacher > threshold)
    # Replaced by one before the root, not after: the gradient of sqrt at zero is infinite.
    norms = torch.where(valid, student, 1.0).sqrt() * torch.where(valid, teacher, 1.0).sqrt()
    return torch.where(valid, 1.0 - cross / norms, 0.0), valid


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
    teacher_attention: Tensor | None = None,
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
        detach_full_width: Whether everything of the full width (q, a_D, X_D) is a constant, so that only the prefixes
            and the lifts learn.
        teacher_attention: (B, L), importance of each token from the model's own attention maps. It replaces the
            teacher's softmax, without temperature since it is a distribution already. Default: full-width similarity.
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

        if teacher_attention is None:
            teacher_scores = token_scores(hidden, query[:, None, :])[:, 0]
            teacher_log_probs = masked_log_softmax(teacher_scores / temperature, mask)
        else:
            (teacher_scores,) = full_precision(teacher_attention)
            smallest = torch.finfo(teacher_scores.dtype).tiny
            teacher_log_probs = masked_log_softmax(teacher_scores.clamp(min=smallest).log(), mask)
        if detach_full_width:
            teacher_scores, teacher_log_probs = teacher_scores.detach(), teacher_log_probs.detach()

        attention = cka = hidden.new_zeros(shape)
        valid = torch.zeros(shape, dtype=torch.bool, device=hidden.device)
        if lifts is not None:
            student_scores = token_scores(hidden, project_query(query, [lift.to(query) for lift in lifts]))
            attention = attention_kl(student_scores, teacher_log_probs, mask, temperature, kl_direction)
        if with_cka:
            cka, valid = topk_cka_loss(hidden, teacher_scores, mask, dims, gammas, min_k, detach_full_width)
        return SIATerms(attention, cka, valid)
