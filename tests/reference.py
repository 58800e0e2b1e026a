"""Slow, obvious references of Eq. 4-17, one sentence at a time, in float64.

Written from the equations alone: this file never imports ``mipic_st`` and takes none of its shortcuts. Every token is
lifted by P, every prefix has a top-k of its own, CKA is computed from feature covariances, KL and InfoNCE are written
out as sums.

Three versions:

- plain NumPy, for values (``sia_values``, ``info_nce_value``);
- torch with autograd, sentence by sentence, for gradients (``sia_tensors``, ``info_nce_tensor``);
- ``straightforward_layer`` and ``straightforward_chain``: what somebody would write first for a whole layer, lifting
  all tokens at once and looping over the sentences in float64. Oracle and yardstick for speed.

``tests/test_reference.py`` checks the three against each other and against cases worked out by hand.
"""

import math
from decimal import Decimal

import numpy as np
import torch

# ---------------------------------------------------------------------------------------------------- NumPy, for values


def scores(tokens, query, lift=None):
    """Eq. 4 (no lift) and Eq. 5: the query against every token, or against the token's lifted prefix."""
    width = len(query)
    values = []
    for token in tokens:
        seen = token if lift is None else token[: len(lift)] @ lift
        values.append(sum(q * x for q, x in zip(query, seen, strict=True)) / math.sqrt(width))
    return np.array(values, dtype=np.float64)


def log_softmax(values, temperature):
    """Log-probabilities of ``values / temperature``."""
    scaled = [value / temperature for value in values]
    largest = max(scaled)
    log_total = largest + math.log(sum(math.exp(value - largest) for value in scaled))
    return np.array([value - log_total for value in scaled], dtype=np.float64)


def kl(log_p, log_q):
    """KL(p || q), term by term."""
    return sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))


def topk_size(length, gamma, min_k):
    """k = max(min_k, ceil(gamma n)), at most n, with gamma the decimal number that was written down."""
    written = Decimal(repr(gamma)).quantize(Decimal("0.0001"))
    return min(length, max(min_k, math.ceil(written * length)))


def most_important(importance, k):
    """Indices of the k largest values."""
    return sorted(range(len(importance)), key=lambda j: -importance[j])[:k]


def cka(x, y):
    """Linear CKA of two sets of features for the same tokens, or None where one of them is constant (Eq. 11)."""
    if len(x) < 2:
        return None
    x = x - x.mean(axis=0)
    y = y - y.mean(axis=0)
    if np.abs(x).max() < 1e-12 or np.abs(y).max() < 1e-12:
        return None
    cross = ((x.T @ y) ** 2).sum()
    return cross / (math.sqrt(((x.T @ x) ** 2).sum()) * math.sqrt(((y.T @ y) ** 2).sum()))


def sia_values(
    hidden,
    query,
    mask,
    dims,
    lifts,
    gammas,
    min_k=8,
    temperature=0.05,
    direction="prefix_full",
    full_attention=None,
):
    """Eq. 6 and Eq. 12 of one layer: attention (B, n), CKA (B, n), validity of the latter (B, n)."""
    attention, distance, valid = [], [], []
    for b in range(len(hidden)):
        real = [j for j in range(len(mask[b])) if mask[b][j]]
        tokens = np.asarray([hidden[b][j] for j in real], dtype=np.float64)
        attention.append([])
        distance.append([])
        valid.append([])
        if full_attention is None:
            importance = scores(tokens, query[b]) if real else []
            teacher = log_softmax(importance, temperature) if real else []
        else:
            importance = [float(full_attention[b][j]) for j in real]
            teacher = [math.log(value / sum(importance)) for value in importance]
        for i, dim in enumerate(dims):
            if not real:
                attention[b].append(0.0)
                distance[b].append(0.0)
                valid[b].append(False)
                continue
            student = log_softmax(scores(tokens, query[b], np.asarray(lifts[i])), temperature)
            pair = (student, teacher) if direction == "prefix_full" else (teacher, student)
            attention[b].append(kl(*pair))

            chosen = most_important(importance, topk_size(len(real), gammas[i], min_k))
            similarity = cka(tokens[chosen][:, :dim], tokens[chosen])
            distance[b].append(0.0 if similarity is None else 1.0 - similarity)
            valid[b].append(similarity is not None)
    return np.array(attention), np.array(distance), np.array(valid)


def info_nce_value(predicted, target, temperature=0.05):
    """Eq. 16 for one batch (B, d): the mean over the sentences."""
    total = 0.0
    for b in range(len(predicted)):
        similarities = []
        for j in range(len(target)):
            inner = sum(p * t for p, t in zip(predicted[b], target[j], strict=True))
            norms = math.sqrt(sum(p * p for p in predicted[b])) * math.sqrt(sum(t * t for t in target[j]))
            similarities.append(inner / norms)
        total -= log_softmax(similarities, temperature)[b]
    return total / len(predicted)


def head_value(vectors, weight_1, bias_1, weight_2, bias_2):
    """Eq. 15, phi_c: two linear layers with a ReLU between them, one vector at a time."""
    rows = []
    for vector in vectors:
        inner = [max(0.0, float(w @ vector) + c) for w, c in zip(weight_1, bias_1, strict=True)]
        rows.append([float(w @ np.array(inner)) + c for w, c in zip(weight_2, bias_2, strict=True)])
    return np.array(rows)


# ------------------------------------------------------------------------------------------------ torch, for gradients


ACTIVATIONS = {
    "Identity": lambda x: x,
    "Tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "ReLU": lambda x: x.clamp(min=0.0),
    "GELU": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
}


def push_tensor(vector, steps):
    """One vector through the modules behind a pooling, from their weights alone.

    ``steps`` are ("dense", weight, bias or None, activation's name, residual: False, True, or its weight),
    ("norm", weight, bias, eps) for a LayerNorm, or ("unit",) for a Normalize.
    """
    for kind, *parameters in steps:
        if kind == "dense":
            weight, bias, activation, residual = parameters
            out = torch.stack([(row * vector).sum() for row in weight])
            out = ACTIVATIONS[activation](out if bias is None else out + bias)
            if isinstance(residual, torch.Tensor):
                out = out + torch.stack([(row * vector).sum() for row in residual])
            elif residual:
                out = out + vector
            vector = out
        elif kind == "norm":
            weight, bias, eps = parameters
            centred = vector - vector.mean()
            vector = centred / (centred.pow(2).mean() + eps).sqrt() * weight + bias
        else:
            vector = vector / vector.pow(2).sum().sqrt()
    return vector


def cka_tensor(x, y):
    """``cka`` for tensors."""
    if len(x) < 2:
        return None
    x = x - x.mean(dim=0, keepdim=True)
    y = y - y.mean(dim=0, keepdim=True)
    if x.abs().max() < 1e-12 or y.abs().max() < 1e-12:
        return None
    cross = (x.T @ y).pow(2).sum()
    return cross / ((x.T @ x).pow(2).sum().sqrt() * (y.T @ y).pow(2).sum().sqrt())


def sia_tensors(
    hidden,
    query,
    mask,
    dims,
    lifts,
    gammas,
    min_k=8,
    temperature=0.05,
    direction="prefix_full",
    detach_full_width=True,
):
    """``sia_values`` for float64 tensors that carry gradients.

    With ``detach_full_width`` the query, the teacher's distribution and the full-width features are constants.
    """
    zero = hidden.sum() * 0.0
    attention, distance, valid = [], [], []
    for b in range(len(hidden)):
        tokens = hidden[b][mask[b].bool()]
        q = query[b].detach() if detach_full_width else query[b]
        teacher_tokens = tokens.detach() if detach_full_width else tokens
        width = tokens.shape[1]
        for i, dim in enumerate(dims):
            if len(tokens) == 0:
                attention.append(zero)
                distance.append(zero)
                valid.append(False)
                continue
            teacher_scores = torch.stack([(q * token).sum() / math.sqrt(width) for token in teacher_tokens])
            student_scores = torch.stack([(q * (token[:dim] @ lifts[i])).sum() / math.sqrt(width) for token in tokens])
            log_teacher = torch.log_softmax(teacher_scores / temperature, dim=0)
            log_student = torch.log_softmax(student_scores / temperature, dim=0)
            log_p, log_q = (log_student, log_teacher) if direction == "prefix_full" else (log_teacher, log_student)
            attention.append((log_p.exp() * (log_p - log_q)).sum())

            chosen = most_important(teacher_scores.tolist(), topk_size(len(tokens), gammas[i], min_k))
            similarity = cka_tensor(tokens[chosen][:, :dim], teacher_tokens[chosen])
            distance.append(zero if similarity is None else 1.0 - similarity)
            valid.append(similarity is not None)
    shape = (len(hidden), len(dims))
    return (
        torch.stack(attention).reshape(shape),
        torch.stack(distance).reshape(shape),
        torch.tensor(valid).reshape(shape),
    )


def info_nce_tensor(predicted, target, temperature=0.05):
    """``info_nce_value`` for tensors; the target is a constant."""
    target = target.detach()
    losses = []
    for b in range(len(predicted)):
        p = predicted[b] / predicted[b].pow(2).sum().sqrt()
        similarities = torch.stack([(p * (t / t.pow(2).sum().sqrt())).sum() for t in target])
        losses.append(torch.logsumexp(similarities / temperature, dim=0) - similarities[b] / temperature)
    return torch.stack(losses).mean()


def head_tensor(vectors, weight_1, bias_1, weight_2, bias_2):
    """``head_value`` for tensors."""
    return torch.stack([weight_2 @ (weight_1 @ vector + bias_1).clamp(min=0.0) + bias_2 for vector in vectors])


# ---------------------------------------------------------------- whole layer, the way somebody would write it first


def straightforward_layer(
    hidden,
    query,
    mask,
    dims,
    lifts,
    gammas,
    min_k=8,
    temperature=0.05,
    direction="prefix_full",
    detach_full_width=True,
):
    """Both SIA terms of one layer in float64: (attention, CKA), each averaged over sentences and summed over prefixes.

    All tokens are lifted at once; the rest is a loop over the sentences with one top-k per prefix.
    """
    hidden, query = hidden.double(), query.double()
    teacher_hidden = hidden
    if detach_full_width:
        query, teacher_hidden = query.detach(), hidden.detach()
    batch, _, width = hidden.shape
    attention = hidden.new_zeros(())
    distance = hidden.new_zeros(())
    for dim, lift, gamma in zip(dims, lifts, gammas, strict=True):
        lifted = hidden[:, :, :dim] @ lift.double()
        divergences, distances = [], []
        for b in range(batch):
            real = mask[b].bool()
            length = int(real.sum())
            if length == 0:
                divergences.append(hidden.new_zeros(()))
                continue
            teacher_scores = teacher_hidden[b][real] @ query[b] / math.sqrt(width)
            student_scores = lifted[b][real] @ query[b] / math.sqrt(width)
            log_teacher = torch.log_softmax(teacher_scores / temperature, dim=-1)
            log_student = torch.log_softmax(student_scores / temperature, dim=-1)
            if direction == "prefix_full":
                divergences.append((log_student.exp() * (log_student - log_teacher)).sum())
            else:
                divergences.append((log_teacher.exp() * (log_teacher - log_student)).sum())
            chosen = teacher_scores.topk(topk_size(length, gamma, min_k)).indices
            similarity = cka_tensor(hidden[b][real][chosen][:, :dim], teacher_hidden[b][real][chosen])
            if similarity is not None:
                distances.append(1.0 - similarity)
        attention = attention + torch.stack(divergences).mean()
        if distances:
            distance = distance + torch.stack(distances).mean()
    return attention, distance


def straightforward_chain(vectors, heads, temperature=0.05):
    """L_PIC in float64 (Eq. 17): ``vectors`` are z_1, z_2, ..., ``heads`` the four tensors of each phi_c."""
    total = vectors[0].new_zeros((), dtype=torch.float64)
    for c, head in enumerate(heads):
        predicted = head_tensor(vectors[c].double(), *(parameter.double() for parameter in head))
        total = total + info_nce_tensor(predicted, vectors[c + 1].double(), temperature)
    return total
