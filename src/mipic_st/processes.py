"""Work that several processes of one training do together, so that all of them end with the same or with one error."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

Result = TypeVar("Result")


def processes() -> int:
    """How many train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def everywhere(work: Callable[[], Result]) -> Result:
    """Each process does it, and what fails in one of them is raised in all."""
    if processes() == 1:
        return work()
    value: Any = None
    error: Exception | None = None
    try:
        value = work()
    except Exception as caught:
        error = caught
    errors: list[Any] = [None] * processes()
    distributed.all_gather_object(errors, error and _portable(error))
    if first := next(filter(None, errors), None):
        raise first from error
    return value


def by_the_first(work: Callable[[], Result]) -> Result:
    """The first process does it, and all have the result, or the error."""
    if processes() == 1:
        return work()
    is_first = distributed.get_rank() == 0
    result: list[Any] = [everywhere(lambda: work() if is_first else None)]
    distributed.broadcast_object_list(result, src=0)
    return result[0]


def _portable(error: Exception) -> Exception:
    """The error as other processes can have it."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        return RuntimeError(f"{type(error).__name__}: {error}")
