"""The rotation of pairs: from a start, so that a prefix finds what belongs together.

What is minimised: :class:`mipic_st.transforms.objectives.RotationObjective`, with all its defaults. These were chosen
on STS13 and SICK validation with all-MiniLM-L6-v2: weights of the similarity term from 4 to 20 and temperatures from
0.05 to 0.1 are within 0.3 of each other, a weight of 1 loses half a point at 64 dims. Many negatives help the smallest
dims, and cost little without an encoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mipic_st.transforms.fitting import BLOCK, row_orders, wants_bar
from mipic_st.transforms.objectives import RotationObjective
from mipic_st.transforms.orthogonal import OrthogonalAdam
from mipic_st.transforms.pairs import Pairs

# Pairs of a step, positives that each anchor of it is compared with, Adam's first rate.
_BATCH, _NEGATIVES, _RATE = 512, 4096, 5e-3
# Dims that take the contrastive term, where it helped.
_CONTRASTIVE_UP_TO = 32
# Steps between two looks at the held-out part.
_CHECK_EVERY = 10
#: Values of the start that rotate at most: a step takes products of so many squared.
MOST_VALUES = 1024


def fit_pairs(
    training: Pairs,
    test: Pairs,
    start: Tensor,
    dims: Sequence[int],
    *,
    max_steps: int,
    generator: torch.Generator,
    show_progress_bar: bool | None,
) -> Tensor:
    """From a start (D, D), the rotation that the held-out pairs like best of every tenth step and the last, (D, D)."""
    from tqdm.auto import trange

    objective = RotationObjective(dims, [dim for dim in dims if dim <= _CONTRASTIVE_UP_TO])
    size, columns = min(_BATCH, len(training)), max(dims)
    leading = start[:, :MOST_VALUES]
    optimizer = OrthogonalAdam(leading.shape[1], max_steps, _RATE, start.device, one_scale=False)
    orders = row_orders(len(training), size, generator)
    held_out = torch.arange(min(len(test), BLOCK))
    best, least = optimizer.basis, float("inf")

    def loss(pairs: Pairs, rows: Tensor, frame: Tensor) -> Tensor:
        anchors, positives, others, same = pairs.batch(rows, size)
        return objective(anchors, positives, frame, negatives=others, same=same)

    for step in trange(max_steps + 1, desc="Rotation of the pairs", disable=not wants_bar(show_progress_bar)):
        frame = leading @ optimizer.basis[:, :columns]
        if step % _CHECK_EVERY == 0 or step == max_steps:
            with torch.no_grad():
                value = float(loss(test, held_out, frame))
            if value < least:
                best, least = optimizer.basis, value
        if step < max_steps:
            frame.requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(training, next(orders)[:_NEGATIVES], frame), frame)
            optimizer.step(leading.T @ gradient)
    return torch.cat([leading @ best, start[:, MOST_VALUES:]], dim=1)
