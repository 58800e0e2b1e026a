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

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

LiftInit = Literal["identity", "orthogonal", "random"]
KLDirection = Literal["student_teacher", "teacher_student"]

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


def full_precision(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in float32, or untouched where they are float64.

    Args:
        *tensors: Tensors of any floating type.

    Returns:
        As many tensors.
    """
    return tuple(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)


def no_autocast(tensor: Tensor) -> AbstractContextManager:
    """A context in which autocast is off on the tensor's device.

    Args:
        tensor: Says which device.

    Returns:
        The context manager.
    """
    return torch.autocast(device_type=tensor.device.type, enabled=False)


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
    direction: KLDirection = "student_teacher",
) -> Tensor:
    """Divergence between the student's and the teacher's distribution over tokens (Eq. 6).

    The paper writes KL(a_i || a_D), student first, which is the default here. The released notebooks have
    KL(a_D || a_i).

    Args:
        student_scores: s_i, (B, n, L).
        teacher_log_probs: log a_D, (B, L), from :func:`masked_log_softmax`.
        mask: (B, L), true at real tokens.
        temperature: tau of the student's softmax, > 0.
        direction: ``"student_teacher"`` for KL(a_i || a_D), ``"teacher_student"`` for KL(a_D || a_i).

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
    if direction == "student_teacher":
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
        gram = block @ block.transpose(1, 2)
        grams.append(grams[-1] + gram if grams else gram)
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
    # (G - row - col + mean), arranged so that two passes over the large matrix are enough
    shift = row_mean - mean / 2
    return (gram - (shift + shift.transpose(1, 2))) * (selected[:, :, None] * selected[:, None, :])


def topk_cka_loss(
    hidden: Tensor,
    importance: Tensor,
    mask: Tensor,
    dims: Sequence[int],
    gammas: Sequence[float],
    min_k: int = 8,
    detach_teacher: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""``1 - CKA`` between each prefix and the full width, over the most important tokens (Eq. 7-12).

    .. math:: CKA = \|X_i^T X_D\|_F^2 / (\|X_i^T X_i\|_F \, \|X_D^T X_D\|_F)

    computed as :math:`\langle C G_i C, C G_D C \rangle / (\|C G_i C\|_F \|C G_D C\|_F)` on token Gram matrices.
    Tokens are ranked once; the sets of the prefixes are nested, hence leading rows of the ranking.

    Args:
        hidden: H, (B, L, D).
        importance: The teacher's score of each token, (B, L); only its order matters.
        mask: (B, L), true at real tokens.
        dims: n ascending prefix widths, below D.
        gammas: n shares, ascending.
        min_k: Smallest set.
        detach_teacher: Whether the full-width side is a constant.

    Returns:
        Values (B, n) and their validity (B, n). CKA of a constant is undefined, so a set of one token, or of equal
        tokens, has value zero and is not valid.
    """
    length, width = hidden.shape[1:]
    # Upper bounds of the set sizes come from the padded length, so that no value has to leave the device.
    bounds = [min(length, max(min_k, -(-length * round(gamma * _GAMMA_UNIT) // _GAMMA_UNIT))) for gamma in gammas]
    # Stable: equal scores are ranked by position, with any padding.
    ranking = importance.detach().masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ranking = ranking[:, : max(bounds)]
    tokens = hidden.gather(1, ranking[:, :, None].expand(-1, -1, width))

    sizes = topk_sizes(mask.sum(dim=1), gammas, min_k)
    rank = torch.arange(ranking.shape[1], device=hidden.device)
    selected = (rank < sizes[:, :, None]).to(hidden.dtype)  # (B, n, k)

    # CKA ignores a common shift: taking it out first keeps float32 sums of squares accurate. The mean of the smallest
    # set lies among the tokens of every set, so no entry grows beyond the spread of its set, also where a larger set
    # has a token of massive norm.
    largest, smallest = selected[:, -1, :, None], selected[:, 0, :, None]
    smallest_size = sizes[:, 0].clamp(min=1).to(hidden.dtype)
    energy = (tokens.detach() * largest).square().sum(dim=(1, 2))
    shift = ((tokens.detach() * smallest).sum(dim=1) / smallest_size[:, None])[:, None, :]
    tokens = tokens - shift

    if detach_teacher:
        grams = prefix_grams(tokens, dims)
        teacher_gram = grams[-1].detach() + prefix_grams(tokens.detach()[..., dims[-1] :], [width - dims[-1]])[0]
    else:
        *grams, teacher_gram = prefix_grams(tokens, [*dims, width])

    # A spread of tokens below rounding error, relative to their size, is no spread.
    negligible = energy * (100 * torch.finfo(hidden.dtype).eps) ** 2
    values, valid = [], []
    for index, (gram, bound) in enumerate(zip(grams, bounds, strict=True)):
        in_set = selected[:, index, :bound]
        size = sizes[:, index].clamp(min=1).to(hidden.dtype)
        student = centred_gram(gram[:, :bound, :bound], in_set, size)
        teacher = centred_gram(teacher_gram[:, :bound, :bound], in_set, size)
        student_square, teacher_square = student.square().sum(dim=(1, 2)), teacher.square().sum(dim=(1, 2))
        threshold = negligible.square()
        defined = (sizes[:, index] > 1) & (student_square > threshold) & (teacher_square > threshold)
        # Replaced by one before the root, not after: the gradient of sqrt at zero is infinite.
        norms = torch.where(defined, student_square, 1.0).sqrt() * torch.where(defined, teacher_square, 1.0).sqrt()
        cka = (student * teacher).sum(dim=(1, 2)) / norms
        values.append(torch.where(defined, 1.0 - cka, 0.0))
        valid.append(defined)
    return torch.stack(values, dim=1), torch.stack(valid, dim=1)


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
    kl_direction: KLDirection = "student_teacher",
    detach_teacher: bool = True,
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
        detach_teacher: Whether everything of the full width (q, a_D, X_D) is a constant, so that only the prefixes
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
        if detach_teacher:
            query = query.detach()
        shape = (hidden.shape[0], len(dims))

        if teacher_attention is None:
            teacher_scores = token_scores(hidden, query[:, None, :])[:, 0]
            teacher_log_probs = masked_log_softmax(teacher_scores / temperature, mask)
        else:
            (teacher_scores,) = full_precision(teacher_attention)
            smallest = torch.finfo(teacher_scores.dtype).tiny
            teacher_log_probs = masked_log_softmax(teacher_scores.clamp(min=smallest).log(), mask)
        if detach_teacher:
            teacher_scores, teacher_log_probs = teacher_scores.detach(), teacher_log_probs.detach()

        attention = cka = hidden.new_zeros(shape)
        valid = torch.zeros(shape, dtype=torch.bool, device=hidden.device)
        if lifts is not None:
            student_scores = token_scores(hidden, project_query(query, [lift.to(query.dtype) for lift in lifts]))
            attention = attention_kl(student_scores, teacher_log_probs, mask, temperature, kl_direction)
        if with_cka:
            cka, valid = topk_cka_loss(hidden, teacher_scores, mask, dims, gammas, min_k, detach_teacher)
        return SIATerms(attention, cka, valid)
