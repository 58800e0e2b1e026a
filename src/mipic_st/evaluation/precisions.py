"""Precisions of stored vectors, and the bytes they take."""

from __future__ import annotations

from collections.abc import Sequence

from mipic_st.validation import as_list, checked_count

PRECISIONS = ("float32", "int8", "binary")


def bytes_per_vector(dim: int, precision: str = "float32") -> int:
    """Storage of one vector.

    Args:
        dim: Number of values, at least 1.
        precision: ``"float32"``, ``"int8"`` or ``"binary"``.

    Returns:
        Number of bytes, 4 per value, 1 per value, or 1 per started group of 8 values.

    Raises:
        ValueError: If ``dim`` is below 1 or ``precision`` is not one of the three.

    Example:
        >>> bytes_per_vector(64), bytes_per_vector(64, "int8"), bytes_per_vector(64, "binary")
        (256, 64, 8)
    """
    dim = checked_count("dim", dim)
    if precision == "float32":
        return 4 * dim
    if precision == "int8":
        return dim
    if precision == "binary":
        return (dim + 7) // 8
    raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}.")


def check_precisions(precisions: Sequence[str]) -> tuple[str, ...]:
    """Validate precisions: known ones, float32 among them (it fills the store that the others are calibrated on).

    Args:
        precisions: Some of ``"float32"``, ``"int8"``, ``"binary"``.

    Returns:
        The precisions in that order, each once.

    Raises:
        TypeError: If ``precisions`` is no sequence.
        ValueError: If one is unknown or float32 is missing.
    """
    precisions = as_list("precisions", precisions, "('float32', 'int8')")
    for precision in precisions:
        if precision not in PRECISIONS:
            raise ValueError(f"precisions must be among {PRECISIONS}, got {precision!r}.")
    if "float32" not in precisions:
        raise ValueError(f"precisions must include 'float32', the column others are compared with; got {precisions!r}.")
    return tuple(precision for precision in PRECISIONS if precision in precisions)
