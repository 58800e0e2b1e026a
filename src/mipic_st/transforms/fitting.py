"""What all fits have in common: vectors that are checked, rows that are held out, batches, steps, a progress bar.

Maps are fitted on vectors that are encoded once, without a gradient through the encoder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mipic_st.numerics import no_autocast
from mipic_st.transforms.arrays import as_array
from mipic_st.validation import checked_dims

Vectors = TypeVar("Vectors", np.ndarray, Tensor)
Rows = TypeVar("Rows", np.ndarray, Tensor)

# Rows that are held out at most, and rows per block of long sums; rows of a step of :func:`minimise`.
BLOCK, BATCH = 2048, 256
# Steps between two looks at the held-out part.
_CHECK_EVERY = 10


def as_tensor(name: str, vectors: Any) -> Tensor:
    """Floating numbers in a tensor, of whatever :func:`as_array` takes, without a copy where torch can do without."""
    if isinstance(vectors, Tensor) and vectors.is_floating_point():
        return vectors
    array = as_array(name, vectors)
    # torch takes no reversed rows and no foreign byte order, and warns of a file that is mapped for reading
    return torch.as_tensor(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))


def powers_of_rows(vectors: Tensor) -> Tensor:
    """Powers of two, (..., 1), that bring the largest value of each row near 1; to multiply by them rounds nothing."""
    most = 126 if vectors.dtype == torch.float32 else 1022
    exponents = torch.frexp(vectors.abs().amax(dim=-1, keepdim=True)).exponent.clamp(-most, most)
    return torch.exp2(-exponents.to(vectors.dtype))


def apply_matrix(name: str, vectors: Vectors, matrix: Tensor, dim: int | None, owner: str) -> Vectors:
    """Vectors as rows times a matrix; with a dim, its first columns only, and the result at unit length."""
    given = as_tensor(name, vectors)
    if given.shape[-1] != len(matrix):
        raise ValueError(f"{name} have width {given.shape[-1]}, {owner} is for {len(matrix)}.")
    if dim is not None:
        (dim,) = checked_dims("dim", [dim], matrix.shape[1])
    matrix = matrix[:, :dim].to(given.device)
    # whatever the lengths, nothing overflows or vanishes: rows are brought near 1, which rounds nothing
    wide = given.to(torch.promote_types(given.dtype, torch.float32))
    powers = powers_of_rows(wide)
    with no_autocast(given):
        mapped = (wide * powers).to(matrix.dtype) @ matrix
    mapped = mapped.to(wide.dtype) / powers if dim is None else F.normalize(mapped, dim=-1)
    mapped = mapped.to(given.dtype)
    return mapped if isinstance(vectors, Tensor) else mapped.numpy()


def checked_vectors(name: str, vectors: Any, *, directions: bool = False) -> Tensor:
    """(N, D), finite, no zeros; float32 on the device they are on. Where directions count alone, of any length."""
    tensor = as_tensor(name, vectors)
    if tensor.ndim != 2 or not len(tensor) or tensor.shape[1] < 2:
        raise ValueError(f"{name} must have the shape (N, D) with D of 2 or more, got {tuple(tensor.shape)}.")
    tensor = tensor.detach()
    largest = torch.cat([block.abs().amax(dim=1).double() for block in tensor.split(BLOCK)])
    if directions and not bool(((largest > 1e-6) & (largest < 1e12)).all()):
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        tensor = wide * powers_of_rows(wide)
    tensor = tensor.float()
    finite = torch.cat([block.isfinite().all(dim=1) for block in tensor.split(BLOCK)])
    if bad := (~finite).nonzero().flatten().tolist():
        raise ValueError(f"{name} holds NaN or infinite values in {len(bad)} of {len(tensor)} rows, first in {bad[0]}.")
    if bad := (largest == 0).nonzero().flatten().tolist():
        raise ValueError(
            f"{name} holds {len(bad)} zero vectors, the first in row {bad[0]}: they have no direction, leave them out."
        )
    return tensor


def split_rows(order: Rows, share: float, most: int = BLOCK) -> tuple[Rows, Rows]:
    """Rows that are held out, at least two and at most ``most``, and the others, of rows in a drawn order."""
    count = min(most, max(2, round(share * len(order))))
    return order[:count], order[count:]


def row_orders(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows for one step after the other: the step's batch first, then the others; each row once an epoch."""
    while True:
        order = torch.randperm(count, generator=generator)
        for position in range(0, count - batch_size + 1, batch_size):
            yield order.roll(-position)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread of the CPU: matrices are small, and threads that wait for each other cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def minimise(
    parameters: Iterable[nn.Parameter | Tensor],
    objective: Callable[[Tensor], Tensor],
    held_out: Callable[[], Tensor],
    current: Callable[[], Tensor],
    orders: Iterator[Tensor],
    *,
    max_steps: int,
    learning_rate: float,
    description: str,
    show_progress_bar: bool | None,
) -> Tensor:
    """Adam along a cosine; of every tenth step and the last, the best map on held-out rows is returned.

    ``objective`` has the rows of a step, ``held_out`` those that no step sees; ``current`` is the map as it stands.
    """
    from tqdm.auto import trange

    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps)
    best, best_value = current().detach().clone(), float("inf")

    def look() -> None:
        nonlocal best, best_value
        with torch.no_grad():
            value = float(held_out())
            if value < best_value:
                best, best_value = current().clone(), value

    for step in trange(max_steps, desc=description, disable=not wants_bar(show_progress_bar)):
        if step % _CHECK_EVERY == 0:
            look()
        optimizer.zero_grad()
        objective(next(orders)).backward()
        optimizer.step()
        schedule.step()
    look()
    return best


def wants_bar(show_progress_bar: bool | None) -> bool:
    """Whether to show a progress bar: as asked, else where the log says what goes on, like ``encode``."""
    if show_progress_bar is None:
        return logging.getLogger("mipic_st").getEffectiveLevel() in (logging.INFO, logging.DEBUG)
    return show_progress_bar
